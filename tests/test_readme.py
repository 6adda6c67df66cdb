"README.md says what nbs/index.ipynb says, and its tables are those of the committed records."
import json, re

import pytest
from conftest import ROOT

INDEX = json.loads((ROOT/"nbs"/"index.ipynb").read_text("utf8"))
README = (ROOT/"README.md").read_text("utf8")


def readme_of(cell):
    "What a cell of the index is in the README: its prose with links from the root, or its table."
    if cell["cell_type"] == "markdown":
        return [re.sub(r"\]\((?!\.\./|http)", "](nbs/", "".join(cell["source"])).replace("](../", "](")]
    return ["".join(o["data"]["text/markdown"]) for o in cell["outputs"] if "text/markdown" in o.get("data", {})]


def test_readme_and_index_are_alike():
    assert README == "\n\n".join(part for cell in INDEX["cells"] for part in readme_of(cell)) + "\n"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link): assert link.startswith("http") or (ROOT/link).exists()


def test_the_tables_come_from_the_records(monkeypatch):
    monkeypatch.chdir(ROOT/"nbs")
    names = {}
    for cell in INDEX["cells"]:
        if cell["cell_type"] == "code": exec("".join(cell["source"]), names)
    for table in (names["street_scenes"], names["ingredients"], names["random_routes"], names["few_labels"], names["long_runs"], names["headline"], names["compared"], names["against_chance"], names["speed"]): assert table(names["records"]) in README
