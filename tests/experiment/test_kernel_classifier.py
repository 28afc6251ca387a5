"""`lmntk.KernelClassifier`: the bytes of run.py, the conventions of scikit-learn, and one sentence for each mistake."""

import copy
import csv
import inspect
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils import estimator_checks
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, RobertaModel

from command_line import SENTENCES, SIZES, Workplace, read_kernel, sst2_rows, write_rows
from lmntk import KernelClassifier
from lmntk.errors import (
    DataError,
    ModelError,
    SettingError,
    SolverError,
    UsageError,
)
from lmntk.experiment.classifier_checks import check_selection
from lmntk.experiment.prompt_kernel import PromptKernel
from tiny_gguf import make_gguf_files
from tiny_models import save_tiny_checkpoint

TEMPLATE = "*cls**sent_0*_It_was*mask*.*sep+*"
WORDS = {"bad": "terrible", "good": "great"}
TEXTS = [text for text, _ in sst2_rows(4, "train")]
LABELS = ["bad", "good", "bad", "good"]
ASYMMETRIC = {"formula": "asymmetric_signgd", "solver": "asym", "binary_classification": True, "adjust_for_init": True}


PROJECTED = {"kernel_engine": "projected", "kernel_dtype": "float64"}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def make(place: Workplace) -> Callable[..., KernelClassifier]:
    """Make a classifier over the tiny RoBERTa."""

    def make(**arguments: Any) -> KernelClassifier:
        usual = {"model": place.model, "template": TEMPLATE, "label_words": WORDS, "use_cpu": True}
        return KernelClassifier(**usual | arguments)

    return make


@pytest.fixture(scope="module")
def fitted(make: Callable[..., KernelClassifier]) -> KernelClassifier:
    return make().fit(TEXTS, LABELS)


def columns(split: str) -> tuple[list[str], list[str]]:
    """The texts and labels of a split of the tiny data."""
    texts, labels = zip(*sst2_rows(SIZES[split], split), strict=True)
    return list(texts), list(labels)


def assert_same_as_run(classifier: KernelClassifier, folder: Path, task: str, texts: dict[str, Any]) -> None:
    """Compare kernels, logits and predicted classes with what run.py wrote, bit for bit."""
    assert classifier.kernel().tobytes() == read_kernel(folder, "train", task).numpy().tobytes()
    for split in ("dev", "test"):
        assert classifier.kernel(texts[split]).tobytes() == read_kernel(folder, split, task).numpy().tobytes()
        with (folder / f"{split}_predictions_{task}.csv").open(encoding="utf-8") as file:
            _, *rows = csv.reader(file)
        assert [[str(logit) for logit in row] for row in classifier.predict_logits(texts[split])] == [
            row[3:] for row in rows
        ]
        assert list(map(str, classifier.predict(texts[split]))) == [row[2] for row in rows]


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ([], {}),
        (["--kernel_solver", "svr", "--adjust_for_init"], {"solver": "svr", "adjust_for_init": True}),
        (
            ["--kernel_solver", "asym", "--kernel_formula", "asymmetric_signgd", "--binary_classification"]
            + ["--adjust_for_init"],
            ASYMMETRIC,
        ),
        (
            [
                "--kernel_formula",
                "signgd",
                "--kernel_dtype",
                "float64",
                "--exclude_embeddings",
                "--max_seq_length",
                "19",
            ]
            + ["--kernel_regularization", "0.1", "--per_device_train_batch_size", "3"],
            {"formula": "signgd", "kernel_dtype": "float64", "exclude_embeddings": True, "max_seq_length": 19}
            | {"kernel_regularization": 0.1, "per_device_train_batch_size": 3},
        ),
    ],
    ids=["sgd", "svr", "asymmetric", "signgd"],
)
def test_a_task_gives_the_bytes_of_run_py(
    place: Workplace, request: pytest.FixtureRequest, flags: list[str], arguments: dict[str, Any]
) -> None:
    folder = place.run(*flags, output=request.node.callspec.id)
    classifier = KernelClassifier(place.model, task_name="sst-2", use_cpu=True, **arguments)
    classifier.fit(*columns("train"))
    assert_same_as_run(classifier, folder, "sst-2", {split: columns(split)[0] for split in SIZES})


