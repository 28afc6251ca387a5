"""Settings in a sentence become flags on a command line."""

import dataclasses
import logging
import re
from pathlib import Path

import pytest

import lmntk
from lmntk.config.arguments import DataArguments, ModelArguments, RunArguments, flag_names
from lmntk.config.flag_names import RUN_SETTINGS, FlagFormatter, in_flags
from lmntk.config.kernel_arguments import KernelArguments
from lmntk.config.old_arguments import OldArguments

NAMES = {"kernel_dtype", "overwrite_kernels", "mapping"}


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        (
            "pass `kernel_dtype=float64` and `overwrite_kernels=True`",
            "pass --kernel_dtype float64 and --overwrite_kernels",
        ),
        ("`mapping` has one label", "--mapping has one label"),
        ("`forward` returns `logits`", "`forward` returns `logits`"),
        ("`mapping={'0': 'a b'}` is not JSON", "--mapping {'0': 'a b'} is not JSON"),
    ],
)
def test_settings_are_written_as_flags_and_other_words_in_backticks_are_kept(sentence: str, shown: str) -> None:
    assert in_flags(sentence, NAMES) == shown


def test_log_lines_name_flags_too() -> None:
    record = logging.LogRecord("lmntk", logging.WARNING, "", 0, "`%s` is not read", ("mapping",), None)
    assert FlagFormatter("%(message)s", None, NAMES).format(record) == "--mapping is not read"


def test_the_list_of_settings_holds_all_of_run_py_that_sentences_may_name() -> None:
    flags = flag_names()
    own = {
        field.name
        for group in (ModelArguments, DataArguments, KernelArguments, RunArguments, OldArguments)
        for field in dataclasses.fields(group)
    }
    sources = [path.read_text(encoding="utf-8") for path in Path(lmntk.__file__).parent.rglob("*.py")]
    named = {name for source in sources for name in re.findall(r"`([a-z]\w*)(?:=[^`]*)?`", source)}
    assert own | (named & flags) <= {*RUN_SETTINGS} <= flags
