"""Turn examples into token features, a data set of them, and padded batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from lmntk.data.examples import Example
from lmntk.data.tasks import Task
from lmntk.prompts.demonstrations import Demonstrations, DemonstrationSampler
from lmntk.prompts.render import Limits, render
from lmntk.prompts.templates import Part, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MANY_PROMPTS = 2000
"""The number of prompts from which a progress bar is shown: fewer take a second or two."""

MUCH_UNKNOWN = 0.05
"""The share of unknown tokens from which a warning is logged."""


@dataclass(frozen=True)
class Feature:
    """One prompt as the model takes it.

    Attributes:
        input_ids: Token ids, `[L]`.
        token_type_ids: Segment ids, `[L]`.
        mask_position: The index of the token whose logits are read.
        label: The class id, or the score of a regression task.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    mask_position: int
    label: int | float


@dataclass(frozen=True)
class PromptBuilder:
    """Makes the prompts of a split.

    Attributes:
        mode: The split: ``"train"``, ``"dev"`` or ``"test"``; for a second test set ``"test:<its task>"``.
        task: The task, which gives the order of the labels.
        examples: The examples, in file order.
        templates: At least one template; each makes its own sample of every example.
        tokenizer: The model's tokenizer.
        limits: Where sentences and prompts are cut.
        label_word_ids: Token ids of the label words, `[C]`, for templates with label words.
        demonstrator: What draws the demonstrations of each prompt; None for prompts without demonstrations.
    """

    mode: str
    task: Task
    examples: Sequence[Example]
    templates: Sequence[Template]
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    label_word_ids: Sequence[int] = ()
    demonstrator: DemonstrationSampler | None = None
    _own_parts: dict[Part, Sequence[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def feature(self, index: int, sample: int, generator: np.random.RandomState | None = None) -> tuple[Feature, bool]:
        """Render an example with the template of a sample and newly drawn demonstrations.

        Args:
            index: The example's index.
            sample: The sample's number.
            generator: The generator of the demonstrations; None takes the demonstrator's own.

        Returns:
            The feature, and whether the prompt was cut.

        Raises:
            TemplateError: See `lmntk.prompts.render`.
            DataError: See `lmntk.prompts.render`.
        """
        example = self.examples[index]
        shown = Demonstrations((), ()) if self.demonstrator is None else self.demonstrator.draw(index, generator)
        prompt = render(
            self.templates[sample % len(self.templates)],
            [*example.texts, *shown.texts],
            self.tokenizer,
            self.limits,
            self.label_word_ids,
            shown.context_labels,
            name=f"example {index + 1} of {self.mode}",
            own_parts=self._own_parts,
        )
        label = float(example.label) if self.task.regression else self.task.labels.index(example.label)
        feature = Feature(list(prompt.input_ids), list(prompt.segment_ids), prompt.mask_position, label)
        return feature, prompt.full_length > self.limits.max_seq_length


@dataclass
class ResampledDemonstrations(Dataset[Feature]):
    """The prompts of the train split with new demonstrations at every visit, as fine-tuning has them.

    A draw depends only on the seed, the epoch and the example, not on processes, workers or interruptions.

    Attributes:
        builder: What makes the prompts.
        seed: The seed of the draws.
        epoch: The number of the visit; the trainer counts.
    """

    builder: PromptBuilder
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        """Return the number of templates times the number of examples."""
        return len(self.builder.examples) * len(self.builder.templates)

    def __getitem__(self, index: int) -> Feature:
        """Return the feature at `index`, sample by sample."""
        sample, example = divmod(index, len(self.builder.examples))
        return self.builder.feature(example, sample, np.random.RandomState([self.seed, self.epoch, index]))[0]


@dataclass(frozen=True, eq=False)
class FeatureDataset(Dataset[Feature]):
    """All prompts of a split, sample by sample: every example with the first template, then with the next.

    Attributes:
        mode: The split, see `PromptBuilder`.
        task: The task of the labels.
        features: One feature per sample and example.
        num_sample: Number of samples of each example, over which its logits are averaged.
    """

    mode: str
    task: Task
    features: list[Feature]
    num_sample: int = 1

    @classmethod
    def build(
        cls, builder: PromptBuilder, num_demonstration_samples: int = 1, sampler_seed: int | None = None
    ) -> FeatureDataset:
        """Render every example with every template; one warning counts the prompts that were cut.

        Args:
            builder: What makes the prompts.
            num_demonstration_samples: How many draws of demonstrations an example gets with each template.
            sampler_seed: The seed of the training sampler in whose order demonstrations are drawn; None for file order.

        Raises:
            TemplateError: See `lmntk.prompts.render`.
            DataError: See `lmntk.prompts.render`.
        """
        mode, task, limits = builder.mode, builder.task, builder.limits
        samples = num_demonstration_samples * len(builder.templates)
        places = [(sample, index) for sample in range(samples) for index in range(len(builder.examples))]
        work = places
        if sampler_seed is not None:
            work = [places[number] for number in sampled_order(len(places), sampler_seed)]
        bar = tqdm(work, desc=f"{task.name} {mode}", unit="prompt", disable=len(work) < MANY_PROMPTS)
        rendered = {(sample, index): builder.feature(index, sample) for sample, index in bar}
        found = [rendered[place] for place in places]
        cut = sum(was_cut for _, was_cut in found)
        if cut:
            limit = limits.max_seq_length
            logger.warning("%d of %d prompts of %s were cut to `max_seq_length=%d` tokens", cut, len(work), mode, limit)
        features = [feature for feature, _ in found]
        _warn_of_unknown_tokens(features, builder.tokenizer, mode)
        return cls(mode, task, features, samples)

    @classmethod
    def labelled(cls, mode: str, task: Task, examples: Sequence[Example], samples: int) -> FeatureDataset:
        """Make features that have labels only, without a tokenizer.

        Args:
            mode: The split, see `PromptBuilder`.
            task: The task of the labels.
            examples: The examples, in file order.
            samples: Number of samples of each example.
        """
        labels = [task.labels.index(example.label) for example in examples]
        return cls(mode, task, [Feature([], [], 0, label) for label in labels] * samples, samples)

    def __len__(self) -> int:
        """Return the number of samples times the number of examples."""
        return len(self.features)

    def __getitem__(self, index: int) -> Feature:
        """Return the feature at `index`."""
        return self.features[index]

    @property
    def num_examples(self) -> int:
        """Number of examples of the split."""
        return len(self.features) // self.num_sample

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt."""
        return max((len(feature.input_ids) for feature in self.features), default=0)

    @property
    def labels(self) -> list[int | float]:
        """One label per feature; the first `num_examples` are those of the examples."""
        return [feature.label for feature in self.features]


def _warn_of_unknown_tokens(features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase, mode: str) -> None:
    """Warn if the tokenizer does not know much of the texts; GPT-2's unknown token is the one that begins a text."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id):
        return
    total = sum(len(feature.input_ids) for feature in features)
    count = sum(feature.input_ids.count(unknown) for feature in features)
    if count >= MUCH_UNKNOWN * total:
        logger.warning(
            "%s: %d of %d tokens are %s, which stands for what the tokenizer does not know: does it fit these texts?",
            *(mode, count, total, tokenizer.unk_token),
        )


def sampled_order(number: int, seed: int) -> list[int]:
    """Return the order of `number` prompts in the first epoch of the stock trainer's sampler."""
    order: list[int] = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


@dataclass(frozen=True)
class Collator:
    """Makes a batch of features, padded on the right to the longest one.

    Attributes:
        pad_token_id: The tokenizer's padding token.
        segments: Whether the model takes token type ids (BERT does).
    """

    pad_token_id: int
    segments: bool

    def __call__(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """Batch features.

        Returns:
            ``input_ids`` `[B, L]`; ``attention_mask`` `[B, L]`, left out if nothing is padded, which spares the model
            its masking; ``token_type_ids`` `[B, L]` if `segments`; ``mask_pos`` `[B]`; ``labels`` `[B]`. All are
            int64, except that scores are float32.

        Examples:
            >>> Collator(pad_token_id=1, segments=False)([Feature([5, 6], [0, 0], 1, 0), Feature([7], [0], 0, 1)])[
            ...     "input_ids"
            ... ].tolist()
            [[5, 6], [7, 1]]
        """
        lengths = [len(feature.input_ids) for feature in features]
        longest = max(lengths)
        batch = {"input_ids": _pad([feature.input_ids for feature in features], longest, self.pad_token_id)}
        if min(lengths) < longest:
            batch["attention_mask"] = _pad([[1] * length for length in lengths], longest, 0)
        if self.segments:
            batch["token_type_ids"] = _pad([feature.token_type_ids for feature in features], longest, 0)
        batch["mask_pos"] = torch.tensor([feature.mask_position for feature in features])
        batch["labels"] = torch.tensor([feature.label for feature in features])
        return batch


class FeatureExamples:
    """The prompts of a split as the kernel engines take them.

    Args:
        dataset: The prompts.
        collator: What makes batches of them.
        device: The model's device.
        equal_lengths: Whether padding changes the model's logits, so that a batch has prompts of one length only.
    """

    def __init__(
        self, dataset: FeatureDataset, collator: Collator, device: torch.device, equal_lengths: bool = False
    ) -> None:
        self.padded = True
        self.equal_lengths = equal_lengths
        self.shapes = [len(feature.input_ids) for feature in dataset.features]
        self._features = dataset.features
        self._collator = collator
        self._device = device

    def __len__(self) -> int:
        return len(self._features)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return a batch of the prompts at `indices` on the device, without their labels."""
        batch = self._collator([self._features[index] for index in indices])
        return {name: tensor.to(self._device) for name, tensor in batch.items() if name != "labels"}


def _pad(sequences: Sequence[list[int]], length: int, value: int) -> torch.Tensor:
    """Return int64 `[B, length]`, each sequence filled up with `value`."""
    return torch.tensor([sequence + [value] * (length - len(sequence)) for sequence in sequences])
