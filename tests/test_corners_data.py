"Corner cases of users' data: faults are reported before anything runs, and unambiguous data are read."
import dataclasses, json, re, shutil, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder
from PIL import Image

from selfsupnas.train.batches import load_training_data
from selfsupnas.stages.evaluation import EvaluateConfig
from selfsupnas.data.cityscapes import draw_cityscapes
from selfsupnas.cli import main
from selfsupnas.train.config import TrainingConfig
from selfsupnas.core import progress_bar, read_json, read_text
from selfsupnas.data.datasets import FolderDataset, class_lines, load_dataset
from selfsupnas.metrics import Metrics, confusion_figure, record_metrics, metrics_text
from selfsupnas.data.files import image_file_size, read_image, read_mask
from selfsupnas.train.log import RunLog, log_line
from selfsupnas.train.step import Losses, LossWeights, StepMetrics
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.show import save_figure, show_samples
from selfsupnas.data.splits import load_split
from selfsupnas.cli import check_inputs
from selfsupnas.data.voc import draw_voc, read_names

H, W = 64, 80


def save(path, array, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **how)
    return path

def photo(seed, h=H, w=W): return np.random.default_rng(seed).integers(0, 255, (h, w, 3), dtype=np.uint8)
def halves(low=0, high=1): return np.where(np.arange(W) < W // 2, low, high).astype(np.uint8) * np.ones((H, 1), np.uint8)

def draw(root, mask=halves, count=3, classes="background\nthing\n", splits=("train", "val", "test")):
    "Write splits of a few images; `mask` returns the mask of an image, or is a dict of such functions by split."
    for s, split in enumerate(splits):
        for i in range(count):
            save(root/"images"/split/f"{i}.png", photo(10 * s + i))
            save(root/"masks"/split/f"{i}.png", (mask[split] if isinstance(mask, dict) else mask)())
    (root/"classes.txt").write_text(classes, "utf-8")
    return root

@pytest.fixture
def root(tmp_path): return draw(tmp_path/"own")

def config(root, **more): return TrainingConfig(folder=str(Path(root)/"run"), data="folder", root=str(root), label_fraction=1., **more)

@pytest.fixture(autouse=True)
def no_sheets(monkeypatch): # they take most of the time, and tests/test_data_faults.py tests them
    monkeypatch.setattr("selfsupnas.data.inspection.sample_sheet", lambda *_: None), monkeypatch.setattr("selfsupnas.show.save_figure", lambda *_: "none")

def look(root, capsys, *words):
    "Exit status and output of `selfsupnas data`."
    status = main(["data", "folder", str(root), "--folder", str(root/"look"), *words])
    said = capsys.readouterr()
    return status, said.out + said.err

def warned(act):
    "Messages of the warnings of a call."
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
    "With a byte order mark, any line ends, trailing blanks and blank lines."
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
    assert class_lines(root/"classes.txt")[0] == ["lane 1 2 3", "lane 2"], "a column has an entry in every line"
    for wrong, words in (("road\nhouse\nroad\n", "road.*twice"), ("road 1 2 3\nroad 4 5 6\n", "road.*twice"), ("1 road\n0 house\n", "0, 1"), ("1 road\n2 house\n", "0, 1"),
                         ("road 300 0 0\nhouse 0 0 0\n", "300.*255"), ("# road\n# house\n", "fewer than 2")):
        (root/"classes.txt").write_text(wrong)
        with pytest.raises(ValueError, match=words) as error: FolderDataset(root, "train")
        assert str(root/"classes.txt") in str(error.value)


def test_comments_in_a_split_file(root):
    assert labels_of(root, "# made by hand\ntrain/0\n\n  # and\ntrain/2\n") == ["train/0", "train/2"]
    with pytest.raises(ValueError, match="line 2.*train/9"): labels_of(root, "# one\ntrain/9\n")


def test_lists_of_other_systems(root):
    "Paths with backslashes, and accents as separate characters (decomposed Unicode)."
    for kind in ("images", "masks"): (root/kind/"train"/"0.png").rename(root/kind/"train"/"e\u0301te\u0301.png")
    assert labels_of(root, "images\\train\\2.png masks\\train\\2.png\ntrain/\u00e9t\u00e9\n") == ["train/2", "train/e\u0301te\u0301"]


# Images with an EXIF orientation

TYPES = {".jpg": {"quality": 95}, ".png": {}, ".tif": {}, ".webp": {"lossless": True}}

def noted(number):
    "An EXIF block with that orientation."
    exif = Image.new("RGB", (1, 1)).getexif()
    exif[0x0112] = number
    return exif

def by_hand(array, number):
    "The upright array of an EXIF orientation, as the standard defines it."
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
    if place == "behind": # the standard allows the chunk before or after the pixels
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
    "As in image viewers; an image and a mask with the same orientation stay aligned."
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
    "The message explains why the sizes are swapped."
    save(root/"images"/"train"/"1.png", photo(1), exif=noted(6))
    with pytest.raises(ValueError, match="80 x 64.*64 x 80.*EXIF") as error: FolderDataset(root, "train")[1]
    assert str(root/"masks"/"train"/"1.png") in str(error.value)


# British and American spelling

@pytest.mark.parametrize("name", ["unlabelled", "unlabeled"])
@pytest.mark.parametrize("layout", ["divided", "flat"])
def test_images_without_a_label_in_both_spellings(tmp_path, name, layout):
    root = draw(tmp_path/"own")
    if layout == "flat":
        for kind in ("images", "masks"):
            for path in sorted((root/kind).glob("*/*.png")): path.rename(root/kind/f"{path.parent.name}-{path.name}")
            for split in ("train", "val", "test"): (root/kind/split).rmdir()
    save(root/"images"/name/"a.png", photo(40))
    data = FolderDataset(root, "train")
    assert data.ids[-1] == f"{name}/a" and data.ids[-1] not in data.labelled_ids and data.image(len(data) - 1).shape == (3, H, W)
    (root/"split").mkdir()
    (root/"split"/"labeled.txt").write_text(f"{data.ids[0]}\n"), (root/"split"/"unlabeled.txt").write_text(f"{name}/a\n")
    assert load_split(root/"split", data).unlabelled == [data.ids[-1]]


def test_both_spellings_of_a_folder_at_once_are_refused(root, capsys):
    for name in ("unlabelled", "unlabeled"): save(root/"images"/name/"a.png", photo(40))
    with pytest.raises(ValueError, match="unlabelled.*unlabeled") as error: load_training_data(config(root))
    assert str(root/"images"/"unlabeled") in str(error.value)
    status, said = look(root, capsys)
    assert status == 1, said
    assert "[train]" in said and "[val]" in said and str(root/"images"/"unlabelled") in said


@pytest.mark.parametrize("names", [("labeled.txt", "unlabeled.txt"), ("labelled.txt", "unlabelled.txt"), ("labeled.txt", "unlabelled.txt")])
def test_split_files_in_both_spellings(root, names):
    (root/"split").mkdir()
    for name, line in zip(names, ("train/0", "train/1")): (root/"split"/name).write_text(line + "\n")
    split = load_training_data(config(root, split_folder=str(root/"split"))).split
    assert (split.labelled, split.unlabelled) == (["train/0"], ["train/1"])
    for name, other in zip(names, ("labelled.txt", "unlabelled.txt") if names[0] == "labeled.txt" else ("labeled.txt", "unlabeled.txt")):
        if name == other: continue
        (root/"split"/other).write_text("")
        with pytest.raises(ValueError, match="both") as error: load_split(root/"split", FolderDataset(root, "train"))
        assert str(root/"split"/name) in str(error.value) and str(root/"split"/other) in str(error.value)
        (root/"split"/other).unlink()
    (root/"split"/names[1]).unlink()
    with pytest.raises(FileNotFoundError, match="unlabeled.txt"): load_split(root/"split", FolderDataset(root, "train"))


# Missing files and unused files

def test_a_missing_mask_is_a_fault_and_the_rest_is_surveyed(root, capsys):
    (root/"masks"/"train"/"1.png").unlink()
    shutil.copy(root/"images"/"train"/"1.png", root/"images"/"val"/"1.png"), shutil.copy(root/"images"/"test"/"0.png", root/"images"/"test"/"spare")
    status, said = look(root, capsys)
    assert status != 0 and all(f"[{split}] own" in said for split in ("train", "val", "test")) and "] missing" not in said
    assert f"cannot read the mask {root/'masks'/'train'/'1.png'}" in said and "unreadable or faulty: 1 of 3" in said
    assert "train/1" in said and "val/1" in said.splitlines()[-1], "the leak is found with the image whose mask is missing"
    save(root/"images"/"val"/"1.png", photo(60))
    status, said = look(root, capsys)
    assert status == 1 and "no image is in two splits: 9 compared" in said
    with pytest.raises(FileNotFoundError, match="1 of 3 images have no mask") as error: load_training_data(config(root))
    assert str(root/"masks"/"train"/"1.png") in str(error.value)


def test_a_damaged_image_does_not_end_the_search_for_leaks(root, capsys):
    (root/"images"/"train"/"1.png").write_bytes(b"")
    status, said = look(root, capsys)
    assert status == 1 and "no image is in two splits: 8 compared" in said


@pytest.mark.parametrize("spoil, names", [
    ("a mask of another type", "masks/train/1.jpg"), ("a mask without an image", "masks/train/9.png"), ("no image in train", "images/train"), ("no folder of masks", "masks/train"),
    ("two files of one name", "images/train/1.png and 1.jpg"), ("all images in a folder below", "images/train/berlin/0.png")])
def test_what_data_says_of_a_faulty_split(root, capsys, spoil, names):
    train, masks = root/"images"/"train", root/"masks"/"train"
    if spoil == "a mask of another type": (masks/"1.png").rename(masks/"1.jpg")
    if spoil == "a mask without an image": save(masks/"9.png", halves())
    if spoil == "no image in train": [p.unlink() for p in train.iterdir()]
    if spoil == "no folder of masks": shutil.rmtree(masks)
    if spoil == "two files of one name": save(train/"1.jpg", photo(3))
    if spoil == "all images in a folder below": (train/"berlin").mkdir(), [p.rename(train/"berlin"/p.name) for p in train.glob("*.png")]
    status, said = look(root, capsys)
    assert status == 1 and names in said and "[train]" in said and "no image is in two splits" in said
    for split in ("val", "test"): assert f"[{split}] own: 3 images" in said


def test_splits_that_are_not_there_are_no_fault(tmp_path, capsys):
    status, said = look(draw(tmp_path/"own", splits=("train", "val")), capsys)
    assert status == 0 and "[test] missing" in said
    status, said = look(tmp_path/"own", capsys, "--split", "test")
    assert status == 2 and str(tmp_path/"own"/"images"/"test") in said


@pytest.mark.parametrize("name, spoil", [("cityscapes", "gtFine/train/*/*_labelIds.png"), ("voc", "SegmentationClass/2007*.png"), ("voc", "JPEGImages/2007*.jpg"), ("camvid", "trainannot/*.png")])
def test_a_missing_file_of_other_layouts(tmp_path, capsys, name, spoil):
    draw_cityscapes(tmp_path/"cityscapes", dict(train=3, val=2)), draw_voc(tmp_path, dict(train=3, val=2))
    for split in ("train", "val"):
        for i in range(2): save(tmp_path/"camvid"/split/f"{i}.png", photo(i)), save(tmp_path/"camvid"/f"{split}annot"/f"{i}.png", halves())
    path = sorted(tmp_path.glob(f"**/{spoil}"))[0]
    path.unlink()
    assert main(["data", name, str(tmp_path), "--folder", str(tmp_path/"look")]) == 1
    said = capsys.readouterr().out
    assert str(path) in said and "[val]" in said and "unreadable or faulty: 1 of" in said
    with pytest.raises(FileNotFoundError): load_dataset(name, "train", tmp_path)


UNUSED = {"an image in a folder below": "images/train/berlin/x.png", "an image of another type": "images/train/x.gif", "a mask of another type": "masks/train/x.gif",
          "a mask without an image": "masks/train/x.png", "a folder that is no split": "images/validation/x.png", "an image outside the splits": "images/x.png",
          "a raw image": "images/unlabelled/x.heic", "a table": "images/train/x.csv"}

@pytest.mark.parametrize("what", UNUSED)
def test_files_that_nothing_reads_are_counted_and_named(root, capsys, what):
    for i in range(2): save(root/UNUSED[what].replace("x.", f"x{i}."), halves(), **{"format": "PNG"})
    status, said = look(root, capsys)
    line = [line for line in said.splitlines() if UNUSED[what].replace("x.", "x0.") in line]
    assert len(line) == 1 and "2 " in line[0] and status == int(what == "a mask without an image")
    said = [w for w in warned(lambda: load_training_data(config(root))) if "x0." in w]
    assert len(said) == 1 and "2 " in said[0] and str(root) in said[0]


def test_many_kinds_are_one_warning_and_system_files_none(root, capsys):
    for name in (".DS_Store", "Thumbs.db", "._0.png", "desktop.ini", "__MACOSX/0.png"):
        for kind in ("images", "masks"):
            (root/kind/"train"/name).parent.mkdir(exist_ok=True)
            (root/kind/"train"/name).write_bytes(b"0")
    assert not warned(lambda: load_training_data(config(root)))
    status, said = look(root, capsys)
    assert status == 0 and "10 " in [line for line in said.splitlines() if "Thumbs.db" in line or ".DS_Store" in line][0]
    for path in UNUSED.values(): save(root/path, halves(), format="PNG")
    assert len(warned(lambda: load_training_data(config(root)))) == 1


def test_a_split_under_another_name(root, capsys):
    for kind in ("images", "masks"): (root/kind/"train").rename(root/kind/"Train")
    status, said = look(root, capsys)
    assert "[train] missing" in said and said.count("images/Train/0.png") == 1 and "6 " in [line for line in said.splitlines() if "images/Train/0.png" in line][0]


def test_a_folder_without_divided_splits_names_what_it_passes_over(tmp_path, capsys):
    root = tmp_path/"own"
    for i in range(10): save(root/"images"/f"{i}.png", photo(i)), save(root/"masks"/f"{i}.png", halves())
    (root/"classes.txt").write_text("a\nb\n")
    assert look(root, capsys)[0] == 0 and not warned(lambda: load_training_data(config(root)))
    save(root/"masks"/"x.png", halves()), save(root/"images"/"berlin"/"y.png", photo(30)), save(root/"images"/"z.gif", photo(31))
    status, said = look(root, capsys)
    assert status == 1 and all(said.count(name) == 1 for name in ("masks/x.png", "images/berlin/y.png", "images/z.gif"))
    assert len(warned(lambda: load_training_data(config(root)))) == 1


# Masks from which nothing can be learned

def one(number): return lambda: np.full((H, W), number, np.uint8)
def parts(*numbers): return lambda: np.array(numbers, np.uint8)[np.arange(W) * len(numbers) // W] * np.ones((H, 1), np.uint8)
GOOD = halves
FAULTY = { # name: (masks, classes, pattern of the message)
    "0/255, two classes": (parts(0, 255), "a\nb\n", "0/255"),
    "0/255, five classes": (parts(0, 255), "a\nb\nc\nd\ne\n", "0/255"),
    "0/255, in val alone": ({"train": GOOD, "val": parts(0, 255), "test": GOOD}, "a\nb\n", "0/255"),
    "0/255, in train alone": ({"train": parts(0, 255), "val": GOOD, "test": GOOD}, "a\nb\n", "0/255"),
    "all 255": (one(255), "a\nb\n", "255"),
    "all 255, in train alone": ({"train": one(255), "val": GOOD, "test": GOOD}, "a\nb\n", "255"),
    "all 255, in val alone": ({"train": GOOD, "val": one(255), "test": GOOD}, "a\nb\n", "255"),
    "0/128": (parts(0, 128), "a\nb\n", r"\[128\].*0 to 1.*grey"),
    "0/128/255": (parts(0, 128, 255), "a\nb\nc\n", r"\[128\].*0 to 2.*grey"),
    "0/127/254": (parts(0, 127, 254), "a\nb\nc\n", r"\[127, 254\].*0 to 2.*grey"),
    "1/2": (parts(1, 2), "a\nb\n", r"\[2\].*0 to 1.*subtract 1"),
    "1/2/3 and void": (parts(1, 2, 3, 255), "a\nb\nc\n", r"\[3\].*0 to 2.*subtract 1"),
    "2 alone, of two": (one(2), "a\nb\n", r"\[2\].*0 to 1.*subtract 1"),
    "1 to 255": (parts(1, 255), "a\n b\n".replace(" ", ""), None)}


@pytest.mark.parametrize("fault", [name for name, (_, _, words) in FAULTY.items() if words])
def test_masks_that_are_refused_before_anything_runs(tmp_path, capsys, fault):
    mask, classes, words = FAULTY[fault]
    root = draw(tmp_path/"own", mask, classes=classes)
    split = "val" if "val alone" in fault else "train"
    with pytest.raises(ValueError, match=words) as error: load_training_data(config(root))
    assert str(root) in str(error.value) and split in str(error.value)
    with pytest.raises(ValueError, match=words): load_training_data(config(root, class_weights="median_frequency"))
    for stage in (["search"], ["retrain", "-p", "architecture", "unet_resnet18", "-p", "w_jig", "0"]):
        assert main([*stage, "--folder", str(root/"run"), "-p", "data", "folder", "-p", "root", str(root), "-p", "label_fraction", "1"]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") - err.count("is the form of version 0.1") == 1 and str(root) in err and "running" not in out and not (root/"run").exists()
    status, said = look(root, capsys)
    assert status == 1 and re.search(words, said) and f"[{split}]" in said


@pytest.mark.parametrize("skip", [False, True])
def test_a_conversion_is_said(tmp_path, skip):
    with pytest.raises(ValueError, match=r"mask == 255\] = 1") as error: load_training_data(config(draw(tmp_path/"own", parts(0, 255)), skip_unreadable=skip))
    assert "ignore" in str(error.value)


@pytest.mark.parametrize("which", [("split_folder", "labeled.txt"), ("label_fraction", None)])
def test_only_the_labelled_part_is_void(root, which):
    save(root/"masks"/"train"/"0.png", one(255)())
    (root/"split").mkdir()
    (root/"split"/"labeled.txt").write_text("train/0\n"), (root/"split"/"unlabeled.txt").write_text("train/1\ntrain/2\n")
    if which[0] == "split_folder":
        with pytest.raises(ValueError, match="255.*train|train.*255") as error: load_training_data(config(root, split_folder=str(root/"split")))
        assert str(root) in str(error.value) and "1 images" in str(error.value)
        save(root/"masks"/"train"/"0.png", parts(0, 255)())
        with pytest.raises(ValueError, match="0/255"): load_training_data(config(root, split_folder=str(root/"split")))
    else: # a random split covers the classes that occur
        found = load_training_data(dataclasses.replace(config(root), label_fraction=1 / 3)).split.labelled
        assert "train/0" not in found


def test_some_void_masks_are_counted(root, capsys):
    save(root/"masks"/"train"/"0.png", one(255)())
    status, said = look(root, capsys)
    assert status == 0 and "1 of them have no labelled pixel" in said and not warned(lambda: load_training_data(config(root)))


def test_damaged_masks_may_be_left_out_by_the_checks_too(root):
    (root/"masks"/"test"/"0.png").write_bytes(b""), (root/"masks"/"train"/"0.png").write_bytes(b"")
    for skip in (True, False):
        for stage, asked in (("evaluate", EvaluateConfig(network=str(root), data="folder", root=str(root), skip_unreadable=skip)), ("search", SearchConfig(data="folder", root=str(root), skip_unreadable=skip, label_fraction=1.))):
            def check(): warned(lambda: check_inputs(stage, asked, later=True))
            if skip: check()
            else:
                with pytest.raises(ValueError, match="0.png"): check()


def test_without_a_supervised_term_no_label_is_asked_for(tmp_path):
    data = load_training_data(config(draw(tmp_path/"own", one(255)), w_sup=0., w_semi=0.))
    assert len(data.train) == 3 and not data.split.labelled


@pytest.mark.parametrize("mask", [one(0), one(1), parts(1, 255)])
def test_masks_of_one_class_are_a_warning(tmp_path, capsys, mask):
    root = draw(tmp_path/"own", mask, classes="sky\nroad\ntree\n")
    said = warned(lambda: load_training_data(config(root)))
    assert len(said) == 2 and all(("sky" in w or "road" in w) and str(root) in w and split in w for w, split in zip(sorted(said), ("train", "val")))
    status, text = look(root, capsys)
    assert status == 0 and text.count("one class") == 3


@pytest.mark.parametrize("bits", ["1-bit", "boolean", "palette", "bmp", "tif"])
def test_masks_of_one_bit_are_zero_and_one(root, bits):
    for split in ("train", "val"):
        for path in (root/"masks"/split).glob("*.png"):
            mask = Image.fromarray(halves() > 0)
            assert mask.mode == "1"
            if bits == "palette": mask = mask.convert("P")
            if bits in ("bmp", "tif"): path.unlink()
            mask.save(path.with_suffix(f".{bits}") if bits in ("bmp", "tif") else path)
    if bits == "palette": return # the numbers that Pillow writes are refused or read, see above
    assert not warned(lambda: load_training_data(config(root)))
    assert np.array_equal(FolderDataset(root, "train")[0][1], halves())


def test_few_masks_are_read_where_all_is_well(tmp_path, monkeypatch):
    root, read = draw(tmp_path/"own", count=40), []
    monkeypatch.setattr(FolderDataset, "decode", lambda self, path: read.append(path) or read_mask(path))
    load_training_data(config(root))
    assert len(read) < 80


# No mean over a single class

def test_a_mean_over_one_of_several_classes_is_undefined():
    one_class = Metrics(torch.tensor([[9, 0], [0, 0]]), ("a", "b"))
    assert np.isnan(one_class.miou) and one_class.iou[0] == 1 and one_class.absent == ("b",) and one_class.pixel_accuracy == 1
    assert np.isnan(one_class.mean_class_accuracy)
    metrics = record_metrics(one_class)
    assert metrics["miou"] is None and metrics["iou"] == {"a": 1., "b": None} and json.dumps(metrics, allow_nan=False)
    assert "n/a" in metrics_text(one_class).splitlines()[0] and "one class" in metrics_text(one_class)
    assert "nan" not in confusion_figure(one_class).axes[0].get_title()
    invented = Metrics(torch.tensor([[9, 1], [0, 0]]), ("a", "b"))
    assert invented.miou == pytest.approx(.45) and "one class" not in metrics_text(invented), "a class that is predicted counts"
    assert Metrics(torch.tensor([[9]]), ("a",)).miou == 1, "of one class in all"
    empty = Metrics(torch.zeros(2, 2, dtype=torch.int64), ("a", "b"))
    assert np.isnan(empty.miou) and record_metrics(empty)["miou"] is None and "n/a" in metrics_text(empty)


def test_a_log_says_none_where_a_mean_is_undefined(root, tmp_path):
    class Says(torch.nn.Module): # predicts class 0 everywhere
        def forward(self, x): return torch.stack([torch.ones_like(x[:, 0]), torch.zeros_like(x[:, 0])], 1)
    for path in (root/"masks"/"val").iterdir(): save(path, one(0)())
    asked = config(root, steps=1, logs=1)
    log = RunLog(asked)
    row = log.add(0, Losses(sup=torch.tensor(1.)), StepMetrics(), LossWeights(), 1.)
    log.finish(row, Says(), FolderDataset(root, "val"), progress_bar(), lambda rows: None)
    assert row["val_miou"] is None and "mIoU" not in log_line(row, 1) and not log.is_best(row) and json.dumps(log.rows, allow_nan=False)


# Letters that matplotlib's default font lacks

NAMES = {"Chinese": "背景\n汽车道路\n", "Japanese": "はいけい\n道\n", "Korean": "배경\n길\n", "Thai": "ถนน\nบ้าน\n", "Devanagari": "सड़क\nघर\n", "of the street": "🚗\n🌳\n"}

def sheet(root, to):
    "Warnings while figures with names of classes and files are saved."
    data = FolderDataset(root, "train")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_figure(show_samples(data, (0, 1)), to)
        save_figure(confusion_figure(Metrics(torch.eye(2, dtype=torch.int64), data.spec.classes)), to.with_suffix(".pdf"))
        save_figure(show_samples(data, (0, 1)), to)
    return [str(w.message) for w in said]


@pytest.mark.parametrize("script", NAMES)
def test_letters_that_no_font_has_are_one_warning(tmp_path, monkeypatch, script):
    from matplotlib import font_manager
    own = [font for font in font_manager.fontManager.ttflist if font.name.startswith(("DejaVu", "STIX", "cm", "Last Resort"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own), monkeypatch.setattr("selfsupnas.show.FONTS", {})
    font_manager.fontManager._findfont_cached.cache_clear() if hasattr(font_manager.fontManager, "_findfont_cached") else None
    root = draw(tmp_path/"own", classes=NAMES[script])
    said = sheet(root, tmp_path/"a.png")
    assert len(said) == 1 and NAMES[script][0] in said[0] and "font" in said[0] and "Glyph" not in said[0]
    assert sheet(root, tmp_path/"b.png") == []


def test_a_font_that_has_the_letters_is_taken(tmp_path, monkeypatch):
    import matplotlib
    from fontTools.ttLib import TTFont
    from matplotlib import font_manager
    font = TTFont(Path(matplotlib.get_data_path())/"fonts"/"ttf"/"DejaVuSans.ttf")
    for table in font["cmap"].tables: table.cmap = {code + 0x4E00: name for code, name in table.cmap.items() if code < 0x5200 and table.isUnicode()}
    for record in font["name"].names: record.string = "Seventh Han" if record.nameID in (1, 4, 6, 16) else record.string
    font.save(tmp_path/"han.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist)), monkeypatch.setattr("selfsupnas.show.FONTS", {})
    font_manager.fontManager.addfont(tmp_path/"han.ttf")
    word = "".join(chr(0x4E00 + ord(letter)) for letter in "road")
    assert sheet(draw(tmp_path/"own", classes=f"{word}\nStraße é λ\n"), tmp_path/"a.png") == []
    fig = show_samples(FolderDataset(tmp_path/"own", "train"), (0,))
    save_figure(fig, tmp_path/"b.png")
    text, = (t for t in fig.legends[0].get_texts() if t.get_text() == word)
    assert "Seventh Han" in text.get_fontfamily()
    assert all("Seventh Han" not in t.get_fontfamily() for t in fig.legends[0].get_texts() if t is not text)


def test_letters_that_the_font_has_change_nothing(root, tmp_path):
    (root/"classes.txt").write_text("Straße\nдорога λ\n", "utf-8")
    assert sheet(root, tmp_path/"a.png") == []


def test_some_masks_of_0_and_255_are_told(tmp_path, capsys):
    "In half of the masks a class is ignored, of which a run does not warn."
    draw_folder(tmp_path/"data", dict(train=6, val=2))
    for i in range(3): Image.fromarray(np.where(np.arange(64 * 80) < 900, 255, 0).astype(np.uint8).reshape(64, 80)).save(tmp_path/"data"/"masks"/"train"/f"{i}.png")
    assert main(["data", "folder", str(tmp_path/"data"), "--folder", str(tmp_path/"sheets")]) == 0
    assert "masks: 3 of 6 hold only 0 and 255" in capsys.readouterr().out
