"""docs/how-to/training.md: its commands run, on a tiny model and tiny data, and its names exist."""

import contextlib
import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from command_line import ROOT, Workplace, sst2_rows, write_rows
from doc_commands import argv_of, blocks, calls, commands, make_stand_in, page_text
from lmntk.commands import drift, embed, ensemble, gather, grid
from lmntk.config.arguments import flag_names

TRAINING = page_text("training")
# A few steps on a few texts show that a call works.
SHORT = ["--disable_tqdm", "True", "--use_cpu"]
FEW_STEPS = ["--max_steps", "2", "--eval_steps", "1"]
FEW_SNAPSHOTS = ["--kernel_steps", "0,1,last"]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A place where the calls of run_fewshot.sh and the making of embeddings were run, in their order."""
    place = Workplace(tmp_path_factory.mktemp("docs"))
    stand_in = make_stand_in(place.folder)
    for split, number in (("train", 10), ("dev", 6), ("test", 6)):
        path = place.folder / "data" / "k-shot-1k-test" / "SST-2" / "16-42" / f"{split}.tsv"
        write_rows(path, [("sentence", "label"), *sst2_rows(number, split)])
    templates = ("*cls**sent_0*_It_was*mask*.*sep+*", "*cls**sent_0*_This_is*mask*.*sep+*")
    (place.folder / "templates.txt").write_text("\n".join(templates) + "\n", encoding="utf-8")
    for words in commands(TRAINING):
        if words[:2] == ["python", "tools/get_sbert_embedding.py"]:
            name = words[words.index("--model") + 1].rpartition("/")[2]
            with contextlib.chdir(place.folder):
                more = ["--model", str(place.model), "--name", name, "--seed", "42"]
                assert embed.main([*words[2:], *more]) == 0
        if "run_fewshot.sh" not in words:
            continue
        argv = [*argv_of(words, stand_in), "--model_name_or_path", str(place.model), *SHORT]
        argv += FEW_STEPS if "--max_steps" in argv else []
        outcome = place.call([*argv, *(FEW_SNAPSHOTS if "--kernel_steps" in argv else [])])
        assert (outcome.status, outcome.err) == (0, ""), f"{shlex.join(words)}\n{outcome.err}"
    return place


def test_every_call_leaves_results_in_a_folder_of_its_own(walked: Workplace) -> None:
    left = list((walked.folder / "result").glob("SST-2-roberta-base-*/16-42/test_results_sst-2.txt"))
    assert len(left) == len(calls(TRAINING)) == 13
    kernels = {path.parent.parent.name for path in (walked.folder / "result").rglob("test_kernels_sst-2.pt")}
    assert kernels == {
        "SST-2-roberta-base-finetune-kernel-no-prompt",
        "SST-2-roberta-base-prompt-kernel-lora",
        "SST-2-roberta-base-prompt-demo-kernel-demo",
        "SST-2-roberta-base-prompt-demo-kernel-similar",
    }
    models = {path.parent.parent.name for path in (walked.folder / "result").rglob("model.safetensors")}
    assert models == {
        f"SST-2-roberta-base-prompt-standard-{tag}" for tag in ("adam", "sgd", "drift", "ensemble-0", "ensemble-1")
    }
    adapters = [path.parent.parent.name for path in (walked.folder / "result").rglob("adapter_model.safetensors")]
    assert adapters == ["SST-2-roberta-base-prompt-standard-lora"]


def test_the_drift_of_a_training_has_a_row_for_each_snapshot(
    walked: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    (words,) = [words for words in commands(TRAINING) if words[1:2] == ["tools/kernel_drift.py"]]
    with contextlib.chdir(walked.folder):
        assert drift.main([*words[2:], "--format", "csv"]) == 0
        assert Path("drift.png").read_bytes().startswith(b"\x89PNG")
    rows = [*csv.DictReader(capsys.readouterr().out.split("\n\n")[0].splitlines())]
    assert [row["step"] for row in rows] == ["0", "1", "2"]


def test_an_ensemble_is_made_of_the_logits_that_the_runs_wrote(
    walked: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    (words,) = [words for words in commands(TRAINING) if words[1:2] == ["tools/ensemble.py"]]
    with contextlib.chdir(walked.folder):
        assert ensemble.main(words[2:]) == 0
    assert "mean" in capsys.readouterr().out


def test_the_grids_are_those_that_the_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [words for words in commands(TRAINING) if words[1:2] == ["tools/run_grid.py"]]
    assert grid.main([*words[2:], "--list"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "run_fewshot.sh" in line]
    assert len(lines) == 2 * 2 * 3 * 2
    (text,) = blocks(TRAINING, "json")
    (tmp_path / "grid.json").write_text(text, encoding="utf-8")
    assert grid.main(["--grid", str(tmp_path / "grid.json"), "--list"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "run_fewshot.sh" in line]
    assert len(lines) == 2 * 2 * 3


def test_the_table_of_results_is_made_from_the_log(walked: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [words for words in commands(TRAINING) if words[1:2] == ["tools/gather_result.py"]]
    condition = "{'tag': ['adam', 'sgd', 'head', 'no-prompt', 'lora'], 'task_name': ['sst-2', 'mr']}"
    with contextlib.chdir(walked.folder):
        assert gather.main(["--condition", condition, *words[4:]]) == 0
    rows = [
        line for line in capsys.readouterr().out.splitlines() if re.match(r"\| *(adam|sgd|head|no-prompt|lora) ", line)
    ]
    assert len(rows) == 6


def test_every_flag_and_file_that_it_names_exists() -> None:
    of_tools = {"flag", "model", "task", "do_test", "condition", "format", "n_models", "grid", "figure"}
    assert {flag for flag in re.findall(r"--(\w+)", TRAINING) if flag not in flag_names() | of_tools} == set()
    for path in re.findall(r"`((?:tools|tests)/\w+\.py)`", TRAINING):
        assert (ROOT / path).is_file()
    assert json.loads(blocks(TRAINING, "json")[0])
