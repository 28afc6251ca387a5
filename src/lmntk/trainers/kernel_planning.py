"""What a kernel takes before it is computed: its definition, the plan of its tiles, memory, time and disk."""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from lmntk import distributed
from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.errors import KernelMismatchError, SettingError
from lmntk.experiment.experiment import Experiment
from lmntk.experiment.projection_error import (
    ProjectionError,
    check_tolerance,
    choose_width,
    describe_check,
    measure_error,
)
from lmntk.experiment.provenance import (
    adapters_of_kernel,
    hash_of_weights,
    parameter_filter,
    spec_from_arguments,
    spec_from_data,
    spec_from_model,
)
from lmntk.kernels import (
    FORMULAS,
    Engine,
    KernelProblem,
    LowRankAdapter,
    MemoryBudget,
    MemoryBudgetError,
    ModuleModel,
    Plan,
    TileRequest,
    assemble,
    make_engine,
)
from lmntk.kernels.engines import ProjectedEngine
from lmntk.kernels.memory import resident_bytes
from lmntk.kernels.timing import seconds_of
from lmntk.models.low_rank import draw_adapters, matrix_shapes
from lmntk.models.parameter_parts import describe_parts, parts_of
from lmntk.models.parameters import count_parameters, select_parameters
from lmntk.prompts.features import FeatureDataset, FeatureExamples
from lmntk.storage.kernel_cache import KernelCache
from lmntk.storage.kernel_slices import LORA_KEY, PARTS_KEY, KernelSlices
from lmntk.storage.wording import duration, quantity
from lmntk.trainers.kernel_job import KernelJob, job_settings
from lmntk.trainers.projected_width import CHECK_KEY, TOLERANCE_KEY

logger = logging.getLogger(__name__)

# Prompts by which the time of the logits is estimated.
NUM_TIMED_PROMPTS = 32
# Those at the start and at the end, and a Jacobian-vector product, which takes about three times as long.
LOGITS_OF_SNAPSHOTS = 5


# Settings of `_plan_settings` that a plan leaves out where they are not given.
OPTIONAL_SETTINGS = ("kernel_parts", "kernel_lora_rank", TOLERANCE_KEY, CHECK_KEY)


