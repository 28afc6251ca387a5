"""Leave-one-out predictions of `lstsq` in closed form: exact, without fitting again."""

import copy
from typing import NoReturn

import numpy as np
from numpy.typing import ArrayLike

from lmntk.errors import KernelMismatchError, SolverError
from lmntk.solvers.candidates import AUTO
from lmntk.solvers.problem import Array, train_directions
from lmntk.solvers.ridge import RidgeSystem, Rows

SURE = 2.0
"""A λ above 1, with which K + λ‖K‖₂ I is positive definite, and so regular without any examples, for every K but 0."""


class LeftOut:
    """Predictions for groups of train examples by `lstsq` fitted to all the other groups, for any λ.

    They are those of really fitting to the others, with the term λ‖K‖₂ of the whole kernel on the diagonal.

    Args:
        kernel: The train kernel, ``[N, C, N, C]``, or ``[2, N, C, N, C]``, of which `lstsq` takes [0].
        groups: The number of each example's group, ``[N]`` integers: examples with equal numbers are left out
            together, such as an example's prompts of several templates. By default each example is a group.

    Attributes:
        system: The regularised kernel, flattened.

    Raises:
        KernelMismatchError: The kernel is not one of train and train, or `groups` has another length.
    """

    def __init__(self, kernel: ArrayLike, groups: ArrayLike | None = None) -> None:
        values = train_directions(kernel)[0]
        self._shape = examples, logits = values.shape[:2]
        self.system = RidgeSystem(values.reshape(examples * logits, -1))
        self._groups = self._rows_by_size(groups)

    def regrouped(self, groups: ArrayLike) -> "LeftOut":
        """Return the same with other groups, without decomposing the kernel again."""
        other = copy.copy(self)
        other._groups = self._rows_by_size(groups)
        return other

    def _rows_by_size(self, groups: ArrayLike | None) -> list[tuple[Rows, Rows]]:
        """Return, for each size of groups, their places among all groups, ``[G]``, and their rows, ``[G, g]``."""
        examples, logits = self._shape
        numbers = np.arange(examples) if groups is None else np.asarray(groups)
        if numbers.shape != (examples,):
            message = f"the kernel has {examples} train examples, but `groups` has the shape {list(numbers.shape)}"
            raise KernelMismatchError(message, shapes=[self._shape, numbers.shape])
        rows = np.arange(examples * logits).reshape(examples, logits)
        by_size: dict[int, list[tuple[int, Rows]]] = {}
        for place, number in enumerate(np.unique(numbers)):
            group = rows[numbers == number].reshape(-1)
            by_size.setdefault(len(group), []).append((place, group))
        return [
            (np.array([place for place, _ in found]), np.stack([group for _, group in found]))
            for found in by_size.values()
        ]

    def predict(self, targets: Array, regularization: float = 0.0) -> Array:
        """Predict each example from the others.

        Args:
            targets: The targets of the train examples less f₀ / s, ``[N, C]``, or ``[N, C, S]`` for S sets of them.
            regularization: λ.

        Returns:
            Predictions of the shape of `targets`; f₀ / s is still to be added.

        Raises:
            SolverError: As `check_defined`.
        """
        self.check_defined(regularization)
        examples, logits = self._shape
        right_sides = targets.reshape(examples * logits, -1)
        predictions = np.empty_like(right_sides)
        for _, groups in self._groups:
            predictions[groups] = self.system.left_out(regularization, right_sides, groups)[groups]
        return predictions.reshape(targets.shape)

    def influence(self, targets: Array, x_kernel: Array, regularization: float = 0.0) -> Array:
        """Return what each group adds to the predictions of other examples: f(x) − f₋g(x), in units of logits.

        Args:
            targets: The targets of the train examples less f₀ / s, ``[N, C]``.
            x_kernel: The kernel of the train examples with the others, ``[N, C, X, C]``.
            regularization: λ.

        Returns:
            float64 ``[G, X, C]``, the groups in the order of their numbers.

        Raises:
            SolverError: As `check_defined`.
        """
        self.check_defined(regularization)
        columns = x_kernel.reshape(targets.size, -1)
        influence = np.empty((sum(len(places) for places, _ in self._groups), columns.shape[1]))
        for places, groups in self._groups:
            influence[places] = self.system.influence(regularization, targets.reshape(-1), groups, columns)
        return influence.reshape(len(influence), *x_kernel.shape[2:])

    def is_defined(self, regularization: float) -> bool:
        """Return whether K + λ‖K‖₂ I is regular, as a whole and without each group: an indefinite one can be singular.

        Args:
            regularization: λ.
        """
        return self.system.is_regular(regularization) and self._others_regular(regularization)

    def check_defined(self, regularization: float) -> None:
        """Refuse a λ with which leave-one-out is not defined, see `is_defined`.

        Args:
            regularization: λ.

        Raises:
            SolverError: Names a λ that would do.
        """
        self.check_regular(regularization)
        if not self._others_regular(regularization):
            self._refuse("without one of its examples the train kernel", regularization, "leave-one-out")

    def check_regular(self, regularization: float, what: str = "leave-one-out") -> None:
        """Refuse a λ with which the kernel as a whole is singular.

        Args:
            regularization: λ.
            what: What is not defined then.

        Raises:
            SolverError: K + λ‖K‖₂ I is singular; names a λ that would do.
        """
        if not self.system.is_regular(regularization):
            self._refuse("the train kernel", regularization, what)

    def _others_regular(self, regularization: float) -> bool:
        return all(self.system.is_regular_without(regularization, groups) for _, groups in self._groups)

    def _refuse(self, singular: str, regularization: float, what: str) -> NoReturn:
        raise SolverError(
            f"{singular} is singular with `kernel_regularization={regularization:g}`, so that {what} is not defined: "
            f"{self.remedy()}",
            solver="lstsq",
            regularization=regularization,
        )

    def remedy(self) -> str:
        """Say with which λ leave-one-out is defined."""
        for number in (*AUTO["kernel_regularization"], SURE):
            if self.is_defined(number):
                return f"take `kernel_regularization={number:g}`"
        return "all values of the kernel are 0; look at the model's weights, or take `select_by=dev`"


def leave_one_out(
    kernel: ArrayLike, targets: Array, regularization: float = 0.0, groups: ArrayLike | None = None
) -> Array:
    """Predict each train example by `lstsq` fitted to all the others, in closed form.

    Args:
        kernel: The train kernel, ``[N, C, N, C]``.
        targets: The targets of the train examples, ``[N, C]``.
        regularization: λ; the others are fitted with the term λ‖K‖₂ of the whole kernel.
        groups: The number of each example's group, ``[N]``: groups are left out as a whole.

    Returns:
        float64 ``[N, C]``.

    Raises:
        SolverError: As `LeftOut.check_defined`.
        KernelMismatchError: The arrays do not match.

    Examples:
        >>> kernel = np.array([[2.0, 1.0], [1.0, 2.0]]).reshape(2, 1, 2, 1)
        >>> leave_one_out(kernel, np.array([[4.0], [-4.0]])).tolist()
        [[-2.0], [2.0]]
    """
    return LeftOut(kernel, groups).predict(targets, regularization)
