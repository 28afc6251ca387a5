"""Examples become token features; a data set holds them, a collator makes padded batches of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from lmntk.data.examples import Example
from lmntk.data.tasks import Task
from lmntk.prompts.demonstrations import Demonstrations, DemonstrationSampler
from lmntk.prompts.render import Limits, render
from lmntk.prompts.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MANY_PROMPTS = 2000
"""From this number on a progress bar is worth its line: fewer are there in a second or two."""

MUCH_UNKNOWN = 0.05
"""The share of unknown tokens from which on a run tells of them."""


@dataclass(frozen=True)
class Feature:
    """One prompt as the model takes it.

    Attributes:
        input_ids: `[L]` token ids.
        token_type_ids: `[L]` segment ids.
        mask_position: Where the logits are read.
        label: Class id, or a score where the task is a regression.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    mask_position: int
    label: int | float


@dataclass(frozen=True)
class PromptBuilder:
    """Makes the prompts of a split.

    Attributes:
        mode: The split: ``"train"``, ``"dev"`` or ``"test"``; of a second test set ``"test:<its task>"``.
        task: Gives the order of the labels.
        examples: In file order.
        templates: At least one; each is a sample of its own.
        tokenizer: The model's.
        limits: Where to cut.
        label_word_ids: ``[C]``, for templates with label words.
        demonstrator: Draws the demonstrations of each prompt; None where there are none.
    """

    mode: str
    task: Task
    examples: Sequence[Example]
    templates: Sequence[Template]
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    label_word_ids: Sequence[int] = ()
    demonstrator: DemonstrationSampler | None = None

    def feature(self, index: int, sample: int, generator: np.random.RandomState | None = None) -> tuple[Feature, bool]:
        """Render an example with the template of a sample, demonstrations drawn anew; and tell whether it was cut.

        Args:
            index: Which example.
            sample: Which sample of it.
            generator: Draws the demonstrations; by default the demonstrator's own.

        Raises:
            UsageError: See `lmntk.prompts.render` and `lmntk.prompts.demonstrations.DemonstrationSampler.draw`.
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
        )
        label = float(example.label) if self.task.regression else self.task.labels.index(example.label)
        feature = Feature(list(prompt.input_ids), list(prompt.segment_ids), prompt.mask_position, label)
        return feature, prompt.full_length > self.limits.max_seq_length


@dataclass
class ResampledDemonstrations(Dataset[Feature]):
    """The prompts of the train split with demonstrations that are new at every visit, as fine-tuning has them.

    A draw depends on the seed, the epoch and the example alone: not on processes, workers and interruptions.

    Attributes:
        renderer: Makes them.
        seed: What the draws start from.
        epoch: Which visit of each prompt it is; the trainer counts.
    """

    renderer: PromptBuilder
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        """Number of templates times number of examples."""
        return len(self.renderer.examples) * len(self.renderer.templates)

    def __getitem__(self, index: int) -> Feature:
        """The feature at `index`, sample by sample; another one each time."""
        sample, example = divmod(index, len(self.renderer.examples))
        return self.renderer.feature(example, sample, np.random.RandomState([self.seed, self.epoch, index]))[0]


@dataclass(frozen=True, eq=False)
class FeatureDataset(Dataset[Feature]):
    """All prompts of a split, sample by sample: every example with the first template, then with the next.

    Attributes:
        mode: The split, see `PromptBuilder`.
        task: What the labels mean.
        features: One per sample and example.
        num_sample: How often each example is there; its logits are to be averaged over them.
    """

    mode: str
    task: Task
    features: list[Feature]
    num_sample: int = 1

    @classmethod
    def build(cls, renderer: PromptBuilder, draws: int = 1, sampler_seed: int | None = None) -> FeatureDataset:
        """Render every example with every template.

        Args:
            renderer: Makes the prompts. Those cut at `max_seq_length` are counted in one warning.
            draws: How many draws of demonstrations an example gets with each template.
            sampler_seed: Prompts draw their demonstrations in the order of the training sampler with this seed; None:
                in that of the file.

        Raises:
            UsageError: See `PromptBuilder.feature`.
        """
        mode, task, limits = renderer.mode, renderer.task, renderer.limits
        samples = draws * len(renderer.templates)
        places = [(sample, index) for sample in range(samples) for index in range(len(renderer.examples))]
        work = places
        if sampler_seed is not None:
            work = [places[number] for number in sampled_order(len(places), sampler_seed)]
        bar = tqdm(work, desc=f"{task.name} {mode}", unit="prompt", disable=len(work) < MANY_PROMPTS)
        rendered = {(sample, index): renderer.feature(index, sample) for sample, index in bar}
        found = [rendered[place] for place in places]
        cut = sum(was_cut for _, was_cut in found)
        if cut:
            limit = limits.max_seq_length
            logger.warning("%d of %d prompts of %s were cut to --max_seq_length %d tokens", cut, len(work), mode, limit)
        features = [feature for feature, _ in found]
        _warn_of_unknown_tokens(features, renderer.tokenizer, mode)
        return cls(mode, task, features, samples)

    @classmethod
    def labelled(cls, mode: str, task: Task, examples: Sequence[Example], samples: int) -> FeatureDataset:
        """Make features of which only the labels are known: no tokenizer is asked; none where there are no examples.

        Args:
            mode: The split, see `PromptBuilder`.
            task: What the labels mean.
            examples: In file order.
            samples: How often each example is there.
        """
        labels = [task.labels.index(example.label) for example in examples]
        return cls(mode, task, [Feature([], [], 0, label) for label in labels] * samples, samples)

    def __len__(self) -> int:
        """Number of samples times number of examples."""
        return len(self.features)

    def __getitem__(self, index: int) -> Feature:
        """The feature at `index`."""
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
        """One label per feature; those of the examples are the first `num_examples`."""
        return [feature.label for feature in self.features]


def _warn_of_unknown_tokens(features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase, mode: str) -> None:
    """Tell where much of the texts is unknown to the tokenizer; GPT-2's unknown token is what begins a text."""
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
    """Return the order in which the stock trainer's sampler hands out so many prompts in its first epoch."""
    order: list[int] = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


@dataclass(frozen=True)
class Collator:
    """Makes a batch of features, padded on the right to the longest of them.

    Attributes:
        pad_token_id: The tokenizer's.
        segments: Whether the model takes token type ids (BERT does).
    """

    pad_token_id: int
    segments: bool

    def __call__(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """Batch features.

        Returns:
            ``input_ids`` `[B, L]`; ``attention_mask`` `[B, L]`, left out when nothing is padded, which spares the
            model its masking; ``token_type_ids`` `[B, L]` if `segments`; ``mask_pos`` `[B]`; ``labels`` `[B]`. All
            int64, but labels float32 where they are scores.
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
    """The prompts of a split as the kernel engines take them, padded where lengths differ.

    Args:
        dataset: The prompts.
        collator: Makes batches of them.
        device: Where the model computes.
        equal_lengths: Whether the model sees its padding, so that prompts of one length only may share a batch.
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
        """Return the prompts at `indices` as the model takes them, without their labels."""
        batch = self._collator([self._features[index] for index in indices])
        return {name: tensor.to(self._device) for name, tensor in batch.items() if name != "labels"}


def _pad(rows: Sequence[list[int]], length: int, value: int) -> torch.Tensor:
    """`[B, length]` int64, each row followed by `value`."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
