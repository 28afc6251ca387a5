"""The direction of imports, held over the syntax trees: data flows one way, and the kernels can be lifted out."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "lmntk"
PYTHON_FILES = sorted(
    path for pattern in ("run.py", "src/**/*.py", "tools/*.py", "tests/*.py") for path in ROOT.glob(pattern)
)

# What each part of the package (a file, or a folder as a whole) may import of the others.
MAY_IMPORT = {
    "errors": set(),
    "kernels": set(),
    "distributed": {"errors"},
    "stopping": {"errors", "distributed", "starting"},
    "files": {"errors"},
    "tensor_files": {"errors"},
    "results": {"errors", "files", "tensor_files"},
    "tasks": {"errors"},
    "templates": {"errors"},
    "text_files": {"errors"},
    "starting": set(),
    "tool_flags": {"errors", "stopping", "command_words"},
    "bounds": {"errors"},
    "solver_problem": {"errors", "bounds"},
    "penalised_loss": {"solver_problem"},
    "logistic": {"errors", "solver_problem", "penalised_loss"},
    "interior_point": {"solver_problem"},
    "support_vectors": {"errors", "solver_problem", "interior_point"},
    "lbfgs": {"logistic", "solver_problem"},
    "flattened": {"lbfgs", "logistic", "solver_problem", "support_vectors"},
    "solvers": {"errors", "solver_problem", "logistic", "lbfgs", "flattened", "support_vectors"},
    "as_published": set(),
    "flag_fields": set(),
    "old_arguments": {"errors", "flag_fields"},
    "legacy_flags": {"errors"},
    "command_words": {"errors", "legacy_flags"},
    "rows": {"errors", "tasks", "text_files"},
    "examples": {"errors", "tasks", "rows"},
    "metrics": {"errors", "tasks"},
    "kshot": {"errors", "tasks", "rows", "examples"},
    "prompts": {"errors", "templates"},
    "prompt_files": {"errors", "text_files"},
    "demonstrations": {"errors", "files", "tasks", "examples", "templates"},
    "features": {"errors", "tasks", "examples", "templates", "prompts", "demonstrations"},
    "models": {"errors", "files", "kernels"},
    "parameters": {"errors", "models"},
    "arguments": {
        "errors",
        "tasks",
        "kernels",
        "solvers",
        "legacy_flags",
        "command_words",
        "distributed",
        "as_published",
        "flag_fields",
        "old_arguments",
    },
    "run_log": {"errors", "tasks"},
    "prompt_settings": {"errors", "arguments", "tasks", "templates", "prompt_files", "prompts", "demonstrations"},
    "checks": {
        "errors",
        "bounds",
        "as_published",
        "old_arguments",
        "arguments",
        "tasks",
        "prompt_settings",
        "kernels",
        "solvers",
    },
    "token_checks": {"errors", "features", "models"},
    "build": {
        "token_checks",
        "errors",
        "distributed",
        "arguments",
        "tasks",
        "examples",
        "templates",
        "prompts",
        "prompt_settings",
        "demonstrations",
        "features",
        "models",
        "parameters",
        "run_splits",
    },
    "run_splits": {"errors", "arguments", "examples", "results", "tasks"},
    "archives": {"errors"},
    "downloads": {"errors", "files", "examples", "stopping"},
    "published": {"errors", "files", "tasks", "examples"},
    "output_folder": {"files", "errors"},
    "tile_store": {"files", "errors", "results", "kernels"},
    "kernel_files": {"files", "errors", "results", "tile_store"},
    "kernel_work": {"distributed", "results", "stopping", "kernels", "tile_store"},
    "descriptions": {"tasks", "arguments", "features", "parameters", "build", "results"},
    "layers_alone": {"files", "results", "solvers"},
    "record": {"files", "build", "descriptions", "results", "solver_problem", "tasks"},
    "analysis": set(),
    "stored_runs": {"errors", "files", "results", "tasks", "examples", "solver_problem"},
    "study": {"errors", "tasks", "metrics", "solver_problem", "solvers", "stored_runs", "analysis"},
    "report": {"solver_problem", "analysis", "stored_runs", "study"},
    "trainers": {
        "errors",
        "arguments",
        "tasks",
        "features",
        "models",
        "parameters",
        "kernels",
        "solver_problem",
        "solvers",
        "penalised_loss",
        "logistic",
        "lbfgs",
        "metrics",
        "distributed",
        "stopping",
        "files",
        "results",
        "build",
        "descriptions",
        "kernel_files",
        "kernel_work",
        "layers_alone",
    },
}

# Parts that must load in no time or stand alone: the packages they may import besides the standard library.
MAY_REQUIRE = {
    "errors": set(),
    "starting": set(),
    "stopping": set(),
    "tasks": set(),
    "rows": set(),
    "examples": set(),
    "kshot": {"numpy"},
    "prompts": {"transformers"},
    "prompt_files": set(),
    "templates": set(),
    "text_files": set(),
    "tool_flags": set(),
    "legacy_flags": set(),
    "command_words": set(),
    "kernels": {"torch", "numpy"},
    "bounds": set(),
    "solver_problem": {"numpy"},
    "solvers": {"numpy", "scipy", "threadpoolctl"},
    "interior_point": {"numpy", "scipy"},
    "support_vectors": {"numpy", "sklearn"},
    "penalised_loss": {"numpy", "scipy"},
    "logistic": {"numpy", "scipy", "sklearn"},
    "demonstrations": {"numpy"},
    "run_log": set(),
    "archives": set(),
    "downloads": {"tqdm"},
    "published": set(),
    "metrics": {"numpy", "scipy", "sklearn"},
    "analysis": {"numpy", "scipy"},
    "stored_runs": {"numpy"},
    "report": {"numpy", "matplotlib"},
}


def part_of(path: Path) -> str:
    """Return the row of the tables that a file of the package belongs to: its top folder, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the absolute name of every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                folder = path.parents[node.level - 1].relative_to(PACKAGE.parent)
                base = ".".join([*folder.parts, *filter(None, [node.module])])
            else:
                base = node.module or ""
            # `from lmntk import tasks` names the part only in what it imports.
            yield from ([f"{base}.{alias.name}" for alias in node.names] if base == "lmntk" else [base])


