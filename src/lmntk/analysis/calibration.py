"""How sure the predictions of a saved run are: what `kernel_variance` writes, from the files in its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmntk.analysis.least_squares import LeastSquaresRun
from lmntk.errors import SettingError, SolverError
from lmntk.solvers.gaussian_process import GaussianProcess
from lmntk.solvers.uncertainty import Uncertainty, split_uncertainty


@dataclass(frozen=True, eq=False)
class RunCalibration:
    """How sure a run's predictions are.

    Attributes:
        scale: σ², by which the kernel is the prior covariance of the logits.
        noise: The variance of the noise of each target.
        splits: By split, its predictions with their covariance and class probabilities.
        remarks: Why other splits are missing, a sentence each.
    """

    scale: float
    noise: float
    splits: Mapping[str, Uncertainty]
    remarks: Sequence[str] = ()


def run_calibration(found: LeastSquaresRun) -> RunCalibration:
    """Compute how sure the predictions of a run's splits are.

    Raises:
        SolverError: The kernel is asymmetric, or singular with the run's λ; names a λ that would do.
        SettingError: An example has several prompts, whose mean logits need K between the prompts too.
        FileError: A file is damaged.
        KernelMismatchError: A diagonal belongs to another kernel.
    """
    for split in ("train", *found.x_splits):
        samples = max((found.train if split == "train" else found.kernel(split)).samples_per_example)
        if samples > 1:
            raise SettingError(
                f"how sure the predictions are is known for one prompt of each example, and each of {split} has "
                f"{samples}: only K(x, x) of each prompt is stored",
                setting="num_sample",
                value=samples,
            )
    process = GaussianProcess(found.problem)
    splits, remarks = {}, []
    for split in found.x_splits:
        kernel = found.kernel(split)
        diagonal = found.run.diagonal(split, kernel)
        if diagonal is None:
            path = found.run.kernel_paths.diagonal(split)
            remarks.append(
                f"K(x, x) of {split} is not stored: {path.name} is missing, which the command that made the kernel "
                "adds with `kernel_variance=True`"
            )
            continue
        predictions = found.predict(split), kernel.class_ids
        try:
            splits[split] = split_uncertainty(process, kernel.values, diagonal, *predictions)
        except SolverError as error:
            remarks.append(f"{split}: {error}")
    return RunCalibration(process.scale, process.noise, splits, remarks)
