"""The trainings of a validation, against a stand-in for run_fewshot.sh: which start, on what data, and why."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernel_folders import Folder
from lmntk.commands import validate
from lmntk.data.examples import read_examples
from lmntk.data.tasks import TASKS
from lmntk.errors import KernelMismatchError, SettingError, UsageError
from lmntk.runs import processes
from lmntk.storage.paths import RunPaths

# Notes its call, and leaves results: logits that depend on the train file, the score on dev of its learning rate in the
# file `dev`. A line of `fail` that is part of its words makes it fail.
STAND_IN = """
set -eu
here=$(dirname "$0")
echo "$TASK $K $SEED $TRAINER $TYPE $MODEL | $*" >> "$here/calls"
words=$* output= data= rate= dev=0.5
while [ $# -gt 0 ]; do
    case $1 in
        --output_dir) output=$2 ;;
        --data_dir) data=$2 ;;
        --learning_rate=*) rate=${1#*=} ;;
    esac
    shift
done
if [ -e "$here/fail" ]; then
    while read -r word; do case "$words" in *"$word"*) echo "error: no luck"; exit 3 ;; esac; done < "$here/fail"
fi
if [ -e "$here/dev" ]; then dev=$(sed -n "s/^$rate //p" "$here/dev"); fi
seed=$(cat "$data/train.tsv" | cksum | cut -d ' ' -f 1)
for split in dev test; do
    awk -F '\\t' -v seed="$seed" 'BEGIN { srand(seed); print "index,label,prediction,logit_0,logit_1" }
        NR > 1 { print NR - 2 "," $2 "," 0 "," rand() "," rand() }' "$data/$split.tsv" \
        > "$output/${split}_predictions_sst-2.csv"
done
echo "eval_acc = 0.5" > "$output/eval_results_sst-2.txt"
echo "eval_acc = 0.5" > "$output/test_results_sst-2.txt"
scores="\\"seconds\\": 10, \\"sst-2_dev_eval_acc\\": ${dev:-0.5}"
echo "{\\"task_name\\": \\"SST-2\\", \\"data_dir\\": \\"$data\\", $scores}" > "$output/run_sst-2.json"
"""
TRAINING = "sgd-lr={}-steps=100-batch=8"


@dataclass
class Workplace:
    """The folder of the stand-in and of a kernel run of eight SST-2 examples."""

    kernel: Folder
    root: Path
    capture: pytest.CaptureFixture[str]

    def record(self, **settings: Any) -> None:
        given = {"data_dir": str(self.kernel.data), "model_name_or_path": str(self.root / "model"), "seed": 7}
        given |= {"few_shot_type": "prompt", "kernel_formula": "sgd", "kernel_regularization": 0.1}
        self.kernel.record(**given | {"template": "*cls**sent_0*_It_was*mask*.*sep+*"} | settings)

    def run(self, *words: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of a call with three subsets and two learning rates."""
        self.capture.readouterr()
        usual = ["--subsets", "3", "--learning_rates", "0.1", "0.01", "--output", str(self.root / "out")]
        return validate.main([str(self.kernel.path), *usual, *words]), *self.capture.readouterr()

    @property
    def calls(self) -> list[str]:
        """The output folder of every call, below that of all."""
        path = self.root / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [re.search(r"--output_dir (\S+)", line)[1].removeprefix(f"{self.root}/out/") for line in lines]  # type: ignore[index]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Workplace:
    root = tmp_path.resolve()
    (root / "run.sh").write_text(STAND_IN, encoding="utf-8")
    (root / "model").mkdir()
    (root / "model" / "model.safetensors").write_text("weights", encoding="utf-8")
    monkeypatch.setattr(processes, "RUN_SCRIPT", root / "run.sh")
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    monkeypatch.chdir(root)
    place = Workplace(Folder(root, "kernel"), root, capsys)
    place.record()
    return place


def subset(number: int, rate: str = "0.1", seed: int = 7) -> str:
    return f"{TRAINING.format(rate)}/subset-0-{number:03}-seed-{seed}"


def test_all_examples_choose_the_learning_rate_and_subsets_train_with_it(place: Workplace) -> None:
    (place.root / "dev").write_text("0.1 0.75\n0.01 0.5\n", encoding="utf-8")
    status, out, _ = place.run()
    choosing = [f"{TRAINING.format(rate)}/all-seed-7" for rate in ("0.1", "0.01")]
    assert (status, place.calls) == (0, [*choosing, *map(subset, range(3))])
    assert out.startswith(f"5 trainings below {place.root / 'out'}: 0 done already, 5 to do\n")
    assert "learning rate 0.1, the best of 0.1, 0.01 on dev (0.75)\n" in out
    call = (place.root / "calls").read_text(encoding="utf-8").splitlines()[2]
    begin, words = call.split(" | ")
    assert begin == f"SST-2 2 7 standard prompt {place.root / 'model'}"
    assert f"--data_dir {place.root}/out/subsets/0-000 " in words
    assert words.endswith(
        "--disable_tqdm=True --template=*cls**sent_0*_It_was*mask*.*sep+* --optimizer=sgd --learning_rate=0.1 "
        "--max_steps=100 --per_device_train_batch_size=8 --save_strategy=no"
    )


