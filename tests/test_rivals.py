"Rivals of equal cost: what they cost, what they are made of, and that they train, come back and are told apart as other networks."
import dataclasses, functools
from itertools import pairwise

import pytest
import torch
from conftest import draw_folder
from torch import nn

from selfsupnas import rivals as baselines
from selfsupnas.space.architecture import Architecture, load_architecture, save_architecture
from selfsupnas.rivals import BASELINES, GRID_RIVALS, SCALABLE, all_open, batch_norm_scales, build_baseline, fit_channels, open_parts
from selfsupnas.stages.evaluation import EvaluateConfig, evaluate
from selfsupnas.train.checkpoint import read_weights, save_weights
from selfsupnas.space.cost import count_cost
from selfsupnas.export import export_program, export_run
from selfsupnas.space.grid import Edge, SearchSpace
from selfsupnas.space.network import StaticNetwork
from selfsupnas.stages.retraining import RetrainConfig, load_network, load_retrain, retrain
from selfsupnas.space.supernet import build_supernet
from selfsupnas.cli import check_inputs

SPACE = SearchSpace(11)
SEARCHED = SearchSpace(11, 3, 16, ("sep_conv_3x3", "conv_3x3"), search_operations=True)
SMALL = SearchSpace(3, 3, 8)
CHANNELS = {"narrow_unet": (4, 7, 9, 11), "fast_scnn": (4, 5, 6, 7, 8, 9, 10)}


@pytest.fixture(scope="module", autouse=True)
def tables():
    "A table of costs is measured once for each grid and size."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "measure_costs", functools.cache(baselines.measure_costs))
        yield


def scaled_state(space, seed=0):
    "A supernet's weights, its batch-norm scales drawn, in the place of a search."
    state, draws = build_supernet(space).state_dict(), torch.Generator().manual_seed(seed)
    for name in [name for name in state if name.endswith("running_mean")]:
        scale = name.removesuffix("running_mean") + "weight"
        state[scale] = torch.randn(len(state[scale]), generator=draws) * torch.rand(1, generator=draws)
    return state


def grid_rival(name, space, size, asked):
    state = [scaled_state(space)] if name == "batch_norm_route" else []
    return GRID_RIVALS[name](space, size, asked, *state)


# ---- cost

@pytest.mark.parametrize("name", GRID_RIVALS)
@pytest.mark.parametrize("space, size, gflops", [(SPACE, (96, 128), .0085), (SPACE, (128, 160), .017), (SPACE, (128, 160), .029), (SPACE, (97, 131), .012),
                                                 (SPACE, (360, 480), .15), (SEARCHED, (96, 128), .02)])
def test_a_rival_of_the_grid_costs_what_was_asked(name, space, size, gflops):
    found = grid_rival(name, space, size, 1e9 * gflops)
    assert abs(count_cost(StaticNetwork(found), size).gflops / gflops - 1) <= .03
    assert set(found.selected.values()) == {1.}
    changed = {key: value for key, value in dataclasses.asdict(found.space).items() if value != getattr(space, key)}
    assert set(changed) <= {"thinner": {"channels"}, "fine": {"channels"}, "shallower": {"channels", "layers"}, "batch_norm_route": set()}[name]
    if name == "fine": assert {edge.scale for edge in found.edges} <= {0, 1} and found.coarsest <= 1
    else: assert found.space.channels <= space.channels and found.space.layers <= space.layers


@pytest.mark.parametrize("name", SCALABLE)
@pytest.mark.parametrize("size, gflops", [((96, 128), .004), ((128, 160), .02), ((97, 131), .05), ((360, 480), .2)])
def test_a_network_of_any_width_costs_what_was_asked(name, size, gflops):
    torch.manual_seed(0); before = torch.get_rng_state()
    channels = fit_channels(name, 11, size, 1e9 * gflops)
    assert torch.equal(torch.get_rng_state(), before), "trials draw nothing from the run's generator"
    assert .97 * gflops <= count_cost(build_baseline(name, 11, channels), size).gflops <= gflops


