"""How well subsets of the parameters would predict: each one's kernel is a sum of parts that a run has kept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from lmntk.analysis import statistics
from lmntk.analysis.least_squares import LeastSquaresRun
from lmntk.analysis.parameter_subsets import (
    Parts,
    Subset,
    expected_subset,
    own_subset,
    sampled_subsets,
    usual_subsets,
)
from lmntk.analysis.saved_run import SavedRun
from lmntk.errors import FileError, KernelMismatchError, SettingError
from lmntk.solvers.problem import Array
from lmntk.storage.kernel_slices import LORA_KEY, PARTS_KEY

LARGEST_ROUNDING = 1e-9  # of the sum of parts, relative to the kernel's norm
GENERAL_RANK, GENERAL_ALPHA = 8, 16  # those of `apply_lora`
APART = ("query", "value"), ("query-key-value",)
NAN = float("nan")


@dataclass(frozen=True)
class SubsetNumbers:
    """What the kernel of a subset of the parameters is like, and how it predicts.

    Attributes:
        group: What kind of subset it is.
        name: Its name.
        parameters: How many parameters it has; None if the run does not say.
        trace_share: The trace of its train kernel over that of all parameters.
        alignment: The train kernel's centred alignment with the labels.
        effective_rank: The effective rank of the flattened train kernel K, without λ.
        condition: The condition number of the matrix that the solver solves, A = K + λ‖K‖₂ I.
        loo_score: The main metric of leave-one-out; NaN where A is singular.
        loo_loss: The mean squared error of leave-one-out.
        scores: The main metric by split.
    """

    group: str
    name: str
    parameters: int | None
    trace_share: float
    alignment: float = NAN
    effective_rank: float = NAN
    condition: float = NAN
    loo_score: float = NAN
    loo_loss: float = NAN
    scores: Mapping[str, float] = field(default_factory=dict)


def subsets_of(run: SavedRun, own: Sequence[str], lora: Sequence[str], rank: int | None) -> list[Subset]:
    """Return the subsets that a run's parts make, and those that are asked for.

    Args:
        run: The run.
        own: Patterns of parts, as `lmntk.analysis.parameter_subsets.own_subset` takes them, one for each subset.
        lora: Names of adapted layers or kinds, separated by commas, one text for each subset; those of the usual
            adapters if there are none.
        rank: The rank of adapters whose expectation is shown; that of the kept adapters if None.

    Raises:
        FileError: The run has kept neither parts nor kernels of adapters.
        SettingError: The kernel of an adapter that is asked for can be made neither from parts nor from adapters.
        UnknownNameError: A pattern matches no part.
    """
    parts, kept = parts_of_run(run), run.description.get(LORA_KEY)
    if not parts.names and not kept:
        raise FileError(
            f"{run.kernel_folder} holds kernels without parts: compute them with `kernel_parts=layer,kind,"
            "weight-or-bias`, and with `overwrite_kernels=True` in the same folder",
            path=run.kernel_folder,
        )
    found = usual_subsets(parts) if parts.names else []
    chosen = [_names_of_adapters(text) for text in lora]
    usual = chosen or [*([name] for name in _ends(kept or {})), *map(list, APART)]
    of_adapters = sampled_subsets(kept, usual) if kept else []
    rank = rank or (kept or {}).get("rank", GENERAL_RANK)
    alpha = (kept or {}).get("alpha", GENERAL_ALPHA)
    if run.description.get("formula", "sgd") == "sgd":
        expected = [expected_subset(parts, names, rank, alpha) for names in (chosen or APART)]
        of_adapters += [subset for subset in expected if subset is not None]
    for names in chosen:
        if not any(", ".join(names) in subset.name for subset in of_adapters):
            raise SettingError(
                f"`lora={','.join(names)}`: the run has no kernels of adapters on such layers (`kernel_lora_rank` "
                "keeps them), and their expectation needs `kernel_parts` with kind and weight-or-bias, a kernel of "
                "sgd, and kinds whose matrices have inputs of one width; "
                f"this run allows {', '.join(_possible_adapters(run, parts, kept)) or 'none'}",
                setting="lora",
                value=",".join(names),
            )
    return [*found, *of_adapters, *(own_subset(parts, text) for text in own)]


def _names_of_adapters(text: str) -> list[str]:
    names = [word.strip() for word in text.split(",") if word.strip()]
    if not names:
        raise SettingError(
            "`lora` names no layer: give layers or kinds, such as query,value", setting="lora", value=text
        )
    return names


def _possible_adapters(run: SavedRun, parts: Parts, kept: Mapping[str, Any] | None) -> list[str]:
    """Return the layers and kinds whose adapters have a kernel, drawn or expected."""
    kinds = parts.values("kind") if run.description.get("formula", "sgd") == "sgd" else []
    of_parts = [kind for kind in kinds if expected_subset(parts, [kind], GENERAL_RANK, GENERAL_ALPHA) is not None]
    return list(dict.fromkeys([*of_parts, *_ends(kept or {})]))


def _ends(lora: Mapping[str, Any]) -> list[str]:
    """Return the names of the adapted layers without what is before them."""
    return list(dict.fromkeys(name.split(".")[-2] for name in lora.get("parameters", {})))


def parts_of_run(run: SavedRun) -> Parts:
    """Return the names and sizes of the parts of a run's kernels; without names if there are none."""
    keys, names = run.part_names("train")
    said = run.description.get(PARTS_KEY) or {}
    return Parts(keys, names, said.get("parameters") or {}, said.get("matrices") or {})


