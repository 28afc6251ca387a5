#!/usr/bin/env python3
"""Fetch the kernels of RoBERTa-base that were published with Malladi et al. 2023, to predict without a model.

    python tools/download_kernels.py --formula sgd --k 16 --task SST-2 trec

Archives are fetched one after the other (a download that was stopped goes on), checked, and unpacked to where
LOAD_KERNELS_TAG of run_fewshot.sh looks: result/<TASK>-roberta-base-<TYPE>-kernel-published-<formula>/<K>-<SEED>.
At the end stand the commands that predict from what is there.
"""

import argparse
import shlex
import shutil
import sys
import urllib.parse
import zlib
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from tqdm import tqdm

from lmntk.config.tool_parser import Parser, exit_status
from lmntk.data.kshot import PUBLISHED_SEEDS
from lmntk.data.tasks import TASKS
from lmntk.errors import UsageError
from lmntk.interrupts import Stopped
from lmntk.kernels.formulas import FORMULAS
from lmntk.published import archives
from lmntk.published.catalogue import (
    ARCHIVES,
    BASE_URL,
    MODEL,
    PUBLISHED_TASKS,
    SHOTS,
    TYPES,
    Archive,
    Contents,
    File,
    published_task,
)
from lmntk.published.http_download import download, partial_of
from lmntk.storage import atomic, kernel_files, logits_files
from lmntk.storage.wording import data_size

ROOT = Path(__file__).resolve().parents[1]
# Where run_fewshot.sh looks.
RESULT = ROOT / "result"


@dataclass(frozen=True)
class Settings:
    """What the command line asks for of each archive."""

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    tag: str | None
    output_dir: Path
    cache_dir: Path
    keep_archives: bool
    base_url: str

    @property
    def everything(self) -> bool:
        """Whether archives are unpacked whole."""
        return (len(self.tasks), len(self.seeds)) == (len(PUBLISHED_TASKS), len(PUBLISHED_SEEDS))

    def url(self, archive: Archive) -> str:
        """Where an archive is fetched from."""
        return f"{self.base_url.rstrip('/')}/{archive.name}"

    def fetched(self, archive: Archive) -> Path:
        """Where it lies until it is unpacked."""
        return self.cache_dir / archive.name

    def record(self, archive: Archive) -> Path:
        """Where its contents are noted."""
        return self.cache_dir / f"{archive.name}.contents.json"

    def tag_of(self, archive: Archive) -> str:
        """The tag under which LOAD_KERNELS_TAG finds the kernels."""
        return self.tag or f"published-{archive.formula}"

    def path(self, archive: Archive, file: File) -> Path:
        """Where a file is unpacked to."""
        folder = f"{file.task}-{MODEL}-{archive.few_shot_type}-kernel-{self.tag_of(archive)}"
        return self.output_dir / folder / file.run / file.name


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    seeds = sorted(PUBLISHED_SEEDS)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--prompt", nargs="+", choices=TYPES, default=["prompt"],
                        help="kernels of prompts, or of a linear layer on the first token (prompt)")
    parser.add_argument("--formula", nargs="+", choices=SHOTS, default=["sgd"], help="formulas (sgd)")
    parser.add_argument("--k", nargs="+", type=int, choices=SHOTS["sgd"], default=[16],
                        help="training examples of each label; 512 of sgd only (16)")
    parser.add_argument("--task", nargs="+", metavar="TASK", default=PUBLISHED_TASKS,
                        help=f"unpack these only, among {', '.join(PUBLISHED_TASKS)} (all)")
    parser.add_argument("--seed", nargs="+", type=int, choices=seeds, default=seeds, help="unpack these only (all)")
    parser.add_argument("--tag", help="the tag of what is unpacked (published-<formula>)")
    parser.add_argument("--output_dir", type=Path, default=RESULT, help="where the folders go (%(default)s)")
    parser.add_argument("--cache_dir", type=Path, default=ROOT / ".cache/published-kernels",
                        help="where archives go until they are unpacked (%(default)s)")
    parser.add_argument("--keep_archives", action="store_true", help="keep archives of which all is unpacked")
    parser.add_argument("--base_url", default=BASE_URL, help="the folder of a mirror, http or https (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list all archives and what of them is here; fetch nothing")
    # fmt: on
    return parser.read(argv)


