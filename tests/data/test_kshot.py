"""K-shot splits are those of the published sampler, byte for byte.

`published_splits` says again, as plainly as it can and apart from the package, what that sampler does; the package's
files are held to it on small files of every format, and on the real data sets where they lie beside the checkout. Two
real data sets are held to the checksums that LM-BFF publishes of its own splits.
"""

import hashlib
import logging
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lmntk.data.kshot import choose_tasks, missing_originals, read_originals, write_splits
from lmntk.data.tasks import TASKS
from lmntk.errors import DataError, FileError, UnknownNameError

MODES = ("k-shot", "k-shot-10x", "k-shot-1k-test")
SEEDS = (100, 13, 21, 42, 87)
REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "original"
GLUE_TASKS = ("SST-2", "CoLA", "MRPC", "QQP", "STS-B", "MNLI", "SNLI", "QNLI", "RTE", "WNLI")
CSV_TASKS = ("sst-5", "mr", "cr", "mpqa", "subj", "trec", "ag_news")


def published_splits(task, data_dir, mode, k, seeds):
    """Derive all files again: a dictionary from "<k>-<seed>/<file>" to bytes."""
    derive = glue_splits if task in GLUE_TASKS else csv_splits
    return {name: text.encode() for name, text in derive(task, data_dir / task, mode, k, seeds).items()}


def glue_label(task, line):
    columns = line.strip().split("\t")
    if task == "CoLA":
        return columns[1]
    if task == "MRPC":
        return columns[0]
    if task == "STS-B":
        return float(columns[-1]) < 2.5
    return columns[-1]


def glue_splits(task, folder, mode, k, seeds):
    def lines_of(name):
        return (folder / name).read_text(encoding="utf-8").split("\n")[:-1]

    header_rows = 0 if task == "CoLA" else 1
    dev_names = ["dev_matched", "dev_mismatched"] if task == "MNLI" else ["dev"]
    all_train = lines_of("train.tsv")
    all_tests = {name.replace("dev", "test"): lines_of(f"{name}.tsv") for name in dev_names}
    result = {}
    for seed in seeds:
        np.random.seed(seed)
        header = all_train[:header_rows]
        train = all_train if task == "CoLA" else all_train[1:]
        np.random.shuffle(train)
        groups = {}
        for line in train:
            groups.setdefault(glue_label(task, line), []).append(line)
        new = {}
        for name, lines in all_tests.items():
            rows = lines if task == "CoLA" else lines[1:]
            if mode == "k-shot-1k-test" and len(rows) > 1000:
                np.random.seed(42)
                np.random.shuffle(rows)
                rows = rows[:1000]
            new[name] = lines[:header_rows] + rows
        end = 11 * k if mode == "k-shot-10x" else 2 * k
        new["train"] = header + [line for group in groups.values() for line in group[:k]]
        dev = "dev_matched" if task == "MNLI" else "dev"
        new[dev] = header + [line for group in groups.values() for line in group[k:end]]
        for name, lines in new.items():
            result[f"{k}-{seed}/{name}.tsv"] = "".join(line + "\n" for line in lines)
    return result


def csv_splits(task, folder, mode, k, seeds):
    # keep_default_na=False: the published sampler turns the review "NA" into an empty one, which is its mistake.
    train_table, test_table = (
        pd.read_csv(folder / f"{name}.csv", header=None, keep_default_na=False) for name in ("train", "test")
    )
    result = {}
    for seed in seeds:
        np.random.seed(seed)
        train = train_table.values.tolist()
        np.random.shuffle(train)
        groups = {}
        for row in train:
            groups.setdefault(row[0], []).append(row)
        end = 11 * k if mode == "k-shot-10x" else 2 * k
        test = test_table
        if mode == "k-shot-1k-test" and len(test) > 1000:
            test = test.sample(n=1000, random_state=42)
        tables = {
            "train": pd.DataFrame([row for group in groups.values() for row in group[:k]]),
            "dev": pd.DataFrame([row for group in groups.values() for row in group[k:end]]),
            "test": test,
        }
        for name, table in tables.items():
            result[f"{k}-{seed}/{name}.csv"] = table.to_csv(header=False, index=False, lineterminator="\n")
    return result


