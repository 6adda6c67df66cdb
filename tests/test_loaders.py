"Batches of a run on the official layouts: the same for any number of workers, and independent of the labels of unlabelled images."
import dataclasses, subprocess, sys

import numpy as np
import pytest
import torch
from PIL import Image

from selfsupnas.train.batches import load_training_data, make_batches, present
from selfsupnas.data.cityscapes import draw_cityscapes
from selfsupnas.train.config import TrainingConfig
from selfsupnas.core import RunRecord
from selfsupnas.data.datasets import load_dataset
from selfsupnas.metrics import evaluate_segmenter
from selfsupnas.stages.retraining import load_network
from selfsupnas.stages.choice import without_choice_images
from selfsupnas.data.splits import save_split
from selfsupnas.data.voc import draw_voc

pytestmark = pytest.mark.filterwarnings("ignore:no mask of") # drawn trees lack most classes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    draw_cityscapes(root/"cityscapes", dict(train=9, val=2, train_extra=6))
    return draw_voc(root, dict(train=6, val=4, extra=6))


def config_of(root, folder, data="cityscapes_extra", **parameters):
    return TrainingConfig(**{"folder": str(folder), "data": data, "root": str(root), "crop": (48, 56), "zoom": (0.5, 2.0), "category_ratio": 0.75,
                             "label_fraction": 0.3, "steps": 6, "batch_labelled": 3, "batch_unlabelled": 4, "batch_jigsaw": 5, **parameters})


def batches(config): return list(make_batches(config, load_training_data(config)))


def same(a, b, but=()):
    a, b = ([{"labelled": present(x.labelled), "unlabelled": present(x.unlabelled), "jigsaw": {"image": x.jigsaw}} for x in batches] for batches in (a, b))
    assert len(a) == len(b)
    return all(torch.equal(x[name][key], y[name][key]) for x, y in zip(a, b) for name in x for key in x[name] if key not in but)


@pytest.mark.parametrize("data", ["cityscapes_extra", "voc_aug"])
def test_batches_do_not_depend_on_the_number_of_workers(root, tmp_path, data):
    alone, one, two = (batches(config_of(root, tmp_path, data, workers=n)) for n in (0, 1, 2))
    assert set(present(alone[0])) == {"labelled", "unlabelled", "jigsaw"} and alone[0].labelled.image.shape == (3, 3, 48, 56)
    assert same(alone, one) and same(alone, two)
    assert not same(alone, batches(config_of(root, tmp_path, data, seed=1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_cache(root, tmp_path, workers):
    assert same(batches(config_of(root, tmp_path, workers=workers)), batches(config_of(root, tmp_path, workers=workers, cache_gb=0.)))


def test_a_run_goes_on_at_its_step(root, tmp_path):
    config = config_of(root, tmp_path)
    assert same(batches(config)[4:], list(make_batches(config, load_training_data(config), start=4)))


def test_labels_of_unlabelled_images_reach_no_view(root, tmp_path):
    "Overwritten masks of unlabelled images change only the diagnosis, although the category ratio uses labels."
    config = config_of(root, tmp_path, "cityscapes")
    data = load_training_data(config)
    before = list(make_batches(config, data))
    for name, (_, mask) in zip(data.train.ids, data.train.pairs):
        if name in data.split.unlabelled: Image.fromarray(np.random.default_rng(1).integers(0, 34, np.asarray(Image.open(mask)).shape, dtype=np.uint8)).save(mask)
    kept = dataclasses.replace(config, split_folder=str(save_split(data.split, tmp_path/"split")))
    after = list(make_batches(kept, load_training_data(kept)))
    assert same(before, after, but=("diagnosis_label",)) and not same(before, after)
    assert all(x.jigsaw.shape[1] == 3 for x in before)


def test_a_split_that_was_written_is_read_again(root, tmp_path):
    first = load_training_data(config_of(root, tmp_path/"one", "voc_aug", label_fraction=1/4, seed=7))
    kept = save_split(first.split, tmp_path/"one"/"split")
    again = load_training_data(config_of(root, tmp_path/"two", "voc_aug", label_fraction=1., seed=0, split_folder=str(kept)))
    assert again.split == first.split and len(first.split.labelled) == 3 and not (tmp_path/"two").exists()


def test_a_split_file_that_names_a_part_keeps_every_stream_to_it(root, tmp_path):
    "The grey of each image encodes its number: batches contain only the images of the two lists."
    config = config_of(root, tmp_path, "cityscapes", zoom=(1., 1.), jigsaw_zoom=(1., 1.), crop=None, category_ratio=1., steps=12)
    data = load_training_data(config)
    (tmp_path/"part").mkdir()
    (tmp_path/"part"/"labeled.txt").write_text("\n".join(data.train.ids[2:4])), (tmp_path/"part"/"unlabeled.txt").write_text("\n".join(data.train.ids[5:8]))
    part = load_training_data(dataclasses.replace(config, split_folder=str(tmp_path/"part")))
    read = part.train.read
    part.train.read = lambda i: (np.full_like(read(i)[0], 10 * i), read(i)[1])
    shown = {name: {int(x) // 10 for b in make_batches(config, part) for x in images(b)[:, 0, 0, 0]}
             for name, images in (("labelled", lambda b: b.labelled.image), ("unlabelled", lambda b: b.unlabelled.weak), ("jigsaw", lambda b: b.jigsaw))}
    assert shown == {"labelled": {2, 3}, "unlabelled": {5, 6, 7}, "jigsaw": {2, 3, 5, 6, 7}}


def test_images_of_many_sizes_go_through_all_three_stages(root, tmp_path, command):
    "VOC at its own sizes, cropped for training and uncropped for evaluation; two workers."
    small = {"root": root, "size": None, "crop": (64, 64), "label_fraction": "1/4", "steps": 4, "logs": 2, "layers": 3, "channels": 8, "budget": 0.8,
             "batch_labelled": 2, "batch_unlabelled": 2, "batch_jigsaw": 2, "baselines": "()", "latency_repeats": 2, "workers": 2, "category_ratio": 0.9}
    done = command("demo", "--data", "voc_aug", "--folder", "voc", *(w for pair in small.items() for w in ("-p", *pair)), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = RunRecord.load(tmp_path/"voc"/"evaluate"/"evaluate-record.json")
    network = load_network(tmp_path/"voc"/"retrain")
    report = without_choice_images(load_dataset("voc_aug", "val", root), network.architecture) # two of the four chose the route
    assert record.metrics["split"] == "val" and record.metrics["images"] == len(report) == 2 and record.metrics["size"] == [64, 64]
    by_hand = evaluate_segmenter(network, report, progress=False)
    assert record.metrics["rows"]["searched"]["miou"] == pytest.approx(by_hand.miou, abs=1e-3) and "On the val images" in done.stdout


def test_a_process_that_leaves_a_loader_unfinished_ends():
    "Regression: workers that ignored their parent process once kept one of several processes from ending."
    code = """
import multiprocessing, sys
from selfsupnas.data.datasets import load_dataset
from selfsupnas.data.loaders import Stream, draw_batches
def begin():
    data = load_dataset("streetscenes", "train")
    sys.kept = draw_batches({"some": (Stream(data, data.ids[:4]), 2)}, range(1000), workers=1)
    next(sys.kept)
process = multiprocessing.Process(target=begin)
process.start(); process.join()
raise SystemExit(process.exitcode)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0
