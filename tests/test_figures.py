"""Every figure of the package: does it show its data, and is it legible?

The data are made up or drawn from seeds, and no network runs. A test checks matplotlib's objects, not pixels: the
numbers in lines, bars and images, the colours of classes, and the names in axes, titles and legends. Each figure is
then rendered once; the test fails if a part is blank, cut off or too small. `CHANGES` breaks each figure in at least
one way, and the test of that figure must fail.
"""
import dataclasses, functools, importlib, inspect, io, pkgutil, random, re, warnings
from dataclasses import replace
from itertools import combinations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

import selfsupnas
from selfsupnas.viz import widgets
from selfsupnas.space.architecture import Architecture, draw_architecture
from selfsupnas.space.budget import CostTable
from selfsupnas.data.datasets import CAMVID_SPEC
from selfsupnas.metrics import Metrics, confusion_figure
from selfsupnas.space.grid import Edge, SearchSpace
from selfsupnas.data.files import PairDataset, SegmentationSpec
from selfsupnas.viz.curves import plot_class_iou, plot_cost_accuracy
from selfsupnas.viz.predictions import plot_jigsaw, plot_predictions, plot_views
from selfsupnas.viz.curves import plot_candidates, plot_history, plot_runs
from selfsupnas.viz.routes import plot_gate_history, plot_route
from selfsupnas.viz.tables import Summary, summary_figure
from selfsupnas.viz.routes import plot_closed, plot_image_routes, plot_operations
from selfsupnas.viz.curves import plot_front
from selfsupnas.data.toy.streetscenes import draw_scene
from selfsupnas.stages.calibration import GateStatistics
from selfsupnas.show import ERROR_COLOURS, colourise, error_map, legend, overlay, show_images, show_samples
from selfsupnas.data.splits import make_split
from selfsupnas.data.inspection import sample_sheet, survey
from selfsupnas.viz.widgets import draw_progress, edit_architecture, explore_budget, explore_split
from selfsupnas.viz.widgets import plot_explored, plot_pixels, plot_puzzle, plot_summarised

matplotlib.use("Agg")
TESTS = [] # one for each figure


def figure_test(test):
    "A test that returns one or more figures, drawn in matplotlib's default style and checked for legibility."
    @functools.wraps(test)
    def run():
        with plt.style.context("default", after_reset=True):
            for figure in np.ravel(test()): check_legible(figure)
    TESTS.append(run)
    return run


# Data of the figures

SIZE = 64, 80
SPEC = replace(CAMVID_SPEC, name="drawn scenes", synthetic=True)
BLACK = 0, 0, 0 # of ignored pixels
SPACE = SearchSpace(num_classes=11, layers=4)
CANDIDATES = "sep_conv_3x3", "sep_conv_5x5", "identity"
SEARCHED = SearchSpace(num_classes=11, layers=4, operations=CANDIDATES, search_operations=True)
STEPS = range(0, 601, 50)
SHARES = ("lr", "jig_accuracy", "pseudo_share", "pseudo_accuracy", "gate_threshold", "expected", "realised",
          "val_miou") # columns of a log row that `plot_history` draws beside the losses
# A route by hand: of 14 cells, 4 compute, 2 pass their input on, 8 are absent.
ROUTE = {Edge(0, 0, "down"): .9, Edge(1, 1, "down"): .6, Edge(3, 2, "keep"): .8, Edge(3, 2, "up"): .3,
         Edge(4, 1, "keep"): .5}
COMPUTING, PASSING = {(0, 0), (1, 1), (3, 2), (4, 1)}, {(2, 2), (4, 2)}


class Scenes(PairDataset):
    "A few drawn scenes."
    def __init__(self, count=4):
        super().__init__(SPEC, [f"scene-{seed}" for seed in range(count)])
        self.drawn = [draw_scene(seed, SIZE) for seed in range(count)]

    def read(self, i): return self.drawn[i]


def images_and_labels(count):
    "The first scenes, (n,3,H,W) uint8 and (n,H,W) int64."
    images, labels = zip(*(Scenes(count)[i] for i in range(count)))
    return torch.stack(images).numpy(), torch.stack(labels).numpy()


def gates_of(space, depth=3., seed=0):
    "Made-up mean gates: strong along a valley `depth` scales deep, else 0."
    draw, gates = random.Random(seed), {}
    for edge in space.edges():
        scale = edge.scale + {"keep": 0, "up": -.5, "down": .5}[edge.kind]
        valley = depth * (1 - abs(2 * (edge.layer + .5) / (space.layers + 1) - 1))
        gates[edge] = max(0., min(.97, 1.05 - 1.4 * abs(scale - valley) - .15 * draw.random()))
    return gates


def gates_along(route): return {edge: route.get(edge, 0.) for edge in SPACE.edges()}


def candidates_of(space):
    "Made-up mean gates of edges and candidates, some of them 0."
    draw, gates = random.Random(1), gates_of(space)
    for layer, scale in space.cells():
        for name in space.operations: gates[Edge(layer, scale, name)] = max(0., draw.random() - .15)
    return gates


def snapshots_of(space):
    "Gates of a search that first opens all edges, then closes many, and reopens some."
    def at(share):
        target, least = gates_of(space, 1 + 8 * share * (1 - share)), max(0., .9 - 3.6 * share)
        return {edge: max(least, gate) for edge, gate in target.items()}
    return [(step, at(step / STEPS[-1])) for step in STEPS]


def history():
    "Made-up log rows with data for every panel."
    def row(step):
        share = step / STEPS[-1]
        rise = min(1, max(0, (share - .3) / .3))
        return {"step": step, "sup": 2 / (1 + 5 * share), "jig": 3.2 - 2 * share, "lr": 1e-3,
                "semi": .05 + .3 * share * (1 - share), "cost": .16 * (1 - .9 * rise), "binary": .2 - .1 * rise,
                "w_sup": 1., "w_jig": .2, "w_semi": min(1., 2 * share), "w_cost": 4 * rise, "w_binary": rise,
                "jig_accuracy": .05 + .6 * share, "pseudo_share": .75 * share, "pseudo_accuracy": .8 + .15 * share,
                "gate_threshold": .1 * rise, "expected": .9 - .38 * rise, "realised": .95 - .46 * rise,
                "val_miou": .1 + .4 * share if step % 150 == 0 else None}
    return [row(step) for step in STEPS]


def front_rows():
    "Made-up networks of every kind that `plot_front` draws, some with several seeds."
    rows = [dict(kind="derived", name=f"budget {g}", seed=seed, gflops=g + .02 * seed, miou=miou + .01 * seed)
            for g, miou in ((.25, .43), (.5, .47), (1., .53)) for seed in range(3)]
    rows += [dict(kind="random", name="random", gflops=.2 + .1 * i, miou=.38 + .01 * i) for i in range(9)]
    rows += [dict(kind="dynamic", name=f"gate threshold {g}", gflops=g, miou=.4 + .1 * g) for g in (.3, .6, .9)]
    return rows + [dict(kind="all open", name="all open", gflops=1.3, miou=.55),
                   dict(kind="baseline", name="net A", gflops=.4, miou=.45),
                   dict(kind="baseline", name="net B", gflops=1.2, miou=.50)]


def class_rows():
    "Made-up IoU of two networks."
    return {"searched": dict(sky=.91, building=.74, road=.93, tree=.66, car=.58, fence=None),
            "hand-crafted": dict(sky=.92, building=.77, road=.9, tree=.69, car=0., fence=None)}


def network_points():
    "Made-up networks; the mIoU of some was not measured."
    points = [dict(name="searched", gflops=.52, miou=m, latency_ms=6.1) for m in (.55, .57, .54)]
    return points + [dict(name="all edges open", gflops=1.1, miou=.566, latency_ms=13.2),
                     dict(name="rival A", gflops=8.4, miou=.52, latency_ms=48),
                     dict(name="rival B", gflops=11.9, miou=None, latency_ms=95),
                     dict(name="rival C", gflops=.61, miou=None, latency_ms=None)]


def cost_table(space):
    "A cost table with small integers instead of measured costs."
    each = range(4)
    return CostTable(space, SIZE, "flops", 50_000_000,
                     tuple(dict.fromkeys(space.operations, 9_000_000 - 10**6 * s) for s in each),
                     tuple(dict.fromkeys(("keep", "up", "down"), 10**6 * (s + 1)) for s in each),
                     tuple(dict.fromkeys(range(1, 4), 10_000) for _ in each),
                     (0, 4_000_000, 3_000_000, 2_000_000), 8_000_000)


# Checks of a figure

