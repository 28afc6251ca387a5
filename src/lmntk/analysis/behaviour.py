"""Whether the kernel describes fine-tuning: the numbers of one seed, one row over seeds, and verdicts.

Letters as in `lmntk.solvers.problem`. θ₀ is the pre-trained model and θ_T the fine-tuned one; f₀, f_FT and f_lin are
the logits of both and of the model linearised at θ₀, f_lin(x) = f(x; θ₀) + ⟨∂f(x; θ₀)/∂θ, θ_T − θ₀⟩; K₀ and K_T are the
kernels of the train examples at both. A score is the main metric of the task: accuracy, or F1 for MRPC and QQP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lmntk.analysis.saved_run import SavedRun


@dataclass(frozen=True)
class Thresholds:
    """What decides the verdicts.

    Attributes:
        ratio: The least score of the kernel over that of fine-tuning.
        recovery: The least share of fine-tuning's gain that the linearised model has too.
        distance: What the mean of |K_T − K₀| / |K₀| over the entries stays below.
        standard_errors: How many standard errors of the test set a score must be above another to count as above it.
    """

    ratio: float = 0.9
    recovery: float = 0.5
    distance: float = 2.0
    standard_errors: float = 2.0


@dataclass(frozen=True)
class KernelDistances:
    """How far a kernel A is from another, B; for an asymmetric kernel over the entries of both directions.

    Attributes:
        mean: The mean of |A − B| / |B| over the entries.
        median: Their median.
        near_zero: How many entries of B are near zero, below 10⁻³ of the mean |B|: they make the mean explode.
        entries: How many entries there are.
        frobenius: ‖A − B‖ / ‖B‖.
        cka: Centred kernel alignment of the kernels of the logits' differences.
    """

    mean: float
    median: float
    near_zero: int
    entries: int
    frobenius: float
    cka: float


@dataclass(frozen=True)
class SeedBehaviour:
    """The numbers of one seed; scores and shares are fractions.

    Attributes:
        task: The key of the task.
        metric: The name of the score, ``"acc"``.
        split: The split that is predicted.
        examples: How many examples it has.
        seed: The seed of the split of the data, or of the run; None if neither is recorded.
        formula: The kernel's formula; empty if unknown.
        optimizer: What trained θ_T; empty if unknown.
        last_step: T.
        pretrained: The score of the model as it is, acc_PT.
        kernel: The score of the kernel, acc_K.
        kernel_with_f0: The same around f₀, acc_K+f0; None without such a run.
        linearised: The score of the linearised model at θ_T, acc_lin.
        finetuned: The score of the fine-tuned model, acc_FT.
        constant: The score of the best constant prediction.
        errors: The standard errors of the scores ``"kernel"`` and ``"finetuned"``, and of ``"gain"``, the difference
            acc_FT − acc_PT on the same examples.
        logits_distance: ‖f_FT − f_lin‖ / ‖f_FT − f₀‖ on the split.
        equal_predictions: The share of examples to which f_lin and f_FT give the same class.
        agreement: The share of examples to which the kernel and f_FT give the same class.
        chi: The mean of 1 − p_y at θ₀ on train.
        distances: How far K_T is from K₀; None if the snapshots have no kernels.
    """

    task: str
    metric: str
    split: str
    examples: int
    seed: int | None
    formula: str
    optimizer: str
    last_step: int
    pretrained: float
    kernel: float
    kernel_with_f0: float | None
    linearised: float
    finetuned: float
    constant: float
    errors: dict[str, float]
    logits_distance: float
    equal_predictions: float
    agreement: float
    chi: float
    distances: KernelDistances | None


@dataclass(frozen=True)
class Verdict:
    """The answer to one question, and why there is none.

    Attributes:
        answer: ``"yes"``, ``"no"`` or ``"undecided"``.
        reason: Why it is undecided; else empty.
    """

    answer: Literal["yes", "no", "undecided"]
    reason: str = ""

    def __str__(self) -> str:
        """``yes``, ``no``, or ``undecided: reason``."""
        return f"{self.answer}: {self.reason}" if self.reason else self.answer


@dataclass(frozen=True)
class BehaviourRow:
    """The numbers of a task over seeds, and the verdicts.

    Attributes:
        name: What to call the row, such as the task.
        seeds: The numbers of each seed.
        thresholds: What decided the verdicts.
        solves: Condition 1, the kernel solves the task.
        linear: Condition 2, the linearised model has what fine-tuning gains.
        fixed: Condition 3, the features are fixed: the kernel moves little.
        whole: All three.
    """

    name: str
    seeds: tuple[SeedBehaviour, ...]
    thresholds: Thresholds
    solves: Verdict
    linear: Verdict
    fixed: Verdict
    whole: Verdict


def seed_behaviour(
    training: SavedRun, kernel: SavedRun, with_f0: SavedRun | None = None, split: str = "test"
) -> SeedBehaviour:
    """Compute the numbers of one seed.

    Args:
        training: A run whose folder has snapshots of the steps 0 and T.
        kernel: A run with predictions from the kernel at θ₀; it may be the same run.
        with_f0: The same, fitted around f₀.
        split: The split that is predicted.

    Raises:
        FileError: A snapshot or the predictions are missing or damaged.
        KernelMismatchError: The runs are of different data, models, prompts or parameters.
    """
    raise NotImplementedError


def behaviour_row(name: str, seeds: Sequence[SeedBehaviour], thresholds: Thresholds) -> BehaviourRow:
    """Decide over seeds whether the kernel describes fine-tuning.

    Args:
        name: What to call the row.
        seeds: The numbers of each seed, at least one.
        thresholds: What decides.
    """
    raise NotImplementedError
