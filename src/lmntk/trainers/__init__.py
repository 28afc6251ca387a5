"""Trainers turn features into predictions: by the kernel, fine-tuning, a linear head, or the model as it is."""

from collections.abc import Callable, Mapping

from lmntk.config.arguments import ActiveTrainer, ModelArguments, TrainingArguments
from lmntk.errors import UsageError
from lmntk.experiment.experiment import Experiment, LoadedKernels
from lmntk.trainers.base import FewShotTrainer, ZeroShotTrainer
from lmntk.trainers.finetune import FineTuneTrainer
from lmntk.trainers.kernel import KernelTrainer
from lmntk.trainers.linear_head import HeadSettings, LinearHeadTrainer, fit_linear_head
from lmntk.trainers.linearised import LinearisedTrainer
from lmntk.trainers.loaded_kernels import LoadedKernelTrainer

TRAINERS: Mapping[ActiveTrainer, Callable[[Experiment, ModelArguments, TrainingArguments], FewShotTrainer]] = {
    ActiveTrainer.KERNEL: KernelTrainer,
    ActiveTrainer.STANDARD: FineTuneTrainer,
    ActiveTrainer.LINEARISED: LinearisedTrainer,
    ActiveTrainer.LINEARHEAD: LinearHeadTrainer,
    ActiveTrainer.ZERO_SHOT: ZeroShotTrainer,
}
"""The class of each trainer."""


def make_trainer(
    inputs: Experiment | LoadedKernels, model_args: ModelArguments, args: TrainingArguments
) -> FewShotTrainer:
    """Make the trainer of a run; with `from_linearhead`, fit the last layer first.

    Args:
        inputs: What was built from the arguments.
        model_args: The arguments of the model.
        args: The arguments of the run.

    Raises:
        UsageError: transformers objects to an argument, such as the name of a service in `report_to`.
    """
    fits_itself = args.active_trainer in (ActiveTrainer.LINEARHEAD, ActiveTrainer.ZERO_SHOT)
    fits_first = args.from_linearhead and not fits_itself
    if fits_first and not isinstance(inputs, LoadedKernels):
        fit_linear_head(inputs, args.device, HeadSettings.of(args))
    try:
        if isinstance(inputs, LoadedKernels):
            return LoadedKernelTrainer(inputs, model_args, args)
        return TRAINERS[args.active_trainer](inputs, model_args, args)
    except (ValueError, ImportError, OSError) as error:  # transformers' own objections
        raise UsageError(" ".join(str(error).split())) from error
