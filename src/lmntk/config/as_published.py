"""Settings in which the published program (Malladi et al. 2023, arXiv 2210.05643) differs from this one.

``--as_published`` takes the published value of every setting in this table that the command line does not give.
docs/reference/as-published.md explains each of them.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

Flags = Any
"""All flags of a command by their names, and `active_trainer`, `two_classes`, `regression` and `row_fills` (whether the
task's row completes lengths or draws)."""


@dataclass(frozen=True)
class Row:
    """A setting with its published value.

    Attributes:
        flag: The flag of the setting.
        value: The published program's value.
        says: What this value does, in the words of a log line.
        matters: Returns whether the value changes what a command does.
        read: Whether the published program reads the flag; a flag that it does not read is overridden even if given.
    """

    flag: str
    value: Any
    says: str
    matters: Callable[[Flags], bool]
    read: bool = True


def _fits_head(given: Flags) -> bool:
    trains = given.active_trainer in ("kernel", "standard") and given.from_linearhead
    return (given.active_trainer == "linearhead" or trains) and given.load_kernels is None and not given.regression


def _trains(given: Flags) -> bool:
    return given.active_trainer == "standard"


def _demonstrates(given: Flags) -> bool:
    return given.few_shot_type == "prompt-demo"


ROWS = (
    Row(
        "linear_head_halved",
        True,
        "the linear head gets half the log-odds of a fit with twice the C",
        lambda given: _fits_head(given) and given.two_classes,
    ),
    Row(
        "linear_head_order",
        "sampler",
        "the linear head is cross-validated on the examples in the training sampler's order",
        _fits_head,
    ),
    Row(
        "kernel_solver", "logistic", "the solver is logistic regression", lambda given: given.active_trainer == "kernel"
    ),
    Row(
        "flattened_targets",
        True,
        "one model of two classes is fitted to the flattened kernel, and the largest of its logits predicts",
        lambda given: (
            given.active_trainer == "kernel"
            and given.kernel_solver in ("logistic", "svc")
            and not given.binary_classification
        ),
    ),
    Row(
        "plain_lbfgs",
        True,
        "logistic regression takes the weights at which L-BFGS ends, also short of the minimum",
        lambda given: _fits_head(given) or (given.active_trainer == "kernel" and given.kernel_solver == "logistic"),
    ),
    Row(
        "save_logit_pairs",
        True,
        "a single logit f is saved as the two logits -f and f",
        lambda given: given.save_logit and given.binary_classification,
    ),
    # `build` logs this one, since only the model's configuration shows whether it is a BERT.
    Row("segments", False, "BERT is not told which sentence a token belongs to", lambda given: False),
    Row(
        "clip_frozen",
        True,
        "the gradients of frozen layers count in the norm that is clipped",
        lambda given: _trains(given) and given.fix_layers > 0 and given.max_grad_norm > 0,
    ),
    Row(
        "decay_head_norm",
        True,
        "weight decay spares only what is named bias or LayerNorm.weight",
        lambda given: _trains(given) and given.weight_decay > 0,
    ),
    Row(
        "task_defaults",
        False,
        "lengths and --num_sample that are not given are the general ones, not the task's own",
        lambda given: given.row_fills,
    ),
    Row(
        "truncate_demonstrations_only",
        True,
        "--truncate_head counts for prompts with demonstrations only",
        lambda given: given.truncate_head and not _demonstrates(given),
    ),
    Row("use_full_length", False, "--use_full_length is not read", lambda given: True, read=False),
    Row("num_demo", 1, "--num_demo is not read", _demonstrates, read=False),
    Row("lr_scheduler_type", "linear", "--lr_scheduler_type is not read: it is linear", _trains, read=False),
    Row("eval_steps", None, "--eval_steps is not read", _trains, read=False),
)
"""The settings, in the order in which they are logged."""

ADAMW = (
    "--as_published: AdamW is torch's all the same; transformers 4 decayed after the step and added epsilon before the "
    "bias correction, which changes logits by about 3e-4 after 5 steps at 1e-3"
)


def applied(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return a command's flags with the published values, if ``--as_published`` is among them.

    Args:
        values: The values of all flags.
        given: The names of the flags on the command line, which keep their value unless the published program does
            not read them.
    """
    if not values["as_published"]:
        return dict(values)
    named = {name.removeprefix("no_") if name.removeprefix("no_") in _FLAGS else name for name in given}
    return {**values, **{row.flag: row.value for row in ROWS if not row.read or row.flag not in named}}


def changes(given: Flags) -> list[str]:
    """Return a sentence for every setting that ``--as_published`` changes for a command.

    Args:
        given: The flags and more, see `Flags`.
    """
    if not given.as_published:
        return []
    changed = [row for row in ROWS if row.flag in given.published_settings and row.matters(given)]
    sentences = [f"--as_published: {row.says} ({_written(row)})" for row in changed]
    return sentences + [ADAMW] * (_trains(given) and given.optimizer == "adam")


def _written(row: Row) -> str:
    """Return the flag that sets only this row's published value."""
    if not row.read:
        return f"as without --{row.flag}"
    if row.value is False:
        return f"--no_{row.flag}"
    return f"--{row.flag}" if row.value is True else f"--{row.flag} {row.value}"


_FLAGS = {row.flag for row in ROWS}
