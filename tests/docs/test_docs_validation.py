"""docs/explanation/validation.md: its commands are those of the tool, and one takes what the other leaves."""

import re
from pathlib import Path

from doc_commands import commands, page_text
from lmntk.analysis.datamodelling import PERMUTATIONS, RESAMPLES
from lmntk.analysis.validation_tables import CEILING, WHAT
from lmntk.commands import validate
from lmntk.config.arguments import flag_names, parse_arguments

PAGE = page_text("validation")


def test_the_commands_are_those_of_the_tool_and_share_their_trainings() -> None:
    calls = [words[2:] for words in commands(PAGE) if words[:2] == ["python", "tools/kernel_validation.py"]]
    first, second, _ = (validate.make_parser().read(words) for words in calls)
    assert (first.kernel_regularization, second.kernel_regularization) == (None, 0.1)
    for name in ("run", "subsets", "seed", "output", "max_steps", "optimizer", "learning_rates"):
        assert getattr(first, name) == getattr(second, name)
    assert str(second.figure) == "validation.png" and "](validation.png)" in PAGE


def test_the_demos_kernel_is_computed_where_the_tool_looks_for_it() -> None:
    (call,) = [words for words in commands(PAGE) if "bash" in words]
    variables, flags = dict(word.split("=", 1) for word in call[: call.index("bash")]), call[call.index("bash") + 2 :]
    run = ["--model_name_or_path", "m", "--task_name", "mr", "--output_dir", "o", "--trainer", "kernel", *flags]
    _, data, training = parse_arguments(run)
    assert training.binary_classification and data.data_dir.endswith(f"{variables['K']}-{variables['SEED']}")
    folder = f"mr-{variables['MODEL'].replace('/', '_')}-prompt-{variables['TRAINER']}-{variables['TAG']}"
    *_, last = commands(PAGE)
    given = validate.make_parser().read(last[2:])
    assert given.run == Path("result") / folder / f"{variables['K']}-{variables['SEED']}"


def test_the_page_explains_every_row_and_the_numbers_of_resamples() -> None:
    assert all(f"| {row} |" in PAGE for row in (*WHAT.values(), CEILING))
    assert f"{RESAMPLES} bootstrap resamples" in PAGE and f"{PERMUTATIONS} permutations" in PAGE


def test_every_flag_of_the_page_is_one_of_the_tool_or_of_run() -> None:
    own = {flag.removeprefix("--") for action in validate.make_parser()._actions for flag in action.option_strings}
    assert set(re.findall(r"--(\w+)", PAGE)) <= own | flag_names()
