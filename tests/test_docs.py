"The documentation: it builds without a warning, no link is broken, and no page needs another host."
import subprocess, sys
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest
from conftest import ROOT

from selfsupnas._modidx import d as index

pytestmark = pytest.mark.long
pytest.importorskip("sphinx_book_theme", reason="needs pip install 'selfsupnas[docs]'")


class Page(HTMLParser):
    "Links, loaded files, anchors and tags of a page."
    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors, self.tags = [], [], set(), set()
        self.feed(path.read_text("utf8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.anchors |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        elif tag == "link" and attrs.get("rel") in ("stylesheet", "preload", "icon"): self.loaded.append(attrs["href"])
        elif tag in ("script", "img", "source", "iframe") and attrs.get("src"): self.loaded.append(attrs["src"])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "All pages by path."
    folder = tmp_path_factory.mktemp("docs")/"html"
    built = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(ROOT/"nbs"), str(folder)], capture_output=True, text=True, timeout=900)
    assert built.returncode == 0, built.stderr[-3000:]
    return {path: Page(path) for path in folder.rglob("*.html") if "_static" not in path.parts}


def test_every_notebook_and_module_has_a_page(pages):
    names = {path.name for path in pages}
    assert {f"{path.stem}.html" for path in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in str(path)} <= names
    assert {f"{module.removeprefix('selfsupnas.')}.html" for module in index["syms"]} <= names


def test_no_page_needs_another_host(pages):
    found = {path.name: [file for file in page.loaded if "//" in file.split("?")[0] and not file.startswith("data:")] for path, page in pages.items()}
    assert not {name: files for name, files in found.items() if files}


def test_no_local_link_is_broken(pages):
    broken, seen = [], 0
    for path, page in pages.items():
        for link in {*page.links, *page.loaded}:
            address, anchor = map(unquote, urldefrag(link))
            if "://" in address or address.startswith(("mailto:", "data:")): continue
            target = (path.parent/address.split("?")[0]).resolve() if address else path.resolve()
            seen += 1
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors): broken.append((path.name, link))
    assert seen > 1000 and not broken, broken[:20]


def test_names_link_to_the_api_and_formulas_need_no_script(pages):
    cell = next(page for path, page in pages.items() if path.name == "04_cell.html")
    assert "../api/distributed.html#selfsupnas.distributed.any_sample" in cell.links
    assert any("math" in page.tags for page in pages.values())
