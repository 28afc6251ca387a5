"""What a run is made of: its task, prompts and examples, and the model that it asks or the kernels that it loads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lmntk.config.prompt_settings import PromptSettings
from lmntk.data.tasks import Task
from lmntk.models.classifier import PromptClassifier
from lmntk.models.lora_files import LoraSettings
from lmntk.prompts.features import Collator, FeatureDataset, ResampledDemonstrations


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """The inputs of a run apart from its model.

    Attributes:
        task: The row of the table of tasks.
        prompts: The templates, label words and limits.
        data_dir: The folder with the examples.
        data_files: The file of each split that was read.
        datasets: The features of each split, train first; ``"test:mnli-mm"`` is the second test set of mnli.
        tokenizer: The model's; None where kernels are loaded and no tokenizer is at hand.
        label_words: The tokens of the label words, in the order of the logits; none without words or tokenizer.
        lora: The adapters on the model; None without adapters.
        segments: Whether a BERT model is told which sentence a token belongs to; True for all other models, None where
            the kernels are loaded and the model is not there to look at.
    """

    task: Task
    prompts: PromptSettings
    data_dir: str
    data_files: Mapping[str, Path]
    datasets: Mapping[str, FeatureDataset]
    tokenizer: PreTrainedTokenizerBase | None = None
    label_words: Sequence[int] = ()
    lora: LoraSettings | None = None
    segments: bool | None = True

    def known_limits(self) -> dict[str, Any]:
        """Return the limits at which prompts are cut, as far as the settings and the model fix them."""
        return {name: value for name, value in vars(self.prompts.limits).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class LoadedKernels(RunInputs):
    """A run that predicts from kernels in files and opens no model.

    Attributes:
        missing: What the kernels' descriptions cannot be compared with, a clause each.
        length_is_known: Whether ``prompts.limits.max_seq_length`` is final: most settings leave it to the model.
    """

    missing: Sequence[str] = ()
    length_is_known: bool = True

    def known_limits(self) -> dict[str, Any]:
        """Return the limits at which prompts are cut, as far as the settings fix them."""
        limits = super().known_limits()
        if not self.length_is_known:
            del limits["max_seq_length"]
        return limits


@dataclass(frozen=True, kw_only=True)
class Experiment(RunInputs):
    """A run that asks a model.

    Attributes:
        model: The model.
        collator: Makes batches of features for it.
        base_name: The checkpoint that the model, adapters aside, was loaded from.
        resampled: The train split with demonstrations that are drawn anew at every visit; None without demonstrations.
    """

    model: PromptClassifier
    collator: Collator
    base_name: str
    resampled: ResampledDemonstrations | None = None


@dataclass(frozen=True)
class Evaluation:
    """How well a split was predicted.

    Attributes:
        metrics: The task's metrics and the loss, by the names that result files have, ``"eval_acc"``.
        logits: Logits ``[X, C]`` or scores ``[X, 1]``, each a mean over the samples of an example.
        labels: Class ids or scores, ``[X]``.
    """

    metrics: Mapping[str, float]
    logits: np.ndarray
    labels: np.ndarray
