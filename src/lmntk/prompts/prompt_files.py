"""Templates and mappings from a task, from settings, or from files that hold many.

The files are those of LM-BFF (Gao et al. 2021, arXiv 2012.15723).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lmntk.data.tasks import Task
from lmntk.data.text_files import open_text
from lmntk.errors import Bounds, FileError, SettingError, TemplateError, check_numbers
from lmntk.prompts.label_words import require_utf8

logger = logging.getLogger(__name__)

_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?|nan|inf)"
_SCORE = re.compile(rf"{_NUMBER}(?:\t\s*|\s+(?=\{{))|[-+]?(?:[0-9]+\.[0-9]{{5}}|nan) (?=\*)", re.IGNORECASE)
"""What LM-BFF's search writes before a template, a mapping or a prompt, as ``"%.5f %s"`` or with a tab."""
_PERHAPS_SCORE = re.compile(rf"({_NUMBER}(?=\s+\*)|[-+]?[0-9]+\.[0-9]{{5}}(?=\s))", re.IGNORECASE)

SOURCE_BOUNDS = (Bounds("top_n_template", 1),)
"""The values that the numbers of `PromptSources` can take."""


@dataclass(frozen=True)
class PromptSources:
    """Where the templates and the mapping come from; what is None is not given.

    Attributes:
        template: A template.
        mapping: A mapping, as `parse_mapping` reads it.
        template_path: A file with one template on each line; blank lines are skipped.
        template_id: The one line to take from that file, counted from 0; None takes all lines.
        mapping_path: A file with one mapping on each line.
        mapping_id: The line to take from that file, counted from 0.
        prompt_path: A file with a template, a tab and its mapping on each line.
        prompt_id: The line to take from that file, counted from 0.
        top_n_template: How many templates of the file to take, from the first one; None takes all.
    """

    template: str | None = None
    mapping: str | None = None
    template_path: str | None = None
    template_id: int | None = None
    mapping_path: str | None = None
    mapping_id: int | None = None
    prompt_path: str | None = None
    prompt_id: int | None = None
    top_n_template: int | None = None


def choose_prompts(task: Task, sources: PromptSources) -> tuple[list[str], str | Mapping[str, str]]:
    """Choose the templates and the mapping: a file beats a setting, and a setting beats the task's own.

    LM-BFF's scripts always pass ``template`` and ``mapping`` and add files for experiments.

    Args:
        task: The task whose own prompt is used where nothing else is given.
        sources: The settings and the files.

    Returns:
        The templates, more than one only from a file of them, and the mapping for `parse_mapping`.

    Raises:
        FileError: A file cannot be read or is empty.
        SettingError: A line number is missing, out of range or without its file, or settings contradict each other.
        TemplateError: A line is not in the form of its file, or may begin with a score.

    Examples:
        >>> from lmntk.data.tasks import find_task
        >>> choose_prompts(find_task("SST-2"), PromptSources(template="*sent_0**mask*"))
        (['*sent_0**mask*'], {'0': 'terrible', '1': 'great'})
    """
    _check_pairs(sources)
    if sources.template is not None:
        require_utf8("template", sources.template)
        _check_no_score(sources.template, "`template`")
    templates = [task.template if sources.template is None else sources.template]
    mapping: str | Mapping[str, str] = task.mapping if sources.mapping is None else sources.mapping
    files = {kind: getattr(sources, f"{kind}_path") for kind in ("template", "mapping", "prompt")}
    if sources.prompt_path is not None:
        line = _Lines.read(sources.prompt_path, "prompt").pick(sources.prompt_id)
        template, mapping = _split_prompt(line, sources.prompt_path, sources.prompt_id)
        templates = [template]
    if sources.template_path is not None:
        lines = _Lines.read(sources.template_path, "template")
        lines = lines._replace(lines=[line for line in lines.lines if line][: sources.top_n_template])
        templates = lines.lines if sources.template_id is None else [lines.pick(sources.template_id)]
    if sources.mapping_path is not None:
        mapping = _Lines.read(sources.mapping_path, "mapping").pick(sources.mapping_id)
    for kind in ("template", "mapping"):
        path = files[kind] or files["prompt"]
        if getattr(sources, kind) is not None and path is not None:
            logger.warning("`%s` is not used: %s takes its place", kind, path)
    return templates, mapping


def all_lines(path: str, kind: str) -> list[str]:
    """Read all templates or mappings of a file, without the scores of LM-BFF's search; blank lines are skipped.

    Args:
        path: The file.
        kind: ``"template"`` or ``"mapping"``.

    Raises:
        FileError: The file cannot be read or is empty.
        TemplateError: Only some lines begin with a score, or one begins with what may be a score or text.
    """
    return [line for line in _Lines.read(path, kind).lines if line]


