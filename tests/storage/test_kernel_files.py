"""Files that are whole or absent, kernels that stay with their descriptions, and a log that many write at once."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

from lmntk.errors import FileError, KernelMismatchError, UsageError
from lmntk.storage import atomic, kernel_files, kernel_metadata, logits_files, run_results
from lmntk.storage.paths import RunPaths
from saved_kernels import save_kernel

FORK = multiprocessing.get_context("fork")
KERNEL = torch.arange(24, dtype=torch.float64).reshape(2, 2, 3, 2)
LABELS = torch.tensor([0, 1, 1])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return RunPaths(tmp_path, "sst-2").kernel("dev")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_file_names_are_the_published_ones() -> None:
    assert RunPaths("out", "sst-2").kernel("dev") == Path("out/dev_kernels_sst-2.pt")
    assert RunPaths("out", "sst-2").description("dev") == Path("out/dev_kernels_sst-2.json")
    assert RunPaths(Path("out"), "mnli").logits("test:mnli-mm") == Path("out/test_logits_mnli-mm.pt")


def test_the_output_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    folder = atomic.prepare_output_dir(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    assert names(folder) == []
    atomic.prepare_output_dir(str(folder))


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_way_of_the_output_folder_is_told_with_the_flag(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / below
    with pytest.raises(FileError, match=os.strerror(errno.ENOTDIR if below else errno.EEXIST)) as caught:
        atomic.prepare_output_dir(folder)
    assert caught.value.data == {"path": folder, "setting": "output_dir"}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="a folder that takes no files is known on Linux only")
def test_an_output_folder_on_a_file_system_that_takes_no_files_is_told() -> None:
    with pytest.raises(FileError, match="`output_dir=/proc/self/task`"):
        atomic.prepare_output_dir("/proc/self/task")


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"new ")
        file.flush()
        assert target.read_bytes() == b"old"
        file.write(b"content")

    atomic.write_atomically(target, write)
    assert target.read_bytes() == b"new content"
    assert names(tmp_path) == ["file"]


def test_a_new_file_has_the_rights_that_other_new_files_have(tmp_path: Path) -> None:
    atomic.write_atomically(tmp_path / "ours", lambda file: None)
    (tmp_path / "other").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        atomic.write_atomically(target, write)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_kernel_that_outgrows_the_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    """The file system refuses while torch.save writes, which makes an error of its own of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UsageError, match=r"cannot write .*k\.pt \(File too large\): make room"):
            save_kernel(tmp_path / "k.pt", torch.ones(8, 2, 100, 2), torch.ones(100), {})
        with pytest.raises(UsageError, match=r"cannot write .*l\.pt \(File too large\): make room"):
            logits_files.save_logits(tmp_path / "l.pt", torch.ones(5000, 2), torch.ones(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) in ([], ["k.json"])


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UsageError) as caught:
        atomic.write_atomically(tmp_path / "file", write)
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'file'} (No space left on device): make room, or free the path, "
        "and give the same command again; what was finished is kept"
    )
    assert names(tmp_path) == []


def test_a_text_is_written_as_it_is_into_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "train.csv"
    for text in ("0,old\n", "0,é\r\n"):
        atomic.write_text(path, text, make_folder=True)
    assert path.read_bytes() == "0,é\r\n".encode()
    assert names(path.parent) == ["train.csv"]
    with pytest.raises(FileError) as caught:
        atomic.write_text(path / "train.csv", "", make_folder=True)
    assert caught.value.data["path"] == path / "train.csv"


def test_a_kernel_file_is_a_plain_pair_of_tensors_and_its_description_lies_beside_it(path: Path) -> None:
    save_kernel(path, KERNEL.float(), LABELS, {"formula": "sgd", "template": "é*mask*"})
    kernel, labels = torch.load(path, weights_only=True)
    assert kernel.dtype == torch.float64
    assert torch.equal(kernel, KERNEL)
    assert torch.equal(labels, LABELS)
    description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert description == {"formula": "sgd", "template": "é*mask*", "kernel_sha256": digest}
    assert kernel_metadata.read_description(path) == description
    assert names(path.parent) == ["dev_kernels_sst-2.json", "dev_kernels_sst-2.pt"]


