"""Published kernels installed: each archive is fetched, checked, and unpacked to where runs look for kernels."""

import functools
import shutil
import urllib.parse
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

from tqdm import tqdm

from lmntk.data.kshot import PUBLISHED_SEEDS
from lmntk.data.tasks import TASKS
from lmntk.errors import FileError, KernelMismatchError, SettingError, UsageError
from lmntk.interrupts import Stopped
from lmntk.kernels.formulas import FORMULAS
from lmntk.published import archives
from lmntk.published.catalogue import ARCHIVES, BASE_URL, MODEL, PUBLISHED_TASKS, SHOTS, Archive, Contents, File
from lmntk.published.http_download import download
from lmntk.storage import atomic, kernel_files, logits_files
from lmntk.storage.wording import data_size

InstalledFiles = dict[Path, File]
"""Members of an archive by the paths that they are unpacked to."""


@dataclass(frozen=True)
class Settings:
    """What to install of each archive, and where.

    Attributes:
        tasks: Names from `PUBLISHED_TASKS`.
        seeds: Seeds of k-shot splits.
        tag: Tag in the names of the folders; None: ``published-<formula>``.
        output_dir: Where the folders of kernels go.
        cache_dir: Where archives are kept until they are unpacked.
        keep_archives: Keep archives that are unpacked completely.
        base_url: Address of the folder of archives.

    Raises:
        SettingError: The tag or the address cannot work.
    """

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    tag: str | None
    output_dir: Path
    cache_dir: Path
    keep_archives: bool = False
    base_url: str = BASE_URL

    def __post_init__(self) -> None:
        """Check the tag and the address."""
        if self.tag is not None and (not self.tag or "/" in self.tag):
            raise SettingError(f"`tag='{self.tag}'`: a tag is a word without '/'", setting="tag", value=self.tag)
        if not _is_address(self.base_url):
            message = f"`base_url={self.base_url}`: it must be an address such as {BASE_URL}"
            raise SettingError(message, setting="base_url", value=self.base_url)

    @property
    def everything(self) -> bool:
        """Whether archives are unpacked completely."""
        return (len(self.tasks), len(self.seeds)) == (len(PUBLISHED_TASKS), len(PUBLISHED_SEEDS))

    def url(self, archive: Archive) -> str:
        """Return the address of an archive."""
        return f"{self.base_url.rstrip('/')}/{archive.name}"

    def archive_path(self, archive: Archive) -> Path:
        """Return where an archive is kept until it is unpacked."""
        return self.cache_dir / archive.name

    def contents_path(self, archive: Archive) -> Path:
        """Return the file that lists an archive's contents."""
        return self.cache_dir / f"{archive.name}.contents.json"

    def tag_of(self, archive: Archive) -> str:
        """Return the tag in the names of an archive's folders."""
        return self.tag or f"published-{archive.formula}"

    def path(self, archive: Archive, file: File) -> Path:
        """Return where a file is unpacked to."""
        folder = f"{file.task}-{MODEL}-{archive.few_shot_type}-kernel-{self.tag_of(archive)}"
        return self.output_dir / folder / file.run / file.name

    def choose(self, contents: Contents, archive: Archive) -> InstalledFiles:
        """Return the files of an archive to install."""
        chosen = contents.chosen(archive.name, self.tasks, self.seeds)
        return {self.path(archive, file): file for file in chosen}