def check_legible(figure):
    "Check that it renders without a warning and that no part is blank, cut off, covered by text or too small."
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        canvas.draw()
    assert not [str(w.message) for w in caught if issubclass(w.category, (UserWarning, RuntimeWarning))]
    drawn, renderer = np.asarray(canvas.buffer_rgba())[::-1], canvas.get_renderer()
    box, inches = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert min(box.x0, box.y0) > -.05 and (box.max < inches + .05).all(), "something lies outside the canvas"
    for ax in figure.axes:
        if not ax.has_data(): continue
        x0, y0, x1, y1 = ax.bbox.extents.round().astype(int)
        inside = drawn[y0 + 2:y1 - 2, x0 + 2:x1 - 2].reshape(-1, 4) # without the frame
        assert (inside != inside[0]).any(), f"{ax.get_title()!r} is blank"
        for line in ax.lines:
            points = line.get_transform().transform(line.get_xydata())
            assert ax.bbox.padded(2).count_contains(points) == len(points), f"{ax.get_title()!r} cuts a line off"
    shown = [text for text in texts_of(figure) if text.get_text().strip()]
    assert min(text.get_fontsize() for text in shown) >= 5
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
    for (one, a), (other, b) in combinations(boxes, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if min(width, height) > 0:
            share = width * height / min(a.width * a.height, b.width * b.height)
            assert share < .25, f"{one!r} and {other!r} cover one another"


def texts_of(figure):
    "The visible texts, without the labels of ticks beyond the ends of an axis."
    axes = [part for ax in figure.axes for part in (ax, *ax.child_axes)]
    beyond = set()
    for axis in (axis for ax in axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        slack = 1e-6 * (high - low)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            inside = low - slack <= tick.get_loc() <= high + slack
            if not (inside and axis.get_visible()): beyond |= {tick.label1, tick.label2}
    hidden = {part for ax in axes if not ax.axison for axis in (ax.xaxis, ax.yaxis) for part in axis.findobj(Text)}
    return [text for text in figure.findobj(Text) if text.get_visible() and text not in beyond | hidden]


def only(items, word, name=str):
    "The one item whose name contains a word."
    found = [item for item in items if word in name(item)]
    assert len(found) == 1, f"{word!r} names {len(found)} of {[name(item) for item in items]}"
    return found[0]


def panel(figure, word): return only(figure.axes, word, lambda ax: ax.get_title())
def line(ax, word): return only(ax.lines, word, lambda line: str(line.get_label()))


def legend_of(holder):
    "Handles of the legend of axes or of a figure, by text."
    key = holder.get_legend() if hasattr(holder, "get_legend") else holder.legends[0]
    assert key is not None, "there is no legend"
    return {text.get_text(): handle for text, handle in zip(key.get_texts(), key.legend_handles)}


def entry(holder, word):
    "The handle in a legend whose text contains a word."
    keys = legend_of(holder)
    return keys[only(keys, word)]


def numbers(text): return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
def same(one, other): return np.shape(one) == np.shape(other) and np.allclose(one, other, atol=1e-9)
def same_colour(one, other): return np.allclose(to_rgb(one), to_rgb(other), atol=1e-6)
def brightness(colour): return np.dot(to_rgb(colour), (.3, .59, .11))


def check_points(line, x, y):
    "Check that a line has exactly these points."
    assert same(np.asarray(line.get_xdata(), float), x) and same(np.asarray(line.get_ydata(), float), y)


def check_level(line, axis, value):
    "Check a straight line across the axes, horizontal for `axis` y."
    across, along = (line.get_ydata(), line.get_xdata()) if axis == "y" else (line.get_xdata(), line.get_ydata())
    assert same(across, [value, value]) and same(along, [0, 1])


def check_distinct(lines):
    "Check that no two lines look alike."
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines]
    assert len(set(map(str, styles))) == len(styles)


def check_ticks(axis, names):
    "Check the names of the ticks of an axis, by position."
    assert dict(zip(axis.get_ticklocs(), (text.get_text() for text in axis.get_ticklabels()))) == names


def pictures_of(figure):
    "The images of a figure, panel by panel."
    return [np.asarray(image.get_array()) for ax in figure.axes for image in ax.images]


def in_colours(label):
    "A label map in the colours of CamVid."
    return np.array([*SPEC.palette, BLACK], np.uint8)[np.where(label == SPEC.ignore_index, 11, label)]


def channels_last(image): return np.transpose(image, (1, 2, 0))


def check_palette(holder):
    "Check that the legend names every class beside its colour, in order, and ignored pixels."
    keys = legend_of(holder)
    assert list(keys)[:12] == [*SPEC.classes, "ignored"]
    for handle, rgb in zip(keys.values(), (*SPEC.palette, BLACK)):
        assert same_colour(handle.get_facecolor(), np.array(rgb) / 255)


def ends(edge): return edge.layer, edge.scale, edge.scale + {"keep": 0, "up": -1, "down": 1}[edge.kind]


def edges_of(ax):
    "Lines from one layer to the next, by their ends, the topmost last."
    found = {}
    for line in sorted(ax.lines, key=lambda line: line.get_zorder()):
        x, y = line.get_data()
        if len(x) == 2 and x[1] - x[0] == 1: found.setdefault((x[0], *y), []).append(line)
    return found


def check_grid(ax, names):
    "Check 14 cells at their layer and scale, 29 edges between them, and stride 4 at the top."
    x, y = np.concatenate([line.get_xydata() for line in ax.lines if line.get_marker() == "o"]).T
    assert set(zip(x, y)) == {(layer, scale) for layer in range(5) for scale in range(min(layer, 3) + 1)}
    assert edges_of(ax).keys() == {ends(edge) for edge in SPACE.edges()} and len(SPACE.edges()) == 29
    check_ticks(ax.yaxis, dict(enumerate(names)))
    assert ax.yaxis_inverted()


FRAMED = [f"stride {s}" for s in (4, 8, 16, 32)]


def check_frame(ax):
    "Check layers and strides along the axes, stem and decoder at the ends."
    check_grid(ax, FRAMED)
    check_ticks(ax.xaxis, {layer: str(layer) for layer in range(5)})
    assert ax.get_xlabel() == "layer"
    assert {"stem", "decoder"} <= {text.get_text() for text in ax.texts}


def check_gates(figure, ax, gates):
    "Check that open edges are solid, wider and darker for stronger gates, in the colours of the bar, and closed ones dotted."
    bar = only(figure.axes, "gate", lambda ax: ax.get_ylabel())
    assert bar.get_ylim() == (0, 1)
    mesh, drawn = next(part for part in bar.collections if part.get_array() is not None), edges_of(ax)
    order = sorted(gates, key=gates.get)
    for edge in order:
        mark = drawn[ends(edge)][0]
        assert mark.get_linestyle() == ("-" if gates[edge] else ":"), edge
        if gates[edge]: assert same_colour(mark.get_color(), mesh.to_rgba(gates[edge])), edge
    widths = [drawn[ends(edge)][0].get_linewidth() for edge in order if gates[edge]]
    stronger = np.diff([gates[edge] for edge in order if gates[edge]]) > 0
    assert (np.diff(widths)[stronger] > 0).all()
    assert brightness(mesh.to_rgba(1)) < brightness(mesh.to_rgba(.5)) < brightness(mesh.to_rgba(0))


def check_route(ax, kept=ROUTE, computing=COMPUTING, passing=PASSING):
    "Check that selected edges stand out, wider with their weight, that passed-on inputs are dotted, and the colours of cells."
    drawn = edges_of(ax)
    order = sorted(kept, key=kept.get)
    on_top = [drawn[ends(edge)][-1] for edge in order]
    straight = {(layer, scale, scale) for layer, scale in passing}
    assert {place for place, lines in drawn.items() if len(lines) > 1} == {*map(ends, kept), *straight}
    assert all(line.get_linestyle() == "-" for line in on_top)
    assert all(drawn[place][-1].get_linestyle() == ":" for place in straight)
    assert (np.diff([line.get_linewidth() for line in on_top]) > 0).all()
    dropped = next(lines[0] for lines in drawn.values() if len(lines) == 1)
    assert dropped.get_linewidth() < on_top[0].get_linewidth()
    assert brightness(dropped.get_color()) > brightness(on_top[0].get_color()) + .2
    check_cells(ax, computing, passing)


def check_cells(ax, computing, passing):
    "Colours of the three states of a cell; fails unless each state has one colour of its own."
    states = {}
    for line in ax.lines:
        if line.get_marker() == "o" and len(line.get_xdata()) == 1:
            place = line.get_xdata()[0], line.get_ydata()[0]
            state = "computes" if place in computing else "passes" if place in passing else "absent"
            states.setdefault(state, set()).add(to_rgb(line.get_markerfacecolor()))
    assert len(states) == 3 and all(len(colours) == 1 for colours in states.values())
    assert len(set.union(*states.values())) == 3
    return {state: colours.pop() for state, colours in states.items()}


def check_key(holder, ax, computing=COMPUTING, passing=PASSING):
    "Check that the legend explains the colours of the cells of these axes."
    for state, colour in check_cells(ax, computing, passing).items():
        assert same_colour(entry(holder, state).get_markerfacecolor(), colour), state
    assert entry(holder, "passed on").get_linestyle() == ":"


def picture_of(explorer, moved={}):
    "The figure of an explorer after some controls are moved."
    return explorer.draw({**explorer.values, **moved})[0]


# The figures

@figure_test
def test_show_images():
    image = np.full((2, 3, 3), 100, np.uint8)
    image[0, 1] = 30, 100, 200
    label, prediction = np.array([[0, 1, 255], [5, 1, 0]]), np.array([[0, 1, 1], [1, 1, 5]])
    names = ["image", "colourise", "overlay", "error map"]
    figure = show_images([image, colourise(label, SPEC.palette), overlay(image, label, SPEC.palette),
                          error_map(label, prediction)], names)
    assert [ax.get_title() for ax in figure.axes] == names
    grey, red, olive = (128, 128, 128), (128, 0, 0), (128, 128, 0) # sky, building, tree
    shown = pictures_of(figure)
    assert (shown[0] == image).all()
    assert shown[1].tolist() == np.array([[grey, red, BLACK], [olive, red, grey]]).tolist()
    grey, red, olive, ignored = (117, 117, 117), (117, 40, 40), (117, 117, 40), (40, 40, 40) # .4 * 100 + .6 * colour
    assert shown[2].tolist() == np.array([[grey, (89, 40, 80), ignored], [olive, red, grey]]).tolist()
    right, wrong, unknown = (ERROR_COLOURS[state] for state in ("correct", "wrong", "ignored"))
    assert len({right, wrong, unknown}) == 3
    assert shown[3].tolist() == np.array([[right, right, unknown], [wrong, right, wrong]]).tolist()
    images, _ = images_and_labels(3) # channels first; without titles
    for picture, image in zip(pictures_of(show_images(images)), images): assert (picture == channels_last(image)).all()
    return figure


@figure_test
def test_legend():
    figure = legend(SPEC)
    check_palette(figure.axes[0])
    dark = SegmentationSpec("night", ("sky", "road"), ((0, 0, 0), (128, 64, 128)))
    keys = legend_of(legend(dark).axes[0])
    assert list(keys) == ["sky", "road", "ignored"]
    assert not same_colour(keys["sky"].get_facecolor(), keys["ignored"].get_facecolor())
    return figure


@figure_test
def test_show_samples():
    figure, scenes = show_samples(Scenes(), [0, 2, 3]), Scenes()
    shown = pictures_of(figure)
    assert [ax.get_title() for ax in figure.axes if ax.images] == [
        "scene-0", "label", "scene-2", "label", "scene-3", "label"]
    for i, picture, label in zip((0, 2, 3), shown[::2], shown[1::2]):
        image, classes = scenes.read(i)
        assert (picture == image).all()
        assert np.abs(label - (.4 * image + .6 * in_colours(classes))).max() <= .5
    check_palette(figure)
    return figure


@figure_test
def test_sample_sheet():
    faulty = replace(survey(Scenes()), faulty={"scene-3": "cannot be read"})
    figure = sample_sheet(faulty, 2, 60) # spread over the set: the first and the last readable image
    assert [ax.get_title() for ax in figure.axes] == ["scene-0", "label", "scene-2", "label"]
    shown = pictures_of(figure)
    assert {picture.shape for picture in shown} == {(48, 60, 3)}
    for picture, label in zip(shown[::2], shown[1::2]):
        colours = (label - .4 * picture) / .6 # the overlaid colour of a class, up to rounding
        apart = np.abs(colours[:, :, None] - np.array([*SPEC.palette, BLACK])).max(-1)
        assert (apart.min(-1) <= 1).all() and len(np.unique(apart.argmin(-1))) > 3
    check_palette(figure)
    return figure


TERMS = {"sup": "supervised", "jig": "jigsaw", "semi": "consistency", "cost": "cost", "binary": "binarization"}


@figure_test
def test_plot_history_terms():
    rows = [{key: value for key, value in row.items() if key not in SHARES} for row in history()]
    rows = [{**row, "w_binary": 0.} for row in rows]
    rows[3]["jig"], rows[4]["jig"] = float("nan"), None # at steps 150 and 200
    figure = plot_history(rows)
    assert len(figure.axes) == 2
    terms, weights = panel(figure, "loss"), panel(figure, "weights")
    for key, name in TERMS.items():
        logged = [row for row in rows if key != "jig" or row["step"] not in (150, 200)]
        check_points(line(terms, name), [row["step"] for row in logged], [row[key] for row in logged])
        entry(terms, name)
        if key == "binary": continue
        check_points(line(weights, name), STEPS, [row[f"w_{key}"] for row in rows])
        entry(weights, name)
    assert len(weights.lines) == 4 # a weight of 0 is not drawn
    assert terms.get_yscale() == "log" and weights.get_yscale() == "linear"
    for ax in figure.axes:
        check_distinct(ax.lines)
        assert ax.get_xlabel() == "step"
    return figure


@figure_test
def test_plot_history_shares():
    rows = [{key: row[key] for key in ("step", *SHARES)} for row in history()]
    figure = plot_history(rows, chance=1 / 24, budget=.5)
    assert len(figure.axes) == 6 and {ax.get_xlabel() for ax in figure.axes} == {"step"}
    jigsaw, pixels, cost = (panel(figure, word) for word in ("jigsaw accuracy", "pixels", "cost"))
    quality = panel(figure, "mIoU")
    assert all("%" in ax.get_title() for ax in (jigsaw, pixels, cost, quality))
    check_points(jigsaw.lines[0], STEPS, np.linspace(5, 65, 13))
    check_level(line(jigsaw, "chance"), "y", 100 / 24)
    check_points(line(pixels, "share"), STEPS, np.linspace(0, 75, 13))
    check_points(line(pixels, "pseudo-label"), STEPS, np.linspace(80, 95, 13))
    check_points(line(cost, "expected"), STEPS, [100 * row["expected"] for row in rows])
    check_points(line(cost, "realised"), STEPS, [100 * row["realised"] for row in rows])
    check_level(line(cost, "budget"), "y", 50)
    check_points(quality.lines[0], [0, 150, 300, 450, 600], [10, 20, 30, 40, 50]) # None is left out
    check_points(panel(figure, "learning rate").lines[0], STEPS, [1e-3] * 13)
    check_points(panel(figure, "threshold").lines[0], STEPS, [row["gate_threshold"] for row in rows])
    for ax, words in ((jigsaw, ("accuracy", "chance")), (pixels, ("share above", "pseudo-label")),
                      (cost, ("expected", "realised", "budget"))):
        check_distinct(ax.lines)
        for word in words: entry(ax, word)
    assert len(panel(plot_history(rows), "cost").lines) == 2 # no budget, no line
    return figure


@figure_test
def test_plot_route_gates():
    figure = plot_route(SPACE, gates_of(SPACE))
    assert len(figure.axes) == 2 # the grid, the bar
    check_frame(figure.axes[0])
    check_gates(figure, figure.axes[0], gates_of(SPACE))
    assert "gate" in figure.axes[0].get_title()
    return figure


@figure_test
def test_plot_route_architecture():
    gates = {edge: max(gate, .05) for edge, gate in gates_of(SPACE).items()} # none closed: all are solid
    figure = plot_route(SPACE, gates, Architecture(SPACE, ROUTE))
    assert len(figure.axes) == 3
    route = panel(figure, "route")
    check_gates(figure, figure.axes[0], gates)
    check_frame(figure.axes[0])
    check_frame(route)
    check_route(route)
    check_key(route, route)
    assert numbers(route.get_title()) == [5, 29, 4, 2, 8] # edges selected, all edges; cells that compute, pass on, are absent
    kept, dropped = entry(route, "kept"), entry(route, "dropped")
    assert same_colour(kept.get_color(), edges_of(route)[0, 0, 1][-1].get_color())
    assert same_colour(dropped.get_color(), edges_of(route)[0, 0, 0][-1].get_color())
    return figure


@figure_test
def test_draw_architecture():
    ax = draw_architecture(Architecture(SPACE, ROUTE))
    plt.close(ax.figure)
    check_frame(ax)
    check_route(ax)
    return ax.figure


@figure_test
def test_plot_gate_history():
    snapshots = dict(snapshots_of(SPACE))
    figure = plot_gate_history(SPACE, list(snapshots.items())[::-1])
    grids = [ax for ax in figure.axes if ax.get_title().startswith("step")]
    steps = [numbers(ax.get_title())[0] for ax in grids]
    assert len(steps) == 6 and steps == sorted(steps) and {steps[0], steps[-1]} == {0, 600}
    for ax, step in zip(grids, steps):
        check_grid(ax, ["4", "8", "16", "32"])
        check_gates(figure, ax, snapshots[step])
    assert grids[0].get_ylabel() == "stride"
    kinds = panel(figure, "kind")
    for kind in ("keep", "up", "down"):
        each = [[gate for edge, gate in gates.items() if edge.kind == kind] for gates in snapshots.values()]
        check_points(line(kinds, kind), STEPS, [sum(gates) / len(gates) for gates in each])
        entry(kinds, kind)
    check_distinct(kinds.lines)
    assert kinds.get_xlabel() == "step" and kinds.get_ylim()[0] == 0 and kinds.get_ylim()[1] >= 1
    return figure


@figure_test
def test_plot_candidates():
    rows = [{"importance": 12 - i / 4, "choice_miou": miou, "chosen": miou == .33} for i, miou in enumerate((.3, .27, .33, .28))]
    figure = plot_candidates(rows, {"greedy": {"importance": 10., "choice_miou": .25}})
    ax, = figure.axes
    check_points(line(ax, "candidates"), [12, 11.75, 11.25], [30, 27, 28])
    check_points(line(ax, "chosen"), [11.5], [33])
    check_points(line(ax, "greedy"), [10], [25])
    check_distinct(ax.lines)
    for name in ("candidates", "chosen", "greedy"):
        assert same_colour(entry(ax, name).get_color(), line(ax, name).get_color())
    assert "importance" in ax.get_xlabel() and "mIoU" in ax.get_ylabel() and "%" in ax.get_ylabel()
    assert figure.get_figwidth() * figure.dpi >= 900
    return figure


@figure_test
def test_plot_jigsaw():
    images, _ = images_and_labels(3)
    whole = (images - images.mean((2, 3), keepdims=True)) / 60
    shuffled = np.roll(whole, 40, 3) # left and right halves change places
    restored = whole.copy()
    restored[1] = shuffled[1]
    figure = plot_jigsaw(images, shuffled, restored, truth=[5, 5, 5], guess=[5, 9, 5], n=2)
    rows = np.reshape(figure.axes, (3, 3))
    for ax, word in zip(rows[:, 0], ("image", "network", "guess")): assert word in ax.get_ylabel()
    shown = np.reshape([ax.images[0].get_array() for ax in rows.flat], (3, 3, *SIZE, 3))
    assert (shown[0] == images.transpose(0, 2, 3, 1)).all()
    for seen, tiles in zip(shown[1:], (shuffled, restored)): # 0 is middle grey, 2.5 is white
        assert np.allclose(seen, np.clip(.5 + tiles / 5, 0, 1).transpose(0, 2, 3, 1), atol=1e-6)
    for ax in rows[1:].flat:
        assert len(ax.lines) == 2
        check_level(ax.lines[0], "x", 39.5) # between the pixels 39 and 40
        check_level(ax.lines[1], "y", 31.5)
    frames = [(to_rgb(ax.spines["left"].get_edgecolor()), ax.spines["left"].get_linestyle()) for ax in rows[2]]
    assert frames[0] == frames[2] and frames[0][0] != frames[1][0] and frames[0][1] != frames[1][1]
    for ax, word in zip(rows[2], ("right", "wrong", "right")): assert word in ax.get_xlabel()
    assert numbers(figure.get_suptitle()) == [2, 3]
    return figure


@figure_test
def test_plot_predictions():
    images, labels = images_and_labels(2)
    labels[0, :48, :40], labels[0, :48, 40:], labels[0, 48:] = 1, 3, 255 # building, road, no label
    guesses = np.where(labels == 255, 3, labels)
    guesses[0, :, :20] = 5 # a tree, in a quarter of the labelled pixels
    figure = plot_predictions(images, labels, guesses, SPEC, ["scene 0", "scene 1"], ["poor", "perfect"])
    rows = np.reshape(figure.axes, (2, 4))
    for i, (image, label, guess, errors) in enumerate(np.reshape(pictures_of(figure), (2, 4, *SIZE, 3))):
        assert (image == channels_last(images[i])).all()
        assert (label == in_colours(labels[i])).all() and (guess == in_colours(guesses[i])).all()
        for state, where in (("ignored", labels[i] == 255), ("wrong", (labels[i] != guesses[i]) & (labels[i] != 255)),
                             ("correct", labels[i] == guesses[i])):
            assert (errors[where] == ERROR_COLOURS[state]).all(), state
    assert [ax.get_title() for ax in rows[:, 0]] == ["scene 0", "scene 1"]
    assert [ax.get_title() for ax in rows[:, 1]] == ["label", "label"]
    assert [ax.get_title() for ax in rows[:, 2]] == ["poor", "perfect"]
    assert [numbers(ax.get_title()) for ax in rows[:, 3]] == [[25], [0]] and "%" in rows[0, 3].get_title()
    assert "drawn scenes" in figure.get_suptitle() and "synthetic" in figure.get_suptitle()
    check_palette(figure)
    for word, state in (("correct", "correct"), ("wrong", "wrong"), ("no label", "ignored")):
        assert same_colour(entry(figure, word).get_facecolor(), np.array(ERROR_COLOURS[state]) / 255)
    return figure


@figure_test
def test_plot_views():
    images, _ = images_and_labels(2)
    taught, own = np.full(SIZE, 3), np.full(SIZE, 3)
    taught[:, :40], own[:, :40], own[:16, :40] = 1, 1, 5 # left: building; to the student, a quarter of it is tree
    def sure(answer, certainty): # probabilities (2,11,H,W)
        maps = np.where(np.arange(11)[:, None, None] == answer, certainty, (1 - certainty) / 10)
        return np.stack([maps, maps])
    left = np.arange(80) < 40
    figure = plot_views(images, 255 - images, sure(taught, np.where(left, .98, .6)), sure(own, .7), SPEC, .9)
    for i, (weak, strong, teacher, counted, student) in enumerate(np.reshape(pictures_of(figure), (2, 5, *SIZE, 3))):
        assert (weak == channels_last(images[i])).all() and (strong == 255 - channels_last(images[i])).all()
        assert (teacher == in_colours(taught)).all() and (student == in_colours(own)).all()
        assert (counted == in_colours(np.where(left, taught, 255))).all()
    for heads in np.reshape([ax.get_title() for ax in figure.axes], (2, 5)):
        for head, word in zip(heads, ("weak", "strong", "teacher", "confidence", "student")): assert word in head
        assert numbers(heads[3]) == [.9, 50] and numbers(heads[4]) == [75] # per cent of pixels; alike where sure
    check_palette(figure)
    return figure


@figure_test
def test_plot_runs():
    "One axis for all runs that have the column; values in per cent, each run with its own line and name."
    runs = {"long": history(), "short": history()[:7], "without": [{"step": 1, "sup": 1.}]}
    figure = plot_runs(runs, "val_miou")
    ax, = figure.axes
    assert "mIoU (%)" in ax.get_title() and ax.get_xlabel() == "step" and len(ax.lines) == 2
    check_points(line(ax, "long"), [0, 150, 300, 450, 600], [10, 20, 30, 40, 50])
    check_points(line(ax, "short"), [0, 150, 300], [10, 20, 30])
    check_distinct(ax.lines)
    for name in ("long", "short"): entry(ax, name)
    assert plot_runs(runs, "sup").axes[0].get_yscale() == "log" and plot_runs({"a": [{"step": 1}]}, "sup") is None
    with pytest.raises(ValueError, match="key"): plot_runs(runs, "accuracy")
    return figure


@figure_test
def test_draw_progress():
    "One PNG with the curves of a running search and, below, the gates of its last log row."
    rows = [{**{key: row[key] for key in ("step", "sup", "jig_accuracy", "expected", "realised")},
             "gates": list(gates_of(SPACE).values())} for row in history()[:6]]
    figures, as_png = [], widgets.as_png
    def watched(drawn, dpi):
        figures.extend(drawn)
        return as_png(drawn, dpi)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widgets, "as_png", watched)
        png = draw_progress(rows, .4, SPACE, dpi=30, chance=1 / 24)
    curves, route = figures
    assert len(curves.axes) == 3
    check_level(line(panel(curves, "jigsaw"), "chance"), "y", 100 / 24)
    check_level(line(panel(curves, "cost"), "budget"), "y", 40)
    check_points(line(panel(curves, "loss"), "supervised"), STEPS[:6], [row["sup"] for row in rows])
    check_gates(route, route.axes[0], gates_of(SPACE))
    sizes = 30 * np.array([figure.get_size_inches() for figure in figures])
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG" and np.allclose(picture.size, (sizes[:, 0].max(), sizes[:, 1].sum()), atol=2)
    return figures


