"""The learning rate that is best on dev."""

import math

import pytest

from lmntk.errors import DataError
from lmntk.runs.learning_rate import DEFAULT_RATES, choose_rate, dev_score


def test_the_rate_with_the_best_score_is_chosen() -> None:
    chosen = choose_rate({"1e-3": 0.5, "1e-2": 0.75, "1e-1": 0.625})
    assert (chosen.rate, chosen.score, chosen.ties) == ("1e-2", 0.75, ())
    assert chosen.scores == {"1e-3": 0.5, "1e-2": 0.75, "1e-1": 0.625}
    assert str(chosen) == "learning rate 1e-2, the best of 1e-3, 1e-2, 1e-1 on dev (0.75)"


def test_among_equals_the_smallest_is_chosen_whatever_their_order_and_that_is_said() -> None:
    chosen = choose_rate({"0.1": 0.75, "1e-3": 0.75, "1e-2": 0.75, "1": 0.5})
    assert (chosen.rate, chosen.ties) == ("1e-3", ("1e-2", "0.1"))
    assert str(chosen).endswith("(0.75); 1e-2, 0.1 have the same score, and the smallest counts")


def test_a_training_that_diverged_is_worse_than_any_other() -> None:
    assert choose_rate({"1": math.nan, "1e-3": -0.25}).rate == "1e-3"


@pytest.mark.parametrize("scores", [{}, {"1": math.nan, "10": math.nan}])
def test_without_any_score_nothing_is_chosen(scores: dict[str, float]) -> None:
    with pytest.raises(DataError) as caught:
        choose_rate(scores)
    assert caught.value.data["scores"] == scores


def test_one_rate_is_no_choice() -> None:
    assert str(choose_rate({"2e-5": 0.5})) == "learning rate 2e-5, the only one"


@pytest.mark.parametrize(
    ("entry", "score"),
    [
        ({"task_name": "SST-2", "sst-2_dev_eval_acc": 0.75, "sst-2_test_eval_acc": 0.25}, 0.75),
        ({"task_name": "mrpc", "mrpc_dev_eval_acc": 0.75, "mrpc_dev_eval_f1": 0.5}, 0.5),
        ({"task_name": "mnli", "mnli_dev_eval_mnli/acc": 1}, 1.0),
        ({"task_name": "my-texts", "my-texts_dev_eval_acc": 0.25}, 0.25),
    ],
)
def test_the_score_is_the_main_metric_on_dev(entry: dict[str, object], score: float) -> None:
    assert dev_score(entry) == score


@pytest.mark.parametrize("value", [None, "high", True, math.inf])
def test_a_score_that_is_not_a_number_counts_as_diverged(value: object) -> None:
    assert math.isnan(dev_score({"task_name": "SST-2", "sst-2_dev_eval_acc": value}))
    assert math.isnan(dev_score({"task_name": "SST-2"}))


def test_every_default_grid_rises() -> None:
    for rates in DEFAULT_RATES.values():
        assert sorted(rates, key=float) == [*rates]
