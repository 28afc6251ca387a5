"""Templates and mappings from label to label word as users write them: in flags, or in files that hold many.

Both are those of LM-BFF (Gao et al. 2021, arXiv 2012.15723).
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Mapping, Sequence

from lmntk.data.text_files import open_text
from lmntk.errors import UsageError

logger = logging.getLogger(__name__)

_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?|nan|inf)"
_SCORE = re.compile(rf"{_NUMBER}(?:\t\s*|\s+(?=\{{))|[-+]?(?:[0-9]+\.[0-9]{{5}}|nan) (?=\*)", re.IGNORECASE)
"""What LM-BFF's search writes before a template, a mapping or a prompt, as ``"%.5f %s"`` or with a tab."""
_PERHAPS_SCORE = re.compile(rf"({_NUMBER}(?=\s+\*)|[-+]?[0-9]+\.[0-9]{{5}}(?=\s))", re.IGNORECASE)


def parse_mapping(mapping: str | Mapping[str, str], labels: Sequence[str]) -> dict[str, str]:
    """Read ``--mapping``, from each label of the task to its label word.

    Args:
        mapping: A Python dictionary literal with strings or integers as keys, or a dictionary.
        labels: The task's labels, in logit order.

    Returns:
        Label to label word, in the order of `labels`.

    Raises:
        UsageError: No dictionary, labels left out, twice or unknown, or a label word that is no text.
    """
    words = read_mapping(mapping, labels)
    if missing := [label for label in labels if label not in words]:
        raise UsageError(f"--mapping has no word for {_quoted(missing)}: {mapping}; the labels are {', '.join(labels)}")
    if extra := [label for label in words if label not in labels]:
        raise UsageError(f"--mapping has {_quoted(extra)}, unknown here: {mapping}; the labels are {', '.join(labels)}")
    return {label: words[label] for label in labels}


def read_mapping(mapping: str | Mapping[str, str], labels: Sequence[str] = ("0", "1")) -> dict[str, str]:
    """Read ``--mapping``, whatever its labels, in its own order.

    Args:
        mapping: As `parse_mapping` takes it.
        labels: For the example that a sentence shows.

    Raises:
        UsageError: No dictionary, a label twice, or a label word that is no text.
    """
    example = str({label: f"word{i}" for i, label in enumerate(labels)})
    pairs = _pairs_of(mapping) if isinstance(mapping, str) else [(str(key), word) for key, word in mapping.items()]
    if pairs is None:
        raise UsageError(f'--mapping is no Python dictionary: {mapping}; write for example "{example}"')
    words: dict[str, str] = {}
    for label, word in pairs:
        if label in words:
            raise UsageError(f"--mapping gives label '{label}' twice: {mapping}")
        if not isinstance(word, str) or not word.strip():
            raise UsageError(
                f"--mapping gives label '{label}' {word!r}, which is no word; write for example \"{example}\""
            )
        words[label] = word
    _require_text("mapping", *words, *words.values())
    return words


def _pairs_of(mapping: str) -> list[tuple[str, object]] | None:
    """The keys and values that a dictionary display has, repeated keys included; None if it is none of labels."""
    try:
        display = ast.parse(mapping.strip(), mode="eval").body
        if not isinstance(display, ast.Dict):
            return None
        # A ** has no key, which literal_eval refuses.
        keys = [ast.literal_eval(key) for key in display.keys]  # type: ignore[arg-type]
        values = [ast.literal_eval(value) for value in display.values]
        if not all(isinstance(key, str | int | float) for key in keys):
            return None
        return list(zip(map(str, keys), values, strict=True))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _require_text(flag: str, *texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"--{flag} holds bytes that are not UTF-8: {ascii(text)}") from error


def _quoted(labels: Sequence[str]) -> str:
    return ("label " if len(labels) == 1 else "labels ") + ", ".join(f"'{label}'" for label in labels)


