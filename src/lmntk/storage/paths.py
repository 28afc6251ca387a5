"""Where the files of a run lie."""

from pathlib import Path


def mode_and_task(split: str, task_key: str) -> tuple[str, str]:
    """Tell how a split is called in the names of files: ``"test:mnli-mm"`` of mnli is the test split of mnli-mm."""
    mode, _, other_task = split.partition(":")
    return mode, other_task or task_key


def kernel_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the kernel of the training examples and those of a split (see `mode_and_task`) lies."""
    return Path(directory) / "{}_kernels_{}.pt".format(*mode_and_task(split, task_key))


def layer_kernels_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the layers' parts of that kernel lie, if they are kept."""
    return Path(directory) / "{}_layer_kernels_{}.pt".format(*mode_and_task(split, task_key))


def layer_results_path(directory: str | Path, task_key: str) -> Path:
    """Where the table lies that says how each layer predicts alone."""
    return Path(directory) / f"layer_results_{task_key}.csv"


def description_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where that kernel's description lies."""
    return _description_of(kernel_path(directory, split, task_key))


def logits_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the logits of the untrained model lie."""
    return Path(directory) / "{}_logits_{}.pt".format(*mode_and_task(split, task_key))


def metrics_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the metrics of a split lie; those of dev are called ``eval``, as in LM-BFF."""
    mode, task = mode_and_task(split, task_key)
    return Path(directory) / f"{'eval' if mode == 'dev' else mode}_results_{task}.txt"


def predictions_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the predictions of a split lie, example by example."""
    return Path(directory) / "{}_predictions_{}.csv".format(*mode_and_task(split, task_key))


def record_path(directory: str | Path, task_key: str) -> Path:
    """Where the arguments and metrics of the run lie, as in its line in the log."""
    return Path(directory) / f"run_{task_key}.json"


def tiles_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the finished tiles of a kernel lie until it is there."""
    return Path(directory) / "{}_tiles_{}".format(*mode_and_task(split, task_key))


def ensemble_path(directory: str | Path, split: str, task_key: str, model_id: int, array_id: int) -> Path:
    """Where ``--save_logit`` puts the logits of a test set for `tools/ensemble.py`."""
    return Path(directory) / f"{mode_and_task(split, task_key)[1]}-{model_id}-{array_id}.npy"


def _description_of(path: Path) -> Path:
    return path.with_suffix(".json")
