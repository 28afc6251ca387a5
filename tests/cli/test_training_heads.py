"""Classification heads and linear heads through the command line."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from command_line import Workplace, read_kernel, read_tensors, sst2_rows, write_rows
from training_runs import STEPS, logits_of, prompt_ids, results, sst2_prompts


@pytest.mark.parametrize("trainer", ["standard", "kernel", "linearhead"])
@pytest.mark.parametrize("first_token", [False, True], ids=["own head", "from linear head"])
def test_every_trainer_takes_the_plain_text(place: Workplace, trainer: str, first_token: bool) -> None:
    flags = [*STEPS, "--trainer", trainer, "--few_shot_type", "finetune", *["--from_linearhead"] * first_token]
    folder = place.run(*flags, output=f"plain {trainer} {first_token}")
    for found in results(folder):
        assert found["eval_acc"] * 12 == pytest.approx(round(found["eval_acc"] * 12))
        assert np.isfinite(found["eval_loss"])
    if trainer == "kernel":
        if first_token:
            model = AutoModel.from_pretrained(place.model, add_pooling_layer=False)
            wanted = sum(p.numel() for p in model.parameters()) + 2 * 16 + 2
        else:
            model = AutoModelForSequenceClassification.from_pretrained(place.model, num_labels=2)
            wanted = sum(p.numel() for p in model.parameters())
        assert results(folder)[1]["grad_dim"] == wanted
        assert read_kernel(folder, "test").shape == (4, 2, 6, 2)
        described = json.loads((folder / "test_kernels_sst-2.json").read_text(encoding="utf-8"))
        assert described["template"] == ["*cls**sent_0**sep+*"]
        assert (described["from_linearhead"] is True) == first_token


def test_two_seeds_draw_two_classification_heads_and_one_seed_one(place: Workplace) -> None:
    flags = ("--no_train", "--few_shot_type", "finetune", "--seed")
    one, same, other = (logits_of(place, *flags, seed, name=f"head {n}") for n, seed in enumerate("112"))
    assert np.array_equal(one, same)
    assert not np.allclose(one, other, atol=1e-3)


def fitted_by_hand(features: np.ndarray, classes: np.ndarray, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's own regression, one class's score in halves: weights [2, d] and biases [2]."""
    fitted = LogisticRegressionCV(max_iter=5000, random_state=0, cv=folds).fit(features, classes)
    return np.concatenate([-fitted.coef_, fitted.coef_]) / 2, np.concatenate(
        [-fitted.intercept_, fitted.intercept_]
    ) / 2


def with_more_train(place: Workplace, size: int) -> list[str]:
    """The flag for the same data with another number of train examples."""
    folder = place.folder / f"train of {size}"
    shutil.copytree(place.data, folder, dirs_exist_ok=True)
    write_rows(folder / "train.tsv", [("sentence", "label"), *sst2_rows(size, "train")])
    return ["--data_dir", str(folder)]


# scikit-learn 1.8 announces other defaults; what the defaults are is meant here.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("size", "folds"), [(4, 2), (12, 5)])
def test_the_linear_head_of_a_prompt_is_scikit_learns(place: Workplace, lm: nn.Module, size: int, folds: int) -> None:
    seen: list[Tensor] = []
    handle = lm.lm_head.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))

    def features(split: str, size: int) -> np.ndarray:
        ids, places, _ = prompt_ids(place.model, sst2_prompts(split, size))
        with torch.no_grad():
            rows = [(lm(input_ids=row), seen.pop()[at])[1] for row, at in zip(ids, places, strict=True)]
        return torch.stack(rows).double().numpy()

    rows, biases = fitted_by_hand(features("train", size), np.arange(size) % 2, folds)
    wanted = features("test", 6) @ rows.T + biases
    handle.remove()
    found = logits_of(place, "--trainer", "linearhead", *with_more_train(place, size), name=f"linear {size}")
    # The optimum is found to scikit-learn's tolerance of 1e-4 from float32 features.
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    numbers = results(place.folder / f"linear {size}")[1]
    assert numbers["eval_acc"] == np.mean(wanted.argmax(1) == np.arange(6) % 2)
    loss = F.cross_entropy(torch.from_numpy(wanted), torch.arange(6) % 2).item()
    assert numbers["eval_loss"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_linear_head_on_plain_text_stands_on_the_first_tokens_last_state(place: Workplace) -> None:
    encoder = AutoModel.from_pretrained(place.model, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(place.model)

    def features(split: str, size: int) -> np.ndarray:
        texts = [text for text, _ in sst2_rows(size, split)]
        with torch.no_grad():
            states = [encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in texts]
        return torch.stack(states).double().numpy()

    rows, biases = fitted_by_hand(features("train", 12), np.arange(12) % 2, 5)
    flags = ("--trainer", "linearhead", "--few_shot_type", "finetune", "--from_linearhead")
    found = logits_of(place, *flags, *with_more_train(place, 12), name="linear on text")
    # Twelve examples of sixteen features are separable: where the search ends depends on float32 rounding a little.
    assert found == pytest.approx(features("test", 6) @ rows.T + biases, rel=3e-2)


@pytest.mark.parametrize("kind", ["prompt", "finetune"])
def test_the_kernel_from_a_linear_head_is_that_of_the_model_with_the_fitted_head(place: Workplace, kind: str) -> None:
    more = with_more_train(place, 12)
    flags = ("--few_shot_type", kind, "--from_linearhead", *more)
    folder = place.run("--trainer", "kernel", *flags, output=f"from linear {kind}")
    plain = place.run(
        "--trainer", "kernel", "--few_shot_type", kind, *more, "--no_predict", output=f"from nothing {kind}"
    )
    linear = logits_of(place, "--trainer", "linearhead", *flags, name=f"linear {kind}")
    assert read_tensors(folder / "test_logits_sst-2.pt")[0].numpy() == pytest.approx(linear, abs=1e-6)
    assert not torch.allclose(read_kernel(folder, "dev"), read_kernel(plain, "dev"), rtol=1e-2)
    fitted, own = (json.loads((f / "dev_kernels_sst-2.json").read_text(encoding="utf-8")) for f in (folder, plain))
    assert fitted["weights_sha256"] != own["weights_sha256"]
    if kind == "prompt":
        assert fitted["grad_dim"] == own["grad_dim"]


def test_fine_tuning_from_a_linear_head_starts_at_the_fitted_head(place: Workplace) -> None:
    more = with_more_train(place, 12)
    linear = place.run("--trainer", "linearhead", *more, output="linear start")
    flags = (*STEPS, "--max_steps", "1", "--learning_rate", "0", "--from_linearhead", *more)
    assert results(place.run(*flags, output="started")) == results(linear)
