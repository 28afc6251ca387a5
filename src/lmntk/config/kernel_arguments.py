"""The flags of the kernel: its formula, solver, parameters and engine."""

from dataclasses import dataclass
from typing import Any

from lmntk.config.flag_fields import flag
from lmntk.config.kernel_steps import KernelSteps
from lmntk.errors import SettingError, check_numbers
from lmntk.kernels.contraction import NUMBER_TYPES
from lmntk.kernels.engines import ENGINES, ESTIMATES, projection_of
from lmntk.kernels.formulas import FORMULAS
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.projection import DEFAULT_WIDTH, Projection
from lmntk.kernels.projection_check import DEFAULT_EXAMPLES
from lmntk.solvers import SOLVERS
from lmntk.solvers.blocked import DEFAULT_TOLERANCE, METHODS
from lmntk.solvers.bounds import SOLVER_BOUNDS
from lmntk.solvers.candidates import AUTO, read_candidates, settings_grid, used_settings
from lmntk.solvers.problem import SolverSettings
from lmntk.storage.part_names import PART_KEYS, read_part_keys


def candidates_flag(help: str, default: float, setting: str) -> Any:
    """Return the field of a flag that takes a number, a list of candidates, or ``auto``."""
    words = ",".join(f"{number:g}" for number in AUTO[setting])
    return flag(f"{help} A list without spaces, or auto ({words}): --select_by chooses.", default)


