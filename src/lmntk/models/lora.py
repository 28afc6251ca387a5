"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) on a model, created and read by peft."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmntk.errors import ModelError
from lmntk.models.lora_files import (
    WEIGHTS_FILE,
    LoraSettings,
    check_rank,
    one_line,
    read_weights,
    remedy_of,
    stored_config,
)

# The beginning of all names in peft's files; the name in the model below the adapters follows.
NAME_PREFIX = "base_model.model."
_OF_WRAPPERS = {"modules_to_save", "original_module"}

# The names of the query and value projections. In ModernBERT and GPT-2 they are one matrix, with the key projection.
_PROJECTIONS = (
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q_proj", "v_proj"),
    ("query_proj", "value_proj"),
    ("Wqkv",),
    ("c_attn",),
)


def is_adapter(name: str) -> bool:
    """Whether a parameter with this name belongs to an adapter."""
    return ".lora_" in name


def add_adapters(lm: PreTrainedModel, settings: LoraSettings) -> None:
    """Put adapters on a model, in place; torch's global generator draws their random weights.

    New adapters go on the query and value projections, stored ones where their configuration says. Afterwards the
    parameters that peft trains require gradients. `load_adapters` loads the weights of stored adapters.

    Args:
        lm: The model, without adapters.
        settings: The adapters, new or stored.

    Raises:
        ModelError: The attention's projections have none of the known names, or peft cannot add the adapters.
    """
    target: Any = lm
    if settings.folder is None:
        config = _new_config(lm, settings)
    else:
        stored = read_weights(settings.folder, "model_name_or_path")
        target = lm if _names_whole_model(lm, stored) else lm.base_model
        config = stored_config(settings.folder)
        check_rank(config, stored, settings.folder)
    last = _last_layer(lm)
    from peft import inject_adapter_in_model

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft advises on training
            inject_adapter_in_model(config, target)
    except Exception as error:  # peft raises any type for a configuration that does not fit the model
        if settings.folder is None:
            raise
        raise ModelError(
            f"peft cannot put the adapters in {settings.folder} on this model ({one_line(error)})"
            f"{remedy_of(config.init_lora_weights)}",
            path=settings.folder,
        ) from error
    _check_layers(lm, last, settings)
    _take_out_of_wrappers(lm)
    lm.peft_config = target.peft_config
    # An encoder that is used without its language model needs them too.
    encoder: Any = lm.base_model
    encoder.peft_config = lm.peft_config


def _new_config(lm: PreTrainedModel, settings: LoraSettings) -> Any:
    ends = {name.rpartition(".")[2] for name, _ in lm.base_model.named_modules()}
    targets = next((names for names in _PROJECTIONS if ends.issuperset(names)), None)
    if targets is None:
        raise ModelError(
            f"`apply_lora`: the attention of {lm.config.model_type} has no query and value projections with a known "
            "name; leave it out",
            model=lm.config.model_type,
        )
    from peft import LoraConfig  # here, since importing peft takes seconds

    # GPT-2 stores its weights transposed.
    transposed = targets == ("c_attn",)
    alpha: Any = settings.alpha  # peft takes fractions too
    return LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=list(targets), fan_in_fan_out=transposed)


def _last_layer(lm: PreTrainedModel) -> nn.Module:
    """The layer that gives the logits."""
    decoder: Any = lm.get_output_embeddings()
    return decoder if decoder is not None else [module for module in lm.modules() if isinstance(module, nn.Linear)][-1]


def _check_layers(lm: PreTrainedModel, last: nn.Module, settings: LoraSettings) -> None:
    """Refuse adapters on the layer that gives the logits, and those that do not work in peft's own model either."""
    from peft.tuners.lora import LoraLayer

    kinds = getattr(lm.config, "layer_types", None)
    if kinds is not None and len(kinds) < lm.config.num_hidden_layers:
        raise ModelError(
            f"the adapters in {settings.folder} repeat layers (layer_replication), which {lm.config.model_type} cannot "
            "do: its configuration lists its layers one by one; name other adapters",
            path=settings.folder,
        )
    for name, module in lm.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if module.base_layer is last:
            raise ModelError(
                f"{settings.folder} holds adapters of {name}, the layer that gives the logits, of which only some rows "
                "are used here: name adapters that leave it out, or that hold it whole (peft's modules_to_save)",
                path=settings.folder,
            )
        matrices: Any = module.lora_A.values()
        for matrix in matrices:
            if matrix.weight.shape[1] != module.in_features:
                raise ModelError(
                    f"peft cannot put the adapters in {settings.folder} on {name}, whose weight is stored transposed: "
                    "their initialisation ignores that; name adapters with another initialisation",
                    path=settings.folder,
                )


