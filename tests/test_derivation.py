"""The derivation is exact, and the choice among its candidates costs no figure its honesty.

The integer program is compared with all subsets of small grids, and on large ones with a program of another kind, written
here: dynamic programming over the live scales of each layer, which bounds what is left by a Lagrangian.
"""
import copy, dataclasses, itertools, json, math, shutil

import numpy as np
import pytest
import torch
from PIL import Image

import selfsupnas.stages.choice, selfsupnas.stages.searching
from selfsupnas.space.architecture import Architecture, load_architecture, save_architecture
from selfsupnas.stages.evaluation import EvaluateConfig, evaluate
from selfsupnas.space.budget import measure_costs, static_cost
from selfsupnas.core import RunRecord
from selfsupnas.space.derivation import derive
from selfsupnas.metrics import ImageSubset, evaluate_segmenter, miou_of
from selfsupnas.stages.pareto_front import ParetoConfig, pareto, load_pareto
from selfsupnas.space.gate import set_gate_threshold
from selfsupnas.space.grid import STEP, SearchSpace
from selfsupnas.stages.retraining import RetrainConfig, retrain
from selfsupnas.stages.searching import load_supernet, search
from selfsupnas.stages.configs import BudgetConfig, SearchConfig
from selfsupnas.stages.choice import choice_images, best_candidate, choose_route, inherited_network, without_choice_images
from selfsupnas.stages.calibration import plain_images
from conftest import draw_folder


def worth(kept, importance): return math.fsum(importance[part] for part in kept)


# ---- all subsets of a small grid

def all_routes(table, importance, keep_operations=None):
    "(cost, importance) of every connected sub-graph: numpy over all subsets at once, nothing of the kit's."
    space = table.space
    parts = space.gated()
    number = np.arange(2 ** len(parts))
    is_open = {part: (number >> i & 1).astype(bool) for i, part in enumerate(parts)}
    valid, value = np.ones(len(number), bool), sum(is_open[part] * importance[part] for part in parts)
    cost = np.full(len(number), float(table.stem + table.head))
    arriving = {0: np.ones(len(number), bool)}
    for layer in range(space.layers + 1):
        leaving = {}
        for scale in range(min(layer + 1, 4)):
            here = [part for part in parts if part[:2] == (layer, scale)]
            live = arriving.get(scale, np.zeros(len(number), bool))
            edges = [part for part in here if part.kind in STEP]
            candidates = [part for part in here if part.kind not in STEP]
            computes = np.any([is_open[part] for part in edges], 0)
            for part in here: valid &= ~is_open[part] | live & computes
            if keep_operations and candidates: valid &= sum(is_open[part] * 1 for part in candidates) <= keep_operations
            if not space.search_operations: cost += computes * sum(table.operations[scale].values())
            for part in here: cost += is_open[part] * (table.edges if part in edges else table.operations)[scale][part.kind]
            for part in edges:
                to = scale + STEP[part.kind]
                leaving[to] = leaving.get(to, False) | is_open[part]
            leaving[scale] = leaving.get(scale, False) | live & ~computes
        if layer < space.layers: arriving = leaving
    for scale in range(1, 4):
        needed = np.any([arriving[s] for s in arriving if s >= scale] or [np.zeros(len(number), bool)], 0)
        cost += needed * table.raise_from[scale]
    return cost[valid], value[valid]

def frontier(cost, value):
    "Rising costs, and the greatest value within each."
    order = np.lexsort((-value, cost))
    cost, best = cost[order], np.maximum.accumulate(value[order])
    last = np.append(cost[1:] > cost[:-1], True) # of each cost, the last entry knows all of it
    return cost[last], best[last]

