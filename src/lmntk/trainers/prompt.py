"""The trainer of a prompt model as it is: losses, logits and metrics of its label words."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy

from lmntk import distributed
from lmntk.features import FeatureDataset
from lmntk.metrics import compute_metrics
from lmntk.solver_problem import two_logits
from lmntk.tasks import Task

LOGITS_TOGETHER = 32


class PromptTrainer(transformers.Trainer):
    """A stock `Trainer` whose model answers prompts with label-word logits.

    Args:
        **kwargs: What `transformers.Trainer` takes.
    """

    def __init__(self, **kwargs: Any) -> None:
        # One process drives one device: several need torchrun. Pinning warns where there is no GPU.
        args: transformers.TrainingArguments = kwargs["args"]
        args._n_gpu = min(args.n_gpu, 1)
        args.dataloader_pin_memory &= args.device.type == "cuda"
        # Every example counts in an evaluation, and with nothing to train there is nothing to evaluate meanwhile.
        args.dataloader_drop_last = False
        args.eval_strategy = IntervalStrategy.NO
        super().__init__(**kwargs)
        # The model has no `labels` argument from whose name the stock trainer would guess this.
        self.label_names = ["labels"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the cross entropy of the label words, and the logits ``[B, C]`` if wanted."""
        labels = inputs["labels"]
        logits = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
        # A single logit is f₁ − f₀, so that f₀ = 0 stands beside it.
        both = torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits
        loss = F.cross_entropy(both, labels)
        return (loss, {"logits": logits}) if return_outputs else loss

    def evaluate(  # type: ignore[override]
        self, eval_dataset: FeatureDataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Predict a split with the model as it is.

        Returns:
            The task's metrics and the loss, each name with `metric_key_prefix` before it.
        """
        output = self.predict(eval_dataset, ignore_keys, metric_key_prefix)
        labels = np.asarray(eval_dataset.labels[: eval_dataset.num_examples])
        scores = score(eval_dataset.task, np.asarray(output.predictions), labels)
        loss = (output.metrics or {})[f"{metric_key_prefix}_loss"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics[f"{metric_key_prefix}_loss"] = float(loss)
        self.log(dict(metrics))
        return metrics

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


def score(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Average logits over each example's samples and score the classes they say.

    Args:
        task: Says which metrics.
        logits: ``[samples · X, C]``, sample by sample; one logit stands for its negative and itself.
        labels: Class ids, ``[X]``.
    """
    averaged = two_logits(logits.reshape(-1, len(labels), logits.shape[1]).mean(axis=0))
    return compute_metrics(task, averaged.argmax(axis=1), labels)