@figure_test
def test_plot_class_iou():
    figure = plot_class_iou(class_rows())
    ax, = figure.axes
    check_ticks(ax.yaxis, dict(enumerate(class_rows()["searched"])))
    assert ax.yaxis_inverted() and "IoU" in ax.get_xlabel() and "%" in ax.get_xlabel()
    values = {"searched": [91, 74, 93, 66, 58], "hand-crafted": [92, 77, 90, 69, 0]} # no fence
    heights = {}
    for name, known in values.items():
        bars = only(ax.containers, name, lambda bars: bars.get_label())
        assert same([bar.get_width() for bar in bars], known) and {bar.get_x() for bar in bars} == {0}
        heights[name] = [bar.get_y() + bar.get_height() / 2 for bar in bars]
        assert np.round(heights[name]).tolist() == [0, 1, 2, 3, 4]
        assert same_colour(entry(ax, name).get_facecolor(), bars[0].get_facecolor())
        for value, y in zip(known, heights[name]):
            beside = [text for text in ax.texts if np.isclose(text.get_position()[1], y)]
            assert [text.get_text() for text in beside] == [str(value)] and beside[0].get_position()[0] >= value
    assert (np.diff(list(heights.values()), axis=0) >= bars[0].get_height() - 1e-9).all() # side by side
    assert not same_colour(*(bars[0].get_facecolor() for bars in ax.containers))
    assert [numbers(name) for name in legend_of(ax)] == [[76.4], [65.6]] # means of five classes
    fence = [text.get_text() for text in ax.texts if round(text.get_position()[1]) == 5]
    assert len(fence) == 2 and not any(map(numbers, fence))
    return figure


