"""The direction of imports, held over the syntax trees: data flows one way, and the kernels can be lifted out."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "lmntk"
PYTHON_FILES = sorted(
    path
    for pattern in ("run.py", "src/**/*.py", "tools/**/*.py", "examples/**/*.py", "tests/**/*.py")
    for path in ROOT.glob(pattern)
)

# What each room of the package (a folder, or a file at its root) may import of the others.
MAY_IMPORT = {
    "errors": set(),
    "distributed": {"errors"},
    "interrupts": {"errors", "distributed"},
    "startup": set(),
    "kernels": set(),
    "solvers": {"errors"},
    "storage": {"errors", "kernels"},
    "data": {"errors", "storage"},
    "prompts": {"errors", "storage", "data"},
    "models": {"errors", "storage", "kernels"},
    "config": {"errors", "distributed", "interrupts", "kernels", "solvers", "storage", "data", "prompts"},
    "experiment": {"errors", "distributed", "kernels", "solvers", "storage", "data", "prompts", "models", "config"},
    "trainers": {
        *("errors", "distributed", "interrupts", "kernels", "solvers", "storage", "data", "prompts", "models"),
        *("config", "experiment"),
    },
    "analysis": {"errors", "solvers", "storage", "data"},
    "report": {"errors", "solvers", "storage", "analysis"},
    "runs": {"errors", "interrupts", "solvers", "storage", "data", "prompts"},
    "published": {"errors", "interrupts", "kernels", "storage", "data"},
}
MAY_IMPORT["commands"] = set(MAY_IMPORT)

# Rooms, or files, that must load in no time or stand alone: the packages they may import besides the standard library.
MAY_REQUIRE = {
    "errors": set(),
    "interrupts": set(),
    "startup": {"torch", "transformers"},
    "kernels": {"torch", "numpy"},
    "kernels/sign_bits_compiled": {"numpy", "numba", "llvmlite"},
    "solvers": {"numpy", "scipy", "sklearn", "threadpoolctl", "tqdm"},
    "data": {"numpy"},
    "data/metrics": {"numpy", "scipy", "sklearn"},
    "prompts": {"numpy", "torch", "tqdm", "transformers"},
    "prompts/templates": set(),
    "prompts/prompt_files": set(),
    "prompts/demonstrations": {"numpy"},
    "storage/atomic": set(),
    "storage/readers": {"numpy"},
    "storage/wording": set(),
    "config/tool_parser": set(),
    "config/legacy_flags": set(),
    "config/command_words": set(),
    "analysis": {"numpy", "scipy", "threadpoolctl", "tqdm"},
    "report": {"numpy", "matplotlib", "pandas"},
    "runs": {"numpy", "pandas", "tqdm"},
    "published": {"tqdm"},
    "commands/main": set(),
    "commands/tasks": set(),
}

# What pip installs besides torch and numpy, by extra, and the rooms that this must be enough for.
ROOMS_OF_EXTRAS = {
    "core": {"errors", "kernels"},
    "report": {
        "errors",
        "distributed",
        "interrupts",
        "kernels",
        "solvers",
        "storage",
        "data",
        "analysis",
        "report",
        "runs",
    },
    "lm": set(MAY_IMPORT) - {"report", "commands"},
}

SPEAK_OF_FLAGS = {"config", "commands"}
"""The rooms that know how a setting is spelled on a command line; all others name it in backticks."""


def part_of(path: Path) -> str:
    """Return the row of `MAY_IMPORT` that a file of the package belongs to: its top folder, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def may_require(path: Path) -> set[str] | None:
    """Return the packages that a file may import: its own row of `MAY_REQUIRE`, else its room's, else None for any."""
    name = path.relative_to(PACKAGE).as_posix().removesuffix(".py")
    return MAY_REQUIRE.get(name, MAY_REQUIRE.get(part_of(path)))


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