@dataclass
class KernelArguments:
    """The kernel, how it is computed, and the solver."""

    _argument_group_name = "Kernels"

    kernel_formula: str = flag(
        "Inner product of the gradients (sgd), of their signs (signgd), of signs with gradients (asymmetric_signgd).",
        "sgd",
        FORMULAS,
    )
    kernel_solver: str = flag(
        "How to predict from the kernel: " + "; ".join(f"{name}: {row.summary}" for name, row in SOLVERS.items()) + ".",
        "lstsq",
        SOLVERS,
    )
    lstsq_method: str = flag(
        "How lstsq solves: "
        + "; ".join(f"{name}: {words}" for name, words in METHODS.items())
        + ". cholesky and cg read the kernel from its file, and need it positive definite. auto: direct where it fits "
        "into memory, else cholesky.",
        "auto",
        ("auto", *METHODS),
    )
    cg_tolerance: float = flag(
        "For --lstsq_method cg: stop where the residual is at most this part of the targets.", DEFAULT_TOLERANCE
    )
    flattened_targets: bool = flag(
        "For logistic and svc with several logits: fit one model of two classes to the flattened kernel and one-hot "
        "targets.",
        False,
    )
    binary_classification: bool = flag(
        "Use one logit, that of the second label word minus that of the first; two classes only.", False
    )
    kernel_regularization: float | str = candidates_flag(
        "Term added to the kernel's diagonal, in units of its largest singular value.",
        SolverSettings.regularization,
        "kernel_regularization",
    )
    kernel_gamma: float | str = candidates_flag(
        "Weight of the errors in the asym solver.", SolverSettings.gamma, "kernel_gamma"
    )
    kernel_lambda: float | str = candidates_flag(
        "Weight of the first kernel in the asym solver's predictions, 0 to 1.", SolverSettings.lambda_, "kernel_lambda"
    )
    select_by: str = flag(
        "How to choose among candidates of --kernel_regularization, --f0_scaling, --kernel_gamma and --kernel_lambda: "
        "dev: by the score on dev; loo: by exact leave-one-out, for lstsq.",
        "dev",
        ("dev", "loo"),
    )
    adjust_for_init: bool = flag("Fit the residuals of the untrained model's logits, and add the logits back.", False)
    f0_scaling: float | str = candidates_flag(
        "Divisor of the untrained logits for --adjust_for_init; 0: no adjustment.",
        SolverSettings.f0_scaling,
        "f0_scaling",
    )
    kernel_per_layer: bool = flag(
        "Also save each layer's part of the kernel, and report how well it predicts on its own.", False
    )
    kernel_parts: str | None = flag(
        f"Also save the kernel in parts that sum to it, told apart by {','.join(PART_KEYS)} of the parameters or some "
        "of these; lmntk subsets makes kernels of subsets of the parameters from them."
    )
    kernel_lora_rank: int | None = flag(
        "Also save the kernels of new LoRA adapters of this rank on each linear layer, which are not put on the model; "
        "their scale is that of --lora_alpha."
    )
    kernel_lora_targets: str | None = flag(
        "The layers of --kernel_lora_rank: a list of names, or ends of names, such as query,value; default: all."
    )
    kernel_influence: bool = flag(
        "For lstsq: also write what single train examples do to the predictions (influence_<split>_<task>.csv), as "
        "lmntk influence does.",
        False,
    )
    kernel_variance: bool = flag(
        "Also report how sure the predictions are, from the Gaussian process of lstsq: nll and ece, and a table of "
        "standard deviations and class probabilities.",
        False,
    )
    load_kernels: str | None = flag("Take the kernels from this output folder of an earlier run.")
    overwrite_kernels: bool = flag("Compute the kernels in the output folder again.", False)
    exclude_embeddings: bool = flag("Leave out the gradients of the embeddings and their LayerNorm.", False)
    exclude_head: bool = flag("Leave out the gradients of the language-model or classification head.", False)
    only_biases: bool = flag("Use the gradients of biases alone.", False)
    exclude_first_layers: int = flag("Leave out the gradients of the first n layers.", 0)
    kernel_engine: str = flag(
        "factored: layer by layer, fastest; jacobian: whole gradients; jvp: the published method, least memory; auto: "
        "factored. All of these take any model and agree. projected: an estimate, for thousands of examples.",
        "auto",
        ("auto", *ENGINES, *ESTIMATES),
    )
    projection_width: int | None = flag(
        "For --kernel_engine projected: the numbers that are left of each side of a weight's gradient; default: "
        f"{DEFAULT_WIDTH}."
    )
    projection_seed: int = flag("For --kernel_engine projected: the seed of the random matrices.", 0)
    projection_check: int = flag(
        "For --kernel_engine projected: the examples of each side on which its error is measured.", DEFAULT_EXAMPLES
    )
    projection_tolerance: float | None = flag(
        "For --kernel_engine projected: choose the smallest width whose relative error, measured on train, is at most "
        "this, such as 0.05; with --projection_width, refuse that width if its error is larger."
    )
    kernel_dtype: str = flag(
        "Number type of the model, and so of its gradients. bfloat16, for sgd, has a percent of error and half the "
        "memory, and is faster on processors with instructions for it.",
        "float32",
        NUMBER_TYPES,
    )
    kernel_memory_gb: float | None = flag(
        f"Memory for kernels, in GB; default: {MemoryBudget.DEFAULT_FRACTION:.0%}% of the free memory."
    )
    kernel_steps: str | None = flag(
        "Training steps of which to keep a snapshot, a list such as 0,1,2,5,10,last: logits, those of the model "
        "linearised at the start, and the kernel of train; last is the model that is evaluated."
    )
    fine_tuned_model: str | None = flag(
        "Folder that fine-tuning has saved: also write snapshots, as of --kernel_steps 0,last, of the model before and "
        "after that training."
    )
    dry_run: bool = flag("Estimate time, memory and disk space of the kernels, and exit.", False)

    @property
    def part_keys(self) -> tuple[str, ...]:
        """What parameters are told apart by in the parts of the kernel that are kept; empty if none are."""
        if self.kernel_parts is not None:
            return read_part_keys(self.kernel_parts)
        return ("layer",) if self.kernel_per_layer else ()

    @property
    def projection(self) -> Projection | None:
        """How the kernel is estimated; None for an exact one."""
        return projection_of(self.kernel_engine, self.projection_width, self.projection_seed)

    @property
    def snapshot_steps(self) -> KernelSteps | None:
        """The training steps of which snapshots are kept; None without `kernel_steps`."""
        return None if self.kernel_steps is None else KernelSteps.parse(self.kernel_steps)

    def read_solver_settings(self) -> None:
        """Read the settings that may have candidates: one number becomes a number, several stay text."""
        for setting in AUTO:
            candidates = read_candidates(setting, getattr(self, setting))
            if len(candidates) == 1:
                setattr(self, setting, candidates[0])

    @property
    def solver_grid(self) -> list[SolverSettings]:
        """The settings of the kernel's solver: one, or the candidates to choose among."""
        return settings_grid(self.kernel_solver, vars(self))

    def check_solver_settings(self) -> None:
        """Check the bounds of the solver's settings and of all their candidates.

        Raises:
            SettingError: A number is out of bounds.
        """
        numbers = {setting: list(read_candidates(setting, getattr(self, setting))) for setting in AUTO}
        check_numbers(SOLVER_BOUNDS.values(), numbers)

    def check_selection(self, *, reads_dev: bool) -> None:
        """Check that there is something to choose by, if there are candidates.

        Args:
            reads_dev: Whether the run reads the dev examples.

        Raises:
            SettingError: Names the setting and the remedy.
        """
        if len(self.solver_grid) == 1:
            return
        if self.select_by == "loo" and self.kernel_solver != "lstsq":
            raise SettingError(
                f"`select_by=loo` is for `kernel_solver=lstsq`, not {self.kernel_solver}: take it, or `select_by=dev`",
                setting="select_by",
                value="loo",
            )
        if self.select_by == "dev" and not reads_dev:
            used = used_settings(self.kernel_solver, f0=self.adjust_for_init)
            setting = next(name for name in used if isinstance(getattr(self, name), str))
            value = getattr(self, setting)
            instead = ", or `select_by=loo`" if self.kernel_solver == "lstsq" else ""
            raise SettingError(
                f"`{setting}={value}` is chosen on dev, which this command does not read: add `do_eval`, or give one "
                f"number{instead}",
                setting=setting,
                value=value,
            )
