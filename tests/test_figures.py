"""Every figure of the package against a picture that was looked at: `tests/baseline`.

What is drawn is made up or drawn from seeds, and no network runs. Compared is the root mean square
difference over all pixels, where black and white are 255 apart. TOLERANCE is 1: 3.11.0 and 3.11.2
of matplotlib differ by 0.00, images in which every pixel is rounded otherwise by 1, while a wrong
letter in a legend makes 1.1, a point moved by half a per cent 1.4, a weak path that closes 2.3.
Less than that passes: one colour of a legend that is off by 10 makes 0.3.

Text stays in the pictures, as most of what goes wrong in a figure goes wrong there. It is drawn
without hinting, which is legible at this size and depends least on the font engine. Even so, other
measures of the text move axes by a pixel, which makes 10 to 32: more than most real changes, so
that no tolerance tells them apart. It happened in matplotlib 3.11, with a new FreeType (3.8, 3.9
and 3.10 are as far from it and equal to one another); before 3.11 these tests are skipped, and say
so. Should a later matplotlib move the text again, they fail: `make baselines`, and look at each.
"""
import importlib, inspect, io, pkgutil, random, shutil, subprocess, sys
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.testing.compare import compare_images

import selfsupnas
from selfsupnas.architecture import Architecture, draw_architecture
from selfsupnas.budget import CostTable
from selfsupnas.data import CAMVID_SPEC
from selfsupnas.evaluation import Metrics, confusion_figure
from selfsupnas.grid import Path, SearchSpace
from selfsupnas.pairs import PairDataset
from selfsupnas.pictures import (plot_class_iou, plot_cost_accuracy, plot_jigsaw,
                                 plot_predictions, plot_views)
from selfsupnas.plots import plot_gate_history, plot_history, plot_route
from selfsupnas.report import Summary, summary_figure
from selfsupnas.routes import (plot_closed, plot_cost_distribution, plot_front,
                               plot_image_routes, plot_operations)
from selfsupnas.scenes import draw_scene
from selfsupnas.search import GateStatistics, SearchConfig
from selfsupnas.show import (colourise, error_map, legend, overlay, show_images,
                             show_samples)
from selfsupnas.survey import sample_sheet, survey
from selfsupnas.widgets import (draw_progress, edit_architecture, explore_budget,
                                explore_split)

BASELINE = ROOT/"tests"/"baseline"
TOLERANCE = 1
STYLE = ["default", {"text.hinting": "none"}]
# At 50, a height of 2.3 inches is 114.99999999999999 pixels: 114 or 115, by the release.
SAVING = dict(dpi=52, pil_kwargs=dict(optimize=True))
same_text = pytest.mark.skipif(matplotlib.__version_info__ < (3, 11),
                               reason="matplotlib before 3.11 sets text in other places")
TESTS = {} # name -> test whose figure is compared with the picture of that name


def baseline(test):
    "Mark such a test, and note it."
    TESTS[test.__name__] = test
    compare = pytest.mark.mpl_image_compare(baseline_dir="baseline", style=STYLE,
                                            tolerance=TOLERANCE, savefig_kwargs=SAVING)
    return same_text(compare(test))


SIZE = 64, 80
SPEC = replace(CAMVID_SPEC, name="drawn scenes (synthetic)", synthetic=True)
SPACE = SearchSpace(num_classes=11, layers=4)
CANDIDATES = "sep_conv_3x3", "sep_conv_5x5", "identity"
SEARCHED = SearchSpace(num_classes=11, layers=4, operations=CANDIDATES, search_operations=True)
STEPS = range(0, 601, 50)
SHARES = ("lr", "jig_accuracy", "kept", "pseudo_accuracy", "closing", "expected", "realised",
          "val_miou") # of a log line: what `plot_history` draws beside the terms


class Scenes(PairDataset):
    "A few drawn scenes, each class in its mean colour: without grain the baselines are small."
    def __init__(self, count=4):
        super().__init__(SPEC, [f"scene-{seed}" for seed in range(count)])
        self.drawn = [draw_scene(seed, SIZE) for seed in range(count)]
        for image, label in self.drawn:
            for k in np.unique(label): image[label == k] = image[label == k].mean(0)

    def read(self, i): return self.drawn[i]


def images_and_labels(count):
    "The first scenes, (n,3,H,W) uint8 and (n,H,W) int64."
    images, labels = zip(*(Scenes(count)[i] for i in range(count)))
    return torch.stack(images).numpy(), torch.stack(labels).numpy()


def worse(labels):
    "Labels moved by three pixels, with trees taken for buildings: a prediction without a network."
    moved = np.roll(np.where(labels == 255, 3, labels), 3, axis=-1)
    return np.where(moved == 5, 1, moved)


