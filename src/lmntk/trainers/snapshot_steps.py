"""When a training writes snapshots, and which snapshots of earlier trainings stay in its folder."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from lmntk import distributed
from lmntk.config.kernel_steps import KernelSteps
from lmntk.errors import FileError, SettingError
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import (
    TrainingSnapshot,
    find_snapshots,
    read_snapshot,
    step_of_file,
    write_snapshot,
)
from lmntk.storage.wording import quantity
from lmntk.trainers.snapshots import SnapshotWriter
from lmntk.trainers.training_checkpoints import step_of

SAME_IN_A_TRAINING = ("trainer", "kernel_formula", "kernel_dtype", "parameters", "grad_dim")
"""What the descriptions of all snapshots of a training have in common, besides the weights at the start."""
SETTING_OF = {"parameters": "fix_layers", "grad_dim": "fix_layers"}
"""The settings that make those differ whose names are not settings."""
LONGEST_SHOWN = 60
"""Letters of two values that a sentence shows."""

logger = logging.getLogger(__name__)


class SnapshotSteps(TrainerCallback):
    """Writes snapshots of a model while the stock trainer trains it.

    The last snapshot is that of the model which the run evaluates. Where that is not the model of the last step but the
    best on dev, of an earlier step, training counts as ended there: the snapshots of later steps are removed.

    Args:
        writer: Writes them.
        steps: The steps that are wanted.
        trained: The parameters that the optimizer changes, by name.
    """

    def __init__(self, writer: SnapshotWriter, steps: KernelSteps, trained: Mapping[str, Tensor]) -> None:
        self._writer = writer
        self._steps = steps
        self._trained = trained
        self._before: dict[str, Tensor] | None = None
        self._signs: dict[int, dict[str, float | None]] = {}
        self._written: set[int] = set()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Say which steps come after the last or before a resumed training, and write step 0."""
        last, begun = state.max_steps, state.global_step
        beyond = sorted(step for step in self._steps.numbers if step > last)
        if beyond:
            logger.warning(
                "`kernel_steps`: training ends after %s, so there is no snapshot of %s",
                quantity(last, "step"),
                _listed(beyond),
            )
        there = distributed.on_rank_zero(lambda: {step_of_file(path) for path in self._files()})
        self._written |= there
        missed = sorted(step for step in self._steps.numbers if 0 < step <= begun and step not in there)
        if missed:
            logger.warning(
                "`kernel_steps`: training goes on after step %d, so there is no snapshot of %s", begun, _listed(missed)
            )
        if 0 in self._steps.numbers and 0 not in there:
            self._writer.write_start({"last_step": last})
            self._written.add(0)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep the weights before a step of which there will be a snapshot."""
        if self._steps.at(state.global_step + 1, state.max_steps):
            self._before = {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Compare the step with the gradient."""
        if self._before is not None:
            self._signs[state.global_step + 1] = sign_shares(self._before, self._trained)
            self._before = None

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the snapshot of a step that is wanted."""
        if state.global_step in self._steps.numbers:
            self._write(state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the snapshot of the model that training keeps."""
        if not self._steps.last:
            return
        step = state.global_step
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            step = step_of(Path(state.best_model_checkpoint))
        distributed.on_rank_zero(self._end_at, step)
        if step not in self._written:
            self._write(step, step)

    def _write(self, step: int, last: int) -> None:
        self._writer.write(step, {"last_step": last, **self._signs.get(step, {})})
        self._written.add(step)

    def _files(self) -> list[Path]:
        return find_snapshots(self._writer.paths)

    def _end_at(self, last: int) -> None:
        """Remove the snapshots after the last step, and tell the others that it is the last."""
        later = []
        for path in self._files():
            if step_of_file(path) > last:
                later.append(step_of_file(path))
                path.unlink()
                continue
            snapshot = read_kept(path)
            if snapshot.description.get("last_step") != last:
                snapshot.description.update(last_step=last)  # type: ignore[attr-defined]
                write_snapshot(self._writer.paths, snapshot)
        if later:
            logger.info(
                "the model that is kept is that of step %d, the best on dev: the snapshots of %s are removed; "
                "`save_at_last` keeps the last model instead",
                last,
                _listed(later),
            )


