"""docs/explanation/parameter-subsets.md: its commands are taken as they stand, and the table reads the run's folder."""

from pathlib import Path

from doc_commands import commands, page_text
from lmntk.commands import subsets
from lmntk.config.arguments import parse_arguments
from lmntk.storage.part_names import KINDS, PART_KEYS

SUBSETS = page_text("parameter-subsets")


def test_the_subsets_are_read_where_the_run_leaves_its_parts() -> None:
    (call,) = [words for words in commands(SUBSETS) if "run_fewshot.sh" in words]
    variables = dict(word.split("=", 1) for word in call[: call.index("bash")])
    required = ["--model_name_or_path", "m", "--task_name", "mr", "--output_dir", "o", "--trainer", "kernel"]
    training = parse_arguments([*required, *call[call.index("run_fewshot.sh") + 1 :]])[2]
    assert training.part_keys == PART_KEYS
    name = f"mr-{variables['MODEL'].replace('/', '_')}-prompt-kernel-{variables['TAG']}"
    (words,) = [words[2:] for words in commands(SUBSETS) if words[:2] == ["python", "tools/kernel_subsets.py"]]
    given = subsets.make_parser().read(words)
    assert given.folder == Path("result") / name / f"{variables['K']}-{variables['SEED']}"


def test_the_page_names_every_kind_and_key() -> None:
    assert all(f"`{word}`" in SUBSETS for word in (*KINDS, *PART_KEYS))
