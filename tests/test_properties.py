"Properties of any search space, image, batch, architecture, permutation and value; hypothesis searches for counterexamples, with the same examples in each run."
import dataclasses, functools, itertools, json, math, string, types, typing

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from selfsupnas.space.architecture import Architecture, architecture_from_json, architecture_to_json, derive_greedily, connected_edges
from selfsupnas.data.augment import WeakView
from selfsupnas.rivals import all_open
from selfsupnas.stages.evaluation import EvaluateConfig
from selfsupnas.space.budget import expected_cost, measure_costs, realised_cost, static_cost
from selfsupnas.train.checkpoint import checkpoint_paths, load_checkpoint, load_weights, read_checkpoint, save_checkpoint, save_weights, step_of
from selfsupnas.train.config import learning_rate, ramp_up
from selfsupnas.core import RunRecord, parse_value
from selfsupnas.space.cost import count_flops
from selfsupnas.space.derivation import derive
from selfsupnas.metrics import Metrics, confusion_matrix
from selfsupnas.stages.pareto_front import ParetoConfig
from selfsupnas.space.gate import CLOSED, gate_activation, fix_gates, place_rows, select_rows, record_gates
from selfsupnas.space.grid import SearchSpace, trace_route
from selfsupnas.tasks.jigsaw import cut_and_shuffle, jigsaw_accuracy, join_cells, solve_positions, split_cells, unshuffle
from selfsupnas.space.network import StaticNetwork, inherit
from selfsupnas.space.operations import OPERATIONS
from selfsupnas.data.files import PairDataset, SegmentationSpec
from selfsupnas.tasks.permutations import permutation_set
from selfsupnas.stages.retraining import RetrainConfig
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.space.supernet import gates_by_edge, gates_from_edges, build_supernet
from selfsupnas.data.splits import LabelSplit, label_count, load_split, save_split

FAST = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def examples(count): return settings(max_examples=count, **FAST)


seeds = st.integers(0, 2**32 - 1)
sides = st.integers(32, 75)
spaces = st.builds(SearchSpace, num_classes=st.integers(2, 5), layers=st.integers(1, 4), channels=st.sampled_from([2, 4, 6]), search_operations=st.booleans(),
                   operations=st.lists(st.sampled_from(list(OPERATIONS)), min_size=1, max_size=3, unique=True).map(tuple))
few_spaces = st.sampled_from([SearchSpace(3, 3, 4), SearchSpace(2, 4, 2, ("conv_3x3", "mbconv_3x3")), SearchSpace(4, 2, 4, ("sep_conv_3x3", "max_pool_3x3", "identity"), True),
                              SearchSpace(3, 4, 2, ("identity", "avg_pool_3x3"), True)])


@functools.cache
def table_of(space, size=(40, 57)): return measure_costs(space, size)


def random_network(build, seed):
    "A network in evaluation mode whose batch norms are not the identity."
    torch.manual_seed(seed)
    network = build().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, .3), module.running_var.uniform_(.5, 2)
            torch.nn.init.uniform_(module.weight, .5, 1.5), torch.nn.init.normal_(module.bias, 0, .3)
    return network


@st.composite
def weighed(draw, space, least=.05):
    "Any subset of the gated edges and candidates of a space, with weights."
    numbers = st.integers(round(least * 1e6), 10**6).map(lambda n: n / 1e6) # in the precision of the JSON
    return {edge: draw(numbers) for edge in space.gated() if draw(st.booleans())}


@st.composite
def architectures(draw, of=spaces):
    space = draw(of)
    kept = draw(weighed(space))
    return Architecture(space, {p: w for p, w in kept.items() if p in set(space.edges())}, {"seed": draw(seeds)}, {p: w for p, w in kept.items() if p not in set(space.edges())})


def close(a, b): return a.shape == b.shape and torch.allclose(a, b, atol=1e-4 * max(1, float(b.abs().max())), rtol=0)


# -- Shapes

@examples(20)
@given(spaces, st.sampled_from(["conditional", "static"]), st.integers(1, 3), sides, sides, seeds)
def test_a_supernet_answers_every_pixel_of_every_size(space, gate, batch, height, width, seed):
    network = random_network(lambda: build_supernet(space, gate=gate), seed)
    with torch.no_grad(): logits = network(torch.randn(batch, 3, height, width))
    assert logits.shape == (batch, space.num_classes, height, width) and logits.isfinite().all()


