"""--as_published and the settings behind it: each takes the published program's numbers, and says so."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

from command_line import Workplace, read_kernel, read_results, read_tensors, sst2_rows, write_rows
from doc_commands import argv_of, calls, make_stand_in, page_text
from kernel_folders import Folder
from lmntk import solvers
from lmntk.config.arguments import parse_arguments
from lmntk.config.as_published import ROWS
from lmntk.config.validation import published_changes
from lmntk.experiment.build import build
from lmntk.prompts.features import sampled_order
from lmntk.solvers import lbfgs
from lmntk.solvers.problem import SolverSettings
from lmntk.trainers.finetune import FineTuneTrainer
from lmntk.trainers.linear_head import HeadSettings, fit_linear_head
from tiny_models import save_tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:sklearn")

TEN = [((f"a great film {i}", "a terrible bore !")[i % 2], str(i % 2)) for i in range(10)]
PUBLISHED = SolverSettings(flattened_targets=True, plain_lbfgs=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("as published"))
    save_tiny_checkpoint("bert", place.folder / "bert")
    write_rows(place.folder / "ten" / "train.tsv", [("sentence", "label"), *TEN])
    for split, number in (("train", 4), ("dev", 4), ("test", 6)):
        rows = [[str(i), f"{text} as it was", text, ("entailment", "not_entailment")[i % 2]]
                for i, (text, _) in enumerate(sst2_rows(number, split))]  # fmt: skip
        write_rows(place.folder / "RTE" / f"{split}.tsv", [["index", "sentence1", "sentence2", "label"], *rows])
    return place


def parsed(place: Workplace, *flags: str) -> Any:
    return parse_arguments(place.argv(*flags))


def told(place: Workplace, *flags: str) -> list[str]:
    return published_changes(*parsed(place, "--as_published", *flags))


def test_the_commands_of_the_page_are_understood(tmp_path: Path) -> None:
    page = page_text("as-published")
    stand_in = make_stand_in(tmp_path)
    found = [parse_arguments(argv_of(call, stand_in))[2] for call in calls(page)]
    assert [training.kernel_solver for training in found] == ["logistic", "lstsq", "lstsq"]
    assert [training.linear_head_halved for training in found] == [True, True, True]
    assert [training.as_published for training in found] == [True, True, False]


# What is chosen, and what is said of it.


def test_without_the_flag_nothing_is_published_and_nothing_is_said(place: Workplace) -> None:
    arguments = parsed(place)
    assert arguments[2].kernel_solver == "lstsq" and published_changes(*arguments) == []


def test_one_flag_takes_every_published_value(place: Workplace) -> None:
    flags = {name: value for group in parsed(place, "--as_published") for name, value in vars(group).items()}
    assert {row.flag: flags[row.flag] for row in ROWS} == {
        "linear_head_halved": True,
        "linear_head_order": "sampler",
        "kernel_solver": "logistic",
        "flattened_targets": True,
        "plain_lbfgs": True,
        "save_logit_pairs": True,
        "segments": False,
        "clip_frozen": True,
        "decay_head_norm": True,
        "task_defaults": False,
        "truncate_demonstrations_only": True,
        "use_full_length": False,
        "num_demo": 1,
        "lr_scheduler_type": "linear",
        "eval_steps": None,
    }


@pytest.mark.parametrize("order", [["--as_published"], ["--kernel_solver", "lstsq", "--as_published"]])
def test_a_flag_on_the_command_line_beats_the_published_value(place: Workplace, order: list[str]) -> None:
    training = parsed(place, *order, "--kernel_solver=svr", "--segments", "--linear_head_order", "file")[2]
    assert (training.kernel_solver, training.linear_head_order, training.linear_head_halved) == ("svr", "file", True)
    assert parsed(place, *order, "--segments")[0].segments and parsed(place, *order, "--task_defaults")[1].task_defaults


def test_what_the_published_program_never_reads_counts_for_nothing(place: Workplace) -> None:
    _, data, training = parsed(
        place, "--as_published", "--num_demo", "3", "--use_full_length", "--eval_steps", "5", "--few_shot_type",
        "prompt-demo", "--trainer", "standard", "--lr_scheduler_type", "constant",
    )  # fmt: skip
    assert (data.num_demo, data.use_full_length, training.eval_steps) == (1, False, None)
    assert training.lr_scheduler_type == "linear"
    sentences = published_changes(*parsed(place, "--as_published", "--few_shot_type", "prompt-demo", "--num_demo", "3"))
    assert "--as_published: --num_demo is not read (as without --num_demo)" in sentences


def test_only_settings_that_matter_to_the_command_are_told(place: Workplace) -> None:
    assert told(place, "--kernel_solver", "lstsq") == []
    assert told(place) == [
        "--as_published: the solver is logistic regression (--kernel_solver logistic)",
        "--as_published: one model of two classes is fitted to the flattened kernel, and the largest of its logits "
        "predicts (--flattened_targets)",
        "--as_published: logistic regression takes the weights at which L-BFGS ends, also short of the minimum "
        "(--plain_lbfgs)",
    ]
    assert told(place, "--binary_classification", "--plain_lbfgs") == [told(place)[0]]
    assert told(place, "--trainer", "linearhead", "--plain_lbfgs") == [
        "--as_published: the linear head gets half the log-odds of a fit with twice the C (--linear_head_halved)",
        "--as_published: the linear head is cross-validated on the examples in the training sampler's order "
        "(--linear_head_order sampler)",
    ]
    assert told(place, "--no_train") == []


def test_fine_tuning_tells_of_its_settings_and_that_adamw_is_not_the_published_one(place: Workplace) -> None:
    sentences = told(place, "--trainer", "standard", "--fix_layers", "1", "--weight_decay", "0.1")
    assert [sentence[-20:] for sentence in sentences[:2]] == ["lipped (--clip_frozen)"[-20:], " (--decay_head_norm)"]
    assert "AdamW is torch's all the same" in sentences[2] and len(sentences) == 3
    assert told(place, "--trainer", "standard", "--optimizer", "sgd") == []


def test_a_run_says_at_its_start_what_it_changes_and_records_it(place: Workplace) -> None:
    bert = ["--model_name_or_path", str(place.folder / "bert"), "--task_name", "rte", "--no_train"]
    argv = place.argv(*bert, "--data_dir", str(place.folder / "RTE"), "--as_published", output="told")
    outcome = place.call(argv)
    assert (outcome.status, outcome.err) == (0, "")
    assert "the general ones, not the task's own (--no_task_defaults)" in outcome.messages
    assert "BERT is not told which sentence a token belongs to (--no_segments)" in outcome.messages
    record = place.last_record()
    assert record["as_published"] is True and record["segments"] is False and record["first_sent_limit"] is None


# Linear heads.


def softmax_of_two_rows(features: np.ndarray, classes: np.ndarray, c: float) -> tuple[np.ndarray, float]:
    """w₁ of softmax (w₀, w₁) with C Σ loss + (‖w₀‖² + ‖w₁‖²) / 2, by Newton's method from scikit-learn's binary fit."""
    binary = LogisticRegression(C=2 * c, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(features, classes)
    u, b = binary.coef_[0], binary.intercept_[0]
    # The gradient of that objective at w₁ = u / 2 = -w₀.
    errors = expit(features @ u + b) - classes
    assert np.abs(c * errors @ features + u / 2).max() < 1e-7 and abs(errors.sum()) < 1e-7
    return u / 2, b / 2


def test_two_rows_are_half_of_a_binary_fit_with_twice_the_c() -> None:
    rng = np.random.default_rng(0)
    classes = np.arange(20) % 2
    features = rng.normal(size=(20, 6)) + classes[:, None]
    weights, intercepts = lbfgs.fit_two_rows(features, classes, 5)
    # Of the list of Cs that which predicts best, the first among equals.
    accuracies = []
    for c in np.logspace(-4, 4, 10):
        fits = [(LogisticRegression(C=2 * c, tol=1e-8).fit(features[a], classes[a]), b)
                for a, b in StratifiedKFold(5).split(features, classes)]  # fmt: skip
        accuracies.append(np.mean([model.score(features[b], classes[b]) for model, b in fits]))
    u, b = softmax_of_two_rows(features, classes, np.logspace(-4, 4, 10)[int(np.argmax(accuracies))])
    # L-BFGS ends where no entry of the gradient is above 1e-4.
    assert np.abs(weights[0] - u).max() < 1e-2 * np.abs(u).max() and abs(intercepts[0] - b) < 1e-2 * np.abs(u).max()


def test_two_rows_end_where_scikit_learn_1_4_ended() -> None:
    # LogisticRegressionCV(max_iter=5000, multi_class="multinomial", random_state=0) of scikit-learn 1.4.2 on these.
    classes = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 0])
    features = np.array([[np.sin(3 * i + j) + classes[i] * (j == 0), np.cos(i * j + 1)][j % 2] for i in range(10)
                         for j in range(3)]).reshape(10, 3)  # fmt: skip
    weights, intercepts = lbfgs.fit_two_rows(features, classes, 5)
    np.testing.assert_allclose(weights, [[1.145351358342446, -0.4806407346982841, 0.7728049712957338]], rtol=1e-6)
    np.testing.assert_allclose(intercepts, [-0.7349156422391585], rtol=1e-6)


def head_of(place: Workplace, *flags: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The two rows and biases of a fitted head, and what it was fitted to."""
    arguments = parsed(place, "--data_dir", str(place.folder / "ten"), "--trainer", "linearhead", *flags)
    arguments[2].do_eval = arguments[2].do_predict = False
    run = build(*arguments)
    assert run.model is not None
    data = run.datasets["train"]
    batch = run.collator(data.features)
    features = run.model.last_layer_inputs({name: value for name, value in batch.items() if name != "labels"})
    fit_linear_head(run, torch.device("cpu"), HeadSettings.of(arguments[2]))
    layer, rows = run.model.last_layer, run.model._class_rows()
    head = layer.weight[rows].detach().double().numpy(), layer.bias[rows].detach().double().numpy()
    return *head, features.double().numpy(), np.array(data.labels)