def program_files() -> list[Path]:
    return [path for path in PYTHON_FILES if ROOT / "tests" not in path.parents]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", package_files(), ids=name_of)
def test_a_part_imports_only_the_parts_that_its_row_names(path: Path) -> None:
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} has no row in MAY_IMPORT: say there what it may import"
    inside = [name.split(".") for name in imported_modules(path) if name.split(".")[0] == "lmntk"]
    parts = {name[1] for name in inside if len(name) > 1} - {"__version__", part}
    assert parts <= MAY_IMPORT[part]


@pytest.mark.parametrize("path", [path for path in package_files() if may_require(path) is not None], ids=name_of)
def test_a_part_that_loads_fast_or_stands_alone_requires_only_the_packages_that_its_row_names(path: Path) -> None:
    packages = {name.split(".")[0] for name in imported_modules(path)} - set(sys.stdlib_module_names) - {"lmntk"}
    assert packages <= may_require(path)


def test_the_requirements_are_the_packages_that_the_program_imports() -> None:
    program = program_files()
    imported = {name.split(".")[0] for path in program for name in imported_modules(path)}
    tools = {part for path in program if PACKAGE not in path.parents for part in (path.stem, path.parent.name)}
    # The benchmarks measure peers where somebody has installed them; llvmlite is part of numba.
    peers = {"opacus", "bergson", "datasets", "kronfluence", "trak"}
    imported -= {"lmntk", "llvmlite", *peers, *tools, *sys.stdlib_module_names}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.split("[=<>]", line)[0] for line in lines if line and not line.startswith("#")}
    # Nothing here imports these: transformers' Trainer needs accelerate, and pandas writes LaTeX with jinja2.
    assert required - {"accelerate", "jinja2"} == {name.replace("sklearn", "scikit-learn") for name in imported}


@pytest.mark.parametrize("extra", ROOMS_OF_EXTRAS)
def test_an_extra_installs_what_its_rooms_import(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + ([] if extra == "core" else project["optional-dependencies"][extra])
    installed = {re.split("[=<>]", line)[0].replace("scikit-learn", "sklearn") for line in lines}
    # What the extra `fast` compiles, the rest does without.
    compiled = PACKAGE / "kernels" / "sign_bits_compiled.py"
    files = [path for path in package_files() if part_of(path) in ROOMS_OF_EXTRAS[extra] and path != compiled]
    imported = {name.split(".")[0] for path in files for name in imported_modules(path)}
    assert imported - {"lmntk", *sys.stdlib_module_names} <= installed


def test_the_table_of_parts_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {part for part, needs in MAY_IMPORT.items() if part not in done and needs <= done}
        assert ready, f"these parts may import each other in a circle: {sorted(MAY_IMPORT.keys() - done)}"
        done |= ready


def test_the_package_itself_imports_nothing_before_a_public_name_is_used() -> None:
    """What stands under TYPE_CHECKING is for type checkers; tests/test_packaging.py looks at a process."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    at_once = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert at_once == {"importlib", "typing"} and not any(isinstance(node, ast.Import) for node in tree.body)


def test_the_oracle_knows_nothing_of_the_kernels() -> None:
    assert not [
        name for name in imported_modules(ROOT / "tests" / "helpers" / "oracle.py") if name.startswith("lmntk.kernels")
    ]


def test_no_file_of_the_program_imports_a_test() -> None:
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    for path in program_files():
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


def flags_in_strings(path: Path) -> list[str]:
    """Return the strings of a file, docstrings left out, that hold a flag: where each begins, and the flag."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        f"line {node.lineno}: {found[0]}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if (found := re.search(r"--[a-z]\w*", node.value))
    ]


@pytest.mark.parametrize(
    "path",
    [path for path in package_files() if part_of(path) not in SPEAK_OF_FLAGS],
    ids=name_of,
)
def test_below_config_no_string_names_a_flag(path: Path) -> None:
    assert flags_in_strings(path) == []
