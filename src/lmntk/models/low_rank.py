"""LoRA adapters that a kernel is computed of without putting them on the model: which matrices, and the random A."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmntk.errors import SettingError
from lmntk.kernels import LowRankAdapter
from lmntk.models.classifier import PromptClassifier

_STATE = "generator_before_adapters"


@dataclass(frozen=True)
class LowRankSettings:
    """Which adapters a kernel is computed of.

    Attributes:
        rank: The rank r of all matrices.
        alpha: α, whose quotient by the rank scales the product B A.
        targets: The names of the adapted modules, or the ends of their names, as peft's `target_modules`; empty for all
            linear layers whose weights count.
        seed: The seed that the model was loaded with, and from which A comes.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    seed: int = 42

    @property
    def description(self) -> dict[str, Any]:
        """The settings as a kernel's description has them."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets), "seed": self.seed}


def keep_generator_state(encoder: nn.Module) -> None:
    """Note the state of torch's generator at the place where adapters would be drawn, for `draw_adapters`."""
    setattr(encoder, _STATE, torch.get_rng_state())


def draw_adapters(
    model: PromptClassifier, names: Collection[str], settings: LowRankSettings
) -> dict[str, LowRankAdapter]:
    """Draw the A of every adapter as peft draws it for adapters that are put on the same matrices of the model.

    With the query and value projections as targets these are the matrices of the setting `apply_lora` with the same
    seed. The model is not changed, and neither is torch's generator.

    Args:
        model: The model, loaded with the seed of the settings.
        names: The names of the parameters that count.
        settings: The adapters.

    Returns:
        The adapters by the names of the weights, in the order of the model.

    Raises:
        SettingError: No linear layer whose weight counts has such a name.
    """
    modules = dict(adaptable_modules(model, names))
    chosen = [name for name in modules if not settings.targets or _is_named(name, settings.targets)]
    unknown = [end for end in settings.targets if not any(_is_named(name, [end]) for name in modules)]
    if unknown or not chosen:
        if not modules:
            raise SettingError(
                f"`kernel_lora_rank={settings.rank}`: no parameter that counts in this kernel is the weight of a "
                "linear layer, which an adapter could be put on",
                setting="kernel_lora_rank",
                value=settings.rank,
            )
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in modules})) or "none"
        raise SettingError(
            f"`kernel_lora_targets={','.join(settings.targets)}`: {unknown[0]} names no "
            f"linear layer whose weight counts in this kernel; there are {ends}",
            setting="kernel_lora_targets",
            value=",".join(settings.targets),
        )
    drawn = _drawn({name: _shape(modules[name]) for name in chosen}, settings.rank, _state_of(model, settings.seed))
    return {
        f"{name}.weight": LowRankAdapter(
            a.to(modules[name].weight), settings.alpha / settings.rank, isinstance(modules[name], Conv1D)
        )
        for name, a in drawn.items()
    }


def adaptable_modules(model: PromptClassifier, names: Collection[str]) -> list[tuple[str, Any]]:
    """Return the linear layers whose weights count and belong to them alone, by name, in the order of the model."""
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and f"{name}.weight" in names and uses[id(module.weight)] == 1
    ]


def _is_named(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _shape(module: Any) -> tuple[int, int]:
    """Return d_out and d_in."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def matrix_shapes(model: PromptClassifier, names: Collection[str]) -> dict[str, tuple[int, int]]:
    """Return d_out and d_in of each weight that an adapter could be put on, by the weight's name."""
    return {f"{name}.weight": _shape(module) for name, module in adaptable_modules(model, names)}


def _state_of(model: nn.Module, seed: int) -> Tensor:
    found: list[Tensor] = [getattr(module, _STATE) for module in model.modules() if hasattr(module, _STATE)]
    return found[0] if found else torch.Generator().manual_seed(seed).get_state()


def _drawn(shapes: dict[str, tuple[int, int]], rank: int, state: Tensor) -> dict[str, Tensor]:
    """Let peft draw adapters of modules of these shapes, which take no memory; return A ``[r, d_in]`` of each."""
    from peft import LoraConfig, inject_adapter_in_model  # here, since importing peft takes seconds

    skeleton = nn.Module()
    for name, (d_out, d_in) in shapes.items():
        *path, last = name.split(".")
        place = skeleton
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        linear = nn.Linear(d_in, d_out, bias=False, device="meta")
        linear.weight = nn.Parameter(torch.zeros(1).expand(d_out, d_in), requires_grad=False)
        place.add_module(last, linear)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.set_rng_state(state)
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(shapes)), skeleton)
    adapted: dict[str, Any] = dict(skeleton.named_modules())
    return {name: adapted[name].lora_A["default"].weight.detach() for name in shapes}