def compare_with_all(space, kind="flops", ties=False, keep_operations=None, every=1):
    table, draw = measure_costs(space, (64, 64), kind), np.random.default_rng(space.layers)
    importance = {part: float(draw.integers(1, 4) / 4 if ties else draw.random()) for part in space.gated()}
    costs, values = all_routes(table, importance, keep_operations)
    budgets, best = frontier(costs, values)
    assert budgets[0] == static_cost(table, ())
    least = {}
    for cost, value in zip(costs.tolist(), values.round(9).tolist()): least[value] = min(cost, least.get(value, cost))
    for budget, value in list(zip(budgets, best))[::every]:
        found, = derive(space, importance, table, budget, keep_operations=keep_operations)
        assert worth(found.selected, importance) == pytest.approx(value, abs=1e-9)
        assert static_cost(table, found.selected) <= budget
        assert static_cost(table, found.selected) == pytest.approx(least[round(value, 9)]), "of equals the cheapest"
    return len(budgets)

GRIDS = [(SearchSpace(3, layers, 4, *more), keep) for layers, more, keep in
         ((1, (), None), (2, (), None), (1, (("sep_conv_3x3", "identity"), True), None),
          (1, (("sep_conv_3x3", "identity"), True), 1), (1, (("sep_conv_3x3", "sep_conv_5x5"), True), 1))]

@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("space, keep", GRIDS)
def test_all_subsets_have_no_better_route(space, keep, ties):
    compare_with_all(space, ties=ties, keep_operations=keep)

def test_some_budgets_of_three_layers():
    assert compare_with_all(SearchSpace(3, 3, 4), every=80) > 500

@pytest.mark.long
@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("kind", ("flops", "parameters"))
@pytest.mark.parametrize("layers", (1, 2, 3))
def test_every_budget_of_every_small_grid(layers, kind, ties):
    compare_with_all(SearchSpace(3, layers, 4), kind, ties)

@pytest.mark.long
@pytest.mark.parametrize("keep", (None, 1))
def test_every_budget_of_a_searched_grid(keep):
    compare_with_all(SearchSpace(3, 2, 4, ("sep_conv_3x3",), True), keep_operations=keep)
    compare_with_all(SearchSpace(3, 1, 4, ("sep_conv_3x3", "identity", "sep_conv_5x5"), True), keep_operations=keep)


# ---- large grids: dynamic programming

def undominated(cost, value):
    order = np.lexsort((-value, cost))
    cost, value = cost[order], value[order]
    better = np.append(True, value[1:] > np.maximum.accumulate(value)[:-1])
    return cost[better], value[better]

def layer_arcs(table, importance, layer):
    "{(live scales, live scales of the next layer): undominated (costs, values)} of one layer; scales as bits."
    space, found = table.space, {}
    scales = list(space.scales_at(layer))
    ways = {}
    for scale in scales:
        edges = [p for p in space.edges() if p[:2] == (layer, scale)]
        ways[scale] = [(0., 0., 1 << scale)] # passes its input on
        for size in range(1, len(edges) + 1):
            for some in itertools.combinations(edges, size):
                to = sum({1 << scale + STEP[p.kind] for p in some}) if layer < space.layers else 1 << scale
                ways[scale].append((sum(table.operations[scale].values()) + sum(table.edges[scale][p.kind] for p in some),
                                    sum(importance[p] for p in some), to))
    for live in range(1, 1 << len(scales)):
        for some in itertools.product(*(ways[scale] for scale in scales if live >> scale & 1)):
            to = 0
            for _, _, bits in some: to |= bits
            found.setdefault((live, to), []).append((sum(w[0] for w in some), sum(w[1] for w in some)))
    return {key: undominated(*np.array(pairs).T) for key, pairs in found.items()}

