"""Features of a run's examples: what they take, writing them batch by batch, and their error on some examples."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import lmntk
from lmntk.config.arguments import ActiveTrainer, DataArguments, ModelArguments, TrainingArguments
from lmntk.config.record_arguments import Arguments, arguments_of_record
from lmntk.errors import FileError, KernelMismatchError, ModelError, NotFiniteError, SettingError
from lmntk.experiment.build import build
from lmntk.experiment.experiment import Experiment
from lmntk.kernels import FORMULAS, MemoryBudget, Projection, assemble, make_engine
from lmntk.kernels.batching import length_buckets
from lmntk.kernels.features import FeatureMap
from lmntk.kernels.timing import seconds_of
from lmntk.kernels.tuning import DEFAULT_TUNING
from lmntk.prompts.features import FeatureDataset, FeatureExamples
from lmntk.solvers.problem import signed
from lmntk.storage.feature_files import FeatureTable, StoredFeatures, feature_writer, is_written
from lmntk.storage.kernel_cache import KernelCache
from lmntk.storage.kernel_metadata import kernel_differences, read_description
from lmntk.storage.paths import RunPaths
from lmntk.trainers.kernel_planning import KernelPlanner
from lmntk.trainers.linear_head import HeadSettings, fit_linear_head

DEFAULT_WIDTH = 16
"""The width without a projected run: 256 numbers for each weight."""

FORMAT = "1"
"""Changes whenever the same command would write other features."""

MOST_TIMED_EXAMPLES = 64
FEATURE_BATCH_BYTES = 2**26
OF_SOLVING = ("adjust_for_init", "f0_scaling")
"""What the solution from features takes over from a run's solver."""

OF_AN_ESTIMATE = ("engine", "projection")
"""The keys of a description that say how the run's own kernel was estimated, which features do not depend on."""


def arguments_of_run(record: Mapping[str, Any], train_kernel: Path, data_dir: Path | None) -> Arguments:
    """Return the arguments of a finished run, which read the splits that the run has read, and adjust as it has.

    Raises:
        FileError: The run has no record.
    """
    if not record or read_description(train_kernel) is None:
        raise FileError(
            f"{train_kernel.parent} does not record the model and prompts of its kernel, so that no features can be "
            "computed: repeat the command that made it",
            path=train_kernel,
        )
    model, data, args = arguments_of_record(record, data_dir=None if data_dir is None else str(data_dir))
    own = {name: record[name] for name in OF_SOLVING if name in record}
    reads = {name: bool(record.get(name, True)) for name in ("do_eval", "do_predict")}
    return model, data, args.with_changes(**own, **reads)


@dataclass(frozen=True)
class FeatureCost:
    """What the features of all splits take.

    Attributes:
        dimension: d.
        prompts: How many prompts there are in the splits that are not written yet.
        bytes: Of all files.
        seconds: Of what is not written yet.
        fallback_parameters: Parameters of modules that no layer type knows.
    """

    dimension: int
    prompts: int
    bytes: int
    seconds: float
    fallback_parameters: int


