"Cityscapes against the official scripts' table and evaluation, and torchvision's reader."
import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from cityscapesscripts.helpers.labels import id2label, labels
from PIL import Image
from torch import nn
from torchvision.datasets import Cityscapes as TorchvisionCityscapes

from selfsupnas.data.augment import normalise
from selfsupnas.data.cityscapes import (CITYSCAPES_CLASSES, CITYSCAPES_COUNTS, CITYSCAPES_LABELS, CITYSCAPES_PALETTE, CITYSCAPES_TABLE,
                                   draw_cityscapes, find_cityscapes)
from selfsupnas.data.datasets import Cityscapes, load_dataset
from selfsupnas.metrics import evaluate_segmenter

PUBLISHED = [label for label in labels if label.id >= 0] # without the licence plate, which is never drawn into a mask


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A drawn dataset; one training mask contains all 34 ids."
    root = draw_cityscapes(tmp_path_factory.mktemp("cityscapes"), dict(train=5, val=4, test=2, train_extra=3))
    mask = find_cityscapes(root, "train")["aachen_000002_000019"][1]
    Image.fromarray((np.arange(64 * 128) % 34).astype(np.uint8).reshape(64, 128)).save(mask)
    return root


def test_the_table_is_as_long_as_the_published_one(): assert len(CITYSCAPES_LABELS) == len(PUBLISHED) == 34


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda label: f"{label.id}-{label.name}")
def test_each_label_is_the_published_one(published):
    ours = CITYSCAPES_LABELS[published.id]
    assert (ours.id, ours.name, ours.train_id, ours.colour) == (published.id, published.name, published.trainId, published.color)
    assert (ours.train_id == 255) == published.ignoreInEval # trained classes are the evaluated ones, no more and no fewer


def test_classes_are_in_the_order_of_their_train_ids():
    evaluated = sorted((label for label in PUBLISHED if not label.ignoreInEval), key=lambda label: label.trainId)
    assert CITYSCAPES_CLASSES == tuple(label.name for label in evaluated) and len(evaluated) == 19
    assert CITYSCAPES_PALETTE == tuple(label.color for label in evaluated)


@pytest.mark.parametrize("split, mode", [("train", "fine"), ("val", "fine"), ("train", "coarse"), ("val", "coarse"), ("train_extra", "coarse")])
def test_torchvision_reads_the_same(tree, split, mode):
    theirs, ours = TorchvisionCityscapes(tree, split, mode, "semantic"), Cityscapes(tree, split, annotation=mode)
    where = {path: i for i, path in enumerate(theirs.images)}
    assert len(ours) == len(theirs) > 0
    for i, (path, _) in enumerate(ours.pairs):
        image, numbers = theirs[where[str(path)]]
        assert np.array_equal(ours[i][0].permute(1, 2, 0), image)
        train_ids = np.vectorize(lambda n: id2label[n].trainId)(np.asarray(numbers)) # their numbers by the official table
        assert np.array_equal(ours[i][1], train_ids)


def test_all_34_ids_are_mapped_in_one_mask(tree):
    data = Cityscapes(tree, "train")
    label = data[data.ids.index("aachen_000002_000019")][1].flatten()
    assert label.tolist() == [CITYSCAPES_TABLE[k % 34] for k in range(64 * 128)]
    assert sorted(label.unique().tolist()) == [*range(19), 255]


def test_counts_of_the_archives(tmp_path):
    "Empty files under the official names and in the official numbers: 24,998 images."
    for split, count in CITYSCAPES_COUNTS.items():
        for city in (f"{split.replace('_', '')}{k}" for k in range(5)):
            for kind in ("leftImg8bit", "gtFine", "gtCoarse"): (tmp_path/kind/split/city).mkdir(parents=True)
        for i in range(count):
            city = f"{split.replace('_', '')}{i % 5}"
            (tmp_path/"leftImg8bit"/split/city/f"{city}_{i:06d}_000019_leftImg8bit.png").touch()
            kind = "gtCoarse" if split == "train_extra" else "gtFine"
            (tmp_path/kind/split/city/f"{city}_{i:06d}_000019_{kind}_labelIds.png").touch()
    count = {name: [len(load_dataset(name, split, tmp_path)) for split in ("train", "val", "test")] for name in ("cityscapes", "cityscapes_extra", "cityscapes_coarse")}
    assert count == {"cityscapes": [2975, 500, 1525], "cityscapes_extra": [22973, 500, 1525], "cityscapes_coarse": [22973, 500, 1525]}
    assert [len(load_dataset(name, "train", tmp_path).labelled_ids) for name in count] == [2975, 2975, 22973]
    assert load_dataset("cityscapes", "test", tmp_path).labelled_ids == []


def test_the_official_evaluation_says_the_same(tree, tmp_path, monkeypatch):
    "mIoU and IoU of each class, by this package and by the script that the benchmark's server runs."
    torch.manual_seed(0)
    network, data = nn.Conv2d(3, 19, 3, padding=1), Cityscapes(tree, "val")
    ours = evaluate_segmenter(network, data, progress=False)
    to_id = np.array([next(label.id for label in PUBLISHED if label.trainId == k) for k in range(19)], np.uint8)
    predictions, truths = [], []
    for i, name in enumerate(data.ids):
        with torch.no_grad(): guess = network(normalise(data[i][0][None])).argmax(1)[0]
        predictions.append(str(tmp_path/f"{name}.png")), truths.append(str(data.pairs[i][1]))
        Image.fromarray(to_id[guess]).save(predictions[-1])
    for name, value in dict(evalInstLevelScore=False, JSONOutput=False, quiet=True).items(): monkeypatch.setattr(official.args, name, value)
    theirs = official.evaluateImgLists(predictions, truths, official.args)
    assert len({*ours.iou.nan_to_num(-1).tolist()}) > 5, "too few classes to compare"
    for name, iou in zip(CITYSCAPES_CLASSES, ours.iou.tolist()):
        other = theirs["classScores"][name]
        assert iou == other or (iou != iou and other != other)
    assert ours.miou == theirs["averageScoreClasses"]