@figure_test
def test_plot_cost_accuracy():
    figure = plot_cost_accuracy(network_points())
    assert len(figure.axes) == 2
    measured, strip = figure.axes
    check_points(line(measured, "searched"), [.52] * 3, [55, 57, 54])
    check_points(line(measured, "all edges open"), [1.1], [56.6])
    check_points(line(measured, "rival A"), [8.4], [52])
    assert len(measured.lines) == 3 # None is not drawn as 0
    check_distinct(measured.lines)
    names = list(legend_of(measured))
    assert [name.split(" (")[0] for name in names] == ["all edges open", "searched", "rival A"] # the best first
    assert numbers(names[0]) == [13.2] and numbers(names[1]) == [6.1, 3] and numbers(names[2]) == [48] # ms, runs
    assert {text.get_text()[:7]: text.xy[0] for text in strip.texts} == {"rival B": 11.9, "rival C": .61}
    assert sorted(x for mark in strip.lines for x in mark.get_xdata()) == [.61, 11.9]
    assert "95" in only(strip.texts, "rival B", Text.get_text).get_text()
    assert "mIoU" in strip.get_ylabel() and not len(strip.get_yticks())
    assert "mIoU" in measured.get_ylabel() and "%" in measured.get_ylabel() and "GFLOPs" in strip.get_xlabel()
    assert measured.get_xlim() == strip.get_xlim() and {ax.get_xscale() for ax in figure.axes} == {"log"}
    return figure


