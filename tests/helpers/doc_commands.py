"""The commands of README and docs, taken from the Markdown and made runnable on a tiny model."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from command_line import ROOT

FOREIGN = ("GRID_TAG", "LOAD_KERNELS_TAG", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def page_path(name: str) -> Path:
    """Where the page of that name lies, whatever kind of page it is."""
    (found,) = (ROOT / "docs").rglob(f"{name}.md")
    return found


def page_text(name: str) -> str:
    """The text of that page."""
    return page_path(name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of every command in the bash blocks; a loop over `id` is what it does once, for 0 and for 1."""
    script = "".join(blocks(text, "bash")).replace("\\\n", " ")
    for loop in re.findall(r"^for id in 0 1; do\n.*?^done\n", script, flags=re.DOTALL | re.MULTILINE):
        body = loop.split("\n", 1)[1].removesuffix("done\n")
        script = script.replace(loop, "".join(body.replace("$id", number) for number in "01"))
    return [words for words in (shlex.split(line, comments=True) for line in script.splitlines()) if words]


def calls(text: str) -> list[list[str]]:
    """The commands that call run_fewshot.sh, variables in front."""
    return [words for words in commands(text) if "run_fewshot.sh" in words]


def argv_of(call: list[str], stand_in: Path) -> list[str]:
    """What run.py is given by a call of run_fewshot.sh."""
    variables = dict(word.split("=", 1) for word in call[: call.index("bash")])
    script = (ROOT / "run_fewshot.sh").read_text(encoding="utf-8")
    assert all(f"${{{name}:-" in script for name in variables), f"{variables}: run_fewshot.sh reads no such variable"
    environment = environment_with(stand_in) | variables
    done = subprocess.run(
        call[call.index("bash") :], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    words = done.stdout.split("\0")[:-1]
    return words[words.index(f"{ROOT}/run.py") + 1 :]


def make_stand_in(folder: Path) -> Path:
    """Something in place of Python that prints the words it is given."""
    stand_in = folder / "python"
    stand_in.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n", encoding="utf-8")
    stand_in.chmod(0o755)
    return stand_in


def environment_with(stand_in: Path) -> dict[str, str]:
    """The environment of a machine without a GPU where `stand_in` is Python, whatever calls it."""
    own = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    return own | {
        "PYTHON": str(stand_in),
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{stand_in.parent}{os.pathsep}{own['PATH']}",
    }


def python_calls(script: str, folder: Path) -> list[list[str]]:
    """Run a script of bash as it stands, loops and all; return what each call of Python in it was given.

    Args:
        script: Commands that call python or run_fewshot.sh and write nothing of their own.
        folder: An empty one, for the stand-in.
    """
    stand_in = make_stand_in(folder)
    text = stand_in.read_text(encoding="utf-8")
    stand_in.write_text(f"{text}printf '\\n\\0'\n", encoding="utf-8")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=environment_with(stand_in),
        capture_output=True,
        text=True,
        check=True,
    )
    return [call.split("\0")[:-1] for call in done.stdout.split("\n\0")[:-1]]


def flags_of_run(call: list[str]) -> list[str]:
    """What run.py is given by a call of Python, whoever starts it."""
    (number,) = [number for number, word in enumerate(call) if Path(word).name == "run.py"]
    return call[number + 1 :]
