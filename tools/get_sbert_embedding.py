#!/usr/bin/env python3
"""Sentence embeddings of k-shot data, for the choice of demonstrations by `--demo_filter` of run.py.

    python tools/get_sbert_embedding.py --model sentence-transformers/all-MiniLM-L6-v2 --task SST-2 MNLI --do_test

An embedding is the mean of the model's last hidden states over an example's tokens, as the *-mean-tokens and MiniLM
sentence models have it (Reimers and Gurevych 2019, arXiv 1908.10084). An example of two sentences is both, joined by a
space. Beside train.tsv comes train_<name>.npy, float32 [examples, features], rows in the file's order.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lmntk.config.tool_parser import Parser, exit_status
from lmntk.data.examples import read_examples, split_file
from lmntk.data.kshot import DEFAULT_TASKS, PUBLISHED_SEEDS
from lmntk.data.tasks import CUSTOM, TASKS, Task, custom_task, find_task
from lmntk.errors import UsageError
from lmntk.models.families import max_positions
from lmntk.storage.atomic import write_atomically
from lmntk.storage.readers import read_npy


@dataclass(frozen=True)
class Encoder:
    """A model in eval mode, its tokenizer, and the most tokens it reads; None where nothing limits them."""

    model: Any
    tokenizer: Any
    max_length: int | None

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Compute the means of the last hidden states, [texts, d]."""
        tokens = self.tokenizer(
            list(texts), padding=True, return_tensors="pt",
            truncation=self.max_length is not None, max_length=self.max_length,
        ).to(self.model.device)  # fmt: skip
        states = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        return ((states * mask).sum(1) / mask.sum(1)).cpu()


def load_encoder(name_or_path: str) -> Encoder:
    """Load a checkpoint, onto the GPU if there is one."""
    transformers_logging.set_verbosity_error()  # it would list the head and the pooler, which no embedding needs
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model, report = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers and tokenizers raise whatever they like over a bad file
        kind = "folder" if Path(name_or_path).is_dir() else "name, which is no local folder,"
        reason = " ".join(str(error).split()).split(". ")[0]
        raise UsageError(f"--model {name_or_path}: the {kind} gives no model that can be loaded ({reason})") from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UsageError(f"--model {name_or_path} lacks weights, which would be random: {', '.join(missing[:5])}")
    if config.is_encoder_decoder:
        raise UsageError(f"--model {name_or_path} is an encoder with a decoder: an embedding needs an encoder alone")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out: any will do
    tokenizer.padding_side = "right"
    # A tokenizer that knows of no limit says 10³⁰.
    limits = [limit for limit in (tokenizer.model_max_length, max_positions(config)) if limit and limit < 10**9]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Encoder(model.eval().to(device), tokenizer, min(limits, default=None))


def embed_all(encoder: Encoder, texts: Sequence[str], batch_size: int, what: str) -> np.ndarray:
    """Embed texts in batches of similar length; float32 [texts, d] in the texts' order."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
    parts = []
    with tqdm(total=len(texts), unit="text", desc=what) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            parts.append(encoder.embed([texts[index] for index in batch]))
            bar.update(len(batch))
    embeddings = np.empty((len(texts), parts[0].shape[1]), dtype=np.float32)
    embeddings[order] = torch.cat(parts).numpy()
    return embeddings


def split_files(task: Task, folder: Path, do_test: bool) -> list[Path]:
    """Find the files of a k-shot folder; MNLI's holds the test sets of both of its tasks."""
    splits = ("train", "dev", "test") if do_test else ("train", "dev")
    tasks = [other for other in TASKS.values() if other.folder == task.folder] or [task]
    files = (split_file(other, folder, split) for split in splits for other in tasks)
    return list(dict.fromkeys(files))


def example_texts(task: Task, path: Path) -> list[str]:
    """Read what is to be embedded of each example, as LM-BFF has it."""
    return [" ".join(example.texts) for example in read_examples(task, path)]


def embedding_path(path: Path, name: str) -> Path:
    """Where run.py looks for the embeddings of a split's file."""
    return path.with_name(f"{path.stem}_{name}.npy")


