"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685), through peft, on the attention's query and value projections."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from lmntk.errors import UsageError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
DEFAULT_RANK = 8
DEFAULT_ALPHA = 16

# Query and value projections, as the architectures call them. ModernBERT's come, with the keys', from one matrix.
_PROJECTIONS = (("query", "value"), ("q_lin", "v_lin"), ("q_proj", "v_proj"), ("query_proj", "value_proj"), ("Wqkv",))


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter is: ``W + (alpha / rank) B A``, with A ``[rank, d_in]`` random and B ``[d_out, rank]`` zero.

    Attributes:
        rank: ``--lora_r``.
        alpha: ``--lora_alpha``.
    """

    rank: int = DEFAULT_RANK
    alpha: int = DEFAULT_ALPHA


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's matrix."""
    return ".lora_" in name


def add_adapters(lm: PreTrainedModel, settings: LoraSettings) -> None:
    """Put adapters on a model's query and value projections, in place; A is drawn with torch's global generator.

    Raises:
        UsageError: The attention's projections have none of the names known here.
    """
    ends = {name.rpartition(".")[2] for name, _ in lm.base_model.named_modules()}
    targets = next((names for names in _PROJECTIONS if ends.issuperset(names)), None)
    if targets is None:
        raise UsageError(
            f"--apply_lora: the attention of {lm.config.model_type} has no query and value projections by a known "
            "name; leave the flag out"
        )
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(targets))
    inject_adapter_in_model(config, lm)


def stored_adapters(folder: Path) -> tuple[LoraSettings, str] | None:
    """Read which adapters a folder holds, and on which model they stand; None where it holds none.

    Raises:
        UsageError: Their configuration cannot be read.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        settings = LoraSettings(int(stored["r"]), int(stored["lora_alpha"]))
        return settings, str(stored["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as the configuration of LoRA adapters ({error!r})") from error


def save_adapters(lm: PreTrainedModel, folder: Path, base_name: str) -> None:
    """Write a model's adapters in peft's form, for `PeftModel.from_pretrained` too.

    Args:
        lm: The model.
        folder: Where to.
        base_name: The model they stand on; a local folder by its absolute path.
    """
    config: Any = lm.peft_config["default"]
    config.base_model_name_or_path = str(Path(base_name).resolve()) if Path(base_name).is_dir() else base_name
    config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(lm).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapters(lm: nn.Module, folder: Path) -> None:
    """Load the weights of adapters that `add_adapters` has put on a model.

    Raises:
        UsageError: The file is missing, damaged, or of another model.
    """
    path = folder / WEIGHTS_FILE
    try:
        found: Any = set_peft_model_state_dict(lm, load_file(path))
    except Exception as error:  # safetensors and peft raise whatever they like over a file that does not fit
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} does not hold LoRA adapters for this model ({reason})") from error
    lacking = [name for name in found.missing_keys if is_adapter(name)]
    if lacking or found.unexpected_keys:
        raise UsageError(
            f"{path} does not hold LoRA adapters for this model: {(lacking or found.unexpected_keys)[0]} does not fit"
        )
