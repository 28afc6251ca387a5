"""Folders of LoRA adapters as peft writes them: their configuration and their weights."""

import json
import logging
import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lmntk.errors import ModelError
from lmntk.models.sound_weights import check_finite

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# The file that peft writes with `safe_serialization=False`.
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
KIND = "LORA"

# Settings with which the logits are another kind of function, or peft gives other gradients than theirs.
_REFUSED = {
    "alora_invocation_tokens": "are switched on by tokens of the text (aLoRA)",
    "arrow_config": "are chosen among by a router (Arrow)",
    "monteclora_config": "are drawn at random at every call (MonteCLoRA)",
    "velora_config": "have approximate gradients (VeLoRA)",
    "target_parameters": "stand on single parameters and not on modules",
    "trainable_token_indices": "change the embeddings of single tokens",
    "ensure_weight_tying": "are tied between word embeddings and decoder, which are two parameters here",
}
# Settings of the adapters' places, which the names of their weights hold too, or of their training.
_IRRELEVANT = {
    "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_type", "peft_version",
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "fan_in_fan_out", "megatron_core", "qalora_group_size",
}  # fmt: skip


@dataclass(frozen=True)
class LoraSettings:
    """The definition of adapters: ``W + (alpha / rank) B A`` with A ``[rank, d_in]`` and B ``[d_out, rank]``.

    Attributes:
        rank: The rank of all matrices.
        alpha: The scale of the product, before it is divided by the rank.
        folder: The folder of stored adapters; None for new ones, with a random A and a B of zeros.
        others: The other settings of peft that change the function, or the choice of trained parameters.
    """

    rank: int
    alpha: float
    folder: Path | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def description(self) -> dict[str, Any]:
        """The settings that a kernel depends on, besides the weights."""
        return {"rank": self.rank, "alpha": self.alpha, **self.others}


def stored_adapters(folder: Path) -> tuple[LoraSettings, str] | None:
    """Read the configuration of the adapters in a folder.

    Args:
        folder: The folder, of adapters or of anything else.

    Returns:
        The adapters, and the name or folder of the model below them; None for a folder without adapters.

    Raises:
        ModelError: The configuration cannot be read, or asks for adapters that are not supported.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kind = stored["peft_type"]
        if kind != KIND:
            raise ModelError(f"{path} is of adapters of the kind {kind}: name a folder of LoRA adapters", path=path)
        rank, alpha, base = stored["r"], stored["lora_alpha"], stored["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError("base_model_name_or_path names no model")
        if type(rank) is not int or rank < 1:
            raise ValueError(f"the rank r is {rank!r}, and a whole number of 1 or more is needed")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"lora_alpha is {alpha!r}, and a finite number is needed")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise _unreadable(path, reason) from error
    if stored.get("revision") not in (None, "main") and not Path(base).is_dir():
        raise ModelError(
            f"{path} asks for revision {stored['revision']} of '{base}', and only the main one is read here: put "
            "that revision into a folder, and name the folder as base_model_name_or_path",
            path=path,
        )
    for name, what in _REFUSED.items():
        if stored.get(name):
            raise ModelError(
                f"{path}: {name} is set, so these adapters {what}; they are not supported: name a folder of others",
                path=path,
                name=name,
            )
    settled = {name: value for name, value in stored.items() if value and name not in _IRRELEVANT}
    usual = {"bias": "none", "init_lora_weights": True}
    others = {name: value for name, value in sorted(settled.items()) if value != usual.get(name)}
    return LoraSettings(rank, alpha, folder, others), base


def stored_config(folder: Path) -> Any:
    """Return the configuration of adapters as peft reads it for training.

    Raises:
        ModelError: peft cannot read it.
    """
    import peft

    path = folder / CONFIG_FILE
    stored = json.loads(path.read_text(encoding="utf-8"))
    unknown = [name for name, value in stored.items() if value and not hasattr(peft.LoraConfig(), name)]
    if unknown:
        raise ModelError(
            f"{path}: peft {peft.__version__} does not know the setting {unknown[0]} of these adapters: install a "
            "newer peft, or name another folder",
            path=path,
            name=unknown[0],
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # peft raises any type for a bad setting
        raise _unreadable(path, one_line(error)) from error
    config.inference_mode = False
    if config.task_type == "SEQ_CLS":
        # As in peft's own model for this task.
        config.modules_to_save = [*(config.modules_to_save or ()), "classifier", "score"]
    initialised = str(config.init_lora_weights)
    if initialised.startswith("pissa_niter"):
        logger.warning(
            "%s: %s changes the weights below the adapters by a random approximation, which peft draws again whenever "
            "it loads them: it is drawn with `seed` here, and another seed gives slightly different logits",
            path,
            initialised,
        )
    if initialised == "lora_ga":
        logger.warning(
            "%s: lora_ga changed the weights below the adapters when these were made, and peft does not repeat that "
            "when it loads them: the logits are those that peft gives, not those of the model that was trained%s",
            path,
            remedy_of(initialised),
        )
    return config


def check_rank(config: Any, stored: Mapping[str, Tensor], folder: Path) -> None:
    """Check that some matrix has the rank, before memory is allocated, which a wrong rank might exhaust.

    Raises:
        ModelError: No matrix has it.
    """
    ranks = {config.r, *config.rank_pattern.values()}
    if not ranks.intersection(size for tensor in stored.values() for size in tensor.shape):
        raise ModelError(
            f"{folder / CONFIG_FILE} says rank {config.r}, and no matrix in {WEIGHTS_FILE} beside it has that rank: "
            "name another folder",
            path=folder,
        )


def remedy_of(initialised: object) -> str:
    """Return the remedy if the initialisation of adapters changed the weights below them, else an empty string."""
    if initialised in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        return ""
    return (
        f"; adapters initialised by {initialised} belong to changed weights: write them with peft's "
        "save_pretrained(path_initial_model_for_weight_conversion=…), which turns them into plain LoRA"
    )


def read_weights(folder: Path, setting: str) -> dict[str, Tensor]:
    """Return the weights of the adapters in a folder, with peft's names.

    Args:
        folder: The folder of the adapters.
        setting: The setting that named the folder, for messages.

    Raises:
        ModelError: The file is missing or damaged, or its weights are quantised.
        NotFiniteError: A weight is NaN or infinite.
    """
    path = folder / WEIGHTS_FILE
    pickled = folder / PICKLED_WEIGHTS_FILE
    try:
        if not path.is_file() and pickled.is_file():
            path = pickled
            stored = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
                raise ValueError("it holds no table of weights")
        else:
            stored = load_file(path)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        sentence = f"`{setting}`: {path} cannot be read as LoRA adapters ({one_line(error)})"
        raise ModelError(sentence, path=path) from error
    for name, tensor in stored.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(
                f"`{setting}`: {path} holds the weight {name} as {str(tensor.dtype).removeprefix('torch.')}: quantised "
                "adapters are not read here; name a folder of others",
                path=path,
                parameter=name,
            )
    check_finite(stored, f"`{setting}`: {path}")
    return stored


def one_line(error: Exception) -> str:
    """Return the text of a library's error on one line."""
    return " ".join(str(error).split()) or repr(error)


def _unreadable(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path} cannot be read as the configuration of LoRA adapters ({reason})", path=path)
