"""Runs of training through the command line: their flags, their files, and their numbers worked out by hand."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from command_line import SIZES, Workplace, read_results, sst2_rows

STEPS = ("--trainer", "standard", "--max_steps", "4", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2")
ONE_STEP = ("--max_steps", "1", "--per_device_train_batch_size", "4", "--max_grad_norm", "0", "--optimizer", "sgd")
OF_DEV = {"eval_results_sst-2.txt", "dev_predictions_sst-2.csv", "run_sst-2.json"}
RESULTS = OF_DEV | {"test_results_sst-2.txt", "test_predictions_sst-2.csv"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
MODEL = {"config.json", "model.safetensors", *TOKENIZER}
ADAPTERS = {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", *TOKENIZER}


def files(folder: Path) -> set[str]:
    """All files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def results(folder: Path, task: str = "sst-2") -> tuple[dict[str, float], dict[str, float]]:
    """The numbers for dev and for test."""
    return read_results(folder / f"eval_results_{task}.txt"), read_results(folder / f"test_results_{task}.txt")


def used_again(place: Workplace, folder: Path, *flags: str, task: str = "sst-2") -> None:
    """See that what a run left, evaluated as it is, has the run's own metrics and loss."""
    output = place.run("--no_train", "--model_name_or_path", str(folder), *flags, output=f"{folder.name} again")
    for found, wanted in zip(results(output, task), results(folder, task), strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)


def logits_of(place: Workplace, *flags: str, name: str) -> np.ndarray:
    """The test logits that a run saves."""
    saving = (
        "--save_logit",
        "--save_logit_dir",
        str(place.folder / f"{name} logits"),
        "--model_id",
        "0",
        "--array_id",
        "3",
    )
    place.run(*flags, *saving, output=name)
    (path,) = (place.folder / f"{name} logits").iterdir()
    return np.load(path)


def prompt_ids(folder: Path, texts: Iterable[str]) -> tuple[list[Tensor], list[int], list[int]]:
    """Tokens of prompts written out by hand, each one's place of the mask, and the label words."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
    places = [row[0].tolist().index(tokenizer.mask_token_id) for row in ids]
    return ids, places, tokenizer.convert_tokens_to_ids(["Ġterrible", "Ġgreat"])


def sst2_prompts(split: str, size: int | None = None) -> list[str]:
    return [f"<s>{text} It was<mask>.</s>" for text, _ in sst2_rows(size or SIZES[split], split)]


def hand_logits(model: nn.Module, folder: Path, texts: Iterable[str]) -> Tensor:
    """The label words' logits of prompts, asked one at a time."""
    ids, places, words = prompt_ids(folder, texts)
    return torch.stack([model(input_ids=row).logits[0, at, words] for row, at in zip(ids, places, strict=True)])


def changes(before: Path, after: Path) -> dict[str, Tensor]:
    """What training added to each weight, the decoder starting as the word embeddings."""
    start, end = weights(before), weights(after)
    start.setdefault("lm_head.decoder.weight", start["roberta.embeddings.word_embeddings.weight"])
    start.setdefault("lm_head.decoder.bias", start["lm_head.bias"])
    return {name: end[name] - start[name] for name in end if name in start}