def test_the_data_of_a_subset_are_its_examples_and_all_of_dev_and_test(place: Workplace) -> None:
    _, out, _ = place.run("--format", "json")
    kept = json.loads(out)["subsets"]
    whole = read_examples(TASKS["SST-2"], place.kernel.data / "train.tsv")
    for number, indices in enumerate(kept):
        folder = place.root / "out" / "subsets" / f"0-{number:03}"
        assert read_examples(TASKS["SST-2"], folder / "train.tsv") == [whole[index] for index in indices]
        assert [example.label for example in read_examples(TASKS["SST-2"], folder / "train.tsv")].count("0") == 2
        for split in ("dev", "test"):
            assert (folder / f"{split}.tsv").read_bytes() == (place.kernel.data / f"{split}.tsv").read_bytes()


def test_the_outputs_are_those_of_the_tables_of_predictions(place: Workplace) -> None:
    _, out, _ = place.run("--format", "json", "--split", "dev", "--train_seeds", "2")
    content = json.loads(out)
    margins = []
    for seed in (7, 8):
        path = place.root / "out" / subset(1, "0.01", seed) / "dev_predictions_sst-2.csv"
        rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        margins.append([(float(row[4]) - float(row[3])) * (1 if row[1] == "1" else -1) for row in rows])
    np.testing.assert_allclose(content["outputs"]["trained"][1], np.mean(margins, axis=0), rtol=0, atol=1e-12)
    assert content["train_seeds"] == 2


def test_what_is_done_is_kept_for_more_subsets_and_other_settings_of_the_solver(place: Workplace) -> None:
    place.run("--learning_rates", "0.1")
    assert place.calls == [subset(number) for number in range(3)]
    status, out, _ = place.run("--learning_rates", "0.1", "--subsets", "5", "--jobs", "2")
    assert (status, sorted(place.calls[3:])) == (0, [subset(3), subset(4)])
    assert "5 trainings below" in out and "3 done already, 2 to do" in out
    assert place.run("--learning_rates", "0.1", "--kernel_regularization", "1")[0] == 0
    assert len(place.calls) == 5


def test_a_training_that_failed_is_named_and_the_others_make_the_table(place: Workplace) -> None:
    (place.root / "fail").write_text("subset-0-001\n", encoding="utf-8")
    status, out, _ = place.run("--learning_rates", "0.1")
    assert status == 1
    assert "2 random subsets" in out
    assert "missing:\n  training sgd, learning rate 0.1: subset-0-001-seed-7\n    status 3" in out
    (place.root / "fail").unlink()
    assert place.run("--learning_rates", "0.1")[0] == 0
    assert place.calls[3:] == [subset(1)]


def test_a_dry_run_measures_one_training_and_keeps_it(place: Workplace) -> None:
    for _ in range(2):
        status, out, _ = place.run("--dry_run")
        assert (status, len(place.calls)) == (0, 1)
        assert "5 trainings: 1 done, 4 to do" in out and "about 40 s in all" in out


def test_finished_trainings_of_other_weights_are_not_overwritten(place: Workplace) -> None:
    place.run()
    (place.root / "model" / "model.safetensors").write_text("others", encoding="utf-8")
    status, _, err = place.run()
    assert (status, len(place.calls)) == (2, 5)
    assert "--output" in err


@pytest.mark.parametrize(
    ("record", "words", "kind", "setting"),
    [
        ({"kernel_solver": "svc"}, [], UsageError, None),
        ({"only_biases": True}, [], SettingError, "only_biases"),
        ({"exclude_embeddings": True}, [], SettingError, "exclude_embeddings"),
        ({"from_linearhead": True}, [], SettingError, "from_linearhead"),
        ({"few_shot_type": "prompt-demo"}, [], SettingError, "few_shot_type"),
        ({}, ["--subsets", "0"], SettingError, "subsets"),
        ({}, ["--train_seeds", "0"], SettingError, "train_seeds"),
        ({}, ["--figure", "a.pdf"], SettingError, "figure"),
        ({}, ["--", "--max_steps", "1"], SettingError, "max_steps"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_training(
    place: Workplace, record: dict[str, Any], words: list[str], kind: type[UsageError], setting: str | None
) -> None:
    place.record(**record)
    with pytest.raises(kind) as caught:
        validate._validate(validate.make_parser().read([str(place.kernel.path), *words]))
    assert caught.value.data.get("setting") == setting
    assert place.calls == []


def test_train_examples_that_have_changed_are_refused(place: Workplace) -> None:
    path = place.kernel.data / "train.tsv"
    path.write_text(path.read_text(encoding="utf-8") + "another\t1\n", encoding="utf-8")
    with pytest.raises(KernelMismatchError):
        validate._validate(validate.make_parser().read([str(place.kernel.path)]))


def test_without_dev_there_must_be_one_learning_rate(place: Workplace) -> None:
    (place.kernel.data / "dev.tsv").unlink()
    status, _, err = place.run()
    assert (status, place.calls) == (2, [])
    assert "--learning_rates" in err


def test_adam_stands_for_the_kernel_of_signs_and_layers_left_out_are_frozen(place: Workplace) -> None:
    place.record(kernel_formula="signgd", exclude_first_layers=1, exclude_embeddings=True)
    validate.main([str(place.kernel.path), "--subsets", "2", "--learning_rates", "1e-3"])
    call = (place.root / "calls").read_text(encoding="utf-8")
    assert "--fix_layers=1 --optimizer=adam --learning_rate=1e-3 " in call
    assert RunPaths(place.kernel.path / "validation/adam-lr=1e-3-steps=100-batch=8/subset-0-001-seed-7", "sst-2")\
        .record().is_file()  # fmt: skip