@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_own_data_of_pairs_and_three_classes_give_the_bytes_of_run_py(
    place: Workplace, gpt2: Path, family: str
) -> None:
    words = {"n": "No", "m": "Maybe", "y": "Yes"}
    model, template = (place.model if family == "roberta" else gpt2), "*cls**sent_0*?*mask*,*+sentl_1**sep+*"
    if family == "gpt2":
        template = "*sent_0*?*+sentl_1**mask*"
    rows = {
        split: [(SENTENCES[i % 6], SENTENCES[(i + 2) % 6], "nmy"[i % 3]) for i in range(size)]
        for split, size in {"train": 6, "dev": 3, "test": 5}.items()
    }
    for split, pairs in rows.items():
        write_rows(place.folder / family / f"{split}.tsv", [("first", "second", "label"), *pairs])
    outcome = place.call(
        place.argv(
            *("--task_name", "custom", "--custom_columns", "first,second,label", "--mapping", str(words)),
            *("--template", template, "--data_dir", str(place.folder / family), "--model_name_or_path", str(model)),
            output=f"out-{family}",
        )
    )
    assert outcome.status == 0, outcome.err
    classifier = KernelClassifier(model, template=template, label_words=words, use_cpu=True)
    classifier.fit([pair[:2] for pair in rows["train"]], [pair[2] for pair in rows["train"]])
    texts = {split: np.array([pair[:2] for pair in rows[split]]) for split in rows}
    assert_same_as_run(classifier, place.folder / f"out-{family}", "custom", texts)


@pytest.mark.parametrize(("family", "auto"), [("roberta", AutoModelForMaskedLM), ("gpt2", AutoModelForCausalLM)])
def test_a_loaded_model_gives_the_same_bytes_and_stays_as_it_is(
    place: Workplace, gpt2: Path, family: str, auto: Any
) -> None:
    folder = place.model if family == "roberta" else gpt2
    lm = auto.from_pretrained(folder).train()
    before = {name: (value, value.clone()) for name, value in lm.state_dict(keep_vars=True).items()}
    config, modules = lm.config.to_dict(), [type(module) for module in lm.modules()]
    arguments = {"template": TEMPLATE.replace("*mask*.", "*mask*"), "label_words": WORDS, "use_cpu": True}
    named = KernelClassifier(folder, **arguments).fit(TEXTS, LABELS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    passed = KernelClassifier(lm, tokenizer=tokenizer, **arguments).fit(TEXTS, LABELS)
    assert passed.kernel(["funny"]).tobytes() == named.kernel(["funny"]).tobytes()
    assert lm.training and lm.config.to_dict() == config and [type(module) for module in lm.modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())
    for name, value in lm.state_dict(keep_vars=True).items():
        assert value is before[name][0] or value.data_ptr() == before[name][0].data_ptr()
        assert torch.equal(value, before[name][1])
        assert value.requires_grad == before[name][0].requires_grad
    assert clone(passed).model is lm
    half = KernelClassifier(lm.bfloat16(), tokenizer=tokenizer, **arguments).fit(TEXTS, LABELS)
    assert half.train_kernel_.dtype == np.float64 and lm.dtype == torch.bfloat16


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    file = make_gguf_files(tmp_path).folder / "tiny-Q8_0.gguf"
    arguments = {"template": "*sent_0*_It_was*mask*", "label_words": WORDS, "use_cpu": True}
    alone = KernelClassifier(file, **arguments).fit(TEXTS, LABELS)
    in_folder = KernelClassifier(file.parent, gguf_file=file.name, **arguments).fit(TEXTS, LABELS)
    assert alone.kernel().tobytes() == in_folder.kernel().tobytes()


@pytest.mark.parametrize(
    "given",
    [np.array(TEXTS), np.array(TEXTS, dtype=object), tuple(TEXTS), pandas.Series(TEXTS, index=[5, 3, 9, 1])]
    + [[(text,) for text in TEXTS], pandas.DataFrame({"text": TEXTS}), np.array(TEXTS)[:, None]],
    ids=["array", "objects", "tuple", "series", "rows", "frame", "column"],
)
def test_texts_may_come_in_any_container(fitted: KernelClassifier, given: Any) -> None:
    assert np.array_equal(fitted.kernel(given), fitted.kernel(TEXTS))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 0, 1], {"0": "terrible", "1": "great"}),
        (np.array([0, 1, 0, 1], dtype=np.int8), {0: "terrible", 1: "great"}),
        ([False, True, False, True], ["terrible", "great"]),
        (pandas.Series([-1.0, 2.0, -1.0, 2.0]), ["terrible", "great"]),
        (np.array(["a", "b", "a", "b"], dtype=object), ("terrible", "great")),
    ],
    ids=["int", "int8", "bool", "float", "object"],
)
def test_predictions_are_labels_of_the_given_type(
    make: Callable[..., KernelClassifier], fitted: KernelClassifier, labels: Any, words: Any
) -> None:
    classifier = make(label_words=words).fit(TEXTS, labels)
    assert classifier.classes_.dtype == np.asarray(labels).dtype
    assert classifier.predict(TEXTS).tolist() == list(labels)
    assert np.array_equal(classifier.predict_logits(TEXTS), fitted.predict_logits(TEXTS))
    assert classifier.score(TEXTS, labels) == 1.0