@pytest.mark.parametrize("shape", [(2, 2, 3, 2), (2, 4, 1, 3, 1)])
def test_a_kernel_comes_back_as_it_was_saved(path: Path, shape: tuple[int, ...]) -> None:
    kernel = torch.randn(shape, dtype=torch.float64)
    save_kernel(path, kernel, LABELS.float(), {})
    loaded, labels = kernel_files.load_kernel(path)
    assert torch.equal(loaded, kernel)
    assert torch.equal(labels, LABELS.float())


def test_the_same_kernel_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for target in paths:
        save_kernel(target, KERNEL, LABELS, {})
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_slice_of_a_large_array_makes_a_small_file(path: Path) -> None:
    large = torch.zeros(2, 2, 30_000, 2, dtype=torch.float64)
    save_kernel(path, large[:, :, :3], LABELS, {})
    logits_files.save_logits(path.with_name("logits.pt"), large[0, 0, :3], LABELS)
    assert path.stat().st_size < 10_000
    assert path.with_name("logits.pt").stat().st_size < 10_000


def test_a_kernel_without_a_description_loads(path: Path) -> None:
    torch.save((KERNEL.float(), LABELS), path)
    kernel, labels = kernel_files.load_kernel(path)
    assert kernel_metadata.read_description(path) is None
    assert kernel.dtype == torch.float64
    assert torch.equal(kernel, KERNEL)
    assert torch.equal(labels, LABELS)


def test_a_missing_kernel_is_told(path: Path) -> None:
    with pytest.raises(FileError, match="does not exist.*`load_kernels`") as caught:
        kernel_files.load_kernel(path)
    assert caught.value.data == {"path": path}


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("kept", [0, 10, 700, -1])
def test_a_truncated_kernel_is_told(path: Path, kept: int, described: bool) -> None:
    save_kernel(path, KERNEL, LABELS, {})
    path.write_bytes(path.read_bytes()[:kept])
    if not described:
        path.with_suffix(".json").unlink()
    with pytest.raises(
        UsageError, match=r"dev_kernels_sst-2\.pt cannot be read as kernel \(.*`overwrite_kernels=True`"
    ):
        kernel_files.load_kernel(path)


def test_a_file_that_is_no_kernel_at_all_is_told(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match="cannot be read as kernel"):
        kernel_files.load_kernel(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="cannot be read as kernel"):
        kernel_files.load_kernel(path)


def test_a_file_that_would_run_code_is_not_run(path: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "hacked"),)

    torch.save((KERNEL, Attack()), path)
    with pytest.raises(UsageError, match="cannot be read as kernel"):
        kernel_files.load_kernel(path)
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (KERNEL, "does not hold a pair of tensors, kernel and labels"),
        ((KERNEL, [0, 1, 1]), "does not hold a pair of tensors, kernel and labels"),
        ((KERNEL[0], LABELS), "holds an array of shape [2, 3, 2], not a kernel"),
        ((KERNEL[:, :1], LABELS), "holds an array of shape [2, 1, 3, 2], not a kernel"),
        ((KERNEL[:, :, :0], LABELS[:0]), "holds an array of shape [2, 2, 0, 2], not a kernel"),
        ((KERNEL[None], LABELS), "holds an array of shape [1, 2, 2, 3, 2], not a kernel"),
        ((KERNEL, LABELS[:2]), "holds labels of shape [2] for 3 examples"),
        ((KERNEL, LABELS[:, None]), "holds labels of shape [3, 1] for 3 examples"),
    ],
)
def test_arrays_of_another_shape_are_told(path: Path, content: Any, message: str) -> None:
    torch.save(content, path)
    with pytest.raises(UsageError) as caught:
        kernel_files.load_kernel(path)
    assert f"{path} {message}" in str(caught.value)


