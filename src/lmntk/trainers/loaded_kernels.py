"""Prediction from kernels: "training" fits a solver to the train kernel, "evaluation" predicts with it."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from lmntk import distributed, solvers
from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.data.metrics import mean_over_samples
from lmntk.errors import FileError, KernelMismatchError
from lmntk.experiment.experiment import Evaluation, LoadedKernels, RunInputs
from lmntk.experiment.provenance import spec_from_arguments, spec_from_data, wanted_slices
from lmntk.kernels import FORMULAS
from lmntk.kernels.memory import resident_bytes
from lmntk.prompts.features import Collator, FeatureDataset
from lmntk.solvers.candidates import numbers_of
from lmntk.solvers.gaussian_process import GaussianProcess
from lmntk.solvers.problem import SolverSettings, class_ids
from lmntk.solvers.ridge_problem import RidgeProblem
from lmntk.solvers.selection import Examples, Score, Selection, select_by_leave_one_out, select_on_dev
from lmntk.storage.atomic import write_text
from lmntk.storage.kernel_cache import KernelCache, samples_of
from lmntk.storage.kernel_files import LayerKernels
from lmntk.storage.paths import RunPaths
from lmntk.storage.tables import format_table
from lmntk.trainers.base import FewShotTrainer, score
from lmntk.trainers.kernel_planning import log_total
from lmntk.trainers.layer_scores import LayerSolver, fit_layers, score_layers, write_layer_scores
from lmntk.trainers.left_out import leave_one_out_metrics
from lmntk.trainers.lstsq_method import blocked_solver, lacks_eigenvectors, method_of, solver_grid
from lmntk.trainers.projected_width import ERROR_KEY, awaits_width, check_stored_error, stored_error, stored_width
from lmntk.trainers.variance import check_one_prompt_each, gaussian_process, score_variance

logger = logging.getLogger(__name__)

NO_MODEL = Collator(0, segments=False)
"""The collator of a trainer without a model; it makes no batch."""


@dataclass(frozen=True)
class SplitKernel:
    """The kernel between the train examples and those of a split.

    Attributes:
        values: float64 ``[N, C, X, C]``, or ``[2, N, C, X, C]`` if the formula is asymmetric.
        labels: Those of the X examples, ``[X]``.
        layers: The layers' parts of the kernel; empty where they are not wanted.
        diagonal: K(x, x), float64 ``[X, C, C]`` or ``[2, X, C, C]``; None where it is not there, or X is train.
        projection_error: The relative error of its entries, where it is an estimate.
    """

    values: Tensor
    labels: Tensor
    layers: LayerKernels = field(default_factory=dict)
    diagonal: Tensor | None = None
    projection_error: float | None = None


Side = tuple[SplitKernel | None, np.ndarray | None]
"""The kernel of a split and, where it is needed, f₀, ``[X, C]``."""


class LoadedKernelTrainer(FewShotTrainer):
    """A `Trainer` that predicts from the kernels in a folder, without a model.

    The first process holds the kernels and the solver; all processes get the results.

    Args:
        inputs: What was built from the arguments.
        model_args: The arguments of the model, for the kernels' definition.
        args: The arguments of the run.
        model: The model of a run that has one.
        collator: Makes batches for that model.
    """

    def __init__(
        self,
        inputs: RunInputs,
        model_args: ModelArguments,
        args: TrainingArguments,
        model: nn.Module | None = None,
        collator: Collator = NO_MODEL,
    ) -> None:
        # There are no steps to evaluate in between.
        args = args.with_changes(eval_strategy=IntervalStrategy.NO)
        super().__init__(inputs.task, model or nn.Module(), args, collator)
        self._inputs = inputs
        self._model_args = model_args
        self._cache = KernelCache(
            output_dir=Path(args.output_dir),
            load_dir=None if args.load_kernels is None else Path(args.load_kernels),
            task_key=inputs.task.key,
            overwrite=args.overwrite_kernels and args.load_kernels is None,
            model=model_args.model_name_or_path,
            data_dir=inputs.data_dir,
            missing=inputs.missing if isinstance(inputs, LoadedKernels) else (),
            slices=wanted_slices(model_args, args),
        )
        self._num_logits = 1 if args.binary_classification else len(inputs.task.labels)
        self._paths = RunPaths(args.output_dir, inputs.task.key)
        self._is_trained = False
        self._solver: solvers.FittedSolver | None = None
        self._train_is_whole: bool | None = None
        self._dev: SplitKernel | None = None
        self._dev_is_ready = False
        self._layer_solvers: dict[str, LayerSolver] = {}
        self._layer_scores: dict[str, dict[str, float]] = {}
        self._process: GaussianProcess | None = None  # on the first process, with `kernel_variance`
        self._left_out_metrics: Mapping[str, float] = {}  # on the first process

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Fit the solver to the kernel of the train examples with themselves."""
        if self.args.kernel_variance:
            distributed.on_all_ranks(self._check_one_prompt_each)
        distributed.on_rank_zero(self._cache.start_overwriting, self._inputs.datasets)
        kernel = self.prepare("train")
        sides = [(kernel, self._f0("train", kernel))]
        if len(self.args.solver_grid) > 1 and self.args.select_by == "dev":
            self._dev = self.prepare("dev")
            self._dev_is_ready = True
            sides.append((self._dev, self._f0("dev", self._dev)))
        chosen, selection = distributed.on_rank_zero(self._fit, *sides)
        self.args = self.args.with_changes(**chosen, kernel_selection=selection)
        self._is_trained = True
        return TrainOutput(0, 0.0, {})

    def evaluate_split(self, dataset: FeatureDataset, metric_key_prefix: str = "eval") -> Evaluation:
        """Predict a split from its kernel with the train examples, and score the predictions.

        Returns:
            The metrics are those of the task, the solver's loss and its own metrics, ``grad_dim`` of a model, and for
            `lstsq` those of leave-one-out on train.
        """
        if not self._is_trained:
            self.train()
        kernel = self._take_dev() if dataset.mode == "dev" and self._dev_is_ready else self.prepare(dataset.mode)
        f0 = self._f0(dataset.mode, kernel)
        evaluation = distributed.on_rank_zero(self._predict_and_score, dataset, kernel, f0, metric_key_prefix)
        self.log(dict(evaluation.metrics))
        return evaluation

    def _check_one_prompt_each(self) -> None:
        for data in self._inputs.datasets.values():
            check_one_prompt_each(data)

    def _take_dev(self) -> SplitKernel | None:
        """Return the kernel that settings were chosen with, and let it go."""
        kernel, self._dev, self._dev_is_ready = self._dev, None, False
        return kernel

    def prepare(self, split: str) -> SplitKernel | None:
        """Return the train × `split` kernel on the first process, None on the others.

        Raises:
            UsageError: The file cannot be read, or its kernel is of another command.
        """
        path = self._find_kernel(split)
        assert path is not None
        return distributed.keep_on_rank_zero(self._load, split, path)

    def finish(self) -> None:
        """Write how each layer predicts alone, and end the overwriting of kernels."""
        distributed.on_rank_zero(self._finish)

    def dry_run(self, started: float) -> None:
        """Log which kernels this run would take.

        Args:
            started: When the program started, by `time.perf_counter`.
        """
        memory = resident_bytes()
        for split in self._inputs.datasets:
            path = self._find_kernel(split)
            assert path is not None
            rows = self._describe_file(split, path)
            if split == "train":
                blocked_solver(self.args, rows)  # says if one is taken
        log_total([], time.perf_counter() - started, memory, self.args)

    def _spec(self, split: str) -> dict[str, Any]:
        """Return what defines the numbers of the train × `split` kernel, as far as it is known without a model."""
        wanted = spec_from_arguments(self._inputs, self._model_args, self.args, split)
        return wanted | spec_from_data(self._inputs, split)

    def _f0(self, split: str, kernel: SplitKernel | None) -> np.ndarray | None:
        """Return the untrained model's logits on a split, ``[X, C]``, if `adjust_for_init` needs them."""
        if not self.args.adjust_for_init:
            return None
        return distributed.on_rank_zero(self._load_f0, split, kernel)

    def _load_f0(self, split: str, kernel: SplitKernel | None) -> np.ndarray:
        assert kernel is not None
        return self._cache.load_logits(split, kernel.labels)[0].numpy()

    def _find_kernel(self, split: str) -> Path | None:
        chosen = awaits_width(self.args)
        if chosen:
            width = distributed.on_rank_zero(lambda: stored_width(self._cache, self._spec("train"), self.args))
            self._set_width(width)
        return distributed.on_rank_zero(self._find_fitting, split, not chosen)

    def _find_fitting(self, split: str, given_width: bool) -> Path | None:
        path = self._cache.find_reusable(split, self._spec(split))
        if path is not None and split == "train":
            check_stored_error(path, self.args, given_width)
        return path

    def _set_width(self, width: int | None) -> None:
        """Take the width of a projection from the kernels in a folder; None if they do not have it."""
        self.args = self.args.with_changes(projection_width=width)

    def _load(self, split: str, path: Path) -> SplitKernel:
        values, labels = self._cache.load(path, FORMULAS[self.args.kernel_formula].is_asymmetric, self._num_logits)
        self._check_labels(split, path, labels)
        self._check_whole_numbers(split, path, values)
        layers = self._cache.load_layers(path, split, values) if self._cache.slices.layers_alone else {}
        diagonal = self._load_diagonal(split, path, values) if self.args.kernel_variance else None
        logger.info("took the train × %s kernel from %s", split, path)
        return SplitKernel(values, labels, layers, diagonal, stored_error(path))

    def _load_diagonal(self, split: str, path: Path, values: Tensor) -> Tensor | None:
        if split == "train":
            return None
        found = self._cache.load_diagonal(path, split, values)
        if found is None:
            beside = self._cache.source_paths.diagonal(split)
            raise FileError(
                f"`kernel_variance` needs K(x, x) of {split}, and {beside} does not exist: give the command that made "
                "the kernel again with `kernel_variance=True`, which adds it, or leave `kernel_variance` out",
                path=beside,
            )
        return found

    def _describe_file(self, split: str, path: Path) -> int:
        """Log a kernel that is in a file; return N · C, its rows."""
        values, _ = self._cache.load(path, FORMULAS[self.args.kernel_formula].is_asymmetric, self._num_logits)
        logger.info("would take the train × %s kernel (%s) from %s", split, " × ".join(map(str, values.shape)), path)
        return values[..., 0, 0].numel()

    def _check_labels(self, split: str, path: Path, labels: Tensor) -> None:
        """Check that a kernel has the labels of the examples that were read, if any were."""
        if split not in self._inputs.data_files:
            return
        expected = self._inputs.datasets[split].labels
        if len(labels) != len(expected):
            raise KernelMismatchError(
                f"{path} has {len(labels)} {split} examples, but `data_dir` has {len(expected)}, counted with every "
                "template and draw: give the `data_dir` and `num_sample` that it was made with",
                path=path,
            )
        if class_ids(labels.numpy(), self._num_logits).tolist() != list(expected):
            raise KernelMismatchError(
                f"{path} has other labels than the {split} examples of `data_dir`: its data, or their order, differ; "
                "give the `data_dir` that it was made with",
                path=path,
            )

    def _check_whole_numbers(self, split: str, path: Path, values: Tensor) -> None:
        """Check that a kernel holds whole numbers, as counts of equal signs are, if and only if that of train does."""
        rows = values.reshape(-1, *values.shape[-3:])  # one by one: `values` may be larger than memory
        is_whole = all(bool((row % 1 == 0).all()) for row in rows)
        if split == "train":
            self._train_is_whole = is_whole
        elif self._train_is_whole not in (None, is_whole) and any(row.any() for row in rows):
            whole = "train" if self._train_is_whole else split
            raise KernelMismatchError(
                f"{path} and the train kernel beside it have different formulas: only the values of {whole} are whole "
                "numbers, as those of signgd are; put kernels of one command into the folder",
                path=path,
            )

    def _fit(self, train: Side, dev: Side | None = None) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Fit the solver; return its settings and, if there are candidates, how they were chosen.

        Args:
            train: The kernel of the train examples, and f₀ if it is needed.
            dev: The same of dev, if settings are chosen by it.
        """
        kernel, f0 = train
        assert kernel is not None
        grid = solver_grid(self.args, kernel.values[..., 0, 0].numel())
        labels = kernel.labels.numpy()
        selection = self._select(grid, train, dev) if len(grid) > 1 else None
        settings = grid[0] if selection is None else selection.chosen.settings

        def fit(values: np.ndarray) -> solvers.FittedSolver:
            return solvers.fit(self.args.kernel_solver, values, labels, settings, f0)

        self._solver = fit(kernel.values.numpy()) if selection is None else selection.fitted
        self._left_out_metrics = self._leave_one_out(kernel, f0, settings)
        if self.args.kernel_variance and not lacks_eigenvectors(settings, "the metrics nll and ece"):
            self._process = gaussian_process(RidgeProblem(kernel.values.numpy(), labels, settings, f0))
        self._layer_solvers = fit_layers(kernel.layers, fit, progress=not self.args.disable_tqdm)
        return numbers_of(settings) | method_of(settings), None if selection is None else self._record(selection)

    def _select(self, grid: Sequence[SolverSettings], train: Side, dev: Side | None) -> Selection:
        logger.info("choosing among %d settings of %s", len(grid), self.args.kernel_solver)
        if dev is None:
            data = self._inputs.datasets["train"]
            score, samples = self._score_of(data, train)
            return select_by_leave_one_out(grid, _examples(train), score, samples)
        score, _ = self._score_of(self._inputs.datasets["dev"], dev)
        return select_on_dev(self.args.kernel_solver, grid, _examples(train), _examples(dev), score)

    def _record(self, selection: Selection) -> dict[str, Any]:
        """Write the table of the candidates, log the choice, and return what the run's record says of it."""
        metric = self._inputs.task.main_metrics[0]
        path = self._paths.solver_selection()
        write_text(path, format_table(selection.table(), "csv"))
        logger.info("%s → %s", selection.sentence(metric), path)
        return {
            "by": selection.by,
            "metric": metric,
            "score": selection.chosen.score,
            "settings": len(selection.candidates),
            "ties": selection.ties,
        }

    def _score_of(self, data: FeatureDataset, side: Side) -> tuple[Score, int]:
        """Return a function that scores logits by the task's main metric, and the samples of each example."""
        assert side[0] is not None
        labels = side[0].labels
        samples = samples_of(labels, data.num_sample, f"the kernel of {data.mode}")
        classes = class_ids(labels.numpy(), self._num_logits)[: len(labels) // samples]
        name = f"{data.task.metric_prefix}{data.task.main_metrics[0]}"
        return lambda logits: score(data.task, mean_over_samples(logits, len(classes)), classes)[name], samples

    def _leave_one_out(self, kernel: SplitKernel, f0: np.ndarray | None, settings: SolverSettings) -> dict[str, float]:
        """Score the train examples, each predicted from all the others; nothing where that is not in closed form."""
        left_out = "the leave-one-out metrics and gcv"
        if self.args.kernel_solver != "lstsq" or lacks_eigenvectors(settings, left_out):
            return {}
        of_task, samples = self._score_of(self._inputs.datasets["train"], (kernel, f0))
        problem = RidgeProblem(kernel.values.numpy(), kernel.labels.numpy(), settings, f0, samples)
        metrics = leave_one_out_metrics(problem, self._inputs.task.main_metrics[0], of_task)
        if metrics:
            numbers = ", ".join(f"{name} = {value:.6g}" for name, value in metrics.items())
            logger.info("train, each example predicted from the others: %s", numbers)
        return metrics

    def _predict_and_score(
        self, data: FeatureDataset, kernel: SplitKernel | None, f0: np.ndarray | None, prefix: str
    ) -> Evaluation:
        found = self._predict(data, kernel, f0, prefix)
        return replace(found, metrics={**found.metrics, **self._left_out_metrics})

    def _predict(
        self, data: FeatureDataset, kernel: SplitKernel | None, f0: np.ndarray | None, prefix: str
    ) -> Evaluation:
        assert kernel is not None and self._solver is not None
        labels = kernel.labels.numpy()
        main_score, samples = self._score_of(data, (kernel, f0))
        classes = class_ids(labels, self._num_logits)[: len(labels) // samples]

        def layer_score(solver: solvers.FittedSolver, part: Tensor) -> float:
            return main_score(solver.predict(part.numpy(), labels, f0, data.mode).logits)

        prediction = self._solver.predict(kernel.values.numpy(), labels, f0, data.mode)
        averaged = mean_over_samples(prediction.logits, len(classes))
        metrics = {f"{prefix}_{name}": value for name, value in score(data.task, averaged, classes).items()}
        metrics |= {f"{prefix}_loss": prediction.loss, **prediction.metrics}
        if kernel.projection_error is not None:
            metrics[ERROR_KEY] = kernel.projection_error
        if self._process is not None:
            assert kernel.diagonal is not None
            found = kernel.values.numpy(), kernel.diagonal.numpy(), averaged, classes
            table = self._paths.variance(data.mode)
            scores = score_variance(self._process, *found, list(map(str, data.task.labels)), table)
            metrics |= {f"{prefix}_{name}": value for name, value in scores.items()}
        if kernel.layers:
            self._layer_scores[data.mode] = score_layers(self._layer_solvers, kernel.layers, layer_score)
        return Evaluation(metrics, averaged, classes)

    def _finish(self) -> None:
        if self.args.kernel_selection is None:
            self._paths.solver_selection().unlink(missing_ok=True)  # of an earlier run
        for split in self._inputs.datasets:
            self._paths.influence(split).unlink(missing_ok=True)  # the same
        table = self._paths.layer_results()
        if self._cache.slices.layers_alone:
            write_layer_scores(table, self._layer_solvers, self._layer_scores, self._inputs.task.main_metrics[0])
        else:
            table.unlink(missing_ok=True)  # of an earlier run with another kernel or solver
        if self._process is None:
            for split in self._inputs.datasets:
                self._paths.variance(split).unlink(missing_ok=True)  # of an earlier run
        self._cache.finish()


def _examples(side: Side) -> Examples:
    kernel, f0 = side
    assert kernel is not None
    return Examples(kernel.values.numpy(), kernel.labels.numpy(), f0)
