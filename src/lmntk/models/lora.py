"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685), made and read by peft, on a model."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmntk.errors import UsageError
from lmntk.models.lora_files import (
    WEIGHTS_FILE,
    LoraSettings,
    check_rank,
    one_line,
    read_weights,
    stored_config,
    way_out,
)

# What peft's files put before a weight's name in the model that the adapters stand on.
NAME_PREFIX = "base_model.model."
_OF_WRAPPERS = {"modules_to_save", "original_module"}

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
        stored = read_weights(settings.folder, "--model_name_or_path")
        target = lm if _names_whole_model(lm, stored) else lm.base_model
        config = stored_config(settings.folder)
        check_rank(config, stored, settings.folder)
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
            f"peft cannot put the adapters in {settings.folder} on this model ({one_line(error)})"
            f"{way_out(config.init_lora_weights)}"
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


def _last_layer(lm: PreTrainedModel) -> nn.Module:
    """The layer that gives the logits."""
    decoder: Any = lm.get_output_embeddings()
    return decoder if decoder is not None else [module for module in lm.modules() if isinstance(module, nn.Linear)][-1]


def _check_layers(lm: PreTrainedModel, last: nn.Module, settings: LoraSettings) -> None:
    """Refuse adapters on the layer that gives the logits, and such as fail in peft's own model too."""
    from peft.tuners.lora import LoraLayer

    kinds = getattr(lm.config, "layer_types", None)
    if kinds is not None and len(kinds) < lm.config.num_hidden_layers:
        raise UsageError(
            f"the adapters in {settings.folder} repeat layers (layer_replication), which {lm.config.model_type} cannot "
            "do: its configuration tells one by one what its layers are; name other adapters"
        )
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
    stored = _named_as_in(lm, read_weights(folder, flag))
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
    return set(_named_as_in(lm, read_weights(folder, "--model_name_or_path")))


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
