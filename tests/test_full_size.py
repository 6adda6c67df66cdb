"The estimates of full_size.py against independent counts: hooks, torch's counter of operations, the saved tensors of a real step."
import dataclasses, math

import pytest
import torch
from full_size import (RATE_RECORDS, SETS, estimate, grid_pixels, head_bytes, passes, recipe_config, recipe_estimate, recipes, run_flops, saved_bytes, saved_lines, step_flops,
                       step_memory, trunk_bytes, view_table)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from selfsupnas.core import RunRecord
from selfsupnas.rivals import random_architecture
from selfsupnas.space.budget import static_cost
from selfsupnas.space.cell import SparseFeatures
from selfsupnas.space.cost import count_cost
from selfsupnas.space.network import StaticNetwork
from selfsupnas.space.supernet import build_supernet, feature_sizes
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.calibration import check_budget
from selfsupnas.tasks.consistency import CONSISTENCY
from selfsupnas.tasks.permutations import permutation_set
from selfsupnas.tasks.teacher import EMATeacher
from selfsupnas.train.batches import load_training_data, make_batches
from selfsupnas.train.step import LossWeights, Objective, build_multitask_model

SMALL = SearchConfig(folder="runs/unused", size=(64, 80), layers=3, channels=16, batch_labelled=2, batch_unlabelled=3, batch_jigsaw=4, threshold=0.)
KINDS = {name: dataclasses.replace(SMALL, consistency=name) for name in CONSISTENCY}
KINDS |= {"clean": dataclasses.replace(SMALL, statistics="clean", w_strong=1.), "unimatch, clean": dataclasses.replace(SMALL, consistency="unimatch", statistics="clean")}
kinds = pytest.mark.parametrize("kind", KINDS)
SIZE = (64, 80)


@pytest.fixture(scope="module")
def data(tmp_path_factory): return load_training_data(dataclasses.replace(SMALL, folder=str(tmp_path_factory.mktemp("data"))))


@pytest.fixture(scope="module")
def space(data): return SMALL.space(data.train.spec.num_classes)


@pytest.fixture(scope="module")
def table(space): return view_table(space, SIZE, "conditional")


@pytest.fixture
def one_step(data, space):
    "one_step(config, semi) -> the trained networks, the teacher, and a function that computes the loss of one step."
    def make(config, semi=True):
        multitask = build_multitask_model(build_supernet(space), config).train()
        teacher = EMATeacher(multitask)
        batch, objective = next(make_batches(config, data)).to("cpu"), Objective(config, multitask, teacher, permutation_set(config.jigsaw_n))
        weights = LossWeights(sup=config.w_sup, jig=config.w_jig, semi=config.w_semi * semi, strong=config.w_strong)
        def loss(): return objective(batch, weights, torch.Generator().manual_seed(0))[0].total(weights)
        return multitask, teacher, loss
    return make


WITHOUT = {f"without {name}": dataclasses.replace(SMALL, **{name: 0.}) for name in ("w_jig", "w_semi")} # a weight of 0 removes the term and its compute


@pytest.mark.parametrize("kind", [*KINDS, *WITHOUT])
@pytest.mark.parametrize("semi", [False, True], ids=["before", "after"])
def test_the_objective_sends_as_many_images_as_counted(one_step, kind, semi):
    "Hooks count the images in stem, decoder and classifier of each network, before and after w_semi starts to rise."
    config = (KINDS | WITHOUT)[kind]
    multitask, teacher, loss = one_step(config, semi)
    entered = {}
    def count(name): return lambda module, args: entered.__setitem__(name, entered.get(name, 0) + len(args[0]))
    for name, network in (("student", multitask.model), ("taught", teacher.model.model), ("peer", multitask.peer)):
        if network is None: continue
        network.stem.register_forward_pre_hook(count(name))
        network.classifier.register_forward_pre_hook(count(f"{name}, classified"))
        network.decoder.last.register_forward_pre_hook(count(f"{name}, decoded"))
    loss()
    n = passes(config, semi)
    assert entered["student"] == n["segmented"] + n["jigsaw"]
    assert entered["student, decoded"] == n["segmented"] + n["jigsaw"] + n["perturbed"]
    assert entered["student, classified"] == n["segmented"] + n["perturbed"]
    for other in ("taught", "peer"): assert {entered.get(other, 0), entered.get(f"{other}, classified", 0)} == {n[other]}
    assert (kind != "without w_jig" or n["jigsaw"] == 0) and (kind != "without w_semi" or n["segmented"] == config.batch_labelled)


def test_the_table_of_a_shallow_grid_holds_for_a_deep_one(space, table):
    assert count_cost(build_supernet(space), SIZE).flops == table.full
    deep = dataclasses.replace(space, layers=6)
    assert count_cost(build_supernet(deep), SIZE).flops == view_table(deep, SIZE, "conditional").full


@pytest.mark.parametrize("kind, semi", [("fixmatch", False), ("cps", False), *((kind, True) for kind in KINDS)])
def test_multiply_adds_of_a_step_are_those_that_torch_counts(one_step, space, table, kind, semi):
    """torch counts only convolutions, so the estimate is multiplied by their share of the network.

    It counts the weight gradient of a depthwise convolution as if that were a full one: the formula given to it is the right one.
    """
    def backward_flops(gradient, features, weights, *others, **_): # shapes; which gradients are wanted
        return 2 * math.prod(gradient) * math.prod(weights[1:]) * sum(others[-1][:2])
    loss = one_step(KINDS[kind], semi)[2]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: backward_flops}) as counter: loss().backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(counts[op] for op in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)) / 2
    of_convolutions = count_cost(build_supernet(space), SIZE).by_operator["conv"] / table.full
    ratio = step_flops(KINDS[kind], table, semi=semi) * of_convolutions / counted
    assert -.02 < ratio - 1 < (.04 if "clean" in kind else .02) # where passes are apart, some of what is computed has no gradient that is used


