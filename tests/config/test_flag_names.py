"""Settings in a sentence become flags on a command line."""

import logging

import pytest

from lmntk.config.flag_names import FlagFormatter, in_flags

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
