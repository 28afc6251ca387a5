"""The logits of a model as it is, on every prompt of a split."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmntk import distributed
from lmntk.kernels.batching import length_buckets
from lmntk.kernels.tuning import DEFAULT_TUNING
from lmntk.models.classifier import PromptClassifier
from lmntk.prompts.features import FeatureExamples


def untrained_logits(model: PromptClassifier, examples: FeatureExamples) -> Tensor:
    """Return the logits of a model, ``[X, C]``, in the model's own dtype, on the CPU.

    Args:
        model: It is in evaluation mode.
        examples: The X prompts.
    """
    return of_batches(lambda batch: model(**batch), examples)


def of_batches(answer: Callable[[dict[str, Any]], Tensor], examples: FeatureExamples) -> Tensor:
    """Return a function's answer for every prompt, ``[X, …]``, on the CPU, computed without gradients.

    Batches have prompts of nearly equal length, whatever the order of the split, since padding is work. Processes take
    them in turn, and all get the whole.

    Args:
        answer: Takes a batch of B prompts and returns ``[B, …]``.
        examples: The X prompts.
    """
    order = sorted(range(len(examples)), key=lambda index: examples.shapes[index])
    batches = length_buckets(examples, order, DEFAULT_TUNING.small_model_batch_tokens)
    own: dict[int, Tensor] = {}
    with torch.no_grad():
        for number in range(distributed.rank(), len(batches), distributed.world_size()):
            own[number] = answer(examples.batch(batches[number])).cpu()
    found = {number: answers for share in distributed.gather(own) for number, answers in share.items()}
    of_order = torch.cat([found[number] for number in range(len(batches))])
    answers = torch.empty_like(of_order)
    answers[torch.tensor(order)] = of_order
    return answers
