"""Empirical neural tangent kernels of any function of parameters: torch only, usable alone in a notebook.

The letters, everywhere in this package:

* ``N`` train examples, the kernel's first axis; ``n`` of them in a tile
* ``X`` examples along the kernel's other axis (train, dev or test); ``x`` of them in a tile
* ``C`` logits an example has; ``D`` directions of a formula (two if it is asymmetric, else one)
* ``G`` layers whose parts of the kernel are kept apart (one if none are); ``S`` = G · D slices of a block
* ``B`` examples in a batch, ``L`` tokens, ``d`` features, ``p`` numbers in a parameter
"""

from lmntk.kernels.assembly import assemble, make_engine
from lmntk.kernels.batching import BatchedExamples, Examples
from lmntk.kernels.empirical import empirical_ntk
from lmntk.kernels.engines import ENGINES
from lmntk.kernels.engines.base import Engine, MemoryBudgetError
from lmntk.kernels.formulas import FORMULAS, Formula
from lmntk.kernels.problem import KernelProblem
from lmntk.kernels.tiling import Plan

__all__ = [
    "ENGINES",
    "FORMULAS",
    "BatchedExamples",
    "Engine",
    "Examples",
    "Formula",
    "KernelProblem",
    "MemoryBudgetError",
    "Plan",
    "assemble",
    "empirical_ntk",
    "make_engine",
]
