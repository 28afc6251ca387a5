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
from lmntk.storage.training_snapshots import find_snapshots, read_snapshot, write_snapshot
from lmntk.storage.wording import quantity
from lmntk.trainers.snapshots import SnapshotWriter
from lmntk.trainers.training_checkpoints import step_of

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
        self._sign_shares: dict[int, float] = {}
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
        there = distributed.on_rank_zero(lambda: {read_snapshot(path).step for path in self._files()})
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
            self._sign_shares[state.global_step + 1] = opposite_share(self._before, self._trained)
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
        share = {"sign_share": self._sign_shares[step]} if step in self._sign_shares else {}
        self._writer.write(step, {"last_step": last, **share})
        self._written.add(step)

    def _files(self) -> list[Path]:
        return find_snapshots(self._writer.paths)

    def _end_at(self, last: int) -> None:
        """Remove the snapshots after the last step, and tell the others that it is the last."""
        later = []
        for path in self._files():
            snapshot = read_snapshot(path)
            if snapshot.step > last:
                later.append(snapshot.step)
                path.unlink()
            elif snapshot.description.get("last_step") != last:
                snapshot.description.update(last_step=last)  # type: ignore[attr-defined]
                write_snapshot(self._writer.paths, snapshot)
        if later:
            logger.info(
                "the model that is kept is that of step %d, the best on dev: the snapshots of %s are removed; "
                "`save_at_last` keeps the last model instead",
                last,
                _listed(later),
            )


def opposite_share(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Return the share of parameters whose last step has the sign opposite to their gradient's.

    Parameters whose gradient is zero do not count. SignGD without weight decay has 1, and Adam at its first step too.

    Args:
        before: The weights before the step.
        after: The weights after it, with the gradient of the step in ``grad``.
    """
    opposite = counted = 0
    for name, value in after.items():
        if value.grad is not None:
            signs = value.grad.sign()
            counted += int(torch.count_nonzero(signs))
            opposite += int(torch.count_nonzero((value.detach() - before[name]).sign() * signs == -1))
    return opposite / counted if counted else float("nan")


def clear_snapshots(paths: RunPaths, until: int, start_hash: str | None) -> None:
    """Remove the snapshots that a training will not go on from.

    Args:
        paths: The files of the run.
        until: The step from which training goes on; 0 for a new training, which keeps none.
        start_hash: The SHA-256 of the weights from which the training that goes on has started; None if not known.

    Raises:
        SettingError: The snapshots that would stay are of a training from other weights.
        FileError: A snapshot cannot be removed.
    """
    for path in find_snapshots(paths):
        snapshot = read_snapshot(path) if until else None
        if snapshot is None or snapshot.step > until:
            try:
                path.unlink()
            except OSError as error:
                raise FileError(
                    f"cannot remove {path}, of an earlier training ({error.strerror})", path=path
                ) from error
        elif start_hash is not None and snapshot.description.get("weights_sha256") != start_hash:
            raise SettingError(
                f"`resume_from_checkpoint`: {path} belongs to a training that started from other weights, at which its "
                "linearised logits were taken: give the `model_name_or_path` and `seed` of that training, or remove "
                "the file",
                setting="resume_from_checkpoint",
                value=str(path),
            )


def _listed(steps: list[int]) -> str:
    return f"step{'' if len(steps) == 1 else 's'} {', '.join(map(str, steps))}"