def test_label_words_of_a_mapping_decide_the_order_of_the_logits(
    make: Callable[..., KernelClassifier], fitted: KernelClassifier
) -> None:
    turned = make(label_words=dict(reversed(WORDS.items()))).fit(TEXTS, LABELS)
    assert turned.classes_.tolist() == ["good", "bad"] and fitted.classes_.tolist() == ["bad", "good"]
    assert np.allclose(turned.kernel()[:, ::-1, :, ::-1], fitted.kernel(), rtol=1e-5)
    assert turned.predict(TEXTS).tolist() == LABELS


def test_cross_validation_and_grid_search_choose_formula_and_regularization(
    make: Callable[..., KernelClassifier],
) -> None:
    texts, labels = TEXTS + [text + " film" for text in TEXTS], LABELS * 2
    scores = cross_val_score(make(), texts, labels, cv=2, error_score="raise")
    assert scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()
    grid = {"formula": ["sgd", "signgd"], "kernel_regularization": [0.0, 0.1]}
    search = GridSearchCV(make(), grid, cv=2, error_score="raise").fit(texts, labels)
    assert search.best_params_.keys() == grid.keys()
    assert set(search.predict(texts)) <= set(labels)


def test_a_pickle_predicts_the_same_and_notices_another_model(
    place: Workplace, make: Callable[..., KernelClassifier], tmp_path: Path
) -> None:
    folder = shutil.copytree(place.model, tmp_path / "model")
    classifier = make(model=folder, solver="logistic").fit(TEXTS, LABELS)
    wanted = classifier.predict_logits(["a dull film"])
    assert len(pickle.dumps(classifier)) < 100_000  # no weights
    # What pickle does, which the checks of scikit-learn go through too, without reading a pickle here.
    assert copy.deepcopy(classifier).predict_logits(["a dull film"]).tobytes() == wanted.tobytes()
    save_tiny_checkpoint("roberta", folder, seed=1)
    with pytest.raises(ModelError, match="fit"):
        copy.deepcopy(classifier).predict(["a dull film"])


@pytest.mark.parametrize("stage", ["kernel", "logits"])
def test_a_second_fit_that_is_interrupted_leaves_the_first(
    make: Callable[..., KernelClassifier], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    classifier = make().fit(TEXTS, LABELS)
    wanted = classifier.predict_logits(["a dull film"])
    classifier.set_params(binary_classification=True, adjust_for_init=True, label_words=["great", "terrible"])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PromptKernel, stage, interrupt)
        classifier.fit(TEXTS[::-1], [1, 0, 1, 0])
    assert classifier.classes_.tolist() == ["bad", "good"]
    assert classifier.predict_logits(["a dull film"]).tobytes() == wanted.tobytes()
    assert classifier.predict(TEXTS).tolist() == LABELS


def test_random_numbers_of_the_caller_go_on_and_logs_stay_quiet(
    make: Callable[..., KernelClassifier], capfd: pytest.CaptureFixture[str]
) -> None:
    np.random.seed(3)
    torch.manual_seed(3)
    wanted = np.random.RandomState(3).rand(), torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
    make().fit(TEXTS, LABELS).predict(TEXTS)
    assert (np.random.rand(), torch.rand(1).item()) == wanted
    assert capfd.readouterr() == ("", "")


def test_longer_texts_than_those_of_fit_are_predicted(fitted: KernelClassifier) -> None:
    assert fitted.predict_logits(["the film was great " * 12]).shape == (1, 2)


