"""docs/reference/architectures.md: rows of its table made again, and the version of transformers that they are of."""

import re

import pytest
import torch
import transformers

from architectures.tiny import architectures, tiny_config
from command_line import ROOT, Workplace, read_kernel, read_results
from lmntk.models.families import AUTO_CLASSES
from tiny_models import add_noise
from tiny_tokenizers import make_bert_tokenizer
from try_architectures import Row, rows_of, try_one, write_page

PAGE = ROOT / "docs" / "reference" / "architectures.md"
# One whose every layer has factors, one that has its own ones, one that sees its padding, and three that are refused.
MADE_AGAIN = [
    ("bert", "masked"),
    ("squeezebert", "masked"),
    ("fnet", "masked"),
    ("gpt2", "causal"),
    ("mobilebert", "masked"),
    ("bart", "masked"),
    ("longformer", "masked"),
]


def test_the_page_is_of_the_transformers_that_is_installed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"transformers {transformers.__version__} " in text
    assert f"torch {torch.__version__.partition('+')[0]}:" in text


def test_every_row_of_the_page_is_right_or_refused_or_says_why_not() -> None:
    rows = rows_of(PAGE)
    assert len(rows) > 50
    known = set(architectures())
    for row in rows:
        assert re.match(r"right$|refused: .|not tried: .", row.found), row
        assert (row.architecture.partition(",")[0], row.family) in known
        assert bool(row.speed) == (row.found == "right")


@pytest.mark.parametrize(("architecture", "family"), MADE_AGAIN)
def test_a_row_of_the_page_comes_out_again(architecture: str, family: str) -> None:
    stored = {(row.architecture, row.family): row for row in rows_of(PAGE)}
    again, row = try_one(architecture, family), stored[architecture, family]
    assert (again.found.partition(":")[0], again.speed) == (row.found.partition(":")[0], row.speed)


def test_rows_are_written_and_read_in_the_order_of_family_and_name(tmp_path) -> None:
    rows = [Row("gpt2", "causal", "right", "in full"), Row("bert", "masked", "refused: for a reason", "", "a note")]
    write_page(rows, tmp_path / "page.md")
    assert rows_of(tmp_path / "page.md") == rows[::-1]
    assert "1 are right, 1 are refused, 0 were not tried" in (tmp_path / "page.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    """A place to work in with a tiny FNet."""
    tokenizer = make_bert_tokenizer(place.folder / "fnet")
    torch.manual_seed(0)
    lm = AUTO_CLASSES["masked"].from_config(tiny_config("fnet", "masked", vocab_size=len(tokenizer)))
    add_noise(lm)
    lm.save_pretrained(place.folder / "fnet")
    return place


def test_kernels_and_logits_of_fnet_do_not_depend_on_batches(place: Workplace) -> None:
    fnet = ["--model_name_or_path", str(place.folder / "fnet"), "--kernel_dtype", "float64"]
    alone = place.run(*fnet, "--kernel_engine", "jacobian", output="jacobian")
    together = place.run(*fnet, "--kernel_engine", "factored", output="factored")
    for split in ("train", "dev", "test"):
        kernel = read_kernel(alone, split)
        assert float((read_kernel(together, split) - kernel).norm() / kernel.norm()) <= 1e-12


def test_zero_shot_with_fnet_does_not_depend_on_the_batch_size_and_says_why_it_is_slow(place: Workplace) -> None:
    losses = []
    for size in ("1", "8"):
        argv = place.argv("--model_name_or_path", str(place.folder / "fnet"), output=f"zero-{size}")
        flags = ["--trainer", "standard", "--no_train", "--per_device_eval_batch_size", size, "--num_sample", "1"]
        outcome = place.call([*argv, *flags])
        assert (outcome.status, outcome.err) == (0, "")
        assert "is of type fnet, whose logits change with padding: prompts share a batch only where" in outcome.messages
        losses.append(read_results(place.folder / f"zero-{size}" / "test_results_sst-2.txt")["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
