"""A model on disk: what transformers reads again, with adapters and a head of our own beside it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from lmntk.errors import UsageError
from lmntk.models.base import PositionModel
from lmntk.models.lora import CONFIG_FILE, is_adapter, load_adapters, save_adapters

WEIGHTS_FILE = "model.safetensors"
HEAD_FILE = "head.safetensors"


def has_adapters(model: PositionModel) -> bool:
    """Whether a model has LoRA adapters."""
    return any(is_adapter(name) for name, _ in model.named_parameters())


def save_checkpoint(model: PositionModel, folder: Path, base_name: str) -> None:
    """Write a model into a folder, from where ``--model_name_or_path`` takes it.

    Without adapters that is a checkpoint of transformers, its decoder untied. With adapters it is these, as peft writes
    them, and the head. A head that is no part of the model of transformers lies in a file of its own.

    Args:
        model: The model.
        folder: Where to; made where missing.
        base_name: The model that adapters stand on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if has_adapters(model):
        save_adapters(model.lm, folder, base_name)
    else:
        with without_progress_bars():
            # Under the names of this version of transformers, in one file: so they are found again.
            model.lm.save_pretrained(folder, save_original_format=False, max_shard_size="1000GB")
    extras = _extras(model)
    if extras:
        save_file({name: tensor.contiguous() for name, tensor in extras.items()}, folder / HEAD_FILE)


def restore_checkpoint(model: PositionModel, folder: Path, flag: str) -> None:
    """Give a model the weights that `save_checkpoint` has written of it.

    Args:
        model: The model, as it was built for training.
        folder: From where.
        flag: What messages name.

    Raises:
        UsageError: The folder holds no weights, or those of another model.
    """
    if not has_adapters(model):
        if (folder / CONFIG_FILE).is_file():
            raise UsageError(f"{flag} {folder} holds LoRA adapters: add --apply_lora, or name another folder")
        _load_into(model.lm, folder / WEIGHTS_FILE, flag)
    elif not (folder / CONFIG_FILE).is_file():
        raise UsageError(f"{flag} {folder} holds no LoRA adapters: leave --apply_lora out, or name another folder")
    restore_extras(model, folder)


def restore_extras(model: PositionModel, folder: Path) -> None:
    """Load adapters and a head, where the folder holds them, into a model that has room for them.

    Raises:
        UsageError: They are those of another model.
    """
    if has_adapters(model) and (folder / CONFIG_FILE).is_file():
        load_adapters(model.lm, folder)
    path, extras = folder / HEAD_FILE, _extras(model)
    if path.is_file() and extras:
        stored = _read(path)
        if {name: tensor.shape for name, tensor in stored.items()} != {n: t.shape for n, t in extras.items()}:
            raise UsageError(f"{path} holds the head of another model: name another folder, or remove the file")
        model.load_state_dict(stored, strict=False)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep back transformers' bars of weights that are read and written."""
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _extras(model: PositionModel) -> dict[str, Tensor]:
    """What of a model is in no checkpoint of transformers: a head of our own; with adapters, every head."""
    all_heads = has_adapters(model)
    state = model.state_dict()
    of_head = {name for name in state if not name.startswith(model.base_prefix) and not is_adapter(name)}
    return {name: state[name] for name in of_head if all_heads or not name.startswith("lm.")}


def _load_into(lm: nn.Module, path: Path, flag: str) -> None:
    stored = _read(path)
    wanted = lm.state_dict()
    differing = [name for name, tensor in stored.items() if name not in wanted or wanted[name].shape != tensor.shape]
    if differing or wanted.keys() != stored.keys():
        culprit = differing[0] if differing else min(wanted.keys() - stored.keys())
        raise UsageError(
            f"{flag}: {path} is a checkpoint of another model or architecture than --model_name_or_path "
            f"({culprit} does not fit): name a checkpoint of this one, or leave the flag out"
        )
    lm.load_state_dict(stored)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read as weights ({error}): name another folder") from error