def test_the_published_head_predicts_half_of_the_fitted_log_odds(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lbfgs, "CS", np.array([100.0]))
    weights, biases, features, classes = head_of(place, "--as_published", "--seed", "3")
    order = sampled_order(10, 3)
    row, intercept = lbfgs.fit_two_rows(features[order], classes[order], 5)
    # float32 features of another batch move where L-BFGS ends by up to some thousandths.
    np.testing.assert_allclose(weights, np.concatenate([-row, row]) / 2, atol=5e-3 * np.abs(row).max())
    np.testing.assert_allclose(biases, np.concatenate([-intercept, intercept]) / 2, atol=5e-3 * np.abs(row).max())
    u, _ = softmax_of_two_rows(features, classes, 100.0)
    assert np.abs(weights[1] - u / 2).max() < 2e-2 * np.abs(u).max()


def test_the_sampler_hands_examples_out_in_the_order_of_the_stock_trainer(place: Workplace) -> None:
    flags = "--trainer", "standard", "--data_dir", str(place.folder / "ten"), "--seed", "5", "--no_predict"
    model_args, data_args, training_args = parsed(place, *flags)
    training_args.do_eval = False
    run = build(model_args, data_args, training_args)
    features = run.datasets["train"].features
    handed = [row for batch in FineTuneTrainer(run, model_args, training_args).get_train_dataloader()
              for row in batch["input_ids"].tolist()]  # fmt: skip
    pad = run.tokenizer.pad_token_id
    stripped = [[token for token in row if token != pad] for row in handed]
    assert stripped == [features[index].input_ids for index in sampled_order(10, 5)]