def _is_address(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def choose_archives(
    prompts: Sequence[str], formulas: Sequence[str], shots: Sequence[int], tag: str | None = None
) -> list[Archive]:
    """Return the archive of every combination of keys of `TYPES`, keys of `SHOTS`, and examples per label.

    Raises:
        SettingError: A combination was not published, or a tag is given for several formulas.

    Examples:
        >>> [archive.name for archive in choose_archives(["prompt"], ["sgd"], [16, 64])]
        ['prompt-sgd-16-shot.zip', 'prompt-sgd-64-shot.zip']
    """
    if tag is not None and len(set(formulas)) > 1:
        message = f"`tag={tag}`: a tag is for the kernels of one `formula`: leave it out to have one for each formula"
        raise SettingError(message, setting="tag", value=tag)
    combinations = product(dict.fromkeys(prompts), dict.fromkeys(formulas), dict.fromkeys(shots))
    chosen = [Archive(*parts) for parts in combinations]
    for archive in chosen:
        if archive not in ARCHIVES:
            published = " and ".join(map(str, SHOTS[archive.formula]))
            message = f"no such kernels were published; {archive.formula} kernels are those of {published} examples"
            choice = f"`formula={archive.formula}` `k={archive.k}`"
            raise SettingError(f"{choice}: {message} per label", setting="k", value=archive.k)
    return chosen


def install(archive: Archive, settings: Settings) -> InstalledFiles:
    """Fetch and unpack an archive, as far as that is not done yet; print what is done.

    Args:
        archive: One of `ARCHIVES`.
        settings: What to unpack, and where.

    Returns:
        The files that were asked for, all of which are unpacked.

    Raises:
        DownloadError: The archive cannot be fetched.
        FileError: It is damaged or unsafe, a different file is in the place of one of its files, or a disk is full.
    """
    contents = Contents.read(settings.contents_path(archive))
    if contents is not None and all(is_installed(*item) for item in settings.choose(contents, archive).items()):
        print(f"{archive.name}: what is asked for of it is unpacked already")
        return settings.choose(contents, archive)
    path = settings.archive_path(archive)
    fetched_here = not path.exists()
    if fetched_here:
        fetch(archive, settings)
    else:
        print(f"{path} is here already")
    try:
        contents = unpack(archive, path, settings)
    except archives.DamagedArchiveError as error:
        raise _report_damage(error, path, settings.url(archive), fetched_here) from error
    except Stopped as stop:
        stop.kept_summary = f"{path}, and what was unpacked of it, is kept"
        raise
    complete = all(settings.path(archive, file).exists() for file in contents.files)
    if fetched_here and complete and not settings.keep_archives:
        path.unlink()
    else:
        print(f"{path} is kept; {'all' if complete else 'not all'} of it is unpacked")
    return settings.choose(contents, archive)


def _report_damage(error: UsageError, path: Path, url: str, fetched_here: bool) -> archives.DamagedArchiveError:
    """Say how to get an undamaged archive; a damaged one that was just fetched is removed."""
    if not fetched_here:
        return archives.DamagedArchiveError(f"{error}; remove it, and the same command fetches it", **error.data)
    path.unlink()
    return archives.DamagedArchiveError(
        f"{error}; the archive was removed, and the same command fetches it again: if that fails in the same way, "
        f"{url} itself is damaged, and `base_url` names a mirror",
        **error.data,
    )


def fetch(archive: Archive, settings: Settings) -> None:
    """Download an archive, unless the disk lacks room for it."""
    path, url = settings.archive_path(archive), settings.url(archive)

    def announce(size: int | None, received: int) -> None:
        total = "of unknown size" if size is None else data_size(size)
        here = f", {data_size(received)} of it are here already" if received else ""
        free = shutil.disk_usage(_nearest_folder(settings.cache_dir)).free
        print(f"fetching {url}: {total}{here}; {data_size(free)} are free on the disk", flush=True)
        _check_archive_fits(archive, settings, size or 0, received)

    remedy = f"`base_url` names a mirror; or put the archive from elsewhere at {path} and repeat this command"
    download(url, path, announce, remedy)


def unpack(archive: Archive, path: Path, settings: Settings) -> Contents:
    """Write the files asked for, each completely or not at all, after the archive at `path` has passed all checks."""
    with archives.opened(path) as opened:
        members = {member.filename: member for member in opened.infolist() if not member.is_dir()}
        contents = Contents.of((name, member.file_size, member.CRC) for name, member in members.items())
        contents.check(path)
        if contents.others:
            print(f"left out of {path.name}: {contents.example_of_others}")
        chosen = settings.choose(contents, archive)
        missing = {target: file for target, file in chosen.items() if not is_installed(target, file)}
        needed = sum(file.size for file in missing.values())
        _check_room("output_dir", settings.output_dir, needed, f"what is unpacked of {archive.name}")
        print(f"unpacking {len(missing)} files of {archive.name}, {data_size(needed)}", flush=True)
        with tqdm(total=2 * needed, unit="B", unit_scale=True, desc=archive.name, disable=None) as bar:
            archives.check(opened, [members[file.member] for file in missing.values()], bar.update)
            for target, file in missing.items():
                atomic.prepare_output_dir(target.parent)
                atomic.write_atomically(target, functools.partial(_write, opened, file))
                bar.update(file.size)
    contents.write(settings.contents_path(archive))
    return contents


def _write(opened: ZipFile, file: File, out: BinaryIO) -> None:
    """Write a member's bytes, and check that they hold tensors and no other pickle before the file gets its name."""
    archives.copy(opened, opened.getinfo(file.member), out)
    out.flush()
    if not file.holds_tensors:
        return
    try:
        load = kernel_files.load_kernel if file.kind == "kernels" else logits_files.load_logits
        load(Path(out.name))
    except UsageError as error:
        raise FileError(
            f"{file.member} in {opened.filename} is not what its name says, {file.kind} as a pair of tensors; nothing "
            "else is read from it or run, and it was not unpacked: `task` and `seed` choose other members",
            path=Path(opened.filename or ""),
            member=file.member,
        ) from error


def is_installed(path: Path, file: File) -> bool:
    """Return whether a file is unpacked; a different file in its place, such as a user's kernel, is an error."""
    if not path.exists():
        return False
    if path.is_file() and path.stat().st_size == file.size and _crc(path) == file.crc:
        return True
    message = f"{path} exists already and is not the published file: move it away, or choose another `tag`"
    raise FileError(message, path=path)


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _nearest_folder(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _check_archive_fits(archive: Archive, settings: Settings, size: int, received: int) -> None:
    """Refuse an archive that does not fit; kernels hardly compress and take as much space again when unpacked."""
    cache, output = settings.cache_dir, settings.output_dir
    unpacked = size if settings.everything else 0
    if unpacked and _nearest_folder(cache).stat().st_dev == _nearest_folder(output).stat().st_dev:
        what = f"{archive.name}, with what is unpacked of it,"
        _check_room("cache_dir", cache, size - received + unpacked, what)
    else:
        _check_room("cache_dir", cache, size - received, archive.name)
        _check_room("output_dir", output, unpacked, f"what is unpacked of {archive.name}")


def _check_room(setting: str, folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(_nearest_folder(folder)).free
    if free < needed:
        message = f"{what} takes {data_size(needed)}, but {data_size(free)} are free: make room, choose another folder"
        choice = f"`{setting}={folder}`"
        raise SettingError(f"{choice}: {message}, or select less with `task` and `seed`", setting=setting, value=folder)


@dataclass(frozen=True)
class LoadableKernels:
    """The kernels in one folder that a run can load.

    Attributes:
        file: The smallest of them.
        num_logits: Logits per example, C.
        is_asymmetric: Whether they have two directions.
        splits: The splits that have a kernel.
    """

    file: File
    num_logits: int
    is_asymmetric: bool
    splits: frozenset[str]


def find_loadable(archive: Archive, task: str, files: Mapping[Path, File]) -> LoadableKernels | None:
    """Describe the folder of a task's smallest kernel among the files of `install`; None without any kernel.

    Raises:
        KernelMismatchError: A run with the formula of the archive cannot use these kernels.
    """
    kernels = {path: file for path, file in files.items() if file.task == task and file.is_kernel}
    if not kernels:
        return None
    smallest = min(kernels, key=lambda path: kernels[path].size)
    splits = frozenset(file.split for path, file in kernels.items() if path.parent == smallest.parent)
    shape = list(kernel_files.load_kernel(smallest)[0].shape)
    is_asymmetric = FORMULAS[archive.formula].is_asymmetric
    if (len(shape) == 5) != is_asymmetric or shape[-1] not in _possible_logits(task, is_asymmetric):
        message = f"a run with formula {archive.formula} does not take kernels of shape {shape} for {task}"
    elif "train" not in splits:
        message = "the kernel of the train examples is missing"
    else:
        return LoadableKernels(kernels[smallest], shape[-1], is_asymmetric, splits)
    raise KernelMismatchError(f"{smallest.parent} cannot be used: {message}", path=smallest.parent, differences=shape)


def _possible_logits(task: str, is_asymmetric: bool) -> Collection[int]:
    if is_asymmetric:
        return (1,)
    classes = len(TASKS[task].labels)
    return (1, 2) if classes == 2 else (classes,)
