"""What `make docs` makes beside the pages of docs/; that it builds without a warning, .ci/run sees."""

import re
from importlib import import_module
from types import SimpleNamespace

import site_pages
from command_line import ROOT


def test_every_room_has_a_page_of_the_reference() -> None:
    pages = dict(site_pages.generated_pages())
    rooms = {path.parent.name for path in (ROOT / "src" / "lmntk").glob("*/__init__.py")}
    assert {f"api/{room}.md" for room in rooms} < pages.keys()
    for name in site_pages.PUBLIC:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute)


def test_the_first_page_links_to_pages_of_the_site_only() -> None:
    index = dict(site_pages.generated_pages())["index.md"]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", index) if "://" not in link]
    assert links and all((ROOT / "docs" / link).is_file() for link in links if link)


def test_links_to_files_that_the_site_lacks_become_words() -> None:
    page = SimpleNamespace(file=SimpleNamespace(generated_by=None, src_uri="how-to/training.md"))
    text = "[a](../../CONTRIBUTING.md) [b](../../README.md#x) [c](own-data.md)"
    assert site_pages.on_page_markdown(text, page) == "a [b](../index.md#x) [c](own-data.md)"
