"A network elsewhere: in a process without selfsupnas, in one without torch, from a folder; and what is refused."
import json, os, shutil, subprocess, sys, sysconfig
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT

import selfsupnas
from selfsupnas.space.architecture import Architecture, save_architecture
from selfsupnas.rivals import all_open
from selfsupnas.stages.evaluation import EvaluateConfig, evaluate
from selfsupnas.cli import main
from selfsupnas.core import RunRecord
from selfsupnas.data.datasets import CAMVID_SPEC
from selfsupnas.export import TOLERANCE, NetworkInfo, export_onnx, export_program, fold_batch_norm, from_pretrained, model_card, save_pretrained
from selfsupnas.space.grid import Edge, SearchSpace
from selfsupnas.space.network import StaticNetwork
from selfsupnas.space.operations import OPERATIONS
from selfsupnas.stages.retraining import RetrainConfig, load_network, retrain

LACKING = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
onnx_too = pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}: pip install 'selfsupnas[export]'")
SIZES = ((1, 33, 33), (2, 34, 47), (1, 95, 161), (3, 128, 160)) # batch, height, width
INFO = NetworkInfo(CAMVID_SPEC, (64, 80))

# Without `site` no .pth file is read, so that an editable selfsupnas is not found; a copy in site-packages is shut out by name.
ALONE = """import sys
sys.path += {places!r}
class Shut:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {shut!r}: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Shut())
for name in {shut!r}:
    try: __import__(name)
    except ModuleNotFoundError: continue
    raise AssertionError(name + " is there")
"""