@figure_test
def test_plot_image_routes():
    images, _ = images_and_labels(4)
    gates = [gates_along(ROUTE), *(gates_of(SPACE, depth, depth) for depth in (3, 1, 2))]
    titles = [f"scene {i}" for i in range(4)]
    figure = plot_image_routes(SPACE, images, gates, [.2, .5, .31, .4], titles)
    pictures, routes = figure.axes[0:8:2], figure.axes[1:8:2]
    assert [ax.get_title() for ax in pictures] == titles
    for ax, image in zip(pictures, images): assert (ax.images[0].get_array() == channels_last(image)).all()
    for ax, own, share in zip(routes, gates, (20, 50, 31, 40)):
        check_grid(ax, ["4", "8", "16", "32"])
        check_gates(figure, ax, own)
        assert numbers(ax.get_title()) == [share] and "%" in ax.get_title()
    check_key(figure, routes[0])
    dotted = {place for place, lines in edges_of(routes[0]).items() if len(lines) > 1}
    assert dotted == {(2, 2, 2), (4, 2, 2)} # inputs that are passed on
    assert entry(figure, "gate is 0").get_linestyle() == ":"
    return figure


def band(ax, word):
    "Lower and upper edge of a filled area at the steps 0, 100 and 200."
    x, y = only(ax.collections, word, lambda area: str(area.get_label())).get_paths()[0].vertices.T
    return [(y[x == step].min(), y[x == step].max()) for step in (0, 100, 200)]


@figure_test
def test_plot_closed():
    a, b, c, d = SPACE.edges()[:4]
    def closed(*edges): return {edge: float(edge not in edges) for edge in SPACE.edges()}
    figure = plot_closed(SPACE, [(0, closed()), (100, closed(a, b, c)), (200, closed(a, d))])
    ax, = figure.axes
    assert band(ax, "open:") == [(0, 29), (0, 26), (0, 25)]
    assert band(ax, "open again") == [(29, 29), (26, 26), (25, 27)] # b and c, at the end
    assert band(ax, "closed") == [(29, 29), (26, 29), (27, 29)]
    names = list(legend_of(ax))
    assert [name.split(":")[0] for name in names] == ["closed", "open again", "open"] # in the order of the areas
    assert [numbers(name) for name in names] == [[2], [2], [25]]
    assert len({(to_rgb(area.get_facecolor()[0]), area.get_hatch()) for area in ax.collections}) == 3
    assert numbers(ax.get_title()) == [29, 3, 2] # edges; most of them closed, open again
    assert ax.get_xlabel() == "step" and ax.get_ylabel() == "edges" and ax.get_ylim() == (0, 29)
    return figure


@figure_test
def test_plot_operations():
    kept = {Edge(0, 0, "identity"): .6, Edge(1, 1, "sep_conv_3x3"): .5, Edge(1, 1, "sep_conv_5x5"): .8}
    gates = candidates_of(SEARCHED)
    figure = plot_operations(SEARCHED, gates, Architecture(SEARCHED, ROUTE, operations=kept))
    matrix, route, _ = figure.axes
    shown = {(x, y): value for (y, x), value in np.ndenumerate(np.ma.filled(matrix.images[0].get_array(), np.nan))}
    place = {edge: (edge.layer, 3 * edge.scale + CANDIDATES.index(edge.kind))
             for edge in gates if edge.kind in CANDIDATES}
    assert {at for at, value in shown.items() if value == value} == set(place.values()) # no cell, no value
    written = {text.get_position(): text.get_text() for text in matrix.texts}
    for edge, at in place.items():
        assert shown[at] == gates[edge] and abs(float(written[at]) - gates[edge]) <= .005
    colour = matrix.images[0].to_rgba
    assert all(not same_colour(colour([0.])[0], colour([gate])[0]) for gate in gates.values() if gate)
    assert same_colour(colour([0.])[0], entry(matrix, "0 for").get_facecolor())
    frames = {(box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2) for box in matrix.patches}
    assert {tuple(np.round(at, 6)) for at in frames} == {place[edge] for edge in kept}
    assert same_colour(entry(matrix, "kept").get_edgecolor(), matrix.patches[0].get_edgecolor())
    check_ticks(matrix.yaxis, dict(enumerate(4 * CANDIDATES)))
    check_ticks(matrix.child_axes[0].yaxis, dict(zip((1, 4, 7, 10), FRAMED)))
    assert matrix.get_xlabel() == "layer"

    check_frame(route)
    check_route(route)
    letters = {name: re.match(r"(\w) ", only(legend_of(route), name))[1] for name in CANDIDATES}
    boxes = {}
    for box in route.patches:
        if not box.get_label(): continue # stem and decoder
        cell = round(box.get_x() + box.get_width() / 2), round(box.get_y() + box.get_height() / 2)
        boxes.setdefault(cell, []).append(box)
    assert {cell: len(own) for cell, own in boxes.items()} == dict.fromkeys(COMPUTING, 3)
    for cell, own in boxes.items():
        for name, box in zip(CANDIDATES, sorted(own, key=lambda box: box.get_y())):
            there = Edge(*cell, name) in kept
            assert same_colour(box.get_facecolor(), entry(route, name if there else "not kept").get_facecolor())
            x, y = box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2
            inside = [text.get_text() for text in route.texts if np.allclose(text.get_position(), (x, y))]
            assert inside == ([letters[name]] if there else [])
    assert numbers(route.get_title()) == [5, 29, 3, 12]
    return figure