# One sentence for each mistake -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "texts", "labels", "error", "fact"),
    [
        ({"formula": "sdg"}, TEXTS, LABELS, UsageError, "`formula`: .*did you mean 'sgd'"),
        ({"solver": "ridge"}, TEXTS, LABELS, UsageError, "`solver`"),
        ({"solver": "asym"}, TEXTS, LABELS, UsageError, "solver"),
        ({"formula": "asymmetric_signgd"}, TEXTS, LABELS, SettingError, "`binary_classification=True`"),
        ({"kernel_regularization": -1.0}, TEXTS, LABELS, UsageError, "kernel_regularization"),
        ({"kernel_dtype": "half"}, TEXTS, LABELS, SettingError, "`kernel_dtype`"),
        ({"kernel_dtype": "bfloat16", "formula": "signgd"}, TEXTS, LABELS, SettingError, "takes signs of gradients"),
        ({"kernel_dtype": "bfloat16", "kernel_engine": "jvp"}, TEXTS, LABELS, SettingError, "take another engine"),
        ({"kernel_memory_gb": 1e-9}, TEXTS, LABELS, SettingError, "`kernel_memory_gb`"),
        ({"template": None}, TEXTS, LABELS, SettingError, "`template`"),
        ({"template": "*cls**sent_0*"}, TEXTS, LABELS, UsageError, "mask"),
        ({"template": TEMPLATE + "*sent_1*"}, TEXTS, LABELS, UsageError, "sent_1"),
        ({"label_words": None}, TEXTS, LABELS, SettingError, "`label_words`"),
        ({"label_words": "great"}, TEXTS, LABELS, SettingError, "`label_words`"),
        ({"label_words": ["terrible"]}, TEXTS, LABELS, SettingError, "holds 1 words"),
        ({"label_words": ["great", "great"]}, TEXTS, LABELS, UsageError, "same token"),
        ({"label_words": ["great", "unheardof"]}, TEXTS, LABELS, UsageError, "unheardof"),
        ({}, TEXTS, ["bad", "good", "odd", "good"], DataError, "example 2 .*'odd'.*`label_words`"),
        ({}, TEXTS, ["bad"] * 4, DataError, "two classes"),
        ({}, TEXTS, LABELS[:3], DataError, "each of the 4 texts"),
        ({}, TEXTS, [0.5, 1.5, 2.5, 3.5], DataError, "continuous"),
        ({}, TEXTS, ["bad", None, "bad", "good"], DataError, "example 1 .*no label"),
        ({}, [], [], DataError, "no examples"),
        ({}, "a film", ["bad"], DataError, "list of strings"),
        ({}, [*TEXTS[:3], 4.0], LABELS, DataError, "example 3"),
        ({}, [*TEXTS[:3], None], LABELS, DataError, "example 3"),
        ({}, [*TEXTS[:3], "a \ud800"], LABELS, DataError, "example 3"),
        ({}, [(TEXTS[0], "more"), *TEXTS[1:]], LABELS, DataError, "example 1 .*1 sentences"),
        ({"task_name": "sst-3"}, TEXTS, LABELS, UsageError, "did you mean"),
        ({"task_name": "sts-b"}, TEXTS, LABELS, SettingError, "regression"),
        ({"task_name": "mnli", "label_words": None}, TEXTS, LABELS, SettingError, "2 sentences"),
        ({"projection_tolerance": 0.1}, TEXTS, LABELS, SettingError, "is for `kernel_engine=projected`"),
        ({**PROJECTED, "projection_check": 1}, TEXTS, LABELS, SettingError, "is always measured"),
        ({**PROJECTED, "projection_tolerance": 0.0}, TEXTS, LABELS, SettingError, "not an error that an estimate"),
        ({**PROJECTED, "projection_tolerance": 1e-9}, TEXTS, LABELS, SettingError, "not reached by projecting"),
        ({"model": "no/such/folder"}, TEXTS, LABELS, UsageError, "no/such/folder"),
        ({"model": torch.nn.Linear(1, 1)}, TEXTS, LABELS, ModelError, "Linear"),
    ],
)
def test_each_mistake_has_one_sentence_that_names_the_argument(
    make: Callable[..., KernelClassifier], arguments: Any, texts: Any, labels: Any, error: type, fact: str
) -> None:
    with pytest.raises(error, match=fact) as caught:
        make(**arguments).fit(texts, labels)
    assert "\n" not in str(caught.value)


