"""The page on uncertainty: its run and its report are of one folder, and its flags exist."""

from pathlib import Path

from doc_commands import commands, page_text
from lmntk.commands import report
from lmntk.config.arguments import parse_arguments

PAGE = page_text("uncertainty")


def test_the_report_is_of_the_run_that_says_how_sure_it_is() -> None:
    (call,) = [words for words in commands(PAGE) if "run_fewshot.sh" in words]
    variables = dict(word.split("=", 1) for word in call[: call.index("bash")])
    required = ["--model_name_or_path", "m", "--task_name", "mr", "--output_dir", "o", "--trainer", "kernel"]
    _, _, args = parse_arguments([*required, *call[call.index("run_fewshot.sh") + 1 :]])
    assert args.kernel_variance and args.kernel_regularization == 0.01
    (words,) = [words[2:] for words in commands(PAGE) if words[:2] == ["python", "tools/report.py"]]
    name = f"mr-{variables['MODEL'].replace('/', '_')}-prompt-kernel-{variables['TAG']}"
    folder = Path("result") / name / f"{variables['K']}-{variables['SEED']}"
    assert report.make_parser().read(words).folders == [folder]
