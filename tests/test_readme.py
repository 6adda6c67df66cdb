"README.md says what nbs/index.ipynb says, and its tables are those of the committed records."
import json, re, shlex

import pytest
from conftest import ROOT

from selfsupnas.batches import check_shares
from selfsupnas.cli import make_parser
from selfsupnas.core import from_parameters
from selfsupnas.processes import World
from selfsupnas.stages import STAGES, parse_parameters, stage_config

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


COMMANDS = sorted({line.split("#")[0].strip() for line in README.splitlines() if re.match(r" {4}(torchrun .*)?selfsupnas ", line)})


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_understood(command):
    "Each is parsed to the end; where 8 processes share a batch, they can."
    launcher, _, words = command.partition("selfsupnas ")
    words = make_parser().parse_args(shlex.split(words))
    if words.stage == "sweep":
        assert {text.split("=")[0] for text in words.grid} <= set(stage_config(words.of).__dataclass_fields__)
    if words.stage in STAGES:
        config = from_parameters(stage_config(words.stage), parse_parameters(stage_config(words.stage), words.pairs))
        if launcher: check_shares(config, World(0, 8))


def test_there_are_commands(): assert len(COMMANDS) > 10 and any(c.startswith("torchrun") for c in COMMANDS)
