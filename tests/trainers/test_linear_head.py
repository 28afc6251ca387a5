"""The linear head: the last layer's rows are those of a regression on what goes into it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegressionCV
from torch import nn

from command_line import Workplace, sst2_rows, write_rows
from lmntk import trainers
from lmntk.config.arguments import parse_arguments
from lmntk.errors import UsageError
from lmntk.experiment.build import build
from lmntk.experiment.experiment import Experiment
from lmntk.trainers.base import log_odds, regression_loss
from lmntk.trainers.linear_head import fit_linear_head
from tiny_models import TYPICAL_CAUSAL, save_tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:sklearn")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("linear head"))
    for architecture in TYPICAL_CAUSAL:
        save_tiny_checkpoint(architecture, place.folder / architecture)
    write_rows(place.folder / "SST-2" / "train.tsv", [("sentence", "label"), *sst2_rows(20)])
    texts = [text for text, _ in sst2_rows(18)]
    write_rows(place.folder / "trec" / "train.csv", [(str(i % 6), text) for i, text in enumerate(texts)])
    rows = [["x"] * 7 + [texts[i], texts[-i], f"{5 * i / 17:.2f}"] for i in range(18)]
    write_rows(place.folder / "STS-B" / "train.tsv", [["h"] * 10, *rows])
    return place


def built(place: Workplace, task: str, *flags: str) -> Experiment:
    argv = place.argv(
        "--task_name",
        task,
        "--data_dir",
        str(place.folder / task),
        "--trainer",
        "linearhead",
        *flags,
        "--kernel_dtype",
        "float64",
    )
    model_args, data_args, training_args = parse_arguments(argv)
    training_args.do_eval = training_args.do_predict = False
    return build(model_args, data_args, training_args)


def features_of(run: Experiment) -> np.ndarray:
    """What goes into the last layer, all examples in one batch: L-BFGS on separable classes makes percents of bits."""
    assert run.model is not None
    found: list[torch.Tensor] = []
    handle = run.model.last_layer.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    batch = run.collator(run.datasets["train"].features)
    with torch.no_grad():
        run.model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    handle.remove()
    return found[0].reshape(len(batch["labels"]), -1).numpy()


def last_layer(run: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the classes: weights and biases, zero where there are none."""
    assert run.model is not None
    layer, rows = run.model.last_layer, run.model._class_rows()
    if layer.bias is None:
        return layer.weight[rows].detach().double().numpy(), np.zeros(run.model.num_classes)
    return layer.weight[rows].detach().double().numpy(), layer.bias[rows].detach().double().numpy()


def model_flags(place: Workplace, architecture: str) -> list[str]:
    return [] if architecture == "roberta" else ["--model_name_or_path", str(place.folder / architecture)]


TYPES = {
    "prompt": ["--few_shot_type", "prompt"],
    "prompt-demo": ["--few_shot_type", "prompt-demo"],
    "finetune": ["--few_shot_type", "finetune"],
    "one token": ["--few_shot_type", "finetune", "--from_linearhead"],
}


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*(("roberta", kind) for kind in TYPES), ("gpt2", "prompt"), ("llama", "finetune"), ("opt", "one token")],
)
def test_of_two_classes_each_takes_half_of_the_weights_with_opposite_signs(
    place: Workplace, architecture: str, kind: str
) -> None:
    """Against scikit-learn as the published program calls it, to rounding; causal models' own heads have no bias."""
    run = built(place, "SST-2", *TYPES[kind], *model_flags(place, architecture))
    features = features_of(run)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    fit_linear_head(run, CPU)
    biased = architecture == "roberta" or kind == "one token"
    assert biased == (run.model.last_layer.bias is not None)
    regression = LogisticRegressionCV(max_iter=5000, random_state=0, cv=5, fit_intercept=biased)
    expected = regression.fit(features, np.arange(20) % 2)
    weights, biases = last_layer(run)
    assert weights.shape == (2, 16)
    np.testing.assert_allclose(weights, np.stack([-expected.coef_[0], expected.coef_[0]]) / 2, rtol=1e-9)
    np.testing.assert_allclose(biases, [-expected.intercept_[0] / 2, expected.intercept_[0] / 2], rtol=1e-9)
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    layer_parameters = {id(p) for p in run.model.last_layer.parameters()}
    assert changed == {name for name, p in run.model.named_parameters() if id(p) in layer_parameters}


