"""The pages on what follows from one kernel without a model: the tools accept their commands as they stand."""

from pathlib import Path

from doc_commands import commands, page_text
from lmntk.commands import forecast, prompts, select
from lmntk.config.arguments import parse_arguments
from lmntk.runs.prompt_plan import PromptSources

FORECAST, SELECTION = page_text("forecast"), page_text("prompts-and-selection")


def test_the_forecast_reads_the_kernel_and_the_training_where_the_runs_leave_them() -> None:
    folders = {}
    for call in (words for words in commands(FORECAST) if "run_fewshot.sh" in words):
        variables = dict(word.split("=", 1) for word in call[: call.index("bash")])
        flags = call[call.index("run_fewshot.sh") + 1 :]
        required = ["--model_name_or_path", "m", "--task_name", "mr", "--output_dir", "o"]
        parse_arguments([*required, "--trainer", variables["TRAINER"], *flags])
        model = variables["MODEL"].replace("/", "_")
        name = f"mr-{model}-prompt-{variables['TRAINER']}-{variables['TAG']}"
        folders[variables["TRAINER"]] = Path("result") / name / f"{variables['K']}-{variables['SEED']}"
    (words,) = [words[2:] for words in commands(FORECAST) if words[:2] == ["python", "tools/kernel_forecast.py"]]
    given = forecast.make_parser().read(words)
    assert (given.folder, given.training) == (folders["kernel"], folders["standard"])


def test_the_examples_are_chosen_from_the_run_before_and_read_by_the_run_after() -> None:
    calls = [words for words in commands(SELECTION) if "run_fewshot.sh" in words]
    variables = [dict(word.split("=", 1) for word in call[: call.index("bash")]) for call in calls]
    assert [each["TAG"] for each in variables] == ["pool", "chosen"]
    (words,) = [words[2:] for words in commands(SELECTION) if words[:2] == ["python", "tools/select_examples.py"]]
    given = select.make_parser().read(words)
    name = f"mr-{variables[0]['MODEL'].replace('/', '_')}-prompt-kernel-{variables[0]['TAG']}"
    assert given.folder == Path("result") / name / f"{variables[0]['K']}-{variables[0]['SEED']}"
    assert str(given.output_dir) in calls[1] and f"{given.k}" == variables[1]["K"]


def test_the_prompts_that_are_ranked_fit_the_task() -> None:
    (words,) = [words[2:] for words in commands(SELECTION) if words[:2] == ["python", "tools/rank_prompts.py"]]
    given = prompts.PromptsParser().read(words)
    sources = PromptSources(given.templates, given.mappings)
    assert len(sources.prompts("mr")) == 9 and given.with_test and given.further == ["--binary_classification"]
