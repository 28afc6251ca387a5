"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685), made and read by peft."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmntk.errors import UsageError
from lmntk.models.sound_weights import check_finite

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What peft writes with `safe_serialization=False`.
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
# What peft's files put before a weight's name in the model that the adapters stand on.
NAME_PREFIX = "base_model.model."
KIND = "LORA"
_OF_WRAPPERS = {"modules_to_save", "original_module"}

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


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's matrix, or of another part of an adapter."""
    return ".lora_" in name


def add_adapters(lm: PreTrainedModel, settings: LoraSettings) -> None:
    """Put adapters on a model, in place; what is random of them is drawn with torch's global generator.

    New ones go on the query and value projections, stored ones where their configuration says. Afterwards those
    parameters require gradients that peft trains. The weights of stored ones are loaded by `load_adapters`.

    Raises:
        UsageError: The attention's projections have none of the names known here, or peft does not take the adapters.
    """
    target: Any = lm
    if settings.folder is None:
        config = _new_config(lm, settings)
    else:
        stored = _read(settings.folder, "--model_name_or_path")
        target = lm if _names_whole_model(lm, stored) else lm.base_model
        config = _stored_config(settings.folder)
        _check_rank(config, stored, settings.folder)
    last = _last_layer(lm)
    from peft import inject_adapter_in_model

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft advises on training
            inject_adapter_in_model(config, target)
    except Exception as error:  # whatever peft says of a configuration that does not go with a model
        if settings.folder is None:
            raise
        raise UsageError(
            f"peft cannot put the adapters in {settings.folder} on this model ({_one_line(error)})"
            f"{_way_out(config.init_lora_weights)}"
        ) from error
    _check_layers(lm, last, settings)
    _take_out_of_wrappers(lm)
    lm.peft_config = target.peft_config
    # An encoder that is taken out of its language model keeps them.
    encoder: Any = lm.base_model
    encoder.peft_config = lm.peft_config


def _new_config(lm: PreTrainedModel, settings: LoraSettings) -> Any:
    ends = {name.rpartition(".")[2] for name, _ in lm.base_model.named_modules()}
    targets = next((names for names in _PROJECTIONS if ends.issuperset(names)), None)
    if targets is None:
        raise UsageError(
            f"--apply_lora: the attention of {lm.config.model_type} has no query and value projections by a known "
            "name; leave the flag out"
        )
    from peft import LoraConfig  # here, since it takes seconds that other runs need not wait

    # GPT-2 stores its weights transposed.
    transposed = targets == ("c_attn",)
    alpha: Any = settings.alpha  # peft takes fractions too
    return LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=list(targets), fan_in_fan_out=transposed)


def _stored_config(folder: Path) -> Any:
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
        raise UsageError(f"{path} cannot be read as the configuration of LoRA adapters ({_one_line(error)})") from error
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
            *(path, _way_out(initialised)),
        )
    return config


def _check_rank(config: Any, stored: Mapping[str, Tensor], folder: Path) -> None:
    """See that matrices of the rank are there, before room is made for them, which may be more than there is."""
    ranks = {config.r, *config.rank_pattern.values()}
    if not ranks.intersection(size for tensor in stored.values() for size in tensor.shape):
        raise UsageError(
            f"{folder / CONFIG_FILE} says rank {config.r}, and no matrix in {WEIGHTS_FILE} beside it has that rank: "
            "name another folder"
        )


def _way_out(initialised: object) -> str:
    """What helps where adapters were made together with a change of the weights below them."""
    if initialised in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        return ""
    return (
        f"; adapters initialised by {initialised} go with changed weights: write them with peft's "
        "save_pretrained(path_initial_model_for_weight_conversion=…), which makes plain LoRA of them"
    )


def _last_layer(lm: PreTrainedModel) -> nn.Module:
    """The layer that gives the logits."""
    decoder: Any = lm.get_output_embeddings()
    return decoder if decoder is not None else [module for module in lm.modules() if isinstance(module, nn.Linear)][-1]


def _check_layers(lm: nn.Module, last: nn.Module, settings: LoraSettings) -> None:
    """Refuse adapters on the layer that gives the logits, and such as peft makes with the wrong shapes."""
    from peft.tuners.lora import LoraLayer

    for name, module in lm.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if module.base_layer is last:
            raise UsageError(
                f"{settings.folder} holds adapters of {name}, the layer that gives the logits, of which single rows "
                "are asked here: name adapters that leave it out, or that bring it whole (peft's modules_to_save)"
            )
        matrices: Any = module.lora_A.values()
        for matrix in matrices:
            if matrix.weight.shape[1] != module.in_features:
                raise UsageError(
                    f"peft cannot put the adapters in {settings.folder} on {name}, whose weight is stored transposed: "
                    "their initialisation does not heed that; name adapters that were initialised otherwise"
                )


