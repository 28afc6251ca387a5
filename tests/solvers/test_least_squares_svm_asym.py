"""Each solver against an independent calculation, and what happens with input that does not fit."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.svm import SVC, SVR

from lmntk.errors import KernelMismatchError, NotFiniteError, SettingError, SolverError, UnknownNameError
from lmntk.solvers import SOLVERS, fit
from lmntk.solvers.problem import SolverSettings, class_ids, two_logits
from random_kernels import CLOSE, PLAIN, Case, predict, sum_of_squares_per_logit

pytestmark = pytest.mark.filterwarnings("error")


# Two float64 ways to solve a well-conditioned system of some 40 unknowns; measured differences are below 1e-11.
@pytest.mark.parametrize("logits", [1, 2, 3])
@pytest.mark.parametrize("features", [300, 9])
def test_lstsq_is_the_pseudo_inverse_of_the_kernel_singular_or_not(logits: int, features: int) -> None:
    case = Case(logits, features)
    found = case.predict("lstsq")
    alpha = np.linalg.pinv(case.flat(case.train), rcond=1e-12) @ case.targets(case.train_labels).reshape(-1)
    expected = (case.flat(case.test).T @ alpha).reshape(case.x, logits)
    np.testing.assert_allclose(found.logits, expected, rtol=CLOSE, atol=CLOSE)
    assert found.loss == pytest.approx(sum_of_squares_per_logit(case, expected), rel=CLOSE)
    assert found.metrics == {"rank0": min(features, 20 * logits)}
    assert type(found.metrics["rank0"]) is int


def test_lstsq_on_a_kernel_of_rank_one_takes_the_shortest_solution() -> None:
    # K = v vᵀ with v = (1, 2): the shortest α with v (v·α) nearest to y = (1, -1) is v (v·y) / |v|⁴ = -(1, 2) / 25.
    kernel = np.array([[1.0, 2.0], [2.0, 4.0]]).reshape(2, 1, 2, 1)
    found = predict("lstsq", kernel, [1.0, -1.0], kernel[:, :, :1], [1.0], PLAIN)
    np.testing.assert_allclose(found.logits, [[-0.2]], rtol=1e-14)
    assert found.loss == pytest.approx(1.44, rel=1e-14)
    assert found.metrics == {"rank0": 1}


def test_lstsq_finds_the_rank_of_a_kernel_with_repeated_examples_whatever_memory_holds() -> None:
    case = Case(2, n=12)
    order = [*range(12), 3, 5, 5]
    kernel, labels = case.train[order][:, :, order], case.train_labels[order]
    for value in range(8):
        junk = [np.full(15 * 2 + size, value, dtype=np.int32) for size in range(64)]
        del junk  # what LAPACK's work space may be made of
        found = predict("lstsq", kernel, labels, kernel, labels, PLAIN)
        assert found.metrics == {"rank0": 24}
        # All labels agree where examples repeat: the targets are in the kernel's range.
        assert found.loss < CLOSE


@pytest.mark.parametrize("logits", [1, 3])
def test_lstsq_without_a_remainder_gives_back_the_training_targets(logits: int) -> None:
    case = Case(logits)
    for untrained in ((), (case.train_f0, case.train_f0)):
        settings = SolverSettings(f0_scaling=2.0)
        found = predict("lstsq", case.train, case.train_labels, case.train, case.train_labels, settings, *untrained)
        np.testing.assert_allclose(found.logits, case.targets(case.train_labels), atol=CLOSE)
        assert found.loss < CLOSE


@pytest.mark.parametrize("logits", [1, 2])
def test_regularisation_is_in_units_of_the_largest_singular_value(logits: int) -> None:
    case = Case(logits, features=9)
    found = case.predict("lstsq", SolverSettings(regularization=0.1))
    matrix = case.flat(case.train)
    ridge = 0.1 * np.sqrt(np.linalg.eigvalsh(matrix @ matrix.T).max())
    alpha = np.linalg.solve(matrix + ridge * np.eye(len(matrix)), case.targets(case.train_labels).reshape(-1))
    np.testing.assert_allclose(found.logits.reshape(-1), case.flat(case.test).T @ alpha, rtol=CLOSE, atol=CLOSE)
    assert found.metrics == {"rank0": 20 * logits}


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_takes_the_regularised_kernel(solver: str) -> None:
    case = Case(1, asymmetric=True)
    found = case.predict(solver, SolverSettings(regularization=0.3))
    for direction in case.train:
        direction[...] += 0.3 * np.linalg.norm(case.flat(direction), 2) * np.eye(20).reshape(direction.shape)
    expected = case.predict(solver)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=CLOSE, atol=CLOSE)
    assert found.loss == pytest.approx(expected.loss, rel=CLOSE)


@pytest.mark.parametrize("solver", ["lstsq", "svr"])
@pytest.mark.parametrize("logits", [1, 2])
def test_f0_divided_by_its_scaling_leaves_the_targets_and_joins_the_predictions(solver: str, logits: int) -> None:
    case = Case(logits)
    found = case.predict(solver, SolverSettings(f0_scaling=4.0), f0=True)
    targets = (case.targets(case.train_labels) - case.train_f0 / 4).reshape(-1)
    if solver == "lstsq":
        flat = case.flat(case.test).T @ np.linalg.solve(case.flat(case.train), targets)
    else:
        flat = SVR(kernel="precomputed").fit(case.flat(case.train), targets).predict(case.flat(case.test).T)
    expected = flat.reshape(case.x, logits) + case.test_f0 / 4
    np.testing.assert_allclose(found.logits, expected, rtol=CLOSE, atol=CLOSE)
    assert found.loss == pytest.approx(sum_of_squares_per_logit(case, expected), rel=CLOSE)


@pytest.mark.parametrize("solver", ["lstsq", "svr", "asym"])
def test_an_f0_scaling_of_zero_means_no_adjustment(solver: str) -> None:
    case = Case(1, asymmetric=True)
    with_f0 = case.predict(solver, SolverSettings(f0_scaling=0.0), f0=True)
    np.testing.assert_allclose(with_f0.logits, case.predict(solver).logits, rtol=CLOSE)


@pytest.mark.parametrize("logits", [1, 2, 3])
@pytest.mark.parametrize("features", [300, 9])
def test_svr_is_scikit_learns_on_the_flattened_kernel(logits: int, features: int) -> None:
    case = Case(logits, features)
    targets = case.targets(case.train_labels).reshape(-1)
    model = SVR(kernel="precomputed").fit(case.flat(case.train), targets)
    expected = model.predict(case.flat(case.test).T).reshape(case.x, logits)
    found = case.predict("svr")
    np.testing.assert_allclose(found.logits, expected, rtol=CLOSE)
    assert found.loss == pytest.approx(sum_of_squares_per_logit(case, expected), rel=CLOSE)


@pytest.mark.parametrize("features", [30, 9])
def test_svc_with_one_logit_predicts_minus_and_plus_one_and_counts_four_for_each_error(features: int) -> None:
    case = Case(1, features)
    model = SVC(kernel="precomputed").fit(case.flat(case.train), case.train_labels > 0)
    expected = np.where(model.predict(case.flat(case.test).T), 1.0, -1.0)
    found = case.predict("svc")
    np.testing.assert_array_equal(found.logits[:, 0], expected)
    assert found.loss == 4 * np.mean(expected != case.test_labels)
    assert found.loss > 0


@pytest.mark.parametrize("logits", [2, 4])
@pytest.mark.parametrize("features", [30, 6])
def test_svc_with_more_logits_separates_each_class_from_the_rest_on_the_kernel_summed_over_equal_logits(
    logits: int, features: int
) -> None:
    case = Case(logits, features)
    train = sum(case.train[:, c, :, c] for c in range(logits))
    test = sum(case.test[:, c, :, c] for c in range(logits))
    found = case.predict("svc")
    wrong = 0
    for label in range(logits):
        values = SVC(kernel="precomputed").fit(train, case.train_labels == label).decision_function(test.T)
        np.testing.assert_allclose(found.logits[:, label], values, rtol=CLOSE, atol=CLOSE)
        wrong += np.sum((values > 0) != (case.test_labels == label))
    assert found.loss == pytest.approx(4 * wrong / (case.x * logits), rel=CLOSE)


# libsvm stops when the optimality conditions hold to 1e-3 (its `tol`), which is what its decision values are off by.
LIBSVM = 5e-3


def quadratic_program(matrix: np.ndarray, linear: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """The v in [0, 1] with signs·v = 0 that minimises ½ vᵀ M v + linear·v."""
    found = minimize(
        lambda v: 0.5 * v @ matrix @ v + linear @ v,
        np.full(len(linear), 0.5),
        jac=lambda v: matrix @ v + linear,
        bounds=[(0, 1)] * len(linear),
        constraints={"type": "eq", "fun": lambda v: signs @ v, "jac": lambda v: signs},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-13},
    )
    assert found.success
    return found.x


@pytest.mark.parametrize("logits", [1, 2])
@pytest.mark.parametrize("features", [300, 9])
def test_svr_solves_its_quadratic_program(logits: int, features: int) -> None:
    case = Case(logits, features)
    kernel, y = case.flat(case.train), case.targets(case.train_labels).reshape(-1)
    # Smola & Schölkopf 2004, eq. 10, with C = 1 and ε = 0.1: α = up - down.
    signs = np.repeat([1.0, -1.0], len(y))
    up, down = np.split(quadratic_program(np.kron([[1, -1], [-1, 1]], kernel), 0.1 - signs * np.tile(y, 2), signs), 2)
    free = [(v > 1e-6) & (v < 1 - 1e-6) for v in (up, down)]
    remainder = y - kernel @ (up - down)
    offset = np.concatenate([remainder[free[0]] - 0.1, remainder[free[1]] + 0.1]).mean()
    expected = (case.flat(case.test).T @ (up - down) + offset).reshape(case.x, logits)
    np.testing.assert_allclose(case.predict("svr").logits, expected, atol=LIBSVM)


@pytest.mark.parametrize("features", [30, 6])
def test_svc_solves_its_quadratic_program(features: int) -> None:
    case = Case(2, features)
    kernel = np.einsum("icjc->ij", case.train)
    y = 2.0 * case.train_labels - 1
    alpha = quadratic_program(y[:, None] * kernel * y, -np.ones(case.n), y) * y
    free = (np.abs(alpha) > 1e-6) & (np.abs(alpha) < 1 - 1e-6)
    offset = (y - kernel @ alpha)[free].mean()
    expected = np.einsum("icjc->ij", case.test).T @ alpha + offset
    np.testing.assert_allclose(case.predict("svc").logits, np.stack([-expected, expected], axis=1), atol=LIBSVM)


@pytest.mark.parametrize("logits", [1, 2])
def test_svc_stops_at_a_class_without_examples(logits: int) -> None:
    case = Case(logits)
    case.train_labels = np.full(20, case.train_labels[0])
    with pytest.raises(SolverError) as caught:
        case.predict("svc")
    assert caught.value.data == {"solver": "svc", "label": 1}


@pytest.mark.parametrize("f0", [False, True])
@pytest.mark.parametrize("features", [300, 9])
def test_asym_solves_the_asymmetric_least_squares_svm(f0: bool, features: int) -> None:
    case = Case(1, features, asymmetric=True)
    gamma, weight = 0.7, 0.2
    found = case.predict("asym", SolverSettings(gamma=gamma, lambda_=weight, f0_scaling=3.0), f0=f0)
    y = case.train_labels - (case.train_f0[:, 0] / 3 if f0 else 0)
    h = np.diag(y) @ case.flat(case.train[0]) @ np.diag(y)
    # The first block row gives α = γ(1 - Hβ), which the second turns into a system for β alone.
    one, identity = np.ones(20), np.eye(20)
    beta = np.linalg.solve(identity / gamma - gamma * h.T @ h, one - gamma * h.T @ one)
    alpha = gamma * (one - h @ beta)
    forward, backward = (case.flat(direction).T for direction in case.test)
    expected = weight * forward @ (alpha * y) + (1 - weight) * backward @ (beta * y)
    expected += case.test_f0[:, 0] / 3 if f0 else 0
    np.testing.assert_allclose(found.logits[:, 0], expected, rtol=1e-7)
    assert found.loss == pytest.approx(np.mean((expected - case.test_labels) ** 2), rel=1e-7)
    assert found.metrics == {"rank0": 40}


@pytest.mark.parametrize("solver", ["lstsq", "logistic", "svr", "svc"])
def test_a_solver_of_symmetric_kernels_uses_the_first_direction_of_an_asymmetric_one(solver: str) -> None:
    case = Case(1, asymmetric=True)
    found = case.predict(solver)
    case.train, case.test = case.train[0], case.test[0]
    np.testing.assert_allclose(found.logits, case.predict(solver).logits, rtol=CLOSE)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_arrays_of_the_caller_stay_as_they_are(solver: str) -> None:
    case = Case(1, asymmetric=True)
    for array in (case.train, case.test, case.train_labels, case.test_labels, case.train_f0, case.test_f0):
        array.flags.writeable = False
    found = case.predict(solver, SolverSettings(regularization=0.1), f0=SOLVERS[solver].allows_f0)
    assert found.logits.shape == (7, 1)
    assert found.logits.dtype == np.float64


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_fit_predicts_any_number_of_splits(solver: str) -> None:
    case = Case(1, asymmetric=True)
    fitted = fit(solver, case.train, case.train_labels, PLAIN)
    for columns in (slice(0, 3), slice(2, 7)):
        found = fitted.predict(case.test[..., columns, :], case.test_labels[columns])
        expected = predict(
            solver, case.train, case.train_labels, case.test[..., columns, :], case.test_labels[columns], PLAIN
        )
        np.testing.assert_allclose(found.logits, expected.logits, rtol=CLOSE)
        assert found.loss == pytest.approx(expected.loss, rel=CLOSE)
        assert found.metrics == expected.metrics


@pytest.mark.parametrize("solver", ["lstsq", "svr", "asym"])
@pytest.mark.parametrize(("label", "class_id"), [(-1.0, 0), (1.0, 1)])
def test_train_examples_of_one_class_are_worth_a_warning(
    solver: str, label: float, class_id: int, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(1, asymmetric=True)
    fit(solver, case.train, case.train_labels, PLAIN)
    assert not caplog.records
    case.train_labels = np.full(20, label)
    fit(solver, case.train, case.train_labels, PLAIN)
    assert [record.getMessage() for record in caplog.records] == [
        f"all train examples are of class {class_id}: {solver} learns nothing about other classes from them; look at "
        "the labels of the train data"
    ]


def test_two_logits_have_the_single_logits_class_as_their_largest() -> None:
    single = np.array([[-2.0], [0.0], [0.5]])
    np.testing.assert_array_equal(two_logits(single), [[2, -2], [0, 0], [-0.5, 0.5]])
    np.testing.assert_array_equal(two_logits(single).argmax(axis=1), [0, 0, 1])
    more = np.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(two_logits(more), more)


def test_class_ids_come_from_signs_with_a_single_logit_only() -> None:
    np.testing.assert_array_equal(class_ids(np.array([-1.0, 1.0]), 1), [0, 1])
    np.testing.assert_array_equal(class_ids(np.array([0, 2, 1]), 3), [0, 2, 1])


def test_an_unknown_solver_is_told_with_the_nearest_name() -> None:
    case = Case(1)
    with pytest.raises(UnknownNameError, match="did you mean 'lstsq'") as caught:
        case.predict("lsqr")
    assert caught.value.data == {"name": "lsqr", "kind": "kernel solver", "options": list(SOLVERS)}


def test_asym_on_a_symmetric_kernel_names_the_formula_it_needs() -> None:
    with pytest.raises(SolverError) as caught:
        Case(2).predict("asym")
    assert caught.value.data["solver"] == "asym"
    assert len(caught.value.data["needs"]) == 2
    assert "`kernel_formula=asymmetric_signgd`" in caught.value.data["needs"][0]
    assert "`binary_classification`" in caught.value.data["needs"][1]


@pytest.mark.parametrize("solver", ["logistic", "svc"])
def test_a_solver_that_cannot_start_from_f0_says_so(solver: str) -> None:
    with pytest.raises(SolverError) as caught:
        Case(1).predict(solver, f0=True)
    assert caught.value.data == {"solver": solver, "needs": ["a command without `adjust_for_init`"]}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_example_without_finite_kernel_values_is_named_with_its_split(value: float) -> None:
    case = Case(2)
    case.test[:, :, 4] = value
    with pytest.raises(NotFiniteError, match="at dev example 4 ") as caught:
        predict("lstsq", case.train, case.train_labels, case.test, case.test_labels, PLAIN, x_split="dev")
    assert caught.value.data == {"example": 4}
    case.train[:, :, 3] = case.train[3] = value
    with pytest.raises(NotFiniteError, match="at train example 3 ") as caught:
        case.predict("lstsq")
    assert caught.value.data == {"example": 3}


def test_a_single_infinite_kernel_value_is_named_with_both_examples() -> None:
    case = Case(1, asymmetric=True)
    case.test[1, 11, 0, 2, 0] = -np.inf
    with pytest.raises(NotFiniteError, match="X example 2 with train example 11 "):
        case.predict("asym")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ((4, 2, 4, 2), (3, 2, 5, 2)),
        ((4, 2, 4, 2), (4, 2, 5, 1)),
        ((4, 2, 4, 2), (4, 2, 0, 2)),
        ((4, 2, 4, 2), (2, 4, 2, 5, 2)),
        ((2, 4, 2, 4, 2), (4, 2, 5, 2)),
        ((4, 2, 4, 2), (8, 10)),
        ((4, 2, 4, 2), ()),
    ],
)
def test_kernels_that_do_not_go_together_are_told_with_their_shapes(
    train: tuple[int, ...], test: tuple[int, ...]
) -> None:
    with pytest.raises(KernelMismatchError) as caught:
        predict("lstsq", np.ones(train), [0] * 4, np.ones(test), [0] * 5, PLAIN)
    assert caught.value.data == {"shapes": [train, test]}


@pytest.mark.parametrize("shape", [(4, 2, 3, 2), (4, 2, 4, 1), (3, 4, 2, 4, 2), (0, 2, 0, 2), (8, 8), ()])
def test_a_train_kernel_of_another_shape_is_told_before_the_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(KernelMismatchError) as caught:
        fit("lstsq", np.ones(shape), [0] * 4, PLAIN)
    assert caught.value.data == {"shapes": [shape]}


@pytest.mark.parametrize(
    ("logits", "labels", "data"),
    [
        (2, [0, 1], {"shapes": [(20, 2), (2,)]}),
        (2, [0, 1, 2] + [0] * 17, {"example": 2}),
        (1, [-1.0, 0.0] * 10, {"example": 1}),
    ],
)
def test_labels_that_do_not_belong_to_the_kernel_are_told(
    logits: int, labels: list[float], data: dict[str, object]
) -> None:
    case = Case(logits)
    case.train_labels = np.array(labels)
    with pytest.raises(KernelMismatchError) as caught:
        case.predict("lstsq")
    assert caught.value.data == data


@pytest.mark.parametrize("given", ["train", "x"])
def test_untrained_logits_are_those_of_both_sides_or_of_none(given: str) -> None:
    case = Case(2)
    fitted = fit("lstsq", case.train, case.train_labels, PLAIN, case.train_f0 if given == "train" else None)
    with pytest.raises(ValueError, match="train_f0 and x_f0 go together"):
        fitted.predict(case.test, case.test_labels, case.test_f0 if given == "x" else None)


def test_untrained_logits_of_another_shape_are_told() -> None:
    case = Case(2)
    case.test_f0 = case.test_f0[:, :1]
    with pytest.raises(KernelMismatchError) as caught:
        case.predict("lstsq", f0=True)
    assert caught.value.data == {"shapes": [(7, 2), (7, 1)]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularization": -0.1}, "`kernel_regularization` is -0.1, but it must be from 0 to 1000000000000.0"),
        ({"regularization": 1e308}, "`kernel_regularization` is 1e+308, but it must be from 0 to 1000000000000.0"),
        ({"gamma": 0.0}, "`kernel_gamma` is 0.0, but it must be from 1e-100 to 1e+100"),
        ({"gamma": 1e-320}, "`kernel_gamma` is 1e-320, but it must be from 1e-100 to 1e+100"),
        ({"lambda_": 1.5}, "`kernel_lambda` is 1.5, but it must be from 0 to 1"),
        ({"lambda_": float("nan")}, "`kernel_lambda` is nan, but it must be from 0 to 1"),
        ({"f0_scaling": float("inf")}, "`f0_scaling` is inf, but it must be 0, or from 1e-100 to 1e+100"),
        ({"f0_scaling": 1e-320}, "`f0_scaling` is 1e-320, but it must be 0, or from 1e-100 to 1e+100"),
    ],
)
def test_settings_without_a_meaning_name_their_flag(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        SolverSettings(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("side", ["train", "X"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_untrained_logits_that_are_no_numbers_are_told_with_their_example(side: str, value: float) -> None:
    case = Case(2)
    (case.train_f0 if side == "train" else case.test_f0)[3, 1] = value
    with pytest.raises(NotFiniteError, match=f"the {side} logits of the untrained model") as caught:
        case.predict("lstsq", f0=True)
    assert caught.value.data == {"example": 3}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("side", ["train", "X"])
@pytest.mark.parametrize("value", [1e200, 1e-300])
def test_a_kernel_whose_squares_float64_does_not_hold_is_told(solver: str, side: str, value: float) -> None:
    case = Case(1, asymmetric=solver == "asym")
    kernel = case.train if side == "train" else case.test
    kernel *= value
    with pytest.raises(NotFiniteError, match=f"train and {side} ") as caught:
        case.predict(solver)
    assert caught.value.data == {"largest": np.abs(kernel).max()}


# With 1e-99 all but lstsq, which has no scale, are right to learn next to nothing.
@pytest.mark.parametrize("solver", ["lstsq", "svc", "asym", "svr"])
def test_kernels_of_extreme_size_are_solved_or_told(solver: str) -> None:
    for scale in (1e-99, 1e99):
        case = Case(1, 9, asymmetric=solver == "asym")
        plain = case.predict(solver)
        case.train, case.test = case.train * scale, case.test * scale
        if solver.startswith("sv") and scale > 1:
            with pytest.raises(SolverError) as caught:
                case.predict(solver)
            assert caught.value.data == {"solver": solver}
            continue
        found = case.predict(solver)
        assert np.isfinite(found.logits).all()
        if solver == "lstsq":
            np.testing.assert_allclose(found.logits, plain.logits, rtol=1e-6, atol=CLOSE)


def test_predictions_that_float64_does_not_hold_are_told() -> None:
    case = Case(1)
    case.train, case.test = case.train * 1e-90, case.test * 1e90
    with pytest.raises(NotFiniteError) as caught:
        case.predict("lstsq")
    assert caught.value.data == {"split": "X"}


@pytest.mark.parametrize("solver", ["lstsq", "svr", "asym"])
def test_untrained_logits_that_targets_vanish_beside_are_told(solver: str) -> None:
    case = Case(1, asymmetric=solver == "asym")
    with pytest.raises(SettingError) as caught:
        case.predict(solver, SolverSettings(f0_scaling=1e-60), f0=True)
    assert caught.value.data == {"setting": "f0_scaling", "value": 1e-60}
