"""A template, an example's texts and label words become the tokens of a prompt.

Templates (`lmntk.templates`), mappings from label to label word and the files that hold many of them are those of
LM-BFF (Gao et al. 2021, arXiv 2012.15723): the same tokens come out.
"""

from __future__ import annotations

import ast
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmntk.errors import UsageError
from lmntk.templates import MASK, SEGMENT_END, LabelPart, LiteralPart, SentencePart, SpecialPart, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How many tokens of a sentence and of a prompt are kept; each name is also the flag that sets it.

    Raises:
        UsageError: A limit is below 1.
    """

    max_seq_length: int = 128
    first_sent_limit: int | None = None
    other_sent_limit: int | None = None
    truncate_head: bool = False

    def __post_init__(self) -> None:
        """Refuse limits that keep nothing (and would turn slices around)."""
        for flag in ("max_seq_length", "first_sent_limit", "other_sent_limit"):
            limit = getattr(self, flag)
            if limit is not None and limit < 1:
                raise UsageError(f"--{flag} is {limit}, but must be at least 1")


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt, cut to its limits.

    Attributes:
        input_ids: `[L]` token ids.
        segment_ids: `[L]` token type ids.
        mask_position: Where in `input_ids` the template's mask stands; of a template without one, the first token. For
            a causal model it is the last token: what comes behind it is predicted.
        full_length: Number of tokens before the cut to `max_seq_length`.
    """

    input_ids: tuple[int, ...]
    segment_ids: tuple[int, ...]
    mask_position: int
    full_length: int


def render(
    template: Template,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    label_word_ids: Sequence[int] = (),
    context_labels: Sequence[int] = (),
    name: str = "the example",
) -> Prompt:
    """Fill a template in.

    For a causal model ``*cls*`` is the tokenizer's BOS token, or nothing where it has none, ``*sep*`` is nothing, and
    the prompt ends where the mask would stand.

    Args:
        template: From `Template.parse`.
        texts: The texts of ``sent_0``, ``sent_1``, …
        tokenizer: Every part is encoded on its own, without special tokens.
        limits: Sentences are cut first, then the whole prompt.
        label_word_ids: `[C]` token ids for ``label_i`` and ``labelx_i``; needed where the template has them.
        context_labels: Class ids of the in-context examples, for ``labelx_i``.
        name: What messages call the example, such as ``example 3 of train``.

    Raises:
        UsageError: The mask does not survive the cut, the tokenizer lacks a special token of the template,
            ``labelx_i`` has no in-context example, or nothing is left for a causal model to read.
    """
    ids: list[int] = []
    segments: list[int] = []
    segment = mask_position = 0
    for part in template.parts:
        match part:
            case SpecialPart():
                tokens = _special_ids(part, tokenizer, template.causal)
            case SentencePart():
                limit = limits.first_sent_limit if part.index == 0 else limits.other_sent_limit
                tokens = _encode(part.apply(texts[part.index]), tokenizer)[:limit]
            case LabelPart():
                tokens = [label_word_ids[_label_of(part, context_labels)]]
            case LiteralPart():
                tokens = _literal_ids(part.text, tokenizer)
        # The template's own mask counts: a sentence may hold the text of a mask token before it.
        if part == MASK:
            mask_position = len(ids) - template.causal
        ids += tokens
        segments += [segment] * len(tokens)
        if part == SEGMENT_END:
            segment += 1

    start = max(0, len(ids) - limits.max_seq_length) if limits.truncate_head else 0
    kept = slice(start, start + limits.max_seq_length)
    if not ids:
        raise UsageError(f"the prompt of {name} has no token, as its text is empty: take it out of its file")
    if MASK not in template.parts:
        mask_position = start + len(ids[kept]) - 1 if template.causal else start
    elif not start <= mask_position < start + limits.max_seq_length:
        raise UsageError(_mask_cut_away(template, texts, limits, len(ids), name))
    return Prompt(tuple(ids[kept]), tuple(segments[kept]), mask_position - start, len(ids))


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if text.startswith(" ") and _adds_space(tokenizer):
        text = text[1:]
    # Not verbose: it would warn of texts longer than the model takes, which are cut here anyway.
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


@functools.lru_cache(maxsize=4)  # asked for every part of every prompt
def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts a space (``▁``) in front of a text that has one already, as Llama 2's does."""
    pieces = tokenizer.tokenize("a")
    return bool(pieces) and pieces[0].startswith("▁") and tokenizer.tokenize(" a") != pieces