def gates_of(space, depth=3., seed=0):
    "Made-up mean gates: strong along a valley `depth` scales deep, else 0."
    draw, gates = random.Random(seed), {}
    for path in space.paths():
        scale = path.scale + {"keep": 0, "up": -.5, "down": .5}[path.kind]
        valley = depth * (1 - abs(2 * (path.layer + .5) / (space.layers + 1) - 1))
        gates[path] = max(0., min(.97, 1.05 - 1.4 * abs(scale - valley) - .15 * draw.random()))
    return gates


def candidates_of(space):
    "Made-up mean gates of paths and candidates, some of them 0."
    draw, gates = random.Random(1), gates_of(space)
    for layer, scale in space.cells():
        for name in space.operations:
            gates[Path(layer, scale, name)] = max(0., draw.random() - .15)
    return gates


def kept_of(space, gates, over=.3):
    "The architecture of all that is over a threshold."
    kept = {part: gate for part, gate in gates.items() if gate > over}
    names = {part: gate for part, gate in kept.items() if part.kind in space.operations}
    return Architecture(space, {p: g for p, g in kept.items() if p not in names}, operations=names)


def snapshots_of(space):
    "Gates of a search that opens everything at first, closes much, and opens some of it again."
    def at(share):
        target, least = gates_of(space, 1 + 8 * share * (1 - share)), max(0., .9 - 3.6 * share)
        return {path: max(least, gate) for path, gate in target.items()}
    return [(step, at(step / STEPS[-1])) for step in STEPS]


def history():
    "Log lines that no training wrote, with something for every panel."
    def row(step):
        share = step / STEPS[-1]
        rise = min(1, max(0, (share - .3) / .3))
        return {"step": step, "sup": 2 / (1 + 5 * share), "jig": 3.2 - 2 * share, "lr": 1e-3,
                "semi": .05 + .3 * share * (1 - share), "cost": .16 * (1 - .9 * rise),
                "harden": .2 - .1 * rise, "w_sup": 1., "w_jig": .2, "w_semi": min(1., 2 * share),
                "w_cost": 4 * rise, "w_harden": rise, "jig_accuracy": .05 + .6 * share,
                "kept": .75 * share ** .5, "pseudo_accuracy": .8 + .15 * share,
                "closing": .1 * rise, "expected": .9 - .38 * rise, "realised": .95 - .46 * rise,
                "val_miou": .1 + .4 * share if step % 150 == 0 else None}
    return [row(step) for step in STEPS]


def front_rows():
    "Made-up networks of every kind that `plot_front` knows, some with several seeds."
    def miou(gflops): return .3 + .2 * gflops ** .5
    rows = [dict(kind="derived", name=f"budget {g}", seed=seed, gflops=g + .02 * seed,
                 miou=miou(g) + .03 + .01 * seed) for g in (.25, .5, 1.) for seed in range(3)]
    rows += [dict(kind="random", name="random", gflops=.2 + .1 * i,
                  miou=miou(.2 + .1 * i) - .01 * (i % 3)) for i in range(9)]
    rows += [dict(kind="dynamic", name=f"closing at {g}", gflops=g, miou=miou(g) + .015)
             for g in (.3, .6, .9)]
    return rows + [dict(kind="all open", name="all open", gflops=1.3, miou=.55),
                   dict(kind="baseline", name="net A", gflops=.4, miou=.45),
                   dict(kind="baseline", name="net B", gflops=1.2, miou=.50)]


def class_rows():
    "Made-up IoU of two networks."
    return {"searched": dict(sky=.91, building=.74, road=.93, tree=.66, car=.58, fence=None),
            "hand-crafted": dict(sky=.92, building=.77, road=.9, tree=.69, car=0., fence=None)}


def cost_table(space):
    "A cost table with small whole numbers in the place of measured ones."
    each = range(4)
    return CostTable(space, SIZE, "flops", 50_000_000,
                     tuple(dict.fromkeys(space.operations, 9_000_000 - 10**6 * s) for s in each),
                     tuple(dict.fromkeys(("keep", "up", "down"), 10**6 * (s + 1)) for s in each),
                     tuple(dict.fromkeys(range(1, 4), 10_000) for _ in each),
                     (0, 4_000_000, 3_000_000, 2_000_000), 8_000_000)


@baseline
def test_show_images():
    images, labels = images_and_labels(1)
    key = SPEC.palette, SPEC.ignore_index
    return show_images([images[0], colourise(labels[0], *key), overlay(images[0], labels[0], *key),
                        error_map(labels[0], worse(labels[0]))],
                       ["image", "colourise", "overlay", "error map"])


@baseline
def test_legend(): return legend(SPEC)


@baseline
def test_show_samples(): return show_samples(Scenes(), [0, 2, 3])


@baseline
def test_sample_sheet(): return sample_sheet(survey(Scenes()), 2, 60)


