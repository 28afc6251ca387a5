r"""Rank templates and label words by what their kernels say, without training.

    lmntk prompts SST-2 --model roberta-base --templates '*cls**sent_0*_All_in_all*mask*.*sep+*' \
        --mappings "{'0': 'bad', '1': 'good'}" --output result/prompts
    lmntk prompts tweets=data/demo/tweets/k-shot-1k-test/mr --model roberta-base --prompt_path auto_prompts.txt --top 20

The case is a TASK, whose splits are in data/k-shot-1k-test/TASK, or NAME=FOLDER, where FOLDER/K-SEED hold the splits of
the task of the folder's own name. Every template goes with every mapping, the task's own among them; the lines of a
--prompt_path (LM-BFF's automatic prompts: template, tab, mapping) are pairs as they are. Each prompt takes one kernel
run a seed, on warm workers. The table has for each prompt:

  leave-one-out  the score, and the mean squared error, of predicting each train example from the others, exactly
  dev            the score of the kernel on dev
  zero-shot      the score of the model as it is
  chi            the mean of 1 - p_y on train: how little the model answers by itself
  alignment      of the train kernel with the labels (Cortes et al. 2012)

All is written below --output: the runs, and the table as prompts.txt, .md, .tex, .csv and .json. Runs that are done are
not done again. --with_test predicts test too, and says how well each number orders the prompts as test does. Flags
after -- go to every run: -- --binary_classification --kernel_regularization 0.001.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from lmntk.commands.results import add_figure_flag, check_figure, write_figure
from lmntk.config.runs_parser import OWN_SETTINGS, check_further
from lmntk.config.tool_parser import Parser, run_tool
from lmntk.errors import Bounds, SettingError, UsageError, check_numbers
from lmntk.interrupts import Stopped
from lmntk.runs.behaviour_plan import KERNELS, Case
from lmntk.runs.processes import run_all
from lmntk.runs.progress import Bar
from lmntk.runs.prompt_plan import PromptPlan, PromptRun, PromptSources
from lmntk.runs.run_hours import estimate, format_estimate, unmeasured
from lmntk.storage.wording import quantity

RESUME = "what is done is kept; the same command goes on from there"
ENDINGS = {"text": "txt", "markdown": "md", "latex": "tex", "csv": "csv", "json": "json"}
RANKINGS = ("loo", "loo_loss", "dev", "zero_shot", "chi", "alignment")
PROMPT_SETTINGS = frozenset({
    "template", "mapping", "template_path", "template_id", "top_n_template", "mapping_path", "mapping_id",
    "prompt_path", "prompt_id", "do_eval", "few_shot_type",
})  # fmt: skip
"""The settings of run.py that this command sets besides those of `lmntk behaviour`."""
BOUNDS = (Bounds("k", 1), Bounds("jobs", 1), Bounds("top", 1))


class PromptsParser(Parser):
    """A parser that leaves the words after ``--`` to run.py."""

    def __init__(self) -> None:
        super().__init__(
            usage="%(prog)s CASE --model MODEL [flags] [-- flags of run.py]", description=__doc__, allow_abbrev=False
        )
        add = self.add_argument
        add("case", metavar="CASE", help="TASK, or NAME=FOLDER")
        add("--model", required=True, help="folder of the model, or its name on the hub")
        add("--templates", nargs="+", default=[], metavar="TEMPLATE", help="templates")
        add("--mappings", nargs="+", default=[], metavar="DICT", help="mappings from label to label word")
        add("--template_path", metavar="FILE", help="a file with a template on each line")
        add("--mapping_path", metavar="FILE", help="a file with a mapping on each line")
        add("--prompt_path", metavar="FILE", help="a file with a template, a tab and its mapping on each line")
        add("--top", type=int, metavar="N", help="take the first N lines of each file (all)")
        add("--without_own", action="store_true", help="leave the task's own template and label words out")
        add("--k", type=int, default=16, help="training examples of each class (16)")
        add("--seeds", type=int, nargs="+", default=[42], help="seeds of the splits; numbers are means over them (42)")
        add("--kernel_formula", choices=[*KERNELS], default="sgd", help="formula of the kernels (sgd)")
        add("--rank_by", choices=RANKINGS, default="loo", help="what the prompts are ordered by (loo)")
        add("--with_test", action="store_true", help="predict test too")
        add("--output", type=Path, default=Path("result/prompts"), help="all results go here (result/prompts)")
        add("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
        add("--dry_run", action="store_true", help="list the prompts, and say how long they take")
        add("--format", choices=[*ENDINGS], default="text", help="how to print the table (text)")
        add_figure_flag(self, "draw leave-one-out and dev against test, or against dev without --with_test")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line; `further` are the words for run.py."""
        words = sys.argv[1:] if argv is None else [*argv]
        end = words.index("--") if "--" in words else len(words)
        given = super().read(words[:end])
        given.further = check_further(words[end + 1 :], OWN_SETTINGS | PROMPT_SETTINGS)
        if any(word.startswith("--kernel_solver") for word in given.further):
            sentence = "`kernel_solver` after --: leave-one-out is in closed form for lstsq alone, which is the default"
            raise SettingError(sentence, setting="kernel_solver")
        check_numbers(BOUNDS, vars(given))
        if len({*given.seeds}) < len(given.seeds):
            raise SettingError("`seeds` has one twice: give each once", setting="seeds", value=given.seeds)
        return given


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are missing and the table; return the exit status, 1 if a run failed."""
    return run_tool(PromptsParser(), _rank, argv, RESUME)


def _rank(given: argparse.Namespace) -> int:
    check_figure(given)
    plan = _make_plan(given)
    plan.check()
    runs = [run for of_prompt in plan.runs.values() for run in of_prompt]
    todo = [run for run in runs if not run.is_done()]
    say = _teller(given)
    if given.dry_run:
        return _dry_run(plan, runs, given.jobs)
    prompts = quantity(len(plan.prompts), "prompt")
    say(f"{prompts}, {quantity(len(runs), 'run')} below {plan.output}: {len(runs) - len(todo)} done already, "
        f"{len(todo)} to do")  # fmt: skip
    if todo:
        say(format_estimate(estimate([run for run in runs if run not in todo], todo), given.jobs))
    problems = {str(run): problem for run, problem in _run(todo, runs, given.jobs)}
    return _finish(given, plan, problems, say)


def _make_plan(given: argparse.Namespace) -> PromptPlan:
    case = Case.parse(given.case)
    sources = PromptSources(
        given.templates, given.mappings, given.template_path, given.mapping_path, given.prompt_path, given.top,
        not given.without_own,
    )  # fmt: skip
    folder = Path(given.model)
    model = str(folder.resolve()) if folder.is_dir() else given.model
    prompts = sources.prompts(case.task)
    return PromptPlan(
        given.output.resolve(), model, case, given.k, given.seeds, prompts, given.kernel_formula, given.with_test,
        given.further,
    )  # fmt: skip


def _run(todo: Sequence[PromptRun], runs: Sequence[PromptRun], jobs: int) -> list[tuple[PromptRun, str]]:
    """Do some of the runs, and return those that failed and why; a signal raises."""
    # Runs differ in length: the mean over all says more than the last few.
    with tqdm(total=len(todo), unit="run", smoothing=0, disable=not todo) as bar:
        outcome = run_all(todo, jobs, Bar(bar))
    if outcome.signals:
        stop = Stopped(signal.Signals(outcome.signals[0]))
        stop.kept_summary = f"{sum(run.is_done() for run in runs)} of {len(runs)} runs are done"
        raise stop
    return outcome.failures


def _dry_run(plan: PromptPlan, runs: Sequence[PromptRun], jobs: int) -> int:
    """List the prompts and estimate their time, after one run if none is there."""
    done = [run for run in runs if run.is_done()]
    todo = [run for run in runs if run not in done]
    failures = []
    if trials := unmeasured(done, todo):
        print("first one run, which is kept", flush=True)
        failures = _run(trials, runs, jobs)
        done = [run for run in runs if run.is_done()]
        todo = [run for run in runs if run not in done]
    for prompt in plan.prompts:
        print(f"{prompt.template}  {prompt.short_words}")
    print(f"{quantity(len(runs), 'run')}: {len(done)} done, {len(todo)} to do")
    print(format_estimate(estimate(done, todo), jobs))
    for run, problem in failures:
        print(f"failed: {run}\n    {problem}")
    return 1 if failures else 0


def _teller(given: argparse.Namespace) -> Callable[[str], None]:
    """What prints messages: on stderr beside a table for programs, which stdout carries alone."""
    stream = sys.stdout if given.format == "text" else sys.stderr
    return lambda text: print(text, file=stream, flush=True)


def _finish(given: argparse.Namespace, plan: PromptPlan, problems: dict[str, str], say: Callable[[str], None]) -> int:
    """Write the table, print it, and say what is missing; return the exit status."""
    from lmntk.analysis.least_squares import (
        find_kernel_run,
    )  # here: --help need not wait for torch
    from lmntk.analysis.prompt_ranking import format_prompts, prompt_numbers, ranked
    from lmntk.storage.atomic import prepare_output_dir, write_text

    found, metric = [], "acc"
    for prompt, runs in plan.runs.items():
        if not all(run.is_done() for run in runs):
            continue
        try:
            saved = [find_kernel_run(run.folder) for run in runs]
            found.append(prompt_numbers(prompt.template, prompt.short_words, saved))
            metric = saved[0].task.main_metrics[0] if saved[0].task else metric
        except UsageError as error:
            problems[f"{prompt.template} {prompt.short_words}"] = str(error)
    order = ranked(found, given.rank_by)
    if order:
        output = prepare_output_dir(plan.output / plan.case.name, "output")
        tables = {form: format_prompts(order, given.rank_by, form, metric, len(plan.seeds)) for form in ENDINGS}
        for form, ending in ENDINGS.items():
            write_text(output / f"prompts.{ending}", tables[form])
        say("")
        print(tables[given.format], end="", flush=True)
        say("")

        def draw() -> bytes:
            from lmntk.report.prompts import prompts_figure

            return prompts_figure(order, metric)

        write_figure(given.figure, draw, sys.stdout if given.format == "text" else sys.stderr)
    if problems:
        say("\n".join(["missing:", *(f"  {name}\n    {problem}" for name, problem in problems.items())]))
    if order:
        say(f"the table: {output / 'prompts'}.{', .'.join(ENDINGS.values())}")
    return 1 if problems or not order else 0