def test_demonstrations_of_a_published_head_are_drawn_in_the_samplers_order(place: Workplace) -> None:
    flags = "--few_shot_type", "prompt-demo", "--trainer", "linearhead", "--data_dir", str(place.folder / "ten")
    drawn = {}
    for order in ("file", "sampler"):
        arguments = parsed(place, *flags, "--linear_head_order", order, "--seed", "3")
        arguments[2].do_eval = arguments[2].do_predict = False
        drawn[order] = [feature.input_ids for feature in build(*arguments).datasets["train"].features]
    generator = np.random.RandomState(3)
    permutations = [generator.permutation(9) for _ in range(10)]
    first = {}
    for visit, example in enumerate(sampled_order(10, 3)):
        others = [index for index in range(10) if index != example]
        order_of_others = [others[place] for place in permutations[visit]]
        first[example] = [next(index for index in order_of_others if index % 2 == label) for label in (0, 1)]
    texts = [text for text, _ in TEN]
    run_tokenizer = build(*arguments).tokenizer
    for example, ids in enumerate(drawn["sampler"]):
        text = run_tokenizer.decode(ids)
        assert all(texts[index] in text for index in [example, *first[example]])
    assert drawn["file"] != drawn["sampler"]


# Solvers.


@pytest.mark.parametrize("logits", [2, 3])
def test_flattened_logistic_is_one_model_of_two_classes_on_all_rows(tmp_path: Path, logits: int) -> None:
    folder = Folder(tmp_path, logits=logits)
    kernel, cross = folder.kernel("train"), folder.kernel("dev")
    classes, x_classes = folder.classes["train"], folder.classes["dev"]
    fitted = solvers.fit("logistic", kernel, classes, PUBLISHED)
    prediction = fitted.predict(cross, x_classes)
    size = 8 * logits
    rows, x_rows = np.eye(logits, dtype=int)[classes].ravel(), np.eye(logits, dtype=int)[x_classes].ravel()
    model = LogisticRegressionCV(
        max_iter=10000, random_state=0, cv=5, l1_ratios=(0.0,), scoring="accuracy", use_legacy_attributes=False
    ).fit(kernel.reshape(size, size), rows)
    log_odds = model.decision_function(cross.reshape(size, -1).T)
    np.testing.assert_allclose(prediction.logits, log_odds.reshape(6, logits), rtol=1e-6, atol=1e-8)
    assert prediction.loss == pytest.approx(-np.mean(np.log(expit(np.where(x_rows == 1, log_odds, -log_odds)))))


