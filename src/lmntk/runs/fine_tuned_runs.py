"""Runs that compute the snapshots of a training of which only the model was saved."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmntk.runs.found_runs import FoundPair, k_and_seed
from lmntk.runs.log import task_of
from lmntk.runs.processes import STAMP, UNFINISHED, read_stamp
from lmntk.runs.script_run import ScriptRun, hashes, weight_files
from lmntk.storage.atomic import write_text


@dataclass(frozen=True, eq=False)
class FineTunedRun(ScriptRun):
    """A run that computes the logits, linearised logits and kernel at the weights of a saved model.

    Attributes:
        pair: The training, and the kernel at the pre-trained weights.
        folder_name: The output folder.
        settings: The settings of the kernel run that differ from the defaults.
    """

    pair: FoundPair
    folder_name: Path
    settings: Mapping[str, str]

    def __str__(self) -> str:
        """``snapshots of result/…/16-42``."""
        return f"snapshots of {self.pair.training.folder}"

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.folder_name

    @property
    def split(self) -> Path:
        """The folder of the split, which both runs share."""
        return self.pair.kernel.data[1]

    @property
    def variables(self) -> dict[str, str]:
        """All variables of the script, as in the kernel run."""
        record = dict(self.pair.kernel.record)
        model = self.pair.kernel.place(str(record.get("model_name_or_path")))
        return {
            "TASK": task_of(record), "SEED": str(record.get("seed", 42)), "K": k_and_seed(self.pair.kernel)[0],
            "MODEL": str(model), "TYPE": str(record.get("few_shot_type", "prompt")),
            "TRAINER": "kernel", "TAG": "behaviour-snapshots", "NUM_GPU": os.environ.get("NUM_GPU") or "1",
        }  # fmt: skip

    @property
    def flags(self) -> list[str]:
        """The settings as words."""
        own = {"disable_tqdm": "True", "do_eval": str("dev" in self.evaluated), **self.settings}
        own["fine_tuned_model"] = str(self.pair.training.folder.resolve())
        return [f"--{name}={value}" for name, value in own.items()]

    @property
    def inputs(self) -> object:
        """The hashes of both models' files."""
        models = (Path(self.variables["MODEL"]), self.pair.training.folder)
        return hashes([path for model in models for path in weight_files(model)])

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The splits that the kernel run predicted."""
        paths = self.pair.kernel.paths
        return tuple(split for split in ("dev", "test") if paths.metrics(split).is_file())

    def take_kernels(self) -> None:
        """Put the files of the kernel run into the folder, so that the run need not compute them again.

        Raises:
            SettingError: The folder holds the snapshots of another model, kernel or data.
        """
        self.refuse_stale()
        if read_stamp(self.folder) != self.stamp + UNFINISHED:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_text(self.folder / STAMP, self.stamp + UNFINISHED, make_folder=True)
        for path in self.pair.kernel.kernel_files():
            copy = self.folder / path.name
            if not copy.exists():
                try:
                    copy.hardlink_to(path)  # files are replaced and never changed, so both runs can have one
                except OSError:  # another disk
                    shutil.copyfile(path, copy)
