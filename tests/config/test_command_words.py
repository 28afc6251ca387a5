"""Words that no file could record are refused where a command line is read, whichever program reads it."""

import json
import os
from pathlib import Path

import pytest

from lmntk.config.arguments import parse_arguments
from lmntk.config.tool_parser import Parser
from lmntk.errors import UsageError
from lmntk.storage.run_results import append_log, write_record

RUN = ["--model_name_or_path", "m", "--task_name", "sst-2", "--data_dir", "d", "--output_dir", "o"]
BAD = os.fsdecode(b"a\xff")


@pytest.mark.parametrize("flag", ["tag", "template", "mapping", "output_dir", "data_dir", "task_name"])
@pytest.mark.parametrize("form", ["{flag} {value}", "{flag}={value}"])
def test_a_value_that_is_not_utf_8_is_refused_by_its_flag(flag: str, form: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_arguments([*RUN, *form.format(flag=f"--{flag}", value=BAD).split(" ")])
    assert str(error.value) == f"--{flag}: 'a\\udcff' is not UTF-8: give text in UTF-8, without NUL characters"


def test_a_name_or_a_stray_word_that_is_not_utf_8_is_refused_too() -> None:
    for word in (BAD, f"--{BAD}", f"--{BAD}=x"):
        with pytest.raises(UsageError, match="^the command line: .* is not UTF-8"):
            parse_arguments([word])


@pytest.mark.parametrize(
    ("value", "told"), [("\ud800", r"'\ud800' is not UTF-8"), ("a\0b", r"'a\x00b' holds a NUL character")]
)
def test_values_of_a_json_file_are_refused_alike(tmp_path: Path, value: str, told: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"tag": value}), encoding="utf-8")
    with pytest.raises(UsageError) as error:
        parse_arguments([str(path), *RUN])
    assert str(error.value) == f"--tag: {told}: give text in UTF-8, without NUL characters"


def test_a_json_file_of_a_thousand_levels_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"tag": ' + "[" * 100_000, encoding="utf-8")
    with pytest.raises(UsageError, match="is not valid JSON: maximum recursion depth exceeded"):
        parse_arguments([str(path)])


def test_tools_refuse_such_words_too() -> None:
    parser = Parser()
    parser.add_argument("--log")
    with pytest.raises(UsageError, match=r"^--log: 'a\\udcff' is not UTF-8"):
        parser.read(["--log", BAD])
    with pytest.raises(UsageError, match=r"^--log: 'a\\udcff' is not UTF-8"):
        parser.parse_args([f"--log={BAD}"])
    assert parser.read(["--log", "ü\n"]).log == "ü\n"


def test_a_folder_that_is_not_utf_8_leaves_json_that_is(tmp_path: Path) -> None:
    append_log(tmp_path / "log", {"folder": BAD, "tag": "ü"})
    write_record(tmp_path / "run.json", {"folder": BAD})
    assert (tmp_path / "log").read_text(encoding="utf-8") == '{"folder": "a\\udcff", "tag": "ü"}\n'
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"folder": BAD}
