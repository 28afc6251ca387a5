"""Translate old spellings and abbreviations of flags to the current full names."""

import difflib
import itertools
from collections.abc import Collection, Mapping, Sequence

from lmntk.errors import UnknownNameError

# Old command lines use these names, which transformers 5 has dropped. Their values have the same meaning.
# (transformers dropped --overwrite_output_dir too, without a successor: arguments.py defines it.)
OLD_SPELLINGS: Mapping[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
}
# Abbreviations that meant one flag before these flags were added still mean it.
YOUNGER = frozenset({
    "adafactor", "as_published", "cg_tolerance", "clip_frozen", "decay_head_norm", "fine_tuned_model",
    "flattened_targets", "fp16_backend", "fp16_opt_level", "group_by_length", "kernel_influence", "kernel_lora_rank",
    "kernel_lora_targets", "kernel_parts", "kernel_steps", "kernel_variance", "linear_head_halved", "linear_head_order",
    "logging_dir", "lstsq_method", "no_segments", "no_task_defaults", "past_index", "plain_lbfgs", "projection_check",
    "projection_seed", "projection_tolerance", "projection_width", "save_logit_pairs", "segments", "select_by",
    "sharded_ddp", "task_defaults", "tpu_metrics_debug", "tpu_num_cores", "truncate_demonstrations_only",
    "warmup_ratio",
})  # fmt: skip

_BOOLEANS = {"true", "false", "yes", "no", "t", "f", "y", "n", "1", "0"}  # what HfArgumentParser takes for one


def translate(argv: Sequence[str], flags: Collection[str]) -> list[str]:
    """Write out every flag of a command line in full, under its current name.

    Args:
        argv: The command line: ``--flag value``, ``--flag=value`` or ``--flag``, with ``-`` or ``_`` between words.
        flags: The names of the current flags, without the leading dashes.

    Returns:
        The same command line, values untouched.

    Raises:
        UsageError: A flag that does not exist, or an abbreviation of several flags.
    """
    translated = [_translate_token(token, flags) for token in argv]
    return [_debug_of_4_4(token, following) for token, following in itertools.pairwise([*translated, "--"])]


def full_name(name: str, flags: Collection[str]) -> str:
    """Return the flag that a name stands for: a flag, an old spelling, or an unambiguous abbreviation.

    Args:
        name: The name as the user wrote it, without the leading dashes.
        flags: The names of the current flags.

    Returns:
        The name of one of `flags`.

    Raises:
        UnknownNameError: No flag, or several, begin with the name.
    """
    name = name.replace("-", "_")
    if name in OLD_SPELLINGS:
        return OLD_SPELLINGS[name]
    if name in flags:
        return name
    spellings = sorted({*flags, *OLD_SPELLINGS})
    matches = sorted({OLD_SPELLINGS.get(spelling, spelling) for spelling in spellings if spelling.startswith(name)})
    matches = [flag for flag in matches if flag not in YOUNGER] or matches
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UnknownNameError(
            f"--{name} could be {_one_of(matches)}: write the flag out", name=name, kind="flag", options=matches
        )
    close = difflib.get_close_matches(name, spellings, n=1, cutoff=0.6)
    hint = f"did you mean --{close[0]}? " if close else ""
    raise UnknownNameError(
        f"unknown flag --{name}: {hint}run.py --help lists all flags", name=name, kind="flag", options=close
    )


def is_flag(token: str) -> bool:
    """Return whether a word is a flag, by argparse's rule: two dashes, and no space in the name."""
    return len(token) > 2 and token.startswith("--") and " " not in token.partition("=")[0]


def _translate_token(token: str, flags: Collection[str]) -> str:
    if not is_flag(token):
        return token
    name, equals, value = token[2:].partition("=")
    return f"--{full_name(name, flags)}{equals}{value}"


def _debug_of_4_4(token: str, following: str) -> str:
    """Rename ``--debug`` if it is transformers 4.4's switch for TPU metrics; the current flag takes option names."""
    name, equals, value = token.partition("=")
    if name != "--debug":
        return token
    is_switch = value.lower() in _BOOLEANS if equals else is_flag(following) or following.lower() in {"--", *_BOOLEANS}
    return f"--tpu_metrics_debug{equals}{value}" if is_switch else token


def _one_of(names: Sequence[str]) -> str:
    """Join names for a sentence; an abbreviation such as ``--l`` has too many matches to list all."""
    shown = [f"--{name}" for name in names[:6]]
    if len(names) > len(shown):
        return ", ".join(shown) + f" or {len(names) - len(shown)} others"
    return ", ".join(shown[:-1]) + f" or {shown[-1]}"
