"""Padding: transformers' warnings about it, and batches without it for models whose logits depend on it."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class _QUIET:
    """The method of transformers that is replaced while any thread is in `without_padding_warnings`."""

    name = "warn_if_padding_and_no_attention_mask"
    lock = threading.Lock()
    users = 0
    kept: Any = None


@contextlib.contextmanager
def without_padding_warnings() -> Iterator[None]:
    """Keep transformers from searching batches without an attention mask for padding tokens, to warn about them.

    Here a batch without a mask has no padding, whatever its tokens. The search depends on the data, which `torch.vmap`
    does not allow: DeBERTa, SqueezeBERT, RoFormer and others could not be differentiated.
    """
    with _QUIET.lock:
        if not _QUIET.users:
            _QUIET.kept = getattr(PreTrainedModel, _QUIET.name)
            setattr(PreTrainedModel, _QUIET.name, lambda self, input_ids, attention_mask: None)
        _QUIET.users += 1
    try:
        yield
    finally:
        with _QUIET.lock:
            _QUIET.users -= 1
            if not _QUIET.users:
                setattr(PreTrainedModel, _QUIET.name, _QUIET.kept)


def in_equal_lengths(
    call: Callable[..., Tensor],
    input_ids: Tensor,
    mask_pos: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor | None = None,
) -> Tensor:
    """Cut a padded batch into batches of prompts of equal length, without padding, and join their answers.

    Args:
        call: The function to call with each batch's tensors, by name; it returns ``[b, …]``.
        input_ids: Tokens, int64 ``[B, L]``, padded on either side.
        mask_pos: The position that predicts, int64 ``[B]``.
        attention_mask: 1 for tokens, 0 for padding, ``[B, L]``.
        token_type_ids: Segments, int64 ``[B, L]``; None for an architecture without segments.

    Returns:
        The answer of `call` for each prompt, ``[B, …]``.

    Examples:
        >>> ids, real = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> in_equal_lengths(lambda input_ids, mask_pos: input_ids.sum(dim=1), ids, torch.tensor([1, 1]), real)
        tensor([18, 17])
    """
    real = attention_mask.bool()
    lengths = real.sum(dim=1)
    order, answers = [], []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        part: dict[str, Any] = {"mask_pos": mask_pos[rows] - real[rows].int().argmax(dim=1)}
        for name, tensor in (("input_ids", input_ids), ("token_type_ids", token_type_ids)):
            if tensor is not None:
                part[name] = tensor[rows][real[rows]].view(len(rows), length)
        order.append(rows)
        answers.append(call(**part))
    return torch.cat(answers)[torch.cat(order).argsort()]
