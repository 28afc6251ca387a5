"""The kernel trainer: it predicts with the kernel of the model as it is, and computes what no file holds."""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import TrainOutput

from lmntk import distributed
from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.experiment.experiment import Evaluation, Experiment
from lmntk.experiment.projection_error import ProjectionError
from lmntk.experiment.provenance import parameter_filter, provenance
from lmntk.kernels.functional import with_values
from lmntk.kernels.memory import peak_bytes, retain_freed_memory
from lmntk.models.parameters import select_parameters
from lmntk.prompts.features import FeatureDataset
from lmntk.storage.kernel_files import load_kernel, load_layer_kernels
from lmntk.storage.output_folder import require_room
from lmntk.trainers.fine_tuned import FineTuned, check_output_folder, clear_own_snapshots, read_fine_tuned
from lmntk.trainers.kernel_job import KernelJob, job_settings
from lmntk.trainers.kernel_planning import KernelPlanner, PlanSummary
from lmntk.trainers.loaded_kernels import LoadedKernelTrainer, SplitKernel
from lmntk.trainers.lstsq_method import blocked_solver, check_method
from lmntk.trainers.projected_width import described_error
from lmntk.trainers.snapshots import SnapshotWriter

logger = logging.getLogger(__name__)


class KernelTrainer(LoadedKernelTrainer):
    """A `Trainer` that predicts with the empirical neural tangent kernel in place of training.

    It writes each kernel, and the logits of the untrained model, to the output folder as soon as they are computed.
    It uses a kernel in that folder again only if its description fits the present command. With `load_kernels`, the
    kernels come from another folder.

    Args:
        experiment: What was built from the arguments.
        model_args: The arguments of the model.
        args: The arguments of the run.
    """

    def __init__(self, experiment: Experiment, model_args: ModelArguments, args: TrainingArguments) -> None:
        super().__init__(experiment, model_args, args, experiment.model, experiment.collator)
        self._experiment = experiment
        self._planner = KernelPlanner(experiment, model_args, self.args, self._cache)
        self._width_is_given = self.args.projection_width is not None
        self._untrained_logits: dict[str, tuple[Tensor, Tensor]] = {}
        self._train_kernel: Tensor | None = None  # on the first process, where snapshots need it
        self._fine_tuned = None
        if self.args.fine_tuned_model is not None:
            distributed.on_rank_zero(check_output_folder, self.args, self._cache.paths)
            self._fine_tuned = read_fine_tuned(experiment, model_args, self.args)

    def prepare(self, split: str) -> SplitKernel | None:
        """Return the train × `split` kernel, from a file or computed, on the first process, None on the others.

        Raises:
            UsageError: A file is there, but another command made it, or it cannot be read.
        """
        path = self._find_kernel(split)
        if path is None:
            kernel = self._compute(split)
        else:
            if self.args.kernel_variance and self._lacks_diagonal(split):
                self._compute_diagonal(split)
            kernel = distributed.keep_on_rank_zero(self._load, split, path)
            if self.args.load_kernels is None:
                distributed.on_rank_zero(self._cache.drop_tiles, split)  # left by a run that was killed just before
                self.untrained_logits(split, renews=True)
        if split == "train" and kernel is not None and self._fine_tuned is not None:
            self._train_kernel = kernel.values
        return kernel

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Compute the kernels that the solver is fitted to, and fit it."""
        distributed.on_rank_zero(self._check_method)
        return super().train(*args, **kwargs)

    @property
    def _num_rows(self) -> int:
        """N · C, the rows of the train kernel."""
        return len(self._experiment.datasets["train"]) * self._num_logits

    def _check_method(self) -> None:
        check_method(self.args, self._num_rows)

    def untrained_logits(self, split: str, renews: bool = False) -> tuple[Tensor, Tensor]:
        """Return the logits of the untrained model on a split, ``[X, C]``, and the split's targets, ``[X]``.

        The first call computes the logits and writes their file.

        Args:
            split: A key of the experiment's data sets.
            renews: Whether the kernel is taken from the output folder, so that the logits beside it are its model's.
        """
        if split not in self._untrained_logits:
            data = self._experiment.datasets[split]
            labels = torch.tensor(data.labels)
            targets = (labels * 2 - 1).float() if self._num_logits == 1 else labels
            self._untrained_logits[split] = found = self.logits(data), targets
            distributed.on_rank_zero(self._cache.save_logits, split, *found, renews=renews)
        return self._untrained_logits[split]

    def finish(self) -> None:
        """Write how each layer predicts alone and, with `fine_tuned_model`, snapshots before and after the training."""
        if self._fine_tuned is not None:
            self._write_snapshots(self._fine_tuned)
        super().finish()

    def _write_snapshots(self, trained: FineTuned) -> None:
        if not self._is_trained:
            self.train()
        experiment = self._experiment
        here = dict(experiment.model.named_parameters())
        left_out = parameter_filter(self._model_args, self.args)
        facts = {
            **trained.settings,
            "parameters": {name: value for name, value in vars(left_out).items() if value} or "all",
            "fine_tuned_model": str(trained.folder),
        }
        writer = SnapshotWriter(
            experiment,
            self._model_args,
            self.args,
            frozenset(select_parameters(experiment.model, left_out)),
            {name: here[name].detach() for name in trained.weights},
            facts,
        )
        distributed.on_rank_zero(clear_own_snapshots, writer.paths)
        steps = {"last_step": trained.step}
        writer.write(0, steps, distributed.on_rank_zero(lambda: self._train_kernel))
        with with_values(experiment.model, trained.weights):
            writer.write(trained.step, steps)

    def dry_run(self, started: float) -> None:
        """Log what the kernels of this run take, without computing them.

        Args:
            started: When the program started, by `time.perf_counter`.
        """
        self._planner.dry_run(self._find_kernel, self._describe_kernel, self.logits, started, self._last_step())
        self._check_method()
        blocked_solver(self.args, self._num_rows)  # says if one is taken

    def _describe_kernel(self, split: str, path: Path) -> None:
        self._describe_file(split, path)
        if self.args.kernel_variance and self._lacks_diagonal(split):
            number = len(self._experiment.datasets[split])
            logger.info("would compute K(x, x) of %d examples of %s, which the kernel lacks", number, split)

    def _last_step(self) -> int | None:
        return None if self._fine_tuned is None else self._fine_tuned.step

    def _set_width(self, width: int | None) -> None:
        """Take the width that an earlier command has found; without one, the tolerance chooses it."""
        self.args = self.args.with_changes(projection_width=self._planner.set_width(width).projection_width)

    def _spec(self, split: str) -> dict[str, Any]:
        return self._planner.spec(split)

    def _f0(self, split: str, kernel: SplitKernel | None) -> np.ndarray | None:
        return self.untrained_logits(split)[0].numpy() if self.args.adjust_for_init else None

    def _predict(
        self, data: FeatureDataset, kernel: SplitKernel | None, f0: np.ndarray | None, prefix: str
    ) -> Evaluation:
        found = super()._predict(data, kernel, f0, prefix)
        return Evaluation({**found.metrics, "grad_dim": self._planner.grad_dim}, found.logits, found.labels)

    def _compute(self, split: str) -> SplitKernel | None:
        job = self._planner.job(split)
        if distributed.is_first():
            logger.info("computing the %s", PlanSummary.of(job, self._planner.grad_dim))
        error = distributed.on_rank_zero(self._projection_error, job, split)
        start = time.perf_counter()
        with job.reporting_progress_on_interrupt():
            distributed.on_rank_zero(self._begin, job, split)
            with retain_freed_memory():  # the process is the program's own
                num_reused = job.compute(progress=distributed.is_first() and not self.args.disable_tqdm)
            seconds = time.perf_counter() - start
            targets = self.untrained_logits(split)[1]
            return distributed.keep_on_rank_zero(self._complete, job, split, targets, num_reused, seconds, error)

    def _lacks_diagonal(self, split: str) -> bool:
        """Return whether K(x, x) is to be added to a kernel of the output folder."""
        if split == "train" or self.args.load_kernels is not None:
            return False
        return distributed.on_rank_zero(self._cache.lacks_diagonal, split)

    def _compute_diagonal(self, split: str) -> None:
        job = self._planner.job(split)
        if distributed.is_first():
            logger.info("computing K(x, x) of %d examples of %s, which the kernel lacks", job.plan.x_size, split)
        diagonal = job.diagonal_alone()
        distributed.on_rank_zero(self._cache.save_diagonal, split, diagonal)
        if distributed.is_first():
            logger.info("wrote %s", self._cache.paths.diagonal(split))

    def _begin(self, job: KernelJob, split: str) -> None:
        """Open the store for the tiles, and check that the disk has room."""
        job.store.create()
        needed = job.tile_bytes + job.file_bytes
        require_room(self.args.output_dir, needed, f"the train × {split} kernel and its tiles")

    def _projection_error(self, job: KernelJob, split: str) -> ProjectionError | None:
        """Measure the error of an estimate, and refuse a width that was given and does not reach the tolerance."""
        smallest = min(settings.regularization for settings in self.args.solver_grid)
        return self._planner.error_of(job, split, smallest, checks=self._width_is_given and split == "train")

    def _complete(
        self,
        job: KernelJob,
        split: str,
        targets: Tensor,
        num_reused: int,
        seconds: float,
        error: ProjectionError | None,
    ) -> SplitKernel:
        """Assemble the kernel from its tiles, write it, and remove the tiles."""
        kernel, slices = job.outline()
        slices = self._planner.described(slices)
        with self._cache.writing(split, (kernel, targets), slices) as writer:
            diagonal = job.assemble(writer, progress=not self.args.disable_tqdm)
            description = {
                **self._spec(split),
                **job_settings(job.engine, job.plan),
                "processes": distributed.world_size(),
                "seconds": round(seconds, 3),
                "tiles_of_a_stopped_run": num_reused,
                "peak_memory_gb": round(peak_bytes(self.args.device) / 2**30, 3),
                **provenance(self._experiment, self._model_args, split),
                **({} if error is None else described_error(error.description, self.args, self._width_is_given)),
            }
            if split == "train":
                clear_own_snapshots(self._cache.paths)  # they are of another kernel
            writer.finish(description, diagonal)
        self._cache.drop_tiles(split)
        path = self._cache.paths.kernel(split)
        logger.info("wrote the %s kernel to %s", job.name, path)
        own = None if error is None else float(error.description["own"])
        values, _ = load_kernel(path, own=True)
        beside = self._cache.paths.layer_kernels(split)
        layers = load_layer_kernels(beside) if slices.layers else {}
        return SplitKernel(values, targets, layers, diagonal, own)
