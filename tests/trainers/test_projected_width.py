"""Runs with projected kernels: the error that they report, the width that a tolerance chooses, and who finds it."""

import json
from pathlib import Path

import pytest
import torch

import oracle
from command_line import Workplace, read_kernel, read_results, sst2_rows, write_rows
from interrupted_runs import TILED, stop_after
from lmntk.commands import gather, influence
from lmntk.config.record_arguments import arguments_of_record
from lmntk.kernels.projection_check import NUM_DRAWS
from lmntk.storage.paths import RunPaths

PROJECTED = ("--kernel_engine", "projected", "--kernel_dtype", "float64")
SIZES = {"train": 8, "dev": 4, "test": 6}


def described(folder: Path, split: str = "train") -> dict:
    return json.loads((folder / f"{split}_kernels_sst-2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    for split, number in SIZES.items():
        write_rows(place.data / f"{split}.tsv", [("sentence", "label"), *sst2_rows(number, split)])
    return place


@pytest.fixture(scope="module")
def exact(place: Workplace) -> dict[str, torch.Tensor]:
    folder = place.run("--kernel_dtype", "float64", output="exact")
    return {split: read_kernel(folder, split) for split in SIZES}


@pytest.fixture(scope="module")
def limits(place: Workplace) -> dict[int, float]:
    """The tolerances that the two smallest widths reach just so."""
    found = {}
    for width in (8, 12):
        folder = place.run(*PROJECTED, "--projection_width", str(width), output=f"width {width}")
        error = described(folder)["projection_error"]
        found[width] = max(error["own"], error["mean"] + error["std"]) * 1.001  # after rounding to four digits
    assert found[12] < 0.9 * found[8]
    return found


def test_a_run_reports_the_error_that_whole_kernels_show(place: Workplace, exact: dict[str, torch.Tensor]) -> None:
    argv = place.argv(*PROJECTED, "--projection_width", "8", "--kernel_regularization", "0.01", output="reported")
    outcome = place.call(argv)
    folder = place.folder / "reported"
    assert "error of the projection of width 8 on 8 × 6 examples: entries" in outcome.messages
    # The sub-sample is the whole.
    error = described(folder)["projection_error"]
    assert error["own"] == pytest.approx(oracle.relative_error(read_kernel(folder, "train"), exact["train"]), rel=1e-3)
    assert (error["logits"], error["draws"], error["examples"]) == (None, NUM_DRAWS, [8, 8])
    error = described(folder, "test")["projection_error"]
    assert error["own"] == pytest.approx(oracle.relative_error(read_kernel(folder, "test"), exact["test"]), rel=1e-3)
    assert read_results(folder / "test_results_sst-2.txt")["projection_error"] == error["own"]

    def logits(train: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        labels = torch.eye(2, dtype=torch.float64)[[0, 1] * 4].reshape(-1)
        flat = train.reshape(16, 16)
        ridge = 0.01 * torch.linalg.matrix_norm(flat, 2) * torch.eye(16)
        return other.reshape(16, -1).T @ torch.linalg.solve(flat + ridge, labels)

    wanted, found = (logits(one["train"], one["test"]) for one in (exact, {s: read_kernel(folder, s) for s in SIZES}))
    assert error["logits"]["own"] == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-3)
    assert error["logits"]["regularization"] == 0.01
    assert 0 <= error["logits"]["equal_classes"] <= 1


def test_a_tolerance_chooses_the_smallest_width_that_reaches_it(place: Workplace, limits: dict[int, float]) -> None:
    tolerance = (limits[8] + limits[12]) / 2
    chosen = place.run(*PROJECTED, "--projection_tolerance", str(tolerance), output="chosen")
    given = place.run(*PROJECTED, "--projection_width", "12", output="given")
    for split in SIZES:
        assert described(chosen, split)["projection"] == {"width": 12, "seed": 0}
        assert described(chosen, split)["projection_tolerance"] == tolerance
        name = f"{split}_kernels_sst-2.pt"
        assert (chosen / name).read_bytes() == (given / name).read_bytes()
    # The record has the width, and the same command finds it again, without another check.
    record = json.loads(RunPaths(chosen, "sst-2").record().read_text(encoding="utf-8"))
    assert arguments_of_record(record)[2].projection.width == 12
    (chosen / "test_kernels_sst-2.pt").unlink()
    (chosen / "test_kernels_sst-2.json").unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lmntk.trainers.kernel_planning.choose_width", None)
        place.run(*PROJECTED, "--projection_tolerance", str(tolerance), output="chosen")
        loaded = ["--load_kernels", "chosen", "--model_name_or_path", "no/model"]
        place.run(*PROJECTED, "--projection_tolerance", str(tolerance), *loaded, output="loaded")
    assert (chosen / "test_kernels_sst-2.pt").read_bytes() == (given / "test_kernels_sst-2.pt").read_bytes()
    # Another tolerance is another width, here none. One that was measured on other examples may be another one, too.
    for flags, sentence in (
        (("--projection_tolerance", str(tolerance), "--projection_check", "2", *loaded), "and this --projection_check"),
        (("--projection_tolerance", str(limits[8])), "projection.width: stored 12, now 8"),
        ((*loaded, "--projection_tolerance", "0.5"), "give --projection_width 12 instead"),
        (("--projection_tolerance", "1e-6"), "is not reached by projecting weights whose longest side is"),
    ):
        outcome = place.call(place.argv(*PROJECTED, *flags, output="chosen"))
        assert outcome.status == 2
        assert sentence in outcome.err, outcome.err


def test_a_width_that_is_too_small_is_refused_before_the_kernel_is_computed(
    place: Workplace, limits: dict[int, float]
) -> None:
    tolerance = str(limits[12])
    argv = place.argv(*PROJECTED, "--projection_width", "8", "--projection_tolerance", tolerance, output="small")
    outcome = place.call(argv)
    assert outcome.status == 2
    assert f"is too small for --projection_tolerance {float(tolerance):g}: the relative error" in outcome.err
    assert f"{limits[8]:.2g}; take --projection_width 12" in outcome.err
    assert not (place.folder / "small").exists()


def test_a_width_beside_a_tolerance_is_checked_where_the_kernel_is_in_a_file(
    place: Workplace, limits: dict[int, float]
) -> None:
    """The tolerance that the width 8 reaches just so, and a smaller one."""
    other = "take a larger width with --overwrite_kernels or another --output_dir"
    for flags, output, way in (
        (("--load_kernels", "width 8"), "from a file", "load kernels of a larger width"),
        ((), "width 8", other),
        (("--dry_run",), "width 8", other),
    ):
        argv = place.argv(*PROJECTED, "--projection_width", "8", *flags, output=output)
        assert place.call([*argv, "--projection_tolerance", str(limits[8])]).status == 0
        outcome = place.call([*argv, "--projection_tolerance", str(0.99 * limits[8])])
        assert outcome.status == 2
        assert "train_kernels_sst-2.pt is 0.0" in outcome.err
        assert f"{limits[8]:.2g}; allow more, or {way}" in outcome.err


def test_a_width_that_was_given_beside_a_tolerance_is_not_one_that_the_tolerance_chose(
    place: Workplace, limits: dict[int, float]
) -> None:
    tolerance = ("--projection_tolerance", str(limits[8]))
    folder = place.run(*PROJECTED, "--projection_width", "12", *tolerance, output="both")
    assert "projection_tolerance" not in described(folder)
    outcome = place.call(place.argv(*PROJECTED, *tolerance, output="both"))
    assert outcome.status == 2 and "projection.width: stored 12, now 8" in outcome.err


def test_an_error_that_was_measured_on_other_examples_is_told(place: Workplace, limits: dict[int, float]) -> None:
    argv = place.argv(*PROJECTED, "--projection_width", "8", output="width 8")
    told = "its error was measured with --projection_check 32, and --overwrite_kernels measures it anew"
    assert told not in place.call(argv).messages
    assert told in place.call([*argv, "--projection_check", "4"]).messages


def test_a_kernel_with_nothing_to_project_is_exact_and_has_no_tolerance(place: Workplace) -> None:
    argv = place.argv(*PROJECTED, "--only_biases", output="biases")
    assert ", exact here (0 of " in place.call(argv).messages
    outcome = place.call(place.argv(*PROJECTED, "--only_biases", "--projection_tolerance", "0.1", output="other"))
    assert outcome.status == 2
    assert "none of the weights is projected, so that the kernel is exact: take --kernel_engine factored" in outcome.err


def test_an_exact_kernel_and_an_estimate_are_told_apart_by_their_flags(
    place: Workplace, limits: dict[int, float]
) -> None:
    outcome = place.call(place.argv("--kernel_dtype", "float64", "--load_kernels", "width 8", output="mixed"))
    assert outcome.status == 2
    stored = "stored --kernel_engine projected --projection_width 8 --projection_seed 0, now an exact kernel"
    assert stored in outcome.err


def test_tables_and_analyses_name_estimates(
    place: Workplace,
    limits: dict[int, float],
    exact: object,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    argv = ["--log", str(place.folder / "log"), "--condition", "{'task_name': 'sst-2'}", "--format", "markdown"]
    assert gather.main(argv) == 0
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    place_of = [cell.strip() for cell in header.split("|")].index("projection_width")
    widths = {row.split("|")[place_of].strip() for row in rows}
    assert {"exact", "8", "12"} <= widths
    folder = place.folder / "width 8"
    assert influence.main([str(folder)]) == 0
    own = described(folder)["projection_error"]["own"]
    assert f"is an estimate by random projections, whose entries are {own:.1%} off" in caplog.text


def test_a_stopped_run_with_a_tolerance_goes_on_with_its_width_to_the_same_bytes(
    place: Workplace, limits: dict[int, float]
) -> None:
    flags = (*PROJECTED, *TILED, "--projection_tolerance", str(limits[12]))
    whole = place.run(*flags, output="undisturbed")
    for tiles in (2, 14):  # in the kernel of train, and in a later one
        with pytest.MonkeyPatch.context() as patched:
            stop_after(patched, tiles)
            assert place.call(place.argv(*flags, output=f"stopped {tiles}")).status == 143
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("lmntk.trainers.kernel_planning.choose_width", None)
            found = place.run(*flags, output=f"stopped {tiles}")
        for split in SIZES:
            name = f"{split}_kernels_sst-2.pt"
            assert (found / name).read_bytes() == (whole / name).read_bytes()
            assert described(found, split)["projection_error"] == described(whole, split)["projection_error"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--projection_check", "0"), "the error of an estimate is always measured"),
        (("--projection_tolerance", "0"), "is not an error that an estimate reaches"),
        (("--projection_tolerance", "inf"), "is not an error that an estimate reaches"),
    ],
)
def test_settings_that_measure_nothing_are_refused(place: Workplace, flags: tuple[str, ...], sentence: str) -> None:
    outcome = place.call(place.argv(*PROJECTED, *flags, output="refused"))
    assert outcome.status == 2
    assert sentence in outcome.err
    outcome = place.call(place.argv(*flags, output="refused"))
    assert "is for --kernel_engine projected" in outcome.err


def test_a_dry_run_says_the_check_and_the_width(place: Workplace) -> None:
    outcome = place.call(place.argv(*PROJECTED, "--projection_tolerance", "0.9", "--dry_run", output="dry"))
    assert outcome.status == 0
    assert "projected engine of width 8 and seed 0" in outcome.messages
    assert "would measure the error of the estimate on 8 × 8 examples" in outcome.messages
    assert not (place.folder / "dry").exists()
