"""GGUF files, the format of llama.cpp: converted once to a checkpoint of float32 weights, which is kept."""

import hashlib
import logging
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from lmntk.errors import UsageError

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"


def converted(name_or_path: str, gguf_file: str, cache: Path) -> Path:
    """Return a folder with the model, configuration and tokenizer that a GGUF file holds, as transformers loads them.

    It is made where it is not there yet; its name tells the file, by a hash, and the version of transformers that
    de-quantised it. The numbers are those that the quantised ones stand for, in float32.

    Args:
        name_or_path: A local folder or a name on the hub.
        gguf_file: The file in it.
        cache: The folder in which converted models are kept.

    Raises:
        UsageError: There is no such file, transformers cannot read it, or `cache` cannot be written.
    """
    source = _find(name_or_path, gguf_file)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache / f"{source.stem}-{digest[:16]}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    logger.info("converting %s to float32 weights in %s, once: later runs find them there", source, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache))
    except OSError as error:
        raise UsageError(f"--gguf_file: {cache} cannot be written ({error.strerror}); name a --cache_dir") from error
    try:
        _write(scratch, *_read(source))
        scratch.chmod(0o755)
        scratch.rename(folder)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():  # else another run was faster
            raise UsageError(
                f"--gguf_file: cannot write {folder} ({error}): make room, or name a --cache_dir"
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _find(name_or_path: str, gguf_file: str) -> Path:
    folder = Path(name_or_path)
    if folder.is_file():
        raise UsageError(
            f"--model_name_or_path {folder} is a file: name the folder it is in, and --gguf_file {folder.name}"
        )
    if folder.is_dir():
        found = folder / gguf_file
        there = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "no GGUF file"
        if not found.is_file():
            raise UsageError(f"--gguf_file {gguf_file}: there is no such file in {folder}; there is {there}")
    else:
        try:
            found = Path(str(cached_file(name_or_path, gguf_file)))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()).split(". ")[0]
            raise UsageError(
                f"--gguf_file {gguf_file}: '{name_or_path}' is no local folder, and the hub did not give the file "
                f"({reason})"
            ) from error
    with found.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UsageError(f"--gguf_file {found} is no GGUF file: its first four bytes are not 'GGUF'")
    return found


def _read(source: Path) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, PreTrainedModel]:
    """Load a GGUF file's configuration, tokenizer and model, de-quantised."""
    try:
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        lm = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    except Exception as error:  # transformers and the reader of the format raise whatever they like over a bad file
        reason = " ".join(str(error).split()).split(". ")[0]
        raise UsageError(f"--gguf_file: transformers cannot read {source} ({reason}); name another file") from error
    config.architectures = [type(lm).__name__]
    return config, tokenizer, lm


def _write(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel) -> None:
    """Write a checkpoint; not by the model, whose own configuration says that it is quantised still."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(_weights(lm), folder / "model.safetensors", metadata={"format": "pt"})


def _weights(lm: PreTrainedModel) -> dict[str, Tensor]:
    """A model's weights by name; one that is tied to another is there once."""
    state = lm.state_dict()
    tied = getattr(lm, "_tied_weights_keys", None) or {}
    twice = {name for name, other in tied.items() if state[name].data_ptr() == state[other].data_ptr()}
    return {name: tensor.contiguous() for name, tensor in state.items() if name not in twice}