@figure_test
def test_plot_front():
    figure = plot_front(front_rows())
    ax, = figure.axes
    check_points(line(ax, "derived"), [.27, .52, 1.02], [44, 48, 54]) # means of three seeds
    seeds = line(ax, "_seeds")
    check_points(seeds, [.25, .27, .29, .5, .52, .54, 1, 1.02, 1.04], [43, 44, 45, 47, 48, 49, 53, 54, 55])
    assert same_colour(seeds.get_color(), line(ax, "derived").get_color()) and seeds.get_linestyle() == "None"
    check_points(line(ax, "random"), .2 + .1 * np.arange(9), 38 + np.arange(9))
    check_points(line(ax, "dynamic"), [.3, .6, .9], [43, 46, 49])
    check_points(line(ax, "all open"), [1.3], [55])
    check_points(line(ax, "net A"), [.4], [45])
    check_points(line(ax, "net B"), [1.2], [50])
    assert line(ax, "random").get_linestyle() == "None" and line(ax, "derived").get_linestyle() == "-"
    check_distinct([mark for mark in ax.lines if mark is not seeds])
    for word, n in (("derived", [3, 9]), ("random", [9]), ("dynamic", [3]), ("all open", [1]), ("net A", [1]),
                    ("net B", [1])):
        name = only(legend_of(ax), word)
        assert numbers(name) == n
        assert same_colour(entry(ax, word).get_color(), line(ax, word).get_color())
    assert "GFLOPs" in ax.get_xlabel() and "mIoU" in ax.get_ylabel() and "%" in ax.get_ylabel()
    return figure


@figure_test
def test_confusion_figure():
    counts = torch.tensor([[45, 4, 1, 0], [15, 80, 5, 0], [3, 3, 4, 0], [0, 0, 0, 0]]) # no fence anywhere
    figure = confusion_figure(Metrics(counts, ("sky", "building", "tree", "fence")))
    ax, = figure.axes
    shares = [[90, 8, 2], [15, 80, 5], [30, 30, 40]]
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    assert np.allclose(shown[:3, :3], shares) and (shown[:3, 3] == 0).all() and np.isnan(shown[3]).all()
    written = {text.get_position(): int(text.get_text()) for text in ax.texts}
    assert written == {(j, i): shares[i][j] for i in range(3) for j in range(3)}
    colours = [ax.images[0].to_rgba(share) for share in (2, 40, 90)]
    assert all(brightness(a) > brightness(b) for a, b in zip(colours, colours[1:]))
    for axis in (ax.xaxis, ax.yaxis): check_ticks(axis, dict(enumerate(("sky", "building", "tree", "fence"))))
    assert "predicted" in ax.get_xlabel() and "true" in ax.get_ylabel() and ax.yaxis_inverted()
    assert numbers(ax.get_title()) == [55.3] and "%" in ax.get_title() # the mean of 45/68, 80/107 and 4/16
    return figure


@figure_test
def test_summary_figure():
    rows = [dict(arm="labels", miou=Summary((.41, .44, .43), (0, 1, 2))), dict(arm="jigsaw", miou=None),
            dict(arm="both", miou=Summary((.46, .47, .49), (0, 1, 2)))]
    figure = summary_figure(rows, "miou", ["arm"], "test mIoU (%)", percent=True)
    ax, = figure.axes
    for place, runs, mean in ((0, [41, 44, 43], 128 / 3), (1, [46, 47, 49], 142 / 3)):
        dots, bar = [mark for mark in ax.lines if mark.get_ydata()[0] == place]
        check_points(dots, runs, [place] * 3)
        check_points(bar, [mean], [place])
        assert dots.get_marker() != bar.get_marker() and not same_colour(dots.get_color(), bar.get_color())
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert len(names) == 2 and "labels" in names[0] and "both" in names[1] and all("n=3" in name for name in names)
    assert ax.get_xlabel() == "test mIoU (%)" and ax.yaxis_inverted()
    return figure


@figure_test
def test_explore_budget():
    gates = gates_along(ROUTE | {Edge(0, 0, "keep"): .1})
    statistics = GateStatistics(gates, gates, torch.zeros(1), torch.zeros(1))
    explorer = explore_budget(cost_table(SPACE), statistics, budget=.6)
    figure, mean = explorer.draw(explorer.values)
    check_gates(mean, mean.axes[0], gates)
    route = panel(figure, "route")
    check_frame(mean.axes[0])
    check_frame(route)
    # All six edges fit: 141 of 349.14 million. Cells (1, 0) to (4, 0) now pass their input on.
    check_route(route, ROUTE | {Edge(0, 0, "keep"): .1}, COMPUTING, PASSING | {(layer, 0) for layer in (1, 2, 3, 4)})
    assert "0.141 GFLOPs" in figure.get_suptitle() and "40%" in figure.get_suptitle()
    assert explorer.controls["budget"].min == 17 # stem, decoder and classifier alone: 58 of 349.14 million
    cheap, again = explorer.draw({"budget": 30})
    assert 17 <= numbers(cheap.get_suptitle())[-1] <= 30 and again is mean
    assert numbers(panel(cheap, "route").get_title())[0] < 6
    return [figure, mean]


@figure_test
def test_plot_summarised():
    inherited = widgets.InheritedNetwork(torch.nn.Conv2d(1, 1, 1), .125, 7.25)
    figure = plot_summarised(cost_table(SPACE), Architecture(SPACE, ROUTE), lambda architecture: inherited)
    ax, = figure.axes
    check_frame(ax)
    check_route(ax)
    assert [word in figure.get_suptitle() for word in ("0.14 GFLOPs", "40%", "7.2 ms", "cpu", "12.5%")] == [True] * 5
    return figure


@figure_test
def test_plot_explored():
    points = [(.3, .2, 9.), (.1, .05, 4.), (.2, .25, 6.)]
    figure = plot_explored(points, points[2], .22)
    for ax, values, word in zip(figure.axes, ([5, 25, 20], [4, 6, 9]), ("mIoU", "latency")):
        check_points(line(ax, "seen"), [.1, .2, .3], values)
        check_points(line(ax, "this"), [.2], values[1:2])
        check_level(line(ax, "budget"), "x", .22)
        assert word in ax.get_ylabel() and "GFLOPs" in ax.get_xlabel()
    assert len(legend_of(figure)) == 3
    check_distinct([line(figure.axes[0], name) for name in ("seen", "this", "budget")])
    return figure


@figure_test
def test_plot_pixels():
    images, labels = (torch.as_tensor(part) for part in images_and_labels(1))
    labels[0, :48, :40], labels[0, :48, 40:], labels[0, 48:] = 1, 3, 255 # building, road, no label
    guess = labels[0].where(labels[0] != 255, 3)
    guess[:, :20] = 5 # a tree, in a quarter of the labelled pixels
    sure = torch.full(SIZE, .9).where(torch.arange(80) < 40, .5) # the left half
    figure = plot_pixels(images[0], labels[0], {"teacher": (sure, guess), "perfect": (sure, labels[0])}, SPEC,
                         "teacher", .8)
    left = np.arange(80) < 40
    kept, truth = (np.where(left, part.numpy(), 255) for part in (guess, labels[0]))
    image, label, *rest = pictures_of(figure)
    assert (image == channels_last(images[0].numpy())).all() and (label == in_colours(labels[0].numpy())).all()
    for drawn, errors, part, right in zip(rest[::2], rest[1::2], (kept, guess, labels[0]), (truth, labels[0], labels[0])):
        part, right = np.asarray(part), np.asarray(right)
        assert (drawn == in_colours(part)).all()
        for state, where in (("ignored", right == 255), ("wrong", (right != part) & (right != 255)), ("correct", right == part)):
            assert (errors[where & ((right == 255) == (state == "ignored"))] == ERROR_COLOURS[state]).all(), state
    titles = [ax.get_title() for ax in figure.axes]
    assert numbers(titles[2]) == [.8, 50] and [numbers(title) for title in titles[3::2]] == [[50], [25], [0]]
    assert titles[4::2] == ["teacher", "perfect"]
    assert "drawn scenes" in figure.get_suptitle() and "synthetic" in figure.get_suptitle()
    check_palette(figure)
    return figure


