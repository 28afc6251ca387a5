"""docs/explanation/validation.md: its commands are those of the tool, and one takes what the other leaves."""

import re

from doc_commands import commands, page_text
from lmntk.analysis.datamodelling import PERMUTATIONS, RESAMPLES
from lmntk.analysis.validation_tables import WHAT
from lmntk.commands import validate

PAGE = page_text("validation")


def test_the_commands_are_those_of_the_tool_and_share_their_trainings() -> None:
    calls = commands(PAGE)
    assert [words[:2] for words in calls] == [["python", "tools/kernel_validation.py"]] * 2
    first, second = (validate.make_parser().read(words[2:]) for words in calls)
    assert (first.kernel_regularization, second.kernel_regularization) == (None, 0.1)
    for name in ("run", "subsets", "seed", "output", "max_steps", "optimizer", "learning_rates"):
        assert getattr(first, name) == getattr(second, name)
    assert str(second.figure) == "validation.png" and "](validation.png)" in PAGE


def test_the_page_explains_every_row_and_the_numbers_of_resamples() -> None:
    assert all(f"| {row} |" in PAGE for row in WHAT.values())
    assert f"{RESAMPLES} bootstrap resamples" in PAGE and f"{PERMUTATIONS} permutations" in PAGE


def test_every_flag_of_the_page_is_one_of_the_tool_or_of_run() -> None:
    from lmntk.config.arguments import flag_names

    own = {flag.removeprefix("--") for action in validate.make_parser()._actions for flag in action.option_strings}
    assert set(re.findall(r"--(\w+)", PAGE)) <= own | flag_names()