def best_by_layers(table, importance, budget, claimed):
    "The greatest importance within the budget, or less than `claimed` by over 1e-9 where that is too much."
    layers = [layer_arcs(table, importance, layer) for layer in range(table.space.layers + 1)]
    end = {live: sum(table.raise_from[:live.bit_length()]) for live in range(1, 16)}
    room = budget - table.stem - table.head
    flat = [(np.concatenate([np.full(len(c), live) for (live, _), (c, _) in arcs.items()]),
             np.concatenate([np.full(len(c), to) for (_, to), (c, _) in arcs.items()]),
             *(np.concatenate([pair[i] for pair in arcs.values()]) for i in (0, 1))) for arcs in layers]
    def bounds(price): # of each layer and live set: the most that can follow, with cost at a price
        after = [np.array([-np.inf, *(-price * end[live] for live in range(1, 16))])]
        for live, to, cost, value in flat[::-1]:
            here = np.full(16, -np.inf)
            np.maximum.at(here, live, value - price * cost + after[0][to])
            after.insert(0, here)
        return after
    low, high = 0., 100. / table.full
    for _ in range(60): # the bound is convex in the price
        a, b = low + (high - low) / 3, high - (high - low) / 3
        if bounds(a)[0][1] + a * room < bounds(b)[0][1] + b * room: high = b
        else: low = a
    price = (low + high) / 2
    after, labels = bounds(price), {1: (np.zeros(1), np.zeros(1))}
    for layer, arcs in enumerate(layers):
        reached = {}
        for (live, to), (cost, value) in arcs.items():
            if live not in labels: continue
            costs = np.add.outer(labels[live][0], cost).ravel()
            values = np.add.outer(labels[live][1], value).ravel()
            hope = (costs <= room) & (values + price * (room - costs) + after[layer + 1][to] >= claimed - 1e-9)
            reached.setdefault(to, []).append((costs[hope], values[hope]))
        labels = {to: undominated(*map(np.concatenate, zip(*some))) for to, some in reached.items()
                  if sum(len(c) for c, _ in some)}
    return max((values[costs + end[live] <= room].max(initial=-np.inf) for live, (costs, values) in labels.items()),
               default=-np.inf)

@pytest.mark.parametrize("layers, share, seed", [pytest.param(*case, marks=[pytest.mark.long] if case[0] == 16 else []) for case
                                                 in itertools.product((6, 8, 16), (.35, .5, .7), (0, 1, 2))])
def test_dynamic_programming_finds_no_better_route(layers, share, seed):
    space = SearchSpace(11, layers, 16)
    table, draw = measure_costs(space, (128, 160)), np.random.default_rng([layers, seed])
    importance = {part: float(draw.random()) for part in space.gated()}
    found, = derive(space, importance, table, share * table.full)
    value = worth(found.selected, importance)
    assert static_cost(table, found.selected) <= share * table.full
    assert best_by_layers(table, importance, share * table.full, value) == pytest.approx(value, abs=1e-9)

def test_the_two_programs_of_this_file_agree():
    space = SearchSpace(3, 3, 4)
    table, draw = measure_costs(space, (64, 64)), np.random.default_rng(5)
    importance = {part: float(draw.random()) for part in space.gated()}
    budgets, best = frontier(*all_routes(table, importance))
    for budget, value in list(zip(budgets, best))[::150]:
        assert best_by_layers(table, importance, budget, 0.) == pytest.approx(value, abs=1e-9)


# ---- the choice

def inherited_miou(config, done, route, dataset):
    "Of an architecture with the weights of a finished search, measured here."
    network = inherited_network(route, done.trained.model.state_dict(), plain_images(done.data, config.crop, config.seed))
    return evaluate_segmenter(network, dataset, progress=False).miou

def tiny(place, **more):
    return SearchConfig(**{**dict(folder=str(place/"search"), data="folder", root=str(place/"data"), label_fraction=.5, steps=2,
                                  layers=2, channels=4, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, logs=1, w_jig=0.,
                                  w_semi=0., w_cost=0., w_binary=0., budget=.8, candidates=3, choice_images=4), **more})

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A finished search on nine validation images, and every dataset on which a network was measured after its training."
    place, measured = tmp_path_factory.mktemp("choice"), []
    draw_folder(place/"data", {"train": 6, "val": 9, "test": 2})
    for i in range(9): # masks that differ: what is measured on other images is another figure
        mask = (np.arange(64 * 80) // (300 + 350 * i) % 3).astype(np.uint8).reshape(64, 80)
        Image.fromarray(mask).save(place/"data"/"masks"/"val"/f"{i}.png")
    config = tiny(place)
    with pytest.MonkeyPatch.context() as patch:
        for module in (selfsupnas.stages.choice, selfsupnas.stages.searching):
            patch.setattr(module, "miou_of", lambda network, dataset: (measured.append(dataset), miou_of(network, dataset))[1])
        return config, search(config), measured

@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made[0].folder, tmp_path/"search")
    return dataclasses.replace(made[0], folder=str(tmp_path/"search"))

