"""All pages: whoever writes one with commands adds a test that runs them."""

import re
from pathlib import Path

import pytest

from command_line import ROOT
from doc_commands import blocks, commands
from lmntk.config.arguments import flag_names

TESTED_BY = {
    "README": "docs/test_readme.py",
    "bfloat16": "docs/test_docs_bfloat16.py",
    "as-published": "config/test_as_published.py",
    "features": "docs/test_docs_features.py",
    "first-kernel": "docs/test_docs_tutorial.py",
    "forecast": "docs/test_docs_forecast.py",
    "influence": "docs/test_docs_influence.py",
    "kernel-behaviour": "docs/test_docs_behaviour.py",
    "large-kernels": "docs/test_docs_large_kernels.py",
    "own-data": "docs/test_docs_own_data.py",
    "parameter-subsets": "docs/test_docs_subsets.py",
    "performance": "docs/test_docs_cost.py",
    "projection": "docs/test_docs_projection.py",
    "prompts-and-selection": "docs/test_docs_forecast.py",
    "published-kernels": "published/test_install.py",
    "reproduce": "docs/test_docs_behaviour.py",
    "report": "report/test_report.py",
    "scaling": "docs/test_docs_cost.py",
    "solvers-compared": "docs/test_docs_solvers.py",
    "templates": "docs/test_docs_templates.py",
    "training": "docs/test_docs.py",
    "troubleshooting": "docs/test_docs_troubleshooting.py",
    "uncertainty": "docs/test_docs_uncertainty.py",
    "validation": "docs/test_docs_validation.py",
}
"""The pages with commands, and who runs them."""

PATHS = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
PAGES = {name: path.read_text(encoding="utf-8") for name, path in PATHS.items()}
# A command that stands somewhere else than in a bash block would escape the tests.
A_COMMAND = r"^ *(?:\$ )?(?:[A-Z_]+=\S* )*(?:bash|python3?|make|pip|torchrun|\.venv/bin/\w+) .*"


def test_every_page_with_commands_has_a_test_that_runs_them() -> None:
    """Whoever writes a page with commands adds its test, and a row above."""
    assert {name for name, text in PAGES.items() if blocks(text, "bash")} <= TESTED_BY.keys()
    for page, module in TESTED_BY.items():
        if blocks(PAGES[page], "bash"):
            source = (ROOT / "tests" / module).read_text(encoding="utf-8")
            assert page in source, f"{module} does not read {page}"
            for words in commands(PAGES[page]):
                for tool in (Path(word).stem for word in words if re.fullmatch(r"tools/\w+\.py", word)):
                    assert tool in source, f"{page} calls {tool}, of which {module} knows nothing"


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_bash_blocks_only(page: str) -> None:
    without_blocks = re.sub(r"^ *```\w*\n.*?^ *```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    assert re.findall(A_COMMAND, without_blocks, flags=re.MULTILINE) == []
    assert re.findall(r"^ +```(?:bash|python)", PAGES[page], flags=re.MULTILINE) == [], "blocks begin at the margin"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_the_repository_leads_to_a_file(page: str) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if "://" not in link]
    assert [link for link in links if link and not PATHS[page].parent.joinpath(link).exists()] == []


@pytest.mark.parametrize(
    "name", ["as-published", "solvers", "solvers-compared", "scaling", "performance", "limits", "engines"]
)
def test_every_flag_and_file_that_it_names_exists(name: str) -> None:
    page = PAGES[name]
    files = ("tools/benchmark_kernels.py", "tools/benchmarks/whole_runs.py", "tools/benchmarks/large_peers.py")
    files += ("tools/check_gpu.py",)
    tools = "".join((ROOT / file).read_text() for file in (*files, "src/lmntk/commands/estimate.py"))
    of_tools = {*re.findall(r"\"--(\w+)\"", tools), "mode", "k", "task", "standalone", "nproc_per_node", "max", "list"}
    assert {flag for flag in re.findall(r"--(\w+)", page) if flag not in flag_names() | of_tools} == set()
    for path in re.findall(r"`((?:src|tools|tests|models|kernels)/[\w/]+\.py)`", page):
        assert (ROOT / path).is_file() or (ROOT / "src" / "lmntk" / path).is_file(), path


def test_the_make_targets_and_the_help_agree() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.MULTILINE)
    assert re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE) == [" ".join(targets)]
    assert {"venv", "demo", "test"} <= set(targets)
