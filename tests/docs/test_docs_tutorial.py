"""The tutorial first-kernel, followed to the letter on a tiny model: in Python and on the command line."""

import contextlib
import re
import runpy

import pytest

import generate_k_shot_data
from command_line import Workplace, read_kernel
from doc_commands import argv_of, blocks, commands, make_stand_in, page_text
from lmntk.commands import report

PAGE = page_text("first-kernel")
(REVIEWS,) = re.findall(r"^```text reviews.csv\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    (place.folder / "reviews.csv").write_text(REVIEWS, encoding="utf-8")
    return place


def test_the_python_blocks_predict_and_choose_settings(place: Workplace) -> None:
    script = place.folder / "first.py"
    code = "".join(blocks(PAGE, "python")).replace('"roberta-base"', repr(str(place.model)))
    script.write_text(code, encoding="utf-8")
    with contextlib.chdir(place.folder):
        names = runpy.run_path(str(script))
    assert names["kernel"].shape == (8, 2, 4, 2)
    assert set(names["classifier"].predict(names["test"]["review"])) <= {"good", "bad"}
    assert set(names["search"].best_params_) == {"formula", "kernel_regularization"}


def test_the_commands_draw_splits_predict_and_draw_pictures(place: Workplace) -> None:
    stand_in = make_stand_in(place.folder)
    for words in commands(PAGE):
        if "run_fewshot.sh" in words:
            argv = [*argv_of(words, stand_in), "--model_name_or_path", str(place.model), "--use_cpu"]
            outcome = place.call([*argv, "--disable_tqdm", "True"])
            assert (outcome.status, outcome.err) == (0, "")
        else:
            tool = {"tools/generate_k_shot_data.py": generate_k_shot_data, "tools/report.py": report}[words[1]]
            with contextlib.chdir(place.folder):
                tool.main(words[2:])
    folder = place.folder / "result/reviews-roberta-base-prompt-kernel-first/2-42"
    assert read_kernel(folder, "test", "reviews").shape == (4, 2, 4, 2)
    assert (folder / "report/report.html").is_file()