def choose_archives(flags: argparse.Namespace) -> list[Archive]:
    """Take every combination asked for, each of which must have been published."""
    chosen = [Archive(*parts) for parts in product(*map(dict.fromkeys, (flags.prompt, flags.formula, flags.k)))]
    for archive in chosen:
        if archive not in ARCHIVES:
            shots = " and ".join(map(str, SHOTS[archive.formula]))
            raise UsageError(
                f"--formula {archive.formula} --k {archive.k}: no such kernels were published, of {archive.formula} "
                f"only those of {shots} examples a label; --list shows all archives"
            )
    return chosen


def check_settings(flags: argparse.Namespace) -> Settings:
    """Refuse tags and addresses that cannot work; look up the tasks."""
    if flags.tag is not None and (not flags.tag or "/" in flags.tag or len(set(flags.formula)) > 1):
        raise UsageError(
            f"--tag '{flags.tag}': a tag is a word without '/', for kernels of one --formula at a time; leave it "
            "out to have one for each formula"
        )
    if not is_address(flags.base_url):
        raise UsageError(f"--base_url {flags.base_url}: it must be an address such as {BASE_URL}")
    tasks = tuple(dict.fromkeys(published_task(name) for name in flags.task))
    return Settings(
        tasks, tuple(dict.fromkeys(flags.seed)), flags.tag, flags.output_dir, flags.cache_dir, flags.keep_archives,
        flags.base_url,
    )  # fmt: skip


def is_address(text: str) -> bool:
    """Tell whether a text can be the beginning of an address to fetch from."""
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def chosen_paths(contents: Contents, archive: Archive, settings: Settings) -> dict[Path, File]:
    """Return the files asked for by where they go."""
    chosen = contents.chosen(archive.name, settings.tasks, settings.seeds)
    return {settings.path(archive, file): file for file in chosen}


def is_there(path: Path, file: File) -> bool:
    """Tell whether a file is unpacked already; another one of its name, such as a kernel of ours, is not touched."""
    if path.exists() and not (path.is_file() and path.stat().st_size == file.size and crc_of(path) == file.crc):
        raise UsageError(
            f"{path} is there already and is not the published file: move it away, or choose another --tag"
        )
    return path.exists()