class KernelPlanner:
    """Plans the kernels of an experiment.

    Args:
        experiment: What was built from the arguments; its model's gradients are switched off.
        model_args: The arguments of the model.
        args: The arguments of the run.
        cache: The run's kernel files.

    Attributes:
        grad_dim: The number of parameters that count.
    """

    def __init__(
        self, experiment: Experiment, model_args: ModelArguments, args: TrainingArguments, cache: KernelCache
    ) -> None:
        self._experiment = experiment
        self._model_args = model_args
        self._args = args
        self._cache = cache
        self._chooses_width = args.projection_tolerance is not None and args.projection_width is None
        experiment.model.requires_grad_(False)
        selected = select_parameters(experiment.model, parameter_filter(model_args, args))
        tokens = {token for feature in experiment.datasets["train"].features for token in feature.input_ids}
        logits_fn, self._params = experiment.model.as_function(selected, tokens)
        partial_rows = experiment.model.partial_rows(selected)
        self._model = ModuleModel(logits_fn, experiment.model, partial_rows=partial_rows)
        self.grad_dim = count_parameters(selected)
        self._sizes = {name: parameter.numel() for name, parameter in selected.items()}
        self._engine: Engine | None = None  # of the last kernel

    def spec(self, split: str) -> dict[str, Any]:
        """Return everything that defines the numbers of the train × `split` kernel."""
        return {
            **spec_from_arguments(self._experiment, self._model_args, self._args, split),
            **spec_from_model(self._experiment.model, self._weights, self.grad_dim),
            **spec_from_data(self._experiment, split),
        }

    @functools.cached_property
    def _weights(self) -> str:
        return hash_of_weights(self._experiment.model)

    def job(self, split: str) -> KernelJob:
        """Plan the train × `split` kernel, or take the plan of a run that was stopped.

        Raises:
            SettingError: The tiles do not fit into `kernel_memory_gb`.
            KernelMismatchError: Another command has left tiles of this kernel.
        """
        requested = distributed.on_rank_zero(lambda: self.spec(split) | self._plan_settings())
        left_out = [f"--{name}" for name in OPTIONAL_SETTINGS]
        begun = distributed.on_rank_zero(self._cache.stored_plan, split, requested, left_out) or {}
        budget = MemoryBudget.from_gb(begun.get("memory_gb") or self._memory_gb)
        name = begun.get("engine", self._args.kernel_engine)
        engine = make_engine(self.problem(split), name, budget, earlier=self._engine)
        # The next kernel takes over what this one has found out; after the last split nothing is held.
        self._engine = None if split == [*self._experiment.datasets][-1] else engine
        asked = self._args.tiles
        tiles = TileRequest(begun.get("train_tile", asked.row), begun.get("x_tile", asked.column))
        # Tiles of different plans would not make one kernel: all processes take the plan of the first.
        plan = distributed.on_rank_zero(self._plan, engine, tiles, self._cache.paths.tiles(split) if begun else None)
        store = distributed.on_rank_zero(self._cache.open_tiles, split, requested | job_settings(engine, plan))
        return KernelJob(f"train × {split}", engine, plan, engine.estimate_cost(plan), store)

    def set_width(self, width: int | None) -> TrainingArguments:
        """Take a width for the projection; by None let the tolerance choose it, on train. Return the arguments with it.

        Raises:
            SettingError: No width reaches the tolerance.
        """
        args = self._args
        if width is None:
            assert args.projection_tolerance is not None
            budget = MemoryBudget.from_gb(self._memory_gb)
            self._engine = engine = make_engine(self.problem("train"), args.kernel_engine, budget)
            assert isinstance(engine, ProjectedEngine)
            asked = engine, args.projection_check, args.projection_tolerance
            width = distributed.on_rank_zero(choose_width, *asked, progress=not args.disable_tqdm)
        self._args = args.with_changes(projection_width=width)
        return self._args

    def error_of(self, job: KernelJob, split: str, regularization: float, checks: bool) -> ProjectionError | None:
        """Measure the error of a kernel before it is computed, on the first process; None for an exact kernel.

        Args:
            job: The kernel.
            split: Its split.
            regularization: λ of the predictions.
            checks: Whether the width was given beside a tolerance, which it must reach.

        Raises:
            SettingError: The width does not reach the tolerance.
        """
        engine, size = job.engine, self._args.projection_check
        if not isinstance(engine, ProjectedEngine):
            return None
        labels = self._experiment.datasets["train"].labels, self._experiment.datasets[split].labels
        error = measure_error(engine, size, labels, regularization, progress=not self._args.disable_tqdm)
        logger.info("%s: %s", job.name, error)
        if checks and self._args.projection_tolerance is not None:
            check_tolerance(error, self._args.projection_tolerance, engine, size)
        return error

    def compute(self, split: str, show_progress: bool = False) -> Tensor:
        """Compute the train × `split` kernel in memory: no file is read or written.

        Args:
            split: A key of the experiment's data sets.
            show_progress: Whether to show a progress bar.

        Returns:
            float64 ``[N, C, X, C]``, or ``[2, N, C, X, C]`` if the formula is asymmetric.

        Raises:
            SettingError: The tiles do not fit into `kernel_memory_gb`.
        """
        problem = self.problem(split)
        engine = make_engine(problem, self._args.kernel_engine, MemoryBudget.from_gb(self._memory_gb))
        plan = self._plan(engine, self._args.tiles, None)
        total = sum(1 for _ in plan) * engine.num_parameter_groups(plan)
        name = f"train × {split}"
        bar = tqdm(engine.blocks(plan), desc=name, total=total, unit="tile", disable=not show_progress, leave=False)
        kernel = assemble(bar, plan, problem)
        return kernel if problem.formula.is_asymmetric else kernel[0]

    def _plan_settings(self) -> dict[str, Any]:
        """Return the settings that a run must share with a stopped one to continue it, as plan.json spells them."""
        settings: dict[str, Any] = {
            "per_device_train_batch_size": self._args.tiles.row,
            "per_device_eval_batch_size": self._args.tiles.column,
            "kernel_memory_gb": self._args.kernel_memory_gb,
            "kernel_per_layer": self._cache.slices.layers_alone,
        }
        wanted = self._cache.slices
        parts = {} if wanted.layers_alone or not wanted.keys else {"kernel_parts": ",".join(wanted.keys)}
        settings |= parts | ({} if wanted.lora is None else {"kernel_lora_rank": dict(wanted.lora)})
        if self._chooses_width:
            settings |= {TOLERANCE_KEY: self._args.projection_tolerance, CHECK_KEY: self._args.projection_check}
        return {**{f"--{name}": value for name, value in settings.items()}, "device": self._args.device.type}

    def problem(self, split: str) -> KernelProblem:
        """Return the train × `split` kernel as engines see it."""
        model, args = self._experiment.model, self._args
        return KernelProblem(
            model=self._model,
            params=self._params,
            train=self._examples("train"),
            x=None if split == "train" else self._examples(split),
            formula=FORMULAS[args.kernel_formula],
            num_logits=1 if args.binary_classification else len(self._experiment.task.labels),
            part_of=parts_of(self._params, model, args.part_keys) if args.part_keys else None,
            low_rank=self._adapters,
            projection=args.projection,
        )

    @functools.cached_property
    def _adapters(self) -> dict[str, LowRankAdapter] | None:
        """The adapters whose kernels are kept too."""
        settings = adapters_of_kernel(self._model_args, self._args)
        return None if settings is None else draw_adapters(self._experiment.model, self._params, settings)

    def described(self, slices: KernelSlices) -> KernelSlices:
        """Add to a kernel's slices what its description says of them."""
        model, wanted = self._experiment.model, self._cache.slices
        description: dict[str, Any] = {}
        shapes = matrix_shapes(model, self._sizes)
        if wanted.keys:
            part_of = parts_of(self._sizes, model, wanted.keys)
            description[PARTS_KEY] = {"keys": list(wanted.keys), **describe_parts(part_of, self._sizes, shapes)}
        if wanted.lora is not None:
            sizes = {name: wanted.lora["rank"] * sum(shapes[name]) for name in self._adapters or {}}
            description[LORA_KEY] = {**wanted.lora, "parameters": sizes}
        return dataclasses.replace(slices, keys=wanted.keys, description=description)

    def _examples(self, split: str) -> FeatureExamples:
        experiment = self._experiment
        equal_lengths = experiment.model.equal_lengths
        return FeatureExamples(experiment.datasets[split], experiment.collator, self._args.device, equal_lengths)

    def _plan(self, engine: Engine, tiles: TileRequest, begun: Path | None) -> Plan:
        try:
            return engine.plan(tiles, distributed.world_size())
        except MemoryBudgetError as error:
            needed, given = error.needed / 2**30, error.given / 2**30
            if begun is not None:
                raise KernelMismatchError(
                    f"{begun} holds tiles of an unfinished kernel that were planned in another environment, such as "
                    f"one with numba: tiles of their size take {needed:.2f} GB beside the model here, and their plan "
                    f"allows {given:.2f} GB; go on in that environment, or remove the folder to compute this kernel "
                    "anew",
                    path=begun,
                    differences=["environment"],
                ) from error
            or_jvp = "" if self._args.part_keys or self._adapters else ", or take `kernel_engine=jvp`"
            raise SettingError(
                f"`kernel_memory_gb`: the tiles take {needed:.2f} GB beside the model, but only {given:.2f} GB are "
                f"allowed; give at least {needed + 0.005:.2f}, smaller `per_device_train_batch_size` and "
                f"`per_device_eval_batch_size`{or_jvp}",
                setting="kernel_memory_gb",
                value=given,
            ) from error

    @functools.cached_property
    def _memory_gb(self) -> float:
        """The budget of every kernel: later ones find less free memory, but also what the ones before them hold."""
        return min(distributed.gather(self._memory_budget().gb))

    def _memory_budget(self) -> MemoryBudget:
        if self._args.kernel_memory_gb is not None:
            return MemoryBudget.from_gb(self._args.kernel_memory_gb)
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self._args.device.type == "cpu" else 1
        return MemoryBudget.default(self._args.device, neighbours)

    def dry_run(
        self,
        find_kernel: Callable[[str], Path | None],
        describe_kernel: Callable[[str, Path], None],
        logits: Callable[[FeatureDataset], Tensor],
        started: float,
        last_step: int | None = None,
    ) -> None:
        """Log what the kernels of a run take, without computing them.

        Args:
            find_kernel: Returns the file of a split's kernel; None where it is to be computed.
            describe_kernel: Logs a kernel that is in a file.
            logits: Computes the logits of the untrained model, to measure its time.
            started: When the program started, by `time.perf_counter`.
            last_step: The step of a training of which the run makes a snapshot, besides step 0; None without snapshots.
        """
        memory, jobs = resident_bytes(), []
        seconds = 0.0
        for split, data in self._experiment.datasets.items():
            path = find_kernel(split)
            if path is not None:
                describe_kernel(split, path)
                continue
            job = self.job(split)
            logger.info("would compute the %s", PlanSummary.of(job, self.grad_dim))
            if isinstance(job.engine, ProjectedEngine):
                seconds += describe_check(job.engine, self._args.projection_check, self._args.projection_tolerance)
            seconds += job.seconds() + _seconds_of_logits(data, logits)
            jobs.append(job)
        if last_step is not None:
            seconds += self._describe_snapshots(last_step, logits)
        log_total(jobs, seconds + time.perf_counter() - started, memory, self._args)

    def _describe_snapshots(self, last_step: int, logits: Callable[[FeatureDataset], Tensor]) -> float:
        """Log what snapshots of the steps 0 and T add; return their time in seconds."""
        datasets = self._experiment.datasets
        seconds = self.job("train").seconds()
        seconds += LOGITS_OF_SNAPSHOTS * sum(_seconds_of_logits(data, logits) for data in datasets.values())
        logger.info(
            "would write snapshots of the steps 0 and %d: the train × train kernel at step %d, which takes what that "
            "at the start takes, and the logits and tangents of %s; %s more",
            last_step,
            last_step,
            quantity(sum(map(len, datasets.values())), "prompt"),
            about(seconds),
        )
        return seconds


