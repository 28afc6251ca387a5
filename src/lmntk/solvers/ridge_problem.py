"""The least-squares problem of `lstsq` as one value: its kernel, targets and λ, and what follows in closed form."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmntk.errors import KernelMismatchError
from lmntk.solvers import FittedSolver, fit
from lmntk.solvers.leave_one_out import LeftOut
from lmntk.solvers.problem import (
    Array,
    ClassIds,
    FitInputs,
    Prediction,
    SolverSettings,
    check_fit_inputs,
    divided_f0,
    squared_error,
    targets,
    train_directions,
)


@dataclass(frozen=True, eq=False)
class RidgeProblem:
    """What `lstsq` fits: with A = K + λ‖K‖₂ I, the solution is α = A⁻¹ (y − f₀/s).

    An example may have several samples, such as one for each template. They are rows of the kernel sample by sample:
    all examples with the first template, then all with the second. They leave together, and their logits are averaged.

    Attributes:
        kernel: The train kernel, float64 ``[N, C, N, C]`` or ``[2, N, C, N, C]``, of which `lstsq` takes [0].
        labels: The labels as kernel files have them, ``[N]``: class ids, or -1 and +1 when C = 1.
        settings: λ, and s of f₀/s.
        f0: The untrained model's logits, ``[N, C]``, if the solver fits around them.
        samples: How many rows of the kernel each example has.
    """

    kernel: Array
    labels: Array
    settings: SolverSettings = dataclasses.field(default_factory=SolverSettings)
    f0: Array | None = None
    samples: int = 1

    @property
    def num_examples(self) -> int:
        """The number of train examples E; the kernel has N = E · samples."""
        return len(self.labels) // self.samples

    @property
    def num_logits(self) -> int:
        """C."""
        return self.kernel.shape[-1]

    @functools.cached_property
    def classes(self) -> ClassIds:
        """The class id of each example, ``[E]``."""
        return self._inputs.classes[: self.num_examples]

    @functools.cached_property
    def targets(self) -> Array:
        """y, ``[N, C]``: one-hot, or -1 and +1 when C = 1."""
        return targets(self._inputs.classes, self.num_logits)

    @functools.cached_property
    def offset(self) -> Array:
        """f₀/s, ``[N, C]``; 0 without f₀."""
        return self._inputs.f0_offset

    @functools.cached_property
    def left_out(self) -> LeftOut:
        """Leave-one-out of whole examples: the samples of one are a group."""
        return LeftOut(self.kernel, self.rows_of(range(self.num_examples)))

    @property
    def is_regular(self) -> bool:
        """Whether A has full rank in float64."""
        return self.left_out.system.is_regular(self.settings.regularization)

    @property
    def has_leave_one_out(self) -> bool:
        """Whether leave-one-out is defined: A has full rank, and without each example too."""
        return self.left_out.is_defined(self.settings.regularization)

    def rows_of(self, values: Sequence[int] | ArrayLike) -> NDArray[Any]:
        """Repeat what each example has for each of its rows: ``[E]`` → ``[N]``."""
        return np.tile(np.asarray(values), self.samples)

    def leave_one_out(self, groups: ArrayLike | None = None) -> Array:
        """Predict each example by `lstsq` fitted to all others, or to all other groups, with λ‖K‖₂ of the whole kernel.

        Args:
            groups: The number of each example's group, ``[E]``; by default each example is a group.

        Returns:
            Logits, float64 ``[E, C]``, mean over samples.

        Raises:
            SolverError: A is singular, or is so without an example or group; names a λ that would do.
        """
        return self.mean_over_samples(self._left_out_rows(self.left_out_groups(groups)))

    def leave_one_out_loss(self) -> float:
        """Return the mean squared error of leave-one-out over all rows, as the losses of splits are."""
        return squared_error(self._left_out_rows(self.left_out), self.targets)

    def left_out_groups(self, groups: ArrayLike | None) -> LeftOut:
        """Return `left_out`, or that of other groups of examples.

        Args:
            groups: The number of each example's group, ``[E]``; None: each example is a group.
        """
        if groups is None:
            return self.left_out
        if np.shape(groups) != (self.num_examples,):
            message = f"there are {self.num_examples} train examples, but `groups` has the shape {[*np.shape(groups)]}"
            raise KernelMismatchError(message, shapes=[(self.num_examples,), np.shape(groups)])
        return self.left_out.regrouped(self.rows_of(groups))

    def mean_over_samples(self, rows: Array) -> Array:
        """Average over the samples of each train example: ``[N, C]`` → ``[E, C]``."""
        return rows.reshape(self.samples, self.num_examples, -1).mean(axis=0)

    def gcv(self) -> float:
        """Return the generalised cross-validation score, a mean over the n = N·C rows.

        It is n ‖(I − H)(y − f₀/s)‖² / tr(I − H)², where H = KᵀA⁻¹ gives the predictions of the train examples: Golub,
        Heath and Wahba 1979, "Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter". For λ = 0
        and a symmetric kernel it is the limit of ever smaller λ.

        It takes the rows for independent observations, which the samples of an example are not: each predicts the
        others, and the score is far below the loss on new examples.

        Returns:
            The score; NaN where examples have several samples, and where tr(I − H) is 0.

        Raises:
            SolverError: A is singular; names a λ that would do.
        """
        regularization = self.settings.regularization
        self.left_out.check_regular(regularization, "generalised cross-validation")
        if self.samples > 1:
            return float("nan")
        return self.left_out.system.gcv(regularization, (self.targets - self.offset).reshape(-1, 1))

    def restricted_to(self, examples: Sequence[int] | ArrayLike, kernel: Array | None = None) -> "RidgeProblem":
        """Return the problem of some of the examples: a sub-matrix, whose own norm scales λ.

        Args:
            examples: Their indices, in the order that the result has.
            kernel: Another train kernel of all examples, such as that of some parameters.
        """
        rows = self._rows(examples)
        whole = self.kernel if kernel is None else kernel
        part = np.take(np.take(whole, rows, axis=-4), rows, axis=-2)
        f0 = None if self.f0 is None else self.f0[rows]
        return dataclasses.replace(self, kernel=part, labels=self.labels[rows], f0=f0)

    def restrict(self, x_kernel: Array, examples: Sequence[int] | ArrayLike) -> Array:
        """Return the rows of some train examples of a kernel of train and X, ``[..., N, C, X, C]``."""
        return np.take(x_kernel, self._rows(examples), axis=-4)

    def predict(self, x_kernel: Array, x_labels: Array, x_f0: Array | None = None, x_split: str = "X") -> Prediction:
        """Predict X examples; arguments, result and errors are those of `FittedSolver.predict`."""
        return self._fitted.predict(x_kernel, x_labels, x_f0 if self.f0 is not None else None, x_split)

    def _left_out_rows(self, left_out: LeftOut) -> Array:
        """Predict each row by leave-one-out, ``[N, C]``."""
        return left_out.predict(self.targets - self.offset, self.settings.regularization) + self.offset

    def _rows(self, examples: Sequence[int] | ArrayLike) -> NDArray[np.int64]:
        indices = np.asarray(examples, dtype=np.int64)
        return (np.arange(self.samples)[:, None] * self.num_examples + indices).reshape(-1)

    @functools.cached_property
    def _fitted(self) -> FittedSolver:
        return fit("lstsq", self.kernel, self.labels, self.settings, self.f0)

    @functools.cached_property
    def _inputs(self) -> FitInputs:
        plain = check_fit_inputs(train_directions(self.kernel), self.labels, None, self.settings)
        offset = divided_f0(self.f0, plain.f0_offset.shape, self.settings.f0_scaling, "train")
        return dataclasses.replace(plain, f0_offset=offset)
