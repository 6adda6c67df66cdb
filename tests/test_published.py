"Weights of the public code of dynamic routing: equal to what that code computes, and everything works on them."
import dataclasses, json, os, warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, draw_folder
from selfsupnas.core import RunRecord
from selfsupnas.space.architecture import Architecture, architecture_from_json, architecture_to_json, save_architecture
from selfsupnas.space.budget import expected_cost, measure_costs, realised_cost, static_cost
from selfsupnas.space.cost import count_cost
from selfsupnas.space.derivation import derive
from selfsupnas.space.gate import Gate, record_gates
from selfsupnas.space.grid import SearchSpace
from selfsupnas.space.network import StaticNetwork, inherit
from selfsupnas.space.published import count_published, published_cost, published_name, read_published, start_from, to_dynamic_routing
from selfsupnas.space.supernet import RAW_SCALE, build_supernet, feature_sizes, gates_by_edge
from selfsupnas.stages.configs import EvaluateConfig, RetrainConfig, SearchConfig
from selfsupnas.stages.dynamic import run_dynamic
from selfsupnas.train.config import TrainingConfig
from selfsupnas.train.update import make_optimiser
from selfsupnas.zoo import from_dynamic_routing

warnings.filterwarnings("error", message=".*has no weights for these parts")


def whole_reference():
    path = Path(os.environ.get("SELFSUPNAS_DATA", "."))/"dynamic-routing"/"reference.pt"
    if not path.is_file(): pytest.skip("SELFSUPNAS_DATA has no dynamic-routing/reference.pt")
    content = torch.load(path, weights_only=True)
    return content | {"gates": list(content["gates"].values()), "step": 1}


def cut_reference():
    "The part of it that the repository holds: one image, every fourth pixel of the logits."
    stored = np.load(ROOT/"tests"/"dynamic-routing"/"reference.npz")
    content = {key: torch.from_numpy(stored[key]) for key in stored.files if stored[key].dtype != stored["config"].dtype and not key.endswith("_names")}
    for key in ("state_dict", "changed", "gates"):
        names = json.loads(str(stored[f"{key}_names"]))
        parts = content[key].split([int(np.prod(shape)) for _, shape in names])
        content[key] = {name: part.view(shape).clone() for (name, shape), part in zip(names, parts)}
    return content | {"gates": list(content["gates"].values()), "step": 4}


REFERENCES = {"cut": cut_reference, "whole": whole_reference}
SPACE = SearchSpace(7, 5, 8, conventions="small_gate")
ANCHOR = "backbone.stem.stem_1.weight"


@pytest.fixture(scope="module")
def state(): return cut_reference()["state_dict"]


@torch.no_grad()
def run(net, images):
    with record_gates(net) as gates: logits = net(images)
    return logits, gates


def normalised(images):
    "Images of that code, blue, green, red in grey levels minus the mean, as this kit has them."
    return images.flip(1) / torch.tensor(RAW_SCALE).view(3, 1, 1)


@pytest.mark.parametrize("execution", ["grouped", "masked"])
@pytest.mark.parametrize("which", REFERENCES)
def test_logits_gates_and_costs_are_those_of_that_code(which, execution):
    reference = REFERENCES[which]()
    step, images = reference["step"], normalised(reference["images"])
    for changes, prefix in (({}, ""), (reference["changed"], "changed_")):
        net = from_dynamic_routing(reference["state_dict"] | changes, small_gate=True)
        assert net.space == SPACE and sum(p.numel() for p in net.parameters()) == 75_922 and not net.training
        net.execution = execution
        logits, gates = run(net, images)
        assert (logits[..., ::step, ::step] - reference[f"{prefix}logits"]).abs().max() < 1e-5
        if not changes:
            assert max((a - b).abs().max() for a, b in zip(gates.values(), reference["gates"], strict=True)) < 1e-6
        expected, real = published_cost(net.space, (128, 128), gates_by_edge(net.space, gates))
        assert real.tolist() == pytest.approx([float(x) for x in reference[f"{prefix}real_mflops"]], rel=1e-3)
        if not changes: assert expected.tolist() == pytest.approx([float(x) for x in reference["expected_mflops"]], rel=1e-3)


def test_what_the_count_leaves_out_explains_the_difference():
    "Part by part, theirs and ours agree but for ReLU, resizing and one row of the first convolution."
    space, size = SearchSpace(19, 3, 16, conventions="full_gate"), (128, 256)
    there, here = count_published(space, size), measure_costs(space, size)
    for scale, (h, w) in enumerate(feature_sizes(size, published=True)):
        c = space.channels_at(scale)
        assert there.cells[scale] * 1e6 - here.cells[scale] == h * w * c # the ReLU inside
        assert there.edges[scale]["keep"] * 1e6 - here.edges[scale]["keep"] == h * w * c
        if scale < 3: assert there.edges[scale]["down"] * 1e6 - here.edges[scale]["down"] == h * w * c + h * w * c // 2
    assert there.head * 1e6 < .5 * (here.head + sum(here.raise_from)), "half of a wide image"
    assert there.stem * 1e6 == pytest.approx(here.stem, rel=.06)


