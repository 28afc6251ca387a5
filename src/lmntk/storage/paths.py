"""Where the files of a run are: one file name for each kind of file, split and task."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Split:
    """A data set of a run; `str` gives the spelling that dictionaries and command lines use.

    >>> Split.parse("test:mnli-mm")
    Split(mode='test', other_task='mnli-mm')
    >>> str(Split("test", "mnli-mm"))
    'test:mnli-mm'

    Attributes:
        mode: ``"train"``, ``"dev"`` or ``"test"``.
        other_task: Key of the task that a second test set belongs to; empty for the data sets of the run's own task.
    """

    mode: str
    other_task: str = ""

    @classmethod
    def parse(cls, spelling: str) -> "Split":
        """Read a spelling such as ``"dev"`` or ``"test:mnli-mm"``."""
        mode, _, other_task = spelling.partition(":")
        return cls(mode, other_task)

    def __str__(self) -> str:
        """``mode``, or ``mode:other_task`` for a second test set."""
        return f"{self.mode}:{self.other_task}" if self.other_task else self.mode


@dataclass(frozen=True)
class RunPaths:
    """The names of a run's files in a folder.

    A split is given in its spelling, see `Split`. Files of a second test set carry the name of its task.

    >>> RunPaths("result", "mnli").kernel("test").as_posix()
    'result/test_kernels_mnli.pt'
    >>> RunPaths("result", "mnli").kernel("test:mnli-mm").as_posix()
    'result/test_kernels_mnli-mm.pt'

    Attributes:
        folder: The folder that holds the files.
        task_key: The key of the run's task, as file names have it.
    """

    folder: str | Path
    task_key: str

    def kernel(self, split: str) -> Path:
        """The kernel between the train examples and those of a split."""
        return self._path(split, "{mode}_kernels_{task}.pt")

    def description(self, split: str) -> Path:
        """The description of that kernel."""
        return description_of(self.kernel(split))

    def layer_kernels(self, split: str) -> Path:
        """The contribution of each layer to that kernel."""
        return self._path(split, "{mode}_layer_kernels_{task}.pt")

    def diagonal(self, split: str) -> Path:
        """K(x, x) of each example of that kernel's second axis; a train kernel has it in itself."""
        return self._path(split, "{mode}_diagonal_{task}.pt")

    def part_kernels(self, split: str) -> Path:
        """The parts of that kernel, by layer, kind, and weight or bias."""
        return self._path(split, "{mode}_part_kernels_{task}.pt")

    def lora_kernels(self, split: str) -> Path:
        """The kernels of LoRA adapters beside that kernel, by the names of the adapted weights."""
        return self._path(split, "{mode}_lora_kernels_{task}.pt")

    def tiles(self, split: str) -> Path:
        """The folder of that kernel's finished tiles, until the kernel is written."""
        return self._path(split, "{mode}_tiles_{task}")

    def logits(self, split: str) -> Path:
        """The logits of the untrained model."""
        return self._path(split, "{mode}_logits_{task}.pt")

    def variance(self, split: str) -> Path:
        """The table of the Gaussian process's standard deviations and probabilities, one example a row."""
        return self._path(split, "{mode}_variance_{task}.csv")

    def predictions(self, split: str) -> Path:
        """The table of predictions, one example a row."""
        return self._path(split, "{mode}_predictions_{task}.csv")

    def influence(self, split: str) -> Path:
        """The table of what train examples do to the predictions of a split; for train, of leave-one-out."""
        return self._path(split, "influence_{mode}_{task}.csv")

    def features(self, split: str) -> Path:
        """The projected gradients of a split's examples."""
        return self._path(split, "features_{mode}_{task}.safetensors")

    def feature_predictions(self, split: str) -> Path:
        """The table of predictions from features, one example a row."""
        return self._path(split, "feature_predictions_{mode}_{task}.csv")

    def feature_error(self) -> Path:
        """How far the kernel of features is from the exact one."""
        return Path(self.folder) / f"feature_error_{self.task_key}.json"

    def feature_results(self) -> Path:
        """The table of regularizations with which features were solved, and their scores."""
        return Path(self.folder) / f"feature_results_{self.task_key}.csv"

    def metrics(self, split: str) -> Path:
        """The metrics of a split; LM-BFF calls those of dev ``eval``."""
        pattern = "eval_results_{task}.txt" if Split.parse(split).mode == "dev" else "{mode}_results_{task}.txt"
        return self._path(split, pattern)

    def ensemble(self, split: str, model_id: int, array_id: int) -> Path:
        """The logits of a test set for `tools/ensemble.py`."""
        return self._path(split, f"{{task}}-{model_id}-{array_id}.npy")

    def record(self) -> Path:
        """The arguments and metrics of the run."""
        return Path(self.folder) / f"run_{self.task_key}.json"

    def layer_results(self) -> Path:
        """The table of how well each layer predicts on its own."""
        return Path(self.folder) / f"layer_results_{self.task_key}.csv"

    def solver_selection(self) -> Path:
        """The table of the solver's settings that the run chose among."""
        return Path(self.folder) / f"solver_selection_{self.task_key}.csv"

    def snapshot(self, step: int) -> Path:
        """The logits, linearised logits and kernel of a training after a number of steps."""
        return Path(self.folder) / f"step-{step:06d}_{self.task_key}.safetensors"

    def _path(self, spelling: str, pattern: str) -> Path:
        split = Split.parse(spelling)
        return Path(self.folder) / pattern.format(mode=split.mode, task=split.other_task or self.task_key)


def description_of(kernel: Path) -> Path:
    """The description of a kernel file lies beside it under the same name."""
    return kernel.with_suffix(".json")