def test_a_rival_is_the_same_again_and_leaves_out_as_few_paths_as_it_can():
    space, size, asked = dataclasses.replace(SPACE, layers=4), (96, 128), 9e6
    found = GRID_RIVALS["thinner"](space, size, asked)
    whole = all_open(found.space)
    assert count_cost(StaticNetwork(whole), size).flops > 1.03 * asked and found == GRID_RIVALS["thinner"](space, size, asked)
    table = baselines.measure_costs(found.space, size)
    def cost(kept): return baselines.static_cost(table, kept)
    drawn = [baselines.random_architecture(found.space, cost, asked, seed, .03) for seed in range(10)]
    assert len(found.edges) == max(len(route.edges) for route in drawn) < len(whole.edges)
    narrower = all_open(dataclasses.replace(found.space, channels=found.space.channels - 2))
    assert count_cost(StaticNetwork(narrower), size).flops < .97 * asked, "no narrower grid would do"


def test_the_cost_of_0_6_gflops_is_met():
    asked = .6
    found = grid_rival("thinner", SearchSpace(11, 16, 64), (128, 160), 1e9 * asked)
    assert abs(count_cost(StaticNetwork(found), (128, 160)).gflops / asked - 1) <= .03
    assert found.space.layers == 16 and len(found.edges) > .6 * len(found.space.edges())


def test_the_whole_grid_is_its_own_thinner_and_shallower_rival():
    asked = count_cost(StaticNetwork(all_open(SMALL)), (64, 80)).flops
    for name in ("thinner", "shallower", "batch_norm_route"): assert grid_rival(name, SMALL, (64, 80), asked) == all_open(SMALL)


def test_the_narrow_unet_by_a_hand_count():
    a, b, c, d = channels = 3, 5, 8, 13
    classes, size = 7, (72, 104)
    pixels = [36 * 52, 18 * 26, 9 * 13, 4 * 6] # at strides 2, 4, 8, 16; pooling rounds down
    convolutions = [(3, a, 0), (a, a, 0), (a, b, 1), (b, b, 1), (b, c, 2), (c, c, 2), (c, d, 3), (d, d, 3),
                    (c + d, c, 2), (c, c, 2), (b + c, b, 1), (b, b, 1), (a + b, a, 0), (a, a, 0)]
    products = sum(9 * i * o * pixels[level] for i, o, level in convolutions) + a * classes * pixels[0]
    norms = sum(2 * o * pixels[level] for _, o, level in convolutions)
    raised = 4 * (d * pixels[2] + c * pixels[1] + b * pixels[0] + classes * 72 * 104)
    parameters = sum(9 * i * o + 2 * o for i, o, _ in convolutions) + a * classes + classes
    cost = count_cost(build_baseline("narrow_unet", classes, channels), size)
    assert cost.by_operator["conv"] == products
    assert (cost.flops, cost.parameters) == (products + norms + raised, parameters)


def at_least(name, asked=1.):
    "The least cost that the error for an impossible one names, in GFLOPs."
    with pytest.raises(ValueError, match=name) as e:
        grid_rival(name, SMALL, (64, 80), asked) if name in GRID_RIVALS else fit_channels(name, 3, (64, 80), asked)
    return str(e.value)


def test_a_cost_that_is_too_low_is_told_with_the_least():
    def costs(architecture): return f"{count_cost(StaticNetwork(architecture), (64, 80)).gflops:.5f}"
    two = dataclasses.replace(SMALL, channels=2)
    assert costs(all_open(two)) in at_least("thinner")
    assert costs(all_open(dataclasses.replace(two, layers=1))) in at_least("shallower")
    assert costs(Architecture(two, dict.fromkeys(open_parts(two, 1), 1.))) in at_least("fine")
    assert costs(Architecture(SMALL, {})) in at_least("batch_norm_route")
    for name, rival in SCALABLE.items():
        assert f"{count_cost(rival(3, (1,) * len(rival.widths)), (64, 80)).gflops:.5f}" in at_least(name)


