"""Sentence embeddings that choose demonstrations."""

from pathlib import Path

import numpy as np

from lmntk.data.tasks import Task
from lmntk.errors import UsageError
from lmntk.storage.readers import read_npy


def embedding_file(task: Task, data_dir: str | Path, split: str, model: str) -> Path:
    """Where the sentence embeddings of a split are: ``<data_dir>/dev_matched_<model>.npy`` for MNLI's ``dev``."""
    return Path(data_dir) / f"{Path(task.file_name(split)).stem}_{Path(model).name}.npy"


def read_embeddings(task: Task, data_dir: str | Path, split: str, model: str, number: int) -> np.ndarray:
    """Read the sentence embeddings of a split with `number` examples, `[number, d]`.

    Raises:
        UsageError: The file is missing, cannot be read, or holds anything else than one finite vector per example.
    """
    path = embedding_file(task, data_dir, split, model)

    def unfit(what: str) -> UsageError:
        return UsageError(f"{path}, which --demo_filter needs, {what}: {_how_to_embed(model)} makes it")

    try:
        embeddings = read_npy(path)
    except FileNotFoundError as error:
        raise unfit("is missing") from error
    except OSError as error:
        raise unfit(f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise unfit("is damaged, or no plain numpy array") from error
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or not np.isfinite(embeddings).all():
        raise unfit("is no array of finite floats [examples, dimensions]")
    if len(embeddings) != number:
        raise unfit(f"holds {len(embeddings)} embeddings, but {split} has {number} examples")
    return embeddings


def _how_to_embed(model: str | None) -> str:
    return f"`python tools/get_sbert_embedding.py --model MODEL --name {Path(model or '').name} --do_test`"


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows divided by their length, in float64; a row of zeros stays one."""
    rows = vectors.astype(np.float64)
    return rows / np.maximum(np.sqrt((rows * rows).sum(axis=1, keepdims=True)), 1e-12)