@examples(20)
@given(architectures(), st.integers(1, 3), sides, sides, seeds)
def test_so_does_the_network_of_every_architecture(architecture, batch, height, width, seed):
    network = random_network(lambda: StaticNetwork(architecture), seed)
    with torch.no_grad(): logits = network(torch.randn(batch, 3, height, width))
    assert logits.shape == (batch, architecture.space.num_classes, height, width) and logits.isfinite().all()


@examples(40)
@given(st.tuples(st.integers(8, 60), st.integers(8, 60)), st.none() | st.tuples(st.integers(2, 70), st.integers(2, 70)), st.floats(.01, 100), st.floats(0, 1), seeds)
def test_a_view_has_its_size_and_invents_no_label(size, wanted, zoom, flip, seed):
    torch.manual_seed(seed)
    label = torch.randint(0, 3, size)
    image, marks, valid = WeakView(wanted, (zoom, zoom), flip)(torch.randint(0, 255, (3, *size), dtype=torch.uint8), label)
    assert image.shape[1:] == marks.shape == valid.shape == (wanted or size) and image.dtype == torch.uint8
    assert set(marks.unique().tolist()) <= {*label.unique().tolist(), 255} and bool((marks[~valid] == 255).all()) and valid.any()


@examples(40)
@given(st.tuples(st.integers(8, 60), st.integers(8, 60)), st.tuples(st.integers(2, 70), st.integers(2, 70)), st.booleans(), seeds)
def test_a_view_moves_an_image_and_its_label_alike(size, wanted, flip, seed):
    "An image that shows its label still does after crop, padding and flip."
    torch.manual_seed(seed)
    label = torch.randint(0, 3, size)
    image, marks, valid = WeakView(wanted, (1., 1.), float(flip))(label.to(torch.uint8).expand(3, *size), label)
    assert bool((image == marks)[:, valid].all())


# -- Costs

@examples(15)
@given(architectures(few_spaces))
def test_the_table_says_what_fvcore_counts(architecture):
    table = table_of(architecture.space)
    assert static_cost(table, architecture.selected) == count_flops(StaticNetwork(architecture), torch.zeros(1, 3, *table.size))


@examples(100)
@given(st.data(), few_spaces)
def test_another_path_never_costs_less(data, space):
    "A cell without open edges passes its input along `keep`. There only `keep` is opened, because another edge would move the input elsewhere."
    kept = set(data.draw(weighed(space)))
    edge = data.draw(st.sampled_from(space.gated()))
    assume(edge.kind in ("keep", *space.operations) or trace_route(space, kept).get(edge[:2], "absent") != ())
    table = table_of(space)
    assert static_cost(table, kept | {edge}) >= static_cost(table, kept)
    if edge not in connected_edges(space, kept | {edge}): assert static_cost(table, kept | {edge}) == static_cost(table, kept)


@examples(60)
@given(st.data(), few_spaces, st.floats(0, 1))
def test_what_is_derived_is_within_the_budget_and_part_of_what_was_open(data, space, share):
    table, importance = table_of(space), {edge: 0. for edge in space.gated()} | data.draw(weighed(space))
    least = static_cost(table, [])
    budget = least + share * (table.full - least)
    found = derive_greedily(space, importance, lambda kept: static_cost(table, kept), budget)
    assert static_cost(table, found.selected) <= budget
    assert all(importance[edge] > 0 and weight == importance[edge] for edge, weight in found.selected.items()) and connected_edges(space, found.selected) == set(found.selected)
    if share == 1: assert set(found.selected) == connected_edges(space, {edge for edge in space.gated() if importance[edge]})


@examples(30)
@given(st.data(), few_spaces, st.floats(0, 1), st.integers(1, 3))
def test_the_exact_derivation_keeps_what_the_greedy_one_keeps_and_more(data, space, share, k):
    table, importance = table_of(space), {edge: 0. for edge in space.gated()} | data.draw(weighed(space))
    least = static_cost(table, [])
    budget = least + share * (table.full - least)
    found = derive(space, importance, table, budget, k)
    greedy = derive_greedily(space, importance, lambda kept: static_cost(table, kept), budget)
    worth = [sum(importance[edge] for edge in one.selected) for one in found]
    assert 1 <= len(found) <= k and worth[0] >= sum(importance[edge] for edge in greedy.selected) - 1e-6 and worth == sorted(worth, reverse=True)
    for one in found:
        assert static_cost(table, one.selected) <= budget
        assert all(importance[edge] > 0 and weight == importance[edge] for edge, weight in one.selected.items()) and connected_edges(space, one.selected) == set(one.selected)
    for a, b in itertools.combinations(found, 2): assert len(a.edges.keys() ^ b.edges.keys()) >= .1 * len(space.edges())