@dataclasses.dataclass(frozen=True)
class PlanSummary:
    """The size of a kernel and what computing it takes, in the words of a log.

    Attributes:
        kernel: Its name, formula and examples.
        size: Its logits, parameters and tiles.
        cost: Memory, time and disk space.
    """

    kernel: str
    size: str
    cost: str

    @classmethod
    def of(cls, job: KernelJob, grad_dim: int) -> "PlanSummary":
        """Summarise a job whose kernel has `grad_dim` parameters."""
        problem, plan = job.engine.problem, job.plan
        tokens = " × ".join(str(sum(examples.shapes)) for examples in (problem.train, problem.x_examples))
        tiles = quantity(sum(1 for _ in plan), "tile")
        return cls(
            f"{job.name} kernel ({problem.formula.name}): {plan.train_size} × {plan.x_size} examples of {tokens} "
            "tokens in all",
            f"{quantity(problem.num_logits, 'logit')}, {quantity(grad_dim, 'parameter')}; "
            f"{job.engine.summary(plan)}, {tiles} of {plan.tile_size.row} × {plan.tile_size.column}",
            f"about {job.memory_bytes / 2**30:.2f} GB beside the model, {about(job.seconds())}, and "
            f"{job.file_bytes / 2**20:.1f} MB on disk",
        )

    def __str__(self) -> str:
        return f"{self.kernel}\n  {self.size}\n  {self.cost}"


