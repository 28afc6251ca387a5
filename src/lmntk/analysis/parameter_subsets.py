"""Subsets of the parameters as sums of a kernel's parts: which ones there are, and those that a user writes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lmntk.errors import SettingError, UnknownNameError
from lmntk.storage.part_names import KINDS, layer_number, split_part_name

LAYERS, KINDS_GROUP, LAST, BIASES, LEFT_OUT, LORA, OWN = (
    *("layers", "kinds", "last layers", "weights and biases", "left out", "LoRA", "own"),
)
WHOLE = "all parameters"
VARIANCE_OF_KAIMING = 1 / 3
"""Times 1 / d_in: the variance of an entry of A as peft draws it, uniformly within ± 1/√d_in."""


@dataclass(frozen=True)
class Subset:
    """A kernel as a weighted sum of what lies beside a run's kernels.

    Attributes:
        group: What kind of subset it is.
        name: Its name in tables.
        weights: The weight of each part.
        adapters: The adapters' kernels that are summed, by the names of their weights.
        parameters: How many parameters it has; None if the run does not say.
    """

    group: str
    name: str
    weights: Mapping[str, float]
    adapters: tuple[str, ...] = ()
    parameters: int | None = None


@dataclass(frozen=True)
class Parts:
    """The parts of a run's kernels.

    Attributes:
        keys: What their parameters are told apart by.
        names: Their names, from the input to the head.
        sizes: How many parameters each has; empty if the run does not say.
        matrices: d_out and d_in of each weight, of the parts that hold weights of linear layers alone.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    sizes: Mapping[str, int]
    matrices: Mapping[str, Sequence[Sequence[int]]]

    def subset(self, group: str, name: str, chosen: Iterable[str]) -> Subset:
        """Return the subset of some parts."""
        own = list(chosen)
        known = all(part in self.sizes for part in own)
        return Subset(
            group, name, dict.fromkeys(own, 1.0), (), sum(self.sizes[part] for part in own) if known else None
        )

    def where(self, key: str, *values: str) -> list[str]:
        """Return the parts whose layer, kind, or weight or bias is one of some."""
        return [name for name in self.names if split_part_name(name, self.keys)[key] in values]

    def values(self, key: str) -> list[str]:
        """Return the layers, kinds, or weight and bias, that there are, in the order of the parts; [] without it."""
        if key not in self.keys:
            return []
        return list(dict.fromkeys(split_part_name(name, self.keys)[key] for name in self.names))


def usual_subsets(parts: Parts) -> list[Subset]:
    """Return all parameters, each layer, each kind, the last layers, biases and weights, and what leaves parts out."""
    found = [parts.subset("", WHOLE, parts.names)]
    layers = parts.values("layer")
    found += [parts.subset(LAYERS, layer, parts.where("layer", layer)) for layer in layers]
    kinds = [kind for kind in KINDS if kind in parts.values("kind")]
    found += [parts.subset(KINDS_GROUP, kind, parts.where("kind", kind)) for kind in kinds]
    numbered = [layer for layer in layers if layer_number(layer) is not None]
    for count in range(len(numbered) + 1):
        # What follows the layers belongs to the last of them: the norm behind them, and the head.
        place = layers.index(numbered[-count]) if count else layers.index(numbered[-1]) + 1 if numbered else len(layers)
        name = {0: "what follows the layers", 1: "last layer and what follows"}.get(count)
        name = name or f"last {count} layers and what follows"
        found.append(parts.subset(LAST, name, parts.where("layer", *layers[place:])))
    names = {"bias": "biases", "weight": "weights"}
    found += [
        parts.subset(BIASES, names[own], parts.where("weight-or-bias", own))
        for own in sorted(parts.values("weight-or-bias"))
        if len(parts.values("weight-or-bias")) > 1
    ]
    for what, ends in (("embeddings", ("embeddings", "embedding")), ("head", ("head", "head"))):
        key, value = ("layer", ends[0]) if "layer" in parts.keys else ("kind", ends[1])
        if value in parts.values(key):
            left_out = parts.where(key, value)
            rest = [name for name in parts.names if name not in left_out]
            if rest:
                found.append(parts.subset(LEFT_OUT, f"without {what}", rest))
    return [subset for subset in found if subset.weights]