def measure_subsets(
    found: LeastSquaresRun, subsets: Sequence[Subset], show_progress: bool = False
) -> list[SubsetNumbers]:
    """Compute the numbers of subsets, one after the other: the kernels of one are in memory at a time.

    Args:
        found: The run, and how its kernels predict: λ in units of each subset's own largest singular value.
        subsets: From `subsets_of`.
        show_progress: Whether to show a progress bar.

    Raises:
        KernelMismatchError: The parts do not sum to a kernel.
        FileError: A file is damaged.
    """
    splits = ["train", *found.x_splits]
    slices = {split: _Slices.of(found.run, split) for split in splits}
    for split in splits:
        slices[split].check(found.train.values if split == "train" else found.kernel(split).values)
    whole = _trace(found.train.values)
    bar = tqdm(subsets, desc="subsets", unit="subset", disable=not show_progress)
    # Matrices are small: beside other processes, the threads of a decomposition wait for each other.
    with threadpool_limits(limits=1):
        return [_measure(found, subset, slices, whole) for subset in bar]


@dataclass(frozen=True)
class _Slices:
    """The parts and adapters' kernels of one split, read from disk where they are used."""

    split: str
    parts: Mapping[str, Array]
    adapters: Mapping[str, Array]

    @classmethod
    def of(cls, run: SavedRun, split: str) -> "_Slices":
        return cls(split, run.part_kernels(split), run.lora_kernels(split))

    def check(self, kernel: Array) -> None:
        """Check that the parts sum to the kernel."""
        if not self.parts:
            return
        total = self.sum(Subset("", "", dict.fromkeys(self.parts, 1.0)))
        if total.shape != kernel.shape or np.linalg.norm(total - kernel) > LARGEST_ROUNDING * np.linalg.norm(kernel):
            raise KernelMismatchError(
                f"the parts of the {self.split} kernel do not sum to it: compute both again with "
                "`overwrite_kernels=True`",
                differences=[PARTS_KEY],
            )

    def sum(self, subset: Subset) -> Array:
        """Return the kernel of a subset, float64 ``[N, C, X, C]`` or ``[2, N, C, X, C]``."""
        total: Array | None = None
        terms = [(self.parts, name, weight) for name, weight in subset.weights.items()]
        terms += [(self.adapters, name, 1.0) for name in subset.adapters]
        for values, name, weight in terms:
            if name not in values:
                raise KernelMismatchError(
                    f"the {self.split} kernel lacks {name}, which that of train has: compute both again with "
                    "`overwrite_kernels=True`",
                    differences=[name],
                )
            total = weight * values[name] if total is None else np.add(total, weight * values[name], out=total)
        assert total is not None
        return total


def _measure(found: LeastSquaresRun, subset: Subset, slices: Mapping[str, _Slices], whole: float) -> SubsetNumbers:
    kernel = slices["train"].sum(subset)
    trace = _trace(kernel)
    none = SubsetNumbers(subset.group, subset.name, subset.parameters, trace / whole if whole else NAN)
    if not np.any(kernel):
        return none
    problem = replace(found.problem, kernel=kernel)
    system = problem.left_out.system  # decomposed once: for the spectrum, the condition and leave-one-out
    scores = {}
    for split in found.x_splits:
        scores[split] = found.score(split, found.predict(split, problem, slices[split].sum(subset)))
    loo_score, loo_loss = NAN, NAN
    if problem.has_leave_one_out:
        loo_score = found.score("train", problem.leave_one_out())
        loo_loss = problem.leave_one_out_loss()
    matrix = found.train.average_over_samples(statistics.logit_differences(kernel))
    classes = problem.classes
    targets = statistics.one_hot(classes, int(classes.max()) + 1)
    return replace(
        none,
        alignment=statistics.alignment(matrix, targets @ targets.T),
        effective_rank=statistics.effective_rank(system.singular_values),
        condition=system.condition(problem.settings.regularization),
        loo_score=loo_score,
        loo_loss=loo_loss,
        scores=scores,
    )


def _trace(kernel: Array) -> float:
    """Return the trace of a train kernel, both directions together."""
    return float(np.einsum("...iaia->...", kernel).sum())


def is_singular(numbers: SubsetNumbers) -> bool:
    """Whether a subset has a kernel that predicts, but no leave-one-out."""
    return not math.isnan(numbers.condition) and math.isnan(numbers.loo_score)
