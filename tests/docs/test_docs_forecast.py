"""The pages on what follows from one kernel without a model: the tools accept their commands as they stand."""

from pathlib import Path

from doc_commands import commands, page_text
from lmntk.commands import forecast
from lmntk.config.arguments import parse_arguments

FORECAST = page_text("forecast")


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
