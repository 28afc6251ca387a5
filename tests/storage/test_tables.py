"""One table in four styles."""

import pandas
import pytest

from lmntk.storage import tables
from lmntk.storage.tables import format_table

ROWS = [{"tag": "a|b_&", "test mean": "100.0"}, {"tag": "x", "note": "5 %"}]
IN_STYLE = {
    "text": "tag    test mean  note\na|b_&      100.0\nx                 5 %\n",
    "csv": "tag,test mean,note\na|b_&,100.0,\nx,,5 %\n",
    "markdown": (
        "| tag    | test mean | note |\n"
        "|--------|----------:|------|\n"
        "| a\\|b_& |     100.0 |      |\n"
        "| x      |           | 5 %  |\n"
    ),
    "latex": (
        "\\begin{tabular}{lrl}\n\\toprule\ntag & test mean & note \\\\\n\\midrule\n"
        "a|b\\_\\& & 100.0 &  \\\\\nx &  & 5 \\% \\\\\n\\bottomrule\n\\end{tabular}\n"
    ),
}


@pytest.mark.parametrize("style", tables.STYLES)
def test_words_stand_left_numbers_right_and_missing_cells_are_blank(style: str) -> None:
    assert format_table(ROWS, style, words=("tag", "note")) == IN_STYLE[style]


def test_a_data_frame_is_written_like_its_rows() -> None:
    frame = pandas.DataFrame({"layer": ["a", "b"], "share": [0.5, None]})
    assert format_table(frame, words=("layer",)) == "layer  share\na        0.5\nb\n"
    assert format_table(frame, "csv") == "layer,share\na,0.5\nb,\n"


def test_the_word_nan_is_a_cell_like_others() -> None:
    assert format_table([{"mean": "nan"}]) == "mean\n nan\n"
