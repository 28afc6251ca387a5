"""Metrics against numbers worked out by hand, and on predictions without any variety."""

import math

import pytest

from lmntk.data.metrics import METRICS, compute_metrics
from lmntk.data.tasks import TASKS

pytestmark = pytest.mark.filterwarnings("error")

# True positives 1, false positives 1, false negatives 2, true negatives 2.
PREDICTIONS = [1, 1, 0, 0, 0, 0]
LABELS = [1, 0, 1, 1, 0, 0]


def test_every_task_has_a_row_in_the_table_of_metrics() -> None:
    assert {task.metric for task in TASKS.values()} == set(METRICS)


def test_accuracy_is_a_fraction_of_the_examples_of_all_classes() -> None:
    assert compute_metrics(TASKS["trec"], [5, 0, 3, 3], [5, 1, 3, 3]) == {"acc": 0.75}


@pytest.mark.parametrize("task", ["MRPC", "QQP"])
def test_f1_is_that_of_class_one_and_is_averaged_with_accuracy(task: str) -> None:
    metrics = compute_metrics(TASKS[task], PREDICTIONS, LABELS)
    assert list(metrics) == ["acc", "f1", "acc_and_f1"]
    assert metrics == pytest.approx({"acc": 0.5, "f1": 0.4, "acc_and_f1": 0.45}, rel=1e-15)


def test_cola_has_matthews_correlation() -> None:
    # (1·2 - 1·2) / √… = 0 for the lists above; one more true positive gives (2·2 - 1·2) / √(3·4·3·4).
    assert compute_metrics(TASKS["CoLA"], PREDICTIONS, LABELS) == {"mcc": 0.0}
    metrics = compute_metrics(TASKS["CoLA"], [*PREDICTIONS, 1], [*LABELS, 1])
    assert metrics == pytest.approx({"mcc": 2 / 12}, rel=1e-14)


def test_sts_b_has_both_correlations_and_their_mean() -> None:
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-4, -2, -1, 7): 17 / √(5·70); the ranks agree.
    metrics = compute_metrics(TASKS["STS-B"], [1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 3.0, 11.0])
    assert list(metrics) == ["pearson", "spearmanr", "corr"]
    pearson = 17 / math.sqrt(5 * 70)
    assert metrics == pytest.approx({"pearson": pearson, "spearmanr": 1.0, "corr": (pearson + 1) / 2}, rel=1e-14)


@pytest.mark.parametrize(("task", "name"), [("MNLI", "mnli/acc"), ("MNLI-mm", "mnli-mm/acc")])
def test_mnli_names_carry_the_test_set(task: str, name: str) -> None:
    tasks = {key.lower(): row for key, row in TASKS.items()}
    assert compute_metrics(tasks[task.lower()], [0, 1, 2, 2], [0, 1, 2, 0]) == {name: 0.75}


def test_metrics_are_plain_floats() -> None:
    for task in TASKS.values():
        for value in compute_metrics(task, PREDICTIONS, LABELS).values():
            assert type(value) is float


@pytest.mark.parametrize(("predicted", "accuracy"), [(0, 0.5), (1, 0.5)])
def test_predictions_of_a_single_class_are_scored(predicted: int, accuracy: float) -> None:
    predictions = [predicted] * len(LABELS)
    assert compute_metrics(TASKS["SST-2"], predictions, LABELS) == {"acc": accuracy}
    assert compute_metrics(TASKS["CoLA"], predictions, LABELS) == {"mcc": 0.0}
    f1 = 2 / 3 if predicted else 0.0
    assert compute_metrics(TASKS["MRPC"], predictions, LABELS)["f1"] == pytest.approx(f1, rel=1e-15)


def test_labels_and_predictions_of_a_single_class_are_scored() -> None:
    assert compute_metrics(TASKS["CoLA"], [0, 0], [0, 0]) == {"mcc": 0.0}
    assert compute_metrics(TASKS["MRPC"], [0, 0], [0, 0]) == {"acc": 1.0, "f1": 0.0, "acc_and_f1": 0.5}


@pytest.mark.parametrize(
    ("predictions", "labels"), [([2.0, 2.0], [1.0, 3.0]), ([1.0, 3.0], [2.0, 2.0]), ([1.0], [1.0])]
)
def test_a_correlation_with_a_constant_is_no_number(predictions: list[float], labels: list[float]) -> None:
    metrics = compute_metrics(TASKS["STS-B"], predictions, labels)
    assert list(metrics) == ["pearson", "spearmanr", "corr"]
    assert all(math.isnan(value) for value in metrics.values())


@pytest.mark.parametrize(("predictions", "labels"), [([0, 1], [0]), ([0], [0, 0]), ([], []), ([[0, 1]], [[0, 1]])])
def test_vectors_of_different_lengths_or_none_are_refused(predictions: list, labels: list) -> None:
    with pytest.raises(ValueError, match="must be vectors of one length"):
        compute_metrics(TASKS["SST-2"], predictions, labels)
