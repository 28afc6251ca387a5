"""Average the logits of several models, each seed's best trial of each, and score them on the test set.

Runs with --save_logit, --model_id 0, 1, ... and a different --array_id each leave the logits that this reads. Numbers
are percentages; the standard deviation is the population's (divided by the number of seeds), as published.
"""

import argparse
from collections.abc import Sequence

from lmntk.config.tool_parser import log_parser, run_tool
from lmntk.runs.gather import matching_trials, mean_and_deviation, percent
from lmntk.runs.log import MetricKeys, read_log
from lmntk.storage.wording import quantity


def main(argv: Sequence[str] | None = None) -> int:
    """Print what each model reaches alone, and what they reach together; return the exit status."""
    parser = log_parser(__doc__)
    parser.add_argument("--n_models", type=int, required=True, metavar="N", help="models, with model_id 0 to N - 1")
    parser.add_argument(
        "--save_logit_dir", help="folder of the logits (where the run put them, else ensemble_predict_results)"
    )
    return run_tool(parser, _print_ensemble, argv)


def _print_ensemble(given: argparse.Namespace) -> None:
    from lmntk.runs.ensemble import evaluate_ensemble  # here, since scikit-learn takes a second that --help can spare

    entries, keys = read_log(given.log), MetricKeys(given.key, given.test_key, given.test_key2)
    found = matching_trials(entries, given.condition, keys)
    members, scores = evaluate_ensemble(entries, found, given.n_models, keys, given.save_logit_dir)
    for model in range(given.n_models):
        metrics = [(trial.dev, trial.test, trial.second) for trial in (chosen[model] for chosen in members.values())]
        dev, test, *second = (mean_and_deviation(values) for values in zip(*metrics, strict=True) if None not in values)
        print("; ".join([f"model {model}: dev {dev}", f"test {test}", *(f"second metric {text}" for text in second)]))
    for seed, values in scores.items():
        print(f"seed {seed}: test {', second metric '.join(map(percent, values))}")
    size = f"{quantity(len(scores), 'seed')}, {quantity(given.n_models, 'model')}"
    for name, column in zip(("", "second metric "), zip(*scores.values(), strict=True), strict=False):
        print(f"ensemble: {name}{mean_and_deviation(column)}, {size}")