def test_models_without_a_head_or_a_tokenizer_are_refused(place: Workplace) -> None:
    lm = AutoModelForMaskedLM.from_pretrained(place.model)
    with pytest.raises(SettingError, match="`tokenizer`"):
        KernelClassifier(lm, template=TEMPLATE, label_words=WORDS).fit(TEXTS, LABELS)
    bare = RobertaModel(lm.config)
    with pytest.raises(ModelError, match="RobertaModel"):
        KernelClassifier(bare, template=TEMPLATE, label_words=WORDS).fit(TEXTS, LABELS)


@pytest.mark.parametrize("method", ["predict", "predict_logits", "kernel"])
def test_nothing_is_predicted_before_fit(make: Callable[..., KernelClassifier], method: str) -> None:
    with pytest.raises(NotFittedError):
        getattr(make(), method)(TEXTS)


def test_texts_to_predict_have_as_many_sentences_as_those_of_fit(fitted: KernelClassifier) -> None:
    with pytest.raises(DataError, match="2 sentences"):
        fitted.predict([("one", "two")])


# scikit-learn's own checks -----------------------------------------------------------------------------------------


class OnNumbers(KernelClassifier):
    """Takes rows of numbers, as scikit-learn's checks have them, for texts: a word for each number."""

    def __init__(self, model: str = "set below") -> None:
        super().__init__(model, template=TEMPLATE, use_cpu=True)

    def fit(self, X: Any, y: Any) -> "OnNumbers":
        return super().fit(words_of(X), y)

    def predict_logits(self, X: Any) -> np.ndarray:
        return super().predict_logits(words_of(X))

    def _task(self, labels: np.ndarray, num_sentences: int) -> Any:
        words = ["terrible", "great", "good", "bad", "okay"][: len(np.unique(labels))]
        return KernelClassifier(self.model, template=TEMPLATE, label_words=words)._task(labels, num_sentences)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True  # else scikit-learn checks nothing
        return tags


def words_of(rows: Any) -> list[str]:
    vocabulary = ("film", "story", "plot", "actor", "city", "people", "boring", "funny", "moving", "dull", "slow", "he")
    return [" ".join(vocabulary[int(10 * number) % 12] for number in row[:8]) for row in np.asarray(rows, dtype=float)]


NOT_OF_TEXTS = {
    "check_classifiers_one_label": "labels of one class are an error here",
    "check_classifiers_train": "asks for errors about the shape of arrays of numbers, and for accuracy on numbers",
    "check_n_features_in_after_fitting": "texts have no features",
    "check_estimator_sparse_tag": "texts are not sparse matrices",
    "check_estimator_sparse_array": "texts are not sparse matrices",
    "check_estimator_sparse_matrix": "texts are not sparse matrices",
    "check_estimators_nan_inf": "texts are not numbers",
    "check_fit2d_1sample": "one text has one class, which is an error here",
    "check_parameters_default_constructible": "a model has no default",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_checks_of_scikit_learn_that_make_sense_for_texts(place: Workplace) -> None:
    results = estimator_checks.check_estimator(
        OnNumbers(str(place.model)), expected_failed_checks=NOT_OF_TEXTS, on_fail=None, on_skip=None
    )
    failed = {result["check_name"]: result["exception"] for result in results if result["status"] == "failed"}
    assert failed == {}
    assert {"check_fit_idempotent", "check_estimators_pickle"} <= {
        result["check_name"] for result in results if result["status"] == "passed"
    }


@pytest.mark.parametrize("wrong", [{"template": 3}, {"kernel_regularization": "much"}], ids=str)
def test_an_argument_of_another_type_is_a_setting_error(place: Workplace, wrong: dict[str, Any]) -> None:
    (setting,) = wrong
    classifier = KernelClassifier(
        str(place.model), **({"template": "*sent_0**mask*", "label_words": ["terrible", "great"]} | wrong)
    )
    with pytest.raises(SettingError) as error:
        classifier.fit(["a film", "a plot"], [0, 1])
    assert error.value.data["setting"] == setting


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kernel_gamma": "auto"}, "`kernel_gamma` has no effect without `solver='asym'`"),
        ({"kernel_lambda": [0.1, 0.2]}, "`kernel_lambda` has no effect without `solver='asym'`"),
        ({"f0_scaling": "auto"}, "`f0_scaling` has no effect without `adjust_for_init=True`"),
        ({"f0_scaling": "auto", "adjust_for_init": True}, None),
        ({"kernel_gamma": np.int64(2)}, None),
    ],
)
def test_candidates_that_the_solver_does_not_use_are_told(
    caplog: pytest.LogCaptureFixture, given: dict[str, Any], words: str | None
) -> None:
    check_selection(KernelClassifier("anywhere", **given))
    assert [message.partition(",")[0] for message in caplog.messages] == ([] if words is None else [words])