def elsewhere(code, shut, cwd):
    "Run code in a fresh interpreter in which some packages are not to be had."
    places = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    done = subprocess.run([sys.executable, "-I", "-S", "-c", ALONE.format(places=places, shut=shut) + code], cwd=cwd,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def random_network(space, seed=0):
    "Untrained, with batch norms that do something."
    torch.manual_seed(seed)
    network = StaticNetwork(all_open(space)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, .3), module.running_var.uniform_(.5, 2)
            torch.nn.init.uniform_(module.weight, .5, 1.5), torch.nn.init.normal_(module.bias, 0, .3)
    return network


@pytest.fixture(scope="module")
def network(): return selfsupnas.load("streetscenes")


@pytest.fixture(scope="module")
def asked(network, tmp_path_factory):
    "A folder with images in several sizes and what the network says to each."
    folder = tmp_path_factory.mktemp("asked")
    draw = torch.Generator().manual_seed(0)
    for i, (batch, *size) in enumerate(SIZES):
        images = torch.randn(batch, 3, *size, generator=draw)
        with torch.no_grad(): np.savez(folder/f"{i}.npz", images=images, logits=network(images))
    return folder


def agrees(gaps): return len(gaps) == len(SIZES) and max(map(float, gaps)) < TOLERANCE


def test_torch_alone_runs_the_program(network, asked):
    export_program(network, (128, 160), asked/"network.pt2")
    code = f"""
import numpy as np, torch
network = torch.export.load("network.pt2").module()
for i in range({len(SIZES)}):
    with np.load(f"{{i}}.npz") as z, torch.no_grad():
        print(float(abs(network(torch.from_numpy(z["images"])).numpy() - z["logits"]).max()))
assert not [name for name in sys.modules if name.startswith("selfsupnas")]
"""
    assert agrees(elsewhere(code, ["selfsupnas"], asked).split())


@onnx_too
def test_onnxruntime_alone_runs_the_onnx_file(network, asked):
    export_onnx(network, (128, 160), asked/"network.onnx")
    code = f"""
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("network.onnx", providers=["CPUExecutionProvider"])
for i in range({len(SIZES)}):
    with np.load(f"{{i}}.npz") as z:
        print(float(abs(session.run(["logits"], {{"images": z["images"]}})[0] - z["logits"]).max()))
"""
    assert agrees(elsewhere(code, ["selfsupnas", "torch"], asked).split())


@pytest.mark.parametrize("kind", ["pt2", pytest.param("onnx", marks=onnx_too)])
def test_every_operation_can_be_exported(kind, tmp_path):
    "Files are compared with their network before they get their name: to be written is to be right."
    network = random_network(SearchSpace(5, layers=3, channels=4, operations=tuple(OPERATIONS)))
    with torch.no_grad(): # the gains are there to be folded
        assert torch.allclose(fold_batch_norm(network)(torch.ones(1, 3, 45, 67)), network(torch.ones(1, 3, 45, 67)), atol=1e-3)
    network.train()
    export = export_program if kind == "pt2" else export_onnx
    path = export(network, (45, 67), tmp_path/f"network.{kind}")
    assert network.training, "left as it was"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert str(ROOT).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()


@pytest.mark.parametrize("kind", ["pt2", pytest.param("onnx", marks=onnx_too)])
def test_a_file_that_would_be_wrong_is_not_written(kind, tmp_path, monkeypatch):
    "The older file of that name stays."
    class Halved(torch.nn.Module): # an exporter at fault, as it were
        def forward(self, images): return images * (.5 if torch.compiler.is_compiling() else 1.)
    path = tmp_path/f"network.{kind}"
    path.write_text("older")
    with pytest.raises(ValueError, match=f"network.{kind} is not written"):
        (export_program if kind == "pt2" else export_onnx)(Halved(), (64, 64), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_text() == "older"


def test_without_the_extra_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("selfsupnas.export.find_spec", lambda name: None if name == "onnxruntime" else True)
    with pytest.raises(ImportError, match=r"needs onnxruntime: pip install 'selfsupnas\[export\]'"):
        export_onnx(torch.nn.Identity(), (64, 64), tmp_path/"network.onnx")


def searched():
    "An architecture with factors, whose cells differ in their operations."
    space = SearchSpace(11, layers=2, channels=4, operations=("sep_conv_3x3", "identity"), search_operations=True)
    return Architecture(space, {Edge(0, 0, "keep"): .25, Edge(0, 0, "down"): .75, Edge(1, 1, "up"): .5},
                        {"seed": 3}, {Edge(0, 0, "identity"): .5, Edge(1, 1, "sep_conv_3x3"): .125})


def test_a_folder_comes_back_as_it_was(tmp_path):
    network = StaticNetwork(searched()).eval()
    back = from_pretrained(save_pretrained(network, tmp_path/"a", info=INFO))
    assert back.architecture == network.architecture and back.architecture.provenance == {"seed": 3}
    assert back.info == INFO and not back.training
    state = back.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    save_pretrained(back, tmp_path/"b") # what came travels on
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path/"a"/name).read_bytes() == (tmp_path/"b"/name).read_bytes()


@pytest.fixture
def folder(network, tmp_path): return save_pretrained(network, tmp_path/"folder", info=INFO)


def less(config, key): return {k: v for k, v in config.items() if k != key}


FAULTS = {"schemas up to 1": lambda c: {**c, "schema": 2}, "whole number": lambda c: less(c, "schema"),
          "palette is missing": lambda c: less(c, "palette"), "unknown parameter colour": lambda c: {**c, "colour": 1},
          "3 classes": lambda c: {**c, "classes": ["a", "b", "c"]}, r"classes\.0 must be a valid string": lambda c: {**c, "classes": list(range(11))},
          r"size\.1 is missing": lambda c: {**c, "size": [64]}, r"palette\.0\.2 must be 255 or less": lambda c: {**c, "palette": [[0, 0, 256]] * 11},
          "architecture: its schema is 7": lambda c: {**c, "architecture": {**c["architecture"], "schema": 7}},
          "unknown operation 'conv_9x9'": lambda c: {**c, "architecture": {**c["architecture"], "space":
                                          {**c["architecture"]["space"], "operations": ["conv_9x9"]}}},
          "is not an edge": lambda c: {**c, "architecture": {**c["architecture"], "edges": [[0, 0, "up", 1.]]}},
          "an object": lambda c: []}


@pytest.mark.parametrize("said", FAULTS)
def test_a_config_with_a_fault_is_refused_by_name(folder, said):
    file = folder/"config.json"
    file.write_text(json.dumps(FAULTS[said](json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=said) as e: from_pretrained(folder)
    assert str(file) in str(e.value)


@pytest.mark.parametrize("harm", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_refused_by_name(folder, harm):
    (folder/harm).write_bytes((folder/harm).read_bytes()[:-9])
    with pytest.raises(ValueError, match=harm): from_pretrained(folder)
    (folder/harm).write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=harm): from_pretrained(folder)
    (folder/harm).unlink()
    with pytest.raises(FileNotFoundError, match=harm): from_pretrained(folder)


def test_weights_of_another_network_are_refused(folder, network, tmp_path):
    shutil.copy(save_pretrained(StaticNetwork(searched()), tmp_path/"other", info=INFO)/"model.safetensors", folder)
    with pytest.raises(ValueError, match="does not hold the weights of this network"): from_pretrained(folder)


def test_a_place_that_is_none(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no folder ../none"): from_pretrained("../none")
    pytest.importorskip("huggingface_hub")
    code = "from selfsupnas.export import from_pretrained\ntry: from_pretrained('nobody/nothing')\nexcept FileNotFoundError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert done.stdout.startswith("nobody/nothing is neither a folder nor a repository"), done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run folder with a retraining of two steps and its evaluation."
    place = tmp_path_factory.mktemp("run")
    space = SearchSpace(11, layers=2, channels=4)
    save_architecture(Architecture(space, dict.fromkeys(space.edges(), 1.)), place/"a.json")
    retrain(RetrainConfig(folder=str(place/"retrain"), architecture=str(place/"a.json"), size=(64, 80), steps=2, logs=1,
                          w_jig=0., w_semi=0.))
    evaluate(EvaluateConfig(folder=str(place/"evaluate"), network=str(place/"retrain"), split="val", baselines=(), latency_repeats=1))
    return place


def test_the_card_is_yaml_and_takes_its_numbers_from_the_records(run):
    record = RunRecord.load(run/"retrain"/"retrain-record.json")
    tested = RunRecord.load(run/"evaluate"/"evaluate-record.json")
    tested.metrics["split"] = "test" # so that it is told apart
    tested.metrics["rows"]["searched"]["miou"] = .123
    text = model_card("small", INFO, record, tested, "CC BY-NC 4.0, as its data", ("config.json", "network.onnx"))
    for told in (f"{record.metrics['val_miou']:.1%}", "12.3%", f"{record.metrics['gflops']:.4f}", record.commit or "–",
                 record.versions["torch"], f"{record.metrics['parameters']:,}", "10 of 400 (2.5%)", "network.onnx"):
        assert told in text
    assert "network.pt2" not in text and str(run) not in text
    hub = pytest.importorskip("huggingface_hub")
    head = hub.ModelCard(text).data
    scores = {result.dataset_split: result.metric_value for result in head.eval_results}
    assert scores == {"val": record.metrics["val_miou"], "test": .123}
    assert head.license == "other" and head.library_name == "selfsupnas" and head.pipeline_tag == "image-segmentation"
    assert hub.ModelCard(model_card("small", INFO, licence="mit")).data.license == "mit"


@onnx_too
def test_the_command_makes_the_folder(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", str(tmp_path/"away"), "--onnx", "--program", "--licence", "mit"]) == 0
    assert "config.json, model.safetensors, network.onnx, network.pt2" in capsys.readouterr().out
    back, left = from_pretrained(tmp_path/"away"), load_network(run/"retrain")
    images = torch.randn(1, 3, 64, 80)
    with torch.no_grad(): assert torch.equal(back(images), left(images))
    assert back.info.size == (64, 80) and back.info.spec.synthetic and back.info.spec.classes == CAMVID_SPEC.classes
    card = (tmp_path/"away"/"README.md").read_text("utf8")
    assert main(["export", str(run), "--to", str(tmp_path/"away"), "--onnx"]) == 2, "the card would tell of an older network.pt2"
    assert "network.pt2 of an earlier export" in capsys.readouterr().err
    assert "network.pt2" in card and "network.onnx" in card and "license: \"mit\"" in card and "drawn by a program" in card


def test_the_command_refuses_in_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    def refused(*words):
        assert main(["export", *map(str, words)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("selfsupnas export: ") and err.count("\n") == 1
        return err
    assert "nowhere" in refused("nowhere")
    assert "evaluate-record.json" in refused(run, "--evaluate", tmp_path)
    hand_crafted = tmp_path/"lraspp"
    hand_crafted.mkdir()
    record = json.loads((run/"retrain"/"retrain-record.json").read_text())
    record["parameters"]["architecture"] = "lraspp_mobilenet_v3_large"
    (hand_crafted/"retrain-record.json").write_text(json.dumps(record))
    assert "networks of the grid" in refused(hand_crafted)
    monkeypatch.setattr("selfsupnas.export.find_spec", lambda name: None)
    assert "pip install" in refused(run, "--onnx", "--to", "away")
    assert not (tmp_path/"away").exists()


def test_a_record_of_another_network_is_refused(network, run, tmp_path):
    record = RunRecord.load(run/"retrain"/"retrain-record.json")
    with pytest.raises(ValueError, match="the retrain record is of a network with"): save_pretrained(network, tmp_path/"x", record, info=INFO)
    assert not (tmp_path/"x").exists()
