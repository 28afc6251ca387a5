"""The kernel of a saved run's train examples with texts that no split has."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmntk.config.record_arguments import arguments_of_record
from lmntk.errors import FileError, KernelMismatchError, MissingSplitError
from lmntk.experiment.build import build_with_queries
from lmntk.experiment.untrained_logits import untrained_logits
from lmntk.prompts.features import FeatureExamples
from lmntk.storage.kernel_cache import KernelCache
from lmntk.storage.kernel_metadata import kernel_differences, read_description
from lmntk.trainers.kernel_planning import KernelPlanner
from lmntk.trainers.linear_head import HeadSettings, fit_linear_head


def query_kernel(
    record: Mapping[str, Any],
    train_kernel: Path,
    queries: Sequence[tuple[str, ...]],
    data_dir: Path | None = None,
    show_progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Load the model of a run as the run recorded it, and compute the kernel of its train examples with some texts.

    Args:
        record: What the run recorded.
        train_kernel: The file of its train kernel, whose description the model and the prompts must fit.
        queries: The sentences of each text.
        data_dir: The folder that has the train file now; None: where the run read it.
        show_progress: Whether to show a progress bar.

    Returns:
        The kernel, float64 ``[N, C, X, C]`` or with a leading 2, where X counts each text with each of its samples; and
        the untrained model's logits of these, ``[X, C]``.

    Raises:
        FileError: The run has no record or no description; or a file is missing.
        KernelMismatchError: The model or the train examples have changed since.
        UsageError: The model cannot be loaded, or a text has another number of sentences than the task.
    """
    described = read_description(train_kernel)
    if not record or described is None:
        raise FileError(
            f"{train_kernel.parent} does not record the model and prompts of its kernel, so that no query can be asked "
            "of them: repeat the command that made it, or leave out `query`",
            path=train_kernel,
        )
    model_args, data_args, args = arguments_of_record(record, data_dir=None if data_dir is None else str(data_dir))
    try:
        experiment = build_with_queries(model_args, data_args, args, queries)
    except MissingSplitError as error:
        raise FileError(
            f"{error.data['path']}, which the run's kernels were computed from, is missing: give `data_dir`, the "
            "folder that has the data files now",
            path=error.data["path"],
        ) from error
    experiment.model.to(args.device)
    if args.fits_linear_head:
        fit_linear_head(experiment, args.device, HeadSettings.of(args))
    cache = KernelCache(train_kernel.parent, None, experiment.task.key, False, record["model_name_or_path"], "")
    planner = KernelPlanner(experiment, model_args, args, cache)
    differences = kernel_differences(described, planner.spec("train"))
    if differences:
        raise KernelMismatchError(
            f"the model or the train examples are not those of {train_kernel} any more ({'; '.join(differences)}): "
            "put them back, or repeat the run with `overwrite_kernels=True`",
            path=train_kernel,
            differences=differences,
        )
    prompts = FeatureExamples(
        experiment.datasets["test"], experiment.collator, args.device, experiment.model.equal_lengths
    )
    logits = untrained_logits(experiment.model, prompts).double().numpy()
    return planner.compute("test", show_progress).numpy(), logits
