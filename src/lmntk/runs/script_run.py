"""A run of run_fewshot.sh whose folder, data and settings its caller names, and which counts for exactly these."""

import functools
import hashlib
import json
import os
import sys
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

from lmntk.errors import SettingError
from lmntk.runs import processes
from lmntk.runs.log import LogEntry
from lmntk.runs.processes import RunProcess
from lmntk.storage.paths import RunPaths
from lmntk.storage.readers import read_json

FOREIGN_VARIABLES = (
    "GRID_TAG", "LOAD_KERNELS_TAG", "AS_PUBLISHED", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""The variables of the caller's shell that would make another run of it."""

NOT_IN_STAMP = ("NUM_GPU",)
"""The variables on which no result depends, see `num_gpu`."""

WEIGHT_FILES = ("safetensors", "bin", "gguf", "json")


class ScriptRun(RunProcess):
    """A run that is done if its folder has its results, and the stamp of its command, data and `inputs`.

    What a run with another stamp left in the folder is deleted before it starts.
    """

    delete_stale = True

    @property
    @abstractmethod
    def split(self) -> Path:
        """The folder of the k-shot split."""

    @property
    @abstractmethod
    def variables(self) -> dict[str, str]:
        """The variables of run_fewshot.sh, with at least TASK, SEED, K, MODEL, TYPE and TRAINER."""

    @property
    @abstractmethod
    def flags(self) -> list[str]:
        """The words for run.py besides data and output folder."""

    @property
    def inputs(self) -> object:
        """What else the results depend on, such as the hashes of the model's files; JSON must be able to hold it."""
        return None

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The splits that the run predicts."""
        return ("dev", "test")

    @property
    def command(self) -> list[str]:
        """The words that start the run."""
        command = ["bash", str(processes.RUN_SCRIPT)]
        for name, folder in (("data_dir", self.split), ("output_dir", self.folder)):
            command += [f"--{name}", str(folder)]
        return [*command, *self.flags]

    @functools.cached_property
    def stamp(self) -> str:
        """A hash of the command, the variables, the files of the split, and `inputs`."""
        variables = {name: text for name, text in self.variables.items() if name not in NOT_IN_STAMP}
        return digest([self.command, variables, self.inputs, hashes(self.split.iterdir())])

    def environment(self, jobs: int) -> dict[str, str]:
        """Return the environment of the process: several runs at a time share the cores."""
        usual = {name: text for name, text in os.environ.items() if name not in FOREIGN_VARIABLES}
        # The interpreter that runs this has what run.py needs.
        return share_cores(usual | self.variables | {"PYTHON": sys.executable}, jobs)

    @property
    def paths(self) -> RunPaths:
        """The names of the files in the folder."""
        return RunPaths(self.folder, self.variables["TASK"].lower())

    def has_results(self) -> bool:
        """Return whether the record and the metrics of all splits are there."""
        return all(path.is_file() for path in (self.paths.record(), *map(self.paths.metrics, self.evaluated)))

    @property
    def record(self) -> LogEntry:
        """The settings and metrics of the run, which is done."""
        record: LogEntry = read_json(self.paths.record())
        return record

    @property
    def is_stale(self) -> bool:
        """Whether the folder has results of a finished run with another stamp, which would be deleted."""
        stamp = processes.read_stamp(self.folder) or ""
        # Not `has_results`: a run of fewer splits than this one is finished too.
        is_finished = self.paths.record().is_file() and not stamp.endswith(processes.UNFINISHED)
        return is_finished and stamp != self.stamp

    def refuse_stale(self) -> None:
        """Refuse to delete a finished run.

        Raises:
            SettingError: The folder holds one, of another stamp.
        """
        if self.is_stale:
            sentence = (
                f"{self.folder} holds the results of a run with other settings, data or weights: give another "
                "`output`, or remove that folder"
            )
            raise SettingError(sentence, setting="output", folder=self.folder)


def num_gpu(trainer: str) -> str:
    """Return NUM_GPU for a run: a training takes one process, since several would multiply the examples of a step."""
    given = os.environ.get("NUM_GPU") or "1"
    return "1" if trainer in ("standard", "linearised") and given not in ("0", "1") else given


def share_cores(environment: Mapping[str, str], jobs: int) -> dict[str, str]:
    """Return an environment in which each of several runs at a time has its part of the cores, unless it says more."""
    shared = dict(environment)
    if jobs > 1 and not shared.get("OMP_NUM_THREADS"):
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    return shared


def weight_files(model: Path) -> list[Path]:
    """Return the files of a model's folder that its predictions depend on; none for a name on the hub."""
    return [path for ending in WEIGHT_FILES for path in model.glob(f"*.{ending}")]


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by its path, in the order of paths."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths) if path.is_file()}


def digest(content: object) -> str:
    """Return a hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
