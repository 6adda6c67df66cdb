"CamVid, when it is there: SELFSUPNAS_DATA names the folder that holds camvid/."
import os

import pytest

from selfsupnas.data.datasets import load_dataset

pytestmark = pytest.mark.skipif(not os.environ.get("SELFSUPNAS_DATA"), reason="SELFSUPNAS_DATA is not set: no CamVid here")


@pytest.mark.parametrize("split, count", [("train", 367), ("val", 101), ("test", 233)])
def test_camvid_loads(split, count):
    data = load_dataset("camvid", split, size=(96, 128))
    assert len(data) == len(set(data.ids)) == count
    for i in (0, count // 2, count - 1):
        image, label = data[i]
        assert image.shape == (3, 96, 128) and label.shape == (96, 128)
        assert set(label.unique().tolist()) <= set(range(data.spec.num_classes)) | {data.spec.ignore_index}


def test_the_splits_share_no_image():
    ids = [set(load_dataset("camvid", split).ids) for split in ("train", "val", "test")]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