@baseline
def test_plot_history_terms():
    return plot_history([{key: value for key, value in row.items() if key not in SHARES}
                         for row in history()])


@baseline
def test_plot_history_shares():
    return plot_history([{key: row[key] for key in ("step", *SHARES)} for row in history()],
                        chance=1 / 24, budget=.5)


@baseline
def test_plot_route_gates(): return plot_route(SPACE, gates_of(SPACE))


@baseline
def test_plot_route_architecture():
    gates = gates_of(SPACE)
    return plot_route(SPACE, gates, kept_of(SPACE, gates))


@baseline
def test_draw_architecture(): return draw_architecture(kept_of(SPACE, gates_of(SPACE))).figure


@baseline
def test_plot_gate_history(): return plot_gate_history(SPACE, snapshots_of(SPACE)[::3])


@baseline
def test_plot_jigsaw():
    images, _ = images_and_labels(3)
    normalised = (images - images.mean((2, 3), keepdims=True)) / 60
    def shuffle(pictures, order): # the quarters of every picture, in another order
        top, bottom = np.split(pictures, 2, axis=2)
        tiles = [*np.split(top, 2, axis=3), *np.split(bottom, 2, axis=3)]
        first, second = ([tiles[i] for i in half] for half in (order[:2], order[2:]))
        return np.concatenate([np.concatenate(first, 3), np.concatenate(second, 3)], 2)
    shuffled = shuffle(normalised, (2, 0, 3, 1))
    restored = shuffle(shuffled, (1, 3, 0, 2))
    restored[1] = shuffle(shuffled, (3, 1, 0, 2))[1]
    return plot_jigsaw(images, shuffled, restored, truth=[5, 5, 5], guess=[5, 9, 5], n=2)


@baseline
def test_plot_predictions():
    images, labels = images_and_labels(2)
    return plot_predictions(images, labels, worse(labels), SPEC, ["scene 0", "scene 1"],
                            ["moved, no trees"] * 2)


@baseline
def test_plot_views():
    images, labels = images_and_labels(2)
    def sure(label, blur): # probabilities, the less the nearer to a border
        maps = np.eye(11)[np.where(label == 255, 3, label)].transpose(0, 3, 1, 2)
        return sum(np.roll(maps, (y, x), (2, 3)) for y in (-blur, 0, blur) for x in (-1, 0, 1)) / 9
    return plot_views(images, 255 - images, sure(labels, 1), sure(worse(labels), 2), SPEC, .9)


@baseline
def test_draw_progress():
    "What a running search shows: put together from figures, so that the whole is a picture."
    config = SearchConfig(layers=SPACE.layers)
    rows = [{**row, "gates": list(gates_of(SPACE).values())} for row in history()[:6]]
    picture = plt.imread(io.BytesIO(draw_progress(config, rows, dpi=30)))
    figure = plt.figure(figsize=(picture.shape[1] / 52, picture.shape[0] / 52))
    figure.figimage(picture)
    return figure


@baseline
def test_plot_class_iou(): return plot_class_iou(class_rows())


@baseline
def test_plot_cost_accuracy():
    points = [dict(name="searched", gflops=.52, miou=m, latency_ms=6.1) for m in (.55, .57, .54)]
    points += [dict(name="all paths open", gflops=1.1, miou=.566, latency_ms=13.2),
               dict(name="rival A", gflops=8.4, miou=.52, latency_ms=48),
               dict(name="rival B", gflops=11.9, miou=None, latency_ms=95),
               dict(name="rival C", gflops=.61, miou=None, latency_ms=None)]
    return plot_cost_accuracy(points)


@baseline
def test_plot_image_routes():
    images, _ = images_and_labels(4)
    gates = [gates_of(SPACE, depth, seed) for seed, depth in enumerate((0, 3, 1, 2))]
    return plot_image_routes(SPACE, images, gates, [.2, .5, .31, .4],
                             [f"scene {i}" for i in range(4)])


@baseline
def test_plot_cost_distribution():
    shares = [.2 + .4 * random.Random(seed).random() for seed in range(40)]
    return plot_cost_distribution(shares, budget=.5, expected=.45)


@baseline
def test_plot_closed(): return plot_closed(SPACE, snapshots_of(SPACE))


@baseline
def test_plot_operations():
    gates = candidates_of(SEARCHED)
    return plot_operations(SEARCHED, gates, kept_of(SEARCHED, gates))


@baseline
def test_plot_front(): return plot_front(front_rows())


@baseline
def test_confusion_figure():
    confusion = np.array([[90, 8, 2], [15, 80, 5], [30, 30, 40]])
    return confusion_figure(Metrics(torch.from_numpy(confusion), ("sky", "building", "tree")))