def test_a_kernel_beside_the_description_of_another_is_told(path: Path) -> None:
    save_kernel(path, KERNEL, LABELS, {})
    torch.save((KERNEL + 1, LABELS), path)
    with pytest.raises(KernelMismatchError, match="remove the description") as caught:
        kernel_files.load_kernel(path)
    assert caught.value.data == {"path": path, "differences": ["kernel_sha256"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"formula": "sg', "cannot be read"), ("", "cannot be read"), ("[1]", "is not a JSON object")],
)
def test_a_description_that_does_not_parse_is_told(path: Path, text: str, message: str) -> None:
    torch.save((KERNEL, LABELS), path)
    path.with_suffix(".json").write_text(text)
    with pytest.raises(UsageError, match=rf"dev_kernels_sst-2\.json {message}.*`overwrite_kernels=True`"):
        kernel_files.load_kernel(path)


def check_that_a_kernel_stands_beside_its_own_description(path: Path) -> bool:
    """Whether there is a kernel; fails if it is damaged or described as another."""
    if not path.exists():
        return False
    kernel, _ = kernel_files.load_kernel(path)
    description = kernel_metadata.read_description(path)
    assert description is not None
    assert description["number"] == kernel[0, 0, 0, 0].item()
    return True


def fail_at_file_operation(patches: pytest.MonkeyPatch, stop_at: int) -> None:
    """Make the `stop_at`-th renaming, or removal of a file that counts, fail as a kill would: before it happens."""
    left = stop_at
    for operation in (Path.replace, Path.unlink):

        def counted(self: Path, *args: Any, operation: Any = operation, **kwargs: Any) -> Any:
            nonlocal left
            left -= operation.__name__ == "replace" or not self.name.endswith(".tmp")
            if left == 0:
                raise KeyboardInterrupt
            return operation(self, *args, **kwargs)

        patches.setattr(Path, operation.__name__, counted)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
@pytest.mark.parametrize("old", [True, False])
def test_an_interrupted_save_never_leaves_a_kernel_beside_another_description(
    path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, old: bool
) -> None:
    if old:
        save_kernel(path, torch.full((2, 2, 3, 2), 1.0), LABELS, {"number": 1})
    with monkeypatch.context() as patches:
        fail_at_file_operation(patches, stop_at)
        interrupted = False
        try:
            save_kernel(path, torch.full((2, 2, 3, 2), 2.0), LABELS, {"number": 2})
        except KeyboardInterrupt:
            interrupted = True
    # Three operations: the old kernel goes, the new description comes, the new kernel comes.
    assert interrupted == (stop_at <= 3)
    exists = check_that_a_kernel_stands_beside_its_own_description(path)
    assert exists == (stop_at == 4 or (old and stop_at == 1))


def save_for_ever(path: Path, first: int) -> None:
    number = first
    while True:
        number += 1
        save_kernel(path, torch.full((2, 2, 3, 2), float(number)), LABELS, {"number": number})


def test_a_save_killed_at_any_moment_never_leaves_a_kernel_beside_another_description(path: Path) -> None:
    for trial in range(8):
        process = FORK.Process(target=save_for_ever, args=(path, 1000 * trial))
        process.start()
        time.sleep(0.02 + 0.007 * trial)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        check_that_a_kernel_stands_beside_its_own_description(path)


def test_equal_descriptions_do_not_differ() -> None:
    wanted = {"formula": "sgd", "data": {"dev": "ab"}, "template": ("a", "b"), "grad_dim": 4}
    stored = json.loads(json.dumps(wanted)) | {"seconds": 3.0}
    assert kernel_metadata.kernel_differences(stored, wanted) == []


def test_differences_are_told_key_by_key_and_only_for_what_is_wanted() -> None:
    wanted = {"formula": "signgd", "data": {"train": "ab", "dev": "cd"}, "grad_dim": 4, "engine": None, "new": "x"}
    stored = {"formula": "sgd", "data": {"train": "ab", "dev": "ef", "test": "gh"}, "grad_dim": 5, "seconds": 3.0}
    assert kernel_metadata.kernel_differences(stored, wanted) == [
        "formula: stored sgd, now signgd",
        "data.dev: stored ef, now cd",
        "data.test: stored gh, now nothing",
        "grad_dim: stored 5, now 4",
        "new: stored nothing, now x",
    ]


def test_logits_come_back_as_they_were_saved(tmp_path: Path) -> None:
    target = RunPaths(tmp_path, "rte").logits("test")
    logits = torch.randn(3, 2)
    logits_files.save_logits(target, logits, LABELS)
    loaded, targets = logits_files.load_logits(target)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, logits)
    assert torch.equal(targets, LABELS)