def splits(task, data_dir, output_dir, mode, k, seeds):
    """Let the package write the files; a dictionary as above."""
    for _ in write_splits(read_originals(TASKS[task], data_dir), output_dir, mode, k, seeds):
        pass
    root = output_dir / mode / TASKS[task].folder
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# How many columns the files of a task have, and where the label stands.
COLUMNS = {
    **{"SST-2": (2, 1), "CoLA": (4, 1), "MRPC": (5, 0), "QQP": (6, 5), "STS-B": (10, 9), "MNLI": (12, 11)},
    **{"SNLI": (11, 10), "QNLI": (4, 3), "RTE": (4, 3), "WNLI": (4, 3)},
    **{"sst-5": (2, 0), "mr": (2, 0), "cr": (2, 0), "mpqa": (2, 0), "subj": (2, 0), "trec": (2, 0), "ag_news": (3, 0)},
}
TEXTS = (
    *("plain words", 'a "quoted" word', "commas, and more", '"', "it 's", "été", "NA", "null", "nan", "None", "N/A"),
    *("12", "1.50", "-", "a ; b", " spaces ", "\\ backslash \\", "#hash", "'single'"),
)
CSV_TEXTS = (*TEXTS, "", "two\nlines", 'three\r\n"lines", \n\n', "tab\there")