@baseline
def test_summary_figure():
    rows = [dict(arm="labels", miou=Summary((.41, .44, .43), (0, 1, 2))),
            dict(arm="both", miou=Summary((.46, .47, .49), (0, 1, 2)))]
    return summary_figure(rows, "miou", ["arm"], "test mIoU (%)", percent=True)


@baseline
def test_explore_budget():
    gates = gates_of(SPACE)
    statistics = GateStatistics(gates, gates, torch.zeros(1), torch.zeros(1))
    explorer = explore_budget(cost_table(SPACE), statistics, budget=.6)
    return explorer.draw(explorer.values)[0]


@baseline
def test_edit_architecture():
    explorer = edit_architecture(kept_of(SPACE, gates_of(SPACE)), cost_table(SPACE))
    return explorer.draw(explorer.values)[0]


@baseline
def test_explore_split():
    explorer = explore_split(Scenes(8), 1 / 2)
    return explorer.draw(explorer.values)[0]


FUNCTIONS = {name: found for module in pkgutil.iter_modules(selfsupnas.__path__)
             for name, found in vars(importlib.import_module(f"selfsupnas.{module.name}")).items()
             if inspect.isfunction(found) and not name.startswith("_")}


def names_in(code):
    "What a function's code refers to, with that of the functions inside it."
    inner = (names_in(const) for const in code.co_consts if inspect.iscode(const))
    return set(code.co_names).union(*inner)


def makes_figure(name):
    "Does it give out a figure: by its name, in the modules of figures, or by what it calls?"
    by_name = name.startswith(("plot_", "show_")) or name in ("legend", "sample_sheet")
    module = FUNCTIONS[name].__module__.rpartition(".")[2]
    return (by_name and module in ("show", "plots", "pictures", "routes", "survey") or
            bool(names_in(FUNCTIONS[name].__code__) & {"new_figure", "subplots"}))


def test_every_figure_has_a_baseline():
    called = set().union(*(names_in(test.__code__) for test in TESTS.values()))
    makers = {name for name in FUNCTIONS if makes_figure(name)} - {"new_figure"}
    assert {"plot_route", "legend", "sample_sheet", "confusion_figure", "explore_split"} <= makers
    missing = sorted(makers - called)
    assert not missing, f"figures without a test here: {', '.join(missing)}"
    reached, fresh = set(), called & set(FUNCTIONS)
    while fresh:
        reached |= fresh
        fresh = set().union(*(names_in(FUNCTIONS[name].__code__) for name in fresh))
        fresh = fresh & set(FUNCTIONS) - reached
    drawers = {name for name, f in FUNCTIONS.items()
               if {"ax", "axes", "fig"} & set(inspect.signature(f).parameters)}
    missing = sorted(drawers - reached - {"save_figure"}) # which draws nothing
    assert not missing, f"no figure with a test here calls {', '.join(missing)}"


def test_every_baseline_is_of_a_test_and_small():
    assert {path.name for path in BASELINE.iterdir()} == {f"{name}.png" for name in TESTS}
    assert max(path.stat().st_size for path in BASELINE.iterdir()) < 40_000


def with_a_path_closed():
    gates = gates_of(SPACE)
    weakest = min((path for path in gates if gates[path]), key=gates.get)
    return plot_route(SPACE, {**gates, weakest: 0.})


def with_a_lower_iou():
    rows = class_rows()
    rows["searched"]["car"] -= .02
    return plot_class_iou(rows)


def with_another_colour():
    figure = plot_front(front_rows())
    figure.axes[0].lines[1].set_color("red")
    return figure


def with_a_weaker_overlay(): return show_samples(Scenes(), [0, 2, 3], alpha=.55)


CHANGES = {"test_plot_route_gates": with_a_path_closed, "test_plot_class_iou": with_a_lower_iou,
           "test_plot_front": with_another_colour, "test_show_samples": with_a_weaker_overlay}


@same_text
@pytest.mark.parametrize("name", CHANGES)
def test_a_real_change_is_beyond_the_tolerance(name, tmp_path):
    def differs(draw):
        with plt.style.context(STYLE, after_reset=True):
            draw().savefig(tmp_path/"drawn.png", **SAVING)
        return compare_images(BASELINE/f"{name}.png", tmp_path/"drawn.png", TOLERANCE)
    assert differs(TESTS[name]) is None
    assert "did not match" in differs(CHANGES[name])


@same_text
def test_pytest_compares_without_being_asked(tmp_path):
    "In a copy in which one of two baselines is the picture of something else."
    tests = tmp_path/"tests"
    shutil.copytree(BASELINE, tests/"baseline")
    for file in ("conftest.py", "test_figures.py"): shutil.copy(ROOT/"tests"/file, tests)
    shutil.copy(BASELINE/"test_show_images.png", tests/"baseline"/"test_legend.png")
    code = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests",
            "-k", "test_legend or test_summary_figure"]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
