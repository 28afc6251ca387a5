"""What the site has besides the pages of docs/: README as its first page, and an API reference made of docstrings."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "lmntk"
PUBLIC = (
    "lmntk.experiment.kernel_classifier.KernelClassifier",
    "lmntk.kernels.empirical.empirical_ntk",
    "lmntk.kernels.linearised.linearised",
)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of docs/."""
    from mkdocs.structure.files import File

    for name, text in generated_pages():
        files.append(File.generated(config, name, content=text))
    return files


def generated_pages() -> Iterator[tuple[str, str]]:
    """Yield the place in the site and the text of each page that is not in docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    yield "index.md", re.sub(r"\]\(docs/", "](", _in_site(readme, ROOT))
    yield "api/index.md", "# API reference\n\n" + "".join(f"::: {name}\n\n" for name in PUBLIC)
    for room in sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")):
        yield f"api/{room}.md", f"# lmntk.{room}\n\n::: lmntk.{room}\n    options:\n      show_root_heading: false\n"
    for file in ("errors", "distributed", "interrupts"):
        yield f"api/{file}.md", f"# lmntk.{file}\n\n::: lmntk.{file}\n    options:\n      show_root_heading: false\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leave of a link to a file that the site does not have its words."""
    return markdown if page.file.generated_by else _in_site(markdown, DOCS / Path(page.file.src_uri).parent)


def _in_site(markdown: str, folder: Path) -> str:
    def in_site(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        path = Path(os.path.normpath(folder / target))
        if "://" in target or DOCS in path.parents or not path.exists():
            return match[0]
        if path == ROOT / "README.md":
            return f"[{words}]({os.path.relpath(DOCS / 'index.md', folder)}{anchor or ''})"
        return words

    return _LINK.sub(in_site, markdown)
