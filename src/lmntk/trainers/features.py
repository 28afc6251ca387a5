"""Features of a run's examples: what they take, writing them batch by batch, and their error on some examples."""

import functools
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import lmntk
from lmntk.config.record_arguments import Arguments
from lmntk.errors import KernelMismatchError, ModelError, NotFiniteError, SettingError
from lmntk.experiment.build import build
from lmntk.experiment.experiment import Experiment
from lmntk.experiment.projection_error import WIDTHS
from lmntk.kernels import MemoryBudget, MemoryBudgetError, Projection
from lmntk.kernels.batching import Examples, length_buckets
from lmntk.kernels.contraction import summation_dtype
from lmntk.kernels.feature_check import FeatureCheck
from lmntk.kernels.features import FeatureMap
from lmntk.kernels.projection_check import NUM_DRAWS
from lmntk.kernels.timing import seconds_of
from lmntk.kernels.tuning import DEFAULT_TUNING
from lmntk.prompts.features import FeatureDataset, FeatureExamples
from lmntk.solvers.problem import signed
from lmntk.storage.feature_files import (
    FeatureTable,
    StoredFeatures,
    bytes_to_write,
    feature_differences,
    feature_writer,
    is_written,
    partial_path,
    refuse_others,
)
from lmntk.storage.kernel_cache import KernelCache
from lmntk.storage.kernel_metadata import kernel_differences, read_description
from lmntk.storage.output_folder import require_room
from lmntk.storage.paths import RunPaths
from lmntk.trainers.feature_error import FeatureError, too_little_memory
from lmntk.trainers.feature_settings import FeatureSettings, check_settings, check_size
from lmntk.trainers.kernel_planning import KernelPlanner
from lmntk.trainers.linear_head import HeadSettings, fit_linear_head

logger = logging.getLogger(__name__)

FEATURE_WIDTH = 16
"""The width where no projected run and no tolerance gives another: 256 numbers for each weight."""

FORMAT = "1"
"""Changes whenever the same command would write other features."""

MOST_TIMED_EXAMPLES = 64
FEATURE_BATCH_BYTES = 2**26
BATCH_SHARE = 0.25
"""The part of the memory budget that a batch's propagation may take, and the part that its features may take."""

OF_THE_ENGINE = ("engine", "projection")
"""The keys of a kernel's description that say how the run computed it, on which features do not depend."""