@pytest.mark.parametrize("logits", [2, 3])
def test_flattened_svc_decides_each_row_and_the_first_largest_predicts(tmp_path: Path, logits: int) -> None:
    folder = Folder(tmp_path, logits=logits)
    classes, x_classes = folder.classes["train"], folder.classes["dev"]
    prediction = solvers.fit("svc", folder.kernel("train"), classes, PUBLISHED).predict(folder.kernel("dev"), x_classes)
    size = 8 * logits
    rows, x_rows = np.eye(logits)[classes].ravel(), np.eye(logits)[x_classes].ravel()
    model = SVC(kernel="precomputed").fit(folder.kernel("train").reshape(size, size), rows)
    decisions = 2 * model.predict(folder.kernel("dev").reshape(size, -1).T) - 1
    assert prediction.logits.tolist() == decisions.reshape(6, logits).tolist()
    # Decisions of -1 and 1 against targets of 0 and 1, as the published program has it.
    assert prediction.loss == pytest.approx(np.mean((decisions - x_rows) ** 2))


@pytest.mark.parametrize("solver", ["logistic", "svc"])
def test_a_single_logit_is_solved_alike_with_and_without_flattened_targets(tmp_path: Path, solver: str) -> None:
    folder = Folder(tmp_path, logits=1)
    kernels = folder.kernel("train"), folder.kernel("dev")
    labels = folder.labels("train"), folder.labels("dev")
    found = [
        solvers.fit(solver, kernels[0], labels[0], SolverSettings(flattened_targets=flat)).predict(
            kernels[1], labels[1]
        )
        for flat in (False, True)
    ]
    assert found[0].logits.tolist() == found[1].logits.tolist() and found[0].loss == found[1].loss


# Loaded kernels: what a user of the published ones does.


def test_loaded_kernels_give_the_published_programs_result_files(tmp_path: Path) -> None:
    place, folder = Workplace(tmp_path / "place"), Folder(tmp_path, logits=2)
    for description in folder.path.glob("*.json"):
        description.unlink()  # the published program writes none
    flags = "--load_kernels", str(folder.path), "--data_dir", str(folder.data), "--as_published"
    out = place.run(*flags)
    flat = solvers.fit("logistic", folder.kernel("train"), folder.classes["train"], PUBLISHED)
    expected = flat.predict(folder.kernel("test"), folder.classes["test"])
    results = read_results(out / "test_results_sst-2.txt")
    hits = expected.logits.argmax(axis=1) == folder.classes["test"]
    assert results["eval_acc"] == pytest.approx(hits.mean()) and results["eval_loss"] == pytest.approx(expected.loss)
    out = place.run(*flags, "--kernel_solver", "lstsq", output="lstsq")
    matrix = folder.kernel("train").reshape(16, 16)
    alpha = np.linalg.lstsq(matrix, np.eye(2)[folder.classes["train"]].ravel(), rcond=None)[0]
    predicted = (folder.kernel("dev").reshape(16, -1).T @ alpha).reshape(-1, 2)
    results = read_results(out / "eval_results_sst-2.txt")
    loss = np.mean((predicted - np.eye(2)[folder.classes["dev"]]) ** 2)
    assert results["eval_loss"] == pytest.approx(loss) and results["rank0"] == 16


