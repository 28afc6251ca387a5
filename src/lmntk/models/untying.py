"""Untying: the decoder and the word embeddings of a language model become separate parameters."""

from torch import nn
from transformers import PreTrainedModel


def untie(lm: PreTrainedModel, stored_names: set[str]) -> set[str]:
    """Copy tied weights into separate parameters; a bias with two names becomes one parameter.

    Args:
        lm: A model loaded with its tying switched off, or freshly initialised.
        stored_names: The names of the parameters in the checkpoint.

    Returns:
        The names of the parameters whose values the checkpoint holds under another name.
    """
    found: set[str] = set()
    for target, source in (getattr(lm, "_tied_weights_keys", None) or {}).items():
        if target in stored_names and source in stored_names and not target.endswith("bias"):
            continue
        have, lack = (target, source) if target in stored_names and source not in stored_names else (source, target)
        if target.endswith("bias"):
            # One bias with two names must count as one parameter.
            _assign(lm, lack, lm.get_parameter(have))
        else:
            _assign(lm, lack, nn.Parameter(lm.get_parameter(have).detach().clone()))
        if have in stored_names:
            found.add(lack)
    return found


def _assign(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, parameter)