@pytest.mark.parametrize("binary", [False, True])
def test_leave_one_out_and_influence_are_those_of_solving_again(
    make: Callable[..., KernelClassifier], binary: bool
) -> None:
    classifier = make(kernel_regularization=0.1, adjust_for_init=True, f0_scaling=10, binary_classification=binary).fit(
        TEXTS, LABELS
    )
    f0 = classifier._prompts.logits(classifier._prompts.train).astype(np.float64) / 10
    classes = np.array([LABELS.index(label) for label in LABELS])
    wanted = (2.0 * classes - 1)[:, None] if binary else np.eye(2)[classes]
    texts = ["a dull plot", *TEXTS]
    flat, columns = (kernel.reshape(wanted.size, -1) for kernel in (classifier.train_kernel_, classifier.kernel(texts)))
    ridged = flat + 0.1 * np.linalg.norm(flat, 2) * np.eye(len(flat))

    def predict(kept: np.ndarray) -> np.ndarray:
        alpha = np.linalg.solve(ridged[kept][:, kept], (wanted - f0).reshape(-1)[kept])
        return (columns[kept].T @ alpha).reshape(len(texts), -1)

    whole, found = predict(np.ones(len(flat), dtype=bool)), classifier.influence(texts)
    assert found.shape == (4, 5, 1 if binary else 2)
    for index in range(4):
        left = predict(np.repeat(np.arange(4) != index, found.shape[2]))
        np.testing.assert_allclose(found[index], whole - left, rtol=0, atol=1e-9)
        np.testing.assert_allclose(classifier.loo_[index], left[1 + index] + f0[index], rtol=0, atol=1e-6)
    again = copy.copy(classifier)
    again.__setstate__(classifier.__getstate__())
    np.testing.assert_array_equal(again.loo_, classifier.loo_)


def test_leave_one_out_that_is_not_defined_is_an_error_that_says_why(make: Callable[..., KernelClassifier]) -> None:
    other = make(solver="svr").fit(TEXTS, LABELS)
    with pytest.raises(SolverError, match="solver='lstsq'"):
        _ = other.loo_
    singular = make().fit([*TEXTS, *TEXTS], [*LABELS, *LABELS])
    with pytest.raises(SolverError, match="take `kernel_regularization=0.001`"):
        singular.influence(TEXTS)
    for classifier in (other, singular):
        assert not hasattr(classifier, "loo_")
        assert "loo_" not in dict(inspect.getmembers(classifier))
    for attribute in ("loo_", "parts_"):
        with pytest.raises(NotFittedError):
            getattr(make(), attribute)


@pytest.mark.parametrize(
    "arguments",
    [{"binary_classification": True, "adjust_for_init": True}, {"formula": "signgd", "kernel_engine": "jacobian"}],
    ids=["binary", "signgd"],
)
def test_the_deviation_of_logits_is_that_of_the_joint_gaussian(
    make: Callable[..., KernelClassifier], arguments: dict[str, Any]
) -> None:
    """The joint kernel is that of a classifier fitted to all texts."""
    given = arguments | {"kernel_regularization": 0.1, "kernel_dtype": "float64"}
    classifier = make(**given).fit(TEXTS, LABELS)
    texts = ["a dull plot", "funny"]
    found = classifier.predict_std(texts)
    joint = make(**given).fit([*TEXTS, *texts], [*LABELS, "bad", "good"]).train_kernel_
    c = joint.shape[1]
    n, flat = len(TEXTS) * c, joint.reshape(6 * c, -1)
    inverse = np.linalg.inv(flat[:n, :n] + 0.1 * np.linalg.norm(flat[:n, :n], 2) * np.eye(n))
    classes = np.array([0, 1, 0, 1])
    targets = (2.0 * classes - 1)[:, None] if c == 1 else np.eye(2)[classes]
    if classifier.adjust_for_init:
        targets = targets - classifier._prompts.logits(classifier._prompts.train)
    y = targets.reshape(-1)
    covariance = y @ inverse @ y / n * (flat[n:, n:] - flat[n:, :n] @ inverse @ flat[:n, n:])
    assert found.dtype == np.float64 and found.shape == (2, c)
    np.testing.assert_allclose(found, np.sqrt(np.diag(covariance)).reshape(2, c), rtol=1e-9)