class FeatureJob:
    """The features of an experiment's splits.

    Args:
        arguments: Those of a kernel run.
        projection: The width and the seed; None for those of the arguments, else `DEFAULT_WIDTH`.
        dimension: The numbers that features are hashed to; None for all columns of all parameters.

    Attributes:
        experiment: What was built from the arguments.
        paths: Where files go, in the arguments' `output_dir` unless replaced.

    Raises:
        SettingError: The kernel has signs.
        UsageError: The model or the data cannot be read.
    """

    def __init__(
        self, arguments: Arguments, width: int | None, seed: int | None, dimension: int | None, folder: Path
    ) -> None:
        model_args, data_args, args = arguments
        _check(args)
        self.arguments: tuple[ModelArguments, DataArguments, TrainingArguments] = arguments
        built = build(*arguments)
        assert isinstance(built, Experiment)
        self.experiment = built
        built.model.to(args.device)
        if args.fits_linear_head:
            fit_linear_head(built, args.device, HeadSettings.of(args))
        self.paths = RunPaths(folder, built.task.key)
        cache = KernelCache(folder, None, built.task.key, False, model_args.model_name_or_path, "")
        self._planner = KernelPlanner(built, model_args, args, cache)
        own = args.projection or Projection(DEFAULT_WIDTH)
        self.projection = Projection(own.width if width is None else width, own.seed if seed is None else seed)
        self._budget = MemoryBudget.default(args.device)
        try:
            self.map = FeatureMap(self._planner.problem("train"), self.projection, self._budget, dimension)
        except ValueError as error:
            raise ModelError(f"no features can be made: {error}") from error

    def check_run(self, train_kernel: Path) -> None:
        """Check that the model and the train examples are still those of a kernel.

        Raises:
            KernelMismatchError: They have changed.
        """
        differences = kernel_differences(read_description(train_kernel) or {}, self._planner.spec("train"))
        if differences:
            raise KernelMismatchError(
                f"the model or the train examples are not those of {train_kernel} any more ({'; '.join(differences)}): "
                "put them back, or repeat the run with `overwrite_kernels=True`",
                path=train_kernel,
                differences=differences,
            )

    def table(self, split: str) -> FeatureTable:
        """Return what the file of a split holds, apart from the features."""
        labels = np.asarray(self.experiment.datasets[split].labels, dtype=np.int64)
        num_logits = self._planner.problem("train").num_logits
        kernel = {key: value for key, value in self._planner.spec(split).items() if key not in OF_AN_ESTIMATE}
        metadata = {
            "format": FORMAT,
            "model": self.arguments[0].model_name_or_path,
            "task": self.experiment.task.name,
            "split": split,
            "width": str(self.projection.width),
            "seed": str(self.projection.seed),
            "weights_sha256": kernel["weights_sha256"],
            "layout": json.dumps([[part.name, part.start, part.stop] for part in self.map.parts]),
            "kernel": json.dumps(kernel, sort_keys=True, default=str),
            "lmntk": lmntk.__version__,
        }
        ids = signed(labels).astype(np.int64) if num_logits == 1 else labels
        return FeatureTable(ids, num_logits, self.map.dimension, metadata)

    def cost(self) -> FeatureCost:
        """Return what the features take, by timing some."""
        train, bytes_, tokens, prompts = self._examples("train"), 0, 0, 0
        for split in self.experiment.datasets:
            table = self.table(split)
            bytes_ += table.num_bytes
            if not is_written(self.paths.features(split), table):
                examples = self._examples(split)
                tokens, prompts = tokens + sum(examples.shapes), prompts + len(examples)
        typical = sorted(range(len(train)), key=train.shapes.__getitem__)[len(train) // 2]
        few = next(self._batches(train, [typical] * MOST_TIMED_EXAMPLES))
        seconds = seconds_of(lambda: self.map.features(train, few)) / sum(train.shapes[index] for index in few)
        return FeatureCost(self.map.dimension, prompts, bytes_, seconds * tokens, self.map.num_fallback_parameters)

    def write(self, split: str, show_progress: bool = False) -> StoredFeatures:
        """Write the features of a split, or go on where a killed command has stopped; return them.

        Raises:
            NotFiniteError: The model's logits, or features, are NaN or infinite.
            FileError: The file system refuses.
        """
        path, table, examples = self.paths.features(split), self.table(split), self._examples(split)
        if is_written(path, table):
            return StoredFeatures(path)
        with feature_writer(path, table) as writer:
            missing = writer.missing()
            done, total = len(examples) - len(missing), len(examples)
            bar = tqdm(total=total, initial=done, unit="prompt", desc=f"features of {split}", disable=not show_progress)
            with bar:
                for batch in self._batches(examples, missing):
                    writer.write(batch, *self._features(examples, batch, split))
                    bar.update(len(batch))
        return StoredFeatures(path)

    def error(self, count: int) -> float:
        """Return ‖ΦΦᵀ − K‖ / ‖K‖ in the Frobenius norm, on a number of train examples whose kernel is computed."""
        train = self.experiment.datasets["train"]
        chosen = np.linspace(0, len(train) - 1, min(count, len(train))).round().astype(int)
        examples = self._examples_of(replace(train, features=[train.features[index] for index in chosen]))
        whole = self._planner.problem("train")
        problem = replace(whole, train=examples, x=None, part_of=None, low_rank=None, projection=None)
        engine = make_engine(problem, "auto", self._budget)
        plan = engine.plan()
        exact = assemble(engine.blocks(plan), plan, problem)[0].numpy()
        found = np.empty((len(chosen), problem.num_logits, self.map.dimension))
        for batch in self._batches(examples, range(len(chosen))):
            found[batch] = self._features(examples, batch, "train")[0]
        estimate = np.einsum("iad,jbd->iajb", found, found, optimize=True)
        return float(np.linalg.norm(estimate - exact) / np.linalg.norm(exact))

    def _features(self, examples: FeatureExamples, batch: list[int], split: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            found = self.map.features(examples, batch)
        except ValueError as error:
            raise ModelError(f"no features can be made: {error}") from error
        features, logits = (tensor.detach().float().cpu().numpy() for tensor in found)
        for row, index in enumerate(batch):
            if not (np.isfinite(features[row]).all() and np.isfinite(logits[row]).all()):
                raise NotFiniteError(
                    f"the features of {split} example {index} (counted from 0) are NaN or infinite: take "
                    "`kernel_dtype=float64`, or look at that text",
                    example=index,
                    split=split,
                )
        return features, logits

    def _batches(self, examples: FeatureExamples, indices: Iterable[int]) -> Iterator[list[int]]:
        """Yield batches of nearly equal length; one whose features would take much memory is cut."""
        per_example = 4 * self._planner.problem("train").num_logits * self.map.num_columns
        size = max(1, FEATURE_BATCH_BYTES // per_example)
        order = sorted(indices, key=lambda index: (examples.shapes[index], index))
        for bucket in length_buckets(examples, order, DEFAULT_TUNING.batch_tokens):
            yield from (bucket[start : start + size] for start in range(0, len(bucket), size))

    def _examples(self, split: str) -> FeatureExamples:
        return self._examples_of(self.experiment.datasets[split])

    def _examples_of(self, data: FeatureDataset) -> FeatureExamples:
        built = self.experiment
        return FeatureExamples(data, built.collator, self.arguments[2].device, built.model.equal_lengths)


def _check(args: TrainingArguments) -> None:
    """Refuse arguments of another trainer than the kernel's, and kernels that features cannot estimate."""
    if args.active_trainer != ActiveTrainer.KERNEL:
        raise SettingError(
            f"`trainer={args.trainer}`: features are those of a kernel: give `trainer=kernel`, and not `no_train`",
            setting="trainer",
            value=args.trainer,
        )
    if FORMULAS[args.kernel_formula].signed:
        raise SettingError(
            f"`kernel_formula={args.kernel_formula}` needs the sign of every number of a gradient, which a projection "
            "does not keep: take `kernel_formula=sgd`",
            setting="kernel_formula",
            value=args.kernel_formula,
        )
