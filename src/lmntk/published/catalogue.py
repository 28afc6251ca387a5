"""The kernels published with Malladi et al. 2023 (arXiv 2210.05643): the archives and their members."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lmntk.data.tasks import TASKS
from lmntk.errors import FileError, SettingError, UnknownNameError, suggest
from lmntk.storage.atomic import write_text
from lmntk.storage.readers import read_json
from lmntk.storage.wording import quantity

BASE_URL = "https://nlp.cs.princeton.edu/projects/LM-Kernel-FT/roberta-base"
MODEL = "roberta-base"
TYPES = {"prompt": "prompt", "no_prompt": "finetune"}
"""The `few_shot_type` of the kernels by the word in the names of their archives."""

SHOTS = {"sgd": (16, 64, 512), "signgd": (16, 64), "asymmetric_signgd": (16, 64)}
"""The numbers of examples per label for which each formula's kernels were published."""

PUBLISHED_TASKS = (
    *("SST-2", "sst-5", "mr", "cr", "mpqa", "subj", "trec", "MRPC", "QQP", "QNLI", "RTE", "MNLI", "SNLI", "ag_news"),
)
"""The tasks that have published kernels, by the names of their folders."""

# The layout of the archives is not documented: only the last folder and the name of a file are used.
_MEMBER = re.compile(
    r"(?:.*/)?(?P<k>\d{1,9})-(?P<seed>\d{1,9})/(?P<split>train|dev|eval|test)_(?P<kind>kernels|logits|results)"
    r"_(?P<task>[\w-]+)\.(?P<ending>\w+)"
)
_ENDINGS = {"kernels": ("pt", "json"), "logits": ("pt",), "results": ("txt",)}


@dataclass(frozen=True)
class Archive:
    """One of the published archives.

    Attributes:
        prompt: A key of `TYPES`.
        formula: A key of `SHOTS`.
        k: Examples per label.
    """

    prompt: str
    formula: str
    k: int

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"{self.prompt}-{self.formula}-{self.k}-shot.zip"

    @property
    def few_shot_type(self) -> str:
        """The `few_shot_type` of its kernels."""
        return TYPES[self.prompt]


ARCHIVES = tuple(Archive(prompt, formula, k) for prompt in TYPES for formula, shots in SHOTS.items() for k in shots)


@dataclass(frozen=True)
class File:
    """A member of an archive that belongs into an output folder.

    Attributes:
        member: The name in the archive.
        size: The number of bytes.
        crc: The CRC-32 of the bytes, as the archive records it.
        task: The task whose folder it belongs to; MNLI for mnli-mm.
        run: The last folder, ``"16-42"``: examples per label and seed.
        split: ``"train"``, ``"dev"``, ``"eval"`` or ``"test"``.
        kind: ``"kernels"``, ``"logits"`` or ``"results"``.
        name: The name in the output folder.
    """

    member: str
    size: int
    crc: int
    task: str
    run: str
    split: str
    kind: str
    name: str

    @property
    def seed(self) -> int:
        """The seed of the k-shot split."""
        return int(self.run.partition("-")[2])

    @property
    def holds_tensors(self) -> bool:
        """Whether it holds a kernel or logits, not text."""
        return self.name.endswith(".pt")

    @property
    def is_kernel(self) -> bool:
        """Whether it holds a kernel, not logits or text."""
        return self.kind == "kernels" and self.holds_tensors


def published_task(name: str) -> str:
    """Return the folder of a task with published kernels; that of MNLI for mnli-mm.

    Raises:
        UnknownNameError: The task does not exist, or none of its kernels were published.

    Examples:
        >>> published_task("mnli-mm")
        'MNLI'
    """
    task = next((task.folder for task in TASKS.values() if task.key == name.lower()), None)
    if task is None:
        message = suggest(name, PUBLISHED_TASKS, "task")
        raise UnknownNameError(message, name=name, kind="task", options=PUBLISHED_TASKS)
    if task not in PUBLISHED_TASKS:
        raise UnknownNameError(
            f"`task={name}`: no kernels of {task} were published; available: {', '.join(PUBLISHED_TASKS)}",
            name=name,
            kind="task",
            options=PUBLISHED_TASKS,
        )
    return task


