"""Training and zero-shot prediction of scores (STS-B)."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from transformers import AutoTokenizer

from command_line import SENTENCES, Workplace, write_rows
from training_runs import STEPS, logits_of, prompt_ids, results

SCORES = {"train": (0.5, 4.2, 1.0, 3.8), "dev": (4.0, 0.0, 2.5, 5.0), "test": (1.2, 3.0, 4.8, 0.2, 2.0, 3.6)}
PAIRS = [(SENTENCES[i].capitalize(), SENTENCES[(i * 2 + 1) % 6].capitalize()) for i in range(6)]


@pytest.fixture(scope="module")
def scores_data(place: Workplace) -> list[str]:
    """The flags for tiny STS-B data."""
    for split, scores in SCORES.items():
        rows = [["x"] * 7 + [*PAIRS[i], str(score)] for i, score in enumerate(scores)]
        write_rows(place.folder / "STS-B" / f"{split}.tsv", [["h"] * 10, *rows])
    return ["--task_name", "sts-b", "--data_dir", str(place.folder / "STS-B")]


def hand_scores(lm: nn.Module, place: Workplace) -> tuple[Tensor, float]:
    """The untrained model's test scores [X] and loss on STS-B, by the definition: KL from the labels' own place."""
    prompts = [f"<s>{a}<mask>, {b[0].lower()}{b[1:]}</s>" for a, b in PAIRS]
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    words = tokenizer.convert_tokens_to_ids(["ĠNo", "ĠYes"])
    ids, places, _ = prompt_ids(place.model, prompts)
    with torch.no_grad():
        logits = torch.stack([lm(input_ids=row).logits[0, at, words] for row, at in zip(ids, places, strict=True)])
    probabilities = logits.double().softmax(1)
    wanted = torch.tensor(SCORES["test"], dtype=torch.float64) / 5
    wanted = torch.stack([1 - wanted, wanted], 1)
    return 5 * probabilities[:, 1], (torch.special.xlogy(wanted, wanted / probabilities)).sum(1).mean().item()


def test_zero_shot_scores_lie_between_the_two_label_words(
    place: Workplace, lm: nn.Module, scores_data: list[str]
) -> None:
    found = logits_of(place, "--no_train", *scores_data, name="zero scores")
    scores, loss = hand_scores(lm, place)
    assert found.shape == (6, 1)
    assert found[:, 0] == pytest.approx(scores.numpy(), abs=1e-4)
    numbers = results(place.folder / "zero scores", "sts-b")[1]
    pearson, spearman = (f(scores.numpy(), SCORES["test"]).statistic for f in (pearsonr, spearmanr))
    assert numbers == {
        "eval_pearson": pytest.approx(pearson, abs=1e-5),
        "eval_spearmanr": pytest.approx(spearman),
        "eval_corr": pytest.approx((pearson + spearman) / 2, abs=1e-5),
        "eval_loss": pytest.approx(loss, rel=1e-4),
    }
    assert place.last_record()["sts-b_test_eval_pearson"] == numbers["eval_pearson"]


@pytest.mark.parametrize("trainer", ["standard", "linearhead"])
@pytest.mark.parametrize("kind", ["prompt", "finetune", "prompt-demo"])
def test_scores_are_learnt(place: Workplace, scores_data: list[str], trainer: str, kind: str) -> None:
    flags = (*STEPS, "--trainer", trainer, "--few_shot_type", kind, "--num_sample", "2")
    found = logits_of(place, *flags, *scores_data, name=f"scores {trainer} {kind}")
    assert found.shape == (6, 1)
    if kind != "finetune":
        assert found.min() >= 0 and found.max() <= 5
    dev, test = results(place.folder / f"scores {trainer} {kind}", "sts-b")
    assert dev.keys() == test.keys() == {"eval_pearson", "eval_spearmanr", "eval_corr", "eval_loss"}
    assert test["eval_pearson"] == pytest.approx(pearsonr(found[:, 0], SCORES["test"]).statistic, abs=1e-5)
    if kind == "finetune":
        assert test["eval_loss"] == pytest.approx(np.mean((found[:, 0] - SCORES["test"]) ** 2), rel=1e-4)


def test_the_best_model_by_scores_is_the_best_by_pearson(place: Workplace, scores_data: list[str]) -> None:
    flags = (*STEPS, "--evaluate_during_training", "--eval_steps", "1", "--save_total_limit", "9")
    folder = place.run(*flags, *scores_data, output="best scores")
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    seen = [entry["eval_pearson"] for entry in state["log_history"] if "eval_pearson" in entry]
    assert len(seen) == 4
    assert results(folder, "sts-b")[0]["eval_pearson"] == pytest.approx(max(seen), rel=1e-6)