def write_originals(task, data_dir, train_rows=400, test_rows=(60, 50), seed=0):
    """Write originals of made-up rows; MNLI's second test set takes the second number of rows."""
    draw = random.Random(f"{task} {seed}")
    width, label_at = COLUMNS[task]
    texts = CSV_TEXTS if task in CSV_TASKS else TEXTS

    def row(number):
        label = f"{draw.uniform(0, 5):.3f}" if task == "STS-B" else draw.choice(TASKS[task].labels)
        # The number makes rows differ; it does not stand alone, so that a column of texts holds no bare numbers only.
        cells = [f"{draw.choice(texts)}{draw.choice(['', f' {number}'])}" for _ in range(width)]
        cells[label_at] = label
        return cells

    folder = data_dir / task
    folder.mkdir(parents=True)
    if task in CSV_TASKS:
        for name, rows in (("train", train_rows), ("test", test_rows[0])):
            table = pd.DataFrame([row(number) for number in range(rows)])
            table.to_csv(folder / f"{name}.csv", header=False, index=False, lineterminator="\n")
        return
    dev_names = ["dev_matched", "dev_mismatched"] if task == "MNLI" else ["dev"]
    for name, rows in zip(["train", *dev_names], [train_rows, *test_rows], strict=False):
        header = [] if task == "CoLA" else [[f"{name} {number}" for number in range(width)]]
        text = "".join("\t".join(cells) + "\n" for cells in header + [row(number) for number in range(rows)])
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8", newline="")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", [*GLUE_TASKS, *CSV_TASKS])
def test_the_splits_of_every_format_are_the_published_ones(tmp_path, task, mode):
    write_originals(task, tmp_path / "original", test_rows=(1100, 1003))
    expected = published_splits(task, tmp_path / "original", mode, 4, SEEDS)
    assert splits(task, tmp_path / "original", tmp_path, mode, 4, SEEDS) == expected
    assert len(expected) == len(SEEDS) * (4 if task == "MNLI" else 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seeds", [(100, 13, 21, 42, 87), (87, 42), (42,), (13, 42), (42, 42)])
def test_colas_splits_build_on_the_seeds_before(tmp_path, mode, seeds):
    write_originals("CoLA", tmp_path / "original", test_rows=(1043,))
    expected = published_splits("CoLA", tmp_path / "original", mode, 4, seeds)
    assert splits("CoLA", tmp_path / "original", tmp_path, mode, 4, seeds) == expected


def test_colas_split_for_a_seed_depends_on_the_seeds_before_and_rtes_does_not(tmp_path):
    for task, same in (("CoLA", False), ("RTE", True)):
        write_originals(task, tmp_path / "original")
        alone = splits(task, tmp_path / "original", tmp_path / "alone", "k-shot", 4, (42,))
        after = splits(task, tmp_path / "original", tmp_path / "after", "k-shot", 4, (13, 42))
        assert (alone["4-42/train.tsv"] == after["4-42/train.tsv"]) == same


@pytest.mark.parametrize("task", ["SST-2", "mr"])
@pytest.mark.parametrize(("rows", "kept"), [(999, 999), (1000, 1000), (1001, 1000)])
def test_a_test_set_is_cut_only_where_it_has_more_than_1000_rows(tmp_path, task, rows, kept):
    write_originals(task, tmp_path / "original", test_rows=(rows,))
    original = tmp_path / "original" / task / TASKS[task].original_name("test")
    files = splits(task, tmp_path / "original", tmp_path, "k-shot-1k-test", 4, (42,))
    assert files == published_splits(task, tmp_path / "original", "k-shot-1k-test", 4, (42,))
    test_file = files[f"4-42/{TASKS[task].file_name('test')}"]
    if rows <= 1000:
        assert test_file == original.read_bytes()
    elif task == "SST-2":
        assert len(test_file.splitlines()) == kept + 1


def test_mnli_has_a_dev_file_from_train_and_two_test_files_with_headers_of_their_own(tmp_path):
    write_originals("MNLI", tmp_path / "original")
    files = splits("MNLI", tmp_path / "original", tmp_path, "k-shot", 2, (13,))
    headers = {name: text.split(b"\t")[0] for name, text in files.items()}
    assert headers == {
        "2-13/train.tsv": b"train 0",
        "2-13/dev_matched.tsv": b"train 0",
        "2-13/test_matched.tsv": b"dev_matched 0",
        "2-13/test_mismatched.tsv": b"dev_mismatched 0",
    }
    assert len(files["2-13/train.tsv"].splitlines()) == 1 + 3 * 2


def test_sts_b_is_sampled_below_and_above_the_middle(tmp_path):
    write_originals("STS-B", tmp_path / "original")
    files = splits("STS-B", tmp_path / "original", tmp_path, "k-shot", 5, (13,))
    scores = [float(line.split(b"\t")[-1]) for line in files["5-13/dev.tsv"].splitlines()[1:]]
    assert sorted(score < 2.5 for score in scores) == [False] * 5 + [True] * 5


def test_a_score_in_the_middle_is_sampled_as_high(tmp_path):
    """LM-BFF's generate_k_shot_data.py asks for < 2.5, its demonstrations for <= 2.5 (tests/test_demonstrations.py)."""
    for name in ("train", "dev"):
        lines = ["\t".join("abcdefghij"), *("\t".join([*"012345678", score]) for score in ("2.49", "2.5", "2.51"))]
        (tmp_path / "STS-B").mkdir(exist_ok=True)
        (tmp_path / "STS-B" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    assert [line.label for line in read_originals(TASKS["STS-B"], tmp_path).train] == ["0", "1", "1"]


def test_a_last_line_without_a_line_end_is_given_one_before_lines_are_shuffled(tmp_path):
    for task, name in (("CoLA", "train.tsv"), ("CoLA", "dev.tsv"), ("RTE", "train.tsv"), ("mr", "train.csv")):
        data_dir = tmp_path / task / name
        write_originals(task, data_dir, test_rows=(1100,))
        expected = published_splits(task, data_dir, "k-shot-1k-test", 40, SEEDS)
        path = data_dir / task / name
        path.write_bytes(path.read_bytes().removesuffix(b"\n"))
        assert splits(task, data_dir, tmp_path / "out" / name, "k-shot-1k-test", 40, SEEDS) == expected


def test_a_byte_order_mark_stays_in_a_tsv_header_and_line_ends_become_newlines(tmp_path):
    write_originals("MRPC", tmp_path / "original")
    expected = published_splits("MRPC", tmp_path / "original", "k-shot", 4, (13,))
    path = tmp_path / "original" / "MRPC" / "train.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    found = splits("MRPC", tmp_path / "original", tmp_path, "k-shot", 4, (13,))
    marked = {name: (b"" if "test" in name else b"\xef\xbb\xbf") + text for name, text in expected.items()}
    assert found == marked


def test_the_same_command_writes_the_same_bytes_over_old_files(tmp_path):
    write_originals("mr", tmp_path / "original")
    first = splits("mr", tmp_path / "original", tmp_path, "k-shot", 4, (13, 21))
    (tmp_path / "k-shot" / "mr" / "4-13" / "train.csv").write_text("torn")
    assert splits("mr", tmp_path / "original", tmp_path, "k-shot", 4, (13, 21)) == first


def test_too_few_rows_of_a_label_are_named_and_counted(tmp_path, caplog):
    folder = tmp_path / "original" / "mr"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("0,a\n0,b\n0,c\n0,d\n1,e\n1,f\n1,g\n")
    (folder / "test.csv").write_text("0,x\n")
    with caplog.at_level(logging.WARNING):
        files = splits("mr", tmp_path / "original", tmp_path, "k-shot", 2, (13,))
    assert caplog.messages == ["mr: label 1 has 3 training rows where 4 are wanted (2 for train, 2 for dev)"]
    assert files == published_splits("mr", tmp_path / "original", "k-shot", 2, (13,))
    caplog.clear()
    splits("mr", tmp_path / "original", tmp_path, "k-shot-10x", 1, (13,))
    assert "mr: label 0 has 4 training rows where 11 are wanted (1 for train, 10 for dev)" in caplog.messages


def test_no_rows_of_a_label_at_all_are_told_too_and_leave_dev_empty(tmp_path, caplog):
    folder = tmp_path / "original" / "mr"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("0,a\n")
    (folder / "test.csv").write_text("0,x\n")
    files = splits("mr", tmp_path / "original", tmp_path, "k-shot", 2, (13,))
    assert files == {"2-13/train.csv": b"0,a\n", "2-13/dev.csv": b"", "2-13/test.csv": b"0,x\n"}
    assert "mr: label 1 has 0 training rows where 4 are wanted (2 for train, 2 for dev)" in caplog.messages


def test_torn_rows_of_qqp_are_drawn_as_published_and_told(tmp_path, caplog):
    write_originals("QQP", tmp_path / "original")
    path = tmp_path / "original" / "QQP" / "train.tsv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines[:7], "3\t4\t5\tWhy is\n", *lines[7:]]), encoding="utf-8")
    expected = published_splits("QQP", tmp_path / "original", "k-shot", 4, (13,))
    assert splits("QQP", tmp_path / "original", tmp_path, "k-shot", 4, (13,)) == expected
    assert caplog.messages == [
        "QQP: 1 rows end in 'Why is', which is not a label of the task: drawn as published, skipped in reading"
    ]


@pytest.mark.parametrize(
    ("task", "content", "line"),
    [
        ("SST-2", "sentence\tlabel\na\t0\nb\t2\n", 3),
        ("CoLA", "gj04\t1\t\tFine.\ngj04\n", 2),
        ("STS-B", "header\na\thigh\n", 2),
        ("RTE", "index\ts\ts\tlabel\n", None),
        ("mr", "0,a\n\n1,b\n2,c\n", 4),
    ],
)
def test_originals_without_valid_labels_name_file_and_line(tmp_path, task, content, line):
    write_originals(task, tmp_path)
    path = tmp_path / task / TASKS[task].file_name("train")
    path.write_text(content)
    with pytest.raises(FileError if line is None else DataError) as caught:
        read_originals(TASKS[task], tmp_path)
    assert (caught.value.data["path"], caught.value.data.get("line")) == (path, line)


def test_tasks_are_those_named_or_the_usual_ones_with_a_folder_each_folder_once(tmp_path):
    for name in ("MNLI", "mr", "WNLI"):
        (tmp_path / name).mkdir()
    assert [task.name for task in choose_tasks(["mnli-mm", "MR", "MNLI"], tmp_path)] == ["MNLI", "mr"]
    assert [task.name for task in choose_tasks(None, tmp_path)] == ["mr", "MNLI"]
    with pytest.raises(UnknownNameError):
        choose_tasks(["mrr"], tmp_path)
    with pytest.raises(FileError) as caught:
        choose_tasks(None, tmp_path / "mr")
    assert caught.value.data["path"] == tmp_path / "mr"


def test_what_is_missing_of_the_originals_is_named(tmp_path):
    assert missing_originals(TASKS["mnli-mm"], tmp_path) == tmp_path / "MNLI"
    write_originals("MNLI", tmp_path)
    assert missing_originals(TASKS["MNLI"], tmp_path) is None
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    assert missing_originals(TASKS["MNLI"], tmp_path) == tmp_path / "MNLI" / "dev_mismatched.tsv"


needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the real data sets are not in {REAL_DATA}")


@needs_real_data
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", [*GLUE_TASKS, *CSV_TASKS])
def test_the_splits_of_the_real_data_are_the_published_ones(tmp_path, task, mode):
    if not (REAL_DATA / task).is_dir():
        pytest.skip(f"{task} is not among the real data sets")
    expected = published_splits(task, REAL_DATA, mode, 16, (100, 13, 42))
    assert splits(task, REAL_DATA, tmp_path, mode, 16, (100, 13, 42)) == expected


# MD5 of train, dev and test with 16 examples a label, from the list that LM-BFF publishes beside its splits.
PUBLISHED_MD5 = {
    "RTE": {
        13: "0aaae3483435626089adbc4ae851b75d 8fc45ab58e72e16cf90547710f3b5d15 973cb4178d4534cf745a01c309d4a66c",
        21: "79490f931a776fad7f3b2ba31f9142d1 96ac052f30101901e6bc04adb4875edb 973cb4178d4534cf745a01c309d4a66c",
        42: "4d45391333d2f56d16633d7b85d3e051 a64069d0ca424995d35e05e67c03ceb9 973cb4178d4534cf745a01c309d4a66c",
        87: "46af88a12bc44c12a40ea2cb79e94837 19ee5593b53d1b290737eb9de2ca4869 973cb4178d4534cf745a01c309d4a66c",
        100: "548d8775d98ca0638615b9e0bfbe5c32 bc66584b1fa19f9620051e8db7bcc1dc 973cb4178d4534cf745a01c309d4a66c",
    },
    "trec": {
        13: "50cff1542195f5321cb951ca1d980ec0 97ca7ed4ec756c13b6233c2d66c97ee5 b4e08b69eb3aae325197216450e3a28b",
        21: "178b968a79785571398a99082f2059aa df1be41d4a11a1f10b99bfa9dab069fd b4e08b69eb3aae325197216450e3a28b",
        42: "f17a8bb90b8110ad37632ded1dc0b515 682e1b9724b472132249396e826c7741 b4e08b69eb3aae325197216450e3a28b",
        87: "efe409aae7de9e639e5da33430626e83 62eb496a54c2c810703c8a3d47213237 b4e08b69eb3aae325197216450e3a28b",
        100: "5df9333e324779c32bdc14eed7a3f51c 983ce074f8cc101e7539122d20dc2815 b4e08b69eb3aae325197216450e3a28b",
    },
}


@needs_real_data
@pytest.mark.parametrize("task", PUBLISHED_MD5)
def test_the_splits_of_complete_data_sets_have_the_published_checksums(tmp_path, task):
    data_dir = tmp_path / "original"
    (data_dir / task).mkdir(parents=True)
    for name in (TASKS[task].original_name("train"), TASKS[task].original_name("test")):
        lines = (REAL_DATA / task / name).read_text(encoding="utf-8").splitlines(keepends=True)
        if task == "RTE":
            # This copy's training lines are out of order; the index in the first column restores the original order.
            lines[1:] = sorted(lines[1:], key=lambda line: int(line.split("\t")[0]))
        (data_dir / task / name).write_text("".join(lines), encoding="utf-8")
    files = splits(task, data_dir, tmp_path, "k-shot", 16, SEEDS)
    ending = TASKS[task].file_format
    for seed, expected in PUBLISHED_MD5[task].items():
        found = [hashlib.md5(files[f"16-{seed}/{name}.{ending}"]).hexdigest() for name in ("train", "dev", "test")]
        assert found == expected.split()