def recognise(member: str, size: int, crc: int) -> File | None:
    """Identify a member of an archive; None if it is not a file that a kernel run writes.

    Examples:
        >>> recognise("sgd/16-42/train_kernels_sst-2.pt", 1000, 0).run
        '16-42'
    """
    found = _MEMBER.fullmatch(member)
    if not found or found["ending"] not in _ENDINGS[found["kind"]]:
        return None
    task = {task.key: task for task in TASKS.values()}.get(found["task"].lower())
    if task is None:
        return None
    name = f"{found['split']}_{found['kind']}_{task.key}.{found['ending']}"
    run = f"{int(found['k'])}-{int(found['seed'])}"
    return File(member, size, crc, task.folder, run, found["split"], found["kind"], name)


@dataclass(frozen=True)
class Contents:
    """The members of an archive: known files, and the names of others.

    A list of the known files is kept beside the archives, to find out later whether all of them are unpacked.
    """

    files: tuple[File, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, members: Iterable[tuple[str, int, int]]) -> "Contents":
        """Identify members, given by name, size and CRC-32."""
        sorted_out = [(name, recognise(name, size, crc)) for name, size, crc in members]
        files = tuple(file for _, file in sorted_out if file is not None)
        return cls(files, tuple(name for name, file in sorted_out if file is None))

    @classmethod
    def read(cls, path: Path) -> "Contents | None":
        """Read what `write` wrote; None if the file is missing or damaged."""
        try:
            members = read_json(path)
            return cls.of((str(name), int(size), int(crc)) for name, size, crc in members)
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Write names, sizes and CRCs of the known files."""
        members = [[file.member, file.size, file.crc] for file in self.files]
        write_text(path, json.dumps(members, indent=0), make_folder=True)

    @property
    def example_of_others(self) -> str:
        """The number of unknown members, and one of them."""
        count = quantity(len(self.others), "member")
        return f"{count}, such as {self.others[0]}" if self.others else "no other member"

    def check(self, path: Path) -> None:
        """Raise `FileError` for the archive at `path` if no member is a kernel of a task."""
        if not any(file.kind == "kernels" for file in self.files):
            raise FileError(
                f"{path} holds no file named like <K>-<SEED>/train_kernels_<task>.pt, but {self.example_of_others}: "
                "the archive is kept; remove it to fetch another, or unpack it by hand and name a folder of its "
                "kernels with `load_kernels` of run.py",
                path=path,
            )

    def chosen(self, name: str, tasks: Iterable[str], seeds: Iterable[int]) -> list[File]:
        """Choose the files of tasks and seeds.

        Args:
            name: The archive's, for the error.
            tasks: Names of `TASKS`.
            seeds: Seeds of k-shot splits.

        Raises:
            SettingError: No file is of these tasks and seeds.
            FileError: Two members belong in the same place.
        """
        tasks, seeds = list(tasks), list(seeds)
        by_place: dict[tuple[str, str, str], File] = {}
        for file in self.files:
            if file.task in tasks and file.seed in seeds:
                other = by_place.setdefault((file.task, file.run, file.name), file)
                if other is not file:
                    message = f"{name} holds both {other.member} and {file.member}: it is unclear which one is meant"
                    raise FileError(message, path=name)
        if not by_place:
            there = ", ".join(dict.fromkeys(f"{file.task} {file.run}" for file in self.files))
            raise SettingError(
                f"{name} holds nothing of {', '.join(tasks)} with seed {', '.join(map(str, seeds))}: choose by `task` "
                f"and `seed` among {there}",
                setting="task",
                value=tasks,
            )
        return list(by_place.values())