def test_a_cost_over_the_whole_grids_is_told_with_the_most():
    most = f"{count_cost(StaticNetwork(all_open(SMALL)), (64, 80)).gflops:.5f}"
    for name in ("thinner", "shallower", "batch_norm_route"): assert most in at_least(name, 1e9)
    assert grid_rival("fine", SMALL, (64, 80), 3e7).space.channels > SMALL.channels, "fine scales alone may be wider than the grid"


def test_a_grid_that_is_too_coarse_for_a_cost_says_so():
    for name in ("thinner", "shallower", "fine"):
        with pytest.raises(ValueError, match=f"{name} .*0.00086 GFLOPs"): grid_rival(name, SearchSpace(11, 1, 8), (64, 80), 8.6e5)
    stem_alone = count_cost(StaticNetwork(Architecture(SMALL, {})), (64, 80)).flops
    with pytest.raises(ValueError, match="batch_norm_route.*GFLOPs"): grid_rival("batch_norm_route", SMALL, (64, 80), 1.035 * stem_alone)


# ---- batch-norm scales

def test_importance_is_the_mean_absolute_scale():
    state = {name: value.clone() for name, value in build_supernet(SMALL).state_dict().items()}
    state["cells.1_0.edges.down.1.weight"] = torch.linspace(-1, 1, 16)
    state["cells.1_1.edges.up.project.1.weight"] = torch.full((8,), -.25)
    state["cells.1_1.operations.sep_conv_3x3.0.2.weight"] = torch.full((16,), .5)
    state["cells.1_1.operations.sep_conv_3x3.2.2.weight"] = torch.full((16,), -.1)
    found, ones = batch_norm_scales(SMALL, state), dict.fromkeys(SMALL.gated(), 1.)
    by_hand = ones | {Edge(1, 0, "down"): sum(abs(-1 + 2 * i / 15) for i in range(16)) / 16, Edge(1, 1, "up"): .25, Edge(1, 1, "keep"): .3}
    assert found == pytest.approx(by_hand)


def test_candidates_have_their_own_scales_and_what_has_none_counts_1():
    space = dataclasses.replace(SEARCHED, operations=("conv_3x3", "identity"))
    state = {name: value.clone() for name, value in build_supernet(space).state_dict().items()}
    state["cells.2_1.operations.conv_3x3.1.weight"] = torch.full((32,), .2)
    found = batch_norm_scales(space, state)
    changed = {Edge(2, 1, "conv_3x3"): .2, Edge(2, 1, "keep"): .2}
    assert found == pytest.approx(dict.fromkeys(space.gated(), 1.) | changed)


def test_paths_of_no_scale_are_not_taken():
    state = {name: torch.zeros_like(value) if ".edges.down.1.weight" in name else value for name, value in build_supernet(SMALL).state_dict().items()}
    asked = count_cost(StaticNetwork(Architecture(SMALL, {Edge(layer, 0, "keep"): 1. for layer in range(4)})), (64, 80)).flops
    assert set(GRID_RIVALS["batch_norm_route"](SMALL, (64, 80), asked, state).edges) == {Edge(layer, 0, "keep") for layer in range(4)}


@pytest.mark.parametrize("other", [dataclasses.replace(SMALL, channels=16), dataclasses.replace(SMALL, layers=2)])
def test_scales_of_another_space_are_refused(other):
    with pytest.raises(ValueError, match="another search space"): batch_norm_scales(SMALL, build_supernet(other).state_dict())


# ---- one behaviour suite

def network_of(name):
    if name in SCALABLE: return build_baseline(name, 3, CHANNELS[name])
    return StaticNetwork(grid_rival(name, SMALL, (64, 80), 1.3e6))


