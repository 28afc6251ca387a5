"""What a run asks of a causal language model: demonstrations, warnings and refusals, from the command line on."""

import logging
import re
from pathlib import Path

import pytest

from command_line import SENTENCES, Workplace, sst2_rows, write_rows
from lmntk.config.arguments import parse_arguments
from lmntk.data.tasks import find_task
from lmntk.errors import SettingError, TemplateError, UsageError
from lmntk.experiment.build import build
from lmntk.experiment.experiment import Experiment
from tiny_models import save_tiny_checkpoint

SENTIMENT = "*cls**sent_0*_It_was*mask*.*sep+*"


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    save_tiny_checkpoint("gpt2", place.folder / "gpt2")
    for split, number in (("train", 8), ("dev", 3), ("test", 4)):
        write_rows(place.folder / "SST-2" / f"{split}.tsv", [("sentence", "label"), *sst2_rows(number, split)])
        write_rows(place.folder / "trec" / f"{split}.csv", [(str(i % 6), SENTENCES[i % 6]) for i in range(3 * number)])
    labels = ("contradiction", "entailment", "neutral")
    for stem, number in (("train", 9), ("dev_matched", 3), ("test_matched", 3), ("test_mismatched", 2)):
        rows = [
            ["x"] * 8 + [f"{SENTENCES[i % 3].capitalize()}.", SENTENCES[(i + len(stem)) % 3], labels[i % 3]]
            for i in range(number)
        ]
        write_rows(place.folder / "MNLI" / f"{stem}.tsv", [["h"] * 11, *rows])
    return place


def built(place: Workplace, task: str, *flags: str, model: str = "gpt2") -> Experiment:
    data, name = str(place.folder / task), str(place.folder / model)
    argv = place.argv("--task_name", task, "--data_dir", data, "--model_name_or_path", name, "--seed", "13", *flags)
    return build(*parse_arguments(argv))


def read_by(run: Experiment, split: str) -> list[list[str]]:
    """The tokens of a split's prompts; those of the tiny RoBERTa and GPT-2 differ in their special tokens only."""
    assert run.tokenizer is not None
    found = []
    for feature in run.datasets[split].features:
        found.append(run.tokenizer.convert_ids_to_tokens(feature.input_ids))
        if run.tokenizer.mask_token is None:
            assert feature.mask_position == len(found[-1]) - 1
    return found


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("SST-2", ["--max_seq_length", "64"]),
        ("SST-2", ["--max_seq_length", "64", "--num_demo", "2"]),
        ("SST-2", ["--gpt3_in_context_head", "--gpt3_in_context_num", "2"]),
        ("MNLI", ["--max_seq_length", "64"]),
        ("MNLI", ["--gpt3_in_context_head", "--gpt3_in_context_num", "2"]),
    ],
)
def test_causal_models_are_shown_the_examples_that_masked_ones_are(
    place: Workplace, task: str, flags: list[str]
) -> None:
    # The tiny GPT-2 reads 64 tokens.
    short = ["--first_sent_limit", "5", "--other_sent_limit", "4"]
    both = ["--few_shot_type", "prompt-demo", "--num_sample", "2", *short, *flags]
    masked, causal = built(place, task, *both, model="model"), built(place, task, *both)
    assert list(causal.datasets) == list(masked.datasets)
    for name in masked.datasets:
        for theirs, ours in zip(read_by(masked, name), read_by(causal, name), strict=True):
            pieces = " ".join(theirs).removesuffix(" </s>").split(" </s> ")
            (query,) = [piece for piece in pieces if "<mask>" in piece]
            solved = [piece for piece in pieces if piece != query]
            asked = query.removeprefix("<s> ").partition(" <mask>")[0]
            assert " ".join(ours) == " ".join(["<|endoftext|>", *solved, asked])


def test_a_template_of_ones_own_shows_demonstrations_where_it_puts_them(place: Workplace) -> None:
    template = "*cls**sent_1**label_0*.*+sent_2**label_1*.*+sent_0**mask*."
    flags = ["--few_shot_type", "prompt-demo", "--num_sample", "1", "--auto_demo", "False", "--template", template]
    run = built(place, "SST-2", *flags)
    for prompt, (query, _) in zip(read_by(run, "dev"), sst2_rows(3, "dev"), strict=True):
        text = " ".join(prompt).replace(" ", "").replace("Ġ", " ")
        assert re.fullmatch(r"<\|endoftext\|>.+ terrible\. .+ great\. " + re.escape(query), text)


