"""Tables of what single train examples do: mislabelled candidates, and what helps and hurts predictions."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmntk.analysis.influence import NEARLY_SINGULAR, QueryInfluence, RunInfluence, train_rows
from lmntk.analysis.saved_run import TextsUnavailableError, label_names
from lmntk.analysis.scores import METRIC_NAMES
from lmntk.analysis.table_blocks import Block, Cells, as_csv, as_json, format_blocks, number
from lmntk.solvers.problem import predicted_classes
from lmntk.storage.wording import quantity

TEXT_WIDTH = 80
WORDS = ("label", "left out", "text")


@dataclass(frozen=True)
class TrainTexts:
    """The sentences of the train examples.

    Attributes:
        texts: The sentences of each example; empty if they cannot be shown.
        remark: Why they cannot be shown; empty if they can.
    """

    texts: Sequence[Sequence[str]]
    remark: str = ""

    @classmethod
    def read(cls, found: RunInfluence, data_dir: Path | None = None) -> "TrainTexts":
        """Read the sentences where the data file is still there and unchanged.

        Args:
            found: Names the run.
            data_dir: The folder that has the data files now; None: where the kernel's description records them.
        """
        try:
            return cls(found.of_run.run.texts("train", data_dir))
        except TextsUnavailableError as error:
            return cls((), str(error))

    def of(self, index: int) -> str:
        """Return the sentences of an example on one line; empty if they cannot be shown."""
        return " | ".join(self.texts[index]) if index < len(self.texts) else ""


def format_influence(found: RunInfluence, texts: TrainTexts, form: str, split: str | None, top: int = 10) -> str:
    """Write mislabelled candidates, and what helps and hurts a split most.

    Args:
        found: From `lmntk.analysis.influence.run_influence`.
        texts: The sentences of the train examples.
        form: One of `lmntk.analysis.table_blocks.FORMS`. CSV holds every train example, CSV and JSON all digits.
        split: One of `found.splits`; None where there is none.
        top: How many of each.

    Returns:
        The table, which ends with a line break.
    """
    if form == "csv":
        return as_csv([row | {"text": texts.of(row["index"])} for row in train_rows(found)])
    if form == "json":
        return as_json(_as_object(found, texts, split, top))
    return format_blocks(blocks_of_influence(found, texts, split, top), notes_of_influence(found, texts, split), form)


def blocks_of_influence(found: RunInfluence, texts: TrainTexts, split: str | None, top: int) -> list[Block]:
    """Return the tables, with numbers as readers want them; the first column of each names the table.

    Args:
        found: From `lmntk.analysis.influence.run_influence`.
        texts: The sentences of the train examples.
        split: One of `found.splits`; None where there is none.
        top: How many rows each table has.
    """
    names = label_names(found.of_run.run, max(2, found.left_out.shape[1]))
    predicted = predicted_classes(found.left_out)
    doubtful = [
        {
            "looks mislabelled": str(index),
            "label": names[found.classes[index]],
            "left out": names[predicted[index]],
            "margin": number(found.margins[index], ".3f"),
            **_text_cell(texts, index),
        }
        for index in found.mislabelled[:top]
    ]
    blocks = [Block(doubtful, WORDS)] if found.judged.any() else []
    if split is not None:
        for title, places in _helping_and_hurting(found, split, top).items():
            blocks.append(Block([_cells_of_group(found, texts, names, title, split, place) for place in places], WORDS))
    return blocks


def _helping_and_hurting(found: RunInfluence, split: str, top: int) -> dict[str, list[int]]:
    """Return the places of the groups without which the loss rises most, and of those without which it falls most."""
    order, changes = found.by_helpfulness(split), found.splits[split].loss_changes
    return {
        f"helps {split} most": [place for place in order[:top] if changes[place] > 0],
        f"hurts {split} most": [place for place in order[::-1][:top] if changes[place] < 0],
    }


def _cells_of_group(
    found: RunInfluence, texts: TrainTexts, names: Sequence[str], title: str, split: str, place: int
) -> Cells:
    one, numbers = found.splits[split], np.unique(found.groups)
    members = np.flatnonzero(found.groups == numbers[place])
    what = {"label": names[found.classes[members[0]]]}
    if found.is_grouped:
        what = {"examples": str(len(members))}
    return {
        title: str(numbers[place]),
        **what,
        "loss change": number(one.loss_changes[place], "+.2e"),
        f"{one.metric} change": number(100 * one.score_changes[place], "+.2f"),
        **({} if found.is_grouped else _text_cell(texts, members[0])),
    }


def _text_cell(texts: TrainTexts, index: int) -> Cells:
    text = texts.of(index)
    return {"text": textwrap.shorten(text, TEXT_WIDTH, placeholder=" …")} if text else {}


def notes_of_influence(found: RunInfluence, texts: TrainTexts, split: str | None) -> list[str]:
    """Return sentences that explain the tables.

    Args:
        found: From `lmntk.analysis.influence.run_influence`.
        texts: The sentences of the train examples.
        split: One of `found.splits`; None where there is none.
    """
    count, what = len(found.classes), "its group" if found.is_grouped else "it"
    notes = []
    if found.judged.any():
        score = float(np.mean(predicted_classes(found.left_out) == found.classes))
        notes.append(
            f"looks mislabelled: fitted without {what}, the kernel contradicts the label of "
            f"{len(found.mislabelled)} of {quantity(count, 'train example')} (accuracy {100 * score:.1f} %); margin: "
            "the label's logit less the largest other one; the most negative come first"
        )
    if split is not None:
        one = found.splits[split]
        unit = "a group" if found.is_grouped else "an example"
        notes.append(
            f"changes: the mean squared error, and {METRIC_NAMES.get(one.metric, one.metric)} in points, of {split} "
            f"({quantity(len(one.labels), 'example')}) without {unit} less those with it; without what hurts, the loss "
            "falls"
        )
        if split != "dev":
            notes.append(
                f"what helps and hurts is chosen by looking at {split}: a score on {split} without it is no fair test; "
                "choose on dev for that"
            )
    return [*notes, *remarks_of_influence(found, texts)]


def remarks_of_influence(found: RunInfluence, texts: TrainTexts) -> list[str]:
    """Return sentences on what is missing or doubtful.

    Args:
        found: From `lmntk.analysis.influence.run_influence`.
        texts: The sentences of the train examples.
    """
    remarks = [texts.remark] if texts.remark else []
    if unjudged := int(np.sum(~found.judged)):
        groups = "with their group" if found.is_grouped else "with the example"
        remarks.append(
            f"nothing is said about the labels of {unjudged} of {quantity(len(found.classes), 'train example')}: "
            f"{groups} a whole class leaves, so that the fit without it cannot predict that class"
        )
    if found.condition > NEARLY_SINGULAR:
        remarks.append(
            f"the kernel is nearly singular (condition number {found.condition:.0e}), so that these numbers say more "
            "about nearly equal examples than about labels: a larger kernel_regularization, such as 0.001, is steadier"
        )
    return remarks


def _as_object(found: RunInfluence, texts: TrainTexts, split: str | None, top: int) -> dict[str, Any]:
    rows = train_rows(found)
    of_train = [row | {"text": texts.of(row["index"])} for row in rows]
    numbers = np.unique(found.groups)
    facts: dict[str, Any] = {
        "folder": str(found.of_run.run.folder),
        "task": found.of_run.run.key,
        "kernel_regularization": found.of_run.choice.settings.regularization,
        "split": split,
        "mislabelled": [of_train[index] for index in found.mislabelled[:top]],
    }
    if split is not None:
        one, chosen = found.splits[split], _helping_and_hurting(found, split, top)
        for key, places in zip(("helpful", "harmful"), chosen.values(), strict=True):
            facts[key] = [
                {
                    "group": int(numbers[place]),
                    "examples": np.flatnonzero(found.groups == numbers[place]).tolist(),
                    "loss_change": float(one.loss_changes[place]),
                    f"{one.metric}_change": float(one.score_changes[place]),
                    "texts": [texts.of(int(index)) for index in np.flatnonzero(found.groups == numbers[place])],
                }
                for place in places
            ]
    return facts | {"remarks": remarks_of_influence(found, texts)}


def format_query(found: RunInfluence, asked: QueryInfluence, texts: TrainTexts, form: str, top: int = 10) -> str:
    """Write the prediction for a text, and the train examples that push it most for and against.

    Args:
        found: The influence on the run's own splits, which may be none; it has the groups.
        asked: From `lmntk.analysis.influence.query_influence`.
        texts: The sentences of the train examples.
        form: One of `lmntk.analysis.table_blocks.FORMS`. CSV holds every group, CSV and JSON all digits.
        top: How many of each.

    Returns:
        The table, which ends with a line break.
    """
    names = label_names(found.of_run.run, max(2, len(asked.logits)))
    numbers, order = np.unique(found.groups), np.argsort(-asked.on_margin, kind="stable")
    rows = [_query_row(found, asked, texts, names, int(place)) for place in order]
    if form == "csv":
        return as_csv(rows)
    predicted, logits = names[asked.predicted], asked.logits.tolist()
    if form == "json":
        return as_json({"prediction": predicted, "logits": logits, "margin": asked.margin, "influence": rows})
    words = ["prediction", *WORDS]
    named = {"logit": number(logits[0])} if len(logits) == 1 else dict(zip(names, map(number, logits), strict=True))
    blocks = [Block([{"prediction": predicted, "margin": number(asked.margin), **named}], words)]
    for title, places in (
        ("pushes for it", [place for place in order[:top] if asked.on_margin[place] > 0]),
        ("pushes against it", [place for place in order[::-1][:top] if asked.on_margin[place] < 0]),
    ):
        cells = []
        for place in places:
            row = _query_row(found, asked, texts, names, int(place))
            what = {"examples": str(row["examples"])} if found.is_grouped else {"label": row["label"]}
            text = {} if found.is_grouped else _text_cell(texts, int(row["index"]))
            cells.append({title: str(numbers[place]), **what, "influence": number(row["influence"], "+.4f"), **text})
        blocks.append(Block(cells, words))
    unit = "a group of train examples" if found.is_grouped else "a train example"
    note = (
        f"influence: what {unit} adds to the margin of the predicted class over the next one, in units of logits: the "
        "margin with it less the margin of a fit without it"
    )
    return format_blocks(blocks, [note, *remarks_of_influence(found, texts)], form)


def _query_row(
    found: RunInfluence, asked: QueryInfluence, texts: TrainTexts, names: Sequence[str], place: int
) -> dict[str, Any]:
    group = int(np.unique(found.groups)[place])
    members = np.flatnonzero(found.groups == group)
    influence = float(asked.on_margin[place])
    if found.is_grouped:
        return {"group": group, "examples": len(members), "influence": influence}
    index = int(members[0])
    return {
        "index": index,
        "label": names[found.classes[index]],
        "influence": influence,
        "text": texts.of(index),
    }
