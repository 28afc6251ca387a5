"""Fetch the kernels of RoBERTa-base that were published with Malladi et al. 2023, to predict without a model.

    python tools/download_kernels.py --formula sgd --k 16 --task SST-2 trec

Archives are fetched one after the other (an interrupted download continues), checked, and unpacked to where
LOAD_KERNELS_TAG of run_fewshot.sh looks: result/<TASK>-roberta-base-<TYPE>-kernel-published-<formula>/<K>-<SEED>.
At the end it prints the commands that predict from these kernels.
"""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmntk.config.tool_parser import Parser, run_tool, wording
from lmntk.data.kshot import PUBLISHED_SEEDS
from lmntk.errors import UsageError
from lmntk.published import catalogue
from lmntk.published.catalogue import Archive, Contents, File
from lmntk.storage.wording import data_size

if TYPE_CHECKING:
    from lmntk.published.install import LoadableKernels, Settings

CHECKOUT = Path(__file__).resolve().parents[3]
HOME = CHECKOUT if (CHECKOUT / "run_fewshot.sh").is_file() else Path()
RESULT = HOME / "result"
"""Where run_fewshot.sh looks for kernels."""

WHEN_STOPPED = "what was unpacked is kept; the same command goes on from there"


def make_parser() -> Parser:
    """Return the parser of the command line."""
    seeds = sorted(PUBLISHED_SEEDS)
    parser = Parser(description=__doc__)
    # fmt: off
    parser.add_argument("--prompt", nargs="+", choices=catalogue.TYPES, default=["prompt"],
                        help="kernels of prompts, or of a linear layer on the first token (prompt)")
    parser.add_argument("--formula", nargs="+", choices=catalogue.SHOTS, default=["sgd"], help="formulas (sgd)")
    parser.add_argument("--k", nargs="+", type=int, choices=catalogue.SHOTS["sgd"], default=[16],
                        help="training examples of each label; 512 for sgd only (16)")
    parser.add_argument("--task", nargs="+", metavar="TASK", default=catalogue.PUBLISHED_TASKS,
                        help=f"unpack these only, of {', '.join(catalogue.PUBLISHED_TASKS)} (all)")
    parser.add_argument("--seed", nargs="+", type=int, choices=seeds, default=seeds, help="unpack these only (all)")
    parser.add_argument("--tag", help="tag in the names of the folders (published-<formula>)")
    parser.add_argument("--output_dir", type=Path, default=RESULT, help="where the folders go (%(default)s)")
    parser.add_argument("--cache_dir", type=Path, default=HOME / ".cache/published-kernels",
                        help="where archives are kept until they are unpacked (%(default)s)")
    parser.add_argument("--keep_archives", action="store_true", help="keep archives that are unpacked completely")
    parser.add_argument("--base_url", default=catalogue.BASE_URL,
                        help="the folder of a mirror, http or https (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list all archives and what of them is here; fetch nothing")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Install the archives one by one; return the exit status."""
    return run_tool(make_parser(), install_chosen, argv, WHEN_STOPPED)


def install_chosen(arguments: argparse.Namespace) -> None:
    """Install the archives that a command line chooses, or list all of them."""
    from lmntk.published.install import Settings, choose_archives, install  # here, since torch takes seconds
    from lmntk.storage.atomic import prepare_output_dir

    chosen = choose_archives(arguments.prompt, arguments.formula, arguments.k, arguments.tag)
    settings = Settings(
        tasks=tuple(dict.fromkeys(catalogue.published_task(name) for name in arguments.task)),
        seeds=tuple(dict.fromkeys(arguments.seed)),
        **{name: getattr(arguments, name) for name in ("tag", "output_dir", "cache_dir", "keep_archives", "base_url")},
    )
    if arguments.list:
        for archive in catalogue.ARCHIVES:
            print(f"{settings.url(archive)}  {_what_is_here(archive, settings)}")
        return
    prepare_output_dir(settings.output_dir)
    for archive in chosen:
        files = install(archive, settings)
        print("\n".join(how_to_predict(archive, files, settings)))


def _what_is_here(archive: Archive, settings: "Settings") -> str:
    from lmntk.published.http_download import partial_of

    path, contents = settings.archive_path(archive), Contents.read(settings.contents_path(archive))
    here = []
    for state, file in (("fetched", path), ("begun", partial_of(path))):
        if file.exists():
            here.append(f"{state} ({data_size(file.stat().st_size)})")
            break
    if contents is not None:
        unpacked = sum(settings.path(archive, file).exists() for file in contents.files)
        here.append(f"{unpacked} of {len(contents.files)} files unpacked")
    return ", ".join(here) or "not here"


def how_to_predict(archive: Archive, files: Mapping[Path, File], settings: "Settings") -> list[str]:
    """Return lines that name the installed kernels and, for each kind, the command that predicts from one of them."""
    from lmntk.published.install import find_loadable

    tasks_by_flags: dict[tuple[str, ...], list[str]] = {}
    commands: dict[tuple[str, ...], str] = {}
    notes = []
    for task in dict.fromkeys(file.task for file in files.values()):
        try:
            kernels = find_loadable(archive, task, files)
        except UsageError as error:
            notes.append(f"note: {wording(error)}")
            continue
        if kernels is None:
            notes.append(f"note: {archive.name} has no kernels of {task} and these seeds, only files that go with them")
            continue
        flags = _flags_for(archive, kernels)
        tasks_by_flags.setdefault(flags, []).append(task)
        commands.setdefault(flags, _command(archive, kernels.file, flags, settings))
    seeds = ", ".join(map(str, sorted({file.seed for file in files.values()})))
    lines = []
    for flags, tasks in tasks_by_flags.items():
        lines += [f"{archive.name}: {', '.join(tasks)}, seeds {seeds}; to predict from one of them:"]
        lines += [f"    {commands[flags]}"]
    return lines + notes


def _flags_for(archive: Archive, kernels: "LoadableKernels") -> tuple[str, ...]:
    """Return the flags with which run.py takes the kernels, for the splits that have some."""
    flags = ["--kernel_solver", "asym" if kernels.is_asymmetric else "logistic"]
    flags += ["--kernel_formula", archive.formula] if archive.formula != "sgd" else []
    flags += ["--binary_classification"] if kernels.num_logits == 1 else []
    flags += ["--from_linearhead"] if archive.few_shot_type == "finetune" else []
    flags += ["--do_eval", "False"] if "dev" not in kernels.splits else []
    flags += ["--no_predict"] if "test" not in kernels.splits else []
    return tuple(flags)


def _command(archive: Archive, file: File, flags: tuple[str, ...], settings: "Settings") -> str:
    """Return the call of run_fewshot.sh that predicts from the kernels beside a file."""
    k, _, seed = file.run.partition("-")
    tag = settings.tag_of(archive)
    variables = {
        "TAG": f"{tag}-{flags[1]}", "TRAINER": "kernel", "TASK": file.task, "K": k, "SEED": seed,
        "TYPE": archive.few_shot_type, "MODEL": catalogue.MODEL,
    }  # fmt: skip
    if settings.output_dir.resolve() == RESULT.resolve():
        variables = {"LOAD_KERNELS_TAG": tag} | variables
    else:
        flags = (*flags, "--load_kernels", str(settings.path(archive, file).parent.absolute()))
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*words, "bash", "run_fewshot.sh", shlex.join(flags)])
