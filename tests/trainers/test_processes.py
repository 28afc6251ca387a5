"""Several processes, started by torchrun: the same kernels, to the bit where the tiles are the same."""

import contextlib
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch

import oracle
from command_line import FORMULAS, SENTENCES, Workplace, flags_of, read_kernel, read_results, snapshot, write_rows
from lmntk import distributed
from lmntk.config.arguments import TrainingArguments
from lmntk.errors import PeerExitedError, ReportedElsewhereError, UsageError
from lmntk.trainers.kernel import KernelTrainer
from lmntk.trainers.loaded_kernels import LoadedKernelTrainer

SIZES = {"train": 6, "dev": 5, "test": 277}
"""RTE's numbers of test rows, which neither two nor three divide; a train set smaller than some numbers of tiles."""
TILED = ("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "25")
NOT_TILED = ("--kernel_dtype", "float64")
ESTIMATED = (*TILED, "--kernel_engine", "projected", "--projection_tolerance", "0.05", "--kernel_dtype", "float64")
HERE = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent / 'src'}:{HERE / 'helpers'}"}


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    words = [sentence.split() for sentence in SENTENCES]
    for split, size in SIZES.items():
        rows = [
            (
                str(i),
                " ".join(words[i % 6] * (1 + i % 3)),
                SENTENCES[(i + 1) % 6],
                ("entailment", "not_entailment")[i % 2],
            )
            for i in range(size)
        ]
        write_rows(place.data / f"{split}.tsv", [("index", "sentence1", "sentence2", "label"), *rows])
    return place


def flags(*more: str) -> list[str]:
    return ["--task_name", "rte", *more]


