"It learns: networks overfit four images, and a short search ends at the budget that it was asked for."
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from selfsupnas.space.architecture import Architecture
from selfsupnas.rivals import build_baseline
from selfsupnas.train.batches import load_training_data
from selfsupnas.train.config import TrainingConfig
from selfsupnas.metrics import evaluate_segmenter
from selfsupnas.space.grid import SearchSpace
from selfsupnas.space.network import StaticNetwork
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import search
from selfsupnas.train.loop import train

SIZE = 64, 96 # height, width


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    "`data=folder` with four noisy images, each with two of disc, square, triangle in one colour: only the shape tells the class. Val is train."
    root, draw = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"): (root/kind/split).mkdir(parents=True)
    for i in range(4):
        image, mask = Image.new("RGB", SIZE[::-1], (60, 120, 60)), Image.new("L", SIZE[::-1], 0)
        for k, shape in enumerate(draw.permutation(3)[:2]):
            x, y = 6 + 46 * k + int(draw.integers(8)), int(draw.integers(4, 26))
            for canvas, ink in ((ImageDraw.Draw(image), (200, 180, 40)), (ImageDraw.Draw(mask), int(shape) + 1)):
                if shape == 0: canvas.ellipse((x, y, x + 32, y + 32), fill=ink)
                if shape == 1: canvas.rectangle((x, y, x + 32, y + 32), fill=ink)
                if shape == 2: canvas.polygon(((x, y + 32), (x + 32, y + 32), (x + 16, y)), fill=ink)
        noisy = np.asarray(image) + draw.integers(-25, 25, (*SIZE, 3))
        for split in ("train", "val"):
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root/"images"/split/f"{i}.png")
            mask.save(root/"masks"/split/f"{i}.png")
    (root/"classes.txt").write_text("background\ndisc\nsquare\ntriangle\n")
    return root


def searched():
    space = SearchSpace(4, layers=3, channels=16)
    return StaticNetwork(Architecture(space, dict.fromkeys(space.edges(), 1.)))


def unet():
    pytest.importorskip("segmentation_models_pytorch", reason="needs pip install 'selfsupnas[rivals]'")
    return build_baseline("unet_resnet18", 4)


def lraspp(): return build_baseline("lraspp_mobilenet_v3_large", 4)


@pytest.mark.parametrize("build, steps", [(searched, 120), (unet, 50), (lraspp, 150)])
def test_a_network_overfits_four_images(shapes, tmp_path, build, steps):
    config = TrainingConfig(folder=str(tmp_path), data="folder", root=str(shapes), label_fraction=1., zoom=(1., 1.), w_jig=0., w_semi=0.,
                            steps=steps, logs=2, batch_labelled=4, ema_decay=.9)
    data = load_training_data(config)
    torch.manual_seed(0)
    trained = train(build(), config, data)
    assert evaluate_segmenter(trained.model, data.val, progress=False).miou > .95


def test_a_short_search_ends_at_its_budget(tmp_path):
    "In multiply-adds that are executed for validation images, as a share of the whole grid's."
    config = SearchConfig(folder=str(tmp_path), size=(64, 80), layers=4, channels=8, steps=120, budget=.5, batch_labelled=4, batch_unlabelled=2, batch_jigsaw=2, logs=2)
    metrics = search(config).record.metrics
    assert abs(metrics["realised_share"] - config.budget) < .05
    assert 0 < metrics["derived_cost"] <= metrics["budget_cost"] == config.budget * metrics["full_cost"]