def test_a_deviation_that_is_not_defined_is_an_error_that_says_why(make: Callable[..., KernelClassifier]) -> None:
    for arguments, times, said in (
        ({"solver": "svr"}, 1, "`predict_std` is in closed form for `solver='lstsq'` alone"),
        ({}, 2, "take `kernel_regularization=0.001`"),
        ({"formula": "asymmetric_signgd", "binary_classification": True}, 1, "take `formula=sgd` or signgd"),
    ):
        with pytest.raises(SolverError) as caught:
            make(**arguments).fit(TEXTS * times, LABELS * times).predict_std(TEXTS)
        assert said in str(caught.value)


def test_parts_sum_to_the_kernel_and_a_word_that_is_no_key_is_named(make: Callable[..., KernelClassifier]) -> None:
    classifier = make(kernel_parts="kind,layer").fit(TEXTS, LABELS)
    assert {"embeddings/norm", "layer.1/query", "head/head"} <= classifier.parts_.keys()
    np.testing.assert_allclose(sum(classifier.parts_.values()), classifier.train_kernel_, rtol=1e-12)
    alone = make(exclude_embeddings=True, exclude_head=True, exclude_first_layers=1, only_biases=True)
    biases = make(kernel_parts="layer,weight-or-bias").fit(TEXTS, LABELS).parts_["layer.1/bias"]
    np.testing.assert_allclose(biases, alone.fit(TEXTS, LABELS).train_kernel_, rtol=1e-5)
    for wrong in ({"kernel_parts": "colour"}, {"kernel_parts": " "}, {"kernel_parts": "kind", "kernel_engine": "jvp"}):
        with pytest.raises(SettingError) as caught:
            make(**wrong).fit(TEXTS, LABELS)
        assert caught.value.data["setting"] == "kernel_parts"


def test_the_error_of_an_estimate_is_that_of_its_kernel_and_a_tolerance_chooses_its_width(
    make: Callable[..., KernelClassifier], fitted: KernelClassifier
) -> None:
    assert fitted.projection_error_ is None
    exact = make(kernel_dtype="float64").fit(TEXTS, LABELS).train_kernel_
    narrow, wide = (make(**PROJECTED, projection_width=width).fit(TEXTS, LABELS) for width in (8, 12))
    for classifier in (narrow, wide):
        error = np.linalg.norm(classifier.train_kernel_ - exact) / np.linalg.norm(exact)
        assert classifier.projection_error_["own"] == pytest.approx(error, rel=1e-3)
    found = [
        max(c.projection_error_["own"], sum(map(c.projection_error_.get, ("mean", "std")))) for c in (narrow, wide)
    ]
    tolerance = sum(found) / 2
    chosen = make(**PROJECTED, projection_tolerance=tolerance).fit(TEXTS, LABELS)
    assert np.array_equal(chosen.train_kernel_, wide.train_kernel_)
    assert chosen.projection_width is None, "the argument stays as it was given"
    assert np.array_equal(chosen.predict_logits(TEXTS), wide.predict_logits(TEXTS))
    with pytest.raises(SettingError, match="take `projection_width=12`"):
        make(**PROJECTED, projection_width=8, projection_tolerance=tolerance).fit(TEXTS, LABELS)


def test_a_kernel_of_bfloat16_is_that_of_float64_up_to_a_percent(make: Callable[..., KernelClassifier]) -> None:
    exact, rounded = (make(kernel_dtype=dtype).fit(TEXTS, LABELS) for dtype in ("float64", "bfloat16"))
    error = np.linalg.norm(rounded.train_kernel_ - exact.train_kernel_) / np.linalg.norm(exact.train_kernel_)
    assert rounded.train_kernel_.dtype == np.float64 and 1e-5 < error < 3e-2
    assert set(rounded.predict(TEXTS)) <= set(LABELS)
