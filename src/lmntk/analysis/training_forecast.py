"""What the kernel at θ₀ predicts of a training: losses and scores by step, and beside them those of a real training."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lmntk.analysis.pairing import check_pair
from lmntk.analysis.saved_run import MODES, SavedRun
from lmntk.analysis.scores import score
from lmntk.analysis.statistics import Array
from lmntk.analysis.trainings import Training
from lmntk.data.metrics import mean_over_samples
from lmntk.errors import FileError, KernelMismatchError, SettingError
from lmntk.solvers.gradient_flow import LinearisedTraining, Loss, StableSteps, logits_of, mean_loss
from lmntk.solvers.problem import ClassIds, class_ids, predicted_classes

MOST_POINTS = 400
"""How many steps are evaluated; of a longer training, every few steps, the first and the last among them."""

SCHEDULES = ("constant", "constant_with_warmup", "linear")


class StepNumbers(NamedTuple):
    """A training after some steps.

    Attributes:
        step: The number of steps.
        losses: The loss of each split, train included: a mean over its prompts, several of an example with several
            templates, as the trainers have it.
        scores: The score of each split, of logits averaged over the prompts of an example.
    """

    step: int
    losses: dict[str, float]
    scores: dict[str, float]


@dataclass(frozen=True)
class TrainingForecast:
    """The forecast of a training with one loss.

    Attributes:
        loss: The loss.
        rates: The learning rate of each step.
        stable_step: The largest stable learning rate for this loss that is exact: for the cross entropy that at f₀.
        steps: The numbers by step, ascending; the first is step 0.
    """

    loss: Loss
    rates: Sequence[float]
    stable_step: float
    steps: Sequence[StepNumbers]

    @property
    def best(self) -> StepNumbers | None:
        """The step with the best score on dev, of equal ones that with the smallest loss; None without dev."""
        with_dev = [found for found in self.steps if "dev" in found.scores and math.isfinite(found.losses["dev"])]
        return max(with_dev, key=lambda found: (found.scores["dev"], -found.losses["dev"]), default=None)

    @property
    def least_loss(self) -> StepNumbers | None:
        """The step with the smallest loss on dev; None without dev."""
        with_dev = [found for found in self.steps if math.isfinite(found.losses.get("dev", math.nan))]
        return min(with_dev, key=lambda found: found.losses["dev"], default=None)


@dataclass(frozen=True, eq=False)
class KernelTraining:
    """A kernel run as a linearised model to be trained.

    Attributes:
        run: The run, whose formula is sgd and which stores f₀.
    """

    run: SavedRun

    @classmethod
    def of_run(cls, run: SavedRun) -> "KernelTraining":
        """Check that a run says how gradient descent trains its model.

        Raises:
            SettingError: Its task is a regression task.
            KernelMismatchError: Its kernel is not that of gradient descent.
            FileError: It lacks f₀.
        """
        if run.task is not None and run.task.regression:
            sentence = f"{run.folder} is a run of {run.task.name}, a regression task: give a run of a task with classes"
            raise SettingError(sentence, setting="task_name", value=run.task.name)
        formula = run.description.get("formula", "sgd")
        if formula != "sgd":
            raise KernelMismatchError(
                f"{run.folder} holds kernels with `kernel_formula={formula}`, whose steps are not those of gradient "
                "descent: a forecast of training needs `kernel_formula=sgd`",
                path=run.folder,
                differences=["kernel_formula"],
            )
        for split in run.kernel_splits:
            path = run.kernel_paths.logits(split)
            if not path.is_file() and not run.paths.logits(split).is_file():
                raise FileError(
                    f"{path} is missing, the untrained model's logits, from which training starts: give the command "
                    "that made the kernels again, without `load_kernels`, which writes them",
                    path=path,
                )
        return cls(run)

    @functools.cached_property
    def training(self) -> LinearisedTraining:
        """The linearised model and its train examples, one for each row of the kernel."""
        train = self.run.kernel("train")
        classes = class_ids(train.labels, train.num_logits)
        return LinearisedTraining(train.values, classes, self.run.untrained_logits("train"))

    @property
    def stable_steps(self) -> StableSteps:
        """The largest stable learning rates."""
        return self.training.stable_steps

    def forecast(
        self, loss: Loss, rates: Sequence[float], *, discrete: bool, wanted: Sequence[int] = ()
    ) -> TrainingForecast:
        """Predict the losses and scores of a training.

        Args:
            loss: The loss.
            rates: The learning rate of each step.
            discrete: Whether steps of gradient descent are taken; else gradient flow goes on for the same time.
            wanted: Steps to evaluate in any case.
        """
        some = np.linspace(0, len(rates), min(len(rates) + 1, MOST_POINTS)).round().astype(int)
        shown = np.union1d(some, [step for step in wanted if step <= len(rates)]).astype(int)
        times = np.concatenate([[0.0], np.cumsum(rates)])
        alpha = self.training.descent(loss, rates)[shown] if discrete else self.training.flow(loss, times[shown])
        by_split = {split: self._numbers(split, loss, alpha) for split in self.run.kernel_splits}
        steps = [
            StepNumbers(
                int(step),
                {split: float(losses[index]) for split, (losses, _) in by_split.items()},
                {split: scores[index] for split, (_, scores) in by_split.items()},
            )
            for index, step in enumerate(shown)
        ]
        stable = self.stable_steps
        limit = stable.squared_error if loss == "squared_error" else stable.cross_entropy_at_start
        return TrainingForecast(loss, [float(rate) for rate in rates], limit, steps)

    def _numbers(self, split: str, loss: Loss, alpha: Array) -> tuple[Array, list[float]]:
        """Return the loss and the score of a split for each set of coefficients."""
        saved = self.run.kernel(split)
        rows = logits_of(alpha, saved.values, self.run.untrained_logits(split))
        losses = mean_loss(loss, rows, class_ids(saved.labels, saved.num_logits))  # over rows, as the trainers have it
        means = (mean_over_samples(each, len(saved.class_ids)) for each in rows)
        return losses, [_score(self.run, split, each, saved.class_ids) for each in means]


def _score(run: SavedRun, split: str, logits: Array, classes: ClassIds) -> float:
    """Return the score of logits, NaN if they are not finite."""
    return score(run.task, split, predicted_classes(logits), classes) if np.isfinite(logits).all() else float("nan")


@dataclass(frozen=True, eq=False)
class RealTraining:
    """A training with snapshots, as far as a forecast can stand beside it.

    Attributes:
        training: The training.
        loss: Its loss.
        rates: The learning rate of each of its steps.
        remarks: In what its steps differ from gradient descent on all train examples, and what is missing.
        samples: How many prompts each train example has.
    """

    training: Training
    loss: Loss
    rates: Sequence[float]
    remarks: Sequence[str]
    samples: int = 1

    @classmethod
    def of_run(cls, run: SavedRun, kernel: SavedRun) -> "RealTraining":
        """Read a training that starts where a kernel was computed.

        Args:
            run: The training.
            kernel: The kernel run.

        Raises:
            FileError: It has no snapshots.
            SettingError: Its optimizer is not plain SGD, or its learning rate follows another schedule than those of
                `SCHEDULES`.
            KernelMismatchError: The two runs differ in data, model or prompt.
        """
        training = Training.of_run(run)
        record = {**training.description, **run.record}
        if record.get("optimizer", "adam") != "sgd" or record.get("optimizer_variant") not in (None, ""):
            what = record.get("optimizer_variant") or record.get("optimizer", "adam")
            raise SettingError(
                f"{run.folder} was trained with {what}, whose steps the kernel of gradient descent does not predict: "
                "give a training with `optimizer=sgd`",
                setting="training",
                value=str(run.folder),
            )
        check_pair(run, kernel, training.description, kernel.description)
        last = training.steps[-1]
        total = max(int(training.read(last).description.get("last_step", last)), last)
        loss: Loss = "squared_error" if record.get("l2_loss") else "cross_entropy"
        samples = kernel.kernel("train").samples_per_example[0]
        return cls(training, loss, learning_rates(record, total), _remarks(record, training, samples), samples)

    @property
    def steps(self) -> list[StepNumbers]:
        """The numbers of the snapshots."""
        found = []
        for step in self.training.steps:
            snapshot = self.training.read(step)
            losses, scores = {}, {}
            for split in sorted(snapshot.splits, key=MODES.index):
                of_split = self.training.split(snapshot, split)
                if self.samples == 1:
                    losses[split] = float(mean_loss(self.loss, of_split.logits, of_split.labels))
                elif split == "train" and "train_loss" in snapshot.description:
                    losses[split] = float(snapshot.description["train_loss"])  # the snapshot's logits are means
                scores[split] = _score(self.training.run, split, of_split.logits, of_split.labels)
            found.append(StepNumbers(step, losses, scores))
        return found


def learning_rates(record: Mapping[str, Any], steps: int) -> list[float]:
    """Return the learning rate of each step of a training.

    Args:
        record: The arguments of the run: the learning rate, its schedule, its warm-up and `max_steps`.
        steps: How many steps it took.

    Raises:
        SettingError: The schedule is not one of `SCHEDULES`.

    Examples:
        >>> learning_rates({"learning_rate": 1.0, "lr_scheduler_type": "linear"}, 4)
        [1.0, 0.75, 0.5, 0.25]
    """
    schedule = str(record.get("lr_scheduler_type", "linear")).rpartition(".")[2].lower()
    if schedule not in SCHEDULES:
        raise SettingError(
            f"the training has `lr_scheduler_type={schedule}`, but a forecast knows {', '.join(SCHEDULES)}: give "
            "`learning_rate` and `steps` instead",
            setting="lr_scheduler_type",
            value=schedule,
        )
    rate = float(record["learning_rate"])
    planned = int(record.get("max_steps") or -1)
    total = planned if planned > 0 else steps
    warmup = float(record.get("warmup_steps") or 0)
    first = math.ceil(total * warmup) if 0 < warmup < 1 else int(warmup)
    if schedule == "constant":
        first = 0
    shares = [
        step / first
        if step < first
        else (max(0.0, (total - step) / max(1, total - first)) if schedule == "linear" else 1.0)
        for step in range(steps)
    ]
    return [rate * share for share in shares]


def _remarks(record: Mapping[str, Any], training: Training, samples: int) -> list[str]:
    """Say in what a training's steps differ from those of gradient descent on all examples."""
    train = training.first.splits.get("train")
    found = []
    sizes = ("per_device_train_batch_size", 0), ("gradient_accumulation_steps", 1), ("processes", 1)
    batch = math.prod(int(record.get(name) or usual) for name, usual in sizes)
    if train is not None and 0 < batch < (rows := samples * len(train.labels)):
        what = "examples" if samples == 1 else "prompts"
        found.append(f"the training takes {batch} of {rows} {what} a step, the forecast all")
    if float(record.get("max_grad_norm") or 0) > 0:
        found.append(
            f"the training clips gradients to the norm {float(record['max_grad_norm']):g}, the forecast does not"
        )
    for name, what in (("weight_decay", "weight decay"), ("label_smoothing_factor", "label smoothing")):
        if float(record.get(name) or 0) != 0:
            found.append(f"the training has {what}, the forecast has none")
    found += _about_dropout(record)
    if samples > 1:
        found.append("real losses of dev and test are missing: the training keeps means over the prompts of an example")
    return found


def _about_dropout(record: Mapping[str, Any]) -> list[str]:
    if record.get("trainer") == "linearised":
        return []
    dropout = record.get("dropout")
    if dropout is None:
        return ["whether the training draws dropout is not recorded; the forecast does not"]
    shares = sorted({float(share) for share in dropout.values()})
    if not shares:
        return []
    return [f"the training draws dropout ({', '.join(f'{share:g}' for share in shares)}), the forecast does not"]