@pytest.mark.parametrize("published", [False, True])
def test_a_single_logit_is_saved_as_the_published_pair(tmp_path: Path, published: bool) -> None:
    place, folder = Workplace(tmp_path / "place"), Folder(tmp_path, logits=1)
    flags = "--load_kernels", str(folder.path), "--data_dir", str(folder.data), "--binary_classification"
    saving = "--save_logit", "--save_logit_dir", str(tmp_path / "logits"), "--kernel_solver", "lstsq"
    place.run(*flags, *saving, *["--as_published"] * published)
    saved = np.load(next((tmp_path / "logits").iterdir()))
    f = saved[:, -1:]
    assert saved.shape == (10, 1 + published) and np.abs(f).max() > 0
    np.testing.assert_array_equal(saved, np.concatenate([-f, f], axis=1) if published else f)


# What changes a kernel.


def bert_flags(place: Workplace, *flags: str) -> list[str]:
    return ["--model_name_or_path", str(place.folder / "bert"), "--task_name", "rte", "--data_dir",
            str(place.folder / "RTE"), "--kernel_solver", "lstsq", *flags]  # fmt: skip


def test_segments_that_are_not_passed_are_all_the_first(place: Workplace) -> None:
    plain = "*cls**sent-_0*?*mask*,*+sentl_1**sep*"  # its one segment never goes up
    one = place.run(*bert_flags(place, "--template", plain.replace("*sep*", "*sep+*"), "--no_segments"), output="s1")
    pairs = "*cls**sent_0**sep+**mask*,*+sentl_1**sep+*"
    without = place.run(*bert_flags(place, "--template", pairs, "--no_segments"), output="s2")
    passed = place.run(*bert_flags(place, "--template", pairs), output="s3")
    alike = place.run(*bert_flags(place, "--template", pairs.replace("sep+", "sep")), output="s4")
    kernels = {name: read_kernel(folder, "train", "rte") for name, folder in
               (("without", without), ("passed", passed), ("alike", alike))}  # fmt: skip
    assert torch.allclose(kernels["without"], kernels["alike"], rtol=1e-5)
    assert (kernels["without"] - kernels["passed"]).norm() > 1e-3 * kernels["passed"].norm()
    assert one.is_dir()


def test_a_kernel_without_segments_is_not_taken_for_one_with_them(place: Workplace) -> None:
    place.run(*bert_flags(place, "--no_segments"), output="kept")
    argv = place.argv(*bert_flags(place), output="kept")
    assert "segments: stored left out, now nothing" in place.call(argv).err
    loaded = place.argv(*bert_flags(place, "--load_kernels", str(place.folder / "kept")), output="loaded")
    assert "segments: stored left out, now nothing" in place.call(loaded).err
    outcome = place.call([*loaded, "--no_segments"])
    assert (outcome.status, outcome.err) == (0, "")
    place.run(*bert_flags(place), output="with")
    outcome = place.call(place.argv(*bert_flags(place, "--no_segments", "--load_kernels", str(place.folder / "with"))))
    assert "segments: stored nothing, now left out" in outcome.err


def test_other_models_kernels_do_not_ask_about_segments(place: Workplace) -> None:
    place.run("--kernel_solver", "lstsq", output="roberta")
    outcome = place.call(place.argv("--kernel_solver", "lstsq", "--no_segments", output="roberta"))
    assert (outcome.status, outcome.err) == (0, "")


def test_a_kernel_on_a_published_head_is_another_kernel(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lbfgs, "CS", np.array([100.0]))
    flags = ["--data_dir", str(place.folder / "ten"), "--from_linearhead", "--kernel_solver", "lstsq", "--do_eval",
             "False", "--do_predict", "False"]  # fmt: skip
    halved, full = (place.run(*flags, *more, output=name) for name, more in (("h", ["--as_published"]), ("f", [])))
    assert (read_kernel(halved, "train") - read_kernel(full, "train")).norm() > 0.1 * read_kernel(full, "train").norm()
    refusal = place.call(place.argv(*flags, output="h")).err
    assert "linear_head_halved: stored true, now nothing" in refusal
    assert "linear_head_order: stored sampler, seed 42, now nothing" in refusal
    loaded = place.call(place.argv(*flags, "--load_kernels", str(halved), output="h2"))
    assert "linear_head_halved: stored true, now nothing" in loaded.err


