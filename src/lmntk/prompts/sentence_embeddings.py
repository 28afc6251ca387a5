"""Sentence embeddings: a model computes them, a file beside each split holds them, demonstrations are chosen by them.

An embedding is the mean of the model's last hidden states over an example's tokens, as the *-mean-tokens and MiniLM
sentence models have it (Reimers and Gurevych 2019, arXiv 1908.10084). An example of two sentences is both, joined by a
space. Beside train.tsv stands train_<name>.npy, float32 `[examples, d]`, in the order of the file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmntk.data.tasks import Task
from lmntk.errors import EmbeddingsError, ModelError
from lmntk.storage.atomic import write_atomically
from lmntk.storage.readers import read_npy

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


def embedding_file(split_file: Path, model: str) -> Path:
    """Return where the sentence embeddings of a split are.

    Args:
        split_file: The file of the split.
        model: The name of the embeddings; of a name with slashes the last part counts.

    Examples:
        >>> str(embedding_file(Path("k-shot/MNLI/16-42/dev_matched.tsv"), "org/sbert"))
        'k-shot/MNLI/16-42/dev_matched_sbert.npy'
    """
    return split_file.with_name(f"{split_file.stem}_{Path(model).name}.npy")


def read_embeddings(task: Task, data_dir: str | Path, split: str, model: str, number: int) -> np.ndarray:
    """Read the sentence embeddings of a split, `[number, d]`.

    Args:
        task: The task of the split.
        data_dir: The folder of the split.
        split: ``"train"``, ``"dev"`` or ``"test"``.
        model: The name of the embeddings.
        number: How many examples the split has.

    Raises:
        EmbeddingsError: The file is missing, cannot be read, or does not hold one finite vector for each example.
    """
    path = embedding_file(Path(data_dir) / task.file_name(split), model)

    def unfit(what: str) -> EmbeddingsError:
        cause = f"{path}, which `demo_filter` needs, {what}"
        return EmbeddingsError(
            f"{cause}: compute it with `write_embeddings`", cause=cause, path=path, model=Path(model).name
        )

    try:
        embeddings = read_npy(path)
    except FileNotFoundError as error:
        raise unfit("is missing") from error
    except OSError as error:
        raise unfit(f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise unfit("is damaged, or not a plain numpy array") from error
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or not np.isfinite(embeddings).all():
        raise unfit("is not an array of finite floats [examples, dimensions]")
    if len(embeddings) != number:
        raise unfit(f"holds {len(embeddings)} embeddings, but {split} has {number} examples")
    return embeddings


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Divide vectors `[n, d]` by their length, in float64; zeros stay zeros."""
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.sqrt((wide * wide).sum(axis=1, keepdims=True)), 1e-12)


@dataclass(frozen=True)
class Encoder:
    """A sentence model in eval mode.

    Attributes:
        model: The transformers model.
        tokenizer: Its tokenizer.
        max_length: How many tokens it reads at most; None for no limit.
    """

    model: Any
    tokenizer: Any
    max_length: int | None

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Compute the means of the last hidden states of some texts in one batch, `[texts, d]`."""
        import torch

        tokens = self.tokenizer(
            list(texts), padding=True, return_tensors="pt",
            truncation=self.max_length is not None, max_length=self.max_length,
        ).to(self.model.device)  # fmt: skip
        with torch.no_grad():
            states = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        return ((states * mask).sum(1) / mask.sum(1)).cpu()

    def embed_all(self, texts: Sequence[str], batch_size: int, what: str) -> np.ndarray:
        """Compute embeddings in batches of similar length.

        Args:
            texts: The texts.
            batch_size: How many texts go through the model at once.
            what: The label of the progress bar.

        Returns:
            The embeddings in the order of the texts, float32 `[texts, d]`.
        """
        from tqdm import tqdm

        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        embeddings = np.empty((0, 0), dtype=np.float32)
        with tqdm(total=len(texts), unit="text", desc=what) as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                found = self.embed([texts[index] for index in batch]).numpy()
                if not start:
                    embeddings = np.empty((len(texts), found.shape[1]), dtype=np.float32)
                embeddings[batch] = found
                bar.update(len(batch))
        return embeddings


def load_encoder(name_or_path: str, max_positions: Callable[[PretrainedConfig], int | None]) -> Encoder:
    """Load a sentence model, onto the GPU if there is one.

    Args:
        name_or_path: A folder, or a name on the model hub.
        max_positions: Returns how many tokens a model reads at most: `lmntk.models.families.max_positions`.

    Raises:
        ModelError: The model cannot be loaded, lacks weights, or has a decoder.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # it would list the head and the pooler, which no embedding needs
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model, report = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers and tokenizers raise whatever they like over a bad file
        kind = "folder" if Path(name_or_path).is_dir() else "name, which is not a local folder,"
        reason = " ".join(str(error).split()).split(". ")[0]
        raise _unfit(name_or_path, f": the {kind} gives no model that can be loaded ({reason})") from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise _unfit(name_or_path, f" lacks weights, which would be random: {', '.join(missing[:5])}")
    if config.is_encoder_decoder:
        raise _unfit(name_or_path, " is an encoder with a decoder: an embedding needs an encoder alone")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out: any will do
    tokenizer.padding_side = "right"
    # A tokenizer without a limit says 10³⁰.
    limits = [limit for limit in (tokenizer.model_max_length, max_positions(config)) if limit and limit < 10**9]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Encoder(model.eval().to(device), tokenizer, min(limits, default=None))


def _unfit(name_or_path: str, problem: str) -> ModelError:
    return ModelError(f"`model={name_or_path}`{problem}", path=name_or_path)


def write_embeddings(encoder: Encoder, texts: Mapping[Path, list[str]], batch_size: int, what: str) -> Iterator[Path]:
    """Embed every text once, since the seeds of a task share their test set; write a file for each key and yield it.

    Args:
        encoder: The sentence model.
        texts: The texts of the examples of each file to write.
        batch_size: How many texts go through the model at once.
        what: The label of the progress bar.
    """
    places = {text: place for place, text in enumerate(dict.fromkeys(text for part in texts.values() for text in part))}
    embeddings = encoder.embed_all(list(places), batch_size, what)
    for path, part in texts.items():
        write_atomically(path, functools.partial(np.save, arr=embeddings[[places[text] for text in part]]))
        yield path
