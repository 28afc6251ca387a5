"""What all trainers share: losses, logits and metrics of a model that predicts at one position."""

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy

from lmntk import distributed
from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.data.metrics import compute_metrics, mean_over_samples
from lmntk.data.tasks import REGRESSION_RANGE, Task
from lmntk.errors import NotFiniteError
from lmntk.experiment.experiment import Evaluation, Experiment
from lmntk.experiment.untrained_logits import untrained_logits
from lmntk.models.classifier import PromptClassifier
from lmntk.prompts.features import Collator, FeatureDataset, FeatureExamples
from lmntk.solvers.problem import predicted_classes

logger = logging.getLogger(__name__)

OVERFLOW = "values overflow inside the model; take `kernel_dtype=float64`, or another `model_name_or_path`"


class FewShotTrainer(transformers.Trainer):
    """A stock `Trainer` for models that return the logits of classes, or a score.

    Args:
        task: The task that is learned.
        model: Maps a batch of `Collator` to logits ``[B, C]``.
        args: The arguments of the run. The trainer works with a copy, `args`, in which it adapts a few.
        collator: Makes batches of features.
        l2_loss: Whether the loss is the squared error instead of the cross entropy.
        **kwargs: Further arguments of `transformers.Trainer`.
    """

    args: TrainingArguments

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        args: TrainingArguments,
        collator: Collator,
        l2_loss: bool = False,
        **kwargs: Any,
    ) -> None:
        smoothing = args.label_smoothing_factor
        args = args.with_changes(
            # One process drives one device: several devices need torchrun.
            _n_gpu=min(args.n_gpu, 1),
            # Pinned memory serves transfers to a GPU; without one torch warns.
            dataloader_pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            # A split is scored as a whole, by its logits.
            prediction_loss_only=False,
            eval_do_concat_batches=True,
            # The stock trainer smooths labels only for a model with a `config` and a loss; `compute_loss` does it here.
            label_smoothing_factor=0.0,
        )
        super().__init__(model=model, args=args, data_collator=collator, **kwargs)
        self.args.label_smoothing_factor = smoothing
        # The stock trainer guesses this from an argument `labels` of the model, which has none.
        self.label_names = ["labels"]
        self._task = task
        self._l2_loss = l2_loss

    def facts(self) -> dict[str, Any]:
        """Return what the record of the run says of it beyond the arguments."""
        return {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss, a mean over the batch, and the logits ``[B, C]`` if wanted."""
        logits = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
        if model.training and self.state.global_step == 0:
            distributed.on_all_ranks(_check_before_training, logits, self.args)
        loss = self._loss(logits, inputs["labels"], self.args.label_smoothing_factor if model.training else 0.0)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        if self._task.regression:
            return regression_loss(logits, labels)[0]
        return class_loss(logits, labels, self._l2_loss, smoothing)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return a loader of all examples: `dataloader_drop_last` concerns training alone."""
        with self._other_args(dataloader_drop_last=False):
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _other_args(self, **changes: Any) -> Iterator[None]:
        own = self.args
        self.args = own.with_changes(**changes)
        try:
            yield
        finally:
            self.args = own

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: FeatureDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the metrics of `evaluate_split`, as the stock training loop expects them.

        Args:
            eval_dataset: The split; by default the one that the trainer evaluates while it trains.
            ignore_keys: Not used: the models return logits alone.
            metric_key_prefix: Stands before the name of each metric, with an underscore.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(dataset, FeatureDataset)
        return dict(self.evaluate_split(dataset, metric_key_prefix).metrics)

    def evaluate_split(self, dataset: FeatureDataset, metric_key_prefix: str = "eval") -> Evaluation:
        """Predict a split and score the predictions.

        Args:
            dataset: The split.
            metric_key_prefix: Stands before the name of each metric, with an underscore.

        Raises:
            NotFiniteError: A model that is not trained here has logits that are NaN or infinite.
        """
        output = self.predict(dataset, metric_key_prefix=metric_key_prefix)
        # Not the loss of `output`: several processes fill the last batch up with examples that count twice there.
        logits, labels = torch.from_numpy(np.asarray(output.predictions)), torch.tensor(dataset.labels)
        predicted = regression_loss(logits, labels)[1] if self._task.regression else logits
        averaged = mean_over_samples(predicted.numpy(), dataset.num_examples)
        example_labels = labels[: dataset.num_examples].numpy()
        broken = np.flatnonzero(~np.isfinite(averaged).all(axis=1))
        if broken.size:
            self._handle_broken_logits(broken, len(averaged), dataset.mode)
        scores = score(dataset.task, averaged, example_labels)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics[f"{metric_key_prefix}_loss"] = self._loss(logits, labels).item()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return Evaluation(metrics, averaged, example_labels)

    def _handle_broken_logits(self, broken: np.ndarray, num_examples: int, split: str) -> None:
        """Warn of examples, counted from 0, whose logits are NaN or infinite."""
        logger.warning(
            "%d of %d examples of %s have logits that are NaN or infinite: training has diverged, and the scores mean "
            "nothing; lower `learning_rate`",
            len(broken),
            num_examples,
            split,
        )

    def finish(self) -> None:
        """Clean up after all results are written."""

    def logits(self, dataset: FeatureDataset) -> Tensor:
        """Return the model's logits on every prompt of a split, ``[X, C]``, in the model's own dtype.

        `predict` is not used, since `bf16_full_eval` and the like let it change the model.
        """
        model, collator = self.model, self.data_collator
        assert isinstance(model, PromptClassifier) and isinstance(collator, Collator)
        return untrained_logits(model, FeatureExamples(dataset, collator, self.args.device, model.equal_lengths))


class ZeroShotTrainer(FewShotTrainer):
    """A trainer that trains nothing: it predicts with the model as it is.

    Args:
        experiment: What was built from the arguments.
        model_args: The arguments of the model.
        args: The arguments of the run.
    """

    def __init__(self, experiment: Experiment, model_args: ModelArguments, args: TrainingArguments) -> None:
        # Without training there is nothing to evaluate in between.
        args = args.with_changes(eval_strategy=IntervalStrategy.NO)
        super().__init__(experiment.task, experiment.model, args, experiment.collator, model_args.l2_loss)

    def _handle_broken_logits(self, broken: np.ndarray, num_examples: int, split: str) -> None:
        distributed.on_all_ranks(_refuse_broken_logits, broken, num_examples, split, self.args)


def _refuse_broken_logits(broken: np.ndarray, num_examples: int, split: str, args: TrainingArguments) -> None:
    raise NotFiniteError(
        f"{len(broken)} of {num_examples} examples of {split} have logits that are NaN or infinite, first example "
        f"{broken[0]} (counted from 0), though all weights are finite: {_overflow(args)}",
        example=int(broken[0]),
        split=split,
    )


def _check_before_training(logits: Tensor, args: TrainingArguments) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise NotFiniteError(
            "the model's logits of train are NaN or infinite before the first step, though all weights are finite: "
            f"{_overflow(args)}",
            split="train",
        )


def _overflow(args: TrainingArguments) -> str:
    """Say why logits are not finite, and the remedy."""
    narrow = [name for name in ("fp16", "fp16_full_eval", "bf16", "bf16_full_eval") if getattr(args, name)]
    return f"values overflow inside the model; leave `{narrow[0]}` out" if narrow else OVERFLOW


def class_loss(logits: Tensor, labels: Tensor, squared: bool = False, smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy, or the squared error from one-hot targets, as a mean over the batch.

    Args:
        logits: ``[B, C]``; a single logit is f₁ − f₀, with the targets −1 and +1 under the squared error.
        labels: Class ids, int64 ``[B]``.
        squared: Whether to take the squared error, a mean over examples and logits.
        smoothing: The share of each target that is spread evenly over all classes.

    Examples:
        >>> round(class_loss(torch.zeros(1, 4), torch.tensor([2])).item(), 4)
        1.3863
    """
    if squared:
        if logits.shape[1] == 1:
            return F.mse_loss(logits[:, 0], (labels * 2 - 1).to(logits.dtype))
        return F.mse_loss(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype))
    # A single logit is f₁ − f₀: with f₀ = 0 it becomes two.
    both = torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits
    return F.cross_entropy(both, labels, label_smoothing=smoothing)


def regression_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss, a mean over the batch, and the predicted scores ``[B, 1]``.

    With two logits, of two label words, the score is the probability of the upper word, rescaled from [0, 1] to the
    range of scores, and the loss is the Kullback-Leibler divergence from the rescaled label (Gao et al. 2021, section
    4.1). A single logit is the score itself, and its loss is the squared error.

    Args:
        logits: ``[B, 2]``, or ``[B, 1]`` of a classification head.
        labels: Scores, ``[B]``.
    """
    low, high = REGRESSION_RANGE
    labels = labels.to(logits.dtype)
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels), logits
    place = (labels - low) / (high - low)
    log_probabilities = torch.log_softmax(logits, dim=1)
    loss = F.kl_div(log_probabilities, torch.stack([1 - place, place], dim=1), reduction="batchmean")
    return loss, low + (high - low) * log_probabilities[:, 1:].exp()


def log_odds(scores: np.ndarray) -> np.ndarray:
    """Return the differences of two label words' logits that predict scores ``[N]``, clipped to stay finite."""
    low, high = REGRESSION_RANGE
    places = np.clip((scores - low) / (high - low), 0.01, 0.99)
    return np.array([math.log(place / (1 - place)) for place in places])


def score(task: Task, averaged: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score predictions.

    Args:
        task: Names the metrics.
        averaged: Logits ``[X, C]``, where a single logit f counts as −f and f; or scores ``[X, 1]``.
        labels: Class ids or scores, ``[X]``.
    """
    predicted = averaged[:, 0] if task.regression else predicted_classes(averaged)
    return compute_metrics(task, predicted, labels)
