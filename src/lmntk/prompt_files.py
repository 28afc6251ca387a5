"""Templates and mappings from label to label word as users write them: in flags, or in files that hold many.

Both are those of LM-BFF (Gao et al. 2021, arXiv 2012.15723).
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmntk.errors import UsageError

logger = logging.getLogger(__name__)


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
    if isinstance(mapping, str):
        try:
            found = ast.literal_eval(mapping)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UsageError(f'--mapping is no Python dictionary: {mapping}; write for example "{example}"')
    else:
        found = dict(mapping)
    words: dict[str, str] = {}
    for key, word in found.items():
        if str(key) in words:
            raise UsageError(f"--mapping gives label '{key}' twice: {mapping}")
        if not isinstance(word, str) or not word.strip():
            raise UsageError(
                f"--mapping gives label '{key}' {word!r}, which is no word; write for example \"{example}\""
            )
        words[str(key)] = word
    return words


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
    templates = [default_template if template is None else template]
    words: str | Mapping[str, str] = default_mapping if mapping is None else mapping
    if prompt_path is not None:
        if template_path is not None or mapping_path is not None:
            other = "template_path" if template_path is not None else "mapping_path"
            raise UsageError(f"--prompt_path holds templates and mappings: leave out --{other}")
        line = _pick(_read_lines(prompt_path, "prompt_path"), prompt_id, prompt_path, "prompt")
        fields = line.split("\t")
        if len(fields) != 2:
            raise UsageError(
                f"--prompt_path {prompt_path}: line {prompt_id} (from 0) is not template, tab, mapping: '{line}'"
            )
        templates, words = [fields[0]], fields[1]
    if template_path is not None:
        templates = [line for line in _read_lines(template_path, "template_path") if line][:top_n_template]
        if template_id is not None:
            templates = [_pick(templates, template_id, template_path, "template")]
    if mapping_path is not None:
        words = _pick(_read_lines(mapping_path, "mapping_path"), mapping_id, mapping_path, "mapping")
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


def _read_lines(path: str, flag: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--{flag} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--{flag} {path} is no UTF-8 text: {error}") from error
    if not text.strip():
        raise UsageError(f"--{flag} {path} is empty")
    return [line.strip() for line in text.rstrip().split("\n")]


def _pick(lines: Sequence[str], index: int | None, path: str, kind: str) -> str:
    if index is None or not 0 <= index < len(lines):
        raise UsageError(
            f"--{kind}_id {index} is out of range: --{kind}_path {path} holds {len(lines)} lines, 0 to {len(lines) - 1}"
        )
    return lines[index]
