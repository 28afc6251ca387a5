"""Which kernel file a run may use: one whose description matches the command, or none.

A file that merely has the right name would give wrong numbers.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lmntk.errors import FileError, KernelMismatchError, UsageError
from lmntk.storage import diagonal_files, kernel_files, kernel_metadata, logits_files
from lmntk.storage.atomic import write_text
from lmntk.storage.kernel_files import LayerKernels
from lmntk.storage.kernel_slices import (
    LAYERS_KEY,
    KernelSlices,
    WantedSlices,
    check_hash,
    check_sum,
    kept_keys,
)
from lmntk.storage.kernel_writer import KernelWriter, kernel_writer
from lmntk.storage.paths import RunPaths
from lmntk.storage.tile_store import TileStore, drop_tiles, read_stored_plan

logger = logging.getLogger(__name__)

LARGEST_ROUNDING = 1e-9  # of the sum of the layers' kernels, relative to the kernel's norm
_REMEDY = "pass `overwrite_kernels=True` to compute it anew, or another TAG or `output_dir` to keep both"

Kernel = tuple[Tensor, Tensor]
"""A kernel, float64 ``[N, C, X, C]`` or ``[2, N, C, X, C]``, and the labels of its X examples."""


@dataclass(frozen=True)
class KernelCache:
    """The kernel and logits files of one run.

    Attributes:
        output_dir: The folder to write kernels to and look for them in.
        load_dir: `load_kernels`: a folder to take kernels from instead.
        task_key: The key of the task in file names.
        overwrite: `overwrite_kernels`.
        model: `model_name_or_path`.
        data_dir: `data_dir`.
        missing: Clauses that name what is missing of the data files and the tokenizer, which is therefore not compared.
        slices: What each kernel must have beside it: `kernel_parts`, `kernel_per_layer`, `kernel_lora_rank`.
    """

    output_dir: Path
    load_dir: Path | None
    task_key: str
    overwrite: bool
    model: str = ""
    data_dir: str = ""
    missing: Sequence[str] = ()
    slices: WantedSlices = WantedSlices()

    @property
    def paths(self) -> RunPaths:
        """The names of the files in the output folder."""
        return RunPaths(self.output_dir, self.task_key)

    @property
    def source_paths(self) -> RunPaths:
        """The names of the files in the folder that kernels come from."""
        return RunPaths(self.load_dir or self.output_dir, self.task_key)

    def start_overwriting(self, splits: Iterable[str]) -> None:
        """Record that `overwrite_kernels` begins to replace kernels, unless a stopped run has recorded it."""
        if self.overwrite and self._overwritten() is None:
            self._write_progress([])
            for split in splits:
                self.drop_tiles(split)

    def finish(self) -> None:
        """Record that the command has all its kernels: the next one with `overwrite_kernels` starts over."""
        self._progress_file.unlink(missing_ok=True)

    def stored_plan(self, split: str, wanted: Mapping[str, Any], left_out: Sequence[str] = ()) -> dict[str, Any] | None:
        """Return the plan of a split's tiles that a stopped run left, see `read_stored_plan`."""
        return read_stored_plan(self.paths.tiles(split), wanted, self.overwrite, left_out)

    def open_tiles(self, split: str, plan: Mapping[str, Any]) -> TileStore:
        """Return the store of a split's tiles of a plan."""
        return TileStore.open(self.paths.tiles(split), plan)

    def drop_tiles(self, split: str) -> None:
        """Remove a split's tiles."""
        drop_tiles(self.paths.tiles(split))

    def find_reusable(self, split: str, wanted: Mapping[str, Any]) -> Path | None:
        """Return the file of a split's kernel, or None if the kernel must be computed.

        Args:
            split: A key of the run's data sets.
            wanted: What defines the wanted kernel, as far as it is known (see `spec_from_arguments`).

        Raises:
            FileError: A file exists that cannot be used.
            KernelMismatchError: A file exists that another command made.
        """
        if self.load_dir is not None:
            return self._find_to_load(split, wanted)
        path = self.paths.kernel(split)
        if path.is_dir():
            raise FileError(f"{path} is a folder where a kernel's file belongs: remove it", path=path)
        if not path.exists():
            return None
        overwritten = self._overwritten()
        if self.overwrite:
            return path if split in (overwritten or ()) and self._is_valid(path, split, wanted) else None
        if overwritten is not None and split not in overwritten:
            raise FileError(
                f"{path} was being replaced by a command with `overwrite_kernels=True` that was stopped: give that "
                f"command again to finish it, or remove {self._progress_file} to keep this kernel",
                path=path,
            )
        stored = kernel_metadata.read_description(path)
        if stored is None:
            raise FileError(
                f"{path} exists already, and no description beside it says what made it: {_REMEDY}", path=path
            )
        differences = kernel_metadata.kernel_differences(stored, wanted)
        if differences:
            raise KernelMismatchError(
                f"{path} was made by another command ({'; '.join(differences)}): {_REMEDY}",
                path=path,
                differences=differences,
            )
        lacking = self.slices.lacking(self.paths, split, stored)
        if lacking:
            whose = "its layers' parts are" if self.slices.layers_alone else "what that keeps is"
            sums = self.slices.layers_alone and "layer" in kept_keys(stored) and LAYERS_KEY not in stored
            hint = " (its finer parts sum to them: lmntk subsets makes the kernel of a layer)" if sums else ""
            raise KernelMismatchError(
                f"{path} was made without `{lacking}`, and {whose} missing{hint}: {_REMEDY}",
                path=path,
                differences=[LAYERS_KEY],
            )
        other = self.slices.other_adapters(stored)
        if other:
            raise KernelMismatchError(
                f"{path} was made with other adapters beside it ({other}): {_REMEDY}",
                path=path,
                differences=[other],
            )
        return path

    @property
    def _progress_file(self) -> Path:
        return self.output_dir / f"overwriting_{self.task_key}.json"

    def _overwritten(self) -> list[str] | None:
        """The splits whose kernels an unfinished overwriting command has replaced; None if there is no such command."""
        try:
            return list(json.loads(self._progress_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            return []

    def _write_progress(self, splits: list[str]) -> None:
        write_text(self._progress_file, json.dumps(splits))

    def _is_valid(self, path: Path, split: str, wanted: Mapping[str, Any]) -> bool:
        try:
            kernel_files.load_kernel(path)
            stored = kernel_metadata.read_description(path) or {}
        except UsageError:
            return False
        same = not kernel_metadata.kernel_differences(stored, wanted)
        lacking = self.slices.lacking(self.paths, split, stored) or self.slices.other_adapters(stored)
        return same and lacking is None

    def _find_to_load(self, split: str, wanted: Mapping[str, Any]) -> Path:
        path = self.source_paths.kernel(split)
        kernel_metadata.check_one_run(self.source_paths.kernel("train"), path)
        stored = kernel_metadata.read_description(path)
        if stored is None:
            self._check_folder_names(path, path.parent.name, "its folder is called")
            labels = f", nor its labels ({'; '.join(self.missing)})" if self.missing else "; its labels are compared"
            logger.warning("%s has no description, so its model, texts and template cannot be checked%s", path, labels)
            return path
        comparable, unchecked = kernel_metadata.comparable_part(stored, wanted)
        differences = kernel_metadata.kernel_differences(stored, comparable)
        if differences:
            raise KernelMismatchError(
                f"`load_kernels`: {path} is another kernel ({'; '.join(differences)}); give the flags and data that it "
                "was made with, or another folder",
                path=path,
                differences=differences,
            )
        if unchecked:
            made_of = (stored.get("data_files") or {}).get("train", "")
            self._check_folder_names(path, Path(made_of).parent.name, "it was made of data in")
            reason = "; ".join(self.missing) or "the examples are missing"
            logger.warning("%s: %s could not be compared with the command (%s)", path, ", ".join(unchecked), reason)
        made_with = stored.get("model", self.model)
        if made_with != self.model and Path(made_with).resolve() != Path(self.model).resolve():
            # Models are compared by name alone, since none is opened.
            logger.warning(
                "%s is a kernel of the model %s, not of `model_name_or_path=%s`, which is neither opened nor used",
                path,
                made_with,
                self.model,
            )
        return path

    def _check_folder_names(self, path: Path, name: str, prefix: str) -> None:
        """Refuse a k-shot split of another number or seed, as far as the names of folders show it."""
        own = Path(self.data_dir).name
        if name != own and all(re.fullmatch(r"[0-9]+-[0-9]+", one) for one in (name, own)):
            raise KernelMismatchError(
                f"`load_kernels`: {path} belongs to another k-shot split than `data_dir={self.data_dir}`: {prefix} "
                f"{name}; give the `data_dir` that belongs to it, or another folder of kernels",
                path=path,
                differences=[f"data_dir: stored {name}, now {own}"],
            )

    def load(self, path: Path, asymmetric: bool, num_logits: int) -> Kernel:
        """Read a kernel and check its kind: files from elsewhere have no description.

        Args:
            path: The kernel's file.
            asymmetric: Whether the formula has two directions.
            num_logits: The number of logits, C.

        Raises:
            FileError: The file cannot be read.
            KernelMismatchError: The kernel is of another kind.
        """
        kernel, labels = kernel_files.load_kernel(path)
        if (kernel.dim() == 5) != asymmetric:
            kind = "an asymmetric kernel" if kernel.dim() == 5 else "a kernel of one direction"
            raise KernelMismatchError(
                f"{path} holds {kind}, which does not match this `kernel_formula`",
                path=path,
                differences=["formula"],
            )
        if kernel.shape[-1] != num_logits:
            raise KernelMismatchError(
                f"{path} holds a kernel of {kernel.shape[-1]} logits, but the command asks for {num_logits}: "
                "`binary_classification` makes it one logit",
                path=path,
                differences=[f"logits: stored {kernel.shape[-1]}, now {num_logits}"],
            )
        return kernel, labels

    def load_layers(self, path: Path, split: str, kernel: Tensor) -> LayerKernels:
        """Read the layers' contributions to a kernel.

        Args:
            path: The kernel's file.
            split: The kernel's split.
            kernel: The kernel in the file.

        Raises:
            FileError: The file of the contributions is missing or damaged.
            KernelMismatchError: They belong to another kernel.
        """
        beside = self.source_paths.layer_kernels(split)
        layers = kernel_files.load_layer_kernels(beside)
        check_hash(beside, kernel_metadata.read_description(path) or {})
        if not check_sum(layers, list(layers), kernel, LARGEST_ROUNDING):
            raise KernelMismatchError(
                f"{beside}: the layers' parts do not sum to the kernel in {path.name}: compute both again with "
                "`overwrite_kernels=True`",
                path=beside,
                differences=[LAYERS_KEY],
            )
        return layers

    def load_logits(self, split: str, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Read the logits of the untrained model beside a loaded kernel, and their targets.

        Args:
            split: The split of the kernel.
            labels: The kernel's labels, ``[X]``.

        Raises:
            FileError: The logits cannot be read.
            KernelMismatchError: They belong to other examples or another run.
        """
        path, kernel = self.source_paths.logits(split), self.source_paths.kernel(split)
        logits, targets = logits_files.load_logits(path)
        if not logits_files.check_logits(path, targets, kernel, labels):
            logger.warning("%s: nothing shows whether it belongs to the model and texts of %s", path, kernel.name)
        return logits, targets

    def load_diagonal(self, path: Path, split: str, kernel: Tensor) -> Tensor | None:
        """Read K(x, x) of a split's examples, float64 ``[X, C, C]`` or ``[2, X, C, C]``; None if there is no file.

        Args:
            path: The kernel's file.
            split: The kernel's split.
            kernel: The kernel in the file.

        Raises:
            FileError: The file of the diagonal is damaged.
            KernelMismatchError: It belongs to another kernel.
        """
        return diagonal_files.load_diagonal(self.source_paths.diagonal(split), path, tuple(kernel.shape))

    def lacks_diagonal(self, split: str) -> bool:
        """Return whether a kernel of the output folder has no K(x, x) of its own beside it.

        A run that was killed before it noted the hash, or an older version of the program that replaced the kernel,
        leaves a file that nothing ties to the kernel: it counts as missing.
        """
        return not diagonal_files.is_noted(self.paths.kernel(split), self.paths.diagonal(split))

    def save_diagonal(self, split: str, diagonal: Tensor) -> None:
        """Write K(x, x) beside a kernel of the output folder that lies there already."""
        path = self.paths.diagonal(split)
        diagonal_files.save_diagonal(path, diagonal)
        diagonal_files.note_diagonal(self.paths.kernel(split), path)

    @contextlib.contextmanager
    def writing(self, split: str, kernel: Kernel, slices: KernelSlices) -> Iterator[KernelWriter]:
        """Write a split's kernel a few rows at a time, see `kernel_writer`.

        Args:
            split: The kernel's split.
            kernel: A tensor of the kernel's shape, and the labels of its X examples.
            slices: What is kept beside it.
        """
        with kernel_writer(self.paths, split, *kernel, slices) as writer:
            yield writer
        overwritten = self._overwritten()
        if overwritten is not None:
            self._write_progress([*overwritten, split])

    def save(
        self,
        split: str,
        kernel: Kernel,
        slices: KernelSlices,
        description: Mapping[str, Any],
        diagonal: Tensor | None = None,
    ) -> None:
        """Write a kernel that is in memory, its description, and its parts and diagonal if there are any."""
        with self.writing(split, kernel, slices) as writer:
            writer.write(range(kernel[0].shape[-4]), kernel[0], slices)
            writer.finish(description, diagonal)

    def save_logits(self, split: str, logits: Tensor, targets: Tensor, renews: bool = False) -> None:
        """Write the logits of the untrained model.

        Args:
            split: The split of the examples.
            logits: Logits of the untrained model, ``[X, C]``.
            targets: Targets of the examples, ``[X]``.
            renews: The kernel in the output folder belongs to the same model: its description gets their hash, and an
                existing file that differs only by rounding stays.
        """
        path = self.paths.logits(split)
        if not renews:
            logits_files.save_logits(path, logits, targets)
            return
        kernel = self.paths.kernel(split)
        if not logits_files.has_logits(path, logits, targets):
            # A kill between two of these leaves no logits, or new ones without a hash: both can be used.
            path.unlink(missing_ok=True)
            logits_files.note_logits(kernel, None)
            logits_files.save_logits(path, logits, targets)
        logits_files.note_logits(kernel, path)


def samples_of(labels: Tensor, samples: int, kernel: str) -> int:
    """Return the number of samples of each example, after checking that a kernel's rows can be that many.

    Args:
        labels: The labels of the kernel's X examples, sample by sample.
        samples: The number of templates or demonstrations for each example.
        kernel: What the error calls the kernel.

    Raises:
        KernelMismatchError: The rows are not that many samples of the same examples.
    """
    fits = len(labels) % samples == 0 and bool((labels.reshape(samples, -1) == labels.reshape(samples, -1)[0]).all())
    if not fits:
        raise KernelMismatchError(
            f"{kernel}: its {len(labels)} rows are not {samples} samples of the same examples each",
            path=kernel,
            differences=["samples"],
        )
    return samples
