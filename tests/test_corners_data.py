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
from selfsupnas.pairs import image_file_size, read_image, read_mask
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


# Images that a camera turned

TYPES = {".jpg": {"quality": 95}, ".png": {}, ".tif": {}, ".webp": {"lossless": True}}

def noted(number): # an EXIF block with that orientation
    exif = Image.new("RGB", (1, 1)).getexif()
    exif[0x0112] = number
    return exif

def by_hand(array, number): # what the standard says of row 0 and column 0
    return {1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.swapaxes(0, 1), 6: np.rot90(array, -1), 7: np.rot90(array, 2).swapaxes(0, 1), 8: np.rot90(array, 1),
            9: array}[number]

def xmp(number): return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="{number}"/></x:xmpmeta>'


@pytest.mark.parametrize("suffix", TYPES)
@pytest.mark.parametrize("number", range(1, 10))
def test_images_are_read_upright_and_their_headers_agree(tmp_path, suffix, number):
    stored = photo(1)
    path = save(tmp_path/f"a{suffix}", stored, exif=noted(number), **TYPES[suffix])
    seen = read_image(path)
    assert seen.shape == by_hand(stored, number).shape and image_file_size(path) == seen.shape[:2]
    assert np.abs(seen.astype(int) - by_hand(stored, number)).max() == 0 or suffix == ".jpg"


@pytest.mark.parametrize("place", ["before", "behind", "text", "xmp"])
def test_where_a_png_may_note_its_orientation(tmp_path, place):
    from PIL.PngImagePlugin import PngInfo
    notes, stored = PngInfo(), photo(1)
    raw = noted(6).tobytes()
    if place == "text": notes.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=True) # as ImageMagick does
    if place == "xmp": notes.add_itxt("XML:com.adobe.xmp", xmp(6))
    path = save(tmp_path/"a.png", stored, pnginfo=notes, **({"exif": noted(6)} if place in ("before", "behind") else {}))
    if place == "behind": # the standard allows that chunk on either side of the pixels
        data = path.read_bytes()
        start = data.index(b"eXIf") - 4
        chunk = data[start:start + 12 + int.from_bytes(data[start:start + 4], "big")]
        data = data.replace(chunk, b"")
        path.write_bytes(data[:-12] + chunk + data[-12:])
    assert read_image(path).shape == (W, H, 3) and image_file_size(path) == (W, H)


@pytest.mark.parametrize("suffix", TYPES)
def test_turned_images_without_a_label(root, capsys, suffix):
    save(root/"images"/"unlabelled"/f"a{suffix}", photo(40), exif=noted(6))
    save(root/"images"/"unlabelled"/f"b{suffix}", photo(41))
    data = FolderDataset(root, "train")
    image, label = data[data.ids.index("unlabelled/a")]
    assert image.shape == (3, W, H) and label.shape == (W, H) and (label == 255).all() and data.label(3).shape == (W, H)
    status, said = look(root, capsys)
    assert status == 0 and "80x64 (1)" in said and "None" not in said
    assert [line for line in said.splitlines() if "turned" in line and "EXIF" in line and "1 " in line]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("number", [3, 6, 8])
def test_a_mask_is_turned_by_its_own_note(root, suffix, number):
    "As any viewer shows it; an image and a mask that were stored alike stay a pair."
    for old in root.glob("*/train/0.png"): old.unlink()
    stored = np.arange(H * W).reshape(H, W) // 300 % 2
    save(root/"images"/"train"/"0.jpg", photo(1), exif=noted(number))
    mask = save(root/"masks"/"train"/f"0{suffix}", stored.astype(np.uint8), exif=noted(number))
    assert np.array_equal(read_mask(mask), by_hand(stored, number))
    palette = Image.fromarray(stored.astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 9, 9, 9]); palette.save(root/f"p{suffix}", exif=noted(number))
    assert np.array_equal(read_mask(root/f"p{suffix}"), by_hand(stored, number))
    image, label = FolderDataset(root, "train")[0]
    assert image.shape[1:] == label.shape == by_hand(stored, number).shape


def test_a_mask_of_the_stored_image_beside_a_turned_one(root):
    "The sizes are swapped: the message says why."
    save(root/"images"/"train"/"1.png", photo(1), exif=noted(6))
    with pytest.raises(ValueError, match="80 x 64.*64 x 80.*EXIF") as error: FolderDataset(root, "train")[1]
    assert str(root/"masks"/"train"/"1.png") in str(error.value)