def _literal_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Encoding may split or prefix a lone character (sentence-piece models put a space before it), the lookup does not.
    if len(text) == 1 and (token := _known_id(text, tokenizer)) is not None:
        return [token]
    return _encode(text, tokenizer)


def _known_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of a token, None where the vocabulary does not hold it."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id if isinstance(token_id, int) and token_id != tokenizer.unk_token_id else None


def _special_ids(part: SpecialPart, tokenizer: PreTrainedTokenizerBase, causal: bool) -> list[int]:
    kind = part.name.removesuffix("+")
    if causal:
        return [tokenizer.bos_token_id] if kind == "cls" and tokenizer.bos_token_id is not None else []
    token_id = getattr(tokenizer, f"{kind}_token_id")
    if token_id is None:
        raise UsageError(
            f"--template uses *{part.name}*, but this model's tokenizer has no {kind} token: "
            f"choose a model that has one (--model_name_or_path, --tokenizer_name)"
            + ("" if part == MASK else " or leave it out of --template")
        )
    return [token_id]


def _label_of(part: LabelPart, context_labels: Sequence[int]) -> int:
    if not part.in_context:
        return part.index
    if part.index >= len(context_labels):
        raise UsageError(
            f"--template uses labelx_{part.index}, but the prompt has {len(context_labels)} in-context examples: "
            f"leave the label word out of the template"
        )
    return context_labels[part.index]


def _mask_cut_away(template: Template, texts: Sequence[str], limits: Limits, length: int, name: str) -> str:
    """The sentence that shows the example and names the limits that bring its mask back."""
    mask = template.parts.index(MASK)
    # What stands between the mask and the end that is kept pushed it out; shortening anything else is of no use.
    pushing = template.parts[mask + 1 :] if limits.truncate_head else template.parts[:mask]
    indices = {part.index for part in pushing if isinstance(part, SentencePart)}
    ways = [f"raise --max_seq_length (now {limits.max_seq_length})"]
    if any(isinstance(part, LabelPart) and part.in_context for part in template.parts):
        # In-context prompts have all the room that the model has.
        ways = ["lower --gpt3_in_context_num"]
    if 0 in indices:
        ways.append(f"lower --first_sent_limit (now {limits.first_sent_limit or 'none'})")
    if indices - {0}:
        ways.append(f"lower --other_sent_limit (now {limits.other_sent_limit or 'none'})")
    if limits.truncate_head:
        ways.append("leave out --truncate_head")
    if template.causal:
        ways.append("add --truncate_head, to lose the beginning instead")
    lines = (" ".join(text.split()) for text in texts)
    shown = " | ".join(line if len(line) <= 60 else line[:59] + "…" for line in lines)
    lost = "end" if template.causal else "mask"
    what = f"the {lost} of {name} was cut away, its prompt has {length} tokens"
    return f"{what}: {', or '.join(ways)}; its text is '{shown}'"


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


def label_word_ids(mapping: Mapping[str, str], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The one token of each class's label word.

    Args:
        mapping: Label to label word, from `parse_mapping`.
        labels: The task's labels, in logit order.
        tokenizer: Looks words up with a space before them, except those that start with one of ``< [ . ,``.

    Returns:
        `[C]` token ids.

    Raises:
        UsageError: A word of several pieces, an unknown one, or one token for two classes.
    """
    ids: list[int] = []
    for label in labels:
        word = mapping[label]
        token_id = _label_word_id(word, label, tokenizer)
        if token_id in ids:
            first = labels[ids.index(token_id)]
            raise UsageError(
                f"label words '{mapping[first]}' (label {first}) and '{word}' (label {label}) are the same token "
                f"for this model: give each class a word of its own with --mapping"
            )
        ids.append(token_id)
    return ids


def _label_word_id(word: str, label: str, tokenizer: PreTrainedTokenizerBase) -> int:
    space = "" if _adds_space(tokenizer) else " "
    pieces = [word] if word.startswith(("<", "[", ".", ",")) else tokenizer.tokenize(space + word)
    if len(pieces) != 1:
        raise UsageError(
            f"label word '{word}' (label {label}) is {len(pieces)} pieces for this model ({' '.join(pieces)}): "
            f"choose a word of one piece with --mapping"
        )
    token_id = _known_id(pieces[0], tokenizer)
    if token_id is None:
        raise UsageError(f"label word '{word}' (label {label}) is unknown to this model: choose another with --mapping")
    return token_id


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
