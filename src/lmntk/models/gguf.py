"""GGUF files, the format of llama.cpp: each is converted once, to a checkpoint of float32 weights in a cache."""

import contextlib
import hashlib
import io
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import cached_file

from lmntk.errors import FileError, ModelError, UsageError, as_usage_error, first_sentence
from lmntk.models.checkpoints import WEIGHTS_FILE, quiet_transformers, save_tokenizer
from lmntk.models.families import AUTO_CLASSES, CAUSAL
from lmntk.models.sound_weights import check_finite

if TYPE_CHECKING:
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
SCRATCH = ".converting-"
LEFT_OVER = 24 * 3600.0
"""The age in seconds after which the run of a scratch folder must have been killed."""

# The scaling of positions of Llama 3.1 to 3.3; the factor differs.
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def files_in(folder: Path) -> list[str]:
    """Return the names of the GGUF files in a folder."""
    return sorted(path.name for path in folder.glob("*.gguf"))


def converted(name_or_path: str, gguf_file: str, cache: Path, downloads: str | None = None) -> Path:
    """Return a folder with the model, configuration and tokenizer of a GGUF file, in the form that transformers loads.

    The folder is made on the first use of the file. Its name holds the hash of the file, and the version of
    transformers that converted it. The weights are those that the quantised ones stand for, in float32.

    Args:
        name_or_path: A local folder or a name on the hub.
        gguf_file: The name of the file there.
        cache: The folder in which converted models are kept.
        downloads: The folder for downloads; None leaves the choice to transformers.

    Raises:
        FileError: There is no such file, it cannot be read, or `cache` cannot be written.
        ModelError: transformers cannot load the model in it.
        NotFiniteError: A weight is NaN or infinite.
    """
    source = _find(name_or_path, gguf_file, downloads)
    folder = cache / f"{source.stem}-{_hash_of(source)}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    logger.info("converting %s to float32 weights in %s, which later runs use", source, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(cache)
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=cache))
    except OSError as error:
        sentence = f"`gguf_file`: {cache} cannot be written ({error.strerror}); name another folder as `cache_dir`"
        raise FileError(sentence, path=cache) from error
    try:
        contents = _read(source)
        try:
            _write(scratch, *contents)
            scratch.rename(folder)
        except (OSError, SafetensorError, UsageError) as error:
            if not folder.is_dir():  # else another run was faster
                sentence = f"`gguf_file`: cannot write {folder} ({error}): make room, or name another `cache_dir`"
                raise FileError(sentence, path=folder) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _remove_left_overs(cache: Path) -> None:
    """Remove the scratch folders of runs that were killed, but not those of runs that are writing now."""
    for scratch in cache.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > LEFT_OVER:
                shutil.rmtree(scratch)


def _find(name_or_path: str, gguf_file: str, downloads: str | None) -> Path:
    folder = Path(name_or_path)
    if folder.is_file():
        raise ModelError(
            f"`model_name_or_path={folder}` is a file: name the folder it is in, and `gguf_file={folder.name}`",
            path=folder,
        )
    if folder.is_dir():
        found = folder / gguf_file
        there = ", ".join(files_in(folder)) or "no GGUF file"
        if not found.is_file():
            raise FileError(f"`gguf_file={gguf_file}`: there is no such file in {folder}; there is {there}", path=found)
        return found
    try:
        return Path(str(cached_file(name_or_path, gguf_file, cache_dir=downloads)))
    except (OSError, ValueError) as error:
        raise FileError(
            f"`gguf_file={gguf_file}`: '{name_or_path}' is not a local folder, and the hub did not give the file "
            f"({first_sentence(error)})",
            path=gguf_file,
        ) from error


def _hash_of(source: Path) -> str:
    """Return the beginning of a file's SHA-256.

    Raises:
        FileError: It cannot be read, or is not a GGUF file.
    """
    try:
        with source.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                sentence = f"`gguf_file={source}` is not a GGUF file: its first four bytes are not 'GGUF'"
                raise FileError(sentence, path=source)
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise FileError(f"`gguf_file={source}` cannot be read ({error.strerror})", path=source) from error


def _read(source: Path) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, dict[str, Tensor]]:
    """Load a GGUF file's configuration, tokenizer and weights, de-quantised."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}

    def unreadable(reason: str) -> ModelError:
        remedy = "check that the file is whole, or name another"
        return ModelError(f"`gguf_file`: transformers cannot read {source} ({reason}): {remedy}", path=source)

    # The reader's own progress bar cannot be switched off.
    with as_usage_error(unreadable), quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        from gguf import GGUFReader  # here, since few runs need it

        reader = GGUFReader(source)
        _refuse_parts(reader, source)
        config = AutoConfig.from_pretrained(**place)
        tokenizer = AutoTokenizer.from_pretrained(**place)
        lm, report = AUTO_CLASSES[CAUSAL].from_pretrained(
            **place,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
    if report["mismatched_keys"]:
        names = ", ".join(sorted(str(key[0]) for key in report["mismatched_keys"]))
        sentence = f"`gguf_file`: weights in {source} do not have the shapes that its header says: {names}"
        raise ModelError(sentence, path=source)
    config.architectures = [type(lm).__name__]
    _keep_scaling_of_positions(config, reader, source)
    weights = _weights(lm, set(report["missing_keys"]))
    check_finite(weights, f"`gguf_file`: {source}")
    return config, tokenizer, weights


def _refuse_parts(reader: "GGUFReader", source: Path) -> None:
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise FileError(
            f"`gguf_file={source}` is one of {parts.contents()} parts of a model: join them, for example with the "
            "program llama-gguf-split",
            path=source,
        )


def _keep_scaling_of_positions(config: PretrainedConfig, reader: "GGUFReader", source: Path) -> None:
    """Set the scaling of positions of Llama 3, which llama.cpp stores as a tensor that transformers does not read.

    Raises:
        ModelError: The file scales positions in another way that transformers does not read.
    """
    read = getattr(config, "rope_parameters", None) or {}
    if read.get("rope_type") != "default":
        return  # no rotations, several kinds of layers, or a scaling that transformers has read
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
        raise ModelError(
            f"`gguf_file`: {source} scales positions ({scaling}), which transformers does not read: take the "
            "model's checkpoint in safetensors files",
            path=source,
        )


def _write(
    folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor]
) -> None:
    """Write a checkpoint without the model's own method, which would save a configuration with quantisation."""
    config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # Scratch folders are private, but a cache may be shared.
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def _weights(lm: PreTrainedModel, missing: set[str]) -> dict[str, Tensor]:
    """Return a model's weights by name, tied ones once.

    Weights that the file lacks are left out, so that loading warns of them and does not use the random numbers.
    """
    state = lm.state_dict()
    tied = getattr(lm, "_tied_weights_keys", None) or {}
    twice = {name for name, other in tied.items() if state[name].data_ptr() == state[other].data_ptr()}
    return {name: tensor.contiguous() for name, tensor in state.items() if name not in twice | missing}