def routes(space, *kept): return [Architecture(space, dict.fromkeys(space.edges()[:count], 1.)) for count in kept]

def test_the_second_by_importance_is_chosen_if_it_is_better():
    pool = routes(SearchSpace(3, 2, 4), 3, 2, 1)
    known = dict(zip(pool, (.3, .5, .4)))
    assert best_candidate(pool, known.get) == (1, [.3, .5, .4])
    assert best_candidate(pool, dict(zip(pool, (.3, .5, .5))).get)[0] == 1, "of equals the one of greater importance"
    assert best_candidate(pool[:1], lambda _: 1 / 0) == (0, [None]), "of one candidate nothing is measured"
    assert best_candidate(pool, dict(zip(pool, (.3, .5, None))).get)[0] == 0, "where one cannot be measured, importance decides"

def test_the_best_of_a_pool_by_its_inherited_weights(made, monkeypatch):
    config, found, _ = made
    images, space = choice_images(found.data.val, config, config.seed), found.table.space
    pool = derive(space, found.statistics.importance, found.table, found.table.full, 3)
    scores = [inherited_miou(config, found, route, images) for route in pool]
    order = sorted(range(3), key=lambda i: scores[i])
    pool = [pool[order[1]], pool[order[2]], pool[order[0]]] # hand-made: the best is the second
    monkeypatch.setattr(selfsupnas.stages.choice, "derive", lambda *args, **more: pool)
    state, plain = found.trained.model.state_dict(), plain_images(found.data, config.crop, config.seed)
    best, rows = choose_route(found.table, found.statistics, dataclasses.replace(config, budget=1.), {"data": found.data.val.spec.name},
                              lambda route: inherited_network(route, state, plain), images)
    assert max(scores) > min(scores) and set(best.edges) == set(pool[1].edges)
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert rows[1]["choice_miou"] == pytest.approx(max(scores), abs=1e-6)
    assert best.provenance["chosen_on"] == images.ids and "chosen_on" not in pool[0].provenance

def test_what_the_record_says_of_the_choice(made):
    config, found, _ = made
    rows, chosen_on = found.record.metrics["candidates"], found.architecture.provenance["chosen_on"]
    assert len(rows) == 3 and [row["importance"] for row in rows] == sorted((row["importance"] for row in rows), reverse=True)
    chosen, = (row for row in rows if row["chosen"])
    assert chosen["choice_miou"] == max(row["choice_miou"] for row in rows)
    assert chosen["importance"] == pytest.approx(worth(found.architecture.selected, found.statistics.importance))
    assert chosen["edges"] == len(found.architecture.edges) == found.record.metrics["edges_kept"]
    assert chosen["cost_share"] * found.table.full == pytest.approx(found.record.metrics["derived_cost"])
    assert max(row["cost_share"] for row in rows) <= config.budget
    assert found.record.metrics["labels_consumed"] == {"training": 3, "choice": 4, "report": 5}
    for name, network in (("supernet_val_miou", found.trained.model), ("derived_inherited_val_miou", found.derived)):
        rest = ImageSubset(found.data.val, [name for name in found.data.val.ids if name not in chosen_on])
        assert found.record.metrics[name] == pytest.approx(evaluate_segmenter(network, rest, progress=False).miou, abs=1e-6)

def test_images_that_choose_are_not_reported_and_never_of_the_training_set(made):
    _, found, measured = made
    val, train = found.data.val, {found.data.train[i][0].numpy().tobytes() for i in range(len(found.data.train))}
    chosen_on, own = found.architecture.provenance["chosen_on"], {val.ids[i]: val[i][0] for i in range(len(val))}
    assert len(measured) == 3 + 2, "candidates; supernet and derived network"
    for dataset in measured:
        for i, name in enumerate(dataset.ids):
            assert torch.equal(dataset[i][0], own[name]) and dataset[i][0].numpy().tobytes() not in train
    assert all(dataset.ids == chosen_on for dataset in measured[:3])
    assert all(not set(dataset.ids) & set(chosen_on) and len(dataset) + len(chosen_on) == len(val) for dataset in measured[3:])