def test_names_are_one_to_one():
    net = build_supernet(SPACE)
    names = [published_name(name) for name in net.state_dict()]
    assert names.count(None) == len(net.space.cells()), "gate thresholds"
    names = [name for name in names if name]
    assert len(set(names)) == len(names) == 568
    with pytest.raises(ValueError, match="conventions"): to_dynamic_routing(build_supernet(SearchSpace(7, 5, 8)))


@pytest.mark.parametrize("channels, parameters", [(8, 328_508), pytest.param(64, 17_784_968, marks=pytest.mark.long)])
def test_round_trip_by_a_file(channels, parameters, tmp_path):
    "Long: the full size, whose count of parameters is the published one."
    space = SearchSpace(19, 16, channels, conventions="full_gate", stem_channels=None if channels == 64 else 64)
    torch.manual_seed(0)
    net = build_supernet(space).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d): module.running_mean.normal_(), module.running_var.uniform_(.5, 2)
    assert sum(p.numel() for p in net.parameters()) == parameters
    torch.save({"model": to_dynamic_routing(net), "iteration": 3}, tmp_path/"model.pth")
    read = from_dynamic_routing(tmp_path/"model.pth", small_gate=False)
    assert read.space == space
    found = read.state_dict()
    for name, value in net.state_dict().items(): assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s}, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}, lambda s: {f"model.{k}": v for k, v in s.items()},
    lambda s: {"a": {"b": s}}, lambda s: {k: v.numpy() for k, v in s.items()}, lambda s: {k: v.double() for k, v in s.items()}], ids=range(6))
def test_wrappers_and_prefixes_are_stripped(wrap, state):
    expected, found = (from_dynamic_routing(s, small_gate=True).state_dict() for s in (state, wrap(state)))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_backbone_alone_may_lack_its_prefix(state):
    backbone = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    with pytest.warns(UserWarning, match="classifier, decoder"): net = from_dynamic_routing(backbone, 4, small_gate=True)
    assert torch.equal(net.stem[0].weight, state[ANCHOR]) and net.classifier.out_channels == 4
    with pytest.raises(ValueError, match="num_classes"): from_dynamic_routing(backbone, small_gate=True)
    with pytest.warns(UserWarning, match="fc.weight"): read_published({**backbone, "fc.weight": torch.zeros(1)})


def test_other_classes_get_a_new_classifier(state):
    with pytest.warns(UserWarning, match="classifier"): net = from_dynamic_routing(state, 3, small_gate=True)
    removed = {name: value for name, value in state.items() if "predictor" not in name}
    with pytest.warns(UserWarning, match="classifier"): from_dynamic_routing(removed, 3, small_gate=True)
    assert net.classifier.weight.shape == (3, 8, 3, 3) and torch.equal(net.decoder.last[0].weight, state["sem_seg_head.layer_decoder_list.0.weight"])


def test_without_gates_all_edges_are_open(state):
    fixed = {name: value for name, value in state.items() if "gate_conv_beta" not in name} | {"backbone.init_layer.gate_weights_beta": torch.ones(1, 2, 1, 1)}
    net = from_dynamic_routing(fixed)
    images = torch.randn(2, 3, 128, 128)
    logits, gates = run(net, images)
    assert all((gate == 1).all() for gate in gates.values())
    route = StaticNetwork(Architecture(net.space, dict.fromkeys(net.space.edges(), 1.)))
    assert torch.allclose(run(inherit(route, net.state_dict()).eval(), images)[0], logits, atol=1e-5)
    with pytest.warns(UserWarning, match="gates"): searched = start_from(build_supernet(SPACE), fixed)
    assert any(isinstance(module, Gate) for module in searched.modules())