def crc_of(path: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return crc


def nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def check_room(flag: str, folder: Path, needed: int, what: str) -> None:
    """Refuse what the disk has no room for."""
    free = shutil.disk_usage(nearest(folder)).free
    if free < needed:
        raise UsageError(
            f"--{flag} {folder}: {what} takes {data_size(needed)}, but {data_size(free)} are free: make room, "
            "choose another folder, or name fewer with --task and --seed"
        )


def check_archive_fits(archive: Archive, settings: Settings, size: int, have: int) -> None:
    """Refuse an archive before it is fetched: kernels hardly get smaller in it, unpacked they take as much again."""
    cache, output = settings.cache_dir, settings.output_dir
    unpacked = size if settings.everything else 0
    if unpacked and nearest(cache).stat().st_dev == nearest(output).stat().st_dev:
        check_room("cache_dir", cache, size - have + unpacked, f"{archive.name}, with what is unpacked of it,")
    else:
        check_room("cache_dir", cache, size - have, archive.name)
        check_room("output_dir", output, unpacked, f"what is unpacked of {archive.name}")


def fetch(archive: Archive, settings: Settings) -> None:
    """Fetch an archive."""
    path, url = settings.fetched(archive), settings.url(archive)

    def announce(size: int | None, have: int) -> None:
        total = "of a size that the server does not tell" if size is None else data_size(size)
        here = f", {data_size(have)} of it are here already" if have else ""
        free = shutil.disk_usage(nearest(settings.cache_dir)).free
        print(f"fetching {url}: {total}{here}; {data_size(free)} are free on the disk", flush=True)
        check_archive_fits(archive, settings, size or 0, have)

    download(
        url, path, announce,
        f"--base_url names a mirror, and with the archive from elsewhere as {path} this command goes on",
    )  # fmt: skip


def unpack(archive: Archive, path: Path, settings: Settings) -> Contents:
    """Write the files asked for, each whole or not at all, once the archive has passed all checks."""
    with archives.opened(path) as opened:
        members = {member.filename: member for member in opened.infolist() if not member.is_dir()}
        contents = Contents.of((name, member.file_size, member.CRC) for name, member in members.items())
        contents.check(path)
        missing = {
            target: file
            for target, file in chosen_paths(contents, archive, settings).items()
            if not is_there(target, file)
        }
        needed = sum(file.size for file in missing.values())
        check_room("output_dir", settings.output_dir, needed, f"what is unpacked of {archive.name}")
        print(f"unpacking {len(missing)} files of {archive.name}, {data_size(needed)}", flush=True)
        with tqdm(total=2 * needed, unit="B", unit_scale=True, desc=archive.name, disable=None) as bar:
            archives.check(opened, [members[file.member] for file in missing.values()], bar.update)
            for target, file in missing.items():
                atomic.prepare_output_dir(target.parent)
                atomic.write_atomically(target, lambda out, file=file: write(opened, file, out))
                bar.update(file.size)
    contents.write(settings.record(archive))
    return contents


def write(opened: ZipFile, file: File, out: BinaryIO) -> None:
    """Write a member's bytes, and see that tensors are in it and no other pickle, before it gets its name."""
    archives.copy(opened, opened.getinfo(file.member), out)
    out.flush()
    if not file.holds_tensors:
        return
    try:
        (kernel_files.load_kernel if file.kind == "kernels" else logits_files.load_logits)(Path(out.name))
    except UsageError as error:
        raise UsageError(
            f"{file.member} in {opened.filename} is not what its name says, {file.kind} as a pair of tensors, "
            "and nothing else is read from it or run: it was not unpacked; --task and --seed choose other members"
        ) from error


def provide(archive: Archive, settings: Settings) -> None:
    """Fetch and unpack an archive as far as that is not done, and say how to predict from its kernels."""
    contents = Contents.read(settings.record(archive))
    if contents is not None and all(
        is_there(path, file) for path, file in chosen_paths(contents, archive, settings).items()
    ):
        print(f"{archive.name}: what is asked for of it is unpacked already")
    else:
        path = settings.fetched(archive)
        ours = not path.exists()
        if ours:
            fetch(archive, settings)
        else:
            print(f"{path} is here already")
        try:
            contents = unpack(archive, path, settings)
        except archives.DamagedArchiveError as error:
            if not ours:
                raise UsageError(f"{error}; remove it, and the same command fetches it") from error
            path.unlink()
            raise UsageError(
                f"{error}; the archive was removed, and the same command fetches it anew: where that ends alike, "
                f"{settings.url(archive)} itself is damaged, and --base_url names a mirror"
            ) from error
        except Stopped as stop:
            stop.kept_summary = f"{path}, and what was unpacked of it, is kept"
            raise
        whole = all(settings.path(archive, file).exists() for file in contents.files)
        if ours and whole and not settings.keep_archives:
            path.unlink()
        else:
            print(f"{path} is kept; {'all' if whole else 'not all'} of it is unpacked")
    for line in how_to_predict(archive, chosen_paths(contents, archive, settings), settings):
        print(line)


def how_to_predict(archive: Archive, paths: dict[Path, File], settings: Settings) -> list[str]:
    """Say which kernels are there and, for each kind, the command that predicts from one of them."""
    tasks_by_flags: dict[tuple[str, ...], list[str]] = {}
    commands: dict[tuple[str, ...], str] = {}
    notes = []
    for task in dict.fromkeys(file.task for file in paths.values()):
        kernels = [
            path for path, file in paths.items() if file.task == task and file.kind == "kernels" and file.holds_tensors
        ]
        if not kernels:
            notes.append(f"note: {archive.name} has no kernels of {task} and these seeds, only files that go with them")
            continue
        smallest = min(kernels, key=lambda path: paths[path].size)
        splits = {paths[path].split for path in kernels if path.parent == smallest.parent}
        try:
            flags = flags_for(archive, task, list(kernel_files.load_kernel(smallest)[0].shape), splits)
        except UsageError as error:
            notes.append(f"note: {smallest.parent} cannot be used: {error}")
            continue
        tasks_by_flags.setdefault(flags, []).append(task)
        commands.setdefault(flags, command(archive, paths[smallest], flags, settings))
    seeds = ", ".join(map(str, sorted({file.seed for file in paths.values()})))
    lines = []
    for flags, tasks in tasks_by_flags.items():
        lines += [f"{archive.name}: {', '.join(tasks)}, seeds {seeds}; to predict from one of them:"]
        lines += [f"    {commands[flags]}"]
    return lines + notes


def flags_for(archive: Archive, task: str, shape: list[int], splits: set[str]) -> tuple[str, ...]:
    """Return the flags with which run.py takes kernels of a shape, for the splits that are there."""
    is_asymmetric = FORMULAS[archive.formula].is_asymmetric
    classes = len(TASKS[task].labels)
    fitting = (1,) if is_asymmetric else (1, 2) if classes == 2 else (classes,)
    if (len(shape) == 5) != is_asymmetric or shape[-1] not in fitting:
        raise UsageError(f"its kernels of shape {shape} are not what run.py takes for {archive.formula} and {task}")
    if "train" not in splits:
        raise UsageError("it lacks the kernel of the train examples")
    flags = ["--kernel_solver", "asym" if is_asymmetric else "logistic"]
    flags += ["--kernel_formula", archive.formula] if archive.formula != "sgd" else []
    flags += ["--binary_classification"] if shape[-1] == 1 else []
    flags += ["--from_linearhead"] if archive.few_shot_type == "finetune" else []
    flags += ["--do_eval", "False"] if "dev" not in splits else []
    flags += ["--no_predict"] if "test" not in splits else []
    return tuple(flags)


def command(archive: Archive, file: File, flags: tuple[str, ...], settings: Settings) -> str:
    """Write the call of run_fewshot.sh that predicts from the kernels beside a file."""
    k, _, seed = file.run.partition("-")
    tag = settings.tag_of(archive)
    variables = {
        "TAG": f"{tag}-{flags[1]}", "TRAINER": "kernel", "TASK": file.task, "K": k, "SEED": seed,
        "TYPE": archive.few_shot_type, "MODEL": MODEL,
    }  # fmt: skip
    if settings.output_dir.resolve() == RESULT.resolve():
        variables = {"LOAD_KERNELS_TAG": tag} | variables
    else:
        flags = (*flags, "--load_kernels", str(settings.path(archive, file).parent.absolute()))
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*words, "bash", "run_fewshot.sh", shlex.join(flags)])


def list_archives(settings: Settings) -> None:
    """Print the published archives and what of them is here."""
    for archive in ARCHIVES:
        path, contents = settings.fetched(archive), Contents.read(settings.record(archive))
        here = []
        if path.exists():
            here.append(f"fetched ({data_size(path.stat().st_size)})")
        elif partial_of(path).exists():
            here.append(f"begun ({data_size(partial_of(path).stat().st_size)})")
        if contents is not None:
            there = sum(settings.path(archive, file).exists() for file in contents.files)
            here.append(f"{there} of {len(contents.files)} files unpacked")
        print(f"{settings.url(archive)}  {', '.join(here) or 'not here'}")


def main(argv: list[str] | None = None) -> None:
    """Provide the archives one by one."""
    flags = read_flags(argv)
    chosen, settings = choose_archives(flags), check_settings(flags)
    if flags.list:
        list_archives(settings)
        return
    atomic.prepare_output_dir(settings.output_dir)
    for archive in chosen:
        provide(archive, settings)


if __name__ == "__main__":
    sys.exit(exit_status(main, "what was unpacked is kept; the same command goes on from there"))
