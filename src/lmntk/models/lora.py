"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685), through peft, on the attention's query and value projections."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmntk.errors import UsageError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What peft's files put before a weight's name in the model that the adapters stand on.
NAME_PREFIX = "base_model.model."
# What peft can do with an adapter beside W + (alpha / rank) B A.
_OTHER_FORMS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")

# Query and value projections, as the architectures call them. ModernBERT's and GPT-2's come, with the keys', from one
# matrix.
_PROJECTIONS = (
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q_proj", "v_proj"),
    ("query_proj", "value_proj"),
    ("Wqkv",),
    ("c_attn",),
)


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter is: ``W + (alpha / rank) B A``, with A ``[rank, d_in]`` random and B ``[d_out, rank]`` zero.

    Attributes:
        rank: ``--lora_r``.
        alpha: ``--lora_alpha``.
    """

    rank: int
    alpha: int


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
    from peft import LoraConfig, inject_adapter_in_model  # here, since it takes seconds that other runs need not wait

    # GPT-2 stores its weights transposed.
    transposed = targets == ("c_attn",)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(targets), fan_in_fan_out=transposed
    )
    inject_adapter_in_model(config, lm)
    # An encoder that is taken out of its language model keeps them.
    encoder: Any = lm.base_model
    encoder.peft_config = lm.peft_config


def stored_adapters(folder: Path) -> tuple[LoraSettings, str] | None:
    """Read which adapters a folder holds, and on which model they stand; None where it holds none.

    Raises:
        UsageError: Their configuration cannot be read, or is one of adapters of another form.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        settings, base = LoraSettings(int(stored["r"]), int(stored["lora_alpha"])), stored["base_model_name_or_path"]
        if not isinstance(base, str) or settings.alpha != stored["lora_alpha"]:
            raise ValueError("base_model_name_or_path is no name, or lora_alpha no whole number")
        other = [name for name in _OTHER_FORMS if stored.get(name)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as the configuration of LoRA adapters ({error!r})") from error
    if other:
        raise UsageError(f"{path}: adapters with {other[0]} are not known here; name a folder of plain LoRA adapters")
    return settings, base


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
    weights = {f"{NAME_PREFIX}{name}": tensor.contiguous() for name, tensor in _adapters_of(lm).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_adapters(lm: nn.Module, folder: Path, flag: str) -> dict[str, Tensor]:
    """Read the weights of adapters that `add_adapters` has put on a model, for `load_adapters`.

    Raises:
        UsageError: The file is missing, damaged, or of another model; `flag` is named.
    """
    path = folder / WEIGHTS_FILE
    try:
        stored = {name.removeprefix(NAME_PREFIX): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{flag}: {path} cannot be read as LoRA adapters ({error})") from error
    wanted = {name: tensor.shape for name, tensor in _adapters_of(lm).items()}
    found = {name: tensor.shape for name, tensor in stored.items()}
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        raise UsageError(
            f"{flag}: {path} does not hold LoRA adapters for this model ({differing[0]} does not fit): "
            "name another folder, or give the --few_shot_type and --from_linearhead that it was made with"
        )
    return stored


def load_adapters(lm: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a model's adapters what `read_adapters` has read."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(lm, weights)


def _adapters_of(lm: nn.Module) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    # Asked for no embeddings, peft does not look on the hub whether these have been resized.
    return get_peft_model_state_dict(lm, save_embedding_layers=False)
