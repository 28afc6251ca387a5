"""docs/reference/templates.md: its examples are what the code makes of them, its commands run, and its names exist."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from command_line import ROOT, SENTENCES, Workplace, read_kernel, sst2_rows, write_rows
from doc_commands import argv_of, calls, make_stand_in, page_text
from lmntk.config.arguments import GENERAL_MAX_SEQ_LENGTH, flag_names
from lmntk.data.examples import Example
from lmntk.data.tasks import TASKS, find_task
from lmntk.prompts.demonstrations import DemonstrationSampler, DemonstrationSettings, template_with_demonstrations
from lmntk.prompts.label_words import label_word_ids
from lmntk.prompts.render import Limits, render
from lmntk.prompts.templates import _FORMS, _SPECIAL, Template, plain_text_template
from tiny_models import save_tiny_checkpoint
from tiny_tokenizers import make_gpt2_tokenizer, make_roberta_tokenizer

PAGE = page_text("templates")
EXAMPLES = re.findall(r"^```text\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
FILES = dict(re.findall(r"^```text (\S+)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE))
ROWS = re.findall(r"^\| `(\*[^`]+\*)` \| [^|]+ \| ((?:\\\||[^|])+) \| ((?:\\\||[^|])+) \|$", PAGE, flags=re.MULTILINE)
FAMILIES = ("masked", "causal")
TYPES = ("finetune", "prompt-demo", "in-context head")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    makers = {"masked": make_roberta_tokenizer, "causal": make_gpt2_tokenizer}
    return {family: make(tmp_path_factory.mktemp(family)) for family, make in makers.items()}


def fields_of(example: str) -> dict[str, str]:
    """The lines of an example: a name, two spaces or more, and what it says."""
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in example.splitlines())


def numbered(fields: dict[str, str], name: str) -> list[tuple[str, str]]:
    """What stands behind ``name 0``, ``name 1``, …, with its number."""
    return [(key[len(name) :], text) for key, text in fields.items() if key.startswith(name)]


def limits_of(flags: str) -> Limits:
    numbers = {flag: int(number) for flag, number in re.findall(r"--(\w+) ([0-9]+)", flags)}
    return Limits(**numbers, truncate_head="--truncate_head" in flags)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_what_the_code_makes_of_it(
    tokenizers: dict[str, PreTrainedTokenizerBase], example: str, family: str
) -> None:
    fields, tokenizer, causal = fields_of(example), tokenizers[family], family == "causal"
    assert fields.get("type", "finetune") in TYPES
    texts = [text for _, text in numbered(fields, "sent_")]
    task = find_task("SST-2" if len(texts) == 1 else "RTE")
    words = label_word_ids(task.mapping, task.labels, tokenizer)
    text = fields.get("template", plain_text_template(len(texts)))
    labels: Sequence[int] = ()
    if shown := [Example((text,), label) for label, text in numbered(fields, "class ")]:
        how = DemonstrationSettings(in_context="head" if "head" in fields["type"] else "")
        demonstrator = DemonstrationSampler(task, shown, how, np.random.RandomState(0), excludes_query=False)
        text = template_with_demonstrations(text, task, how, demonstrator.shown, causal)
        drawn = demonstrator.draw(0)
        texts, labels = [*texts, *drawn.texts], drawn.context_labels
    template = Template.parse(text, len(texts), 2, needs_mask="template" in fields)
    template = template.for_causal() if causal else template
    prompt = render(template, texts, tokenizer, limits_of(fields.get("flags", "")), words, labels)
    # A space at its very beginning cannot be seen on the page.
    assert tokenizer.decode(prompt.input_ids).removeprefix(" ") == fields[family]
    if causal:
        assert prompt.mask_position == len(prompt.input_ids) - 1
    elif "template" in fields:
        assert prompt.input_ids[prompt.mask_position] == tokenizer.mask_token_id
    else:
        assert prompt.mask_position == 0


def test_every_kind_of_prompt_has_an_example() -> None:
    assert len(EXAMPLES) >= 8
    found = [fields_of(example) for example in EXAMPLES]
    assert {fields["type"] for fields in found if "type" in fields} == set(TYPES)
    assert any("flags" in fields for fields in found)
    for fields in found:
        assert set(FAMILIES) <= fields.keys()
        for flag in re.findall(r"--(\w+)", fields.get("flags", "")):
            assert flag in flag_names()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_part_is_what_the_table_says(
    tokenizers: dict[str, PreTrainedTokenizerBase], row: tuple[str, str, str], family: str
) -> None:
    part, *cells = row
    tokenizer, cell = tokenizers[family], cells[FAMILIES.index(family)]
    words = label_word_ids({"0": "terrible", "1": "great"}, ["0", "1"], tokenizer)
    texts = re.findall(r"`sent_[01]` is `([^`]+)`", PAGE)
    # Behind some text, since a part of nothing is no prompt.
    template = Template.parse(f"*:*{part}", len(texts), 2, needs_mask=False)
    template = template.for_causal() if family == "causal" else template
    prompt = render(template, texts, tokenizer, Limits(), words, context_labels=[1])
    said = "" if cell in ("nothing", "the end") else cell.strip("`").replace("\\|", "|").replace("␣", " ")
    assert tokenizer.decode(prompt.input_ids) == f":{said}"


def test_the_table_has_every_part_of_the_language() -> None:
    parts = [row[0].strip("*") for row in ROWS]
    assert {re.sub("[0-9]", "i", part) for part in parts} >= {*_SPECIAL, *(f"{form}_i" for form in _FORMS)}


def test_the_templates_that_it_prints_are_the_tasks() -> None:
    for name in ("SST-2", "MNLI"):
        assert f"template  {TASKS[name].template}\n" in PAGE
    behind_mask, without = set(), set()
    for name, task in TASKS.items():
        template = Template.parse(task.template, task.num_sentences, len(task.labels))
        read = template.for_causal().sentences
        if read != template.sentences:
            (behind_mask if read else without).add(name)
    said = re.search(
        r"The same holds for (.+?)\. A template with no sentence before the mask, such as\s+(\w+)'s", PAGE, re.DOTALL
    )
    assert said is not None
    assert {*re.split(r",\s+|\s+and\s+", said[1]), "MNLI", "mnli-mm"} == behind_mask
    assert {said[2]} == without
    assert f"otherwise they are {GENERAL_MAX_SEQ_LENGTH} tokens" in " ".join(PAGE.split())


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    """A place with the models, data and files that the commands of the page name."""
    save_tiny_checkpoint("gpt2", place.folder / "gpt2")
    for name, content in FILES.items():
        (place.folder / name).write_text(content, encoding="utf-8")
    folder = place.folder / "data" / "k-shot-1k-test"
    for split, number in (("train", 8), ("dev", 2), ("test", 2)):
        write_rows(folder / "SST-2" / "16-42" / f"{split}.tsv", [("sentence", "label"), *sst2_rows(number, split)])
    labels = TASKS["MNLI"].labels
    for stem in ("train", "dev_matched", "test_matched", "test_mismatched"):
        rows = [["x"] * 8 + [f"{SENTENCES[i]}.", SENTENCES[i + 1], labels[i % 3]] for i in range(4)]
        write_rows(folder / "MNLI" / "16-42" / f"{stem}.tsv", [["h"] * 11, *rows])
    return place


@pytest.mark.parametrize("call", calls(PAGE), ids=lambda call: call[0].removeprefix("TAG="))
def test_a_command_leaves_its_kernels_and_warns_of_nothing(place: Workplace, call: list[str], tmp_path: Path) -> None:
    argv = argv_of(call, make_stand_in(tmp_path))
    model = place.folder / "gpt2" if "MODEL=gpt2" in call else place.model
    outcome = place.call([*argv, "--model_name_or_path", str(model), "--use_cpu", "--disable_tqdm", "True"])
    assert (outcome.status, outcome.err) == (0, ""), f"{shlex.join(call)}\n{outcome.err}"
    assert "never reads" not in outcome.messages
    task = argv[argv.index("--task_name") + 1].lower()
    tag, name = (word.partition("=")[2] for word in call if word.startswith(("TAG=", "MODEL=")))
    (folder,) = (place.folder / "result").glob(f"*-{name}-*-{tag}/16-42")
    assert read_kernel(folder, "test", task).isfinite().all()


def test_there_are_commands_for_both_families() -> None:
    models = {word for call in calls(PAGE) for word in call if word.startswith("MODEL=")}
    assert models == {"MODEL=roberta-base", "MODEL=gpt2"}


def test_every_flag_and_file_that_it_names_exists() -> None:
    assert {flag for flag in re.findall(r"--(\w+)", PAGE) if flag not in flag_names()} == set()
    for path in re.findall(r"`((?:src|tests)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).is_file()