NAME = "backbone.all_cell_list.2.1.res_up.1.weight"
BROKEN = {
    "a tensor is missing": (lambda s: {k: v for k, v in s.items() if k != NAME}, NAME),
    "a shape": (lambda s: s | {NAME: torch.zeros(2, 2, 1, 1)}, "2, 2, 1, 1"),
    "a batch norm": (lambda s: {k: v for k, v in s.items() if k != "backbone.stem.stem_1.norm.running_var"}, "running_var"),
    "half a decoder": (lambda s: {k: v for k, v in s.items() if "layer_decoder_list.2" not in k}, "layer_decoder_list.2"),
    "another decoder": (lambda s: s | {"sem_seg_head.psp.weight": torch.zeros(1)}, "psp"),
    "another operation": (lambda s: s | {"backbone.init_layer.cell_ops._ops.1.op.0.weight": torch.zeros(1)}, "_ops.1"),
    "no tensor": (lambda s: s | {NAME: "text"}, NAME),
    "a number": (lambda s: s | {"sem_seg_head.predictor.bias": torch.tensor(1.)}, "predictor"),
    "a whole stem": (lambda s: s | {"backbone.stem.stem_2.weight": torch.zeros(8, 8, 3, 3)}, "stem_2"),
    "no layers": (lambda s: {k: v for k, v in s.items() if "all_cell_list" not in k}, "all_cell_list"),
    "no stem": (lambda s: {k: v for k, v in s.items() if k != ANCHOR}, "stem_1"),
    "another project": (lambda s: {"model": {"conv1.weight": torch.zeros(1)}}, "conv1|model"),
    "nothing": (lambda s: {}, "stem_1")}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_refused(case, state):
    spoil, named = BROKEN[case]
    with pytest.raises(ValueError, match=named): from_dynamic_routing(spoil(state), small_gate=True)


def test_files_that_are_something_else_are_refused(tmp_path, state):
    with pytest.raises(FileNotFoundError, match="gone.pth"): from_dynamic_routing(tmp_path/"gone.pth")
    (tmp_path/"text.pth").write_text("no weights")
    torch.save({"model": state, "hook": Path}, tmp_path/"objects.pth") # would be unpickled
    torch.save(list(state.values()), tmp_path/"list.pth")
    for name in ("text", "objects", "list"):
        with pytest.raises(ValueError, match=f"{name}.pth"): from_dynamic_routing(tmp_path/f"{name}.pth", small_gate=True)
    with pytest.raises(ValueError, match="small_gate"): from_dynamic_routing(state)


def test_conventions_travel_with_the_architecture(state):
    net = from_dynamic_routing(state, small_gate=True)
    architecture = Architecture(net.space, dict.fromkeys(net.space.edges(), 1.))
    assert architecture_from_json(json.loads(json.dumps(architecture_to_json(architecture)))) == architecture
    plain = architecture_to_json(Architecture(SearchSpace(3), {}))
    assert "conventions" not in plain["space"] and "stem_channels" not in plain["space"], "files of earlier versions stay equal"
    with pytest.raises(ValueError, match="conventions"): SearchSpace(3, conventions="theirs")


@pytest.mark.parametrize("conventions", ["small_gate", "full_gate"])
@pytest.mark.parametrize("size", [(33, 34), (64, 80), (97, 130), (131, 66)])
def test_any_size_in_both_executions(conventions, size):
    "Sizes that are no multiple of 4 lose a row to the missing padding; training and evaluation agree in both executions."
    torch.manual_seed(0)
    net, images = build_supernet(SearchSpace(5, 3, 8, conventions=conventions, stem_channels=6)), torch.randn(3, 3, *size)
    features = net.eval().encode(images)
    assert [tuple(f.shape[-2:]) for f in features] == feature_sizes(size, published=True)
    for training in (False, True):
        net.train(training)
        outputs = []
        for net.execution in ("grouped", "masked"):
            before = {k: v.clone() for k, v in net.state_dict().items()}
            outputs.append(net(images))
            net.load_state_dict(before, strict=False)
        assert outputs[0].shape == (3, 5, *size) and torch.allclose(*outputs, atol=1e-4)
    net(images).sum().backward()
    table = measure_costs(net.space, size)
    with torch.no_grad(), record_gates(net.eval()) as gates: net(images)
    by_edge = gates_by_edge(net.space, gates)
    assert (expected_cost(table, by_edge) <= table.full).all() and (realised_cost(table, by_edge) <= table.full).all()


def test_the_cost_of_a_derived_network_is_exact(state):
    net = from_dynamic_routing(state, small_gate=True)
    table = measure_costs(net.space, (96, 130))
    route = derive(net.space, dict.fromkeys(net.space.gated(), .5), table, .6 * table.full)[0]
    assert count_cost(StaticNetwork(route), (96, 130)).flops == static_cost(table, route.selected)


def test_the_learning_rate_of_gates():
    net, config = build_supernet(SearchSpace(3, 2, 8)), TrainingConfig(lr=.02, gate_lr=2.5)
    gates = {id(p) for name, p in net.named_parameters() if ".gate." in name}
    groups = make_optimiser(net, config).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    for group in groups: assert {id(p) in gates for p in group["params"]} == {group["lr_factor"] == 2.5}
    assert [group["lr_factor"] for group in make_optimiser(net, TrainingConfig()).param_groups] == [1, 1]


SMALL = dict(data="folder", root="data", label_fraction=1., layers=5, channels=8, conventions="small_gate", steps=4, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=4, logs=2, candidates=1)


