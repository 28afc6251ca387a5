"""A model on disk: what transformers reads again, with adapters and a head of our own beside it."""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lmntk.errors import UsageError
from lmntk.models.classifier import PromptClassifier
from lmntk.models.lora import is_adapter, load_adapters, read_adapters, save_adapters
from lmntk.models.lora_files import CONFIG_FILE
from lmntk.models.lora_files import WEIGHTS_FILE as ADAPTERS_FILE
from lmntk.models.sound_weights import check_finite
from lmntk.storage.atomic import SAVING

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
HEAD_FILE = "head.safetensors"


def has_adapters(model: PromptClassifier) -> bool:
    """Whether a model has LoRA adapters."""
    return any(is_adapter(name) for name, _ in model.named_parameters())


def save_checkpoint(model: PromptClassifier, folder: Path, base_name: str) -> None:
    """Write a model into a folder, from where ``--model_name_or_path`` takes it.

    Without adapters that is a checkpoint of transformers, its decoder untied. With adapters it is these, as peft writes
    them, and the head. A head that is no part of the model of transformers lies in a file of its own.

    Args:
        model: The model.
        folder: Where to; made where missing.
        base_name: The model that adapters stand on.

    Raises:
        UsageError: The file system refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # First beside what is there: a disk that is full leaves the old files, whole.
    fresh = Path(tempfile.mkdtemp(prefix=SAVING, dir=folder))
    try:
        if has_adapters(model):
            save_adapters(model.lm, fresh, base_name)
        else:
            with without_progress_bars():
                # Under the names of this version of transformers, in one file: so they are found again.
                model.lm.save_pretrained(fresh, save_original_format=False, max_shard_size="1000GB")
        extras = _extras(model)
        if extras:
            save_file({name: tensor.contiguous() for name, tensor in extras.items()}, fresh / HEAD_FILE)
        _put_in_place(fresh, folder, has_adapters(model))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot write the model into {folder} ({error}): make room there") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put_in_place(fresh: Path, folder: Path, adapters: bool) -> None:
    """Move a model's files to where they belong; killed at any moment this leaves no parts of two models together.

    The weights of the old model go first, and those of the new one come last: in between there is none. Weights beside
    adapters stay, since they may be what these stand on.
    """
    weights = ADAPTERS_FILE if adapters else WEIGHTS_FILE
    others = (HEAD_FILE,) if adapters else (CONFIG_FILE, ADAPTERS_FILE, HEAD_FILE)
    for name in (weights, *others):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(fresh.iterdir(), key=lambda path: path.name == weights):
        path.replace(folder / path.name)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer beside a model.

    Raises:
        UsageError: The file system refuses.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # what the tokenizers library raises over a full disk is no OSError
        raise UsageError(f"cannot write the tokenizer into {folder} ({error}): make room there") from error


def restore_checkpoint(model: PromptClassifier, folder: Path, flag: str) -> None:
    """Give a model the weights that `save_checkpoint` has written of it.

    Args:
        model: The model, as it was built for training.
        folder: From where.
        flag: What messages name.

    Raises:
        UsageError: The folder holds no weights, or those of another model.
    """
    if has_adapters(model) != (folder / CONFIG_FILE).is_file():
        holds, way_out = ("no ", "leave --apply_lora out") if has_adapters(model) else ("", "add --apply_lora")
        raise UsageError(f"{flag} {folder} holds {holds}LoRA adapters: {way_out}, or name another folder")
    weights = None if has_adapters(model) else _read_for(model.lm, folder / WEIGHTS_FILE, flag)
    if _extras(model) and not (folder / HEAD_FILE).is_file():
        raise UsageError(f"{flag} {folder} holds no {HEAD_FILE}, the head of this model: name another folder")
    restore_extras(model, folder, flag)
    if weights is not None:
        model.lm.load_state_dict(weights)


def restore_extras(model: PromptClassifier, folder: Path, flag: str = "--model_name_or_path") -> None:
    """Load adapters and a head, where the folder holds them, into a model that has room for them.

    Args:
        model: The model; where something does not fit, nothing of it is changed.
        folder: From where.
        flag: What messages name.

    Raises:
        UsageError: They are those of another model.
    """
    adapted = has_adapters(model) and (folder / CONFIG_FILE).is_file()
    adapters = read_adapters(model.lm, folder, flag) if adapted else None
    path, extras = folder / HEAD_FILE, _extras(model)
    brings_head = any(f"lm.{name}" in extras for name in adapters or ())
    if adapted and not path.is_file() and not brings_head:
        logger.warning("%s holds adapters but no %s: the head is that of the model they stand on", folder, HEAD_FILE)
    if path.is_file() and extras:
        stored = _read(path, flag)
        if {name: tensor.shape for name, tensor in stored.items()} != {n: t.shape for n, t in extras.items()}:
            raise UsageError(
                f"{flag}: {path} holds the head of another model: name another folder, or give the --few_shot_type and "
                "--from_linearhead that it was made with"
            )
        model.load_state_dict(stored, strict=False)
    if adapters is not None:
        load_adapters(model.lm, adapters)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep back transformers' bars of weights that are read and written."""
    were_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep back transformers' own report on missing weights too: it calls a tied decoder missing."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _extras(model: PromptClassifier) -> dict[str, Tensor]:
    """What of a model is in no checkpoint of transformers: a head of our own; with adapters, every head."""
    all_heads = has_adapters(model)
    state = model.state_dict()
    # A pooler may be as new as the head behind it.
    of_head = {
        name
        for name in state
        if (not name.startswith(model.base_prefix) or ".pooler." in name) and not is_adapter(name)
    }
    return {name: state[name] for name in of_head if all_heads or not name.startswith("lm.")}


def _read_for(lm: nn.Module, path: Path, flag: str) -> dict[str, Tensor]:
    stored = _read(path, flag)
    wanted = lm.state_dict()
    differing = [name for name, tensor in stored.items() if name not in wanted or wanted[name].shape != tensor.shape]
    if differing or wanted.keys() != stored.keys():
        culprit = differing[0] if differing else min(wanted.keys() - stored.keys())
        raise UsageError(
            f"{flag}: {path} is a checkpoint of another model or architecture than --model_name_or_path "
            f"({culprit} does not fit): name a checkpoint of this one, or leave the flag out"
        )
    return stored


def _read(path: Path, flag: str) -> dict[str, Tensor]:
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{flag}: {path} cannot be read as weights ({error}): name another folder") from error
    check_finite(stored, f"{flag}: {path}")
    return stored