@figure_test
def test_plot_puzzle():
    images, _ = images_and_labels(1)
    whole = torch.as_tensor((images - images.mean((2, 3), keepdims=True)) / 60)
    shuffled = whole.roll(40, 3) # left and right halves change places
    figure = plot_puzzle(torch.as_tensor(images[0]), shuffled, torch.tensor([[1, 0, 3, 2]]), True)
    image, pieces, restored = pictures_of(figure)
    assert (image == channels_last(images[0])).all() and (restored == np.roll(pieces, 40, 1)).all()
    assert not (restored == pieces).all()
    numbered = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert numbered == [[], ["1", "2", "3", "4"], ["2", "1", "4", "3"]]
    places = [(text.get_position()[0] > 39, text.get_position()[1] > 31) for text in figure.axes[2].texts]
    assert places == [(False, False), (True, False), (False, True), (True, True)]
    assert "right" in figure.axes[2].get_xlabel()
    return figure


@figure_test
def test_edit_architecture():
    edge = Edge(3, 2, "up")
    explorer = edit_architecture(Architecture(SPACE, ROUTE), cost_table(SPACE))
    figure = picture_of(explorer)
    ax, = figure.axes
    check_frame(ax)
    check_route(ax)
    check_key(ax, ax)
    # Stem and classifier 58, cells with what leaves them 19 + 18 + 20 + 18, two steps of the decoder 4 + 3
    assert "0.14 GFLOPs" in figure.get_suptitle() and "40%" in figure.get_suptitle()
    closed = picture_of(explorer, {edge: False})
    kept = {p: weight for p, weight in ROUTE.items() if p not in (edge, Edge(4, 1, "keep"))}
    check_route(closed.axes[0], kept, COMPUTING - {(4, 1)}, PASSING) # the edge behind it is removed, too
    assert [part for part, button in explorer.controls.items() if button.disabled and part[:2] in {(1, 1), (2, 2)}] == []
    assert explorer.controls[Edge(4, 1, "keep")].disabled, "no open edge leads to its cell"
    picture_of(explorer)
    assert not explorer.controls[Edge(4, 1, "keep")].disabled
    assert "0.119 GFLOPs" in closed.get_suptitle() # less 3, and less 18
    return figure


@figure_test
def test_explore_split():
    scenes = Scenes(8)
    figure = picture_of(explore_split(scenes, 1 / 2))
    bars, wall = figure.axes
    labelled = [scenes.ids.index(name) for name in make_split(scenes, 1 / 2, 0).labelled]
    present = np.array([[(label == k).any() for k in range(11)] for _, label in scenes.drawn])
    assert same([bar.get_width() for bar in bars.patches], present[labelled].sum(0))
    for bar, k, rgb in zip(bars.patches, range(11), SPEC.palette):
        assert round(bar.get_y() + bar.get_height() / 2) == k and same_colour(bar.get_facecolor(), np.array(rgb) / 255)
    check_ticks(bars.yaxis, dict(enumerate(SPEC.classes)))
    check_points(line(bars, "whole set"), present.sum(0) / 2, range(11)) # 4 of 8 images
    entry(bars, "whole set")
    assert bars.yaxis_inverted() and "images" in bars.get_xlabel() and numbers(bars.get_xlabel()) == [4]
    assert numbers(wall.get_title()) == [4, 4, 4] # labelled, not, shown
    tiles = np.asarray(wall.images[0].get_array()).reshape(2, 100, 3, 130, 3).swapaxes(1, 2).reshape(6, -1)
    assert [bool((tile == 255).all()) for tile in tiles] == [False] * 4 + [True] * 2
    return figure


# Is every figure tested, and do the tests detect changes?

FUNCTIONS = {name: found for module in pkgutil.walk_packages(selfsupnas.__path__, "selfsupnas.")
             for name, found in vars(importlib.import_module(module.name)).items()
             if inspect.isfunction(found) and not name.startswith("_")}


def names_in(code):
    "Names that the code of a function and of its inner functions refers to."
    inner = (names_in(const) for const in code.co_consts if inspect.iscode(const))
    return set(code.co_names).union(*inner)


def makes_figure(name):
    "Does a function return a figure, by its name and module or by its calls?"
    by_name = name.startswith(("plot_", "show_")) or name in ("legend", "sample_sheet")
    module = FUNCTIONS[name].__module__.rpartition(".")[2]
    return (by_name and module in ("show", "curves", "routes", "predictions", "inspection") or
            bool(names_in(FUNCTIONS[name].__code__) & {"new_figure", "subplots"}))


def test_every_figure_has_a_test():
    called = set().union(*(names_in(test.__wrapped__.__code__) for test in TESTS))
    makers = {name for name in FUNCTIONS if makes_figure(name)} - {"new_figure"}
    assert {"plot_route", "legend", "sample_sheet", "confusion_figure", "explore_split"} <= makers
    missing = sorted(makers - called)
    assert not missing, f"figures without a test here: {', '.join(missing)}"
    reached, fresh = set(), called & set(FUNCTIONS)
    while fresh:
        reached |= fresh
        fresh = set().union(*(names_in(FUNCTIONS[name].__code__) for name in fresh)) & set(FUNCTIONS) - reached
    drawers = {name for name, f in FUNCTIONS.items() if {"ax", "axes", "fig"} & set(inspect.signature(f).parameters)}
    missing = sorted(drawers - reached - {"notebook_picture", "save_figure", "save_photos"}) # which draw nothing
    assert not missing, f"no figure with a test here calls {', '.join(missing)}"


def afterwards(change):
    "Draw as usual, then `change(figure)`."
    def spoilt(draw, *args, **kwargs):
        figure = draw(*args, **kwargs)
        change(figure)
        return figure
    return spoilt


def without_legend(figure): figure.axes[0].get_legend().remove()


def filled_in(rows, key):
    "Rows with 0 for missing numbers."
    return [{**row, key: 0. if row[key] is None or row[key] != row[key] else row[key]} for row in rows]


def with_iou(name, iou):
    "Replace the IoU of a class of the first network."
    def spoilt(draw, rows): return draw({**rows, "searched": {**rows["searched"], name: iou}})
    return spoilt


def without(architecture, **parts):
    "The architecture without its last edge, or with other parts."
    return replace(architecture, **(parts or {"edges": dict(list(architecture.edges.items())[:-1])}))


def dotted_as_solid(figure):
    for edge in figure.axes[0].lines:
        if edge.get_linestyle() == ":": edge.set_linestyle("-")


def exchanged_labels(figure):
    first, second = figure.axes[-1].lines[:2]
    first_label = first.get_label()
    first.set_label(second.get_label()), second.set_label(first_label)


def alike_cells(ax):
    for cell in ax.lines:
        if cell.get_marker() == "o": cell.set_markerfacecolor("w")


