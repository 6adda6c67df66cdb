"PASCAL VOC 2012 and SBD against torchvision's readers and the published counts, and the round trip of palette PNGs."
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import SBDataset, VOCSegmentation

from selfsupnas.data.datasets import load_dataset
from selfsupnas.data.files import read_mask, write_mask
from selfsupnas.data.voc import VOC, VOC_SPEC, draw_voc, find_voc, read_names, sbd_folder, voc_palette, write_names


@pytest.fixture(scope="module")
def tree(tmp_path_factory): return draw_voc(tmp_path_factory.mktemp("voc"), dict(train=6, val=5, extra=7, test=3))


@pytest.mark.parametrize("split", ["train", "val"])
def test_torchvision_reads_the_same(tree, split):
    theirs, ours = VOCSegmentation(tree, "2012", split), VOC(tree, split)
    assert [str(p) for p, _ in ours.pairs] == theirs.images and len(ours) > 0
    for i, (image, mask) in enumerate(theirs):
        assert mask.mode == "P"
        assert np.array_equal(ours[i][0].permute(1, 2, 0), image) and np.array_equal(ours[i][1], mask)


def test_torchvision_reads_the_same_masks_of_sbd(tree):
    folder, ours = sbd_folder(tree), VOC(tree, "train_aug")
    (folder/"img").mkdir()
    for split in ("train", "val"):
        for name in read_names(folder/f"{split}.txt"): (folder/"img"/f"{name}.jpg").write_bytes((tree/"VOCdevkit"/"VOC2012"/"JPEGImages"/f"{name}.jpg").read_bytes())
    compared = 0
    for split in ("train", "val"):
        theirs = SBDataset(folder, split, "segmentation")
        for name, (image, mask) in zip(read_names(folder/f"{split}.txt"), theirs):
            if name not in ours.ids or ours.pairs[ours.ids.index(name)][1].suffix != ".mat": continue
            mine = ours[ours.ids.index(name)]
            assert np.array_equal(mine[0].permute(1, 2, 0), image) and np.array_equal(mine[1], mask)
            compared += 1
    assert compared == 7


def test_counts_of_the_archives(tmp_path):
    "As many empty files as in the archives; SBD's lists overlap VOC's, as in the originals."
    base, sbd = tmp_path/"VOCdevkit"/"VOC2012", tmp_path/"benchmark_RELEASE"/"dataset"
    lists = base/"ImageSets"/"Segmentation"
    for folder in (base/"JPEGImages", base/"SegmentationClass", lists, sbd/"cls"): folder.mkdir(parents=True)
    train, val, extra = ([f"{kind}_{i:06d}" for i in range(n)] for kind, n in (("2007", 1464), ("2008", 1449), ("2009", 9118)))
    in_sbd = train[:1133] + val[:1104] + extra                 # 11,355 images, 1,104 of them of VOC val
    order = np.random.default_rng(0).permutation(in_sbd).tolist()
    write_names(lists/"train.txt", train), write_names(lists/"val.txt", val)
    write_names(sbd/"train.txt", order[:8498]), write_names(sbd/"val.txt", order[8498:])
    for name in train + val + extra: (base/"JPEGImages"/f"{name}.jpg").touch()
    for name in train + val: (base/"SegmentationClass"/f"{name}.png").touch()
    for name in in_sbd: (sbd/"cls"/f"{name}.mat").touch()
    assert len(in_sbd) == 11355 and len(read_names(sbd/"val.txt")) == 2857
    count = {name: [len(load_dataset(name, split, tmp_path)) for split in ("train", "val")] for name in ("voc", "voc_aug")}
    assert count == {"voc": [1464, 1449], "voc_aug": [10582, 1449]}
    found = find_voc(tmp_path, "train_aug")
    assert not set(found) & set(val) and set(train) <= set(found)
    assert sum(mask.suffix == ".mat" for _, mask in found.values()) == 9118


def test_palette_pictures_there_and_back(tmp_path):
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = write_mask(tmp_path/"every.png", every, VOC_SPEC)
    with Image.open(path) as f:
        assert f.mode == "P" and np.array_equal(f, every) # Pillow alone
        assert tuple(f.getpalette()[:63]) == sum(VOC_SPEC.palette, ()) and tuple(f.getpalette()[765:]) == (224, 224, 192)
        seen = np.asarray(f.convert("RGB"))
    assert np.array_equal(read_mask(path), every)
    assert all(tuple(seen[k // 16, k % 16]) == colour for k, colour in enumerate(VOC_SPEC.palette))
    theirs = Image.fromarray(every % 16) # a palette PNG of 4 bits a pixel, by Pillow
    theirs.putpalette([v for c in voc_palette(16) for v in c]); theirs.save(tmp_path/"few.png", bits=4)
    assert np.array_equal(read_mask(tmp_path/"few.png"), every % 16)
