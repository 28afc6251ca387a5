"""The decoder of a language model and its word embeddings, which many checkpoints tie, as parameters of their own."""

from torch import nn
from transformers import PreTrainedModel


def untie(lm: PreTrainedModel, stored_names: set[str]) -> set[str]:
    """Give the decoder weights of its own, and its bias one identity under all its names.

    Args:
        lm: A model loaded with its tying switched off, or freshly initialised.
        stored_names: The parameters that the checkpoint holds.

    Returns:
        The names of the parameters that found their values elsewhere in the checkpoint.
    """
    found: set[str] = set()
    for target, source in (getattr(lm, "_tied_weights_keys", None) or {}).items():
        if target in stored_names and source in stored_names and not target.endswith("bias"):
            continue
        have, lack = (target, source) if target in stored_names and source not in stored_names else (source, target)
        if target.endswith("bias"):
            # One bias under two names is one parameter, and must be counted as one.
            _assign(lm, lack, lm.get_parameter(have))
        else:
            _assign(lm, lack, nn.Parameter(lm.get_parameter(have).detach().clone()))
        if have in stored_names:
            found.add(lack)
    return found


def _assign(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, parameter)