@pytest.fixture
def file(tmp_path, state, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path/"data", {"train": 6, "val": 4, "test": 2})
    torch.save({"model": state}, "published.pth")
    return "published.pth"


def test_a_search_starts_from_a_file(file, state):
    from selfsupnas.stages.searching import load_search, search
    with pytest.raises(ValueError, match="conventions"): SearchConfig(**SMALL | {"conventions": "own"}, initialise=file)
    with pytest.raises(ValueError, match="layers=5"): search(SearchConfig(**SMALL | {"layers": 4}, initialise=file))
    config = SearchConfig(**SMALL, initialise=file, lr=0., gate_lr=2.5, folder="search", ema_decay=0.)
    with pytest.warns(UserWarning, match="classifier"): result = search(config)
    assert torch.equal(result.trained.model.stem[0].weight, state[ANCHOR])
    assert result.architecture.space.conventions == "small_gate" and result.record.inputs["initialise"]
    Path(file).unlink() # a finished search does not need it
    assert search(config).architecture.edges.keys() == load_search("search").architecture.edges.keys() == result.architecture.edges.keys()


@pytest.mark.parametrize("operations", [("sep_conv_3x3",), ("sep_conv_3x3", "identity", "sep_conv_5x5")])
def test_a_supernet_of_other_operations_is_refused(operations, state):
    net = build_supernet(SearchSpace(7, 5, 8, operations, conventions="small_gate"))
    for call in (lambda: start_from(net, state), lambda: to_dynamic_routing(net)):
        with pytest.raises(ValueError, match="operations"): call()


@pytest.mark.long
def test_from_the_reference_to_onnx(file, state):
    "Derived at half the cost, retrained with inherited weights, evaluated, exported."
    from selfsupnas.export import export_run, from_pretrained, load_onnx
    from selfsupnas.stages.evaluation import evaluate
    from selfsupnas.stages.retraining import load_network, retrain
    with pytest.warns(UserWarning, match="classifier"): net = from_dynamic_routing(file, 3, small_gate=True)
    size = 64, 80
    table = measure_costs(net.space, size)
    _, gates = run(net, torch.randn(2, 3, *size))
    importance = {edge: gate.mean().item() for edge, gate in gates_by_edge(net.space, gates).items()}
    route = derive(net.space, importance, table, .5 * table.full)[0]
    save_architecture(route, "derived.json")
    with pytest.warns(UserWarning, match="classifier"):
        trained = retrain(RetrainConfig(data="folder", root="data", label_fraction=1., folder="retrain", architecture="derived.json", initialise="inherit", supernet=file, steps=50,
                                        batch_labelled=4, batch_unlabelled=4, batch_jigsaw=4, lr=.02, optimiser="sgd")).trained
    assert static_cost(table, route.selected) <= .5 * table.full
    result = evaluate(EvaluateConfig(folder="evaluate", network="retrain", baselines=(), split="test"))
    assert 0 <= result.metrics.miou < 1
    folder, images = export_run("retrain", onnx=True), torch.randn(2, 3, 97, 130)
    logits = run(load_network("retrain"), images)[0]
    assert torch.equal(run(from_pretrained(folder), images)[0], logits) and trained.step_ms
    assert (load_onnx(folder/"network.onnx")(images) - logits).abs().max() < 1e-5 * logits.abs().max().clamp(min=1)


def test_a_file_is_evaluated_as_it_is(file, state):
    from selfsupnas.stages.evaluation import evaluate
    with pytest.raises(ValueError, match="data"): EvaluateConfig(network=file, conventions="small_gate")
    with pytest.raises(ValueError, match="conventions"): evaluate(EvaluateConfig(network=file, data="folder", root="data"))
    with pytest.warns(UserWarning, match="classifier"): net = from_dynamic_routing(file, 3, small_gate=True)
    torch.save(to_dynamic_routing(net), "three.pth")
    config = EvaluateConfig(network="three.pth", conventions="small_gate", data="folder", root="data", baselines=(), split="val", latency_repeats=1, window=(64, 64), folder="evaluate")
    result = evaluate(config)
    row = result.record.metrics["rows"]["three"]
    dynamic = run_dynamic(result.network, result.data, measure_costs(result.network.space, (64, 80)))
    assert len(dynamic.ids) == 4 and dynamic.shares.mean() <= 1
    assert row["least_gflops"] <= row["gflops"] <= row["largest_gflops"] and 0 <= row["miou"] < 1
    with pytest.raises(ValueError, match="classes"): evaluate(dataclasses.replace(config, network=file, folder="other"))
    turned = evaluate(dataclasses.replace(config, folder="turned", classes=tuple(reversed(result.data.spec.classes))))
    assert turned.record.metrics["rows"]["three"]["gflops"] == row["gflops"], "the same network, its classes in another order"
    assert RunRecord.load("evaluate/evaluate-record.json").inputs["network"]
