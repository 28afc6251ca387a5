"""Which examples go with which query, the templates that show them, and what cannot be drawn."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lmntk.data.examples import Example
from lmntk.data.tasks import Task, find_task
from lmntk.errors import DataError, EmbeddingsError, SettingError, TemplateError
from lmntk.prompts.demonstrations import (
    Demonstrations,
    DemonstrationSampler,
    DemonstrationSettings,
    template_with_demonstrations,
)
from lmntk.prompts.label_words import label_word_ids
from lmntk.prompts.render import Limits, render
from lmntk.prompts.sentence_embeddings import embedding_file, read_embeddings
from lmntk.prompts.templates import SentencePart, Template
from tiny_tokenizers import make_bert_tokenizer, make_roberta_tokenizer

TASKS = ("SST-2", "trec", "RTE", "MNLI", "STS-B")
IN_CONTEXT = ("", "head", "tail")


def make_support(name: str, each: int = 5, seed: int = 0) -> list[Example]:
    """Examples of every class in mixed order, each text different; scores for a regression, the middle among them."""
    task = find_task(name)
    labels = ["0.0", "2.5", "1.2", "2.6", "4.0", "5"] * each if task.regression else list(task.labels) * each
    np.random.RandomState(seed).shuffle(labels)
    return [
        Example(tuple(f"{name} {i} text {part}" for part in range(task.num_sentences)), label)
        for i, label in enumerate(labels)
    ]


def make_embeddings(number: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((number, 6)).astype(np.float32)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    a, b = [float(x) for x in left], [float(x) for x in right]
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(math.fsum(x * x for x in a) * math.fsum(x * x for x in b))


def derive(
    name: str,
    support: list[Example],
    queries: int,
    seed: int,
    own_split: bool,
    in_context: str = "",
    num: int = 1,
    rate: float | None = None,
    embeddings: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Demonstrations]:
    """The published draws in plain loops, apart from the module: texts and class ids for one query after the other."""
    names = ["0", "1"] if name == "STS-B" else list(find_task(name).labels)

    def class_of(index: int) -> int:
        label = support[index].label
        if name == "STS-B":
            return 0 if float(label) <= 2.5 else 1
        return names.index(label)

    generator = np.random.RandomState(seed)
    found = []
    for query in range(queries):
        candidates = []
        for index in range(len(support)):
            if not own_split or index != query:
                candidates.append(index)
        if rate is not None:
            assert embeddings is not None
            scored = [(index, cosine(embeddings[0][index], embeddings[1][query])) for index in candidates]
            scored.sort(key=lambda pair: pair[1], reverse=True)
            limit = int(len(scored) // len(names) * rate)
            counts = [0] * len(names)
            candidates = []
            for index, _ in scored:
                if counts[class_of(index)] < limit:
                    counts[class_of(index)] += 1
                    candidates.append(index)
        order = generator.permutation(len(candidates))
        selection: list[int] = []
        if in_context:
            for place in range(min(num, len(order))):
                selection.append(candidates[order[place]])
        else:
            counts = [0] * len(names)
            for place in order:
                index = candidates[place]
                if counts[class_of(index)] < num:
                    selection.append(index)
                    counts[class_of(index)] += 1
                if sum(counts) == len(names) * num:
                    break
        texts: list[str] = []
        if in_context:
            for index in selection:
                texts += support[index].texts
        else:
            for wanted in range(len(names)):
                for index in selection:
                    if class_of(index) == wanted:
                        texts += support[index].texts
        labels = tuple(class_of(index) for index in selection) if in_context else ()
        found.append(Demonstrations(tuple(texts), labels))
    return found


def make(
    name: str,
    support: Sequence[Example],
    seed: int = 13,
    own_split: bool = False,
    embeddings: tuple[np.ndarray, np.ndarray] = (None, None),  # type: ignore[assignment]
    **settings: Any,
) -> DemonstrationSampler:
    return DemonstrationSampler(
        find_task(name),
        support,
        DemonstrationSettings(**settings),
        np.random.RandomState(seed),
        excludes_query=own_split,
        support_embeddings=embeddings[0],
        query_embeddings=embeddings[1],
    )


@pytest.mark.parametrize("rate", [None, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("own_split", [True, False], ids=["train", "dev"])
@pytest.mark.parametrize(
    ("in_context", "num"), [("", 1), ("", 2), ("head", 3), ("tail", 4)], ids=["one", "two", "head", "tail"]
)
@pytest.mark.parametrize("name", TASKS)
def test_every_draw_is_the_published_one(
    name: str, in_context: str, num: int, own_split: bool, rate: float | None
) -> None:
    support = make_support(name)
    queries = len(support) if own_split else 7
    train = make_embeddings(len(support), 1)
    embeddings = (train, train if own_split else make_embeddings(queries, 2))
    settings: dict[str, Any] = {"in_context": in_context, "in_context_num" if in_context else "num_demo": num}
    if rate is not None:
        settings |= {"filter_model": "sbert", "filter_rate": rate}
    demonstrator = make(name, support, 21, own_split, embeddings, **settings)
    expected = derive(name, support, queries, 21, own_split, in_context, num, rate, embeddings)
    assert [demonstrator.draw(query) for query in range(queries)] == expected
    size = find_task(name).num_sentences
    assert demonstrator.num_sentences == size + len(expected[0].texts)
    if in_context or name == "STS-B":
        assert demonstrator.shown == num
    else:
        assert demonstrator.shown == num * len(find_task(name).labels)


def test_splits_that_share_a_generator_draw_one_after_the_other() -> None:
    support = make_support("SST-2")
    generator = np.random.RandomState(42)
    task, settings = find_task("SST-2"), DemonstrationSettings()
    dev, test = (DemonstrationSampler(task, support, settings, generator, excludes_query=False) for _ in range(2))
    drawn = [dev.draw(0), dev.draw(1), dev.draw(0), dev.draw(1), test.draw(0)]
    assert drawn == derive("SST-2", support, 5, 42, own_split=False)


@given(
    name=st.sampled_from(TASKS),
    each=st.integers(2, 4),
    seed=st.integers(0, 2**32 - 1),
    own_split=st.booleans(),
    data=st.data(),
)
def test_every_class_is_there_once_and_the_query_itself_never(
    name: str, each: int, seed: int, own_split: bool, data: st.DataObject
) -> None:
    task, support = find_task(name), make_support(name, each, seed % 100)
    query = data.draw(st.integers(0, len(support) - 1))
    texts = make(name, support, seed, own_split).draw(query).texts
    groups = [texts[i : i + task.num_sentences] for i in range(0, len(texts), task.num_sentences)]
    labels = [example.label for group in groups for example in support if example.texts == group]
    if task.regression:
        assert [float(label) > 2.5 for label in labels] == [False, True]
    else:
        assert labels == list(task.labels)
    assert not own_split or support[query].texts not in groups


@given(num=st.integers(1, 20), seed=st.integers(0, 2**32 - 1), query=st.integers(0, 11))
def test_in_context_examples_are_different_and_never_the_query(num: int, seed: int, query: int) -> None:
    support = make_support("trec", 2)
    drawn = make("trec", support, seed, own_split=True, in_context="tail", in_context_num=num).draw(query)
    assert len(drawn.texts) == len(set(drawn.texts)) == len(drawn.context_labels) == min(num, 11)
    assert support[query].texts[0] not in drawn.texts
    label_of = {example.texts[0]: int(example.label) for example in support}
    assert tuple(label_of[text] for text in drawn.texts) == drawn.context_labels


def test_a_score_in_the_middle_belongs_to_the_low_half() -> None:
    support = [Example(("a", "b"), "2.5"), Example(("c", "d"), "2.51")]
    assert make("STS-B", support).draw(0).texts == ("a", "b", "c", "d")


def test_a_split_shows_what_the_query_with_the_fewest_candidates_allows() -> None:
    # Four of class 0 and two of class 1: 5 // 2 candidates a class. A query of class 1 leaves one of its own.
    support = [Example((str(i),), label) for i, label in enumerate("000011")]
    vectors = make_embeddings(6, 3)
    settings: dict[str, Any] = {"in_context": "head", "filter_model": "sbert", "filter_rate": 1.0}
    demonstrator = make("SST-2", support, 1, True, (vectors, vectors), **settings)
    assert demonstrator.shown == 3
    assert {len(demonstrator.draw(query).texts) for query in range(6)} == {3}
    assert make("SST-2", support, 1, False, (vectors, vectors), **settings).shown == 5
    assert make("SST-2", support, 1, True, in_context="head").shown == 5


def test_the_filter_keeps_ties_in_file_order() -> None:
    support = [Example((str(i),), "01"[i % 2]) for i in range(8)]
    train = np.ones((8, 3), np.float32)
    train[6:] *= -1
    train[4:6] *= 64
    query = np.array([[0.1, 0.7, 0.3]], np.float16)
    found = make("SST-2", support, 5, False, (train, query), filter_model="sbert").draw(0)
    order = np.random.RandomState(5).permutation(4)
    assert found.texts == tuple(next(str(i) for i in order if i % 2 == label) for label in (0, 1))


def test_a_vector_of_zeros_is_like_nothing() -> None:
    support = [Example((str(i),), "01"[i % 2]) for i in range(4)]
    train = np.array([[0.0, 0], [0, 0], [1, 0], [1, 0]])
    found = make("SST-2", support, 5, False, (train, np.array([[2.0, 0]])), filter_model="sbert").draw(0)
    assert found.texts == ("2", "3")


def extend(name: str, shown: int, template: str | None = None, **settings: Any) -> str:
    task = find_task(name)
    return template_with_demonstrations(template or task.template, task, DemonstrationSettings(**settings), shown)


@pytest.mark.parametrize(
    ("name", "shown", "settings", "expected"),
    [
        (
            "SST-2",
            2,
            {},
            "*cls**sent_0*_It_was*mask*.*sep+**sent_1*_It_was*label_0*.*sep+**sent_2*_It_was*label_1*.*sep+*",
        ),
        (
            "RTE",
            2,
            {},
            "*cls**sent-_0*?*mask*,*+sentl_1**sep+**sent-_2*?*label_0*,*+sentl_3**sep+*"
            "*sent-_4*?*label_1*,*+sentl_5**sep+*",
        ),
        (
            "trec",
            6,
            {},
            "*cls**mask*:*+sent_0**sep+**label_0*:*+sent_1**sep+**label_1*:*+sent_2**sep+**label_2*:*+sent_3**sep+*"
            "*label_3*:*+sent_4**sep+**label_4*:*+sent_5**sep+**label_5*:*+sent_6**sep+*",
        ),
        ("STS-B", 1, {}, "*cls**sent_0**mask*,*+sentl_1**sep+**sent_2**label_0*,*+sentl_3**sep+*"),
        (
            "SST-2",
            4,
            {"num_demo": 2},
            "*cls**sent_0*_It_was*mask*.*sep+**sent_1*_It_was*label_0*.*sep+**sent_2*_It_was*label_0*.*sep+*"
            "*sent_3*_It_was*label_1*.*sep+**sent_4*_It_was*label_1*.*sep+*",
        ),
        (
            "SST-2",
            3,
            {"in_context": "tail"},
            "*cls**sent_0*_It_was*mask*.*sep+**sent_1*_It_was*labelx_0*.*sep+**sent_2*_It_was*labelx_1*.*sep+*"
            "*sent_3*_It_was*labelx_2*.*sep+*",
        ),
        (
            "SST-2",
            3,
            {"in_context": "head"},
            "*sent_3*_It_was*labelx_2*.*sep+**sent_2*_It_was*labelx_1*.*sep+**sent_1*_It_was*labelx_0*.*sep+*"
            "*cls**sent_0*_It_was*mask*.*sep+*",
        ),
        (
            "STS-B",
            2,
            {"in_context": "head"},
            "*sent_4**labelx_1*,*+sentl_5**sep+**sent_2**labelx_0*,*+sentl_3**sep+**cls**sent_0**mask*,*+sentl_1**sep+*",
        ),
        ("RTE", 2, {"auto": False}, "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"),
    ],
)
def test_a_template_is_extended_by_its_own_query_part(
    name: str, shown: int, settings: dict[str, Any], expected: str
) -> None:
    assert extend(name, shown, **settings) == expected


def test_only_variables_are_renumbered() -> None:
    template = "*cls*top_0:*sent_0*_0*mask*_sent_0_mask.*sep+*"
    assert extend("SST-2", 1, template) == f"{template}top_0:*sent_1*_0*label_0*_sent_0_mask.*sep+*"


def test_label_words_of_the_users_own_stay() -> None:
    template = "*label_1*?*sent_0**mask**sep+*"
    assert extend("SST-2", 1, template) == template + "*label_1*?*sent_1**label_0**sep+*"


def test_parts_that_lack_stars_of_their_own_do_not_run_into_their_neighbours() -> None:
    assert extend("SST-2", 1, "cls*sent_0*mask") == "*cls**sent_0**mask**sent_1**label_0*"
    assert extend("SST-2", 1, "Review:*sent_0*mask") == "Review:*sent_0**mask*Review:*sent_1**label_0*"
    assert extend("SST-2", 1, "*mask*a*b*cls*sent_0") == "*mask*a*b*cls**sent_0**label_0*a*b*sent_1*"


def test_a_template_that_does_not_fit_the_task_is_shown_as_it_was_written() -> None:
    with pytest.raises(TemplateError) as caught:
        extend("SST-2", 2, "*mask**sent_1*")
    assert caught.value.data == {"template": "*mask**sent_1*", "part": "sent_1"}


@pytest.mark.parametrize("in_context", IN_CONTEXT)
@pytest.mark.parametrize("name", TASKS)
def test_an_extended_template_fits_the_texts_that_are_drawn(name: str, in_context: str) -> None:
    task, settings = find_task(name), {"in_context": in_context, "in_context_num": 3}
    demonstrator = make(name, make_support(name), **settings)
    text = extend(name, demonstrator.shown, **settings)
    parts = Template.parse(text, demonstrator.num_sentences, len(task.labels)).parts
    numbers = sorted(part.index for part in parts if isinstance(part, SentencePart))
    assert numbers == list(range(task.num_sentences * (1 + demonstrator.shown)))


@pytest.fixture(scope="module", params=[make_bert_tokenizer, make_roberta_tokenizer], ids=["bert", "roberta"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return request.param(tmp_path_factory.mktemp("tokenizer"))


FILMS = [
    Example(("The film was dull.",), "0"),
    Example(("a moving story",), "1"),
    Example(("nothing but a plot",), "0"),
    Example(("bright and funny",), "1"),
    Example(("He won.",), "1"),
]
CITIES = [
    Example(("a city won.", "People won."), "not_entailment"),
    Example(("who said that?", "She said much."), "entailment"),
    Example(("the film was slow.", "Nothing was."), "entailment"),
    Example(("many people.", "A country."), "not_entailment"),
    Example(("he never won.", "They won."), "entailment"),
]


@pytest.mark.parametrize("in_context", IN_CONTEXT)
@pytest.mark.parametrize(("name", "support"), [("SST-2", FILMS), ("RTE", CITIES)], ids=["SST-2", "RTE"])
def test_a_rendered_prompt_is_query_and_demonstrations_token_for_token(
    tokenizer: PreTrainedTokenizerBase, name: str, support: list[Example], in_context: str
) -> None:
    task = find_task(name)
    words = label_word_ids(task.mapping, task.labels, tokenizer)
    settings = {"in_context": in_context, "in_context_num": 3}
    demonstrator = make(name, support, 87, own_split=True, **settings)
    text = extend(name, demonstrator.shown, **settings)
    template = Template.parse(text, demonstrator.num_sentences, len(task.labels))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def one(texts: tuple[str, ...], word: int) -> list[int]:
        if name == "SST-2":
            ids = [*encode(texts[0]), *encode(" It was"), word, *encode(".")]
        else:
            second = texts[1][0].lower() + texts[1][1:]
            ids = [*encode(texts[0][:-1]), *encode("?"), word, *encode(","), *encode(" " + second)]
        return [*ids, tokenizer.sep_token_id]

    class_of = {example.texts: task.labels.index(example.label) for example in support}
    expected_draws = derive(name, support, len(support), 87, True, in_context, 3 if in_context else 1)
    for query, example in enumerate(support):
        drawn = demonstrator.draw(query)
        prompt = render(template, example.texts + drawn.texts, tokenizer, Limits(300), words, drawn.context_labels)
        texts = expected_draws[query].texts
        size = task.num_sentences
        groups = [texts[i : i + size] for i in range(0, len(texts), size)]
        solved = [one(group, words[class_of[group]]) for group in groups]
        asked = [tokenizer.cls_token_id, *one(example.texts, tokenizer.mask_token_id)]
        pieces = [*reversed(solved), asked] if in_context == "head" else [asked, *solved]
        assert list(prompt.input_ids) == [token for piece in pieces for token in piece]
        assert list(prompt.segment_ids) == [i for i, piece in enumerate(pieces) for _ in piece]
        assert prompt.mask_position == prompt.input_ids.index(tokenizer.mask_token_id)


@pytest.mark.parametrize(
    ("field", "setting", "value"),
    [
        ("num_demo", "num_demo", 0),
        ("in_context_num", "gpt3_in_context_num", -1),
        ("filter_rate", "demo_filter_rate", 0.0),
        ("filter_rate", "demo_filter_rate", 1.01),
        ("filter_rate", "demo_filter_rate", math.nan),
    ],
)
def test_settings_that_leave_nothing_to_draw_are_refused(field: str, setting: str, value: float) -> None:
    with pytest.raises(SettingError) as caught:
        DemonstrationSettings(**{field: value})  # type: ignore[arg-type]
    assert caught.value.data["setting"] == setting and caught.value.data["value"] is value


@pytest.mark.parametrize(
    ("name", "labels", "own_split", "num_demo", "found"),
    [
        ("RTE", ["entailment", "entailment", "not_entailment"], True, 1, ("not_entailment", 1, 2)),
        ("trec", list("01235"), False, 1, ("4", 0, 1)),
        ("SST-2", list("01111"), False, 2, ("0", 1, 2)),
        ("STS-B", ["2.5", "0"], False, 1, ("1", 0, 1)),
        ("STS-B", ["2.5", "3", "4"], True, 1, ("0", 1, 2)),
    ],
)
def test_a_class_with_too_few_examples_is_refused_before_any_draw(
    name: str, labels: list[str], own_split: bool, num_demo: int, found: tuple[str, int, int]
) -> None:
    with pytest.raises(DataError) as caught:
        make(name, examples_with(name, labels), 1, own_split, num_demo=num_demo)
    assert caught.value.data == dict(zip(("label", "count", "needed"), found, strict=True))
    sentence = str(caught.value)
    assert ("the query itself does not count" in sentence) == own_split
    assert ("lower `num_demo` (now 2)" in sentence) == (num_demo == 2)
    half = {"0": "low half", "1": "high half"}[found[0]] if name == "STS-B" else "half"
    assert (half in sentence) == (name == "STS-B")


@pytest.mark.parametrize(
    ("name", "labels", "own_split", "settings", "named", "remedy"),
    [
        ("SST-2", ["0"], True, {"in_context": "head"}, "gpt3_in_context_head", "raise K"),
        ("SST-2", [], False, {"in_context": "tail"}, "gpt3_in_context_tail", "raise K"),
        ("SST-2", list("0011"), True, {"filter_rate": 0.5}, "demo_filter_rate", "raise `demo_filter_rate` (now 0.5)"),
        (
            *("SST-2", list("00001111"), False, {"filter_rate": 0.25, "num_demo": 2}, "demo_filter_rate"),
            "raise `demo_filter_rate` (now 0.25)",
        ),
        (
            *("trec", list("01234"), False, {"filter_rate": 1.0, "in_context": "head"}, "demo_filter_rate"),
            "leave out `demo_filter`",
        ),
    ],
)
def test_settings_that_find_too_few_candidates_are_refused_before_any_draw(
    name: str, labels: list[str], own_split: bool, settings: dict[str, Any], named: str, remedy: str
) -> None:
    vectors = make_embeddings(len(labels), 0)
    if "filter_rate" in settings:
        settings = {"filter_model": "sbert", **settings}
    with pytest.raises(SettingError) as caught:
        make(name, examples_with(name, labels), 1, own_split, (vectors, vectors), **settings)
    assert caught.value.data["setting"] == named
    assert remedy in str(caught.value)


def examples_with(name: str, labels: Sequence[str]) -> list[Example]:
    return [Example(("a",) * find_task(name).num_sentences, label) for label in labels]


def test_embeddings_of_two_models_are_refused() -> None:
    support = make_support("SST-2")
    with pytest.raises(EmbeddingsError, match="3 dimensions, queries 2") as caught:
        make("SST-2", support, embeddings=(np.ones((10, 3)), np.ones((4, 2))), filter_model="org/sbert")
    assert caught.value.data["model"] == "sbert"


def test_a_filter_without_embeddings_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="needs the embeddings"):
        make("SST-2", make_support("SST-2"), filter_model="sbert")


@pytest.mark.parametrize(
    ("name", "split", "file_name"),
    [
        ("SST-2", "train", "train_sbert.npy"),
        ("trec", "test", "test_sbert.npy"),
        ("MNLI", "dev", "dev_matched_sbert.npy"),
        ("mnli-mm", "test", "test_mismatched_sbert.npy"),
    ],
)
def test_embeddings_are_read_from_beside_the_data(tmp_path: Path, name: str, split: str, file_name: str) -> None:
    array = make_embeddings(4, 0)
    np.save(tmp_path / file_name, array)
    assert np.array_equal(read_embeddings(find_task(name), tmp_path, split, "sbert", 4), array)


def test_a_slash_in_a_models_name_makes_no_folder(tmp_path: Path) -> None:
    assert embedding_file(tmp_path / "dev.tsv", "org/sbert") == tmp_path / "dev_sbert.npy"


def problem(task: Task, folder: Path) -> str:
    with pytest.raises(EmbeddingsError) as caught:
        read_embeddings(task, folder, "dev", "org/sbert", 4)
    data, path = caught.value.data, folder / "dev_sbert.npy"
    assert (data["path"], data["model"]) == (path, "sbert")
    return data["cause"].removeprefix(f"{path}, which `demo_filter` needs, ")


def test_embeddings_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    task, path = find_task("SST-2"), tmp_path / "dev_sbert.npy"
    assert problem(task, tmp_path) == "is missing"

    np.save(path, make_embeddings(3, 0))
    assert problem(task, tmp_path) == "holds 3 embeddings, but dev has 4 examples"

    path.write_bytes(path.read_bytes()[:-1])
    assert "is damaged" in problem(task, tmp_path)
    np.save(path, np.array([{}, {}, {}, {}]), allow_pickle=True)
    assert "is damaged" in problem(task, tmp_path)
    with path.open("wb") as file:
        np.savez(file, make_embeddings(4, 0))
    assert "is damaged" in problem(task, tmp_path)
    path.write_bytes(b"")
    assert "is damaged" in problem(task, tmp_path)

    for array in (np.ones(4), np.ones((4, 2), int), np.array([[1.0], [2.0], [np.nan], [3.0]])):
        np.save(path, array)
        assert "is not an array of finite floats" in problem(task, tmp_path)

    path.unlink()
    path.mkdir()
    assert problem(task, tmp_path) == "cannot be read (Is a directory)"
