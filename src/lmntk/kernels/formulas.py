"""The formulas as data: which side of the inner product takes the sign of the gradient.

Malladi et al., "A Kernel-Based View of Language Model Fine-Tuning" (ICML 2023), sections 3 and 4: with
∂f_a(i) the gradient of logit a of example i,

* sgd:               K[i, a, j, b] = Σ_θ ∂f_a(i) · ∂f_b(j)
* signgd:            K[i, a, j, b] = Σ_θ sign ∂f_a(i) · sign ∂f_b(j)
* asymmetric_signgd: K[i, a, j, b] = Σ_θ sign ∂f_a(i) · ∂f_b(j), and the same with the sign on the other side
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SignPlacement:
    """One direction of a kernel: which of its two sides takes the sign of the gradient."""

    sign_train: bool
    sign_x: bool

    @property
    def signed(self) -> bool:
        """Whether a side takes the sign."""
        return self.sign_train or self.sign_x


UNSIGNED = SignPlacement(sign_train=False, sign_x=False)


@dataclass(frozen=True)
class Formula:
    """A formula as engines see it, which never depend on its name.

    Attributes:
        name: The formula's name, a key of `FORMULAS`.
        directions: D kernels that are computed, in the order of the result; any combination and order works.

    Example:
        >>> FORMULAS["asymmetric_signgd"].is_asymmetric, FORMULAS["signgd"].symmetric
        (True, True)
    """

    name: str
    directions: tuple[SignPlacement, ...]

    @property
    def symmetric(self) -> bool:
        """Whether the kernel of a set of examples with itself is symmetric: half of it need not be computed."""
        return all(direction.sign_train == direction.sign_x for direction in self.directions)

    @property
    def signed(self) -> bool:
        """Whether signs are taken at all: they hide NaN and infinity."""
        return any(direction.signed for direction in self.directions)

    @property
    def is_asymmetric(self) -> bool:
        """Whether the kernel carries a leading axis of directions."""
        return len(self.directions) > 1


FORMULAS = {
    formula.name: formula
    for formula in (
        Formula("sgd", (UNSIGNED,)),
        Formula("signgd", (SignPlacement(True, True),)),
        Formula("asymmetric_signgd", (SignPlacement(True, False), SignPlacement(False, True))),
    )
}