def choose_prompts(
    *,
    default_template: str,
    default_mapping: Mapping[str, str],
    template: str | None = None,
    mapping: str | None = None,
    template_path: str | None = None,
    template_id: int | None = None,
    mapping_path: str | None = None,
    mapping_id: int | None = None,
    prompt_path: str | None = None,
    prompt_id: int | None = None,
    top_n_template: int | None = None,
) -> tuple[list[str], str | Mapping[str, str]]:
    """Choose among the task's own template and mapping, those of flags and those of files.

    A file beats a flag, as in LM-BFF, whose scripts always pass ``--template`` and ``--mapping`` and add files for
    experiments; a flag beats the task's row.

    Args:
        default_template: The task's template.
        default_mapping: The task's mapping.
        template: ``--template``.
        mapping: ``--mapping``.
        template_path: File with a template a line, blank lines skipped; all are used, or one.
        template_id: Line of that file, from 0.
        mapping_path: File with a mapping a line.
        mapping_id: Line of that file, from 0.
        prompt_path: File with a template, a tab and its mapping a line.
        prompt_id: Line of that file, from 0.
        top_n_template: Only the first so many of the file's templates.

    Returns:
        The templates, more than one only from a file of them, and the mapping for `parse_mapping`.

    Raises:
        UsageError: A file that cannot be read or is not in this form, an id that is missing, out of range or
            without its file, or flags that contradict each other.
    """
    _require_pairs(
        {
            "template_id": template_id,
            "top_n_template": top_n_template,
            "mapping_id": mapping_id,
            "prompt_id": prompt_id,
        },
        {"template": template_path, "mapping": mapping_path, "prompt": prompt_path},
    )
    if template is not None:
        _require_text("template", template)
        _require_no_score(template, "--template")
    templates = [default_template if template is None else template]
    words: str | Mapping[str, str] = default_mapping if mapping is None else mapping
    if prompt_path is not None:
        if template_path is not None or mapping_path is not None:
            other = "template_path" if template_path is not None else "mapping_path"
            raise UsageError(f"--prompt_path holds templates and mappings: leave out --{other}")
        line = _pick(_without_scores(prompt_path, "prompt_path"), prompt_id, prompt_path, "prompt")
        fields = line.split("\t")
        if len(fields) != 2:
            raise UsageError(
                f"--prompt_path {prompt_path}: line {prompt_id} (from 0) is not template, tab, mapping: '{line}'"
            )
        templates, words = [fields[0]], fields[1]
    if template_path is not None:
        templates = [line for line in _without_scores(template_path, "template_path") if line][:top_n_template]
        if template_id is not None:
            templates = [_pick(templates, template_id, template_path, "template")]
    if mapping_path is not None:
        words = _pick(_without_scores(mapping_path, "mapping_path"), mapping_id, mapping_path, "mapping")
    for kind, flag, path in (
        ("template", template, template_path or prompt_path),
        ("mapping", mapping, mapping_path or prompt_path),
    ):
        if flag is not None and path is not None:
            logger.warning("--%s is not used: %s takes its place", kind, path)
    return templates, words


def _require_pairs(choices: Mapping[str, int | None], paths: Mapping[str, str | None]) -> None:
    """Every id needs its file; files of mappings and prompts need their id."""
    for flag, value in choices.items():
        kind = "template" if flag == "top_n_template" else flag.removesuffix("_id")
        if value is not None and paths[kind] is None:
            raise UsageError(f"--{flag} {value} needs --{kind}_path, the file to choose from")
        if value is None and paths[kind] is not None and flag in ("mapping_id", "prompt_id"):
            raise UsageError(f"--{kind}_path needs --{flag}, the line to take (the first is 0)")
    top, template_id = choices["top_n_template"], choices["template_id"]
    if top is not None and top < 1:
        raise UsageError(f"--top_n_template is {top}, but must be at least 1")
    if top is not None and template_id is not None:
        raise UsageError("--top_n_template takes several templates and --template_id takes one: give one of the two")


def _without_scores(path: str, flag: str) -> list[str]:
    """Read lines; where each begins with a score, as LM-BFF's search writes them, it is no part of them.

    Raises:
        UsageError: Some lines begin with a score and some do not, or with what need not be one.
    """
    lines = _read_lines(path, flag)
    scores = [_SCORE.match(line) for line in lines if line]
    if not any(scores):
        for number, line in enumerate(lines):
            _require_no_score(line, f"--{flag} {path}: line {number} (from 0)")
        return lines
    if not all(scores):
        number = next(number for number, line in enumerate(lines) if line and not _SCORE.match(line))
        raise UsageError(
            f"--{flag} {path}: some lines begin with a score and line {number} (from 0) does not: '{lines[number]}'; "
            "give all lines a score and a tab, or none"
        )
    logger.warning("--%s %s: the number before each line is taken for its score and left out", flag, path)
    return [_SCORE.sub("", line, count=1) for line in lines]


def _require_no_score(line: str, where: str) -> None:
    """Refuse a template that begins with what may be a score and may be text."""
    if found := _PERHAPS_SCORE.match(line):
        raise UsageError(
            f"{where} begins with {found[1]} and a space: remove a score, or put a tab behind it in all lines of a "
            f"file; of text, write the space as _: '{line}'"
        )


def _read_lines(path: str, flag: str) -> list[str]:
    with open_text(path, flag) as file:
        text = file.read().removeprefix("\ufeff")
    if not text.strip():
        raise UsageError(f"--{flag} {path} is empty")
    return [line.strip() for line in re.split("\r\n|\r|\n", text.rstrip())]


def _pick(lines: Sequence[str], index: int | None, path: str, kind: str) -> str:
    if index is None or not 0 <= index < len(lines):
        raise UsageError(
            f"--{kind}_id {index} is out of range: --{kind}_path {path} holds {len(lines)} lines, 0 to {len(lines) - 1}"
        )
    return lines[index]
