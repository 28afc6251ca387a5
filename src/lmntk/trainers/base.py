"""What all trainers share: losses, logits and metrics of a model that is asked at one position."""

import logging
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy

from lmntk import distributed
from lmntk.data.metrics import compute_metrics, mean_over_samples
from lmntk.data.tasks import REGRESSION_RANGE, Task
from lmntk.errors import UsageError
from lmntk.experiment.build import Experiment
from lmntk.prompts.features import FeatureDataset
from lmntk.solvers.problem import two_logits

logger = logging.getLogger(__name__)

LOGITS_TOGETHER = 32
TOO_LARGE = (
    "numbers grow too large on the way through the model; take --kernel_dtype float64, or another --model_name_or_path"
)


class FewShotTrainer(transformers.Trainer):
    """A stock `Trainer` whose model answers with logits of classes, or with scores.

    Args:
        run: What was built from the flags.
        model: The model.
        args: The flags of the run.
        l2_loss: ``--l2_loss``: squared error in place of cross entropy.
        **kwargs: What else `transformers.Trainer` takes.

    Attributes:
        averaged: What was predicted of each split evaluated last: logits or scores, a mean over each example's samples.
        labels: What it was scored with: class ids or scores, ``[X]``.
    """

    def __init__(
        self,
        run: Experiment,
        model: nn.Module,
        args: transformers.TrainingArguments,
        l2_loss: bool = False,
        **kwargs: Any,
    ) -> None:
        # One process drives one device: several need torchrun. Pinning warns where there is no GPU.
        args._n_gpu = min(args.n_gpu, 1)
        args.dataloader_pin_memory &= args.device.type == "cuda"
        # Whatever is evaluated is scored, all of it together.
        args.prediction_loss_only, args.eval_do_concat_batches = False, True
        # The stock trainer would look for a loss within the model: this one has its own.
        self._smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0
        super().__init__(model=model, args=args, data_collator=run.collator, **kwargs)
        args.label_smoothing_factor = self._smoothing
        # The model has no `labels` argument from whose name the stock trainer would guess this.
        self.label_names = ["labels"]
        self.averaged: dict[str, np.ndarray] = {}
        self.labels: dict[str, np.ndarray] = {}
        self._task = run.task
        self._l2_loss = l2_loss

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
            distributed.on_all_ranks(lambda: _check_before_training(logits, self.args))
        loss = self._loss(logits, inputs["labels"], self._smoothing if model.training else 0.0)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        if self._task.regression:
            return regression_loss(logits, labels)[0]
        return class_loss(logits, labels, self._l2_loss, smoothing)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Hand out every example: ``--dataloader_drop_last`` is about training."""
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_test_dataloader(test_dataset)
        finally:
            self.args.dataloader_drop_last = dropping

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: FeatureDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Predict a split with the model as it is.

        Returns:
            The task's metrics and the loss, each name with `metric_key_prefix` before it.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(dataset, FeatureDataset)
        output = self.predict(dataset, ignore_keys, metric_key_prefix)
        # Not the loss of `output`: there the examples that fill the last batch of several processes up count twice.
        logits, labels = torch.from_numpy(np.asarray(output.predictions)), torch.tensor(dataset.labels)
        predicted = regression_loss(logits, labels)[1] if self._task.regression else logits
        self.averaged[dataset.mode] = averaged = mean_over_samples(predicted.numpy(), dataset.num_examples)
        broken = np.flatnonzero(~np.isfinite(averaged).all(axis=1))
        if broken.size:
            self._tell_of_broken_logits(broken, len(averaged), dataset.mode)
        self.labels[dataset.mode] = own = labels[: dataset.num_examples].numpy()
        scores = score(dataset.task, averaged, own)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics[f"{metric_key_prefix}_loss"] = self._loss(logits, labels).item()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _tell_of_broken_logits(self, broken: np.ndarray, examples: int, split: str) -> None:
        """Say which examples, counted from 0, have logits that are NaN or infinite."""
        logger.warning(
            "%d of %d examples of %s have logits that are no numbers: training has diverged, and what is scored "
            "means nothing; lower --learning_rate",
            *(len(broken), examples, split),
        )

    def finish(self) -> None:
        """Do what is left when all results are written: nothing, here."""

    def logits(self, dataset: FeatureDataset) -> Tensor:
        """Return the model's logits on every prompt of a split, ``[X, C]``, in the model's own dtype.

        Not by `predict`, which ``--bf16_full_eval`` and its like let change the model. Processes take batches in turn.
        """
        model, collator = self.model, self.data_collator
        assert model is not None
        starts = range(0, len(dataset), LOGITS_TOGETHER)
        own: dict[int, Tensor] = {}
        with torch.no_grad():
            for start in starts[distributed.rank() :: distributed.world_size()]:
                batch = collator(dataset.features[start : start + LOGITS_TOGETHER])  # type: ignore[arg-type]
                moved = {name: tensor.to(self.args.device) for name, tensor in batch.items() if name != "labels"}
                own[start] = model(**moved).cpu()
        found = {start: logits for share in distributed.gather(own) for start, logits in share.items()}
        return torch.cat([found[start] for start in starts])


class ZeroShotTrainer(FewShotTrainer):
    """A trainer that trains nothing: it predicts with the model as it is."""

    def __init__(self, run: Experiment, model: nn.Module, args: transformers.TrainingArguments, **kwargs: Any) -> None:
        # With nothing to train there is nothing to evaluate meanwhile.
        args.eval_strategy = IntervalStrategy.NO
        super().__init__(run, model, args, **kwargs)

    def _tell_of_broken_logits(self, broken: np.ndarray, examples: int, split: str) -> None:
        def refuse() -> None:
            raise UsageError(
                f"{len(broken)} of {examples} examples of {split} have logits that are no numbers, first example "
                f"{broken[0]} (counted from 0), though all weights are finite: {_too_large(self.args)}"
            )

        distributed.on_all_ranks(refuse)


def _check_before_training(logits: Tensor, args: transformers.TrainingArguments) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise UsageError(
            "the model's logits of train are no numbers before the first step, though all weights are finite: "
            f"{_too_large(args)}"
        )


def _too_large(args: transformers.TrainingArguments) -> str:
    """Why logits are no numbers, and the way out."""
    narrow = [flag for flag in ("fp16", "fp16_full_eval", "bf16", "bf16_full_eval") if getattr(args, flag)]
    return f"numbers grow too large on the way through the model; leave --{narrow[0]} out" if narrow else TOO_LARGE


def class_loss(logits: Tensor, labels: Tensor, squared: bool = False, smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy, or the squared error from one-hot targets, as a mean over the batch.

    Args:
        logits: ``[B, C]``; a single logit is f₁ − f₀, and its squared error is that from −1 and +1.
        labels: Class ids, int64 ``[B]``.
        squared: Take the squared error, a mean over examples and logits.
        smoothing: How much of the target cross entropy spreads over all classes.
    """
    if squared:
        if logits.shape[1] == 1:
            return F.mse_loss(logits[:, 0], (labels * 2 - 1).to(logits.dtype))
        return F.mse_loss(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype))
    # A single logit is f₁ − f₀, so that f₀ = 0 stands beside it.
    both = torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits
    return F.cross_entropy(both, labels, label_smoothing=smoothing)


def regression_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss, a mean over the batch, and the predicted scores ``[B, 1]``.

    The label words of two logits stand for the ends of the scale: the score is where the probability of the upper one
    lies between them, and the loss the Kullback-Leibler divergence from the label's own place (Gao et al. 2021, section
    4.1). A single logit is the score itself, its loss the squared error.

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
    """Return the difference of two label words' logits that predicts given scores ``[N]``; the ends kept finite."""
    low, high = REGRESSION_RANGE
    places = np.clip((scores - low) / (high - low), 0.01, 0.99)
    return np.array([math.log(place / (1 - place)) for place in places])


def score(task: Task, averaged: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score predictions.

    Args:
        task: Says which metrics.
        averaged: Logits ``[X, C]``, one logit standing for its negative and itself; or scores ``[X, 1]``.
        labels: Class ids or scores, ``[X]``.
    """
    predicted = averaged[:, 0] if task.regression else two_logits(averaged).argmax(axis=1)
    return compute_metrics(task, predicted, labels)
