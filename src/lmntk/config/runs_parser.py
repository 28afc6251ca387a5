"""What the commands have in common that start many runs: words for run.py after ``--``, and what they print where."""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence

from lmntk.config.flag_names import RUN_SETTINGS
from lmntk.config.legacy_flags import is_flag
from lmntk.config.tool_parser import Parser
from lmntk.errors import SettingError, UsageError

RESUME = "what is done is kept; the same command goes on from there"
FORMS = ("text", "markdown", "latex", "csv", "json")
OWN_SETTINGS = frozenset({
    "adjust_for_init", "data_dir", "do_predict", "do_train", "dry_run", "fine_tuned_model", "kernel_formula",
    "kernel_steps", "learning_rate", "load_kernels", "max_steps", "model_name_or_path", "num_k", "optimizer",
    "optimizer_variant", "output_dir", "seed", "sweep", "task_name", "trainer",
})  # fmt: skip
"""The settings of run.py that these commands set themselves."""


class RunsParser(Parser):
    """A parser that leaves the words after ``--`` to run.py."""

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line; `further` are the words for run.py."""
        words = sys.argv[1:] if argv is None else [*argv]
        end = words.index("--") if "--" in words else len(words)
        given = super().read(words[:end])
        given.further = check_further(words[end + 1 :])
        for name in ("jobs", "max_steps", "batch_size", "subsets", "train_seeds"):
            if (value := getattr(given, name, 1)) < 1:
                raise SettingError(f"`{name}` is {value}, but it must be 1 or more", setting=name, value=value)
        return given


def check_further(words: Sequence[str], own_settings: Collection[str] = OWN_SETTINGS) -> list[str]:
    """Return the words for run.py, if every run can have them.

    Args:
        words: The words.
        own_settings: The settings that the command itself sets.

    Raises:
        SettingError: This command itself sets one of them.
        UsageError: They do not begin with a flag.
    """
    if words and not is_flag(words[0]):
        raise UsageError(f"'{words[0]}' after -- belongs to no flag: flags of run.py follow --", word=words[0])
    for word in filter(is_flag, words):
        name = word[2:].partition("=")[0].replace("-", "_")
        own = [setting for setting in sorted(own_settings) if setting.startswith(name)]
        if name in own_settings or (own and name not in RUN_SETTINGS):
            raise SettingError(f"{word} after --: this command sets `{own[0]}` for each run", setting=own[0])
    return [*words]


def teller(form: str) -> Callable[[str], None]:
    """Return what prints messages: on stderr beside a table that is not text, which stdout carries alone.

    Args:
        form: One of `FORMS`.
    """
    stream = sys.stdout if form == "text" else sys.stderr
    return lambda text: print(text, file=stream, flush=True)
