"""RMSNorm in the model's own dtype: that of transformers computes in float32, so that float64 loses half its digits."""

import copy

import torch
from torch import nn


def use_plain_rms_norms(model: nn.Module) -> None:
    """Replace the RMSNorms of transformers by torch's if they give the same, under the same names.

    Other norms stay, such as Gemma's, which adds one to its weights.
    """
    for name, module in list(model.named_modules()):
        plain = _plain_of(module)
        if plain is not None:
            model.set_submodule(name, plain)


def _plain_of(module: nn.Module) -> nn.RMSNorm | None:
    """Return torch's RMSNorm with a module's weights; None if the module computes anything else."""
    eps = getattr(module, "variance_epsilon", None)
    own = dict(module.named_parameters())
    if eps is None or list(own) != ["weight"] or own["weight"].dim() != 1 or type(module) is nn.RMSNorm:
        return None
    weight = own["weight"]
    plain = nn.RMSNorm(len(weight), eps=eps, device=weight.device, dtype=weight.dtype)
    plain.weight = module.weight  # type: ignore[assignment]
    # Two vectors; eps matters for the shorter one.
    probe = torch.linspace(-1, 2, 2 * len(weight), dtype=torch.float32, device=weight.device).view(2, -1).sin()
    probe[1] *= eps**0.5
    try:
        with torch.no_grad():
            # With weights near zero any two norms would agree.
            found, wanted = (_with_weights_of_one(norm)(probe) for norm in (plain, module))
    except Exception:  # another norm may need more arguments: a gate, the shape of heads
        return None
    same = torch.allclose(found, wanted, rtol=1e-4, atol=1e-7)
    return plain.train(module.training) if same else None


def _with_weights_of_one(norm: nn.Module) -> nn.Module:
    """Return a copy of a norm in float32, its weights set to one."""
    copied = copy.deepcopy(norm).float()
    for parameter in copied.parameters():
        parameter.fill_(1.0)
    return copied