def all_prompts(path: str) -> list[tuple[str, str]]:
    """Read all pairs of a template and its mapping of a file; errors are those of `all_lines`."""
    lines = _Lines.read(path, "prompt").lines
    return [_split_prompt(line, path, number) for number, line in enumerate(lines) if line]


def _split_prompt(line: str, path: str, number: int | None) -> tuple[str, str]:
    template, *rest = line.split("\t")
    if len(rest) != 1:
        raise TemplateError(
            f"`prompt_path={path}`: line {number} (from 0) is not template, tab, mapping: '{line}'",
            **{"template": line, "path": path, "line": number},
        )
    return template, rest[0]


def _check_pairs(sources: PromptSources) -> None:
    """Require the file of each line number, and the line number of a file of mappings or prompts."""
    for setting in ("template_id", "top_n_template", "mapping_id", "prompt_id"):
        value = getattr(sources, setting)
        kind = "template" if setting == "top_n_template" else setting.removesuffix("_id")
        path = getattr(sources, f"{kind}_path")
        if value is not None and path is None:
            raise SettingError(
                f"`{setting}={value}` needs `{kind}_path`, the file to choose from", setting=setting, value=value
            )
        if value is None and path is not None and kind != "template":
            raise SettingError(
                f"`{kind}_path` needs `{setting}`, the line to take (the first is 0)", setting=setting, value=value
            )
    check_numbers(SOURCE_BOUNDS, vars(sources))
    if sources.top_n_template is not None and sources.template_id is not None:
        raise SettingError(
            "`top_n_template` takes several templates and `template_id` takes one: give one of the two",
            **{"setting": "top_n_template", "value": sources.top_n_template},
        )
    other = next((kind for kind in ("template", "mapping") if getattr(sources, f"{kind}_path") is not None), None)
    if sources.prompt_path is not None and other is not None:
        raise SettingError(
            f"`prompt_path` holds templates and mappings: leave out `{other}_path`",
            **{"setting": f"{other}_path", "value": getattr(sources, f"{other}_path")},
        )


class _Lines(NamedTuple):
    """The lines of a file of templates, mappings or prompts."""

    lines: list[str]
    path: str
    kind: str

    @classmethod
    def read(cls, path: str, kind: str) -> _Lines:
        """Read a file; where every line begins with a score, as LM-BFF's search writes them, leave the scores out.

        Raises:
            FileError: The file cannot be read or is empty.
            TemplateError: Only some lines begin with a score, or one begins with what may be a score or text.
        """
        setting = f"{kind}_path"
        with open_text(path, setting) as file:
            text = file.read().removeprefix("\ufeff")
        if not text.strip():
            raise FileError(f"`{setting}={path}` is empty", path=path)
        lines = [line.strip() for line in re.split("\r\n|\r|\n", text.rstrip())]
        scores = [_SCORE.match(line) for line in lines if line]
        if not any(scores):
            for number, line in enumerate(lines):
                _check_no_score(line, f"`{setting}={path}`: line {number} (from 0)")
            return cls(lines, path, kind)
        if not all(scores):
            number = next(number for number, line in enumerate(lines) if line and not _SCORE.match(line))
            raise TemplateError(
                f"`{setting}={path}`: some lines begin with a score and line {number} (from 0) does not: "
                f"'{lines[number]}'; give all lines a score and a tab, or none",
                **{"template": lines[number], "path": path, "line": number},
            )
        logger.warning("`%s=%s`: the number before each line is taken for its score and left out", setting, path)
        return cls([_SCORE.sub("", line, count=1) for line in lines], path, kind)

    def pick(self, index: int | None) -> str:
        """Return one line.

        Raises:
            SettingError: The file has no such line.
        """
        if index is None or not 0 <= index < len(self.lines):
            raise SettingError(
                f"`{self.kind}_id={index}` is out of range: `{self.kind}_path={self.path}` holds {len(self.lines)} "
                f"lines, 0 to {len(self.lines) - 1}",
                **{"setting": f"{self.kind}_id", "value": index},
            )
        return self.lines[index]


def _check_no_score(line: str, where: str) -> None:
    """Refuse a template that begins with what may be a score or text."""
    if found := _PERHAPS_SCORE.match(line):
        raise TemplateError(
            f"{where} begins with {found[1]} and a space: remove a score, or put a tab after it in all lines of a "
            f"file; of text, write the space as _: '{line}'",
            template=line,
        )
