"""The pages on scaling and performance: their commands run, on tiny models, and their estimates are the tool's."""

import contextlib
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import parse_args as torchrun_arguments

import benchmark_kernels
import check_gpu
import estimate_kernel_cost
from benchmarks import large_peers
from benchmarks.inputs import SHAPES
from command_line import Workplace, sst2_rows, write_rows
from doc_commands import blocks, commands, flags_of_run, page_text, python_calls
from lmntk.config.arguments import parse_arguments
from tiny_models import save_tiny_checkpoint, tiny_config

SCALING, PERFORMANCE = page_text("scaling"), page_text("performance")
RUNS = "\n".join(block for block in blocks(SCALING, "bash") if "estimate_kernel_cost" not in block)
TOOL = ["python", "tools/benchmark_kernels.py"]
MEASUREMENTS = [words[2:] for words in commands(PERFORMANCE) if words[:2] == TOOL]
WHOLE_RUNS = [flags for flags in MEASUREMENTS if "--whole_runs" in flags]
ESTIMATES = [flags for flags in MEASUREMENTS if "projected" in flags]
TIMES = [flags for flags in MEASUREMENTS if "--times_only" in flags and flags not in ESTIMATES]
BENCHMARKS = [flags for flags in MEASUREMENTS if flags not in WHOLE_RUNS + TIMES + ESTIMATES]
PEERS = [words[2:] for words in commands(PERFORMANCE) if words[1:2] == ["tools/benchmarks/large_peers.py"]]
FEW = ["--train_examples", "2", "--x_examples", "3", "--threads", "1"]