def _take_out_of_wrappers(lm: nn.Module) -> None:
    """Replace the model's modules by those that were stored with the adapters (`modules_to_save`)."""
    from peft.utils import ModulesToSaveWrapper

    while wrapped := [name for name, module in lm.named_modules() if isinstance(module, ModulesToSaveWrapper)]:
        wrapper: Any = lm.get_submodule(wrapped[0])
        lm.set_submodule(wrapped[0], wrapper.modules_to_save[wrapper.active_adapter])


def save_adapters(lm: PreTrainedModel, folder: Path, base_name: str) -> None:
    """Write a model's adapters in peft's format, which `PeftModel.from_pretrained` reads.

    Args:
        lm: The model with the adapters.
        folder: The folder to write into.
        base_name: The name or folder of the model below them; the absolute path of a folder is written.
    """
    config: Any = lm.peft_config["default"]
    config.base_model_name_or_path = str(Path(base_name).resolve()) if Path(base_name).is_dir() else base_name
    config.save_pretrained(folder)
    weights = _adapters_of(lm)
    for second, first in _second_names(lm).items():
        if first in weights:
            weights[second] = weights[first]  # of a head that is written whole, peft expects all names
    weights = {f"{NAME_PREFIX}{name}": tensor.clone() for name, tensor in weights.items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_adapters(lm: PreTrainedModel, folder: Path, setting: str) -> dict[str, Tensor]:
    """Read the weights of adapters that `add_adapters` has put on a model, for `load_adapters`.

    Args:
        lm: The model with the adapters.
        folder: The folder with the weights.
        setting: The setting that named the folder, for messages.

    Raises:
        ModelError: The file is missing, damaged, or belongs to another model.
        NotFiniteError: A weight is NaN or infinite.
    """
    stored = _named_as_in(lm, read_weights(folder, setting))
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
        raise ModelError(
            f"`{setting}`: {folder / WEIGHTS_FILE} does not hold LoRA adapters for this model ({differing[0]} does not "
            "fit): name another folder, or give the `few_shot_type` and `from_linearhead` that it was made with",
            path=folder,
            parameter=differing[0],
        )
    return stored


def load_adapters(lm: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights that `read_adapters` has read into a model's adapters."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(lm, weights)


def names_in(folder: Path, lm: PreTrainedModel) -> set[str]:
    """Return the names of the weights in a folder of adapters, as the model has them."""
    return set(_named_as_in(lm, read_weights(folder, "model_name_or_path")))


def _names_whole_model(lm: PreTrainedModel, stored: Mapping[str, Tensor]) -> bool:
    """Whether adapters were written from a model with a head, and not from its encoder alone."""
    return any(name.startswith(f"{NAME_PREFIX}{lm.base_model_prefix}.") for name in stored)


def _named_as_in(lm: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights as in a model, which may have a head or be an encoder alone."""
    prefix = f"{lm.base_model_prefix}."
    before = prefix if lm.base_model is not lm and not _names_whole_model(lm, stored) else ""
    after = prefix if lm.base_model is lm and _names_whole_model(lm, stored) else ""
    return {
        before + name.removeprefix(NAME_PREFIX).removeprefix(after): tensor
        for name, tensor in stored.items()
        # With all biases, peft writes those of its wrappers too, and does not read them.
        if not _OF_WRAPPERS.intersection(name.split("."))
    }


def _second_names(lm: nn.Module) -> dict[str, str]:
    """Return the first name of each tied name that is not in the model's state."""
    tied: dict[str, str] = getattr(lm, "_tied_weights_keys", None) or {}
    own = lm.state_dict().keys()
    pairs = [*tied.items(), *((source, target) for target, source in tied.items())]
    return {second: first for second, first in pairs if second not in own and first in own}


def _adapters_of(lm: nn.Module) -> dict[str, Tensor]:
    """Return the weights that peft writes: adapters, biases if it trains them, and modules to save."""
    from peft import get_peft_model_state_dict

    config: Any = lm.peft_config["default"]  # type: ignore[index]
    # Without embeddings, peft does not ask the hub whether they have been resized.
    found = get_peft_model_state_dict(lm, save_embedding_layers=False)
    kept = tuple(config.modules_to_save or ())
    for name, module in lm.named_modules():
        if kept and name.endswith(kept) and not is_adapter(name):
            found |= {f"{name}.{own}": tensor for own, tensor in module.state_dict().items()}
    return found