def test_in_finetune_mode_the_plain_text_is_read_to_its_end(place: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lmntk.experiment.prompting"):
        run = built(place, "MNLI", "--few_shot_type", "finetune", "--from_linearhead")
    assert not caplog.messages
    first = "".join(read_by(run, "train")[0]).replace("Ġ", " ")
    assert first == f"<|endoftext|>{SENTENCES[0].capitalize()}.{SENTENCES[5 % 3]}"


def test_a_template_that_has_no_sentence_before_its_mask_is_refused(place: Workplace) -> None:
    template = find_task("trec").template
    with pytest.raises(TemplateError, match="that is no sentence: put sent_0 before it") as error:
        built(place, "trec")
    assert error.value.data == {"template": template}
    with pytest.raises(UsageError, match=re.escape("put sent_0 and sent_1 before it, as in")):
        built(place, "MNLI", "--template", "*cls*_So*mask*:*+sent_0**+sent_1*")


def test_a_template_that_has_no_sentence_of_the_query_before_its_mask_is_refused(place: Workplace) -> None:
    flags = ["--few_shot_type", "prompt-demo", "--auto_demo", "False", "--template"]
    template = "*cls**sent_1*_so*label_0*.*mask*:*+sent_0*"
    with pytest.raises(UsageError) as error:
        built(place, "SST-2", *flags, template)
    assert isinstance(error.value, TemplateError) and error.value.data["template"] == template
    assert f"no sentence of the query: put sent_0 before it, as in {SENTIMENT}" in str(error.value)


def test_trec_can_be_asked_with_another_template(place: Workplace) -> None:
    run = built(place, "trec", "--template", "*cls**sent_0*_This_is_about*mask*")
    assert read_by(run, "dev")[2] == ["<|endoftext|>", "f", "u", "n", "n", "y", "ĠThis", "Ġis", "Ġabout"]


def test_sentences_behind_the_mask_are_told_and_the_run_goes_on(
    place: Workplace, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    never_read = (
        "{} *mask* in '{}': a causal language model never reads {}; a `template` with all sentences before "
        "*mask* asks about them all"
    )
    with caplog.at_level(logging.WARNING, "lmntk.experiment.prompting"):
        run = built(place, "MNLI")
    assert caplog.messages == [never_read.format("sent_1 follows", find_task("MNLI").template, "it")]
    first = "".join(read_by(run, "train")[0]).replace("Ġ", " ")
    assert first == f"<|endoftext|>{SENTENCES[0].capitalize()}?"

    caplog.clear()
    templates = ["*cls**sent_0*_So*mask*,*+sent_1*", "*cls**sent_0**+sent_1*_So*mask*.", "*sent_1*_so*mask**sent_0*"]
    (tmp_path / "templates").write_text("\n".join(templates), encoding="utf-8")
    with caplog.at_level(logging.WARNING, "lmntk.experiment.prompting"):
        built(place, "MNLI", "--template_path", str(tmp_path / "templates"))
    assert caplog.messages == [
        never_read.format("sent_1 follows", templates[0], "it"),
        never_read.format("sent_0 follows", templates[2], "it"),
    ]

    caplog.clear()
    flags = ["--few_shot_type", "prompt-demo", "--num_sample", "1", "--auto_demo", "False"]
    with caplog.at_level(logging.WARNING, "lmntk.experiment.prompting"):
        built(place, "SST-2", *flags, "--template", "*sent_0**mask*.*sent_1**label_0**sent_2**label_1*")
    assert caplog.messages == [
        never_read.format(
            "sent_1 and sent_2 follow", "*sent_0**mask*.*sent_1**label_0**sent_2**label_1*", "them"
        )
    ]  # fmt: skip


def test_masked_models_are_neither_warned_nor_refused(place: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lmntk.experiment.prompting"):
        built(place, "MNLI", model="model")
        built(place, "trec", model="model")
        built(place, "SST-2", "--few_shot_type", "prompt-demo", "--gpt3_in_context_tail", model="model")
    assert not caplog.messages


def test_examples_behind_the_query_are_refused(place: Workplace) -> None:
    with pytest.raises(SettingError, match="take `gpt3_in_context_head`") as error:
        built(place, "SST-2", "--few_shot_type", "prompt-demo", "--gpt3_in_context_tail")
    assert error.value.data["setting"] == "gpt3_in_context_tail"


def test_demonstrations_that_push_the_end_out_are_told_or_lose_their_beginning(place: Workplace) -> None:
    flags = ["--few_shot_type", "prompt-demo", "--num_sample", "1", "--max_seq_length", "20"]
    with pytest.raises(UsageError, match="the end of example 1 of train was cut away, its prompt has [0-9]+ tokens: "):
        built(place, "SST-2", *flags)
    for prompt in read_by(built(place, "SST-2", *flags, "--truncate_head"), "test"):
        assert (len(prompt), prompt[-2:]) == (20, ["ĠIt", "Ġwas"])
