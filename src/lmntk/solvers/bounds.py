"""The values that the solvers' numbers can take."""

from lmntk.errors import Bounds

SOLVER_BOUNDS = {
    # With more, float64 has nothing left of the kernel beside its diagonal.
    "regularization": Bounds("kernel_regularization", 0, 1e12),
    "gamma": Bounds("kernel_gamma", 1e-100, 1e100),
    "lambda_": Bounds("kernel_lambda", 0, 1),
    "f0_scaling": Bounds("f0_scaling", 1e-100, 1e100, or_zero=True),
}
"""By the names of `lmntk.solvers.problem.SolverSettings`. Beyond 1e±100 squares are infinite, or 0."""

LARGEST_IN_KERNEL = Bounds("", 1e-100, 1e100, or_zero=True)
"""The largest absolute value of a kernel, for the same reason."""

MOST_OF_F0 = 1e50
"""The largest of the untrained model's logits over `f0_scaling`: `asym` multiplies two of them and a kernel's value."""
