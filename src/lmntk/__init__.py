"""The empirical neural tangent kernel of language-model prompts, and what it predicts.

`empirical_ntk` and `linearised` need torch and numpy; `KernelClassifier` needs the packages of
``pip install lmntk[lm]``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmntk.experiment.kernel_classifier import KernelClassifier
    from lmntk.kernels import empirical_ntk
    from lmntk.kernels.linearised import linearised

__version__ = "0.1.0"
__all__ = ["KernelClassifier", "__version__", "empirical_ntk", "linearised"]

_HOMES = {
    "KernelClassifier": "lmntk.experiment.kernel_classifier",
    "empirical_ntk": "lmntk.kernels",
    "linearised": "lmntk.kernels.linearised",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lmntk' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if name == "KernelClassifier" and not (error.name or "").startswith("lmntk"):
            raise ModuleNotFoundError(
                f"KernelClassifier needs {error.name}: pip install 'lmntk[lm]'", name=error.name
            ) from error
        raise
