"Faults of a dataset raise early errors that name the file; a damaged file need not end a long run."
import re, shutil, warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from selfsupnas.train.batches import load_training_data, make_batches
from selfsupnas.data.cityscapes import draw_cityscapes
from selfsupnas.cli import main
from selfsupnas.train.config import TrainingConfig
from selfsupnas.core import RunRecord
from selfsupnas.data.datasets import load_dataset
from selfsupnas.data.files import UnreadableFile
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import search
from selfsupnas.data.splits import load_split
from selfsupnas.data.voc import draw_voc

PLACE = "Straßen und Wege" # a blank and a letter beyond ASCII in every path of this file


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    "Drawn datasets in the layouts of Cityscapes, VOC and SBD, CamVid, and a plain folder."
    root = tmp_path_factory.mktemp("data")/PLACE
    draw_cityscapes(root/"cityscapes", dict(train=5, val=2, test=2))
    draw_voc(root, dict(train=5, val=2, extra=4, test=2))
    for split in ("train", "val", "test"):
        for folder in (root/"camvid"/split, root/"camvid"/f"{split}annot", root/"own"/"images"/split, root/"own"/"masks"/split): folder.mkdir(parents=True)
        for i in range(3):
            image = Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 80, 3), dtype=np.uint8))
            mask = Image.fromarray((np.arange(64 * 80) % 3).astype(np.uint8).reshape(64, 80))
            image.save(root/"camvid"/split/f"{split}_{i}.jpg"), mask.save(root/"camvid"/f"{split}annot"/f"{split}_{i}.png")
            image.save(root/"own"/"images"/split/f"Bild {i}.png"), mask.save(root/"own"/"masks"/split/f"Bild {i}.png")
    (root/"own"/"classes.txt").write_text("a\nb\nc\n")
    return root


@pytest.fixture
def data(drawn, tmp_path):
    "A copy of the datasets that tests may damage."
    return shutil.copytree(drawn, tmp_path/PLACE)


def cut(path): path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
def paint(path, number):
    mask = np.asarray(Image.open(path)).copy(); mask[:4, :4] = number
    Image.fromarray(mask).save(path)
def one(root, pattern): return sorted(root.glob(pattern))[1]


FINE, IMAGE = "cityscapes/gtFine/train/*/*labelIds.png", "cityscapes/leftImg8bit/train/*/*.png"
VOC_MASK, VOC_IMAGE, SBD = "VOCdevkit/VOC2012/SegmentationClass/2007*.png", "VOCdevkit/VOC2012/JPEGImages/2007*.jpg", "benchmark_RELEASE/dataset/cls/2009*.mat"
WHILE_READING = { # name -> dataset, file, what is done to it, words of the message beside the file's name
    "truncated PNG image": ("cityscapes", IMAGE, cut, "cannot read the image"),
    "truncated PNG mask": ("cityscapes", FINE, cut, "cannot read the mask"),
    "truncated JPEG": ("voc", VOC_IMAGE, cut, "cannot read the image"),
    "truncated .mat": ("voc_aug", SBD, cut, "cannot read the mask"),
    "empty file": ("camvid", "camvid/train/*.jpg", lambda p: p.write_bytes(b""), "cannot read the image"),
    "no picture at all": ("folder", "own/images/train/*.png", lambda p: p.write_text("a page of a web server: 404"), "cannot read the image"),
    "unknown id, Cityscapes": ("cityscapes", FINE, lambda p: paint(p, 40), r"numbers \[40\].*0 to 33"),
    "train ids in place of ids": ("cityscapes", FINE, lambda p: paint(p, 255), r"numbers \[255\].*0 to 33"),
    "unknown id, VOC": ("voc", VOC_MASK, lambda p: paint(p, 21), r"numbers \[21\].*classes 0 to 20"),
    "unknown id, CamVid": ("camvid", "camvid/trainannot/*.png", lambda p: paint(p, 12), r"numbers \[12\].*0 to 11"),
    "unknown id, folder": ("folder", "own/masks/train/*.png", lambda p: paint(p, 3), r"numbers \[3\].*classes 0 to 2"),
    "label of another size": ("voc", VOC_MASK, lambda p: Image.open(p).resize((30, 20)).save(p), "30 x 20 pixels, its image .* same size"),
    "label of another size, .mat": ("voc_aug", SBD, lambda p: savemat(p, {"GTcls": {"Segmentation": np.zeros((3, 4), np.uint8)}}), "4 x 3 pixels, its image"),
    "coloured mask": ("folder", "own/masks/train/*.png", lambda p: Image.open(p).convert("RGB").save(p), "3 channels"),
    "image of 16 bits": ("folder", "own/images/train/*.png", lambda p: Image.fromarray(np.zeros((64, 80), np.uint16)).save(p), "8 bits"),
    ".mat without the field": ("voc_aug", SBD, lambda p: savemat(p, {"GTcls": {"Boundaries": 0}}), "no mask GTcls.Segmentation, only GTcls"),
}


