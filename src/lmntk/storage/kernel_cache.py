"""Which kernel file a run may use: one whose description fits, or none.

A kernel file is used only if what it says of itself is what the command asks for; a file that merely has the right name
is how wrong numbers come about.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lmntk.errors import UsageError
from lmntk.storage import atomic, kernel_files, kernel_metadata, logits_files
from lmntk.storage.kernel_files import LayerKernels
from lmntk.storage.kernel_metadata import OFF_BY_DEFAULT
from lmntk.storage.paths import RunPaths
from lmntk.storage.tile_store import TileStore

logger = logging.getLogger(__name__)

LAYERS_KEY = "layers"

Kernel = tuple[Tensor, Tensor]
"""A kernel, float64 ``[N, C, X, C]`` or ``[2, N, C, X, C]``, and the labels of its X examples."""


@dataclass(frozen=True)
class KernelCache:
    """The kernel and logits files of one run.

    Attributes:
        output_dir: Where they are written, and looked for.
        load_dir: ``--load_kernels``: a folder they come from instead.
        task_key: The task in file names.
        overwrite: ``--overwrite_kernels``.
        model: ``--model_name_or_path``.
        data_dir: ``--data_dir``.
        missing: What of it, and of the tokenizer, is not there to be compared with, a clause each.
        per_layer: ``--kernel_per_layer``: the layers' parts are wanted with each kernel.
    """

    output_dir: Path
    load_dir: Path | None
    task_key: str
    overwrite: bool
    model: str = ""
    data_dir: str = ""
    missing: Sequence[str] = ()
    per_layer: bool = False

    def start_overwriting(self, splits: Iterable[str]) -> None:
        """Note that ``--overwrite_kernels`` begins to replace kernels, unless a run that was stopped has noted it."""
        if self.overwrite and self._overwritten() is None:
            self._note([])
            for split in splits:
                self.tiles(split).drop()

    def finish(self) -> None:
        """Note that all kernels of the command are there and used: the next ``--overwrite_kernels`` begins anew."""
        self._overwriting_file.unlink(missing_ok=True)

    def tiles(self, split: str) -> TileStore:
        """Return the store of a split's finished tiles."""
        return TileStore(self._paths.tiles(split))

    def to_use(self, split: str, wanted: Mapping[str, Any]) -> Path | None:
        """Return the file of a split's kernel; None where it is to be computed.

        Args:
            split: A key of the run's data sets.
            wanted: What the command asks for, as far as it can be told (see `spec_from_arguments`).

        Raises:
            UsageError: A file is there, but made by a command that differs.
        """
        if self.load_dir is not None:
            return self._to_load(self.load_dir, split, wanted)
        path = self._paths.kernel(split)
        if path.is_dir():
            raise UsageError(f"{path} is a folder where a kernel's file belongs: remove it")
        if not path.exists():
            return None
        overwritten = self._overwritten()
        if self.overwrite:
            return path if split in (overwritten or ()) and self._is_sound(path, split, wanted) else None
        if overwritten is not None and split not in overwritten:
            raise UsageError(
                f"{path} was being replaced by a command with --overwrite_kernels that was stopped: give that command "
                f"again to finish it, or remove {self._overwriting_file} to keep this kernel"
            )
        way_out = "pass --overwrite_kernels to compute it anew, or another TAG or --output_dir to keep both"
        stored = kernel_metadata.read_description(path)
        if stored is None:
            raise UsageError(f"{path} is there already, and nothing beside it says what made it: {way_out}")
        differences = kernel_metadata.kernel_differences(stored, wanted)
        if differences:
            raise UsageError(f"{path} was made by another command ({'; '.join(differences)}): {way_out}")
        if self.per_layer and not self._has_layers(path, split, stored):
            raise UsageError(
                f"{path} was made without --kernel_per_layer, and its layers' parts are not there: {way_out}"
            )
        return path

    @property
    def _paths(self) -> RunPaths:
        return RunPaths(self.output_dir, self.task_key)

    @property
    def _overwriting_file(self) -> Path:
        return self.output_dir / f"overwriting_{self.task_key}.json"

    def _overwritten(self) -> list[str] | None:
        """The splits whose kernels an unfinished overwriting command has replaced; None where there is none."""
        try:
            return list(json.loads(self._overwriting_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            return []

    def _note(self, splits: list[str]) -> None:
        atomic.write_atomically(self._overwriting_file, lambda file: file.write(json.dumps(splits).encode()))

    def _has_layers(self, path: Path, split: str, stored: Mapping[str, Any]) -> bool:
        """Whether the layers' parts lie beside a kernel; a file that another kernel's run left does not count."""
        return LAYERS_KEY in stored and RunPaths(path.parent, self.task_key).layer_kernels(split).is_file()

    def _is_sound(self, path: Path, split: str, wanted: Mapping[str, Any]) -> bool:
        try:
            kernel_files.load_kernel(path)
            stored = kernel_metadata.read_description(path) or {}
            return not kernel_metadata.kernel_differences(stored, wanted) and (
                not self.per_layer or self._has_layers(path, split, stored)
            )
        except UsageError:
            return False

    def _to_load(self, folder: Path, split: str, wanted: Mapping[str, Any]) -> Path:
        path = RunPaths(folder, self.task_key).kernel(split)
        kernel_metadata.check_one_run(RunPaths(folder, self.task_key).kernel("train"), path)
        stored = kernel_metadata.read_description(path)
        if stored is None:
            self._check_folder_names(path, folder.name, "its folder is called")
            logger.warning(
                "%s has no description: of which model, texts and template it is cannot be checked%s",
                path,
                f", nor its labels ({'; '.join(self.missing)})" if self.missing else "; its labels are compared",
            )
            return path
        # A description without one of these is of a time, or a run, that knew nothing of it.
        told = {*stored, *OFF_BY_DEFAULT}
        known = {name: value for name, value in wanted.items() if name in told}
        unchecked = [name for name in stored if name == "label_word_ids" and name not in wanted]
        limits = stored.get("limits") or {}
        if "max_seq_length" in limits and "max_seq_length" not in wanted["limits"]:
            unchecked.append("limits.max_seq_length")
            known["limits"] = {**wanted["limits"], "max_seq_length": limits["max_seq_length"]}
        for name in kernel_metadata.OF_EACH_FILE:
            own, now = stored.get(name) or {}, wanted.get(name, {})
            unchecked += [f"{name}.{mode}" for mode in own if mode not in now]
            known |= {name: {**{mode: own[mode] for mode in own if mode not in now}, **now}} if own else {}
        differences = kernel_metadata.kernel_differences(stored, known)
        if differences:
            raise UsageError(
                f"--load_kernels: {path} is another kernel ({'; '.join(differences)}); give the flags and "
                "data that it was made with, or another folder"
            )
        if unchecked:
            made_of = (stored.get("data_files") or {}).get("train", "")
            self._check_folder_names(path, Path(made_of).parent.name, "it was made of data in")
            logger.warning(
                "%s: %s could not be compared with the command (%s)",
                *(path, ", ".join(unchecked), "; ".join(self.missing) or "the examples are not there"),
            )
        made_with = stored.get("model", self.model)
        if made_with != self.model and Path(made_with).resolve() != Path(self.model).resolve():
            # No model is opened: its name is all there is to tell.
            logger.warning(
                "%s is a kernel of the model %s, though --model_name_or_path is %s: that is not opened, and not used",
                *(path, made_with, self.model),
            )
        return path

    def _check_folder_names(self, path: Path, name: str, told: str) -> None:
        """Refuse a k-shot split of another number or seed, as far as only the names of folders tell."""
        own = Path(self.data_dir).name
        if name != own and all(re.fullmatch(r"[0-9]+-[0-9]+", one) for one in (name, own)):
            raise UsageError(
                f"--load_kernels: {path} is of another k-shot split than --data_dir {self.data_dir}: {told} {name}; "
                "give the --data_dir that goes with it, or another folder of kernels"
            )

    def load(self, path: Path, asymmetric: bool, num_logits: int) -> Kernel:
        """Read a kernel, and see that it is of the kind asked for: files from elsewhere have no description.

        Args:
            path: The file.
            asymmetric: Whether the formula has two directions.
            num_logits: C.

        Raises:
            UsageError: It cannot be read, or is of another kind.
        """
        kernel, labels = kernel_files.load_kernel(path)
        if (kernel.dim() == 5) != asymmetric:
            kind = "an asymmetric" if kernel.dim() == 5 else "no asymmetric"
            raise UsageError(f"{path} holds {kind} kernel, which does not go with this --kernel_formula")
        if kernel.shape[-1] != num_logits:
            raise UsageError(
                f"{path} holds a kernel of {kernel.shape[-1]} logits, but the command asks for {num_logits}: "
                "--binary_classification makes it one logit"
            )
        return kernel, labels

    def load_layers(self, path: Path, split: str, kernel: Tensor) -> LayerKernels:
        """Read the layers' parts of a kernel.

        Args:
            path: The kernel's file.
            split: Whose it is.
            kernel: What is in it.

        Raises:
            UsageError: They are missing, or are those of another kernel.
        """
        beside = RunPaths(path.parent, self.task_key).layer_kernels(split)
        layers = kernel_files.load_layer_kernels(beside)
        fits = next(iter(layers.values())).shape == kernel.shape
        if not fits or (sum(layers.values()) - kernel).norm() > 1e-9 * kernel.norm():
            raise UsageError(
                f"{beside}: the layers' parts do not sum to the kernel in {path.name}: compute both again with "
                "--overwrite_kernels"
            )
        return layers

    def load_logits(self, split: str, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Read the logits of the untrained model that lie beside loaded kernels, and their targets.

        Args:
            split: Whose they are.
            labels: Those of the kernel, ``[X]``.

        Raises:
            UsageError: They cannot be read, or are not of the kernel's examples and run.
        """
        folder = self.load_dir or self.output_dir
        path = RunPaths(folder, self.task_key).logits(split)
        kernel = RunPaths(folder, self.task_key).kernel(split)
        logits, targets = logits_files.load_logits(path)
        if not logits_files.check_logits(path, targets, kernel, labels):
            logger.warning("%s: nothing tells whether it is of the model and texts of %s", path, kernel.name)
        return logits, targets

    def save(self, split: str, kernel: Kernel, layers: LayerKernels, description: Mapping[str, Any]) -> Path:
        """Write a kernel, the layers' parts of it where there are any, and its description; return where."""
        path = self._paths.kernel(split)
        beside = self._paths.layer_kernels(split)
        if layers:
            kernel_files.save_layer_kernels(beside, layers)
            description = {**description, LAYERS_KEY: list(layers)}
        logits = self._paths.logits(split)
        if logits.is_file():
            description = {**description, kernel_metadata.LOGITS_HASH_KEY: kernel_metadata.file_hash(logits)}
        kernel_files.save_kernel(path, *kernel, description)
        if not layers:
            beside.unlink(missing_ok=True)
        overwritten = self._overwritten()
        if overwritten is not None:
            self._note([*overwritten, split])
        return path

    def save_logits(self, split: str, logits: Tensor, targets: Tensor, renews: bool = False) -> None:
        """Write the logits of the untrained model.

        Args:
            split: Whose they are.
            logits: ``[X, C]``.
            targets: ``[X]``.
            renews: The kernel in the output folder is of the same model: its description notes them, and a file that
                differs from them by rounding stays.
        """
        path = self._paths.logits(split)
        if not renews:
            logits_files.save_logits(path, logits, targets)
            return
        kernel = self._paths.kernel(split)
        if not logits_files.has_logits(path, logits, targets):
            # A kill between two of these leaves no logits, or new ones of which nothing is noted: both can be used.
            path.unlink(missing_ok=True)
            logits_files.note_logits(kernel, None)
            logits_files.save_logits(path, logits, targets)
        logits_files.note_logits(kernel, path)


def samples_of(labels: Tensor, samples: int, path_or_flag: str) -> int:
    """Return how many samples of each example a kernel's rows are, after seeing that they can be.

    Args:
        labels: The labels of the kernel's X examples, sample by sample.
        samples: How many templates there are.
        path_or_flag: What the error names.

    Raises:
        UsageError: The rows are not that many samples of the same examples.
    """
    fits = len(labels) % samples == 0 and bool((labels.reshape(samples, -1) == labels.reshape(samples, -1)[0]).all())
    if not fits:
        raise UsageError(f"{path_or_flag}: its {len(labels)} rows are not {samples} samples of the same examples each")
    return samples
