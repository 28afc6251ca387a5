"""The package as pip installs it: a wheel that works alone, extras that name what is imported, light imports."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import lmntk

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINEAR_KERNEL = (
    "import torch; from lmntk import empirical_ntk; "
    "print(empirical_ntk(torch.nn.Linear(2, 1), [torch.ones(1, 2)]).item())"
)


def run_python(*words: str, python: str = sys.executable, path: str = str(ROOT / "src")) -> str:
    """Run a command line outside the checkout; return what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": path}
    done = subprocess.run([python, *words], capture_output=True, text=True, env=env, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_of(lines: list[str]) -> dict[str, str]:
    """The packages of a list of requirements, and what is asked of their versions."""
    return dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in lines)  # type: ignore[union-attr, misc]


def test_the_public_names_are_there_and_import_nothing_before() -> None:
    assert set(lmntk.__all__) == {"KernelClassifier", "__version__", "empirical_ntk", "linearised"}
    for name in lmntk.__all__:
        assert getattr(lmntk, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lmntk.no_such_name
    heavy = run_python(
        "-c", "import sys, lmntk; print(sorted({'torch', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    assert heavy == "[]\n"


def test_empirical_ntk_works_with_torch_and_numpy_alone() -> None:
    extras = {name for row in PROJECT["optional-dependencies"].values() for name in names_of_modules(row)}
    blocked = f"import sys; sys.modules.update(dict.fromkeys({sorted(extras)})); "
    assert run_python("-c", blocked + LINEAR_KERNEL) == "3.0\n"
    asked = run_python("-c", blocked + "import lmntk\ntry: lmntk.KernelClassifier\nexcept ImportError as e: print(e)")
    assert "pip install 'lmntk[lm]'" in asked


def names_of_modules(requirements: list[str]) -> set[str]:
    """The modules that a list of requirements installs."""
    return {name.replace("scikit-learn", "sklearn") for name in names_of(requirements) if not name.startswith("lmntk")}


def test_the_extras_together_are_the_requirements() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = names_of([line for line in lines if line and not line.startswith("#")])
    assert names_of(PROJECT["dependencies"]).keys() == {"torch", "numpy"}
    extras = PROJECT["optional-dependencies"]
    assert extras["all"] == ["lmntk[lm,report,fast]"]
    together = names_of(extras["lm"]) | names_of(extras["report"]) | names_of(extras["fast"])
    assert together == {name: version for name, version in required.items() if name not in ("torch", "numpy")}


@pytest.mark.slow
def test_a_wheel_works_alone_in_a_fresh_environment(tmp_path: Path) -> None:
    source = shutil.copytree(ROOT / "src" / "lmntk", tmp_path / "source" / "src" / "lmntk").parents[1]
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    quiet = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    run_python("-m", "pip", "wheel", *quiet, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source), path="")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "lmntk").rglob("*.*")}
    assert {name for name in wanted if "__pycache__" not in name} <= names
    run_python("-m", "venv", "--without-pip", str(tmp_path / "env"))
    python = str(tmp_path / "env" / "bin" / "python")
    run_python("-m", "pip", "--python", python, "install", *quiet, str(wheel), path="")
    site = run_python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", python=python, path="").strip()
    # The packages of the environment that runs the tests, after its own: nothing is fetched.
    Path(site, "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    assert run_python("-c", LINEAR_KERNEL, python=python, path="") == "3.0\n"
    assert run_python("-c", "import lmntk; print(lmntk.__file__)", python=python, path="").startswith(site)
    command = str(tmp_path / "env" / "bin" / "lmntk")  # a script of Python
    assert "kernel" in run_python(command, "--help", python=python, path="")
    assert "SST-2" in run_python(command, "tasks", python=python, path="")
    classifier = "from lmntk import KernelClassifier as K; print(K('x', solver='svr').get_params()['solver'])"
    assert run_python("-c", classifier, python=python, path="") == "svr\n"
