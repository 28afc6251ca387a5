"""A run of a case on one of its k-shot splits: what rankings, tables of behaviour and the paper's tables share."""

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lmntk.runs.script_run import ScriptRun, num_gpu

if TYPE_CHECKING:
    from lmntk.runs.behaviour_plan import Case


class CasePlan(Protocol):
    """What the plan of such runs has."""

    @property
    def model(self) -> str:
        """A folder, or a name on the model hub."""

    @property
    def model_hashes(self) -> dict[str, str]:
        """The hashes of the model's files."""


class CaseCell(Protocol):
    """What such a run is of."""

    @property
    def case(self) -> "Case":
        """The task with its splits."""

    @property
    def k(self) -> int:
        """The training examples of each class."""

    @property
    def seed(self) -> int:
        """The seed of the split, and of the run."""


class CaseRun(ScriptRun):
    """A run of a case on one of its splits; subclasses have a plan and a cell, and say TRAINER and the tag.

    Attributes:
        plan: What all runs of it share.
        cell: What the run is of.
    """

    plan: CasePlan
    cell: CaseCell

    if TYPE_CHECKING:  # a dataclass would take the property for the default of its field

        @property
        def trainer(self) -> str:
            """TRAINER of run_fewshot.sh."""

    @property
    def few_shot_type(self) -> str:
        """TYPE of run_fewshot.sh."""
        return "prompt"

    @property
    @abstractmethod
    def tag(self) -> str:
        """TAG of run_fewshot.sh."""

    @property
    def split(self) -> Path:
        """The folder of the k-shot split."""
        return self.cell.case.split(self.cell.k, self.cell.seed)

    @property
    def variables(self) -> dict[str, str]:
        """All variables of the script."""
        cell = self.cell
        return {
            "TASK": cell.case.task, "SEED": str(cell.seed), "K": str(cell.k), "MODEL": self.plan.model,
            "TYPE": self.few_shot_type, "TRAINER": self.trainer, "TAG": self.tag, "NUM_GPU": num_gpu(self.trainer),
        }  # fmt: skip

    @property
    def inputs(self) -> object:
        """The hashes of the model's files."""
        return self.plan.model_hashes