def test_a_file_that_holds_no_logits_is_told(path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist: compute the logits first"):
        logits_files.load_logits(path)
    torch.save((KERNEL, LABELS), path)
    with pytest.raises(UsageError, match=r"holds arrays of shape \[2, 2, 3, 2\] and \[3\], not logits"):
        logits_files.load_logits(path)


def test_metrics_are_written_as_python_writes_numbers_and_in_their_order(tmp_path: Path) -> None:
    metrics = {
        "eval_acc": np.float64(0.4583333333333333),
        "eval_mnli/acc": 1.0,
        "eval_loss": torch.tensor(0.1, dtype=torch.float64),
        "eval_f1": 1e-05,
        "eval_corr": float("nan"),
        "rank0": np.int64(16),
        "grad_dim": 230874,
    }
    run_results.write_metrics(tmp_path / "eval_results_x.txt", metrics)
    assert (tmp_path / "eval_results_x.txt").read_text() == (
        "eval_acc = 0.4583333333333333\neval_mnli/acc = 1.0\neval_loss = 0.1\neval_f1 = 1e-05\neval_corr = nan\n"
        "rank0 = 16\ngrad_dim = 230874\n"
    )


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def read_log(path: Path) -> list[Any]:
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_log_line_is_strict_json_whatever_the_record_holds(tmp_path: Path) -> None:
    record = {
        "task_name": "sst-2\n",
        "template": "é\u2028",
        "acc": np.float64(0.5),
        "rank0": np.int64(3),
        "loss": float("nan"),
        "nested": {"inf": [float("inf"), 1.5], 3: (1, 2)},
        "output_dir": Path("a/b"),
        "flag": True,
        "missing": None,
        "array": torch.tensor([1.0, float("nan")]),
    }
    run_results.append_log(tmp_path / "log", record)
    assert len((tmp_path / "log").read_text(encoding="utf-8").split("\n")) == 2
    assert json.loads((tmp_path / "log").read_bytes(), parse_constant=refuse_constant) == {
        "task_name": "sst-2\n",
        "template": "é\u2028",
        "acc": 0.5,
        "rank0": 3,
        "loss": None,
        "nested": {"inf": [None, 1.5], "3": [1, 2]},
        "output_dir": "a/b",
        "flag": True,
        "missing": None,
        "array": [1.0, None],
    }


def append_many(path: Path, process: int) -> None:
    for number in range(40):
        run_results.append_log(path, {"process": process, "number": number, "filling": "x" * 20_000})


def test_many_processes_append_whole_lines_each_in_its_own_order(tmp_path: Path) -> None:
    processes = [FORK.Process(target=append_many, args=(tmp_path / "log", process)) for process in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    records = read_log(tmp_path / "log")
    assert len(records) == 160
    for process in range(4):
        assert [r["number"] for r in records if r["process"] == process] == list(range(40))


def test_a_line_waits_for_the_process_that_holds_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = FORK.Process(target=run_results.append_log, args=(log, {"a": 1}))
        process.start()
        process.join(timeout=0.3)
        assert process.is_alive()
        assert log.read_bytes() == b""
        fcntl.flock(held, fcntl.LOCK_UN)
        process.join(timeout=30)
    assert read_log(log) == [{"a": 1}]


def test_a_line_cut_short_by_a_kill_does_not_spoil_the_next(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"a": 1}\n{"b":')
    run_results.append_log(log, {"c": 3})
    run_results.append_log(log, {"d": 4})
    assert log.read_text() == '{"a": 1}\n{"b":\n{"c": 3}\n{"d": 4}\n'


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(FileError, match="Is a directory") as caught:
        run_results.append_log(tmp_path / "log", {})
    assert caught.value.data == {"path": tmp_path / "log"}
