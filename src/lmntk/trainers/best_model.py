"""Which model of a training is kept: the best on dev, by the task's metric, as LM-BFF does."""

from typing import Any

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from lmntk.config.arguments import TrainingArguments
from lmntk.data.metrics import compute_metrics
from lmntk.data.tasks import Task
from lmntk.errors import UnknownNameError


def check_metric(args: TrainingArguments, task: Task) -> None:
    """Check that evaluation gives the metric by which the stock trainer is to choose the best model."""
    names = [*compute_metrics(task, [0, 1], [0, 1]), "loss"]
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in names:
        raise UnknownNameError(
            f"`metric_for_best_model={metric}` is not a metric of {task.name}: {', '.join(names)}",
            name=metric,
            kind="metric",
            options=names,
        )


def choosing_the_best(args: TrainingArguments, task: Task) -> dict[str, Any]:
    """Return the changed arguments with which the stock trainer evaluates while it trains and keeps the best model."""
    strategy = "epoch" if args.eval_steps is None else "steps"
    changes: dict[str, Any] = {"eval_strategy": IntervalStrategy(strategy)}
    if args.eval_steps is not None:
        changes["save_steps"] = args.eval_steps  # the best model can only be one that is saved
    if args.save_at_last:
        return changes
    return changes | {
        "save_strategy": SaveStrategy(strategy),  # as often as it is evaluated
        "load_best_model_at_end": True,
        "metric_for_best_model": task.metric_prefix + task.main_metrics[0],
        "greater_is_better": True,  # every task's main metric
        "save_total_limit": 1 if args.save_total_limit is None else args.save_total_limit,  # the best
    }
