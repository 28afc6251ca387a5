"""Runs and checkpoints that several files of tests use."""

import json
import shutil
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForMaskedLM

from command_line import Workplace
from training_runs import STEPS


@pytest.fixture(scope="module")
def tuned(place: Workplace) -> Path:
    """The output folder of a plain fine-tuning run."""
    return place.run(*STEPS, "--tag", "a tag", output="tuned")


@pytest.fixture(scope="module")
def still(place: Workplace) -> Path:
    """The checkpoint with a configuration without dropout."""
    folder = place.folder / "still"
    shutil.copytree(place.model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lm(place: Workplace) -> nn.Module:
    """The checkpoint as transformers loads it."""
    return AutoModelForMaskedLM.from_pretrained(place.model, attn_implementation="eager").eval()
