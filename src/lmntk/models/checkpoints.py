"""Models on disk: a checkpoint that transformers reads, or LoRA adapters, and a file for the head."""

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

from lmntk.errors import FileError, ModelError
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
    """Write a model into a folder that `model_name_or_path` can name.

    A model without adapters becomes a checkpoint of transformers, its decoder untied. Of a model with adapters these
    are written, as peft writes them, and the head. A head that transformers does not have goes into a separate file.

    Args:
        model: The model to write.
        folder: The folder, created if it is missing.
        base_name: The name or folder of the model below the adapters.

    Raises:
        FileError: The files cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A separate folder first: if the disk is full, the old files stay whole.
    fresh = Path(tempfile.mkdtemp(prefix=SAVING, dir=folder))
    try:
        if has_adapters(model):
            save_adapters(model.lm, fresh, base_name)
        else:
            with without_progress_bars():
                # One file, with the names of this version of transformers, is what `restore_checkpoint` reads.
                model.lm.save_pretrained(fresh, save_original_format=False, max_shard_size="1000GB")
        extras = _extras(model)
        if extras:
            save_file({name: tensor.contiguous() for name, tensor in extras.items()}, fresh / HEAD_FILE)
        _put_in_place(fresh, folder, has_adapters(model))
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot write the model into {folder} ({error}): make room there", path=folder) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put_in_place(fresh: Path, folder: Path, adapters: bool) -> None:
    """Move a model's files into their folder, so that the folder never holds parts of two models.

    The old weights are removed first, and the new weights are moved last. A checkpoint beside adapters stays, since it
    may be the model below them.
    """
    weights = ADAPTERS_FILE if adapters else WEIGHTS_FILE
    others = (HEAD_FILE,) if adapters else (CONFIG_FILE, ADAPTERS_FILE, HEAD_FILE)
    for name in (weights, *others):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(fresh.iterdir(), key=lambda path: path.name == weights):
        path.replace(folder / path.name)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into the folder of a model.

    Raises:
        FileError: The files cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # on a full disk the tokenizers library raises another type than OSError
        raise FileError(f"cannot write the tokenizer into {folder} ({error}): make room there", path=folder) from error


def restore_checkpoint(model: PromptClassifier, folder: Path, setting: str) -> None:
    """Load weights that `save_checkpoint` has written into the model that they belong to.

    Args:
        model: The model, as it was built for training.
        folder: The folder with the weights.
        setting: The setting that named the folder, for messages.

    Raises:
        ModelError: The folder holds no weights, or those of another model.
    """
    if has_adapters(model) != (folder / CONFIG_FILE).is_file():
        holds, remedy = ("no ", "leave `apply_lora` out") if has_adapters(model) else ("", "add `apply_lora=True`")
        sentence = f"`{setting}={folder}` holds {holds}LoRA adapters: {remedy}, or name another folder"
        raise ModelError(sentence, path=folder)
    weights = None if has_adapters(model) else _read_for(model.lm, folder / WEIGHTS_FILE, setting)
    if _extras(model) and not (folder / HEAD_FILE).is_file():
        sentence = f"`{setting}={folder}` holds no {HEAD_FILE}, the head of this model: name another folder"
        raise ModelError(sentence, path=folder)
    restore_extras(model, folder, setting)
    if weights is not None:
        model.lm.load_state_dict(weights)


def restore_extras(model: PromptClassifier, folder: Path, setting: str = "model_name_or_path") -> None:
    """Load adapters and a head, if the folder holds them, into a model that has them.

    Args:
        model: The model; it stays unchanged if anything does not fit.
        folder: The folder with the files.
        setting: The setting that named the folder, for messages.

    Raises:
        ModelError: The adapters or the head belong to another model.
    """
    adapted = has_adapters(model) and (folder / CONFIG_FILE).is_file()
    adapters = read_adapters(model.lm, folder, setting) if adapted else None
    path, extras = folder / HEAD_FILE, _extras(model)
    brings_head = any(f"lm.{name}" in extras for name in adapters or ())
    if adapted and not path.is_file() and not brings_head:
        logger.warning("%s holds adapters but no %s: the head is that of the model below them", folder, HEAD_FILE)
    if path.is_file() and extras:
        stored = _read(path, setting)
        if {name: tensor.shape for name, tensor in stored.items()} != {n: t.shape for n, t in extras.items()}:
            raise ModelError(
                f"`{setting}`: {path} holds the head of another model: name another folder, or give the "
                "`few_shot_type` and `from_linearhead` that it was made with",
                path=path,
            )
        model.load_state_dict(stored, strict=False)
    if adapters is not None:
        load_adapters(model.lm, adapters)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Switch off transformers' progress bars of reading and writing weights."""
    were_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off transformers' report on missing weights too, which lists a tied decoder."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _extras(model: PromptClassifier) -> dict[str, Tensor]:
    """Return the weights of a model that its checkpoint leaves out: the head of ours; with adapters, any head."""
    all_heads = has_adapters(model)
    state = model.state_dict()
    # The pooler may be new, as the head is.
    of_head = {
        name
        for name in state
        if (not name.startswith(model.base_prefix) or ".pooler." in name) and not is_adapter(name)
    }
    return {name: state[name] for name in of_head if all_heads or not name.startswith("lm.")}


def _read_for(lm: nn.Module, path: Path, setting: str) -> dict[str, Tensor]:
    stored = _read(path, setting)
    wanted = lm.state_dict()
    differing = [name for name, tensor in stored.items() if name not in wanted or wanted[name].shape != tensor.shape]
    if differing or wanted.keys() != stored.keys():
        culprit = differing[0] if differing else min(wanted.keys() - stored.keys())
        raise ModelError(
            f"`{setting}`: {path} is a checkpoint of another model or architecture than `model_name_or_path` "
            f"({culprit} does not fit): name a checkpoint of this one, or leave `{setting}` out",
            path=path,
            parameter=culprit,
        )
    return stored


def _read(path: Path, setting: str) -> dict[str, Tensor]:
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        sentence = f"`{setting}`: {path} cannot be read as weights ({error}): name another folder"
        raise ModelError(sentence, path=path) from error
    check_finite(stored, f"`{setting}`: {path}")
    return stored