# Prompts.


def test_bare_commands_take_the_general_lengths_and_draws(place: Workplace) -> None:
    from lmntk.config.prompt_settings import resolve_prompts
    from lmntk.data.tasks import TASKS

    found = {}
    for name, few_shot_type in (("rte", "prompt"), ("mnli", "prompt"), ("snli", "prompt-demo"), ("mr", "prompt")):
        for flags in ([], ["--as_published"], ["--as_published", "--task_defaults", "True"]):
            data = parsed(place, "--task_name", name, *flags)[1]
            task = next(task for task in TASKS.values() if task.key == name)
            settings = resolve_prompts(task, data, None, few_shot_type)
            limits = settings.limits
            found[name, len(flags)] = (limits.max_seq_length, limits.first_sent_limit, limits.other_sent_limit,
                                       settings.num_demonstration_samples)  # fmt: skip
    assert found["rte", 0] == found["mnli", 0] == (256, 240, None, 1) == found["rte", 3]
    assert found["rte", 1] == found["mnli", 1] == found["mr", 1] == (128, None, None, 1)
    assert found["snli", 0] == (256, None, None, 4) and found["snli", 1] == (128, None, None, 16)
    assert found["mr", 0] == (128, 110, 50, 1) == found["mr", 3]


def test_the_head_is_truncated_with_demonstrations_only(place: Workplace) -> None:
    flags = "--template", "*cls**mask*:*+sent_0**sep+*", "--truncate_head", "--max_seq_length", "8", "--no_train"
    refused = place.call(place.argv(*flags, output="t1"))
    assert refused.status == 2 and "was cut away" in refused.err
    outcome = place.call(place.argv(*flags, "--as_published", output="t2"))
    assert (outcome.status, outcome.err) == (0, "")
    assert "--truncate_head counts for prompts with demonstrations only" in outcome.messages
    tail = place.run("--template", flags[1], "--max_seq_length", "8", "--no_train", output="t3")
    for name in ("test_predictions_sst-2.csv", "dev_predictions_sst-2.csv"):
        assert (tail / name).read_bytes() == (place.folder / "t2" / name).read_bytes()


# Fine-tuning.


def tuned(place: Workplace, *flags: str) -> tuple[FineTuneTrainer, Any]:
    model_args, data_args, training_args = parsed(
        place, "--trainer", "standard", "--do_predict", "False", "--do_eval", "False", *flags,
        "--output_dir", str(place.folder / "never written"),
    )  # fmt: skip
    run = build(model_args, data_args, training_args)
    return FineTuneTrainer(run, model_args, training_args), run


@pytest.mark.parametrize("published", [False, True])
def test_gradients_of_frozen_layers_count_in_the_clipped_norm_as_published(place: Workplace, published: bool) -> None:
    flags = ["--optimizer", "sgd", "--learning_rate", "0.1", "--max_grad_norm", "0.01", "--fix_layers", "1",
             "--max_steps", "1", "--save_strategy", "no", "--lr_scheduler_type", "constant",
             "--data_dir", str(place.folder / "ten"), "--per_device_train_batch_size", "10"]  # fmt: skip
    trainer, run = tuned(place, *flags, *(["--as_published"] if published else []))
    model = run.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    frozen = {name for name in before if ".embeddings." in name or ".layer.0." in name}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    change = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    assert all(not change[name].any() for name in frozen)
    moved = torch.stack([change[name].norm() for name in before.keys() - frozen]).norm()
    # The gradients at the start, one loss over all ten examples.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    model.requires_grad_(True)
    model.zero_grad()
    batch = run.collator(run.datasets["train"].features)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"})
    torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters() if parameter.grad is not None}
    own = torch.stack([norm for name, norm in norms.items() if name not in frozen]).norm()
    whole = torch.stack(list(norms.values())).norm() if published else own
    assert own > 0.01 and moved.item() == pytest.approx(0.1 * 0.01 * (own / whole).item(), rel=1e-3)