# Change -> (test that must fail, function whose figure changes, changed function)
CHANGES = {
    "a wrong pixel that looks right": (test_show_images, error_map, lambda draw, label, _: draw(label, label)),
    "an overlay of .55 for .6": (test_show_images, overlay, lambda draw, *args: draw(*args, alpha=.55)),
    "titles of other images": (test_show_images, show_images, lambda draw, images, titles=None:
                               draw(images, titles and titles[::-1])),
    "classes in another order": (test_legend, legend, lambda draw, spec:
                                 draw(replace(spec, classes=spec.classes[::-1]))),
    "a colour of the legend off by ten": (test_legend, legend, afterwards(lambda figure: figure.axes[0].get_legend()
        .legend_handles[3].set_facecolor((138 / 255, 64 / 255, 128 / 255)))),
    "a weaker overlay": (test_show_samples, show_samples, lambda draw, *args: draw(*args, alpha=.55)),
    "samples in another order": (test_show_samples, show_samples, lambda draw, data, rows: draw(data, rows[::-1])),
    "a faulty sample": (test_sample_sheet, sample_sheet, lambda draw, found, *args:
                        draw(replace(found, faulty={}), *args)),
    "a loss of NaN drawn as 0": (test_plot_history_terms, plot_history, lambda draw, rows:
                                draw(filled_in(rows, "jig"))),
    "no legend of the terms": (test_plot_history_terms, plot_history, afterwards(without_legend)),
    "no budget line": (test_plot_history_shares, plot_history, lambda draw, rows, chance=None, budget=None:
                       draw(rows, chance)),
    "chance at another value": (test_plot_history_shares, plot_history, lambda draw, rows, chance=0., budget=None:
                                draw(rows, chance / 2, budget)),
    "an mIoU of None drawn as 0": (test_plot_history_shares, plot_history, lambda draw, rows, **levels:
                                   draw(filled_in(rows, "val_miou"), **levels)),
    "per cent that are not said": (test_plot_history_shares, plot_history, afterwards(lambda figure: figure.axes[-1]
        .set_title("validation mIoU"))),
    "an edge closed": (test_plot_route_gates, plot_route, lambda draw, space, gates:
                      draw(space, {**gates, Edge(0, 0, "keep"): 0.})),
    "closed edges that look open": (test_plot_route_gates, plot_route, afterwards(dotted_as_solid)),
    "an axis without its name": (test_plot_route_gates, plot_route, afterwards(lambda figure: figure.axes[0]
        .set_xlabel(""))),
    "a kept edge dropped": (test_plot_route_architecture, plot_route, lambda draw, space, gates, found:
                            draw(space, gates, without(found))),
    "a route without its key": (test_plot_route_architecture, plot_route, afterwards(lambda figure: figure.axes[1]
        .get_legend().remove())),
    "weights left out": (test_draw_architecture, draw_architecture, lambda draw, found: draw(found.unweighted())),
    "cells that all look alike": (test_draw_architecture, draw_architecture, afterwards(alike_cells)),
    "the last snapshot missing": (test_plot_gate_history, plot_gate_history, lambda draw, space, snapshots:
                                  draw(space, snapshots[1:])),
    "keep and up exchanged": (test_plot_gate_history, plot_gate_history, afterwards(exchanged_labels)),
    "the first by importance marked as chosen": (test_plot_candidates, plot_candidates, lambda draw, rows, rivals: draw(
        [{**row, "chosen": i == 0} for i, row in enumerate(rows)], rivals)),
    "a wrong guess called right": (test_plot_jigsaw, plot_jigsaw, lambda draw, *args, truth, guess, n:
                                   draw(*args, truth=truth, guess=truth, n=n)),
    "tiles without borders": (test_plot_jigsaw, plot_jigsaw, lambda draw, *args, truth, guess, n:
                              draw(*args, truth=truth, guess=guess, n=1)),
    "prediction in place of label": (test_plot_predictions, plot_predictions, lambda draw, *args:
                                     draw(args[0], args[2], args[1], *args[3:])),
    "drawn scenes that pass for real": (test_plot_predictions, plot_predictions, lambda draw, *args:
                                        draw(*args[:3], replace(SPEC, synthetic=False), *args[4:])),
    "a lower confidence threshold": (test_plot_views, plot_views, lambda draw, *args: draw(*args[:-1], .5)),
    "student in place of teacher": (test_plot_views, plot_views, lambda draw, weak, strong, taught, own, *args:
                                    draw(weak, strong, own, taught, *args)),
    "a run under another's name": (test_plot_runs, plot_runs, lambda draw, runs, key: draw(
        dict(zip(["short", "long", *list(runs)[2:]], runs.values())), key)),
    "another budget": (test_draw_progress, draw_progress, lambda draw, rows, budget, space, **more:
                       draw(rows, .9, space, **more)),
    "gates of other edges": (test_draw_progress, draw_progress, lambda draw, rows, budget, space, **more:
                             draw([{**row, "gates": row["gates"][::-1]} for row in rows], budget, space, **more)),
    "a live plot without chance": (test_draw_progress, draw_progress, lambda draw, rows, budget, space, dpi, chance:
                                   draw(rows, budget, space, dpi)),
    "a lower IoU": (test_plot_class_iou, plot_class_iou, with_iou("car", .56)),
    "an IoU of None drawn as 0": (test_plot_class_iou, plot_class_iou, with_iou("fence", 0.)),
    "an unmeasured mIoU drawn as 0": (test_plot_cost_accuracy, plot_cost_accuracy, lambda draw, points:
                                      draw(filled_in(points, "miou"))),
    "costs without their unit": (test_plot_cost_accuracy, plot_cost_accuracy, afterwards(lambda figure: figure.axes[-1]
        .set_xlabel("cost"))),
    "routes of other images": (test_plot_image_routes, plot_image_routes, lambda draw, space, images, gates, *args:
                               draw(space, images, gates[::-1], *args)),
    "shares of other images": (test_plot_image_routes, plot_image_routes, lambda draw, *args:
                               draw(*args[:3], args[3][::-1], args[4])),
    "an edge that opens again left out": (test_plot_closed, plot_closed, lambda draw, space, snapshots:
                                         draw(space, snapshots[:2] + [(200, snapshots[1][1])])),
    "areas that look alike": (test_plot_closed, plot_closed, afterwards(lambda figure: [
        area.set(facecolor="0.8", hatch="") for area in figure.axes[0].collections])),
    "a kept candidate without its frame": (test_plot_operations, plot_operations, lambda draw, space, gates, found:
        draw(space, gates, without(found, operations=dict(list(found.operations.items())[:-1])))),
    "a gate of 0 in the colour of others": (test_plot_operations, plot_operations, afterwards(lambda figure:
        figure.axes[0].images[0].set_clim(-1, 1))),
    "another colour": (test_plot_front, plot_front, afterwards(lambda figure: figure.axes[0].lines[1]
        .set_color("red"))),
    "a seed left out": (test_plot_front, plot_front, lambda draw, rows: draw(rows[1:])),
    "labels and predictions exchanged": (test_confusion_figure, confusion_figure, lambda draw, metrics:
                                         draw(replace(metrics, confusion=metrics.confusion.T))),
    "fractions in place of per cent": (test_summary_figure, summary_figure, lambda draw, *args, percent: draw(*args)),
    "a smaller budget": (test_explore_budget, explore_budget, lambda draw, *args, budget: draw(*args, budget=.3)),
    "a cost that is not said": (test_edit_architecture, picture_of, afterwards(lambda figure: figure.suptitle("a route"))),
    "an edge that was shut before": (test_edit_architecture, edit_architecture, lambda draw, found, table:
                                    draw(without(found), table)),
    "a route of another cost": (test_plot_summarised, plot_summarised, lambda draw, table, found, worth:
                                draw(table, without(found), worth)),
    "a route that is not highlighted": (test_plot_explored, plot_explored, lambda draw, points, current, budget:
                                        draw(points, points[0], budget)),
    "all pixels kept": (test_plot_pixels, plot_pixels, lambda draw, *args: draw(*args[:-1], .5)),
    "no teacher": (test_plot_pixels, plot_pixels, lambda draw, *args: draw(*args[:-2])),
    "pieces that stay": (test_plot_puzzle, plot_puzzle, lambda draw, image, shuffled, guess, right:
                         draw(image, shuffled, guess.sort().values, right)),
    "a right guess that passes for wrong": (test_plot_puzzle, plot_puzzle, lambda draw, *args: draw(*args[:-1], False)),
    "another fraction": (test_explore_split, explore_split, lambda draw, data, fraction: draw(data, 1 / 4)),
    "colours of other classes": (test_explore_split, picture_of, afterwards(lambda figure: [
        bar.set_facecolor("0.5") for bar in figure.axes[0].patches])),
    "text of 4 points": (test_summary_figure, summary_figure, afterwards(lambda figure: figure.axes[0]
        .set_title("test", fontsize=4))),
    "a title beyond the canvas": (test_summary_figure, summary_figure, afterwards(lambda figure: figure.axes[0]
        .set_title("test " * 60))),
    "a glyph that no font has": (test_summary_figure, summary_figure, afterwards(lambda figure: figure.axes[0]
        .set_title("test \ue123"))),
    "a text over another": (test_summary_figure, summary_figure, afterwards(lambda figure: [
        figure.axes[0].text(44, .5, "mean") for _ in range(2)])),
    "points beyond the axes": (test_summary_figure, summary_figure, afterwards(lambda figure: figure.axes[0]
        .set_xlim(41.5, 50))),
    "an empty panel": (test_show_images, show_images, afterwards(lambda figure: figure.axes[1].images[0].set_alpha(0))),
}


def test_every_figure_is_spoilt_once():
    assert {test for test, _, _ in CHANGES.values()} == set(TESTS)


@pytest.mark.parametrize("change", CHANGES)
def test_a_real_change_fails_its_test(change, monkeypatch):
    test, draw, spoilt = CHANGES[change]
    monkeypatch.setitem(globals(), draw.__name__, functools.partial(spoilt, draw))
    with pytest.raises(AssertionError): test()


def test_a_headline_is_a_metric_where_a_parameter_has_its_name():
    "Of a run of a hand-crafted network with a given cost."
    from selfsupnas.core import RunRecord
    from selfsupnas.stages.configs import RetrainConfig
    from selfsupnas.viz.tables import run_summary
    config = RetrainConfig(architecture="narrow_unet", gflops=1., w_jig=0., w_semi=0.)
    assert "0.9800" in run_summary(RunRecord("retrain", "x", dataclasses.asdict(config), 0, {"gflops": .98, "val_miou": .5, "parameters": 1000}, {"training": 3.}))
