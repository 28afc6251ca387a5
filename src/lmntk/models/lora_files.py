"""Folders of LoRA adapters as peft writes them: what they say of themselves, and the weights they hold."""

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

from lmntk.errors import UsageError
from lmntk.models.sound_weights import check_finite

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What peft writes with `safe_serialization=False`.
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
KIND = "LORA"

# Settings of a LoRA configuration that give a function of another kind, or other derivatives than the logits have.
_REFUSED = {
    "alora_invocation_tokens": "are switched on by tokens of the text (aLoRA)",
    "arrow_config": "are chosen among by a router (Arrow)",
    "monteclora_config": "are drawn at random at every call (MonteCLoRA)",
    "velora_config": "have approximate gradients (VeLoRA)",
    "target_parameters": "stand on single parameters and not on modules",
    "trainable_token_indices": "change the embeddings of single tokens",
    "ensure_weight_tying": "are tied between word embeddings and decoder, which are two parameters here",
}
# Settings that say where adapters stand, which their weights' names say too, or how they came to be.
_SAYS_NOTHING_MORE = {
    "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_type", "peft_version",
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "fan_in_fan_out", "megatron_core", "qalora_group_size",
}  # fmt: skip


@dataclass(frozen=True)
class LoraSettings:
    """What adapters are: ``W + (alpha / rank) B A`` with A ``[rank, d_in]`` and B ``[d_out, rank]``, or a form of it.

    Attributes:
        rank: ``--lora_r``.
        alpha: ``--lora_alpha``.
        folder: Where peft has written them; None for new ones, whose A is random and whose B is zero.
        others: What else their configuration says of what they compute and what of them is trained.
    """

    rank: int
    alpha: float
    folder: Path | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def description(self) -> dict[str, Any]:
        """What of them defines a kernel, beside the weights."""
        return {"rank": self.rank, "alpha": self.alpha, **self.others}


def stored_adapters(folder: Path) -> tuple[LoraSettings, str] | None:
    """Read which adapters a folder holds, and on which model they stand; None where it holds none.

    Raises:
        UsageError: Their configuration cannot be read, or is one of adapters that are not known here.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kind = stored["peft_type"]
        if kind != KIND:
            raise UsageError(f"{path} is of adapters of the kind {kind}: name a folder of LoRA adapters")
        rank, alpha, base = stored["r"], stored["lora_alpha"], stored["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError("base_model_name_or_path names no model")
        if type(rank) is not int or rank < 1:
            raise ValueError(f"the rank r is {rank!r}, and a whole number of 1 or more is needed")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"lora_alpha is {alpha!r}, which is no number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UsageError(f"{path} cannot be read as the configuration of LoRA adapters ({reason})") from error
    if stored.get("revision") not in (None, "main") and not Path(base).is_dir():
        raise UsageError(
            f"{path} asks for revision {stored['revision']} of '{base}', and only the main one is read here: bring "
            "that revision into a folder, and name this as base_model_name_or_path"
        )
    for name, what in _REFUSED.items():
        if stored.get(name):
            raise UsageError(
                f"{path}: {name} is set, so these adapters {what}; they cannot be read here: name a folder of others"
            )
    settled = {name: value for name, value in stored.items() if value and name not in _SAYS_NOTHING_MORE}
    usual = {"bias": "none", "init_lora_weights": True}
    others = {name: value for name, value in sorted(settled.items()) if value != usual.get(name)}
    return LoraSettings(rank, alpha, folder, others), base


def stored_config(folder: Path) -> Any:
    """Read a configuration as peft does, for training."""
    import peft

    path = folder / CONFIG_FILE
    stored = json.loads(path.read_text(encoding="utf-8"))
    unknown = [name for name, value in stored.items() if value and not hasattr(peft.LoraConfig(), name)]
    if unknown:
        raise UsageError(
            f"{path}: peft {peft.__version__} does not know the setting {unknown[0]} of these adapters: install a "
            "newer peft, or name another folder"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever peft says of settings
        raise UsageError(f"{path} cannot be read as the configuration of LoRA adapters ({one_line(error)})") from error
    config.inference_mode = False
    if config.task_type == "SEQ_CLS":
        # As peft's own model of this task has it.
        config.modules_to_save = [*(config.modules_to_save or ()), "classifier", "score"]
    initialised = str(config.init_lora_weights)
    if initialised.startswith("pissa_niter"):
        logger.warning(
            "%s: %s changes the weights below the adapters by a random approximation, which peft draws anew whenever "
            "it loads them: it is drawn with --seed here, and another seed gives slightly different logits",
            *(path, initialised),
        )
    if initialised == "lora_ga":
        logger.warning(
            "%s: lora_ga changed the weights below the adapters when these were made, and peft does not repeat that "
            "when it loads them: the logits are those that peft gives, not those of the model that was trained%s",
            *(path, way_out(initialised)),
        )
    return config


def check_rank(config: Any, stored: Mapping[str, Tensor], folder: Path) -> None:
    """See that matrices of the rank are there, before room is made for them, which may be more than there is."""
    ranks = {config.r, *config.rank_pattern.values()}
    if not ranks.intersection(size for tensor in stored.values() for size in tensor.shape):
        raise UsageError(
            f"{folder / CONFIG_FILE} says rank {config.r}, and no matrix in {WEIGHTS_FILE} beside it has that rank: "
            "name another folder"
        )


def way_out(initialised: object) -> str:
    """What helps where adapters were made together with a change of the weights below them."""
    if initialised in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        return ""
    return (
        f"; adapters initialised by {initialised} go with changed weights: write them with peft's "
        "save_pretrained(path_initial_model_for_weight_conversion=…), which makes plain LoRA of them"
    )


def read_weights(folder: Path, flag: str) -> dict[str, Tensor]:
    """The weights in a folder, under peft's names."""
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
        raise UsageError(f"{flag}: {path} cannot be read as LoRA adapters ({one_line(error)})") from error
    for name, tensor in stored.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UsageError(
                f"{flag}: {path} holds the weight {name} as {str(tensor.dtype).removeprefix('torch.')}: quantised "
                "adapters are not read here; name a folder of others"
            )
    check_finite(stored, f"{flag}: {path}")
    return stored


def one_line(error: Exception) -> str:
    """What an error of a library says, as part of a sentence."""
    return " ".join(str(error).split()) or repr(error)