def test_weight_decay_spares_what_is_named_bias_or_layernorm_weight_as_published(place: Workplace) -> None:
    trainer, run = tuned(place)
    published, _ = tuned(place, "--as_published")
    usual = set(trainer.get_decay_parameter_names(run.model))
    assert set(published.get_decay_parameter_names(run.model)) - usual == {"lm.lm_head.layer_norm.weight"}
    assert not any("LayerNorm.weight" in name or "bias" in name for name in usual)


# Flags of transformers 4.4.


def test_old_flags_mean_what_they_meant(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    training = parsed(place, "--warmup_ratio", "0.25", "--logging_dir=logs", "--adafactor", "--group_by_len", "True")[2]
    assert training.get_warmup_steps(100) == 25 and training.optim == "adafactor"
    assert training.train_sampling_strategy == "group_by_length"
    import os

    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"
    assert parsed(place, "--warmup_ratio", "1")[2].get_warmup_steps(100) == 100
    assert parsed(place, "--warmup_ratio", "0.5", "--warmup_steps", "7")[2].get_warmup_steps(100) == 7


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--fp16_opt_level", "O1"], ["fp16_opt_level"]),
        (["--fp16_backend=amp", "--past_index", "-1"], ["fp16_backend", "past_index"]),
        (["--tpu_num_cores", "8", "--tpu_metrics", "False"], ["tpu_num_cores", "tpu_metrics_debug"]),
        (["--sharded_ddp", "--seed", "1"], ["sharded_ddp"]),
        (["--debug", "True"], ["tpu_metrics_debug"]),
        (["--debug=false"], ["tpu_metrics_debug"]),
        (["--debug"], ["tpu_metrics_debug"]),
        (["--debug", "underflow_overflow"], []),
    ],
)
def test_old_flags_to_which_nothing_answers_are_ignored_with_a_sentence(
    place: Workplace, flags: list[str], names: list[str]
) -> None:
    from lmntk.config.validation import unused_flags

    sentences = [line for line in unused_flags(*parsed(place, *flags)) if "is ignored" in line]
    assert [line.split()[0] for line in sentences] == [f"`{name}`" for name in names]


def test_old_flags_stand_in_configuration_files_too(place: Workplace) -> None:
    import json

    path = place.folder / "config.json"
    argv = place.argv()
    path.write_text(json.dumps({"debug": True, "warmup_ratio": 0.5, "fp16_backend": "auto", "past_index": -1}))
    training = parse_arguments([str(path), *argv])[2]
    assert (training.tpu_metrics_debug, training.warmup_steps, training.past_index) == ("True", 0.5, -1)


def test_batches_grouped_by_length_hold_prompts_of_like_length(place: Workplace) -> None:
    write_rows(place.folder / "lengths" / "train.tsv", [("sentence", "label"),
               *[("word " * (1 + 20 * (i % 2)), str(i % 2)) for i in range(40)]])  # fmt: skip
    trainer, run = tuned(place, "--group_by_length", "--data_dir", str(place.folder / "lengths"), "--max_seq_len", "64",
                         "--per_device_train_batch_size", "4")  # fmt: skip
    sampler = trainer._get_train_sampler()
    lengths = [len(feature.input_ids) for feature in run.datasets["train"].features]
    assert sampler.lengths == lengths and len(set(lengths)) == 2
    batches = [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]
    # Sorted in lots of two batches: of random batches nearly all would be as long as the longest prompt.
    assert len(batches) == 10 and batches.count(min(lengths)) >= 2


def test_adafactor_and_sgd_exclude_each_other(place: Workplace) -> None:
    outcome = place.call(place.argv("--trainer", "standard", "--adafactor", "--optimizer", "sgd"))
    assert outcome.status == 2 and "--adafactor and --optimizer sgd exclude each other" in outcome.err


def test_logits_of_the_untrained_model_are_those_without_segments(place: Workplace) -> None:
    folder = place.run(*bert_flags(place, "--as_published", "--template", "*cls**sent_0**sep+**mask*:*+sent_1*"),
                       output="logits")  # fmt: skip
    logits = read_tensors(folder / "test_logits_rte.pt")[0]
    again = place.run(*bert_flags(place, "--template", "*cls**sent_0**sep**mask*:*+sent_1*"), output="logits again")
    assert torch.allclose(logits, read_tensors(again / "test_logits_rte.pt")[0], atol=1e-5)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
