"""The page on large-kernels: its commands run, on a tiny model, and its tables are the program's."""

import re
from pathlib import Path

from benchmarks import large_kernels
from command_line import Workplace
from doc_commands import argv_of, calls, commands, make_stand_in, page_text
from lmntk.config.kernel_arguments import KernelArguments
from lmntk.kernels.assembly import BAND_BYTES
from lmntk.solvers.blocked import DIRECT_COPIES, METHODS
from lmntk.solvers.blocked_cholesky import TILE
from lmntk.solvers.blocked_least_squares import LARGEST_RESIDUAL, MOST_STEPS, PANEL_NUMBERS
from lmntk.storage.tensor_files import MAPPED_BYTES

PAGE = page_text("large-kernels")


def test_the_commands_estimate_a_kernel_and_then_compute_and_solve_it(place: Workplace, tmp_path: Path) -> None:
    stand_in = make_stand_in(tmp_path)
    dry, run = (argv_of(call, stand_in) for call in calls(PAGE))
    assert dry == [*run, "--dry_run"]
    tiny = ("--model_name_or_path", str(place.model), "--data_dir", str(place.data), "--output_dir")
    outcome = place.call([*dry, *tiny, str(tmp_path / "dry")])
    assert outcome.status == 0 and "nothing was computed" in outcome.messages
    assert place.call([*run, *tiny, str(tmp_path / "run")]).status == 0
    assert (tmp_path / "run" / "test_results_sst-2.txt").is_file()


def test_the_command_of_the_benchmark_is_one_that_it_takes() -> None:
    (words,) = [words for words in commands(PAGE) if words[1:2] == ["tools/benchmarks/large_kernels.py"]]
    given = large_kernels.make_parser().read(words[2:])
    assert (given.examples, given.x_examples, given.memory_gb) == (20_000, 1000, 4.0)
    assert (given.regularization, given.threads, given.cg_tolerance) == (0.001, 2, 1e-8)


def test_the_flags_and_numbers_are_the_programs() -> None:
    flags = dict(re.findall(r"^\| `--(\w+)` \| (\S+) \|", PAGE, flags=re.MULTILINE))
    assert flags.keys() == {"lstsq_method", "cg_tolerance"}
    assert flags["lstsq_method"] == f"`{KernelArguments.lstsq_method}`"
    assert float(flags["cg_tolerance"]) == KernelArguments.cg_tolerance
    assert re.findall(r"^\| \| `(\w+)` \| `(\w+)` \| `(\w+)` \|", PAGE, flags=re.MULTILINE) == [tuple(METHODS)]
    for words in (
        f"{8 * DIRECT_COPIES} · n² bytes",
        f"tiles of {TILE} × {TILE}",
        f"panels of {8 * PANEL_NUMBERS // 2**20} MB",
        f"After {MOST_STEPS} steps",
        f"above {LARGEST_RESIDUAL:.0e} · ‖y‖".replace("e-0", "e-"),
        f"at most {BAND_BYTES // 2**20} MB",
        f"files of {MAPPED_BYTES // 2**20} MB or more",
    ):
        assert words in PAGE, words
