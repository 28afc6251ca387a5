"""A language model that the caller has loaded already: its class is checked, and a copy is made that may be changed."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from lmntk.errors import ModelError
from lmntk.models.families import AUTO_CLASSES
from lmntk.models.sound_weights import check_finite
from lmntk.models.untying import untie


def family_of_model(lm: object) -> str:
    """Return ``"masked"`` or ``"causal"`` for a language model of transformers.

    Args:
        lm: The object that was passed as a model.

    Raises:
        ModelError: It is not a language model of transformers.
    """
    if isinstance(lm, PreTrainedModel):
        for family, auto in AUTO_CLASSES.items():
            known = auto._model_mapping.get(type(lm.config), None)
            if known is not None and isinstance(lm, known):
                return family
    raise ModelError(
        f"`model` is a {type(lm).__name__}, not a masked or causal language model of transformers: pass one made by "
        "AutoModelForMaskedLM or AutoModelForCausalLM (of adapters, what merge_and_unload() returns), a name or folder",
        model=type(lm).__name__,
    )


def float32_copy(lm: PreTrainedModel) -> PreTrainedModel:
    """Copy a language model as float32, in eval mode, with a decoder of its own; the original stays as it is.

    Args:
        lm: The model, of any floating-point dtype, on any device, in any mode.

    Returns:
        New modules on the CPU. Weights that are float32 there already share memory with the original's until the copy
        gets memory of its own.

    Raises:
        ModelError: The weights are quantised.
        NotFiniteError: A weight is NaN or infinite.
    """
    quantised = [name for name, weight in lm.named_parameters() if not weight.is_floating_point()]
    if quantised:
        raise ModelError(
            f"`model` is quantised ({quantised[0]}): load it in a floating-point dtype", model=lm.name_or_path
        )
    check_finite(dict(lm.named_parameters()), "`model`: the model that was passed")
    shared = {
        id(weight): nn.Parameter(weight.detach().to("cpu", torch.float32), requires_grad=True)
        for weight in lm.parameters()
    }
    copied = copy.deepcopy(lm, dict(shared))
    for buffer in copied.buffers():
        buffer.data = buffer.data.to("cpu", torch.float32 if buffer.is_floating_point() else None)
    copied.set_attn_implementation("eager")  # as checkpoints are loaded
    copied.config.tie_word_embeddings = False
    untie(copied, {name for name, _ in copied.named_parameters()})
    return copied.eval()
