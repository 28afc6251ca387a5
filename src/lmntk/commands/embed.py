"""Compute sentence embeddings of k-shot data, by which `--demo_filter` of run.py chooses demonstrations.

    python tools/get_sbert_embedding.py --model sentence-transformers/all-MiniLM-L6-v2 --task SST-2 MNLI --do_test

An embedding is the mean of the model's last hidden states over an example's tokens, as the *-mean-tokens and MiniLM
sentence models have it (Reimers and Gurevych 2019, arXiv 1908.10084). An example of two sentences is both, joined by a
space. Beside train.tsv comes train_<name>.npy, float32 [examples, features], rows in the file's order.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lmntk.config.tool_parser import Parser, run_tool
from lmntk.data.examples import read_examples, split_file
from lmntk.data.kshot import PUBLISHED_SEEDS, choose_tasks
from lmntk.data.tasks import CUSTOM, TASKS, Task, custom_task
from lmntk.errors import FileError, SettingError
from lmntk.prompts import sentence_embeddings
from lmntk.storage.readers import read_npy


def main(argv: Sequence[str] | None = None) -> int:
    """Write the embeddings of each task; return the exit status."""
    return run_tool(make_parser(), _write_embeddings, argv)


def make_parser() -> Parser:
    """Return the parser of the command line, which also knows the sentence model's name as LM-BFF spells it."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="a sentence model: a folder, or a name on the model hub")
    model.add_argument("--sbert_model", help=argparse.SUPPRESS)
    parser.add_argument("--name", help="the name in the names of the files (default: the last part of --model)")
    parser.add_argument("--data_dir", type=Path, default=Path("data/k-shot-1k-test"), help="default: %(default)s")
    parser.add_argument("--task", nargs="+", metavar="TASK", help="default: the usual ones that have a folder there")
    parser.add_argument("--custom_columns", metavar="TEXT[,TEXT...],LABEL", help="of your own data, as in run.py")
    parser.add_argument("--k", type=int, default=16, help="training examples of each label (default: %(default)s)")
    parser.add_argument("--seed", type=int, nargs="+", default=PUBLISHED_SEEDS, help="default: %(default)s")
    parser.add_argument("--do_test", action="store_true", help="embed the test set too, which may be large")
    parser.add_argument("--batch_size", type=int, default=32, help="texts at a time (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="compute again what is there")
    return parser


def _write_embeddings(given: argparse.Namespace) -> None:
    """Embed task by task; all that can be wrong with the files is found before the model is loaded."""
    model, name = _model_and_name(given)
    work: dict[str, dict[Path, list[str]]] = {}
    for task in _tasks(given):
        for seed in given.seed:
            folder = given.data_dir / task.folder / f"{given.k}-{seed}"
            for file in _split_files(task, folder, given.do_test):
                path = sentence_embeddings.embedding_file(file, name)
                examples = [" ".join(example.texts) for example in read_examples(task, file)]
                if path.exists() and not given.overwrite:
                    _check_kept(path, len(examples))
                    print(f"{path} is there already: kept (--overwrite computes it again)")
                else:
                    work.setdefault(task.folder, {})[path] = examples
    if work:
        from lmntk.models.families import max_positions  # here, since mistakes and --help need no transformers

        encoder = sentence_embeddings.load_encoder(model, max_positions)
        for what, texts in work.items():
            for path in sentence_embeddings.write_embeddings(encoder, texts, given.batch_size, what):
                print(path)
    print(f"to use them: run.py --demo_filter --demo_filter_model {name}")


def _check_kept(path: Path, examples: int) -> None:
    """Check that a file holds embeddings of so many examples."""
    try:
        shape = read_npy(path).shape
    except (OSError, ValueError) as error:
        sentence = f"{path} is not an array that can be read ({error}): --overwrite computes it again"
        raise FileError(sentence, path=path) from error
    if len(shape) != 2 or shape[0] != examples:
        sentence = f"{path} has the shape {list(shape)}, for {examples} examples: --overwrite computes it again"
        raise FileError(sentence, path=path, shape=shape)


def _model_and_name(given: argparse.Namespace) -> tuple[str, str]:
    if given.batch_size < 1:
        raise SettingError(f"--batch_size {given.batch_size}: at least one text at a time")
    model, name = given.model, given.name
    if given.sbert_model:
        model = f"sentence-transformers/{given.sbert_model}-nli-stsb-mean-tokens"
        name = name or f"sbert-{given.sbert_model}"
    name = name or Path(model).resolve().name
    if "/" in name:
        raise SettingError(f"--name {name}: it is part of a file's name and cannot hold a slash")
    return model, name


def _tasks(given: argparse.Namespace) -> list[Task]:
    if given.custom_columns is not None:
        return [custom_task(given.custom_columns, name=name) for name in given.task or [CUSTOM]]
    try:
        return choose_tasks(given.task, given.data_dir)
    except FileError as error:
        make = f"`python tools/generate_k_shot_data.py --mode {given.data_dir.name}` makes them"
        raise FileError(f"{error}: {make}; --data_dir says where they are", **error.data) from error


def _split_files(task: Task, folder: Path, do_test: bool) -> list[Path]:
    """Find the files of a k-shot folder; MNLI's holds the test sets of both of its tasks."""
    splits = ("train", "dev", "test") if do_test else ("train", "dev")
    tasks = [other for other in TASKS.values() if other.folder == task.folder] or [task]
    return list(dict.fromkeys(split_file(other, folder, split) for split in splits for other in tasks))