class Launcher:
    """torchrun: it starts every process of a command, and starts them again, as it always does."""

    def __init__(self, place: Workplace, python: str) -> None:
        self.place, self._python = place, python
        self._environment = {**ENVIRONMENT, "PYTHON_EXEC": python}  # what torchrun starts

    def start(self, processes: int, runs: list[dict], *words: str, **variables: str) -> subprocess.Popen[str]:
        """Give command lines to so many processes."""
        path = self.place.folder / f"runs-{len(list(self.place.folder.glob('runs-*')))}.json"
        path.write_text(json.dumps(runs), encoding="utf-8")
        torchrun = [self._python, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        return subprocess.Popen(
            [*torchrun, *(words or ("--standalone",)), str(HERE / "helpers" / "process_runs.py"), str(path)],
            cwd=self.place.folder,
            env=self._environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, processes: int, runs: list[dict], *words: str, **variables: str) -> tuple[int, str]:
        """Do that and wait for them; return the status and what they said on standard error."""
        return finish(self.start(processes, runs, *words, **variables))


def finish(launched: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for torchrun; return its status and what was said on standard error."""
    with launched:
        try:
            said = launched.communicate(timeout=240)[1]
        finally:
            launched.kill()
    return launched.returncode, said


@pytest.fixture(scope="module")
def torchrun(place: Workplace, warm_python: str) -> Launcher:
    return Launcher(place, warm_python)


def adjusted_by(folder: str) -> list[str]:
    """Solve with the kernels, in their files, and untrained logits of a folder; the model is not at hand."""
    in_file = ["--lstsq_method", "cholesky", "--kernel_regularization", "0.01"]
    return [*in_file, "--adjust_for_init", "--load_kernels", folder, "--model_name_or_path", "no/model"]


@pytest.fixture(scope="module")
def alone(place: Workplace) -> dict[str, Path]:
    """The output folders of one process: of each formula in tiles, and of one in the tiles that it chose itself."""
    folders = {formula: place.run(*flags(*flags_of(formula), *TILED), output=f"1 {formula}") for formula in FORMULAS}
    folders["estimated"] = place.run(*flags(*ESTIMATED), output="1 estimated")
    return folders | {"chosen": place.run(*flags(*NOT_TILED), output="1 chosen")}


@pytest.fixture(scope="module", params=[2, 3])
def together(request: pytest.FixtureRequest, place: Workplace, torchrun: Launcher) -> dict[str, Path]:
    """The same of two and of three processes."""
    names = {formula: f"{request.param} {formula}" for formula in [*FORMULAS, "chosen", "estimated"]}
    runs = [{"argv": place.argv(*flags(*flags_of(f), *TILED), output=names[f])} for f in FORMULAS]
    runs.append({"argv": place.argv(*flags(*NOT_TILED), output=names["chosen"])})
    runs.append({"argv": place.argv(*flags(*ESTIMATED), output=names["estimated"])})
    names["adjusted"] = f"{request.param} adjusted"
    runs.append({"argv": place.argv(*flags(*adjusted_by(names["sgd"])), output=names["adjusted"])})
    status, said = torchrun.run(request.param, runs)
    assert status == 0, said
    assert said.count("results are in ") == 6
    return {formula: place.folder / name for formula, name in names.items()}


@pytest.mark.parametrize("formula", [*FORMULAS, "estimated"])
def test_in_equal_tiles_the_kernels_are_those_of_one_process_to_the_byte(
    alone: dict[str, Path], together: dict[str, Path], formula: str
) -> None:
    wanted, found = snapshot(alone[formula]), snapshot(together[formula])
    assert found.keys() == wanted.keys()
    for name in wanted:
        if name.endswith(".pt"):
            assert found[name][0] == wanted[name][0], name
    for name in ("eval_results_rte.txt", "test_results_rte.txt"):
        assert read_results(together[formula] / name) == pytest.approx(read_results(alone[formula] / name))
    note, of_one = (
        json.loads((folders[formula] / "test_kernels_rte.json").read_text()) for folders in (together, alone)
    )
    assert note["processes"] in (2, 3)
    keys = ("projection", "projection_tolerance", "projection_error")
    assert [note.get(key) for key in keys] == [of_one.get(key) for key in keys]
    assert (note.get("projection_error") is not None) == (formula == "estimated")


def test_in_tiles_of_its_own_choice_the_kernel_differs_by_rounding(
    alone: dict[str, Path], together: dict[str, Path]
) -> None:
    tiles = [json.loads((f["chosen"] / "test_kernels_rte.json").read_text())["x_tile"] for f in (alone, together)]
    assert tiles[0] > tiles[1]
    for split in SIZES:
        found, wanted = (read_kernel(folders["chosen"], split, "rte") for folders in (together, alone))
        # Rounding of float64: the order of sums, and padding, are all that differs.
        assert oracle.relative_error(found, wanted) <= 1e-12


def test_loaded_kernels_and_their_untrained_logits_give_several_processes_the_results_of_one(
    place: Workplace, alone: dict[str, Path], together: dict[str, Path]
) -> None:
    wanted = place.run(*flags(*adjusted_by(str(alone["sgd"]))), output="1 adjusted")
    for name in ("eval_results_rte.txt", "test_results_rte.txt"):
        found, alone_found = (read_results(folder / name) for folder in (together["adjusted"], wanted))
        assert max(results.pop("lstsq_residual") for results in (found, alone_found)) <= 1e-12
        assert found == pytest.approx(alone_found)


def test_a_process_that_is_killed_is_started_again_and_what_was_finished_is_used(
    place: Workplace, torchrun: Launcher, alone: dict[str, Path]
) -> None:
    argv = place.argv(*flags(*TILED), output="killed")
    status, said = torchrun.run(2, [{"argv": argv, "dies": "killed"}], "--standalone", "--max-restarts", "1")
    assert status == 0, said
    assert " tiles of a run that was stopped are used" in said
    for split in SIZES:
        name = f"{split}_kernels_rte.pt"
        assert (place.folder / "killed" / name).read_bytes() == (alone["sgd"] / name).read_bytes()


def test_a_process_that_fails_ends_the_run_with_its_error_and_its_tiles_stay(
    place: Workplace, torchrun: Launcher
) -> None:
    status, said = torchrun.run(2, [{"argv": place.argv(*flags(*TILED), output="failed"), "dies": "error"}])
    assert status != 0
    assert "RuntimeError: a cosmic ray" in said
    assert not (place.folder / "failed" / "test_kernels_rte.pt").exists()
    assert len(list((place.folder / "failed").glob("*_tiles_rte/*.tile"))) >= 1


@pytest.mark.parametrize("kind", [KernelTrainer, LoadedKernelTrainer])
def test_only_the_first_process_hashes_what_defines_a_kernel(
    kind: type[LoadedKernelTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "on_rank_zero", lambda work, *args, **kwargs: None)  # as on the other processes
    trainer = object.__new__(kind)  # without anything to hash
    trainer.args = TrainingArguments(output_dir="unused")
    assert trainer._find_kernel("train") is None


def test_a_mistake_is_told_once(place: Workplace, torchrun: Launcher) -> None:
    data = place.folder / "wrong"
    write_rows(data / "train.tsv", [("index", "sentence1", "sentence2", "label"), ("0", "a", "b", "perhaps")])
    for split in ("dev", "test"):
        (data / f"{split}.tsv").write_bytes((place.data / f"{split}.tsv").read_bytes())
    runs = [{"argv": place.argv(*flags("--data_dir", str(data)), output="wrong")}]
    told = place.folder / "status"
    status, said = torchrun.run(2, runs, **{distributed.STATUS_FILE: str(told)})  # as under run_fewshot.sh
    (sentence,) = said.splitlines()
    assert sentence.startswith("error: ") and "'perhaps'" in sentence
    assert (status, told.read_text()) == (0, "2\n")
    status, said = torchrun.run(2, runs)
    assert status == 1
    lines = said.splitlines()
    assert lines[0] == sentence, "torchrun's report comes after it"
    assert f"  traceback : {sentence}" in lines, "and names it"


@pytest.mark.parametrize(
    ("error", "by_all", "status", "left"),
    [
        (UsageError("x"), True, 0, "2\n"),
        (UsageError("x"), False, 2, "2\n"),
        (ReportedElsewhereError("x"), True, 0, "2\n"),
        (PeerExitedError("x"), False, 2, None),
    ],
)
def test_only_processes_that_all_end_alike_end_well_for_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: UsageError, by_all: bool, status: int, left: str | None
) -> None:
    monkeypatch.setenv(distributed.STATUS_FILE, str(tmp_path / "status"))
    error.met_by_all = by_all
    assert distributed.end_with(error) == status
    assert ((tmp_path / "status").read_text() if left else None) == left
    monkeypatch.delenv(distributed.STATUS_FILE)
    assert distributed.end_with(error) == 2


def test_two_machines_share_one_kernel(place: Workplace, torchrun: Launcher, alone: dict[str, Path]) -> None:
    run = [{"argv": place.argv(*flags(*TILED), output="machines")}]
    meeting = ("--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--node_rank")
    other = torchrun.start(1, run, *meeting, "1")
    status, said = torchrun.run(1, run, *meeting, "0")
    statuses = status, *finish(other)[:1]
    assert statuses == (0, 0), said
    kernel = read_kernel(place.folder / "machines", "test", "rte")
    assert torch.equal(kernel, read_kernel(alone["sgd"], "test", "rte"))


def free_port() -> int:
    """A port that is free, and not of those that the system gives to outgoing connections."""
    for port in range(20011, 20111):
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port
    pytest.skip("no port is free")