def test_multiply_adds_of_a_run_follow_its_terms_and_its_budget(table):
    config = dataclasses.replace(SMALL, steps=1000, budget=.4)
    open_throughout, followed = (run_flops(config, table, follow=follow) for follow in (False, True))
    assert config.budget < followed / open_throughout < 1
    labels = dataclasses.replace(config, w_semi=0., budget=1.)
    assert run_flops(labels, table) == pytest.approx(1000 * step_flops(config, table, semi=False), rel=1e-6)
    quarter = dataclasses.replace(labels, jigsaw_decay=(.25, .25))
    with_jigsaw, without = (step_flops(quarter, table, jig=jig) for jig in (True, False))
    assert run_flops(quarter, table) == pytest.approx(250 * with_jigsaw + 750 * without, rel=1e-9)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_kept_is_linear_in_pixels(space, precision):
    model = build_supernet(space).train()
    low, high, larger = ({"trunk": trunk_bytes(model, precision, side), **head_bytes(model, precision, side)} for side in (96, 128, 256))
    for part in low:
        slope = (high[part] - low[part]) / (128**2 - 96**2)
        assert low[part] + slope * (256**2 - 96**2) == pytest.approx(larger[part], rel=.03)


@kinds
def test_memory_of_a_step_is_that_of_the_real_step(one_step, space, kind):
    multitask, teacher, loss = one_step(KINDS[kind])
    kept = saved_bytes(loss, nn.ModuleList([multitask, teacher.model]))
    state = 20 * sum(p.numel() for p in multitask.model.parameters()) * (1 + (multitask.peer is not None))
    assert step_memory(KINDS[kind], space, SIZE) - state == pytest.approx(kept, rel=.1)


def test_sizes_that_32_does_not_divide_count_as_what_the_grid_computes(space):
    deeper = dataclasses.replace(space, layers=8)
    kept, line = trunk_bytes(build_supernet(deeper).train(), "no", 161), saved_lines(deeper, "conditional", "no")[0]["trunk"]
    assert grid_pixels((161, 161)) * line == pytest.approx(kept, rel=.03) and grid_pixels((128, 160)) == 128 * 160


def test_recomputed_cells_keep_their_inputs_and_the_coarsest_their_content(space):
    "Two depths differ by what is counted here by hand: all that enters cells, and the content of those at stride 32, which do not run again."
    def beside_the_cells(depth):
        model = build_supernet(dataclasses.replace(space, layers=depth)).train()
        model.recompute, sizes = True, feature_sizes((128, 128))
        entering = sum(4 * model.space.channels_at(scale) * math.prod(sizes[scale]) for _, scale in model.space.cells() if scale < 3)
        coarsest, features = model.cells[f"{depth - 1}_3"], torch.randn(1, model.space.channels_at(3), *sizes[3], requires_grad=True)
        content = saved_bytes(lambda: [out.features for out in coarsest(SparseFeatures(features), sizes[2]).values()], coarsest)
        return trunk_bytes(model, "no", 128) - entering - content * sum(scale == 3 for _, scale in model.space.cells())
    assert beside_the_cells(6) == beside_the_cells(10)
    plain, recomputed = (saved_lines(dataclasses.replace(space, layers=12), "conditional", "no", flag)[0]["trunk"] for flag in (False, True))
    assert recomputed < .45 * plain


@pytest.mark.parametrize("seed", range(3))
def test_a_share_of_the_cost_is_about_that_share_of_the_memory(space, seed):
    "A random architecture saves slightly less, because it has no gates."
    deeper = dataclasses.replace(space, layers=6)
    table, slopes = view_table(deeper, (128, 128), "conditional"), saved_lines(deeper, "conditional", "no")[0]
    route = random_architecture(deeper, lambda kept: static_cost(table, kept), .5 * table.full, seed)
    share, kept = static_cost(table, route.selected) / table.full, trunk_bytes(StaticNetwork(route).train(), "no", 128)
    assert .6 < kept / (128**2 * slopes["trunk"] * share) < 1.1


ALL = [(name, stage) for name, stages in recipes().items() for stage in stages]


@pytest.mark.parametrize("name, stage", ALL)
def test_an_estimate_agrees_with_itself_and_with_what_was_measured(name, stage):
    "The estimated memory is a lower bound of the measured one, for other classes and an architecture near the budget."
    e, config, record = recipe_estimate(name, stage), recipe_config(name, stage), RunRecord.load(RATE_RECORDS/f"{name}-{stage}"/"rate-record.json")
    assert 0 < e.run <= e.open <= 1.001 * config.steps * e.step and (stage == "retrain" or e.run < e.open)
    assert 1 < record.metrics["peak_bytes"] / e.memory < 1.5
    assert record.metrics["multiply_adds"] == pytest.approx(e.step, rel=.05)
    if stage == "search": check_budget(view_table(config.space(SETS[config.data]["spec"].num_classes), config.crop, config.gate), config.budget)


def test_an_estimate_needs_a_size(space):
    with pytest.raises(ValueError, match="crop=.*or size"): estimate(SearchConfig(), space)