def draw_all(config): # every image of every stream, and the split before it
    data = load_training_data(config)
    for _ in make_batches(config, data): pass
    return data


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", WHILE_READING)
def test_a_faulty_file_is_named(data, tmp_path, fault, workers):
    name, pattern, spoil, words = WHILE_READING[fault]
    path = one(data, pattern)
    spoil(path)
    root = data/"own" if name == "folder" else data
    config = TrainingConfig(folder=str(tmp_path/"run"), data=name, root=str(root), crop=(48, 48), label_fraction=1., workers=workers,
                            steps=8, batch_labelled=3, w_semi=0., w_jig=0.)
    with pytest.raises(ValueError, match=words) as error: draw_all(config)
    assert str(path) in str(error.value).splitlines()[-1]


def camvid_alone(d): (d/"camvid"/"trainannot"/"train_1.png").unlink()
def no_images(d): shutil.rmtree(d/"cityscapes"/"leftImg8bit"/"train"), (d/"cityscapes"/"leftImg8bit"/"train").mkdir()
def empty_list(d): (d/"VOCdevkit"/"VOC2012"/"ImageSets"/"Segmentation"/"train.txt").write_text("\n")
def split_file(d, line): (d/"split").mkdir(), (d/"split"/"labeled.txt").write_text(line, "utf-8"), (d/"split"/"unlabeled.txt").write_text("")
BEFORE = { # name -> dataset, what is done to the trees, further parameters, words of the message
    "missing root, Cityscapes": ("cityscapes", lambda d: shutil.rmtree(d/"cityscapes"), {}, "no leftImg8bit/ in .*unpack"),
    "missing root, VOC": ("voc", lambda d: shutil.rmtree(d/"VOCdevkit"), {}, "no VOCdevkit/VOC2012/JPEGImages/.*download=True"),
    "missing root, CamVid": ("camvid", lambda d: shutil.rmtree(d/"camvid"), {}, "no train/.*download_camvid"),
    "missing SBD": ("voc_aug", lambda d: shutil.rmtree(d/"benchmark_RELEASE"), {}, "benchmark_RELEASE/dataset/.*SegmentationClassAug.*SBDataset"),
    "empty split, folder": ("cityscapes", no_images, {}, "no image .*leftImg8bit/train"),
    "empty split, list": ("voc", empty_list, {}, "the split is empty"),
    "image without label, CamVid": ("camvid", camvid_alone, {}, "1 of 3 images have no mask.*train_1.jpg needs .*train_1.png"),
    "image without label, Cityscapes": ("cityscapes", lambda d: one(d, FINE).unlink(), {}, "1 of the 5 train images have no fine mask.*labelIds.png"),
    "image without label, VOC": ("voc", lambda d: one(d, VOC_MASK).unlink(), {}, "1 files of VOC train .*2007_000001.png"),
    "listed image that is missing": ("voc", lambda d: one(d, VOC_IMAGE).unlink(), {}, "1 files of VOC train .*2007_000001.jpg"),
    "label fraction of no image": ("cityscapes", None, {"label_fraction": "1/30"}, "0.0333333 of 5 images is less than one image: use 1/5"),
    "split file names a missing image": ("cityscapes", lambda d: split_file(d, "aachen_000000_000019\nleftImg8bit/train/aachen/aachen_000009_000019_leftImg8bit.png x"),
                                         {"split_folder": "split"}, "labeled.txt, line 2: .*aachen_000009.* names no image of Cityscapes \\(synthetic\\)"),
    "split file of another set": ("voc", lambda d: split_file(d, "img/000000.jpg"), {"split_folder": "split"}, "line 1: .*names no image of PASCAL VOC 2012 .*2007_000000"),
    "no split file": ("voc", None, {"split_folder": "split"}, "no split file .*labeled.txt"),
    "images of many sizes, no crop": ("voc", None, {"crop": "None"}, "differ in size: set crop"),
    "unknown dataset": ("cityscape", None, {}, "no dataset 'cityscape'; there are .*cityscapes"),
}


@pytest.mark.parametrize("fault", BEFORE)
def test_the_command_refuses_it_before_anything_runs(data, tmp_path, monkeypatch, capsys, fault):
    name, spoil, parameters, words = BEFORE[fault]
    if spoil: spoil(data)
    monkeypatch.chdir(data)
    words_given = [w for pair in {"data": name, "root": str(data), "crop": "(48, 48)", "label_fraction": "1/2", **parameters}.items() for w in ("-p", *pair)]
    assert main(["search", "--folder", str(tmp_path/"run"), *words_given]) == 2
    out, err = capsys.readouterr()
    assert re.search(words, err) and err.count("\n") - err.count("is the form of version 0.1") == 1 and "Traceback" not in err and "running" not in out
    assert not (tmp_path/"run").exists()


