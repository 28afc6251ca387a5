"""Files of templates, mappings and prompts as other programs leave them: scores, encodings, repeated keys."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmntk.data.tasks import TASKS
from lmntk.errors import FileError, SettingError, TemplateError
from lmntk.prompts.label_words import parse_mapping
from lmntk.prompts.prompt_files import PromptSources, choose_prompts

WORDS = '{"0": "bad", "1": "good"}'
Write = Callable[[str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(content: str | bytes) -> str:
        path = tmp_path / "file.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def choose(**flags: Any) -> tuple[list[str], Any]:
    return choose_prompts(TASKS["SST-2"], PromptSources(**flags))


@pytest.mark.parametrize(
    "lines",
    [
        "0.56360 *cls*a*mask*\n0.00000 *mask*b\n",
        "-0.5\t*cls*a*mask*\n\n3\t*mask*b",
        "nan *cls*a*mask*\r\n0.51640 *mask*b\r\n",
    ],
)
def test_the_scores_of_a_search_are_no_part_of_its_templates(
    write: Write, lines: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(lines)
    assert choose(template_path=path)[0] == ["*cls*a*mask*", "*mask*b"]
    assert choose(template_path=path, template_id=1)[0] == ["*mask*b"]
    told = f"`template_path={path}`: the number before each line is taken for its score and left out"
    assert caplog.messages == [told, told]


@pytest.mark.parametrize("score", ["0.25820 ", "1\t", "0.5  "])
def test_nor_of_its_mappings_and_prompts(write: Write, score: str) -> None:
    path = write(f"{score}{{'0': 'a', '1': 'b'}}\n{score}{WORDS}\n")
    assert choose(mapping_path=path, mapping_id=1)[1] == WORDS
    if score != "0.5  ":
        path = write(f"{score}*mask*a\t{{}}\n{score}*mask*b\t{WORDS}\n")
        assert choose(prompt_path=path, prompt_id=1) == (["*mask*b"], WORDS)


@pytest.mark.parametrize(
    "lines", ["5_stars*mask*\n3.5_stars*mask*", "5 stars*mask*\n10:*mask*\n1.*mask*", "*mask*\n0.5*mask*"]
)
def test_numbers_that_are_text_of_a_template_stay(write: Write, lines: str) -> None:
    assert choose(template_path=write(lines))[0] == lines.split("\n")


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            "*mask*a\n0.56 *mask*b",
            "line 1 (from 0) begins with 0.56 and a space: remove a score, or put a tab after it",
        ),
        ("0.56360 It was*mask*", "line 0 (from 0) begins with 0.56360 and a space"),
        ("0.56360 *mask*a\n*mask*b", "some lines begin with a score and line 1 (from 0) does not: '*mask*b'; give all"),
    ],
)
def test_what_may_be_a_score_and_may_be_text_is_asked_for(write: Write, lines: str, sentence: str) -> None:
    path = write(lines)
    with pytest.raises(TemplateError, match="^" + re.escape(f"`template_path={path}`: {sentence}")):
        choose(template_path=path)


def test_a_template_on_the_command_line_may_not_begin_with_a_score_either() -> None:
    with pytest.raises(TemplateError, match="^`template` begins with 0.56360 and a space: remove a score"):
        choose(template="0.56360 *cls**sent_0**mask*")


def test_a_byte_order_mark_is_no_part_of_the_first_template(write: Write) -> None:
    assert choose(template_path=write("\ufeff*cls*a*mask*\n*mask*b\n"))[0] == ["*cls*a*mask*", "*mask*b"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16le", "utf-16be", "latin1"])
def test_another_encoding_is_named_with_the_command_that_converts_it(write: Write, encoding: str) -> None:
    path = write("*cls*schön*mask*\n".encode(encoding))
    with pytest.raises(FileError, match=f"not UTF-8 .*iconv -f {encoding} -t utf-8") as caught:
        choose(template_path=path)
    assert caught.value.data["path"] == path


def test_bytes_on_the_command_line_that_are_no_utf_8_are_told() -> None:
    for setting, call in (
        ("template", lambda: choose(template="*mask*\udcff")),
        ("mapping", lambda: parse_mapping({"0": "\udcff", "1": "good"}, ["0", "1"])),
    ):
        with pytest.raises(SettingError, match="not UTF-8") as caught:
            call()
        assert caught.value.data["setting"] == setting


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ("{'0': 'bad', '0': 'dull', '1': 'good'}", "gives label '0' twice"),
        ('{"0": "bad", "1": "dull", "1": "good"}', "gives label '1' twice"),
        ("{0: 'bad', 1: 'dull', '1': 'good'}", "gives label '1' twice"),
        ("{0: 'bad', 1: 'dull', 1.0: 'good'}", "has label '1.0', unknown here"),
        ("{None: 'bad', 1: 'good'}", "is not a Python dictionary"),
        ("{b'0': 'bad', 1: 'good'}", "is not a Python dictionary"),
        ("{**{}, 1: 'good'}", "is not a Python dictionary"),
        ("{0x" + "f" * 5000 + ": 'bad', 1: 'good'}", "is not a Python dictionary"),
        ("{" * 1000, "is not a Python dictionary"),
    ],
)  # fmt: skip
def test_no_key_of_a_mapping_wins_silently(mapping: str, sentence: str) -> None:
    with pytest.raises(SettingError, match=re.escape(sentence)) as caught:
        parse_mapping(mapping, ["0", "1"])
    assert caught.value.data == {"setting": "mapping", "value": mapping}