@pytest.mark.parametrize("name", [*SCALABLE, *GRID_RIVALS])
def test_a_rival_behaves_as_every_network(name, tmp_path):
    torch.manual_seed(0); network = network_of(name).eval()
    for shape in ((1, 3, 64, 80), (2, 3, 65, 83), (1, 3, 33, 47)):
        with torch.inference_mode(): assert network(torch.randn(shape)).shape == (shape[0], 3, *shape[2:])
    network.train()(torch.randn(2, 3, 48, 64)).square().mean().backward()
    assert not [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    torch.manual_seed(1); other = network_of(name)
    other.load_state_dict(network.state_dict())
    images = torch.randn(1, 3, 45, 67)
    with torch.inference_mode(): assert torch.equal(other.eval()(images), network.eval()(images))
    if name in ("thinner", "narrow_unet"): # which raises where the file does not say what the network says
        assert export_program(network, (64, 80), tmp_path/"network.pt2").stat().st_size > 1000


def test_one_image_in_training_is_explained_where_it_cannot_be():
    build_baseline("narrow_unet", 3, CHANNELS["narrow_unet"]).train()(torch.randn(1, 3, 64, 80))
    with pytest.raises(ValueError, match="batch of 1 image"): build_baseline("fast_scnn", 3, CHANNELS["fast_scnn"]).train()(torch.randn(1, 3, 64, 80))


@pytest.mark.parametrize("name", [*BASELINES, *SCALABLE])
def test_running_statistics_of_all_rivals_move_alike(name):
    try: network = build_baseline(name, 3, CHANNELS.get(name))
    except ImportError as e: pytest.skip(str(e))
    assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {nn.BatchNorm2d(1).momentum} == {.1}


@pytest.mark.parametrize("name, channels", [("narrow_unet", None), ("narrow_unet", (4, 8, 16)), ("fast_scnn", (0,) * 7), ("lraspp_mobilenet_v3_large", (4, 8))])
def test_channels_are_checked(name, channels):
    with pytest.raises(ValueError, match=f"{name}.*channels"): build_baseline(name, 3, channels)


def test_fast_scnn_is_a_plain_reading_of_its_table():
    "Parameters of convolutions and batch norms by hand, module by module."
    a, b, c, d, e, f, g = baselines.FastSCNN.widths
    def conv(i, o, k=1, groups=1): return i * o * k * k // groups
    def ds(i, o): return conv(i, i, 3, i) + conv(i, o) + 2 * o
    def block(i, o): return conv(i, 6 * i) + 12 * i + conv(6 * i, 6 * i, 3, 6 * i) + 12 * i + conv(6 * i, o) + 2 * o
    blocks = sum(block(i, o) + 2 * block(o, o) for i, o in pairwise((c, d, e, f)))
    pooling = 4 * (conv(f, f // 4) + f // 2) + conv(2 * f, f) + 2 * f
    fusion = conv(f, f, 3, f) + 2 * f + conv(f, g) + 2 * g + conv(c, g) + 2 * g
    wanted = conv(3, a, 3) + 2 * a + ds(a, b) + ds(b, c) + blocks + pooling + fusion + 2 * ds(g, g) + conv(g, 19) + 19
    assert sum(p.numel() for p in build_baseline("fast_scnn", 19, baselines.FastSCNN.widths).parameters()) == wanted


# ---- the stages

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Data, and what a search leaves: an architecture and a supernet."
    place = tmp_path_factory.mktemp("rivals")
    draw_folder(place/"data", {"train": 6, "val": 2})
    found = baselines.random_architecture(SMALL, lambda kept: len(kept), 12, 0)
    save_architecture(dataclasses.replace(found, provenance={"classes": ["road", "house", "tree"]}), place/"search"/"architecture.json")
    torch.manual_seed(0); network = build_supernet(SMALL)
    network.load_state_dict(scaled_state(SMALL))
    save_weights(network, place/"search"/"supernet.safetensors")
    return place


def config(place, name, **more):
    w_jig = 0. if name in SCALABLE else .1
    return RetrainConfig(**{**dict(folder=str(place/"runs"/name), data="folder", root=str(place/"data"), label_fraction=.5, steps=2, logs=1, batch_labelled=2, batch_unlabelled=2,
                                   batch_jigsaw=2, w_jig=w_jig, architecture=name, equal_cost=str(place/"search")), **more})


@pytest.mark.parametrize("name", [*GRID_RIVALS, *SCALABLE])
def test_a_rival_trains_and_comes_back(place, name, capsys):
    asked = config(place, name)
    check_inputs("retrain", asked)
    made = retrain(asked)
    metrics, found = made.record.metrics, load_architecture(place/"search")
    target = count_cost(StaticNetwork(found), (64, 80)).gflops
    assert metrics["asked_gflops"] == target and abs(metrics["gflops"] / target - 1) <= .03
    state = made.trained.model.state_dict()
    for network in (load_network(asked.folder), load_retrain(asked.folder).trained.model):
        assert all(torch.equal(value, state[key].cpu()) for key, value in network.state_dict().items())
    kept = place/"runs"/name/"architecture.json"
    if name in SCALABLE: assert not kept.exists() and metrics["channels"] == list(made.trained.model.network.channels)
    else: assert load_architecture(kept).provenance["rival"] == name and load_network(asked.folder).architecture.space.num_classes == 3
    capsys.readouterr()
    retrain(asked)
    assert "finished" in capsys.readouterr().out, "the same run"
    rows = evaluate(EvaluateConfig(folder=str(place/"evaluate"/name), network=asked.folder, split="val", baselines=(), latency_repeats=1)).record.metrics["rows"]
    assert next(iter(rows)) == name and rows[name]["gflops"] == metrics["gflops"]


def test_the_two_kinds_travel_as_networks_of_their_kind(place):
    for name in ("fine", "narrow_unet"): retrain(config(place, name))
    assert (export_run(place/"runs"/"fine", place/"away")/"model.safetensors").exists()
    with pytest.raises(ValueError, match="narrow_unet"): export_run(place/"runs"/"narrow_unet", place/"nowhere")
    assert not (place/"nowhere").exists()


def test_a_cost_in_gflops(place):
    made = retrain(config(place, "narrow_unet", folder=str(place/"runs"/"gflops"), equal_cost=None, gflops=.004))
    assert made.record.metrics["asked_gflops"] == .004 and .97 <= made.record.metrics["gflops"] / .004 <= 1
    assert set(made.record.inputs) == {"root"}


def test_a_route_by_batch_norm_inherits_the_supernets_weights(place):
    asked = config(place, "batch_norm_route", folder=str(place/"runs"/"inherited"), initialise="inherit", lr=0.)
    weights, state = dict(retrain(asked).trained.model.named_parameters()), read_weights(place/"search"/"supernet.safetensors")
    assert weights and all(torch.equal(value.cpu(), state[name]) for name, value in weights.items())


def test_another_architecture_in_the_same_file_is_another_run(place, tmp_path):
    at = tmp_path/"found.json"
    save_architecture(load_architecture(place/"search"), at)
    asked = config(place, "fast_scnn", folder=str(tmp_path/"run"), equal_cost=str(at))
    retrain(asked)
    save_architecture(load_architecture(place/"search"), tmp_path/"moved.json")
    retrain(dataclasses.replace(asked, equal_cost=str(tmp_path/"moved.json"))) # the same content elsewhere: the same run
    save_architecture(all_open(SMALL), at)
    with pytest.raises(ValueError, match="equal_cost"): retrain(asked)


@pytest.mark.parametrize("name, more, told", [
    ("thinner", dict(equal_cost=None), "equal_cost"), ("fine", dict(equal_cost=None, gflops=.1), "equal_cost"), ("shallower", dict(gflops=.1), "gflops"),
    ("narrow_unet", dict(equal_cost=None), "gflops"), ("fast_scnn", dict(gflops=.1), "gflops"), ("narrow_unet", dict(equal_cost=None, gflops=0.), "gflops"),
    ("narrow_unet", dict(w_jig=.1), "w_jig"), ("fast_scnn", dict(initialise="inherit"), "initialise"), ("fast_scnn", dict(w_semi=1., consistency="unimatch"), "consistency"),
    ("thinner", dict(initialise="inherit"), "initialise"), ("lraspp_mobilenet_v3_large", dict(w_jig=0.), "equal_cost"), ("runs/search", dict(equal_cost=None, gflops=.1), "gflops")])
def test_what_a_rival_cannot_have_is_told_at_once(place, name, more, told):
    with pytest.raises(ValueError, match=told): config(place, name, **more)


def test_files_that_are_missing_are_named_before_data_is_read(place, tmp_path):
    lost = dict(root=str(tmp_path/"no data"), folder=str(tmp_path/"run"))
    for run in (retrain, lambda c: check_inputs("retrain", c)):
        with pytest.raises(FileNotFoundError, match="equal_cost"): run(config(place, "narrow_unet", equal_cost=str(tmp_path/"none.json"), **lost))
        with pytest.raises(FileNotFoundError, match="supernet"): run(config(place, "batch_norm_route", supernet=str(tmp_path/"none.safetensors"), **lost))


def test_other_classes_and_costs_out_of_reach_are_told_before_training(place, tmp_path):
    save_architecture(all_open(dataclasses.replace(SMALL, num_classes=5)), tmp_path/"five.json")
    with pytest.raises(ValueError, match="5 classes"): retrain(config(place, "thinner", equal_cost=str(tmp_path/"five.json"), folder=str(tmp_path/"a")))
    with pytest.raises(ValueError, match="narrow_unet.*least possible"): retrain(config(place, "narrow_unet", equal_cost=None, gflops=1e-5, folder=str(tmp_path/"b")))
    assert not list((tmp_path/"b").glob("checkpoint*"))


def test_the_architecture_whose_cost_is_met_is_not_written_over(place, tmp_path):
    save_architecture(load_architecture(place/"search"), tmp_path/"architecture.json")
    with pytest.raises(ValueError, match="write over"): retrain(config(place, "fine", equal_cost=str(tmp_path), folder=str(tmp_path)))


@pytest.mark.parametrize("name", ["thinner", "narrow_unet"])
def test_a_rival_is_measured_on_the_images_of_what_it_is_compared_with(place, tmp_path, name):
    found = load_architecture(place/"search")
    save_architecture(dataclasses.replace(found, provenance={**found.provenance, "data": "data", "chosen_on": ["val/1"]}), tmp_path/"architecture.json")
    made = retrain(config(place, name, folder=str(tmp_path/name), equal_cost=str(tmp_path)))
    assert made.record.metrics["val_images"] == 1 and len(made.data.val) == 2
    if name == "thinner": # a stage later, too
        images = evaluate(EvaluateConfig(folder=str(tmp_path/"evaluate"), network=str(tmp_path/name), split="val", baselines=(), latency_repeats=1)).record.metrics["images"]
        assert images == 1


def test_rivals_of_a_run_that_began_with_jigsaws_begin_with_labels(place, tmp_path):
    from selfsupnas.stages.evaluation import train_baseline
    from selfsupnas.stages.pareto_front import ParetoConfig, member_config
    from selfsupnas.stages.configs import SearchConfig
    searched = SearchConfig(data="folder", root=str(place/"data"), sup_start=.5, w_semi=0.)
    assert member_config(ParetoConfig(folder=str(tmp_path)), searched, "derived-0.5").sup_start == 0
    first = config(place, str(place/"search"), equal_cost=None, folder=str(tmp_path/"run"), sup_start=.5, w_semi=0.)
    retrain(first)
    assert train_baseline("lraspp_mobilenet_v3_large", dataclasses.asdict(first), f"{first.folder}/split", str(tmp_path/"evaluate"), 0, False)(torch.zeros(1, 3, 64, 80)).shape[1] == 3