@examples(40)
@given(architectures(few_spaces))
def test_a_route_of_the_supernet_costs_the_network_and_its_gates(architecture):
    space = architecture.space
    table, gates = table_of(space), {edge: torch.full((2,), float(architecture.selected.get(edge, 0))) for edge in space.gated()}
    of_gates = sum(table.gates[scale][len(space.gated_at(layer, scale))] for layer, scale in architecture.live)
    assert realised_cost(table, gates).tolist() == [static_cost(table, architecture.selected) + of_gates] * 2
    if space.layers >= 3: assert float(expected_cost(table, {edge: torch.ones(1).double() for edge in gates})) == pytest.approx(table.full)


# -- Gates

@examples(100)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1), st.floats(CLOSED, .9), st.floats(0, 1))
def test_a_gate_is_shut_or_open_and_nothing_between(logits, threshold, leak):
    gates = gate_activation(torch.tensor(logits), leak, threshold)
    assert bool(((gates == 0) | (gates > threshold)).all()) and bool((gates <= 1).all())


@examples(60)
@given(st.lists(st.booleans(), min_size=1, max_size=8), seeds)
def test_put_is_the_inverse_of_take(rows, seed):
    images = torch.tensor(rows)
    features = torch.randn(len(rows), 2, 3, generator=torch.Generator().manual_seed(seed))
    back = place_rows(select_rows(features, images), images)
    assert back[images].equal(features[images]) and not back[~images].any()


@examples(15)
@given(spaces, seeds)
def test_with_every_gate_at_one_the_supernet_is_its_network_with_all_open(space, seed):
    network, whole = random_network(lambda: build_supernet(space), seed), all_open(space)
    images = torch.randn(2, 3, 40, 57)
    with torch.no_grad(), fix_gates(network, gates_from_edges(space, whole.selected)):
        assert close(inherit(StaticNetwork(whole), network.state_dict()).eval()(images), network(images))


@examples(25)
@given(architectures(), seeds)
def test_held_to_an_architecture_the_supernet_is_the_network_that_inherits_it(architecture, seed):
    network = random_network(lambda: build_supernet(architecture.space), seed)
    images = torch.randn(2, 3, 40, 57)
    with torch.no_grad(), fix_gates(network, gates_from_edges(architecture.space, architecture.selected)):
        assert close(inherit(StaticNetwork(architecture), network.state_dict()).eval()(images), network(images))


@examples(15)
@given(st.data(), spaces, seeds)
def test_images_of_a_batch_do_not_meet(data, space, seed):
    "Each image has its own gates, some of them closed: it gets the same logits as alone, and gates of 0 in cells that it does not reach."
    network = random_network(lambda: build_supernet(space), seed)
    images = torch.randn(3, 3, 40, 57)
    held = [gates_from_edges(space, data.draw(weighed(space))) for _ in images]
    with torch.no_grad():
        with fix_gates(network, {name: torch.stack([h[name] for h in held]) for name in held[0]}), record_gates(network) as seen: together = network(images)
        for k, one in enumerate(held):
            with fix_gates(network, one): assert close(together[k:k + 1], network(images[k:k + 1]))
    route = [trace_route(space, [p for p, g in gates_by_edge(space, seen).items() if g[k] > 0]) for k in range(3)]
    for edge, gate in gates_by_edge(space, seen).items(): assert all(edge[:2] in route[k] or gate[k] == 0 for k in range(3))


# -- Writing and reading

@examples(80)
@given(architectures())
def test_an_architecture_comes_back_from_json(architecture):
    back = architecture_from_json(json.loads(json.dumps(architecture_to_json(architecture))))
    assert back == architecture and back.provenance == architecture.provenance and back.live == architecture.live