def test_a_run_that_meets_a_fault_ends_with_its_message(data, tmp_path, command):
    path = one(data, IMAGE) # a mask would be met before the run
    cut(path)
    done = command("search", "--folder", tmp_path/"run", *(w for pair in {
        "data": "cityscapes", "root": data, "label_fraction": 1, "steps": 4, "logs": 1, "layers": 2, "channels": 8, "budget": .9, "workers": 1,
        "batch_labelled": 5, "w_semi": 0, "w_jig": 0}.items() for w in ("-p", *pair)), cwd=tmp_path)
    own = done.stderr[done.stderr.rindex("selfsupnas search: failed"):] # a kernel that ends on a busy machine may complain before
    assert done.returncode == 1 and "Traceback" not in own
    assert re.search(rf"failed: \S*(Error|UnreadableFile): .*cannot read the image {re.escape(str(path))}", done.stderr, re.M)


SHORT = dict(label_fraction=1., steps=6, logs=2, layers=2, channels=8, budget=.9, batch_labelled=4, batch_unlabelled=4, batch_jigsaw=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_corrupt_image_in_a_run(data, tmp_path, workers):
    "With skip_unreadable, damaged files are skipped and counted in training and validation, the same for any number of workers."
    for split in ("train", "val"): cut(one(data, f"cityscapes/leftImg8bit/{split}/*/*.png"))
    config = SearchConfig(folder=str(tmp_path/"run"), data="cityscapes", root=str(data), workers=workers, **SHORT)
    with pytest.raises(UnreadableFile, match="cannot read the image .*leftImg8bit"): search(config)
    config.skip_unreadable = True
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = search(config)
    assert found.record.metrics["unreadable_files"] == 2
    assert list(found.data.train.unreadable) == ["aachen_000002_000019"] and list(found.data.val.unreadable) == ["lindau_000001_000019"]
    if not workers: assert sum("skipped: cannot read the image" in str(w.message) for w in said) == 2
    assert "lindau_000001" in str(found.data.val.unreadable)


def test_damaged_files_in_every_place_of_a_run(data, tmp_path, command):
    "A damaged validation image, labelled image and mask: the executed notebook still shows the others."
    cut(sorted(data.glob("cityscapes/leftImg8bit/val/*/*.png"))[0]), cut(one(data, IMAGE)), cut(sorted(data.glob(FINE))[2])
    words = [w for pair in {"data": "cityscapes", "root": data, "skip_unreadable": True, **SHORT, "w_semi": 0, "label_fraction": "3/5"}.items() for w in ("-p", *pair)]
    done = command("search", "--folder", "run", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = RunRecord.load(tmp_path/"run"/"search-record.json")
    assert record.metrics["unreadable_files"] == 3 and record.parameters["skip_unreadable"]
    assert "skipped: cannot read the mask" in done.stderr + (tmp_path/"run"/"search.ipynb").read_text("utf8")


def test_the_survey_lists_what_is_faulty_and_says_so_by_its_status(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cut(one(data, VOC_IMAGE)), paint(one(data, VOC_MASK.replace("2007", "2008")), 77)
    assert main(["data", "voc", str(data)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"2007_000001: cannot read the image .*2007_000001.jpg", out) and re.search(r"2008_000001: .*\[77\]", out)
    assert "[train] PASCAL VOC 2012 (synthetic): 5 images (the published archive has 1,464)" in out and out.count("unreadable or faulty: 1 of") == 2
    assert {p.name for p in (tmp_path/"runs"/"data-voc").iterdir()} == {"train.png", "val.png", "test.png"}
    assert main(["data", "camvid", str(data/"nowhere")]) == 2 and "download_camvid" in capsys.readouterr().err


def test_names_beyond_ascii_in_split_files(data, tmp_path):
    own = load_dataset("folder", "train", data/"own")
    (tmp_path/"labeled.txt").write_text("images/train/Bild 1.png masks/train/Bild 1.png\n", "utf-8")
    (tmp_path/"unlabeled.txt").write_text("train/Bild 0\nimages/train/Bild 2.png\n", "utf-8")
    split = load_split(tmp_path, own)
    assert split.labelled == ["train/Bild 1"] and split.unlabelled == ["train/Bild 0", "train/Bild 2"]


@pytest.mark.parametrize("name", ["cityscapes", "voc"])
def test_a_test_split_without_labels_is_not_evaluated(data, capsys, monkeypatch, name):
    monkeypatch.chdir(data)
    assert main(["demo", "--data", name, "-p", "root", str(data), "-p", "split", "test", "-p", "label_fraction", "1/2"]) == 2
    err = capsys.readouterr().err
    assert "test has no labels here" in err and "split=val" in err and not Path("runs").exists()