def own_subset(parts: Parts, patterns: str) -> Subset:
    """Return the subset of the parts that match a pattern of the shell.

    Args:
        parts: The parts.
        patterns: Patterns such as ``layer.3/*/bias``, separated by commas; ``*`` stands for any letters, / included.

    Raises:
        SettingError: A pattern is blank.
        UnknownNameError: A pattern matches no part.
    """
    chosen: dict[str, None] = {}
    for pattern in patterns.split(","):
        own = [name for name in parts.names if fnmatchcase(name.replace(" ", "."), pattern.strip())]
        if not own:
            if not pattern.strip():
                sentence = "`subset` has a blank pattern: give patterns of parts, such as layer.3/*"
                raise SettingError(sentence, setting="subset", value=patterns)
            shown = "; ".join(f"{key}: {', '.join(parts.values(key))}" for key in parts.keys)
            raise UnknownNameError(
                f"`subset={patterns}`: {pattern.strip()!r} matches none of the parts, whose names are "
                f"{'/'.join(parts.keys)} with {shown}",
                name=pattern,
                kind="part",
                options=list(parts.names),
            )
        chosen |= dict.fromkeys(own)
    return parts.subset(OWN, patterns, [name for name in parts.names if name in chosen])


def sampled_subsets(lora: Mapping[str, Any], chosen: Sequence[Sequence[str]]) -> list[Subset]:
    """Return the kernels of adapters with the A that was drawn: on all matrices, and on chosen ones.

    Args:
        lora: What a kernel's description says of the adapters.
        chosen: Ends of names of the adapted layers, a list for each subset.
    """
    sizes = lora["parameters"]
    layer_of = {name: name.removesuffix(".weight") for name in sizes}
    wanted: dict[str, tuple[str, ...]] = {}
    for ends in chosen:
        own = tuple(name for name in sizes if any(f".{layer_of[name]}".endswith(f".{end}") for end in ends))
        wanted |= {", ".join(ends): own} if own else {}
    if tuple(sizes) not in wanted.values():
        wanted = {"all matrices": tuple(sizes), **wanted}
    return [
        Subset(LORA, f"LoRA rank {lora['rank']}, {name}, drawn", {}, own, sum(sizes[one] for one in own))
        for name, own in wanted.items()
    ]


def expected_subset(parts: Parts, chosen: Sequence[str], rank: int, alpha: float) -> Subset | None:
    """Return the expectation over A of the kernel of adapters on all matrices of some kinds, at their start.

    With B = 0 and entries of A of mean 0 and variance 1 / (3 d_in), E[K] = (α/r)² · r / (3 d_in) · K of the weight: the
    gradient of B is (α/r) ∂f/∂W Aᵀ, and E[AᵀA] = r / (3 d_in) · I.

    Args:
        parts: The parts.
        chosen: Kinds.
        rank: The rank r.
        alpha: α.

    Returns:
        The subset; None if there are no such kinds, or a part of theirs does not hold weights of one d_in alone.
    """
    if not {"kind", "weight-or-bias"} <= {*parts.keys} or not {*chosen} <= {*parts.values("kind")}:
        return None
    weights: dict[str, float] = {}
    count = 0
    for name in parts.where("kind", *chosen):
        if split_part_name(name, parts.keys)["weight-or-bias"] != "weight":
            continue
        shapes = parts.matrices.get(name, [])
        inputs = {d_in for _, d_in in shapes}
        if len(inputs) != 1:
            return None
        weights[name] = alpha**2 / rank * VARIANCE_OF_KAIMING / inputs.pop()
        count += sum(rank * (d_out + d_in) for d_out, d_in in shapes)
    return Subset(LORA, f"LoRA rank {rank}, {', '.join(chosen)}, expected", weights, (), count) if weights else None