def sign_shares(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Compare the signs of a step with those of the gradient, over the parameters whose gradient is not zero.

    Args:
        before: The weights before the step.
        after: The weights after it, with the gradient of the step in ``grad``.

    Returns:
        ``sign_share``: of those that moved, the share that moved against their gradient: 1 for SignGD without weight
        decay, and for Adam at its first step. ``unmoved_share``: the share that did not move, such as those whose step
        is lost in rounding. None where there are none to count.
    """
    opposite = moved = counted = 0
    for name, value in after.items():
        if value.grad is not None:
            signs = value.grad.sign()
            product = (value.detach() - before[name]).sign() * signs
            counted += int(torch.count_nonzero(signs))
            moved += int(torch.count_nonzero(product))
            opposite += int(torch.count_nonzero(product == -1))
    return {
        "sign_share": opposite / moved if moved else None,
        "unmoved_share": (counted - moved) / counted if counted else None,
    }


def read_kept(path: Path) -> TrainingSnapshot:
    """Read a snapshot that a resumed training keeps.

    Raises:
        FileError: It is damaged.
    """
    try:
        return read_snapshot(path)
    except FileError as error:
        raise FileError(
            f"{path}, a snapshot of the training that goes on here, cannot be read: remove that file to go on without "
            "it",
            path=path,
        ) from error


def clear_snapshots(paths: RunPaths, until: int, facts: Mapping[str, Any] | None) -> None:
    """Remove the snapshots that a training will not go on from.

    Args:
        paths: The files of the run.
        until: The step from which training goes on; 0 for a new training, which keeps none.
        facts: The description that the training's own snapshots will have; None if it writes none, so that nobody would
            tell the earlier ones at which step it ended: they are removed too.

    Raises:
        SettingError: The snapshots that would stay have other descriptions.
        FileError: A snapshot cannot be read or removed.
    """
    found = find_snapshots(paths)
    kept = [] if facts is None else [path for path in found if step_of_file(path) <= until and until]
    for path in kept:
        _check_same_training(path, read_kept(path).description, facts or {})
    if until and found and facts is None:
        logger.warning(
            "`kernel_steps` is not given, so the snapshots that are in %s would not be of the training as it goes on: "
            "they are removed (%s)",
            paths.folder,
            _listed([step_of_file(path) for path in found]),
        )
    for path in found:
        if path not in kept:
            remove_snapshot(path)


def remove_snapshot(path: Path) -> None:
    """Remove a snapshot.

    Raises:
        FileError: That is not possible.
    """
    try:
        path.unlink()
    except OSError as error:
        raise FileError(f"cannot remove {path}, of an earlier training ({error.strerror})", path=path) from error


def _check_same_training(path: Path, stored: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Check that a snapshot that stays was taken as the ones to come will be."""
    if stored.get("weights_sha256") != facts.get("weights_sha256"):
        raise SettingError(
            f"`resume_from_checkpoint`: {path} belongs to a training that started from other weights, at which its "
            "linearised logits were taken: give the `model_name_or_path` and `seed` of that training, or remove "
            "the file",
            setting="resume_from_checkpoint",
            value=str(path),
        )
    for name in SAME_IN_A_TRAINING:
        if stored.get(name, facts.get(name)) != facts.get(name):
            setting, theirs, ours = SETTING_OF.get(name, name), stored[name], facts.get(name)
            shown = f" ({theirs}, here {ours})" if len(f"{theirs}{ours}") < LONGEST_SHOWN else ""
            raise SettingError(
                f"`resume_from_checkpoint`: {path} was taken with another `{setting}`{shown}, and snapshots of one "
                "training are compared with each other: give the setting with which that training began, or remove the "
                "file",
                setting=setting,
                value=ours,
            )


def _listed(steps: list[int]) -> str:
    return f"step{'' if len(steps) == 1 else 's'} {', '.join(map(str, steps))}"
