"""The kernel trainer: "training" computes the kernel of the train examples, "evaluation" solves with it."""

import dataclasses
import functools
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from lmntk import distributed, solvers
from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.data.metrics import mean_over_samples
from lmntk.errors import UsageError
from lmntk.experiment import provenance
from lmntk.experiment.build import Experiment
from lmntk.kernels import FORMULAS, Engine, KernelProblem, MemoryBudgetError, Plan
from lmntk.kernels.assembly import make_engine
from lmntk.kernels.memory import DEFAULT_FRACTION, free_bytes, peak_bytes, resident_bytes
from lmntk.kernels.timing import seconds_of
from lmntk.models.parameters import count_parameters, layers_of, select_parameters
from lmntk.prompts.features import FeatureDataset, FeatureExamples
from lmntk.solvers.problem import SolverSettings, class_ids
from lmntk.storage.kernel_cache import Kernel, KernelCache, samples_of
from lmntk.storage.kernel_files import LayerKernels
from lmntk.storage.paths import RunPaths
from lmntk.trainers.base import LOGITS_TOGETHER, ZeroShotTrainer, score
from lmntk.trainers.kernel_job import KernelJob
from lmntk.trainers.layer_scores import LayerScores

logger = logging.getLogger(__name__)


class KernelTrainer(ZeroShotTrainer):
    """A `Trainer` that predicts with the empirical neural tangent kernel in place of training.

    Kernels, and the logits of the untrained model, are written to the output folder as soon as they are there. A
    kernel found there is used again only if its description fits the present command. With ``--load_kernels`` they
    come from that folder instead, and the model may be missing.

    Args:
        run: What was built from the flags.
        model_args: The model's flags, for the description.
        args: The flags of the run.
    """

    args: TrainingArguments

    def __init__(self, run: Experiment, model_args: ModelArguments, args: TrainingArguments) -> None:
        super().__init__(run, run.model or nn.Module(), args)
        self._run = run
        self._model_args = model_args
        self._files = KernelCache(
            output_dir=Path(args.output_dir),
            load_dir=None if args.load_kernels is None else Path(args.load_kernels),
            task_key=run.task.key,
            overwrite=args.overwrite_kernels and args.load_kernels is None,
            model=model_args.model_name_or_path,
            data_dir=run.data_dir,
            missing=run.missing,
            per_layer=args.kernel_per_layer,
        )
        self._formula = FORMULAS[args.kernel_formula]
        self._num_logits = 1 if args.binary_classification else len(run.task.labels)
        self._grad_dim: int | None = None
        self._kernels: dict[str, Kernel] = {}
        self._counts: dict[str, bool] = {}
        self._layers: dict[str, LayerKernels] = {}
        self._fitted: solvers.FittedSolver | None = None
        self._alone = LayerScores(run.task.main_metrics[0])
        self._trained = False
        self._logits: dict[str, tuple[Tensor, Tensor]] = {}
        if run.model is not None:
            run.model.requires_grad_(False)
            selected = select_parameters(run.model, provenance.parameter_filter(model_args, args))
            tokens = {token for feature in run.datasets["train"].features for token in feature.input_ids}
            self._logits_fn, self._params = run.model.as_function(selected, tokens)
            self._grad_dim = count_parameters(selected)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Compute, or find, the kernel of the train examples with themselves, and fit the solver to it."""
        distributed.on_rank_zero(lambda: self._files.start_overwriting(self._run.datasets))
        self.prepare("train")
        f0 = self._f0("train")
        distributed.on_rank_zero(lambda: self._fit(f0))
        self._trained = True
        return TrainOutput(0, 0.0, {})

    def evaluate(  # type: ignore[override]
        self, eval_dataset: FeatureDataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Predict a split through its kernel with the train examples, by the solver fitted to theirs.

        Returns:
            The task's metrics, the solver's loss and own metrics, and `grad_dim` where the model is there to count.
        """
        if not self._trained:
            self.train()
        split = eval_dataset.mode
        self.prepare(split)
        f0 = self._f0(split)
        metrics = distributed.on_rank_zero(lambda: self._predict(split, f0, f"{metric_key_prefix}_"))
        if self._grad_dim is not None:
            metrics["grad_dim"] = self._grad_dim
        self.log(dict(metrics))
        return metrics

    def prepare(self, split: str) -> None:
        """See that the kernel between the train examples and a split is there: from a file, or else computed.

        Raises:
            UsageError: A file is there, but made by a command that differs; or it cannot be read.
        """
        path = self._path_to_use(split)
        if path is None:
            self._compute(split)
            return

        def load() -> None:
            self._kernels[split] = self._files.load(path, self._formula.is_asymmetric, self._num_logits)
            self._check_labels(split, path)
            self._check_signs(split, path)
            if self.args.kernel_per_layer:
                self._layers[split] = self._files.load_layers(path, split, self._kernels[split][0])
            logger.info("took the train × %s kernel from %s", split, path)
            if self.args.load_kernels is None:
                self._files.tiles(split).drop()  # a run was killed before it did

        distributed.on_rank_zero(load)
        if self.args.load_kernels is None:
            self.untrained_logits(split, renews=True)

    def _check_labels(self, split: str, path: Path) -> None:
        """See that a kernel from elsewhere is of the examples that were read, where any were."""
        labels, own = self._kernels[split][1], self._run.datasets[split].labels
        if split in self._run.data_files and len(labels) != len(own):
            raise UsageError(
                f"{path} is of {len(labels)} {split} examples, but --data_dir has {len(own)}, counted with every "
                "template and draw: give the --data_dir and --num_sample that it was made with"
            )
        if split in self._run.data_files and class_ids(labels.numpy(), self._num_logits).tolist() != list(own):
            raise UsageError(
                f"{path} has other labels than the {split} examples of --data_dir: it is of other data, or of another "
                "order; give the --data_dir that it was made with"
            )

    def _check_signs(self, split: str, path: Path) -> None:
        """See that a kernel is whole numbers, as counts of equal signs are, only if that of train is."""
        values = self._kernels[split][0]
        self._counts[split] = bool((values % 1 == 0).all())
        if self._counts[split] != self._counts.get("train", self._counts[split]) and values.any():
            of_signs = "train" if self._counts["train"] else split
            raise UsageError(
                f"{path} and the train kernel beside it are not of one formula: the values of {of_signs} alone are "
                "whole numbers, as those of signgd are; put kernels of one command into the folder"
            )

    def finish(self) -> None:
        """Tell how the layers predict alone, and let the next ``--overwrite_kernels`` begin anew."""

        def end() -> None:
            table = RunPaths(self.args.output_dir, self._run.task.key).layer_results()
            if self.args.kernel_per_layer:
                self._alone.write(table)
            else:
                table.unlink(missing_ok=True)  # of an earlier run, whose kernel or solver this one has replaced
            self._files.finish()

        distributed.on_rank_zero(end)

    def _f0(self, split: str) -> np.ndarray | None:
        """What ``--adjust_for_init`` needs of a split, ``[X, C]``; without a model it comes from ``--load_kernels``."""
        if not self.args.adjust_for_init:
            return None
        if self._run.model is not None:
            return self.untrained_logits(split)[0].numpy()
        # Only the first process holds the kernels.
        return distributed.on_rank_zero(lambda: self._files.load_logits(split, self._kernels[split][1])[0].numpy())

    def untrained_logits(self, split: str, renews: bool = False) -> tuple[Tensor, Tensor]:
        """Return the logits of the untrained model on a split, ``[X, C]``, and the split's labels.

        The model is asked, and the file written, once.

        Args:
            split: A key of the run's data sets.
            renews: The kernel in the output folder is used again, and the logits beside it are those of its model.
        """
        if split not in self._logits:
            labels = torch.tensor(self._run.datasets[split].labels)
            labels = (labels * 2 - 1).float() if self._num_logits == 1 else labels
            self._logits[split] = found = self.logits(self._run.datasets[split]), labels
            distributed.on_rank_zero(lambda: self._files.save_logits(split, *found, renews=renews))
        return self._logits[split]

    def dry_run(self, started: float) -> None:
        """Say what the kernels of this command take, without computing them.

        Args:
            started: When the program did, by `time.perf_counter`: what comes before the kernels takes its time too.
        """
        resident = resident_bytes()
        seconds, beside, on_disk, in_tiles = 0.0, 0, 0, 0
        for split in self._run.datasets:
            path = self._path_to_use(split)
            if path is None:
                work = self._planned(split)
                self._announce(work, split, "would compute")
                seconds += work.seconds() + self._logits_seconds(split)
                beside = max(beside, work.memory_bytes)
                on_disk += work.file_bytes
                in_tiles = max(in_tiles, work.tile_bytes)
            else:
                kernel, _ = self._files.load(path, self._formula.is_asymmetric, self._num_logits)
                shape = " × ".join(map(str, kernel.shape))
                logger.info("would take the train × %s kernel (%s) from %s", split, shape, path)
        seconds += time.perf_counter() - started
        on_gpu = self.args.device.type == "cuda"
        memory = f"{beside / 2**30:.2f} GB beside the model" if on_gpu else f"{(resident + beside) / 2**30:.2f} GB"
        logger.info(
            "in all %s before solving, %s of memory%s, and %.1f MB in %s, %.1f MB more until the last kernel is there; "
            "nothing was computed",
            *(_duration(seconds), memory, " in each process" if distributed.world_size() > 1 else ""),
            *(on_disk / 2**20, self.args.output_dir, in_tiles / 2**20),
        )

    def _logits_seconds(self, split: str) -> float:
        """Return about how long the logits of the untrained model take, by those of a few prompts."""
        data = self._run.datasets[split]
        few = dataclasses.replace(data, features=data.features[:LOGITS_TOGETHER])
        batches = len(data) / max(len(few), 1) / distributed.world_size()
        return seconds_of(lambda: self.logits(few)) * batches

    def _path_to_use(self, split: str) -> Path | None:
        return distributed.on_rank_zero(lambda: self._files.to_use(split, self._definition(split)))

    def _fit(self, f0: np.ndarray | None) -> None:
        settings = SolverSettings(
            regularization=self.args.kernel_regularization,
            gamma=self.args.kernel_gamma,
            lambda_=self.args.kernel_lambda,
            f0_scaling=self.args.f0_scaling,
            flattened_targets=self.args.flattened_targets,
            plain_lbfgs=self.args.plain_lbfgs,
        )
        values, labels = (tensor.numpy() for tensor in self._kernels.pop("train"))

        def fit(kernel: np.ndarray) -> solvers.FittedSolver:
            return solvers.fit(self.args.kernel_solver, kernel, labels, settings, f0)

        self._fitted = fit(values)
        self._alone.fit(self._layers.pop("train", {}), fit, show=not self.args.disable_tqdm)

    def _predict(self, split: str, f0: np.ndarray | None, prefix: str) -> dict[str, float]:
        assert self._fitted is not None
        kernel, labels = self._kernels.pop(split)
        prediction = self._fitted.predict(kernel.numpy(), labels.numpy(), f0, split)
        data = self._run.datasets[split]
        samples = samples_of(labels, data.num_sample, f"the kernel of {split}")
        classes = class_ids(labels.numpy(), self._num_logits)[: len(labels) // samples]

        def scored(predicted: solvers.Prediction) -> dict[str, float]:
            return score(data.task, mean_over_samples(predicted.logits, len(classes)), classes)

        self.averaged[split], self.labels[split] = mean_over_samples(prediction.logits, len(classes)), classes
        scores = scored(prediction)
        for layer, part in self._layers.pop(split, {}).items():
            of_layer = scored(self._alone.predict(layer, part, labels, f0, split))
            self._alone.add(layer, split, of_layer[f"{data.task.metric_prefix}{data.task.main_metrics[0]}"])
        metrics = {f"{prefix}{name}": value for name, value in scores.items()}
        return metrics | {f"{prefix}loss": prediction.loss, **prediction.metrics}

    def _compute(self, split: str) -> None:
        """Compute a kernel; the first process keeps and writes it."""
        work = self._planned(split)
        if distributed.is_first():
            self._announce(work, split, "computing")
        start = time.perf_counter()
        with work.kept_when_stopped():
            distributed.on_rank_zero(lambda: self._begin(work, split))
            there = work.compute(show=distributed.is_first() and not self.args.disable_tqdm)
            seconds = time.perf_counter() - start
            labels = self.untrained_logits(split)[1]
            distributed.on_rank_zero(lambda: self._complete(work, split, labels, there, seconds))

    def _begin(self, work: KernelJob, split: str) -> None:
        """Make the store ready for the work, and see that the disk has room."""
        work.store.begin(self._written_plan(work, split))
        needed = work.tile_bytes + work.file_bytes
        free = shutil.disk_usage(self.args.output_dir).free
        if free < needed:
            raise UsageError(
                f"--output_dir {self.args.output_dir}: the train × {split} kernel and its tiles take "
                f"{needed / 2**20:.0f} MB, but {free / 2**20:.0f} MB are free: make room, or choose another folder"
            )

    def _written_plan(self, work: KernelJob, split: str) -> dict[str, Any]:
        return self._definition(split) | self._asked() | work.settings

    def _complete(self, work: KernelJob, split: str, labels: Tensor, there: int, seconds: float) -> None:
        """Write the kernel that the tiles make, and let these go."""
        kernel, self._layers[split] = work.kernel()
        self._kernels[split] = kernel, labels
        description = self._definition(split) | work.settings
        description |= {
            "processes": distributed.world_size(),
            "seconds": round(seconds, 3),
            "tiles_of_a_stopped_run": there,
            "peak_memory_gb": round(peak_bytes(self.args.device) / 2**30, 3),
        }
        description |= provenance.circumstances(self._run, self._model_args, split)
        path = self._files.save(split, self._kernels[split], self._layers[split], description)
        work.store.drop()
        logger.info("wrote the train × %s kernel to %s", split, path)

    def _planned(self, split: str) -> KernelJob:
        """Lay the plan of a kernel, or take that of a run that was stopped."""
        store = self._files.tiles(split)

        def stored_plan() -> dict[str, Any] | None:
            return store.stored_plan(self._definition(split) | self._asked(), self.args.overwrite_kernels)

        begun = distributed.on_rank_zero(stored_plan) or {}
        memory_gb = begun.get("memory_gb") or min(distributed.gather(self._memory_gb()))
        engine = make_engine(self._problem(split), begun.get("engine", self.args.kernel_engine), memory_gb)
        tiles = begun.get("train_tile", self.args.train_tile), begun.get("x_tile", self.args.x_tile)
        # Tiles of different plans would not make one kernel: the first process's counts.
        plan = distributed.on_rank_zero(lambda: self._plan(engine, *tiles))
        work = KernelJob(f"train × {split}", engine, plan, engine.estimate_cost(plan), store)
        store.use(distributed.on_rank_zero(lambda: store.key(self._written_plan(work, split))))
        return work

    def _asked(self) -> dict[str, Any]:
        """What the flags say of the plan; a run that was stopped goes on under the same ones only."""
        return {
            "--per_device_train_batch_size": self.args.train_tile,
            "--per_device_eval_batch_size": self.args.x_tile,
            "--kernel_memory_gb": self.args.kernel_memory_gb,
            "--kernel_per_layer": self.args.kernel_per_layer,
            "device": self.args.device.type,
        }

    def _problem(self, split: str) -> KernelProblem:
        model = self._run.model
        assert model is not None

        def examples(name: str) -> FeatureExamples:
            return FeatureExamples(self._run.datasets[name], self._run.collator, self.args.device, model.equal_lengths)

        return KernelProblem(
            logits_fn=self._logits_fn,
            params=self._params,
            train=examples("train"),
            x=None if split == "train" else examples(split),
            formula=self._formula,
            num_logits=self._num_logits,
            module=model,
            call=lambda batch: model(**batch),
            layer_of=layers_of(self._params, model.base_prefix) if self.args.kernel_per_layer else None,
        )

    def _plan(self, engine: Engine, train_tile: int | None, x_tile: int | None) -> Plan:
        try:
            return engine.plan(train_tile, x_tile, distributed.world_size())
        except MemoryBudgetError as error:
            least = "" if self.args.kernel_per_layer else ", or take --kernel_engine jvp"
            raise UsageError(
                f"--kernel_memory_gb: the tiles take {error.needed / 2**30:.2f} GB beside the model, but only "
                f"{error.given / 2**30:.2f} GB are allowed; give at least {error.needed / 2**30 + 0.005:.2f}, smaller "
                f"--per_device_train_batch_size and --per_device_eval_batch_size{least}"
            ) from error

    def _memory_gb(self) -> float:
        if self.args.kernel_memory_gb is not None:
            return self.args.kernel_memory_gb
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.args.device.type == "cpu" else 1
        return DEFAULT_FRACTION * free_bytes(self.args.device) / 2**30 / neighbours

    def _announce(self, work: KernelJob, split: str, verb: str) -> None:
        problem, plan = work.engine.problem, work.plan
        tokens = [sum(examples.shapes) for examples in (problem.train, problem.x_examples)]
        count = sum(1 for _ in plan)
        logger.info(
            "%s the train × %s kernel (%s): %d × %d examples of %d × %d tokens in all, %d %s, %s parameters; %s, %d %s "
            "of %d × %d; about %.2f GB beside the model, %s, and %.1f MB on disk",
            *(verb, split, problem.formula.name, plan.train_size, plan.x_size, *tokens),
            *(problem.num_logits, "logit" if problem.num_logits == 1 else "logits", f"{self._grad_dim:,}"),
            *(work.engine.summary(plan), count, "tile" if count == 1 else "tiles", plan.train_tile, plan.x_tile),
            *(work.memory_bytes / 2**30, _duration(work.seconds()), work.file_bytes / 2**20),
        )

    def _definition(self, split: str) -> dict[str, Any]:
        definition = provenance.spec_from_arguments(self._run, self._model_args, self.args, split)
        if self._run.model is not None:
            definition |= provenance.of_model(self._run, self._weights, self._grad_dim or 0)
        return definition | provenance.of_data(self._run, split)

    @functools.cached_property
    def _weights(self) -> str:
        assert self._run.model is not None
        return provenance.hash_of_weights(self._run.model)


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"about {max(seconds, 0.1):.1f} s"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
