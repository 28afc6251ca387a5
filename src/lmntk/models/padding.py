"""What padding does to a model, and how one that sees its padding is asked all the same."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class _QUIET:
    """The method of transformers that is out of use while anybody, in any thread, asks for that."""

    name = "warn_if_padding_and_no_attention_mask"
    lock = threading.Lock()
    users = 0
    kept: Any = None


@contextlib.contextmanager
def without_padding_warnings() -> Iterator[None]:
    """Keep transformers from looking for padding tokens in batches without an attention mask, to warn of them.

    Here a batch without a mask has no padding, whatever its tokens. The look depends on the data, of which `torch.vmap`
    knows nothing: DeBERTa, SqueezeBERT, RoFormer and their like could not be differentiated.
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
    """Cut a padded batch into batches of prompts of equal length, which need no padding.

    Args:
        call: Is asked about each of them: keywords in, ``[b, …]`` out.
        input_ids: Tokens, ``[B, L]``, padded on either side.
        mask_pos: The position that predicts, ``[B]``.
        attention_mask: 1 for tokens, 0 for padding, ``[B, L]``.
        token_type_ids: Segments, ``[B, L]``.

    Returns:
        What `call` says of each prompt, ``[B, …]``.
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
