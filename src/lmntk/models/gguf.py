"""GGUF files, the format of llama.cpp: converted once to a checkpoint of float32 weights, which is kept."""

import contextlib
import hashlib
import io
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import cached_file

from lmntk.errors import UsageError
from lmntk.models.checkpoints import WEIGHTS_FILE, quiet_transformers, save_tokenizer
from lmntk.models.families import AUTO_CLASSES, CAUSAL
from lmntk.models.sound_weights import check_finite

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
SCRATCH = ".converting-"
LEFT_OVER = 24 * 3600.0
"""After so many seconds without a new file a scratch folder is one whose run was killed."""

# All of Llama 3.1 to 3.3 have this scaling of positions, and a factor of their own.
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def files_in(folder: Path) -> list[str]:
    """The names of the GGUF files that a folder holds."""
    return sorted(path.name for path in folder.glob("*.gguf"))


def converted(name_or_path: str, gguf_file: str, cache: Path, downloads: str | None = None) -> Path:
    """Return a folder with the model, configuration and tokenizer that a GGUF file holds, as transformers loads them.

    It is made where it is not there yet; its name tells the file, by a hash, and the version of transformers that
    de-quantised it. The numbers are those that the quantised ones stand for, in float32.

    Args:
        name_or_path: A local folder or a name on the hub.
        gguf_file: The file in it.
        cache: The folder in which converted models are kept.
        downloads: Where what the hub gives is kept; None leaves that to transformers.

    Raises:
        UsageError: There is no such file, transformers cannot read it, or `cache` cannot be written.
    """
    source = _find(name_or_path, gguf_file, downloads)
    folder = cache / f"{source.stem}-{_hash_of(source)}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    logger.info("converting %s to float32 weights in %s, once: later runs find them there", source, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(cache)
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=cache))
    except OSError as error:
        raise UsageError(f"--gguf_file: {cache} cannot be written ({error.strerror}); name a --cache_dir") from error
    try:
        contents = _read(source)
        try:
            _write(scratch, *contents)
            scratch.rename(folder)
        except (OSError, SafetensorError, UsageError) as error:
            if not folder.is_dir():  # else another run was faster
                raise UsageError(
                    f"--gguf_file: cannot write {folder} ({error}): make room, or name a --cache_dir"
                ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _remove_left_overs(cache: Path) -> None:
    """Remove what runs left that were killed while they wrote; other runs may be writing now."""
    for scratch in cache.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > LEFT_OVER:
                shutil.rmtree(scratch)


def _find(name_or_path: str, gguf_file: str, downloads: str | None) -> Path:
    folder = Path(name_or_path)
    if folder.is_file():
        raise UsageError(
            f"--model_name_or_path {folder} is a file: name the folder it is in, and --gguf_file {folder.name}"
        )
    if folder.is_dir():
        found = folder / gguf_file
        there = ", ".join(files_in(folder)) or "no GGUF file"
        if not found.is_file():
            raise UsageError(f"--gguf_file {gguf_file}: there is no such file in {folder}; there is {there}")
    else:
        try:
            found = Path(str(cached_file(name_or_path, gguf_file, cache_dir=downloads)))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()).split(". ")[0]
            raise UsageError(
                f"--gguf_file {gguf_file}: '{name_or_path}' is no local folder, and the hub did not give the file "
                f"({reason})"
            ) from error
    return found


def _hash_of(source: Path) -> str:
    """Return the beginning of a file's SHA-256.

    Raises:
        UsageError: It cannot be read, or is no GGUF file.
    """
    try:
        with source.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UsageError(f"--gguf_file {source} is no GGUF file: its first four bytes are not 'GGUF'")
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UsageError(f"--gguf_file {source} cannot be read ({error.strerror})") from error


def _read(source: Path) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, dict[str, Tensor]]:
    """Load a GGUF file's configuration, tokenizer and weights, de-quantised."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    try:
        # The reader's own progress bar has no switch.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            reader = GGUFReader(source)
            _refuse_parts(reader, source)
            config = AutoConfig.from_pretrained(**place)
            tokenizer = AutoTokenizer.from_pretrained(**place)
            lm, report = AUTO_CLASSES[CAUSAL].from_pretrained(
                **place, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except UsageError:
        raise
    except Exception as error:  # transformers and the reader of the format raise whatever they like over a bad file
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        raise UsageError(
            f"--gguf_file: transformers cannot read {source} ({reason}): see that the file is whole, or name another"
        ) from error
    if report["mismatched_keys"]:
        # Allowed above only so that they can be named here.
        culprits = ", ".join(sorted(str(key[0]) for key in report["mismatched_keys"]))
        raise UsageError(f"--gguf_file: weights in {source} do not have the shapes that its header says: {culprits}")
    config.architectures = [type(lm).__name__]
    _keep_scaling_of_positions(config, reader, source)
    weights = _weights(lm, set(report["missing_keys"]))
    check_finite(weights, f"--gguf_file: {source}")
    return config, tokenizer, weights


def _refuse_parts(reader: GGUFReader, source: Path) -> None:
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise UsageError(
            f"--gguf_file {source} is one of {parts.contents()} parts of a model: join them, with llama-gguf-split "
            "--merge for example"
        )


def _keep_scaling_of_positions(config: PretrainedConfig, reader: GGUFReader, source: Path) -> None:
    """Give a Llama 3 its scaling of positions, which llama.cpp keeps as a tensor that transformers does not read.

    Raises:
        UsageError: The file scales positions in another way that transformers does not read.
    """
    read = getattr(config, "rope_parameters", None) or {}
    if read.get("rope_type") != "default":
        return  # no rotations, one kind for every kind of layer, or read all the same
    architecture = reader.get_field("general.architecture")
    kind = architecture and reader.get_field(f"{architecture.contents()}.rope.scaling.type")
    scaling = "none" if kind is None else str(kind.contents())
    factors = next((torch.tensor(t.data).float() for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    if scaling == "none" and factors is not None:
        plain = read["rope_theta"] ** -(torch.arange(len(factors)) / len(factors))
        config.rope_parameters = read | LLAMA_3 | {"rope_type": "llama3", "factor": factors.max().item()}
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if found.shape != plain.shape or not torch.allclose(found, plain / factors, rtol=1e-4, atol=0):
            scaling = "by factors of its own"
    if scaling != "none":
        raise UsageError(
            f"--gguf_file: {source} scales positions ({scaling}), of which transformers reads nothing: take the "
            "model's checkpoint in safetensors files"
        )


def _write(
    folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor]
) -> None:
    """Write a checkpoint; not by the model, whose own configuration says that it is quantised still."""
    config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # Scratch folders and weights are made for their owner's eyes, a cache may have other readers.
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def _weights(lm: PreTrainedModel, missing: set[str]) -> dict[str, Tensor]:
    """A model's weights by name; one that is tied to another is there once.

    Those that the file lacks stay out: whoever loads the checkpoint is told, and does not get today's random numbers.
    """
    state = lm.state_dict()
    tied = getattr(lm, "_tied_weights_keys", None) or {}
    twice = {name for name, other in tied.items() if state[name].data_ptr() == state[other].data_ptr()}
    return {name: tensor.contiguous() for name, tensor in state.items() if name not in twice | missing}
