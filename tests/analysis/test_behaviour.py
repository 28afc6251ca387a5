"""Whether the kernel describes fine-tuning: numbers of a seed by hand, verdicts, and which runs belong together."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmntk.analysis.behaviour import (
    BehaviourRow,
    SeedBehaviour,
    Thresholds,
    Verdict,
    behaviour_row,
    seed_behaviour,
)
from lmntk.analysis.behaviour_tables import format_rows
from lmntk.analysis.kernel_distances import KernelDistances
from lmntk.errors import FileError, KernelMismatchError, NotFiniteError, SettingError, UsageError
from lmntk.storage.paths import RunPaths
from training_folders import logits_for, only_run, split_of, write_kernel_run, write_training

LABELS = [0, 1] * 5
ROUNDING = 1e-12  # of sums of a few float64 numbers


def flipped(labels: Sequence[int], wrong: int, classes: int = 2) -> list[int]:
    """Predictions of which the first few are wrong."""
    return [(label + 1) % classes if index < wrong else label for index, label in enumerate(labels)]


def kernel_at(step: int, rows: int = 4, logits: int = 2) -> np.ndarray:
    phi = np.random.default_rng(0).normal(size=(rows, logits, 30))
    moved = phi + 0.1 * step * np.random.default_rng(1).normal(size=phi.shape)
    return np.einsum("iaf,jbf->iajb", moved, moved)


def make_pair(folder: Path, *, pretrained: int = 5, linear: int = 2, tuned: int = 1, kernel: int = 2, **record: Any):
    """A training and a kernel run of ten test examples, by how many they have wrong."""
    train = split_of([0, 1, 0, 1], [[0.0, 0.0]] * 4)
    first = {"train": train, "test": split_of(LABELS, logits_for(flipped(LABELS, pretrained)))}
    after = split_of(LABELS, 3 * logits_for(flipped(LABELS, tuned)), 2 * logits_for(flipped(LABELS, linear)))
    training = write_training(
        folder / "tuned", {0: (first, kernel_at(0)), 9: ({"train": train, "test": after}, kernel_at(9))}
    )
    return training, write_kernel_run(folder / "kernel", LABELS, flipped(LABELS, kernel), **record)


def test_the_numbers_of_a_seed_are_those_computed_by_hand(tmp_path: Path) -> None:
    found = seed_behaviour(*make_pair(tmp_path))
    assert (found.task, found.metric, found.split, found.examples, found.seed) == ("sst-2", "acc", "test", 10, 42)
    assert (found.formula, found.optimizer, found.last_step) == ("sgd", "sgd", 9)
    assert (found.pretrained, found.kernel, found.linearised, found.finetuned) == (0.5, 0.8, 0.8, 0.9)
    assert found.kernel_with_f0 is None and found.constant == 0.5
    assert found.ratio == pytest.approx(8 / 9, rel=ROUNDING)
    assert found.recovery == pytest.approx(3 / 4, rel=ROUNDING)
    assert found.errors["kernel"] == pytest.approx(np.sqrt(0.8 * 0.2 / 10), rel=ROUNDING)
    assert found.errors["finetuned"] == pytest.approx(np.sqrt(0.9 * 0.1 / 10), rel=ROUNDING)
    # Of ten examples four are right only after fine-tuning: a variable that is 1 with probability 0.4, else 0.
    assert found.errors["gain"] == pytest.approx(np.sqrt(0.4 * 0.6 / 10), rel=ROUNDING)
    # f_FT and f_lin give one example of ten another class; so do the kernel and f_FT.
    assert (found.equal_predictions, found.agreement) == (0.9, 0.9)
    # Equal classes: 3 - 2 in one logit; others: 3 and 2. Against f0: 3 - 1 where both are right (5) or wrong (1), else
    # 3 and 1 (4).
    assert found.logits_distance == pytest.approx(np.sqrt((9 * 1 + 13) / (6 * 4 + 4 * 10)), rel=ROUNDING)
    assert found.chi == pytest.approx(0.5, rel=ROUNDING)


def test_distances_of_kernels_are_those_of_loops_over_the_entries(tmp_path: Path) -> None:
    found = seed_behaviour(*make_pair(tmp_path)).distances
    before, after = kernel_at(0).ravel(), kernel_at(9).ravel()
    relative = sorted(abs(b - a) / abs(a) for a, b in zip(before, after, strict=True))
    near_zero = sum(abs(a) < 1e-3 * sum(map(abs, before)) / len(before) for a in before)
    assert found is not None
    assert found.mean == pytest.approx(sum(relative) / 64, rel=ROUNDING)
    assert found.median == pytest.approx((relative[31] + relative[32]) / 2, rel=ROUNDING)
    assert (found.near_zero, found.entries) == (near_zero, 64)
    squares = sum((b - a) ** 2 for a, b in zip(before, after, strict=True)), sum(a**2 for a in before)
    assert found.frobenius == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=ROUNDING)
    centre = np.eye(4) - 1 / 4
    half = np.array([[0.5, -0.5], [-0.5, 0.5]])
    centred = [centre @ np.einsum("iajb,ab->ij", kernel_at(step), half) @ centre for step in (0, 9)]
    cosine = (centred[0] * centred[1]).sum() / np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    assert found.cka == pytest.approx(cosine, rel=1e-10)


def test_a_kernel_run_around_f0_is_scored_beside_the_other(tmp_path: Path) -> None:
    training, kernel = make_pair(tmp_path)
    with_f0 = write_kernel_run(tmp_path / "f0", LABELS, flipped(LABELS, 3), adjust_for_init=True)
    assert seed_behaviour(training, kernel, with_f0).kernel_with_f0 == 0.7
    without = write_kernel_run(tmp_path / "without", LABELS, LABELS, adjust_for_init=False)
    with pytest.raises(KernelMismatchError) as caught:
        seed_behaviour(training, kernel, without)
    assert caught.value.data["differences"] == ["adjust_for_init"]


def test_the_second_test_set_of_mnli_is_a_split_of_its_own(tmp_path: Path) -> None:
    labels, split = [0, 1, 2, 2], "test:mnli-mm"
    found = [{split: split_of(labels, logits_for(ids, 3))} for ids in ([0, 0, 0, 0], labels)]
    training = write_training(tmp_path / "t", {0: (found[0], None), 3: (found[1], None)}, task="mnli")
    kernel = write_kernel_run(tmp_path / "k", labels, [0, 1, 2, 0], task="mnli", split=split)
    numbers = seed_behaviour(training, kernel, split=split)
    assert (numbers.pretrained, numbers.kernel, numbers.finetuned, numbers.constant) == (0.25, 0.75, 1.0, 0.5)


def test_six_classes_are_scored_with_their_own_best_constant(tmp_path: Path) -> None:
    labels = [0, 1, 2, 3, 4, 5, 3, 3]
    splits = {
        step: {"test": split_of(labels, logits_for(flipped(labels, wrong, 6), 6))} for step, wrong in ((0, 8), (2, 2))
    }
    training = write_training(tmp_path / "t", {step: (split, None) for step, split in splits.items()}, task="trec")
    kernel = write_kernel_run(tmp_path / "k", labels, flipped(labels, 4, 6), task="trec")
    found = seed_behaviour(training, kernel)
    assert (found.pretrained, found.kernel, found.finetuned, found.constant) == (0, 0.5, 0.75, 3 / 8)
    assert np.isnan(found.chi) and found.distances is None
    row = behaviour_row("trec", [found], Thresholds())
    assert row.fixed == Verdict("undecided", "the snapshots hold no kernels")


def test_a_single_logit_predicts_class_1_above_0_and_gives_chi_by_its_sigmoid(tmp_path: Path) -> None:
    first = {"train": split_of([0, 1], [[2.0], [-1.0]]), "test": split_of(LABELS, logits_for(LABELS, 1))}
    after = {**first, "test": split_of(LABELS, 2 * logits_for(flipped(LABELS, 1), 1), 2 * logits_for(LABELS, 1))}
    record = {"binary_classification": True}
    kernels = [kernel_at(step, 2, 1) for step in (0, 1)]
    training = write_training(tmp_path / "t", {0: (first, kernels[0]), 1: (after, kernels[1])}, **record)
    found = seed_behaviour(training, write_kernel_run(tmp_path / "k", LABELS, LABELS, **record))
    assert (found.pretrained, found.finetuned, found.linearised, found.agreement) == (1.0, 0.9, 1.0, 0.9)
    sigmoid = 1 / (1 + np.exp(-np.array([2.0, -1.0])))
    assert found.chi == pytest.approx((sigmoid[0] + 1 - sigmoid[1]) / 2, rel=ROUNDING)
    # One example: f_FT = -2 s, f_lin = 2 s, f0 = s; nine: f_FT = f_lin = 2 s.
    assert found.logits_distance == pytest.approx(np.sqrt(4**2 / (3**2 + 9)), rel=ROUNDING)
    assert found.distances is not None and found.distances.entries == 4


def test_an_asymmetric_kernel_is_compared_over_both_directions(tmp_path: Path) -> None:
    both = [np.stack([kernel_at(step), 2 * kernel_at(step + 1)]) for step in (0, 3)]
    splits = {"train": split_of([0, 1, 0, 1], np.zeros((4, 2))), "test": split_of(LABELS, logits_for(LABELS))}
    training = write_training(tmp_path / "t", {0: (splits, both[0]), 3: (splits, both[1])})
    found = seed_behaviour(training, write_kernel_run(tmp_path / "k", LABELS, LABELS)).distances
    assert found is not None and found.entries == 128
    assert found.mean == pytest.approx(np.mean(np.abs(both[1] - both[0]) / np.abs(both[0])), rel=ROUNDING)
    assert found.frobenius == pytest.approx(np.linalg.norm(both[1] - both[0]) / np.linalg.norm(both[0]), rel=ROUNDING)


def f1(labels: Sequence[int], predicted: Sequence[int]) -> float:
    """2 TP / (2 TP + FP + FN), by counting."""
    pairs = list(zip(labels, predicted, strict=True))
    return 2 * pairs.count((1, 1)) / (2 * pairs.count((1, 1)) + pairs.count((0, 1)) + pairs.count((1, 0)))


def test_mrpc_is_scored_by_f1_and_its_standard_error_by_leaving_out_each_example(tmp_path: Path) -> None:
    labels, before, after, kernel = [1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0], [1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1]
    snapshots = {step: ({"test": split_of(labels, logits_for(ids))}, None) for step, ids in ((0, before), (5, after))}
    training = write_training(tmp_path / "t", snapshots, task="mrpc")
    found = seed_behaviour(training, write_kernel_run(tmp_path / "k", labels, kernel, task="mrpc"))
    assert found.metric == "f1"
    for value, predicted in ((found.pretrained, before), (found.finetuned, after), (found.kernel, kernel)):
        assert value == pytest.approx(f1(labels, predicted), rel=ROUNDING)
    # All of class 1: π = 4/6, so 2π/(1 + π).
    assert found.constant == pytest.approx(0.8, rel=ROUNDING)
    others = [[i for i in range(6) if i != left] for left in range(6)]
    gains = [
        f1([labels[i] for i in kept], [after[i] for i in kept])
        - f1([labels[i] for i in kept], [before[i] for i in kept])
        for kept in others
    ]
    spread = np.sqrt(sum((gain - sum(gains) / 6) ** 2 for gain in gains))
    assert found.errors["gain"] == pytest.approx(5 / 6 * spread, rel=ROUNDING)


def seed(**changes: Any) -> SeedBehaviour:
    """A seed of 1000 examples that meets all three conditions."""
    moved = changes.pop("moved", 0.5)
    numbers = {"pretrained": 0.6, "kernel": 0.84, "linearised": 0.8, "finetuned": 0.85, "constant": 0.5, **changes}
    errors = {
        **{name: float(np.sqrt(numbers[name] * (1 - numbers[name]) / 1000)) for name in ("kernel", "finetuned")},
        "gain": 0.01,
    }
    distances = None if moved is None else KernelDistances(moved, moved, 3, 100, moved, 0.9)
    return SeedBehaviour(
        task="sst-2", metric="acc", split="test", examples=1000, seed=42, formula="sgd", optimizer="sgd", last_step=50,
        kernel_with_f0=None, errors=errors, logits_distance=0.1, equal_predictions=0.95, agreement=0.9, chi=0.4,
        distances=distances, **numbers,
    )  # fmt: skip


def answers(row: BehaviourRow) -> list[str]:
    return [verdict.answer for verdict in (row.solves, row.linear, row.fixed, row.whole)]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ["yes", "yes", "yes", "yes"]),
        ({"kernel": 0.76}, ["no", "yes", "yes", "no"]),  # 0.894 of fine-tuning's score
        ({"kernel": 0.765}, ["yes", "yes", "yes", "yes"]),  # exactly 0.9 of it
        ({"constant": 0.82}, ["no", "yes", "yes", "no"]),  # fine-tuning is above it by 0.03, the kernel by 0.02
        ({"linearised": 0.7}, ["yes", "no", "yes", "no"]),  # 0.1 of 0.25
        ({"linearised": 0.725}, ["yes", "yes", "yes", "yes"]),  # exactly half
        ({"moved": 2.0}, ["yes", "yes", "no", "no"]),  # not below 2
        ({"moved": None}, ["yes", "yes", "undecided", "undecided"]),
        ({"moved": float("inf")}, ["yes", "yes", "undecided", "undecided"]),
        ({"pretrained": 0.84}, ["yes", "undecided", "yes", "undecided"]),  # a gain of one standard error
        ({"pretrained": 0.85}, ["yes", "undecided", "yes", "undecided"]),
        ({"pretrained": 0.9}, ["yes", "undecided", "yes", "undecided"]),
    ],
)
def test_each_condition_decides_alone_and_the_whole_needs_all(changes: dict[str, Any], wanted: list[str]) -> None:
    row = behaviour_row("task", [seed(**changes)], Thresholds())
    assert answers(row) == wanted
    for verdict in (row.solves, row.linear, row.fixed, row.whole):
        assert bool(verdict.reason) == (verdict.answer == "undecided")
        assert str(verdict).startswith(verdict.answer)


def test_labels_at_random_leave_the_verdict_undecided(tmp_path: Path) -> None:
    labels, *guesses = np.random.default_rng(0).integers(0, 2, size=(4, 400))
    splits = [{"test": split_of(labels, logits_for(guess))} for guess in guesses[:2]]
    training = write_training(tmp_path / "t", {0: (splits[0], None), 5: (splits[1], None)})
    row = behaviour_row(
        "t", [seed_behaviour(training, write_kernel_run(tmp_path / "k", labels, guesses[2]))], Thresholds()
    )
    assert str(row.solves) == "undecided: fine-tuning does not solve the task"
    assert row.linear.answer == row.whole.answer == "undecided"


def test_a_linearised_training_is_not_fine_tuning(tmp_path: Path) -> None:
    split = {"test": split_of(LABELS, logits_for(LABELS))}
    training = write_training(tmp_path / "lin", {0: (split, None), 9: (split, None)}, trainer="linearised")
    with pytest.raises(KernelMismatchError) as caught:
        seed_behaviour(training, write_kernel_run(tmp_path / "kernel", LABELS, LABELS))
    assert caught.value.data["differences"] == ["trainer"]


def test_signgd_has_its_own_name(tmp_path: Path) -> None:
    split = {"train": split_of([0, 1], [[0.0, 0.0]] * 2), "test": split_of(LABELS, logits_for(LABELS))}
    training = write_training(tmp_path / "signs", {0: (split, None), 9: (split, None)}, optimizer_variant="signgd")
    assert seed_behaviour(training, write_kernel_run(tmp_path / "kernel", LABELS, LABELS)).optimizer == "signgd"


@pytest.mark.parametrize("what", ["task", "metric", "split", "formula", "optimizer"])
def test_seeds_of_different_kinds_are_not_averaged(what: str) -> None:
    other = dataclasses.replace(seed(), **{what: "other"})
    with pytest.raises(KernelMismatchError) as caught:
        behaviour_row("mixed", [seed(), other], Thresholds())
    assert caught.value.data["differences"] == [what]


def test_a_mean_over_some_of_the_seeds_says_over_how_many() -> None:
    row = behaviour_row("some", [seed(), dataclasses.replace(seed(), kernel_with_f0=0.8)], Thresholds())
    assert "80.0 (–) [1 of 2]" in format_rows([row], "text", Thresholds())


def test_thresholds_decide(tmp_path: Path) -> None:
    chosen = seed(kernel=0.8, linearised=0.75, moved=0.5)
    strict = Thresholds(ratio=0.95, recovery=0.9, distance=0.4)
    assert answers(behaviour_row("t", [chosen], strict)) == ["no", "no", "no", "no"]
    assert answers(behaviour_row("t", [seed(pretrained=0.84)], Thresholds(standard_errors=0.5)))[1] == "no"
    with pytest.raises(SettingError) as caught:
        Thresholds(distance=0)
    assert caught.value.data["setting"] == "most_distance"


def test_a_row_averages_over_seeds_and_leaves_recovery_undefined_where_nothing_is_gained() -> None:
    seeds = [seed(), seed(pretrained=0.85, linearised=0.85), seed(linearised=0.7, moved=1.5)]
    row = behaviour_row("task", seeds, Thresholds())
    means = np.mean([0.6, 0.85, 0.6]), np.mean([0.8, 0.85, 0.7]), 0.85
    assert row.recovery == pytest.approx((means[1] - means[0]) / (means[2] - means[0]), rel=ROUNDING)
    assert row.recoveries == pytest.approx([0.8, 0.4], rel=1e-9)
    assert row.recovery_deviation == pytest.approx(0.2, rel=1e-9)
    assert row.deviation("linearised") == pytest.approx(np.std([0.8, 0.85, 0.7]), rel=ROUNDING)
    assert row.distances is not None
    assert row.distances.mean == pytest.approx(2.5 / 3, rel=ROUNDING)
    assert (row.distances.near_zero, row.distances.entries) == (9, 300)
    assert row.mean_error("gain") == pytest.approx(0.01, rel=ROUNDING)


def test_one_seed_has_no_standard_deviation_and_equal_scores_no_recovery() -> None:
    row = behaviour_row("task", [seed(pretrained=0.85)], Thresholds())
    assert np.isnan([row.deviation("kernel"), row.recovery, row.recovery_deviation]).all()
    assert row.recoveries == [] and row.mean("kernel_with_f0") != row.mean("kernel_with_f0")


@pytest.mark.parametrize(
    ("record", "differences"),
    [
        ({"few_shot_type": "prompt-demo"}, ["few_shot_type"]),
        ({"template": "*cls**sent_0**mask**sep+*", "mapping": "{'0': 'bad', '1': 'good'}"}, ["template", "mapping"]),
        ({"data_dir": "elsewhere/SST-2/16-13"}, ["data_dir"]),
        ({"model_name_or_path": "large"}, ["model_name_or_path"]),
        ({"binary_classification": True}, ["binary_classification"]),
        ({"apply_lora": True}, ["apply_lora"]),
        ({"kernel_formula": "signgd"}, ["kernel_formula"]),
        ({"trainer": "linearhead"}, ["trainer"]),
    ],
)
def test_runs_of_other_settings_are_not_paired(
    tmp_path: Path, record: Mapping[str, Any], differences: list[str]
) -> None:
    training, kernel = make_pair(tmp_path, **record)
    with pytest.raises(KernelMismatchError) as caught:
        seed_behaviour(training, kernel)
    assert caught.value.data == {"path": kernel.folder, "differences": differences}
    assert str(kernel.folder) in str(caught.value) and "\n" not in str(caught.value)


def test_the_same_settings_in_another_spelling_are_paired(tmp_path: Path) -> None:
    words = {"0": "terrible", "1": "great"}
    training, kernel = make_pair(
        tmp_path, data_dir="/elsewhere/SST-2/16-42/", template=["*cls**sent_0*_It_was*mask*.*sep+*"], mapping=words
    )
    assert seed_behaviour(training, kernel).kernel == 0.8


def test_parameters_weights_and_prompts_are_compared_where_both_are_described(tmp_path: Path) -> None:
    splits = {"test": split_of(LABELS, logits_for(LABELS))}
    texts = {"train": "a" * 64, "test": "c" * 64}
    for key, value in (
        ("grad_dim", 12),
        ("weights_sha256", "b" * 64),
        ("tokens_sha256", {"train": "b" * 64, "dev": "d" * 64}),
    ):
        described = {0: {key: value}}
        training = write_training(tmp_path / key, {0: (splits, None), 1: (splits, None)}, descriptions=described)
        kernel = write_kernel_run(
            tmp_path / "k", LABELS, LABELS, grad_dim=13, weights_sha256="a" * 64, tokens_sha256=texts
        )
        with pytest.raises(KernelMismatchError) as caught:
            seed_behaviour(training, kernel)
        assert caught.value.data["differences"] == [key]


def test_runs_of_other_tasks_or_examples_are_not_paired(tmp_path: Path) -> None:
    training, _ = make_pair(tmp_path)
    for labels, task, differences in (
        (LABELS[::-1], "sst-2", ["labels"]),
        (LABELS[:-1], "sst-2", ["labels"]),
        (LABELS, "mr", ["task_name"]),
    ):
        kernel = write_kernel_run(tmp_path / f"{task}-{labels[0]}-{len(labels)}", labels, labels, task=task)
        with pytest.raises(KernelMismatchError) as caught:
            seed_behaviour(training, kernel)
        assert caught.value.data["differences"] == differences


def without_snapshots(folder: Path) -> None:
    for path in folder.glob("step-*"):
        path.unlink()


def without_the_first(folder: Path) -> None:
    RunPaths(folder, "sst-2").snapshot(0).unlink()


def without_the_last(folder: Path) -> None:
    RunPaths(folder, "sst-2").snapshot(9).unlink()


def cut(folder: Path) -> None:
    path = RunPaths(folder, "sst-2").snapshot(9)
    path.write_bytes(path.read_bytes()[:-9])


def of_another_step(folder: Path) -> None:
    shutil.copy(RunPaths(folder, "sst-2").snapshot(0), RunPaths(folder, "sst-2").snapshot(9))


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (without_snapshots, "no snapshots of a training: repeat the training with `kernel_steps=0,last`"),
        (without_the_first, "no snapshot of step 0"),
        (without_the_last, "it ends with step 0"),
        (cut, "step-000009_sst-2.safetensors"),
        (of_another_step, "arrays that do not belong together"),
    ],
)
def test_missing_and_damaged_snapshots_are_named(tmp_path: Path, damage: Callable[[Path], None], fact: str) -> None:
    training, kernel = make_pair(tmp_path)
    damage(training.folder)
    with pytest.raises(FileError) as caught:
        seed_behaviour(training, kernel)
    assert fact in str(caught.value) and str(training.folder) in str(caught.value)


def test_a_training_that_went_on_after_its_last_snapshot_is_refused(tmp_path: Path) -> None:
    splits = {"test": split_of(LABELS, logits_for(LABELS))}
    described = {5: {"last_step": 50}}
    training = write_training(tmp_path / "t", {0: (splits, None), 5: (splits, None)}, descriptions=described)
    with pytest.raises(FileError, match="50 steps"):
        seed_behaviour(training, write_kernel_run(tmp_path / "k", LABELS, LABELS))


@pytest.mark.parametrize(
    ("splits", "kernel", "kind"),
    [
        ({"test": split_of(LABELS, [[0.0, np.nan]] * 10)}, None, NotFiniteError),
        ({"test": split_of(LABELS[:3], [[0.0, 1.0]] * 3)}, None, FileError),
        ({"test": split_of(LABELS, [[0.0, 1.0]] * 9)}, None, FileError),
        ({"test": split_of(LABELS, logits_for(LABELS, 3))}, None, FileError),
        ({"test": split_of([5] * 10, logits_for(LABELS))}, None, FileError),
        ({"dev": split_of(LABELS, logits_for(LABELS))}, None, FileError),
        ({"test": split_of(LABELS, logits_for(LABELS))}, kernel_at(0, rows=3), FileError),
        ({"test": split_of(LABELS, logits_for(LABELS))}, np.zeros((4, 2, 4)), FileError),
        ({"test": split_of(LABELS, logits_for(LABELS))}, np.full((4, 2, 4, 2), np.inf), NotFiniteError),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(
    tmp_path: Path, splits: Any, kernel: np.ndarray | None, kind: type[UsageError]
) -> None:
    first = {"test": split_of(LABELS, logits_for(LABELS)), "train": split_of([0, 1, 0, 1], np.zeros((4, 2)))}
    training = write_training(tmp_path / "t", {0: (first, kernel_at(0)), 5: (splits, kernel)})
    with pytest.raises(kind) as caught:
        seed_behaviour(training, write_kernel_run(tmp_path / "k", LABELS, LABELS))
    assert caught.value.data["path"] == RunPaths(training.folder, "sst-2").snapshot(5)


def test_a_kernel_run_without_predictions_of_the_split_is_named(tmp_path: Path) -> None:
    training, kernel = make_pair(tmp_path)
    kernel.paths.predictions("test").unlink()
    with pytest.raises(FileError, match="do_predict") as caught:
        seed_behaviour(training, only_run(kernel.folder))
    assert caught.value.data["path"] == kernel.paths.predictions("test")


def test_a_regression_task_is_refused(tmp_path: Path) -> None:
    splits = {"test": split_of([0, 1], [[0.0], [1.0]])}
    training = write_training(tmp_path / "t", {0: (splits, None), 5: (splits, None)}, task="sts-b")
    with pytest.raises(SettingError, match="regression"):
        seed_behaviour(training, training)
