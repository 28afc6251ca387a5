"""Published kernels: which are fetched, where they go, and that every solver predicts from them."""

import os
import re
import shlex
import shutil
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from archive_server import (
    ASYMMETRIC,
    NO_PROMPT,
    SGD,
    SMALL,
    SMALL_ZIP,
    SST_2,
    SST_2_FOLDER,
    UNPACKED,
    Place,
    below,
    kernels,
    saved,
    serving,
    zip_of,
)
from command_line import Workplace, read_results
from doc_commands import argv_of, commands, make_stand_in, page_text
from lmntk.commands import download
from lmntk.errors import FileError, SettingError, UsageError
from lmntk.published import archives, catalogue, install
from lmntk.solvers import SOLVERS
from lmntk.storage.wording import data_size
from random_kernels import Case


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with serving(tmp_path, capsys, monkeypatch) as place:
        yield place


def test_a_fresh_archive_is_unpacked_to_where_runs_look_and_removed(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    out = place.get()
    assert place.unpacked() == UNPACKED
    assert f"fetching {place.mirror.url}/{SGD}: {data_size(len(SMALL_ZIP))}; " in out
    assert sorted(path.name for path in place.cache.iterdir()) == [f"{SGD}.contents.json"]


def test_installed_files_are_not_fetched_again_even_with_other_filters(place: Place) -> None:
    place.mirror.files[SGD] = zip_of(SMALL | below("x/16-13", SST_2))
    place.get("--keep_archives")
    assert (place.cache / SGD).read_bytes() == place.mirror.files[SGD]
    (place.cache / SGD).unlink()
    assert f"{SGD}: what is asked for of it is unpacked already" in place.get("--seed", "13")
    assert len(place.mirror.asked) == 1
    gone = place.result / SST_2_FOLDER / "dev_kernels_sst-2.pt"
    gone.unlink()
    assert "unpacking 1 files" in place.get()
    assert gone.read_bytes() == SST_2[gone.name]
    assert len(place.mirror.asked) == 2


def test_an_interrupted_unpacking_leaves_complete_files_and_continues_offline(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = archives.copy

    def stopping(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: BinaryIO) -> None:
        if "dev" in member.filename:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGINT)
        copy(archive, member, file)

    place.mirror.files[SGD] = SMALL_ZIP
    with monkeypatch.context() as patch:
        patch.setattr(archives, "copy", stopping)
        outcome = place.call()
    assert outcome.status == 130
    assert outcome.err.startswith(f"stopped by SIGINT: {place.cache / SGD}") and outcome.err.count("\n") == 1
    train = f"{SST_2_FOLDER}/train_kernels_sst-2.pt"
    assert place.unpacked() == {train: UNPACKED[train]}
    assert "unpacking 2 files" in place.get()
    assert place.unpacked() == UNPACKED
    assert len(place.mirror.asked) == 1


def test_a_record_that_is_spoilt_counts_as_none(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.get()
    (place.cache / f"{SGD}.contents.json").write_text("[[1", encoding="utf-8")
    assert "unpacking 0 files" in place.get()
    assert "is unpacked already" in place.get()


def test_an_archive_put_into_the_cache_by_hand_needs_no_network(place: Place) -> None:
    place.cache.mkdir()
    (place.cache / SGD).write_bytes(SMALL_ZIP)
    assert f"{place.cache / SGD} is here already" in place.get()
    assert place.unpacked() == UNPACKED
    assert place.mirror.asked == []


def test_every_layout_of_folders_is_recognised_and_what_is_not_is_counted(place: Place) -> None:
    mnli = kernels("mnli", 3)
    mnli |= {"test_kernels_mnli-mm.pt": mnli["test_kernels_mnli.pt"]}
    text = {"test_results_trec.txt": b"eval_acc = 1\n"}
    logits = {"test_logits_trec.pt": saved(torch.zeros(7, 6), torch.zeros(7))}
    place.mirror.files[SGD] = zip_of(
        below("prompt-sgd-16-shot/trec/16-100", kernels("trec", 6) | text | logits)
        | below("MNLI/16-13", mnli)
        | below("16-21", kernels("SST-2", 2))
        | {"folder/": b"", "__MACOSX/16-21/._train_kernels_sst-2.pt": b"", "README": b"", "16-21/log": b""}
        | {"a/16-21/train_kernels_imdb.pt": b""}
    )
    assert f"left out of {SGD}: 4 members, such as __MACOSX/16-21/._train_kernels_sst-2.pt\n" in place.get()
    assert place.unpacked() == (
        below("trec-roberta-base-prompt-kernel-published-sgd/16-100", kernels("trec", 6) | text | logits)
        | below("MNLI-roberta-base-prompt-kernel-published-sgd/16-13", mnli)
        | below("SST-2-roberta-base-prompt-kernel-published-sgd/16-21", SST_2)
    )


def test_an_archive_of_unknown_members_is_kept_and_described(place: Place) -> None:
    place.mirror.files[SGD] = zip_of({"kernels/a.npy": b"", "kernels/b.npy": b""})
    error = place.refuse(FileError)
    assert error.data == {"path": place.cache / SGD}
    assert "2 members, such as kernels/a.npy" in str(error)
    assert (place.cache / SGD).exists()


def test_filters_choose_what_is_unpacked_and_must_choose_something(place: Place) -> None:
    many = {
        f"{task}/16-{seed}": kernels(task, logits) for task, logits in (("cr", 2), ("trec", 6)) for seed in (13, 42)
    }
    place.mirror.files[SGD] = zip_of({k: v for folder, files in many.items() for k, v in below(folder, files).items()})
    place.get("--task", "CR", "--seed", "42", "--keep_archives")
    assert {Path(name).parent.as_posix() for name in place.unpacked()} == {
        "cr-roberta-base-prompt-kernel-published-sgd/16-42"
    }
    error = place.refuse(SettingError, "--task", "mnli-mm", "--seed", "42")
    assert error.data == {"setting": "task", "value": ["MNLI"]}
    assert "cr 16-13, cr 16-42, trec 16-13, trec 16-42" in str(error)
    place.get("--task", "trec", "--tag", "theirs")
    assert len(place.unpacked()) == 3 + 6
    assert (place.result / "trec-roberta-base-prompt-kernel-theirs/16-13/test_kernels_trec.pt").is_file()
    assert len(place.mirror.asked) == 1


def test_a_file_of_the_users_own_is_not_overwritten(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    own = place.result / SST_2_FOLDER / "train_kernels_sst-2.pt"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    assert place.refuse(FileError).data == {"path": own}
    assert place.unpacked() == {f"{SST_2_FOLDER}/{own.name}": b"mine"}


def test_a_disk_without_room_is_refused_before_the_first_byte(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    usage = shutil.disk_usage(place.folder)
    both = 2 * len(SMALL_ZIP)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=both - 1))
    error = place.refuse(SettingError)
    assert error.data == {"setting": "cache_dir", "value": place.cache}
    assert data_size(both) in str(error)
    assert not (place.cache / SGD).exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(SMALL_ZIP) + 1))
    error = place.refuse(SettingError, "--task", "SST-2")
    assert error.data == {"setting": "output_dir", "value": place.result}
    assert place.unpacked() == {}


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--formula", "sgd", "signgd", "--k", "512"], ["--formula signgd --k 512", "16 and 64"]),
        (["--k", "8"], ["argument --k", "16, 64, 512"]),
        (["--task", "sst"], ["did you mean 'sst-5'?"]),
        (["--task", "CoLA"], ["--task CoLA", "SST-2, sst-5, mr, cr, mpqa"]),
        (["--tag", "a/b"], ["--tag 'a/b'"]),
        (["--tag", "x", "--formula", "sgd", "signgd"], ["--tag x", "--formula"]),
        (["--base_url", "file:///tmp"], ["--base_url file:///tmp", "https://"]),
        (["--seeds", "13"], ["did you mean '--seed'?"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_impossible_flags_are_reported_in_a_line(place: Place, flags: list[str], facts: list[str]) -> None:
    outcome = place.call(*flags)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert all(fact in outcome.err for fact in facts)
    assert place.mirror.asked == []


def test_the_list_has_the_fourteen_published_archives_and_their_states(place: Place) -> None:
    names = [archive.name for archive in catalogue.ARCHIVES]
    assert len(set(names)) == 14
    assert {"prompt-sgd-512-shot.zip", "no_prompt-asymmetric_signgd-64-shot.zip"} < set(names)
    assert len(catalogue.PUBLISHED_TASKS) == 14
    assert place.get("--list").splitlines() == [f"{place.mirror.url}/{name}  not here" for name in names]
    place.mirror.files[SGD] = SMALL_ZIP
    place.get("--keep_archives")
    (place.result / SST_2_FOLDER / "test_kernels_sst-2.pt").unlink()
    size = data_size(len(SMALL_ZIP))
    assert place.get("--list").splitlines()[0] == (f"{place.mirror.url}/{SGD}  fetched ({size}), 2 of 3 files unpacked")


def test_kernels_that_do_not_go_with_the_formula_are_unpacked_with_a_note(place: Place) -> None:
    place.mirror.files[SGD] = zip_of(below("x/16-42", kernels("sst-2", 1, asymmetric=True)))
    folder = place.result / SST_2_FOLDER
    (note,) = [line for line in place.get().splitlines() if line.startswith("note: ")]
    assert str(folder) in note and "[2, 20, 1, 7, 1]" in note
    assert len(place.unpacked()) == 3


def test_a_note_on_kernels_that_cannot_be_used_names_flags(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UsageError("the kernels need `overwrite_kernels=True` and `kernel_formula=sgd`")

    place.mirror.files[SGD] = SMALL_ZIP
    monkeypatch.setattr(install, "find_loadable", refuse)
    assert "note: the kernels need --overwrite_kernels and --kernel_formula sgd\n" in place.get()


def test_splits_that_an_archive_lacks_are_left_out_of_the_command(place: Place) -> None:
    few = {name: content for name, content in SMALL.items() if "test_" not in name}
    place.mirror.files[SGD] = zip_of(few)
    assert "--kernel_solver logistic --no_predict --load_kernels" in place.get()
    place.mirror.files[SGD] = zip_of({name: content for name, content in few.items() if "train_" not in name})
    shutil.rmtree(place.folder / "result")
    (note,) = [line for line in place.get().splitlines() if line.startswith("note: ")]
    assert "train examples is missing" in note


def printed_commands(out: str) -> list[list[str]]:
    return [shlex.split(line) for line in out.splitlines() if " run_fewshot.sh " in line]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("published"))


@pytest.fixture
def checkout(place: Place, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The same with `result` where run_fewshot.sh looks, as seen from the working directory of runs."""
    place.folder = workplace.folder
    shutil.rmtree(place.result, ignore_errors=True)
    shutil.rmtree(place.cache, ignore_errors=True)
    monkeypatch.setattr(download, "RESULT", place.result)
    return place


def accuracy(folder: Path, task: str) -> float:
    return read_results(folder / f"test_results_{task}.txt")["eval_acc"]


@pytest.mark.parametrize(
    ("name", "flags", "task", "logits", "wanted"),
    [
        (SGD, [], "trec", 6, "LOAD_KERNELS_TAG=published-sgd TAG=published-sgd-logistic TRAINER=kernel TASK=trec K=16 "
         "SEED=42 TYPE=prompt MODEL=roberta-base bash run_fewshot.sh --kernel_solver logistic"),
        (SGD, ["--tag", "x"], "SST-2", 1, "LOAD_KERNELS_TAG=x TAG=x-logistic TRAINER=kernel TASK=SST-2 K=16 SEED=42 "
         "TYPE=prompt MODEL=roberta-base bash run_fewshot.sh --kernel_solver logistic --binary_classification"),
        (ASYMMETRIC, ["--formula", "asymmetric_signgd"], "SST-2", 1,
         "LOAD_KERNELS_TAG=published-asymmetric_signgd TAG=published-asymmetric_signgd-asym TRAINER=kernel TASK=SST-2 "
         "K=16 SEED=42 TYPE=prompt MODEL=roberta-base bash run_fewshot.sh --kernel_solver asym --kernel_formula "
         "asymmetric_signgd --binary_classification"),
        (NO_PROMPT, ["--prompt", "no_prompt", "--formula", "signgd"], "SST-2", 2,
         "LOAD_KERNELS_TAG=published-signgd TAG=published-signgd-logistic TRAINER=kernel TASK=SST-2 K=16 SEED=42 "
         "TYPE=finetune MODEL=roberta-base bash run_fewshot.sh --kernel_solver logistic --kernel_formula signgd "
         "--from_linearhead"),
    ],
    ids=["six classes", "one logit", "asymmetric", "no prompt"],
)  # fmt: skip
def test_every_suitable_solver_predicts_from_what_the_printed_command_loads(
    checkout: Place, workplace: Workplace, name: str, flags: list[str], task: str, logits: int, wanted: str
) -> None:
    files = kernels(task.lower(), logits, asymmetric=name == ASYMMETRIC)
    checkout.mirror.files[name] = zip_of(below("somewhere/16-42", files))
    (command,) = printed_commands(checkout.get(*flags))
    assert shlex.join(command) == wanted
    argv = argv_of(command, make_stand_in(checkout.folder))
    binary = logits == 1
    for solver, row in SOLVERS.items():
        if row.needs_asymmetric and name != ASYMMETRIC:
            continue
        out = checkout.folder / "predicted" / solver
        outcome = workplace.call([*argv, "--kernel_solver", solver, "--output_dir", str(out), "--disable_tqdm", "True"])
        assert (outcome.status, outcome.err) == (0, ""), outcome.err
        case = Case(logits, features=50, asymmetric=name == ASYMMETRIC)
        predicted = case.predict(solver).logits
        hits = (predicted[:, 0] > 0) == (case.test_labels > 0) if binary else predicted.argmax(1) == case.test_labels
        assert accuracy(out, task.lower()) == pytest.approx(hits.mean(), abs=1e-6)


def test_kernels_without_a_prompt_load_with_and_without_from_linearhead(checkout: Place, workplace: Workplace) -> None:
    checkout.mirror.files[NO_PROMPT] = zip_of(below("16-42", SST_2))
    (command,) = printed_commands(checkout.get("--prompt", "no_prompt", "--formula", "signgd"))
    argv = argv_of(command, make_stand_in(checkout.folder))
    with_flag = workplace.call([*argv, "--output_dir", "with"])
    without = workplace.call([*[word for word in argv if word != "--from_linearhead"], "--output_dir", "without"])
    assert (with_flag.status, without.status) == (0, 0)
    assert accuracy(checkout.folder / "with", "sst-2") == accuracy(checkout.folder / "without", "sst-2")


def test_another_folder_is_named_by_load_kernels(place: Place, workplace: Workplace) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    (command,) = printed_commands(place.get())
    assert command[-2:] == ["--load_kernels", str(place.result / SST_2_FOLDER)]
    outcome = workplace.call([*argv_of(command, make_stand_in(place.folder)), "--output_dir", "elsewhere"])
    assert (outcome.status, outcome.err) == (0, "")


PAGE = page_text("published-kernels")


def test_the_commands_of_the_page_do_what_it_says(checkout: Place, workplace: Workplace) -> None:
    checkout.mirror.files |= {
        SGD: zip_of(below("a/16-42", SST_2) | below("b/16-42", kernels("trec", 6)) | below("b/16-13", SST_2)),
        ASYMMETRIC: zip_of(below("16-42", kernels("sst-2", 1, asymmetric=True))),
        NO_PROMPT: zip_of(below("16-42", SST_2)),
    }
    predicted = 0
    for words in commands(PAGE):
        if words[:2] == ["python", "tools/download_kernels.py"]:
            checkout.get(*words[2:])
        else:
            outcome = workplace.call(argv_of(words, make_stand_in(checkout.folder)))
            assert (outcome.status, outcome.err) == (0, ""), f"{shlex.join(words)}\n{outcome.err}"
            predicted += 1
    assert predicted == 3
    assert (checkout.cache / NO_PROMPT).exists()
    assert (checkout.cache / SGD).exists(), "not all of it is unpacked"
    assert not (checkout.cache / ASYMMETRIC).exists()
    tags = {path.parent.parent.name.split("-kernel-")[1] for path in checkout.result.rglob("test_results_*.txt")}
    assert tags == {"published-sgd-logistic", "published-asym", "theirs-svr"}


def test_the_flags_of_the_page_exist() -> None:
    known = set(vars(download.make_parser().parse_args([])))
    of_runs = {"load_kernels", "binary_classification", "kernel_solver", "kernel_formula", "from_linearhead"}
    assert set(re.findall(r"--(\w+)", PAGE)) <= known | of_runs


def test_a_users_kernel_of_the_same_size_is_not_taken_for_the_published_one(place: Place) -> None:
    place.mirror.files[SGD] = zip_of(below("16-42", SST_2))
    place.get()
    (path,) = place.result.glob("*/16-42/train_kernels_sst-2.pt")
    path.write_bytes(path.read_bytes()[::-1])
    assert place.refuse(FileError).data == {"path": path}
