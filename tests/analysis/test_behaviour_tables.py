"""Tables of whether the kernel describes fine-tuning: their widths, thresholds, digits and escapes."""

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest

from lmntk.analysis.behaviour import BehaviourRow, SeedBehaviour, Thresholds, behaviour_row
from lmntk.analysis.behaviour_tables import FORMS, format_rows
from lmntk.analysis.kernel_distances import KernelDistances
from lmntk.analysis.table_blocks import latex_escaped

STRICT = Thresholds(ratio=0.95, recovery=0.7, distance=1.5, standard_errors=3.0)
NAMES = ("film-reviews, sgd", "odd & even_100%", "undefined")


def seeds(name: str) -> list[SeedBehaviour]:
    rng = np.random.default_rng(len(name))
    found = []
    for seed in (13, 42, 87):
        moved = KernelDistances(*rng.uniform(size=2), 7, 4096, *rng.uniform(size=2))
        chosen = SeedBehaviour(
            task="sst-2", metric="acc", split="test", examples=1000, seed=seed, formula="sgd", optimizer="sgd",
            last_step=50, pretrained=0.5 + rng.uniform() / 10, kernel=1 / 3, kernel_with_f0=0.85, linearised=0.8,
            finetuned=0.9, constant=0.5, errors={"kernel": 0.01, "finetuned": 0.01, "gain": 0.02},
            logits_distance=rng.uniform(), equal_predictions=0.95, agreement=0.9, chi=0.4, distances=moved,
        )  # fmt: skip
        found.append(chosen)
    if name == "undefined":
        return [dataclasses.replace(found[0], pretrained=0.9, kernel_with_f0=None, distances=None)]
    return found


@pytest.fixture(scope="module")
def rows() -> list[BehaviourRow]:
    return [behaviour_row(name, seeds(name), STRICT) for name in NAMES]


def test_the_text_fits_into_160_columns_and_shows_thresholds_beside_the_numbers(rows: list[BehaviourRow]) -> None:
    text = format_rows(rows, "text", STRICT)
    assert max(map(len, text.splitlines())) <= 160
    for header in ("K/FT (≥ 0.95)", "recovery (≥ 0.7)", "relative distance (< 1.5)", "3 standard errors", "K + f₀"):
        assert header in text
    first, second, third, _ = text.split("\n\n")
    for block in (first, second, third):
        assert [line.split("  ")[0] for line in block.splitlines()] == ["task", *NAMES]
    cells = re.split(r"  +", first.splitlines()[1])
    mean, deviation = (100 * np.array([f([s.pretrained for s in rows[0].seeds]) for f in (np.mean, np.std)])).tolist()
    assert cells[:3] == ["film-reviews, sgd", "3", f"{mean:.1f} ({deviation:.1f})"]
    assert "undefined, linearised: undecided, since the gain of fine-tuning is not above 3 standard errors." in text


def test_one_seed_shows_a_dash_for_what_has_no_value(rows: list[BehaviourRow]) -> None:
    line = format_rows(rows[2:], "text", STRICT).splitlines()[1]
    assert "90.0 (–)" in line and " – " in line


def test_the_column_of_f0_is_there_only_if_a_row_has_it(rows: list[BehaviourRow]) -> None:
    assert "f₀" not in format_rows(rows[2:], "text", STRICT)


def test_latex_is_plain_tabulars_with_names_escaped(rows: list[BehaviourRow]) -> None:
    latex = format_rows(rows, "latex", STRICT)
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    assert r"odd \& even\_100\% & 3 &" in latex and "rule" not in latex and r"$\geq$ 0.95" in latex
    tables = latex[: latex.rindex(r"\end{tabular}")]
    assert tables.isascii()
    for line in tables.splitlines():
        if line.endswith("\\\\"):
            assert len(re.findall(r"(?<!\\)&", line)) in (4, 9, 11)


def test_markdown_has_cells_of_one_number_per_row(rows: list[BehaviourRow]) -> None:
    tables = [part for part in format_rows(rows, "markdown", STRICT).split("\n\n") if part.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_csv_holds_all_digits_of_each_seed_and_of_the_means(rows: list[BehaviourRow]) -> None:
    lines = list(csv.DictReader(io.StringIO(format_rows(rows, "csv", STRICT))))
    assert [line["seed"] for line in lines] == ["13", "42", "87", "mean"] * 2 + ["13", "mean"]
    for seed, line in zip(rows[0].seeds, lines, strict=False):
        assert float(line["kernel"]) == 1 / 3 and float(line["pretrained"]) == seed.pretrained
        assert float(line["distance_mean"]) == seed.distances.mean if seed.distances else False
        assert float(line["recovery"]) == seed.recovery
    mean = lines[3]
    assert float(mean["pretrained"]) == rows[0].mean("pretrained") and float(mean["ratio"]) == rows[0].ratio
    assert float(mean["threshold_distance"]) == 1.5 and mean["whole"] == "no"
    assert lines[-1]["recovery"] == "" and lines[-1]["distance_mean"] == ""


def test_json_holds_thresholds_seeds_and_verdicts_and_null_for_what_is_undefined(rows: list[BehaviourRow]) -> None:
    content = json.loads(format_rows(rows, "json", STRICT))
    assert content["thresholds"] == dataclasses.asdict(STRICT)
    first, _, last = content["rows"]
    assert first["seeds"][1]["logits_distance"] == rows[0].seeds[1].logits_distance
    assert first["verdicts"]["solves"] == {"answer": "no", "reason": ""}
    assert first["standard_deviation"]["pretrained"] == rows[0].deviation("pretrained")
    assert last["recovery"] is None and last["distances"] is None and last["recoveries"] == []
    assert last["verdicts"]["linear"]["answer"] == "undecided"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_ends_with_a_line_break(rows: list[BehaviourRow], form: str) -> None:
    assert re.search(r"[^\n]\n$", format_rows(rows, form, STRICT))


def test_letters_that_latex_reads_as_commands_are_escaped() -> None:
    assert latex_escaped(r"a_b {50%} \x ~^#$") == (
        r"a\_b \{50\%\} \textbackslash{}x \textasciitilde{}\textasciicircum{}\#\$"
    )
