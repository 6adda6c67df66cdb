"""Draws method.png: images, views and jigsaws of the embedded street scenes; gates and derived
network of the search in `experiments/records/demo-streetscenes`; a prediction of the `streetscenes`
network.

    python nbs/figures/method.py
"""
import json
from pathlib import Path

import torch
from matplotlib.patches import FancyArrowPatch

import selfsupnas
from selfsupnas.data.augment import StrongView, WeakView, denormalise, normalise
from selfsupnas.data.datasets import load_dataset
from selfsupnas.metrics import segment
from selfsupnas.show import as_picture, colourise, figure_class, overlay, save_figure
from selfsupnas.space.architecture import draw_architecture, load_architecture
from selfsupnas.tasks.jigsaw import cut_and_shuffle
from selfsupnas.tasks.permutations import permutation_set
from selfsupnas.viz.routes import draw_gates

HERE = Path(__file__).resolve().parent
SEARCH = HERE.parent/"experiments"/"records"/"demo-streetscenes"/"search"

def pictures() -> dict:
    "RGB pictures (H,W,3) by name."
    torch.manual_seed(11)
    train, test = (load_dataset("streetscenes", split) for split in ("train", "test"))
    palette = train.spec.palette
    weak = WeakView(scale=(1., 1.6))(train[5][0])[0]
    jigsaw, _ = cut_and_shuffle(normalise(train[9][0])[None], permutation_set(2),
                                torch.Generator().manual_seed(5))
    unseen = test[2][0]
    guess = segment(selfsupnas.load("streetscenes"), unseen[None])[0]
    return {"labelled": overlay(*train[0], palette, alpha=.5), "weak": as_picture(weak),
            "strong": as_picture(StrongView(p_jitter=1.)(weak)),
            "jigsaw": as_picture(denormalise(jigsaw)[0]), "unseen": as_picture(unseen),
            "prediction": colourise(guess, palette)}

def draw_method():
    "The figure of the method: data on the left, the supernet in the middle, its network right."
    fig, size = figure_class()(figsize=(11, 4.4), dpi=100), dict(fontsize=10, color="0.1")
    note = dict(fontsize=9, color="0.35", va="center")
    def panel(x, y, width, height, title):
        ax = fig.add_axes((x, y, width, height))
        ax.set_title(title, pad=4, **size)
        return ax
    def picture(name, x, y, title, width=.125):
        ax = panel(x, y, width, .2, title)
        ax.set_anchor("W")
        ax.imshow(shown[name])
        ax.set_axis_off()
    def arrow(start, end):
        fig.add_artist(FancyArrowPatch(start, end, transform=fig.transFigure, color="0.45", lw=2,
                                       arrowstyle="-|>", mutation_scale=16))
    shown = pictures()
    picture("labelled", .0, .74, "few labelled images")
    fig.text(.135, .84, "cross-entropy", **note)
    picture("weak", .0, .40, "many without labels")
    picture("strong", .135, .40, "strong view")
    fig.text(.0, .36, "consistency: one label map for both views", **note)
    picture("jigsaw", .0, .03, "jigsaw")
    fig.text(.135, .13, "pretext task:\nwhich permutation?", **note)
    for y in (.84, .50, .13): arrow((.275, y), (.315, .5 + (y - .5) / 3))
    architecture = load_architecture(SEARCH/"architecture.json")
    space, last = architecture.space, json.loads((SEARCH/"history.json").read_text())[-1]
    ax = panel(.37, .28, .27, .42, "search: a supernet, whose gates\nlearn within a budget")
    draw_gates(ax, space, dict(zip(space.gated(), last["gates"])), widest=4)
    ax = panel(.735, .60, .26, .32, f"derive: the best {len(architecture.edges)} of "
               f"{len(space.edges())} edges")
    draw_architecture(architecture, ax)
    picture("unseen", .735, .09, "retrain, evaluate")
    picture("prediction", .875, .09, "prediction")
    arrow((.65, .56), (.685, .66))
    arrow((.865, .47), (.865, .38))
    return fig

if __name__ == "__main__": save_figure(draw_method(), HERE/"method.png")