def log_total(jobs: Iterable[KernelJob], seconds: float, resident: int, args: TrainingArguments) -> None:
    """Log what the kernels of a dry run take together.

    Args:
        jobs: The kernels that would be computed.
        seconds: Their time.
        resident: The bytes that the process holds before any kernel.
        args: The arguments of the run.
    """
    jobs = list(jobs)
    beside = max((job.memory_bytes for job in jobs), default=0)
    on_gpu = args.device.type == "cuda"
    memory = f"{beside / 2**30:.2f} GB beside the model" if on_gpu else f"{(resident + beside) / 2**30:.2f} GB"
    each = " in each process" if distributed.world_size() > 1 else ""
    on_disk, in_tiles = sum(job.file_bytes for job in jobs), max((job.tile_bytes for job in jobs), default=0)
    logger.info(
        f"in all {about(seconds)} before solving, {memory} of memory{each}, and {on_disk / 2**20:.1f} MB in "
        f"{args.output_dir}, {in_tiles / 2**20:.1f} MB more until the last kernel is finished; nothing was computed"
    )


def about(seconds: float) -> str:
    """Write an estimate of a time: ``about 4.3 s``."""
    return f"about {duration(max(seconds, 0.1))}"


def _seconds_of_logits(data: FeatureDataset, logits: Callable[[FeatureDataset], Tensor]) -> float:
    """Estimate the time of the untrained model's logits by those of a few prompts."""
    few = dataclasses.replace(data, features=data.features[:NUM_TIMED_PROMPTS])
    return seconds_of(lambda: logits(few)) * len(data) / max(len(few), 1) / distributed.world_size()