def test_the_table_of_costs_is_what_the_tool_prints(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for words in commands(SCALING):
        if words[1:2] == ["tools/estimate_kernel_cost.py"]:
            assert estimate_kernel_cost.main(words[2:]) == 0
            lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| +\d", line)]
            printed += [re.split(r"\s*\|\s*", line.strip("| "))[:-1] for line in lines]
    shown = re.findall(r"^\| [^|]*\| (\d+ \| \d+ \|.*) \|$", SCALING, flags=re.MULTILINE)
    assert len(printed) == 6
    assert [row.split(" | ") for row in shown] == printed


def launches(folder: Path) -> list[list[str]]:
    """The calls of torchrun; run_fewshot.sh looks at a command before it starts processes."""
    return [call for call in python_calls(RUNS, folder) if Path(call[0]).name != "check_command.py"]


def test_runs_on_several_processes_reach_run_py_through_torchrun(tmp_path: Path) -> None:
    calls = launches(tmp_path)
    assert len(calls) == 4
    asked = []
    for call in calls:
        assert call[:2] == ["-m", "torch.distributed.run"]
        launched = torchrun_arguments(call[2:])
        assert Path(launched.training_script).name == "run.py"
        assert launched.training_script_args == flags_of_run(call)
        asked.append((launched.nnodes, launched.node_rank, launched.nproc_per_node, launched.max_restarts))
        model, data, training = parse_arguments(flags_of_run(call))
        assert (model.model_name_or_path, data.task_name, training.trainer) == ("roberta-large", "sst-2", "kernel")
    assert asked == [("1:1", 0, "4", 0), ("2", 0, "8", 0), ("2", 1, "8", 0), ("1:1", 0, "4", 3)]
    assert torchrun_arguments(calls[1][2:]).master_addr == "10.0.0.1"
    assert flags_of_run(calls[1]) == flags_of_run(calls[2])


def test_these_runs_predict(tmp_path: Path) -> None:
    """In one process here; tests/test_processes.py has several."""
    place = Workplace(tmp_path)
    folder = tmp_path / "data" / "k-shot-1k-test" / "SST-2" / "16-42"
    for split in ("train", "dev", "test"):
        write_rows(folder / f"{split}.tsv", [("sentence", "label"), *sst2_rows(4, split)])
    (tmp_path / "stand-in").mkdir()
    for call in launches(tmp_path / "stand-in")[::3]:
        flags = [*flags_of_run(call), "--model_name_or_path", str(place.model), "--disable_tqdm", "True", "--use_cpu"]
        outcome = place.call(flags)
        assert (outcome.status, outcome.err) == (0, "")
    assert (tmp_path / "result" / "kernel" / "test_results_sst-2.txt").is_file()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and data that the commands name."""
    folder = tmp_path_factory.mktemp("performance")
    save_tiny_checkpoint("bert", folder / "models" / "minilm")
    save_tiny_checkpoint("gpt2", folder / "models" / "smollm2")
    data = folder / "data" / "k-shot-1k-test" / "SST-2" / "16-42"
    for split in ("train", "test"):
        write_rows(data / f"{split}.tsv", [("sentence", "label"), *sst2_rows(4, split)])
    write_rows(folder / "data" / "original" / "SST-2" / "train.tsv", [("sentence", "label"), *sst2_rows(4, "original")])
    return folder


def table_of(text: str) -> list[dict[str, str]]:
    """The rows of a printed Markdown table, by column."""
    lines = [re.split(r"\s*\|\s*", line[1:-1].strip(" ")) for line in text.splitlines() if line[:2] == "| "]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


Measure = Callable[[list[str]], list[dict[str, str]]]


@pytest.fixture
def measure(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Generator[Measure, None, None]:
    """Benchmarks tiny models on a few examples, without a process for each engine; the rows of the table."""

    def here(work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    def rows_of(flags: list[str]) -> list[dict[str, str]]:
        with contextlib.chdir(models):
            assert benchmark_kernels.main(flags) == 0
        return table_of(capsys.readouterr().out)

    monkeypatch.setattr(benchmark_kernels, "in_own_process", here)
    for shape in ("quick", "bert-base"):
        monkeypatch.setitem(SHAPES, shape, tiny_config("bert", vocab_size=30522))
    threads = torch.get_num_threads()
    yield rows_of
    torch.set_num_threads(threads)


@pytest.mark.parametrize("flags", BENCHMARKS, ids=" ".join)
def test_a_benchmark_measures(models: Path, measure: Measure, flags: list[str]) -> None:
    rows = measure([*flags, *FEW])
    engines = flags[flags.index("--engines") + 1 :] if "--engines" in flags else ["factored"]
    engines = list(benchmark_kernels.ENGINES) if "--quick" in flags else engines
    assert [row["engine"] for row in rows] == ["published", *engines]
    assert all(float(row["error"]) <= 2e-6 for row in rows), "SPEC: float32 against float64"
    if "--json" in flags:
        assert (models / flags[flags.index("--json") + 1]).is_file()


@pytest.mark.parametrize("flags", TIMES, ids=" ".join)
def test_a_benchmark_of_formulas_divides_by_the_first(measure: Measure, flags: list[str]) -> None:
    rows = measure([*flags, *FEW, "--train_examples", "6"])
    assert [row["formula"] for row in rows] == flags[flags.index("--formula") + 1 :][:2] == ["sgd", "signgd"]
    assert rows[0]["× first formula"] == "1.00" and float(rows[1]["× first formula"]) > 0


@pytest.mark.parametrize("flags", ESTIMATES, ids=" ".join)
def test_a_benchmark_of_estimates_has_a_row_for_each_width(measure: Measure, flags: list[str]) -> None:
    rows = measure([*flags, *FEW])
    widths = flags[flags.index("--projection_width") + 1 : flags.index("--train_kernel")]
    assert [row["engine"] for row in rows] == ["factored", *(f"projected {width}" for width in widths)]
    assert rows[0]["× factored"] == "1.0"


@pytest.mark.parametrize("flags", PEERS, ids=" ".join)
def test_the_command_of_other_libraries_is_one_that_their_tool_reads(flags: list[str]) -> None:
    given = large_peers.make_parser().read(flags)
    assert given.peers == ["bergson", "kronfluence"] and (given.train_examples, given.x_examples) == (256, 256)


def test_the_benchmarks_are_run_as_they_stand(models: Path) -> None:
    with contextlib.chdir(models):
        jobs = [
            job
            for flags in BENCHMARKS
            for job in benchmark_kernels.jobs_of(benchmark_kernels.make_parser().read(flags))
        ]
    assert len(jobs) == len(BENCHMARKS) + 1
    assert TIMES and WHOLE_RUNS and ESTIMATES and PEERS


def test_the_other_commands_are_accepted_as_they_stand() -> None:
    for flags in WHOLE_RUNS:
        given = benchmark_kernels.make_parser().read(flags)
        assert given.whole_runs and given.against and given.model and given.data_dir
    checks = [words for words in commands(PERFORMANCE) if words[:2] != TOOL and words[2:] not in PEERS]
    assert [words[:2] for words in checks] == [["bash", "tools/check_gpu.sh"]] * 2
    given = [check_gpu.make_parser().read(words[2:]) for words in checks]
    assert [(one.cpu, one.tiny) for one in given] == [(False, False), (True, True)]