SPLITS = ("train", "dev", "test")


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
        settings: What features are asked for.
        folder: Where files go.
        show_progress: Whether to show progress bars.

    Attributes:
        arguments: The same.
        experiment: What was built from the arguments.
        paths: The names of the files.
        map: Makes the features.

    Raises:
        SettingError: A setting cannot be followed, or the tolerance is not reached within the memory.
        UsageError: The model or the data cannot be read.
    """

    def __init__(
        self, arguments: Arguments, settings: FeatureSettings, folder: Path, show_progress: bool = False
    ) -> None:
        model_args, _, args = self.arguments = arguments
        self._settings, self._quiet = settings, not show_progress
        self._check_size = args.projection_check if settings.check is None else settings.check
        check_settings(args)
        check_size(self._check_size)
        built = build(*arguments)
        assert isinstance(built, Experiment)  # `load_kernels` is refused
        self.experiment = built
        built.model.to(args.device)
        if args.fits_linear_head:
            fit_linear_head(built, args.device, HeadSettings.of(args))
        self.paths = RunPaths(folder, built.task.key)
        cache = KernelCache(folder, None, built.task.key, False, model_args.model_name_or_path, "")
        self._planner = KernelPlanner(built, model_args, args, cache)
        given = args.kernel_memory_gb
        self._budget = MemoryBudget.default(args.device) if given is None else MemoryBudget.from_gb(given)
        tolerance = args.projection_tolerance
        self._awaits_width = tolerance is not None and settings.width is None and args.projection_width is None
        self.map = self._first_map()
        if self._awaits_width:
            self.map = self._map_within(tolerance or 0.0)
        self._check_memory()

    @property
    def projection(self) -> Projection:
        """The width and the seed."""
        return self.map.projection

    def _first_map(self) -> FeatureMap:
        args, settings = self.arguments[2], self._settings
        own = args.projection or Projection(FEATURE_WIDTH)
        width = WIDTHS[0] if self._awaits_width else own.width if settings.width is None else settings.width
        projection = Projection(width, own.seed if settings.seed is None else settings.seed)
        try:
            return FeatureMap(self._planner.problem("train"), projection, self._budget, settings.dimension)
        except ValueError as error:
            raise _as_model_error(error) from error

    def _map_within(self, tolerance: float) -> FeatureMap:
        """Return the map of the smallest width whose error is within a tolerance, for its own seed and in the mean."""
        reached = "no width fits"
        for width in tqdm(WIDTHS, "width of the features", unit="width", disable=self._quiet, leave=False):
            mapped = self.map.redrawn(Projection(width, self.map.projection.seed))
            if self._check.held_bytes(mapped) > self._budget.share(BATCH_SHARE).bytes:
                break
            error = self._check.error(mapped, draws=1)
            if error.own <= tolerance:
                error = self._check.error(mapped)
            if error.upper <= tolerance:
                logger.info("`projection_tolerance=%g`: the width %d has an error of %.2g", tolerance, width, error.own)
                return mapped
            reached = f"those of width {width} have an error of {error.upper:.2g}"
        way = "leave `dimension` out, or allow" if self._settings.dimension else "allow"
        raise SettingError(
            f"`projection_tolerance={tolerance:g}` is not reached by features that the memory has room for: {reached}; "
            f"{way} a larger error, or more memory by `kernel_memory_gb`",
            setting="projection_tolerance",
            value=tolerance,
        )

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
        kernel = {key: value for key, value in self._planner.spec(split).items() if key not in OF_THE_ENGINE}
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

    @functools.cached_property
    def _tables(self) -> dict[str, FeatureTable]:
        return {split: self.table(split) for split in self.experiment.datasets}

    def replaced_files(self) -> list[Path]:
        """Return the files of features of another command, finished or not, that do not go with these.

        Raises:
            KernelMismatchError: There are some, and they are not to be overwritten.
        """
        found = []
        for split in dict.fromkeys((*self._tables, *SPLITS)):
            table = self._tables.get(split, self._tables["train"])
            for path in (self.paths.features(split), partial_path(self.paths.features(split))):
                if not path.exists():
                    continue
                differences = feature_differences(path, table, same_split=split in self._tables)
                if not self._settings.overwrite:
                    refuse_others(path, differences)
                found += [path] if differences else []
        return found

    def prepare(self) -> None:
        """Make room for the files: check the disk, and remove what they replace and the results of other features.

        Raises:
            FileError: The disk has too little room.
        """
        replaced = self.replaced_files()
        needed = sum(bytes_to_write(self.paths.features(split), table) for split, table in self._tables.items())
        require_room(self.paths.folder, needed - sum(512 * path.stat().st_blocks for path in replaced), "the features")
        for path in replaced:
            path.unlink()
        if needed:
            self.clear_results()
            if replaced:
                self.paths.feature_error().unlink(missing_ok=True)

    def clear_results(self) -> None:
        """Remove the predictions and the table of regularizations that an earlier command has written."""
        self.paths.feature_results().unlink(missing_ok=True)
        for split in (*self._tables, *SPLITS):
            self.paths.feature_predictions(split).unlink(missing_ok=True)

    def cost(self) -> FeatureCost:
        """Return what the features take, by timing some."""
        train, bytes_, tokens, prompts = self._examples("train"), 0, 0, 0
        for split, table in self._tables.items():
            bytes_ += table.num_bytes
            if not is_written(self.paths.features(split), table):
                examples = self._examples(split)
                tokens, prompts = tokens + sum(examples.shapes), prompts + len(examples)
        typical = sorted(range(len(train)), key=train.shapes.__getitem__)[len(train) // 2]
        few = next(self._batches(self.map, train, [typical] * MOST_TIMED_EXAMPLES))
        seconds = seconds_of(lambda: self.map.features(train, few)) / sum(train.shapes[index] for index in few)
        return FeatureCost(self.map.dimension, prompts, bytes_, seconds * tokens, self.map.num_fallback_parameters)

    def write(self, split: str) -> StoredFeatures:
        """Write the features of a split, or go on where a killed command has stopped; return them.

        Raises:
            NotFiniteError: The model's logits, or features, are NaN or infinite.
            KernelMismatchError: There are features of another command.
            FileError: The file system refuses.
        """
        path, table, examples = self.paths.features(split), self._tables[split], self._examples(split)
        if is_written(path, table):
            return StoredFeatures(path)
        with feature_writer(path, table) as writer:
            missing = {*writer.missing()}
            done, total = len(examples) - len(missing), len(examples)
            bar = tqdm(total=total, initial=done, unit="prompt", desc=f"features of {split}", disable=self._quiet)
            with bar:
                # A batch that was cut short is computed as a whole again, on which its last bits depend.
                for batch in self._batches(self.map, examples, range(total)):
                    if not missing.isdisjoint(batch):
                        writer.write(batch, *self._features(examples, batch, split))
                        bar.update(len(missing.intersection(batch)))
        return StoredFeatures(path)

    @functools.cached_property
    def _check(self) -> FeatureCheck:
        try:
            return FeatureCheck(self._planner.problem("train"), self._check_size, self._budget, self._batches)
        except MemoryBudgetError as error:
            raise too_little_memory("the exact kernel of the check", error.needed, error.given) from error

    def error(self) -> FeatureError:
        """Return the error of the kernel of the train features, from its file or measured and written there.

        Raises:
            SettingError: The memory is too small, or a width that was given does not reach the tolerance.
        """
        path, metadata = self.paths.feature_error(), self._tables["train"].metadata
        described = {
            "width": self.projection.width,
            "seed": self.projection.seed,
            "dimension": self.map.dimension,
            "kernel": json.loads(metadata["kernel"]),
        }
        found = FeatureError.read(path, described, min(self._check_size, len(self._examples("train"))))
        if found is None:
            try:
                bar = functools.partial(tqdm, desc="error of the features", unit="seed", disable=self._quiet)
                found = FeatureError(len(self._check.examples), NUM_DRAWS, self._check.error(self.map, progress=bar))
            except ValueError as error:
                raise _as_model_error(error) from error
            found.write(path, described)
        tolerance = self.arguments[2].projection_tolerance
        if tolerance is not None and not self._awaits_width and found.upper > tolerance:
            raise SettingError(
                f"`width={self.projection.width}` is too small for `projection_tolerance={tolerance:g}`: the relative "
                f"error is {found.upper:.2g}; leave the width out, and the tolerance chooses it, or allow more",
                setting="projection_tolerance",
                value=tolerance,
            )
        return found

    def _features(self, examples: FeatureExamples, batch: list[int], split: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            found = self.map.features(examples, batch)
        except ValueError as error:
            raise _as_model_error(error) from error
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

    def _bytes_of(self, mapped: FeatureMap) -> tuple[int, int]:
        """Return what a token takes while it is propagated, and what the features of an example take, in bytes."""
        problem = self._planner.problem("train")
        number = summation_dtype(next(iter(problem.params.values())).dtype).itemsize
        propagated = int((1 + DEFAULT_TUNING.activation_factor) * mapped.bytes_per_token)
        return max(1, propagated), number * problem.num_logits * mapped.num_columns

    def _check_memory(self) -> None:
        """Refuse a budget that has no room for the longest prompt."""
        per_token, per_example = self._bytes_of(self.map)
        longest = max(max(self._examples(split).shapes) for split in self.experiment.datasets)
        needed = int(max(longest * per_token, per_example) / BATCH_SHARE)
        if needed > self._budget.bytes:
            raise too_little_memory("the longest prompt, with its features,", needed, self._budget.bytes)

    def _batches(self, mapped: FeatureMap, examples: Examples, indices: Iterable[int]) -> Iterator[list[int]]:
        """Yield batches of nearly equal length; one whose features would take much memory is cut."""
        (per_token, per_example), room = self._bytes_of(mapped), self._budget.share(BATCH_SHARE).bytes
        size = max(1, min(FEATURE_BATCH_BYTES, room) // per_example)
        order = sorted(indices, key=lambda index: (examples.shapes[index], index))
        for bucket in length_buckets(examples, order, min(DEFAULT_TUNING.batch_tokens, room // per_token)):
            yield from (bucket[start : start + size] for start in range(0, len(bucket), size))

    def _examples(self, split: str) -> FeatureExamples:
        return self._examples_of(self.experiment.datasets[split])

    def _examples_of(self, data: FeatureDataset) -> FeatureExamples:
        built = self.experiment
        return FeatureExamples(data, built.collator, self.arguments[2].device, built.model.equal_lengths)


def _as_model_error(error: ValueError) -> ModelError:
    return ModelError(f"no features can be made: {error}")