def package_files() -> list[Path]:
    return [path for path in PYTHON_FILES if PACKAGE in path.parents and path != PACKAGE / "__init__.py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", package_files(), ids=name_of)
def test_a_part_imports_only_the_parts_that_its_row_names(path: Path) -> None:
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} has no row in MAY_IMPORT: say there what it may import"
    inside = [name.split(".") for name in imported_modules(path) if name.split(".")[0] == "lmntk"]
    parts = {name[1] for name in inside if len(name) > 1} - {"__version__", part}
    assert parts <= MAY_IMPORT[part]


@pytest.mark.parametrize("path", [path for path in package_files() if part_of(path) in MAY_REQUIRE], ids=name_of)
def test_a_part_that_loads_fast_or_stands_alone_requires_only_the_packages_that_its_row_names(path: Path) -> None:
    packages = {name.split(".")[0] for name in imported_modules(path)} - set(sys.stdlib_module_names) - {"lmntk"}
    assert packages <= MAY_REQUIRE[part_of(path)]


def test_the_requirements_are_the_packages_that_the_program_imports() -> None:
    program = [path for path in PYTHON_FILES if path.parent.name != "tests"]
    imported = {name.split(".")[0] for path in program for name in imported_modules(path)}
    tools = {path.stem for path in program if path.parent.name == "tools"}
    # The benchmark measures a peer beside the engines where somebody has installed it.
    imported -= {"lmntk", "opacus", *tools, *sys.stdlib_module_names}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.split("[=<>]", line)[0] for line in lines if line and not line.startswith("#")}
    # transformers' Trainer needs accelerate, which nothing here imports.
    assert required - {"accelerate"} == {name.replace("sklearn", "scikit-learn") for name in imported}


def test_the_table_of_parts_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {part for part, needs in MAY_IMPORT.items() if part not in done and needs <= done}
        assert ready, f"these parts may import each other in a circle: {sorted(MAY_IMPORT.keys() - done)}"
        done |= ready


def test_the_package_itself_imports_nothing() -> None:
    assert list(imported_modules(PACKAGE / "__init__.py")) == []


def test_the_oracle_knows_nothing_of_the_kernels() -> None:
    assert not [name for name in imported_modules(ROOT / "tests" / "oracle.py") if name.startswith("lmntk.kernels")]


def test_no_file_of_the_program_imports_a_test() -> None:
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")}
    for path in PYTHON_FILES:
        if path.parent.name != "tests":
            assert tests.isdisjoint(imported_modules(path)), name_of(path)


def test_the_top_level_script_stays_under_120_lines() -> None:
    assert len((ROOT / "run.py").read_text(encoding="utf-8").splitlines()) < 120


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_no_file_runs_text_as_code_or_reads_a_pickle_that_could(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in {"eval", "exec"}, f"line {node.lineno}"
            assert call not in {"pickle.load", "pickle.loads", "pickle.Unpickler"}, f"line {node.lineno}"
            if call == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"line {node.lineno}"
            if call in {"np.load", "numpy.load"}:
                assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), f"line {node.lineno}"
