"""The page on solvers: the runs behind its table are ones that run.py takes, and what it says of kernels is so."""

import contextlib
import re
import runpy

import pytest
import torch

from command_line import Workplace, read_kernel, read_results, sst2_rows, write_rows
from doc_commands import blocks, flags_of_run, page_text, python_calls
from lmntk.config.arguments import parse_arguments
from lmntk.kernels import FORMULAS
from lmntk.solvers import SOLVERS
from tiny_models import tiny_config

PAGE, COMPARED = page_text("solvers"), page_text("solvers-compared")
RAN = ("sst-2", "trec")
"""Of the tasks of the table these are run, for seed 13: one of two classes, one of six."""

SIX_WORDS = str(dict(zip("012345", ["terrible", "great", "bad", "good", "film", "city"], strict=True)))


@pytest.fixture(scope="module")
def solver_calls(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The flags of all runs behind the table of accuracies."""
    (script,) = blocks(COMPARED, "bash")
    return [flags_of_run(call) for call in python_calls(script, tmp_path_factory.mktemp("stand-in"))]


@pytest.fixture(scope="module")
def solved(solver_calls: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A place where some of these runs were done, on tiny data."""
    place = Workplace(tmp_path_factory.mktemp("solvers"))
    for split, number in (("train", 12), ("dev", 6), ("test", 6)):
        folder = place.folder / "data" / "k-shot-1k-test"
        rows = sst2_rows(number, split)
        write_rows(folder / "SST-2" / "16-13" / f"{split}.tsv", [("sentence", "label"), *rows])
        # Two examples of each of the six classes, since logistic regression wants two.
        write_rows(folder / "trec" / "16-13" / f"{split}.csv", [(str(i % 6), text) for i, (text, _) in enumerate(rows)])
    for flags in solver_calls:
        _, data, training = parse_arguments(flags)
        if data.task_name in RAN and training.seed == 13:
            argv = [*flags, "--model_name_or_path", str(place.model), "--disable_tqdm", "True"]
            argv += ["--mapping", SIX_WORDS] if data.task_name == "trec" else []
            outcome = place.call(argv)
            assert (outcome.status, outcome.err) == (0, ""), f"{flags}\n{outcome.err}"
    return place


def test_all_runs_behind_the_table_of_accuracies_are_ones_that_run_py_takes(solver_calls: list[list[str]]) -> None:
    assert len(solver_calls) == 2 * (3 * 6 + 5)
    seen = set()
    for flags in solver_calls:
        model, data, training = parse_arguments(flags)
        assert model.model_name_or_path == "models/bert-tiny"
        seen.add((data.task_name, training.seed, data.tag))
    assert len(seen) == len(solver_calls)


def test_the_table_of_accuracies_comes_from_the_log(solved: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(COMPARED, "python")
    script = solved.folder / "table.py"
    script.write_text(block, encoding="utf-8")
    with contextlib.chdir(solved.folder):
        runpy.run_path(str(script))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows] == [["sst-2", "13"], ["trec", "13"]]
    results = solved.folder / "result" / "SST-2-models_bert-tiny-prompt-kernel-svc" / "16-13" / "test_results_sst-2.txt"
    assert rows[0][6] == f"{read_results(results)['eval_acc']:.1%}"
    assert rows[1][-1] == "–" and "–" not in rows[0]
    # The columns of the page are those that the script prints.
    assert "| task | seed | zero-shot | lstsq | logistic | svr | svc | asym |" in COMPARED


def test_every_formula_and_solver_is_on_the_page() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) >= {*FORMULAS, *SOLVERS}


def test_the_decoder_counts_apart_and_flags_leave_out_what_the_page_says(solved: Workplace) -> None:
    """The tiny RoBERTa, whose checkpoint ties its decoder: 532 words of 16 features."""
    config = tiny_config("roberta", vocab_size=532)
    words, width, positions = 532, config.hidden_size, config.max_position_embeddings
    embeddings = (words + positions + 1) * width + 2 * width
    head = words * width + words + width * width + width + 2 * width

    def grad_dim(*flags: str) -> float:
        folder = solved.run("--data_dir", str(solved.data), *flags, output="count" + "".join(flags))
        return read_results(folder / "test_results_sst-2.txt")["grad_dim"]

    everything = grad_dim()
    assert everything - grad_dim("--exclude_embeddings") == embeddings
    assert everything - grad_dim("--exclude_head") == head
    assert grad_dim("--apply_lora", "--lora_r", "2") == head + 2 * 2 * 2 * 2 * width


def test_signs_are_taken_of_the_difference_and_not_before(solved: Workplace) -> None:
    both = read_kernel(solved.run("--kernel_formula", "signgd", output="both"), "test")
    one = read_kernel(solved.run("--kernel_formula", "signgd", "--binary_classification", output="one"), "test")
    assert torch.equal(one, one.round())
    taken_before = both[:, 0, :, 0] - both[:, 0, :, 1] - both[:, 1, :, 0] + both[:, 1, :, 1]
    assert not torch.allclose(taken_before, one[:, 0, :, 0], rtol=0.1)
