"The zoo: every entry is whole and does what its card says; a server; broken places; the command; a front from its supernet."
import dataclasses, json, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import selfsupnas
from selfsupnas import zoo
from selfsupnas.cli import main
from selfsupnas.space.cost import count_cost
from selfsupnas.stages.configs import ParetoConfig
from selfsupnas.stages.pareto_front import derive_budgets, search_config
from selfsupnas.stages.calibration import make_table
from selfsupnas.train.batches import load_training_data

CARDS = zoo.list()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A copy of the streetscenes network under another name, in a folder that SELFSUPNAS_ZOO names."
    import shutil
    place = tmp_path/"zoo"
    shutil.copytree(zoo.folder("streetscenes"), place/"mine")
    file = place/"mine"/"card.json"
    file.write_text(file.read_text().replace('"name": "streetscenes"', '"name": "mine"'))
    monkeypatch.setenv("SELFSUPNAS_ZOO", str(place))
    monkeypatch.setenv("SELFSUPNAS_CACHE", str(tmp_path/"cache"))
    return place


@pytest.fixture
def server(elsewhere, monkeypatch):
    "The same folder on a server on this machine."
    zoo.write_index(elsewhere)
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(elsewhere))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setenv("SELFSUPNAS_ZOO", f"http://127.0.0.1:{http.server_port}")
        yield elsewhere
        http.shutdown()


def test_it_has_networks_and_a_supernet():
    assert {card.kind for card in CARDS} == {"network", "supernet"} and len({card.name for card in CARDS}) == len(CARDS) >= 3
    assert sum(p.stat().st_size for p in (ROOT/"selfsupnas"/"presets").rglob("*") if p.is_file()) < 4e6, "small enough for the wheel"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_an_entry_is_what_its_card_says(card):
    model = selfsupnas.load(card.name)
    assert not model.training and model.space.num_classes == len(card.classes) if card.kind == "supernet" else model.info.spec.classes == card.classes
    assert sum(p.numel() for p in model.parameters()) == card.parameters
    with torch.no_grad(): assert model(torch.randn(1, 3, *card.size)).shape == (1, len(card.classes), *card.size)
    if card.kind == "network": assert count_cost(model, card.size).gflops == pytest.approx(card.gflops)
    text = card._repr_markdown_()
    assert card.licence in text and f"{100 * card.miou[0]:.1f}" in text and card.name in repr(card)


def test_a_server_is_read_and_cached(server):
    assert "mine" in [card.name for card in zoo.list()] and zoo.load("mine").info.spec.classes == zoo.card("streetscenes").classes
    for file in server.glob("mine/*"): file.unlink()
    assert zoo.load("mine") is not None, "from the cache"


def test_a_damaged_download_is_refused_and_not_kept(server):
    weights = server/"mine"/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="SHA-256"): zoo.load("mine")
    assert not list(Path(zoo.cache_folder()).rglob("model.safetensors"))


def test_a_missing_file_of_a_server(server):
    (server/"mine"/"model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"): zoo.load("mine")


@pytest.mark.parametrize("spoil, error", [
    (lambda place: (place/"mine"/"model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda place: (place/"mine"/"model.safetensors").write_bytes(b"?"), "SHA-256"),
    (lambda place: (place/"mine"/"card.json").write_text("{"), "card.json"),
    (lambda place: (place/"mine"/"card.json").write_text('{"name": "mine"}'), "kind")], ids=["gone", "damaged", "no JSON", "no card"])
def test_a_broken_entry_of_a_folder(elsewhere, spoil, error):
    spoil(elsewhere)
    with pytest.raises((ValueError, FileNotFoundError), match=error): zoo.load("mine")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", ".hidden", ""])
def test_a_card_cannot_name_files_outside_its_folder(elsewhere, name):
    card = dataclasses.asdict(zoo.card("mine")) | {"files": {name: "0" * 64}}
    (elsewhere/"mine"/"card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="outside its folder"): zoo.folder("mine")


@pytest.mark.parametrize("place", ["nowhere", "http://127.0.0.1:9"])
def test_a_place_that_cannot_be_read(place, monkeypatch):
    monkeypatch.setenv("SELFSUPNAS_ZOO", place)
    with pytest.raises(FileNotFoundError, match="SELFSUPNAS_ZOO"): zoo.list()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["zoo"]) == 0 and all(card.name in capsys.readouterr().out for card in CARDS[:1])
    assert main(["zoo", "streetscenes-supernet", "--to", "searched"]) == 0 and "licence" in capsys.readouterr().out
    assert main(["zoo", "streetscenes-supernet", "--to", "searched"]) == 2 and "exists" in capsys.readouterr().err
    assert main(["zoo", "streetscene"]) == 2 and "did you mean streetscenes" in capsys.readouterr().err


def test_a_route_for_another_budget_comes_from_its_supernet(tmp_path, monkeypatch):
    config = ParetoConfig(search=str(zoo.folder("streetscenes-supernet")), budgets=(.35,), random=1, candidates=1, folder=str(tmp_path))
    searched = search_config(config)
    data = load_training_data(searched)
    table = make_table(searched, data)
    architectures, dynamic, _ = derive_budgets(config, searched, data, table)
    assert set(architectures) == {"derived-0.35", "random-0.35-0"} and dynamic[0]["cost_share"] < .5
