"""Errors whose remedy is another command: the sentence that a command line shows in place of the error's own."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from lmntk.data.formats import known_endings
from lmntk.data.kshot import KSHOT_MODES, PUBLISHED_SEEDS
from lmntk.data.tasks import TASKS, Task, join_columns
from lmntk.errors import EmbeddingsError, MissingSplitError, UsageError

K_SHOT_TOOL = "python tools/generate_k_shot_data.py"


def sentence_of(error: UsageError) -> str:
    """Return what a command line shows for an error: the cause and, where a command helps, that command."""
    remedy = REMEDIES.get(type(error))
    return f"{error.data['cause']}: {remedy(error)}" if remedy else str(error)


def draw_split(error: UsageError) -> str:
    """Name the command that draws a missing k-shot split; its folder gives mode, task, k and seed if it is one."""
    task, folder = error.data["task"], Path(error.data["folder"])
    if task.columns:
        return _draw_user_split(task, folder)
    numbers, mode = re.fullmatch(r"(\d+)-(\d+)", folder.name), folder.parent.parent.name
    if numbers is None or mode not in KSHOT_MODES:
        return (
            f"make k-shot data with `{K_SHOT_TOOL} --mode k-shot-1k-test --k 16 --task {task.folder}` and give "
            f"--data_dir data/k-shot-1k-test/{task.folder}/16-42"
        )
    owner = next((other for other in TASKS.values() if other.key == folder.parent.name.lower()), task)
    root = folder.parent.parent.parent
    made = root / mode / task.folder / folder.name
    if owner.folder != task.folder:
        return f"the folder is one of {owner.name}: give --task_name {owner.key}, or --data_dir {made} for {task.name}"
    k, seed = numbers.groups()
    command = f"{K_SHOT_TOOL} --mode {mode} --k {k}"
    # Where each seed's draw builds on the one before, the published split comes with the published list of seeds only.
    if not (task.seeds_build_on_each_other and int(seed) in PUBLISHED_SEEDS):
        command += f" --seed {seed}"
    command += f" --task {task.folder}"
    if not _is_usual(root):
        command += f" --data_dir {shlex.quote(str(root / 'original'))} --output_dir {shlex.quote(str(root))}"
    return f"make it with `{command}`" + ("" if made == folder else f" and give --data_dir {made}")


def _draw_user_split(task: Task, folder: Path) -> str:
    numbers, mode = re.fullmatch(r"(\d+)-(\d+)", folder.name), folder.parent.parent.name
    k, seed = numbers.groups() if numbers else ("16", "42")
    in_place, root = numbers is not None and mode in KSHOT_MODES, folder.parent.parent.parent
    if not in_place:
        mode = "k-shot-1k-test"
    return (
        f"put train, dev and test there (ending in {known_endings()}), or draw them from one file FILE with "
        f"`{K_SHOT_TOOL} --mode {mode} --k {k} --seed {seed} "
        f"--task {shlex.quote(folder.parent.name) if in_place else task.name} "
        f"--custom_columns {shlex.quote(join_columns(task.columns))} --input FILE"
        f"{f' --output_dir {shlex.quote(str(root))}' if in_place and not _is_usual(root) else ''}`"
    )


def _is_usual(root: Path) -> bool:
    return root.resolve() == Path("data").resolve()


def embed_sentences(error: UsageError) -> str:
    """Name the command that writes sentence embeddings."""
    return f"`python tools/get_sbert_embedding.py --model MODEL --name {error.data['model']} --do_test` writes them"


REMEDIES: dict[type[UsageError], Callable[[UsageError], str]] = {
    MissingSplitError: draw_split,
    EmbeddingsError: embed_sentences,
}
"""What helps against each kind of error whose `data` holds a ``cause``."""