def test_the_draw_of_choice_images(made):
    config, found, _ = made
    def drawn(count, seed=0, **more):
        images = choice_images(found.data.val, BudgetConfig(choice_images=count, **more), seed)
        return images and set(images.ids)
    assert drawn(2) < drawn(3) < drawn(4) == drawn(32), "seeded, nested, at most half"
    assert drawn(4) == drawn(4) != drawn(4, seed=1)
    assert drawn(4, candidates=1) is None
    one = copy.copy(found.data.val)
    one.ids = one.ids[:1]
    assert choice_images(one, config, 0) is None, "the only image is reported"
    elsewhere = dataclasses.replace(found.architecture, provenance={**found.architecture.provenance, "data": "another"})
    assert len(without_choice_images(found.data.val, elsewhere)) == len(without_choice_images(found.data.val, found.architecture)), "a folder that was renamed"
    elsewhere.provenance["classes"] = ["cat", "dog", "bird"]
    assert without_choice_images(found.data.val, elsewhere) is found.data.val
    everything = dataclasses.replace(found.architecture, provenance={**found.architecture.provenance,
                                                                     "chosen_on": found.data.val.ids})
    with pytest.raises(ValueError, match="chosen_on"): without_choice_images(found.data.val, everything)

@pytest.mark.parametrize("more, training, report", [(dict(candidates=1), 3, 9), (dict(w_sup=0., w_jig=1.), 0, 0)])
def test_nothing_chooses_without_candidates_or_labels(made, tmp_path, monkeypatch, more, training, report):
    monkeypatch.setattr(selfsupnas.stages.choice, "classes_present", lambda *_: 1 / 0) # no label is looked at
    (tmp_path/"data").symlink_to(made[0].root)
    found = search(tiny(tmp_path, **more))
    row, = found.record.metrics["candidates"]
    assert row["choice_miou"] is None and row["chosen"] and not found.architecture.provenance.get("chosen_on")
    assert found.record.metrics["labels_consumed"] == {"training": training, "choice": 0, "report": report}
    strongest, = derive(found.table.space, found.statistics.importance, found.table, .8 * found.table.full)
    assert set(found.architecture.edges) == set(strongest.edges)

def test_a_pool_of_one_reads_no_label(made):
    config, found, _ = made
    least = static_cost(found.table, ()) / found.table.full
    route, rows = choose_route(found.table, found.statistics, dataclasses.replace(config, budget=least), {}, lambda _: 1 / 0,
                               choice_images(found.data.val, config, config.seed))
    assert not route.edges and rows[0]["choice_miou"] is None and len(rows) == 1 and "chosen_on" not in route.provenance

def test_a_retraining_leaves_out_what_chose(made, copied, tmp_path):
    def trained(name, architecture):
        return retrain(RetrainConfig(folder=str(tmp_path/name), data="folder", root=copied.root, label_fraction=.5, steps=1, logs=1,
                                     batch_labelled=2, w_jig=0., w_semi=0., architecture=str(architecture)))
    done = trained("with", copied.folder)
    rest = without_choice_images(done.data.val, done.trained.model.architecture)
    assert len(rest) == done.record.metrics["val_images"] == 5
    measured = evaluate_segmenter(done.trained.model, rest, progress=False)
    assert done.record.metrics["val_miou"] == pytest.approx(measured.miou, abs=1e-6)
    assert done.record.metrics["val_pixel_accuracy"] == pytest.approx(measured.pixel_accuracy, abs=1e-6)
    assert done.record.metrics["labels_consumed"] == {"training": 3, "choice": 0, "report": 5}
    assert load_architecture(tmp_path/"with"/"architecture.json").provenance["chosen_on"], "later stages know it, too"
    images = {split: evaluate(EvaluateConfig(folder=str(tmp_path/split), network=str(tmp_path/"with"), split=split, latency_repeats=1)).record.metrics
              for split in ("val", "test")}
    assert (images["val"]["images"], images["test"]["images"]) == (5, 2)
    assert images["val"]["rows"]["searched"]["miou"] == pytest.approx(measured.miou, abs=1e-6)
    found = load_architecture(copied.folder)
    save_architecture(dataclasses.replace(found, provenance={}), tmp_path/"plain.json")
    assert trained("plain", tmp_path/"plain.json").record.metrics["val_images"] == 9
    save_architecture(dataclasses.replace(found, provenance={**found.provenance, "chosen_on": done.data.val.ids}),
                      tmp_path/"all.json")
    with pytest.raises(ValueError, match="chosen_on"): trained("all", tmp_path/"all.json")