def check_kept(path: Path, examples: int) -> None:
    """See that embeddings which are to be kept are those of as many examples.

    Raises:
        UsageError: They are not, or the file is damaged.
    """
    try:
        shape = read_npy(path).shape
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no array that can be read ({error}): compute it again with --overwrite") from error
    if len(shape) != 2 or shape[0] != examples:
        raise UsageError(f"{path} has the shape {list(shape)}, for {examples} examples: compute it with --overwrite")


def write_embeddings(encoder: Encoder, texts: Mapping[Path, list[str]], batch_size: int, what: str) -> None:
    """Embed every text once, since the seeds of a task share their test set, and write a file for each key."""
    distinct = {text: row for row, text in enumerate(dict.fromkeys(text for part in texts.values() for text in part))}
    embeddings = embed_all(encoder, list(distinct), batch_size, what)
    for path, part in texts.items():
        write_atomically(path, functools.partial(np.save, arr=embeddings[[distinct[text] for text in part]]))
        print(path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and the sentence model's name as LM-BFF spells it."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="a sentence model: a folder, or a name on the model hub")
    model.add_argument("--sbert_model", help=argparse.SUPPRESS)
    parser.add_argument("--name", help="what the files are called by (default: the last part of --model)")
    parser.add_argument("--data_dir", type=Path, default=Path("data/k-shot-1k-test"), help="default: %(default)s")
    parser.add_argument("--task", nargs="+", metavar="TASK", help="default: the usual ones that have a folder there")
    parser.add_argument("--custom_columns", metavar="TEXT[,TEXT...],LABEL", help="of data of one's own, as in run.py")
    parser.add_argument("--k", type=int, default=16, help="training examples of each label (default: %(default)s)")
    parser.add_argument("--seed", type=int, nargs="+", default=PUBLISHED_SEEDS, help="default: %(default)s")
    parser.add_argument("--do_test", action="store_true", help="embed the test set too, which may be large")
    parser.add_argument("--batch_size", type=int, default=32, help="texts at a time (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="compute again what is there")
    arguments = parser.read(argv)
    if arguments.batch_size < 1:
        raise UsageError(f"--batch_size {arguments.batch_size}: at least one text at a time")
    if arguments.sbert_model:
        arguments.model = f"sentence-transformers/{arguments.sbert_model}-nli-stsb-mean-tokens"
        arguments.name = arguments.name or f"sbert-{arguments.sbert_model}"
    arguments.name = arguments.name or Path(arguments.model).resolve().name
    if "/" in arguments.name:
        raise UsageError(f"--name {arguments.name}: it is part of a file's name and cannot hold a slash")
    return arguments


def choose_tasks(names: Sequence[str] | None, custom_columns: str | None, data_dir: Path) -> list[Task]:
    """Look up the tasks asked for, or the usual ones that have a folder; each folder counts once."""
    if custom_columns is not None:
        return [custom_task(custom_columns, name=name) for name in names or [CUSTOM]]
    tasks = [find_task(name) for name in names or DEFAULT_TASKS]
    if not names:
        tasks = [task for task in tasks if (data_dir / task.folder).is_dir()]
    if not tasks:
        make = f"`python tools/generate_k_shot_data.py --mode {data_dir.name}` makes them"
        raise UsageError(f"{data_dir} holds none of the usual tasks: {make}; --data_dir says where they are")
    return list({task.folder: task for task in tasks}.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Embed task by task; all that can be wrong with the files is found before the model is loaded."""
    arguments = parse_arguments(argv)
    work: dict[str, dict[Path, list[str]]] = {}
    for task in choose_tasks(arguments.task, arguments.custom_columns, arguments.data_dir):
        texts = work.setdefault(task.folder, {})
        for seed in arguments.seed:
            folder = arguments.data_dir / task.folder / f"{arguments.k}-{seed}"
            for file in split_files(task, folder, arguments.do_test):
                path, examples = embedding_path(file, arguments.name), example_texts(task, file)
                if path.exists() and not arguments.overwrite:
                    check_kept(path, len(examples))
                    print(f"{path} is there already: kept (--overwrite computes it again)")
                else:
                    texts[path] = examples
    if any(work.values()):
        encoder = load_encoder(arguments.model)
        for what, texts in work.items():
            if texts:
                write_embeddings(encoder, texts, arguments.batch_size, what)
    print(f"to use them: run.py --demo_filter --demo_filter_model {arguments.name}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
