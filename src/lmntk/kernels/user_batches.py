"""Users' batches as engines take them: pytrees of tensors whose first axis runs over the examples."""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from lmntk.kernels.batching import Batch, BatchedExamples


def read_batches(name: str, batches: Iterable[Any], module: nn.Module | None, device: torch.device) -> BatchedExamples:
    """Return the examples in some batches.

    Args:
        name: The argument's name, for errors.
        batches: Tensors, mappings, tuples and lists of them.
        module: The module that is called with them; labels are left out. None for a function, which gets batches as
            they are.
        device: The device of the parameters.

    Raises:
        ValueError: `batches` is not a list of batches, or a batch is not what a model can be called with.
    """
    if isinstance(batches, Tensor | Mapping):
        raise ValueError(f"`{name}` is one batch, but a list of batches is expected: `[batch]`")
    if isinstance(batches, Dataset):
        raise ValueError(f"`{name}` is a data set of single examples: put a `DataLoader` around it")
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise ValueError(f"`{name}` is a {type(batches).__name__}, but a list of batches is expected")
    found = []
    for number, raw in enumerate(batches):
        where = f"batch {number} of `{name}`"
        batch = _plain(raw, where)
        BatchedExamples([batch])  # labels too must agree on the number of examples
        if module is not None:
            batch = _as_arguments(batch, module, where)
        for leaf in tree_leaves(batch):
            if leaf.device != device:
                raise ValueError(f"{where} is on {leaf.device}, but the parameters are on {device}: move it there")
        found.append(batch)
    return BatchedExamples(found)


def _plain(value: Any, where: str) -> Batch:
    """Make dicts of mappings and check that everything else is tensors, ``[B, ...]``."""
    if isinstance(value, Tensor):
        if value.dim() == 0:
            raise ValueError(f"{where} holds a tensor without axes, but its first axis must run over the examples")
        return value
    if isinstance(value, Mapping):
        given = {key: entry for key, entry in value.items() if entry is not None}
        if not given:
            raise ValueError(f"{where} is an empty {type(value).__name__}")
        return {key: _plain(entry, f"{where}: {key!r}") for key, entry in given.items()}
    if isinstance(value, tuple | list) and value:
        if all(isinstance(entry, int | float | str) for entry in _leaves_of(value)):
            raise ValueError(f'{where} holds lists of numbers or words, not tensors: `return_tensors="pt"` for tokens')
        entries = [_plain(entry, where) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    raise ValueError(
        f"{where} holds a {type(value).__name__}, but a batch is a tensor, a mapping of names to tensors, or a "
        "tuple or list of them"
    )


def _leaves_of(value: Any) -> list[Any]:
    """The entries of lists in lists."""
    return [leaf for entry in value for leaf in _leaves_of(entry)] if isinstance(value, tuple | list) else [value]


def _as_arguments(batch: Batch, module: nn.Module, where: str) -> Batch:
    """Return the part of a batch that a module is called with: a dict by keyword, a tuple by position, or a tensor.

    A data loader's batch is a list, or a pair of inputs and labels. Labels are left out if they can be nothing else:
    the inputs are a mapping or a list of their own, or the module takes no further argument.
    """
    if not isinstance(batch, tuple | list):
        return batch
    least, most = _positional(module)
    if len(batch) == 2 and isinstance(batch[0], dict | tuple | list) and least < 2:
        return _as_arguments(batch[0], module, where)
    if len(batch) == 1 and isinstance(batch[0], dict):
        return batch[0]
    if len(batch) == most + 1 and most:
        batch = batch[:-1]
    elif isinstance(batch, list) and len(batch) > 1 and not least == most == len(batch):
        raise ValueError(
            f"{where} is a list of {len(batch)} tensors, of which the last may be labels or an argument of the model: "
            "give a tuple for all by position, a dict for arguments by name, or leave labels out"
        )
    return tuple(batch)


def _positional(module: nn.Module) -> tuple[int, float]:
    """Return how many arguments a module needs, and how many it can take, by position."""
    least, most = 0, 0.0
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            most = math.inf
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            least += parameter.default is parameter.empty
    return least, most
