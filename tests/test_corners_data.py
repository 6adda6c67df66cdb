"Corners of users' data: what almost fits is said before anything runs, and what can be read without a doubt is read."
import shutil, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsupnas.batches import load_training_data
from selfsupnas.cli import main
from selfsupnas.config import TrainingConfig
from selfsupnas.core import read_json, read_text
from selfsupnas.data import FolderDataset, load_dataset, read_classes
from selfsupnas.splits import load_split
from selfsupnas.voc import read_names

H, W = 64, 80


def save(path, array, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **how)
    return path

def photo(seed, h=H, w=W): return np.random.default_rng(seed).integers(0, 255, (h, w, 3), dtype=np.uint8)
def halves(low=0, high=1): return np.where(np.arange(W) < W // 2, low, high).astype(np.uint8) * np.ones((H, 1), np.uint8)

def draw(root, mask=halves, count=3, classes="background\nthing\n", splits=("train", "val", "test")):
    "Splits of a few images; `mask` makes the mask of an image, or is a dict of such functions by split."
    for s, split in enumerate(splits):
        for i in range(count):
            save(root/"images"/split/f"{i}.png", photo(10 * s + i))
            save(root/"masks"/split/f"{i}.png", (mask[split] if isinstance(mask, dict) else mask)())
    (root/"classes.txt").write_text(classes, "utf-8")
    return root

@pytest.fixture
def root(tmp_path): return draw(tmp_path/"own")

def config(root, **more): return TrainingConfig(folder=str(Path(root)/"run"), data="folder", root=str(root), label_fraction=1., **more)

def look(root, capsys, *words): # status and text of `selfsupnas data`
    status = main(["data", "folder", str(root), "--folder", str(root/"look"), *words])
    said = capsys.readouterr()
    return status, said.out + said.err

def warned(act): # what it warns of
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in said]


# Text files

def labels_of(root, text, name="labeled.txt", encoding="utf-8"):
    (root/"split").mkdir(exist_ok=True)
    (root/"split"/name).write_bytes(text.encode(encoding))
    (root/"split"/"unlabeled.txt").write_text("train/1\n")
    return load_split(root/"split", load_dataset("folder", "train", root)).labelled


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "  \n", "\n\n"])
def test_text_files_as_editors_leave_them(root, encoding, end):
    "A mark at the beginning (BOM), any line ends, blanks behind a name and blank lines."
    (root/"classes.txt").write_bytes(end.join(["Straße", "thing", ""]).encode(encoding))
    assert FolderDataset(root, "train").spec.classes == ("Straße", "thing")
    assert labels_of(root, end.join(["train/0", "images/train/2.png masks/train/2.png", ""]), encoding=encoding) == ["train/0", "train/2"]
    (root/"ids.txt").write_bytes(end.join(["2007_000032", "/JPEGImages/2007_000039.jpg /SegmentationClass/2007_000039.png", ""]).encode(encoding))
    assert read_names(root/"ids.txt") == ["2007_000032", "2007_000039"]
    (root/"a.json").write_bytes('{"a": 1}'.encode(encoding))
    assert read_json(root/"a.json", "a file") == {"a": 1}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_text_in_another_encoding_is_refused(root, encoding):
    text = "Straße\nthing\n"
    (root/"classes.txt").write_bytes(text.encode(encoding))
    for read in (lambda: FolderDataset(root, "train"), lambda: read_text(root/"classes.txt", "a list"), lambda: read_names(root/"classes.txt")):
        with pytest.raises(ValueError, match="UTF-8") as error: read()
        assert str(root/"classes.txt") in str(error.value)
        assert ("UTF-16" in str(error.value)) == encoding.startswith("utf-")


def test_what_else_stands_in_a_list_of_classes(root):
    def classes(text):
        (root/"classes.txt").write_text(text, "utf-8")
        found = FolderDataset(root, "train").spec
        return found.classes, found.palette
    plain = classes("road\nlow house\n")
    assert classes("# of our street\nroad\n\n  # two\nlow house\n") == plain, "comments"
    assert classes("0 road\n1 low house\n") == classes("0: road\n1: low house\n") == classes("0,road\n1,low house") == plain, "numbers"
    colours = ((128, 64, 128), (9, 0, 255))
    for text in ("road 128 64 128\nlow house 9 0 255\n", "road,128,64,128\nlow house, 9, 0, 255", "road;128;64;128\nlow house;9;0;255", "0 road 128 64 128\n1 low house 9 0 255\n",
                 "road\t128\t64\t128\nlow house\t9\t0\t255\n"):
        assert classes(text) == (("road", "low house"), colours), text
    (root/"classes.txt").write_text("lane 1 2 3\nlane 2\n")
    assert read_classes(root/"classes.txt") == ["lane 1 2 3", "lane 2"], "a column has an entry in every line"
    for wrong, words in (("road\nhouse\nroad\n", "road.*twice"), ("road 1 2 3\nroad 4 5 6\n", "road.*twice"), ("1 road\n0 house\n", "0, 1"), ("1 road\n2 house\n", "0, 1"),
                         ("road 300 0 0\nhouse 0 0 0\n", "300.*255"), ("# road\n# house\n", "fewer than 2")):
        (root/"classes.txt").write_text(wrong)
        with pytest.raises(ValueError, match=words) as error: FolderDataset(root, "train")
        assert str(root/"classes.txt") in str(error.value)


def test_comments_in_a_split_file(root):
    assert labels_of(root, "# made by hand\ntrain/0\n\n  # and\ntrain/2\n") == ["train/0", "train/2"]
    with pytest.raises(ValueError, match="line 2.*train/9"): labels_of(root, "# one\ntrain/9\n")