plain = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)
objects = st.dictionaries(st.text(min_size=1, max_size=8), plain, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("properties")


@examples(40)
@given(name=st.text(max_size=9), parameters=objects, metrics=objects, timings=objects, seed=seeds)
def test_a_record_comes_back_from_its_file(folder, name, parameters, metrics, timings, seed):
    record = RunRecord("toy", name, parameters, seed, metrics, timings, {}, {}, None)
    assert RunRecord.load(record.save(folder)) == record
    with pytest.raises(ValueError): dataclasses.replace(record, metrics={**metrics, "miou": math.nan}).save(folder)
    assert RunRecord.load(folder/"toy-record.json") == record


class Named(PairDataset):
    "A dataset that has only ids."
    def __init__(self, ids): super().__init__(SegmentationSpec("names", ("a", "b"), ((0, 0, 0), (9, 9, 9))), ids)


names = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="\u2028\u2029\x85"), min_size=1, max_size=12).filter(lambda s: s == s.strip().lstrip("/") != "")


@examples(40)
@given(ids=st.lists(names, min_size=2, max_size=12, unique=True), cut=st.integers(1, 12), seed=seeds)
def test_a_split_comes_back_from_its_files(folder, ids, cut, seed):
    split = LabelSplit(ids[:cut], ids[cut:], cut / len(ids), seed, "names")
    assert load_split(save_split(split, folder/"split"), Named(ids)) == split


@examples(100)
@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10**6))
def test_a_fraction_is_rounded_up_and_never_to_nothing(fraction, total):
    if fraction * total < 1 - 1e-6:
        with pytest.raises(ValueError, match="less than one image"): label_count(fraction, total)
    elif fraction * total >= 1: assert fraction * total - 1e-6 <= label_count(fraction, total) <= min(total, fraction * total + 1)


VALUES = {int: st.integers(-10**6, 10**6), float: st.floats(allow_nan=False, allow_infinity=False), bool: st.booleans(), str: st.text(string.ascii_letters + "_/.-", min_size=1, max_size=9).filter(
    lambda s: s not in ("true", "false", "null", "None", "True", "False")), type(None): st.none(), tuple[int, int]: st.tuples(*[st.integers(1, 999)] * 2),
    tuple[float, float]: st.tuples(*[st.floats(-9, 9)] * 2), tuple[float, float, float, float]: st.tuples(*[st.floats(-9, 9)] * 4),
    tuple[float, ...]: st.lists(st.floats(-9, 9), max_size=4).map(tuple), tuple[str, ...]: st.lists(st.text(string.ascii_letters, min_size=1), max_size=4).map(tuple)}
KINDS = list({f"{kind}": kind for cls in (SearchConfig, RetrainConfig, EvaluateConfig, ParetoConfig) for kind in typing.get_type_hints(cls).values()}.values())


@examples(200)
@given(st.data(), st.sampled_from(KINDS))
def test_what_python_prints_the_command_reads(data, kind):
    "A value of every parameter type, through its text."
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    value = data.draw(st.one_of([st.sampled_from(typing.get_args(option)) if typing.get_origin(option) is typing.Literal else VALUES[option] for option in options]))
    assert parse_value(str(value), kind) == value


# -- Jigsaws

@examples(40)
@given(st.integers(2, 4), st.integers(0, 30), st.integers(0, 30), seeds)
def test_a_shuffled_picture_is_put_back(n, height, width, seed):
    "Tiles fill their cells; rows and columns outside the cells are zero."
    draw, permutations = torch.Generator().manual_seed(seed), permutation_set(n)
    images = torch.randn(2, 3, 4 * n + height, 4 * n + width, generator=draw)
    shuffled, which = cut_and_shuffle(images, permutations, draw, tile_share=1., grey_p=0., normalise=False)
    back = unshuffle(shuffled, permutations[which])
    assert torch.allclose(split_cells(back, n), split_cells(images, n), atol=1e-5)
    assert torch.allclose(back, join_cells(split_cells(images, n), images.shape[-2:]), atol=1e-5)


@examples(40)
@given(st.integers(2, 5), st.integers(2, 60), seeds)
def test_permutations_are_what_they_say_and_a_head_that_knows_is_right(n, size, seed):
    permutations = permutation_set(n, min(size, 24) if n == 2 else size)
    assert permutations.sort(1).values.equal(torch.arange(n * n).expand_as(permutations)) and len(permutations.unique(dim=0)) == len(permutations)
    which = torch.randint(len(permutations), (3,), generator=torch.Generator().manual_seed(seed))
    by_place = torch.nn.functional.one_hot(permutations[which], n * n) * 9.
    assert solve_positions(by_place).equal(permutations[which])
    for logits in (by_place, torch.nn.functional.one_hot(which, len(permutations)) * 9.):
        if tuple(logits.shape[1:]) != (n * n,): assert [float(share) for share in jigsaw_accuracy(logits, which, permutations)] == [1, 1]