def test_a_front_reports_what_neither_it_nor_the_search_chose_on(made, copied, tmp_path):
    def of(name, **more):
        return pareto(ParetoConfig(**{**dict(folder=str(tmp_path/name), search=copied.folder, budgets=(.75, .9), steps=0, random=1,
                                           candidates=3, choice_images=3), **more})).record.metrics
    metrics, used = of("pareto"), set(made[1].architecture.provenance["chosen_on"])
    assert metrics["labels_consumed"] == {"training": 3, "choice": 3, "report": 5}
    for budget in ("0.75", "0.9"):
        provenance = load_architecture(tmp_path/"pareto"/f"derived-{budget}.json").provenance
        assert len(provenance["chosen_on"]) == 3 and set(provenance["chosen_on"]) < used, "of the same draw"
        assert sum(row["chosen"] for row in metrics["candidates"][budget]) == 1
    val = made[1].data.val
    rest = ImageSubset(val, [name for name in val.ids if name not in used])
    for row in metrics["rows"]:
        if row["kind"] == "dynamic":
            set_gate_threshold(model := load_supernet(copied.folder), row["gate_threshold"])
            assert row["miou"] == pytest.approx(evaluate_segmenter(model, rest, progress=False).miou, abs=1e-6), row["name"]
            continue
        own = load_architecture(tmp_path/"pareto"/f"{row['name']}.json")
        assert row["inherited_miou"] == pytest.approx(inherited_miou(*made[:2], own, rest), abs=1e-6), row["name"]
    assert load_pareto(tmp_path/"pareto").record.metrics == metrics, "a front without training can be read, too"
    assert of("alone", candidates=1, budgets=(.9,), random=0)["labels_consumed"] == {"training": 3, "choice": 0, "report": 5}, "the search's are out"
    assert of("test", split="test", budgets=(.9,), random=0)["labels_consumed"]["report"] == 2

def test_the_least_budget_is_named(made, copied, tmp_path):
    table = made[1].table
    least = f"{static_cost(table, ()) / table.full:.3f}"
    with pytest.raises(ValueError, match=least): search(tiny(tmp_path/"dear", root=copied.root, budget=.01))
    with pytest.raises(ValueError, match=least): derive(table.space, made[1].statistics.importance, table, .01 * table.full)
    with pytest.raises(ValueError, match=least):
        pareto(ParetoConfig(folder=str(tmp_path/"pareto"), search=copied.folder, budgets=(.9, .01), steps=0))
    assert not list((tmp_path/"dear").rglob("*.json")) and not list((tmp_path/"pareto").rglob("*.json"))

def test_a_search_of_before_is_read(made, copied, tmp_path, capsys):
    place = tmp_path/"search"
    record = json.loads((place/"search-record.json").read_text())
    for name in ("candidates", "choice_images"): del record["parameters"][name]
    for name in ("candidates", "labels_consumed"): del record["metrics"][name]
    (place/"search-record.json").write_text(json.dumps(record))
    found = load_architecture(place)
    save_architecture(dataclasses.replace(found, provenance={name: value for name, value in found.provenance.items()
                                                             if name != "chosen_on"}), place/"architecture.json")
    read = search(copied)
    assert "nothing is computed" in capsys.readouterr().out
    assert read.record.metrics == record["metrics"] and read.architecture.edges == found.edges
    assert load_supernet(place) and RunRecord.load(place/"search-record.json").config(SearchConfig).candidates == 8
    assert pareto(ParetoConfig(folder=str(tmp_path/"pareto"), search=str(place), budgets=(.9,), steps=0, random=0,
                             candidates=1)).record.metrics["labels_consumed"] == {"training": 3, "choice": 0, "report": 9}
