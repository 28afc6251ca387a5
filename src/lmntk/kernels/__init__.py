"""Empirical neural tangent kernels of any function of parameters; needs torch only and works in a notebook.

The letters, everywhere in this package:

* ``N`` train examples, the kernel's first axis; ``n`` of them in a tile
* ``X`` examples along the kernel's other axis (train, dev or test); ``x`` of them in a tile
* ``C`` logits of an example; ``D`` directions of a formula (two if it is asymmetric, else one)
* ``G`` parts of the kernel, by parameters, that are kept apart (one if none are)
* ``S`` slices of a block: D of each part, and of each adapter whose kernel is wanted beside them
* ``B`` examples in a batch, ``L`` tokens, ``d`` features, ``p`` numbers in a parameter
* indices: ``i`` and ``j`` of examples, ``a`` and ``b`` of their logits, ``l`` and ``m`` of positions
"""

from lmntk.kernels.assembly import assemble, make_engine
from lmntk.kernels.batching import BatchedExamples, Examples
from lmntk.kernels.empirical import empirical_ntk
from lmntk.kernels.engines import ENGINES, ESTIMATES, Engine
from lmntk.kernels.engines.base import MemoryBudgetError
from lmntk.kernels.formulas import FORMULAS, Formula
from lmntk.kernels.low_rank import LowRankAdapter
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.problem import FunctionModel, KernelProblem, ModuleModel
from lmntk.kernels.projection import Projection
from lmntk.kernels.tiling import Plan, TileRequest
from lmntk.kernels.tuning import Tuning

__all__ = [
    "ENGINES",
    "ESTIMATES",
    "FORMULAS",
    "BatchedExamples",
    "Engine",
    "Examples",
    "Formula",
    "FunctionModel",
    "KernelProblem",
    "LowRankAdapter",
    "MemoryBudget",
    "MemoryBudgetError",
    "ModuleModel",
    "Plan",
    "Projection",
    "TileRequest",
    "Tuning",
    "assemble",
    "empirical_ntk",
    "make_engine",
]