def test_of_more_classes_each_has_its_row_of_a_multinomial_regression(
    place: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    """Three examples a class: three folds, which is said."""
    run = built(place, "trec")
    features = features_of(run)
    with caplog.at_level("WARNING", "lmntk"):
        fit_linear_head(run, CPU)
    assert caplog.messages == ["class 0 has 3 training examples: 3 folds instead of 5"]
    expected = LogisticRegressionCV(max_iter=5000, random_state=0, cv=3).fit(features, np.arange(18) % 6)
    weights, biases = last_layer(run)
    np.testing.assert_allclose(weights, expected.coef_, rtol=1e-9)
    np.testing.assert_allclose(biases, expected.intercept_, rtol=1e-9)


def test_the_other_rows_of_the_decoder_stay_as_they_were(place: Workplace) -> None:
    run = built(place, "SST-2")
    decoder = run.model.last_layer
    before = decoder.weight.detach().clone()
    fit_linear_head(run, CPU)
    changed = (decoder.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert sorted(changed) == sorted(run.model.label_word_ids)


@pytest.mark.parametrize("architecture", ["roberta", "gpt2"])
def test_scores_are_fitted_by_least_squares_with_a_head_and_as_log_odds_with_label_words(
    place: Workplace, architecture: str
) -> None:
    """18 scores, 16 features: not all of them can be met. GPT-2's own heads have no bias."""
    flags, biased = model_flags(place, architecture), architecture == "roberta"
    scores = np.array([round(5 * i / 17, 2) for i in range(18)])
    run = built(place, "STS-B", "--few_shot_type", "finetune", *flags)
    expected = LinearRegression(fit_intercept=biased).fit(features_of(run), scores)
    fit_linear_head(run, CPU)
    weights, biases = last_layer(run)
    np.testing.assert_allclose(weights, expected.coef_[None], rtol=1e-6)
    np.testing.assert_allclose(biases, [expected.intercept_], rtol=1e-6)

    run = built(place, "STS-B", *flags)
    features = features_of(run)
    expected = LinearRegression(fit_intercept=biased).fit(features, log_odds(scores))
    fit_linear_head(run, CPU)
    batch = run.collator(run.datasets["train"].features)
    labels = batch.pop("labels")
    with torch.no_grad():
        predicted = regression_loss(run.model(**batch), labels)[1].flatten().numpy()
    np.testing.assert_allclose(predicted, 5 / (1 + np.exp(-expected.predict(features))), atol=1e-6)
    assert np.corrcoef(predicted, scores)[0, 1] > 0.9


def test_a_last_layer_without_bias_is_fitted_without_one(place: Workplace) -> None:
    run = built(place, "SST-2", "--few_shot_type", "finetune", "--from_linearhead")
    features = features_of(run)
    run.model.classifier = nn.Linear(16, 2, bias=False).double()
    fit_linear_head(run, CPU)
    expected = LogisticRegressionCV(max_iter=5000, random_state=0, cv=5, fit_intercept=False).fit(
        features, np.arange(20) % 2
    )
    weights = run.model.last_layer.weight.detach().numpy()
    np.testing.assert_allclose(weights[1], expected.coef_[0] / 2, rtol=1e-9)


def test_one_example_of_a_class_is_too_few(place: Workplace, tmp_path: Path) -> None:
    write_rows(place.folder / "one" / "train.tsv", [("sentence", "label"), *sst2_rows(3)])
    run = built(place, "SST-2", "--data_dir", str(place.folder / "one"))
    with pytest.raises(UsageError, match="class 1 has 1 training example, .* raise K, or leave the linear head out"):
        fit_linear_head(run, CPU)


def test_dropout_is_off_while_features_are_taken(place: Workplace) -> None:
    run = built(place, "SST-2")
    run.model.train()
    fit_linear_head(run, CPU)
    weights = last_layer(run)[0]
    again = built(place, "SST-2")
    fit_linear_head(again, CPU)
    np.testing.assert_array_equal(weights, last_layer(again)[0])


def test_only_transformers_objections_become_usage_errors(monkeypatch: pytest.MonkeyPatch, place: Workplace) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(trainers, "fit_linear_head", fail)
    model_args, data_args, args = parse_arguments(place.argv("--from_linearhead"))
    with pytest.raises(ValueError, match="a bug"):
        trainers.make_trainer(build(model_args, data_args, args), model_args, args)