# -- Checkpoints

class Part:
    def __init__(self, state=None): self.state = state
    def state_dict(self): return self.state
    def load_state_dict(self, state): self.state = state


tensors = st.builds(lambda shape, kind, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(kind), st.lists(st.integers(0, 4), max_size=3),
                    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.uint8]), seeds)
states = st.dictionaries(st.text(string.ascii_lowercase + ".", min_size=1, max_size=8), tensors, max_size=4)


def alike(a, b): return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


@examples(10)
@given(parts=st.dictionaries(st.sampled_from("abc"), states, min_size=1), parameters=objects, step=st.integers(0, 10**7), keep=st.integers(1, 3))
def test_a_checkpoint_comes_back_and_the_newest_stay(folder, parts, parameters, step, keep):
    for k in range(4): save_checkpoint(folder/"kept", step + k, {name: Part(state) for name, state in parts.items()}, parameters, keep, best=k == 0)
    back = {name: Part() for name in parts}
    assert load_checkpoint(folder/"kept", back, parameters) == step + 3 and all(alike(back[name].state, parts[name]) for name in parts)
    assert [step_of(p) for p in checkpoint_paths(folder/"kept")] == [step + 3 - k for k in range(keep)] and read_checkpoint(folder/"kept"/"best.pt")["step"] == step
    if any(value is not None for value in parameters.values()):
        with pytest.raises(ValueError, match="other parameters"): load_checkpoint(folder/"kept", back, {})


@examples(15)
@given(architecture=architectures(), seed=seeds)
def test_weights_come_back_from_their_file(folder, architecture, seed):
    network = random_network(lambda: StaticNetwork(architecture), seed)
    again = load_weights(StaticNetwork(architecture), save_weights(network, folder/"weights.safetensors"))
    assert alike(again.state_dict(), network.state_dict()) and not again.training


# -- Schedules and metrics

@examples(100)
@given(st.floats(0, 1), st.floats(0, 1), st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), st.sampled_from(["sigmoid", "linear"]))
def test_a_ramp_rises_from_nothing_to_all(a, b, ends, kind):
    low, high = (ramp_up(share, *ends, kind) for share in sorted((a, b)))
    assert 0 <= low <= high <= 1 and ramp_up(1., *ends, kind) == 1 and (ends[0] == 0 or ramp_up(0., *ends, kind) == 0)


@examples(100)
@given(st.integers(1, 10**6), st.data(), st.floats(0, 1), st.floats(1e-6, 1))
def test_the_rate_of_learning_is_never_over_its_peak_nor_nothing(steps, data, warmup, peak):
    step = data.draw(st.integers(0, steps - 1))
    assert 0 < learning_rate(step, steps, peak, warmup) <= peak


@examples(60)
@given(st.integers(2, 6), st.integers(1, 6), st.integers(1, 3), seeds, st.booleans())
def test_scores_are_those_of_sets_of_pixels_and_the_truth_scores_one(classes, there, batch, seed, void):
    "Only the first `there` classes occur in labels and predictions; the others have no IoU."
    draw = torch.Generator().manual_seed(seed)
    truth, guess = (torch.randint(min(there, classes), (batch, 5, 7), generator=draw) for _ in range(2))
    labels = truth.masked_fill(torch.rand(truth.shape, generator=draw) < .5, 255) if void else truth
    assume((labels != 255).any())
    def metrics(prediction): return Metrics(confusion_matrix(prediction, labels, classes), tuple(map(str, range(classes))))
    def iou(k): # from sets of pixels
        said, so = (guess == k) & (labels != 255), labels == k
        return int((said & so).sum()) / int((said | so).sum()) if (said | so).any() else None
    known = [value for value in map(iou, range(classes)) if value is not None]
    assert int(metrics(guess).confusion.sum()) == int((labels != 255).sum()) and metrics(truth).pixel_accuracy == 1
    if len(known) < 2: # there is no mean over one of several classes
        assert math.isnan(metrics(guess).miou)
        return
    assert metrics(guess).miou == pytest.approx(sum(known) / len(known), abs=1e-6)
    assert len(labels[labels != 255].unique()) < 2 or metrics(truth).miou == 1