def _take_out_of_wrappers(lm: nn.Module) -> None:
    """Put the modules that adapters bring with them (`modules_to_save`) in the place of the model's own."""
    from peft.utils import ModulesToSaveWrapper

    while wrapped := [name for name, module in lm.named_modules() if isinstance(module, ModulesToSaveWrapper)]:
        wrapper: Any = lm.get_submodule(wrapped[0])
        lm.set_submodule(wrapped[0], wrapper.modules_to_save[wrapper.active_adapter])


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
        reason = f"it has no {error}" if isinstance(error, KeyError) else _one_line(error)
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
    weights = _adapters_of(lm)
    for second, first in _second_names(lm).items():
        if first in weights:
            weights[second] = weights[first]  # a head that is written whole is looked for under all its names
    weights = {f"{NAME_PREFIX}{name}": tensor.clone() for name, tensor in weights.items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_adapters(lm: PreTrainedModel, folder: Path, flag: str) -> dict[str, Tensor]:
    """Read the weights of adapters that `add_adapters` has put on a model, for `load_adapters`.

    Raises:
        UsageError: The file is missing, damaged, or of another model, or holds what is no number; `flag` is named.
    """
    stored = _named_as_in(lm, _read(folder, flag))
    own = lm.state_dict()
    adapters = _adapters_of(lm)
    needed = {name for name in adapters if is_adapter(name) or not name.endswith("bias")}
    second_names = _second_names(lm)
    known = {**own, **adapters}
    differing = sorted(needed - stored.keys()) + sorted(
        name
        for name, tensor in stored.items()
        if name not in second_names and (name not in known or known[name].shape != tensor.shape)
    )
    if differing:
        raise UsageError(
            f"{flag}: {folder / WEIGHTS_FILE} does not hold LoRA adapters for this model ({differing[0]} does not "
            "fit): name another folder, or give the --few_shot_type and --from_linearhead that it was made with"
        )
    return stored


def load_adapters(lm: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a model's adapters what `read_adapters` has read."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(lm, weights)


def names_in(folder: Path, lm: PreTrainedModel) -> set[str]:
    """The names of the weights that adapters in a folder bring, as a model has them."""
    return set(_named_as_in(lm, _read(folder, "--model_name_or_path")))


def _read(folder: Path, flag: str) -> dict[str, Tensor]:
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
        raise UsageError(f"{flag}: {path} cannot be read as LoRA adapters ({_one_line(error)})") from error
    for name, tensor in stored.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UsageError(
                f"{flag}: {path} holds the weight {name} as {str(tensor.dtype).removeprefix('torch.')}: quantised "
                "adapters are not read here; name a folder of others"
            )
    check_finite(stored, f"{flag}: {path}")
    return stored


def _names_whole_model(lm: PreTrainedModel, stored: Mapping[str, Tensor]) -> bool:
    """Whether adapters were written from a model with a head, and not from its encoder alone."""
    return any(name.startswith(f"{NAME_PREFIX}{lm.base_model_prefix}.") for name in stored)


def _named_as_in(lm: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights the names they have in a model, which is one with a head, or an encoder alone."""
    prefix = f"{lm.base_model_prefix}."
    before = prefix if lm.base_model is not lm and not _names_whole_model(lm, stored) else ""
    after = prefix if lm.base_model is lm and _names_whole_model(lm, stored) else ""
    return {
        before + name.removeprefix(NAME_PREFIX).removeprefix(after): tensor
        for name, tensor in stored.items()
        # Asked for all biases, peft writes those of its wrappers too, and does not read them.
        if not _OF_WRAPPERS.intersection(name.split("."))
    }


def _second_names(lm: nn.Module) -> dict[str, str]:
    """The names of parameters that a model has under another one only, which is given for each."""
    tied: dict[str, str] = getattr(lm, "_tied_weights_keys", None) or {}
    own = lm.state_dict().keys()
    pairs = [*tied.items(), *((source, target) for target, source in tied.items())]
    return {second: first for second, first in pairs if second not in own and first in own}


def _adapters_of(lm: nn.Module) -> dict[str, Tensor]:
    """What of a model peft keeps in a file: adapters, biases where it trains these, and modules to save."""
    from peft import get_peft_model_state_dict

    config: Any = lm.peft_config["default"]  # type: ignore[index]
    # Asked for no embeddings, peft does not look on the hub whether these have been resized.
    found = get_peft_model_state_dict(lm, save_embedding_layers=False)
    kept = tuple(config.modules_to_save or ())
    for name, module in lm.named_modules():
        if kept and name.endswith(kept) and not is_adapter(name):
            found |= {f"{name}.{own}": tensor for own, tensor in module.state_dict().items()}
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)
