"Views that the device renders are those of the processor: the same draws, the same geometry to the pixel, the same colours but for rounding."
import dataclasses, itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import selfsupnas.data.augment as augment
from selfsupnas.data.augment import StrongDraws, StrongView, WeakView, axis_weights, cutmix_boxes, normalise, render_strong
from selfsupnas.data.datasets import load_dataset
from selfsupnas.data.files import PairDataset, SegmentationSpec
from selfsupnas.data.loaders import Stream, draw_batches, render_streams, stack_samples, stack_sources
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import search
from selfsupnas.train.batches import StepBatch, StepSources, load_training_data, make_batches, make_streams, present, views_on_device
from selfsupnas.train.checkpoint import IGNORED_PARAMETERS, parameter_differences, run_identity
from selfsupnas.train.config import TrainingConfig

GREATEST = 8 # levels by which a strong view may differ: a level that three factors of up to 1.5 multiply, each rounded again


class Drawn(PairDataset):
    "Images of noise and of slopes, of any sizes; labels with void."
    def read(self, i):
        rng, (h, w) = np.random.default_rng(i), self.sizes[i]
        slope = np.add.outer(np.arange(h), np.arange(w))[..., None] * [1, 2, 3] % 256
        image = rng.integers(0, 256, (h, w, 3)) if i % 2 else slope
        label = rng.integers(0, 4, (h // 3 + 1, w // 3 + 1)).repeat(3, 0).repeat(3, 1)[:h, :w]
        return image.astype(np.uint8), np.where(label == 3, 255, label).astype(np.uint8)


def drawn(*sizes):
    data = Drawn(SegmentationSpec("drawn", ("a", "b", "c"), ((0, 0, 0), (9, 9, 9), (99, 9, 9))), [f"{i:03}" for i in range(len(sizes))])
    data.sizes = sizes
    return data


# ---- weak views

def assert_labels(ours, theirs):
    "They agree but where the centre of a pixel falls on the border between two source pixels: a row or a column of a view."
    assert (ours != theirs).float().mean() <= max(.04, 1 / min(ours.shape[-2:]))


VIEWS = {"larger": WeakView((64, 80), (0.5, 2.0)), "odd": WeakView((37, 51), (0.3, 3.0)), "padded": WeakView((90, 120), (0.5, 1.0)), "filled": WeakView((70, 66), (1.0, 1.25), 0., fill=True),
         "as it is": WeakView((61, 75), (1.0, 1.0)), "chosen by content": WeakView((33, 33), (0.75, 2.0), category_ratio=0.75), "tiny": WeakView((5, 3), (0.01, 40.0))}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("batch", [1, 5])
def test_weak_views_labels_and_masks_agree(name, batch):
    "Images of different sizes share a batch; some are smaller than the view."
    data = drawn((61, 75), (20, 30), (75, 61), (33, 120), (200, 151))
    ours, theirs = ({"some": (Stream(data, data.ids, VIEWS[name], seed=2, on_device=on_device), batch)} for on_device in (True, False))
    for sources, expected in zip(draw_batches(ours, range(60 // batch)), draw_batches(theirs, range(60 // batch))):
        rendered = render_streams(sources, "cpu")["some"]
        assert_labels(rendered["label"], expected["some"]["label"])
        levels = (rendered["image"].int() - expected["some"]["image"].int()).abs()
        assert levels.max() <= 1, "torch rounds once where it does not resize in integers"
        assert rendered["image"].dtype == torch.uint8 and rendered["image"].shape == expected["some"]["image"].shape


@pytest.mark.parametrize("kind", ["unlabelled", "jigsaw", "plain"])
def test_every_kind_of_sample_agrees(kind):
    data = drawn((61, 75), (20, 30), (75, 61))
    ours, theirs = ({"some": (Stream(data, data.ids, WeakView((64, 80)), 1, kind, strong_views=2, on_device=on_device), 3)} for on_device in (True, False))
    for sources, expected in zip(draw_batches(ours, range(8)), draw_batches(theirs, range(8))):
        rendered, expected = render_streams(sources, "cpu")["some"], expected["some"]
        assert rendered.keys() == expected.keys() and all(rendered[key].dtype == expected[key].dtype for key in expected)
        for key in {"valid"} & expected.keys(): assert torch.equal(rendered[key], expected[key])
        for key in {"diagnosis_label"} & expected.keys(): assert_labels(rendered[key], expected[key])
        for key in {"weak", "image"} & expected.keys(): assert (rendered[key].int() - expected[key].int()).abs().max() <= 1


def test_the_nearest_pixel_is_torchs():
    "Of windows and views of all lengths up to 48, and of some long ones, where float32 rounds; both are nearest where a centre falls on a border."
    pairs = [*itertools.product(range(1, 49), range(2, 49, 3)), (2047, 769), (769, 2047), (1536, 1023), (641, 642), (1999, 2000)]
    for pair in pairs[-5:] + [None]:
        some = pairs[:-5] if pair is None else [pair]
        length, out = max(a for a, _ in some), max(b for _, b in some)
        numbers = torch.tensor([[[a, b, 0, 0], [a, b, 0, 1]] for a, b in some], dtype=torch.float32)
        _, nearest, valid = axis_weights(numbers, length, out)
        for (a, b), places, inside in zip(some, nearest, valid):
            expected = F.interpolate(torch.arange(a, dtype=torch.float32)[None, None], b, mode="nearest-exact")[0, 0].long()
            sure = (2 * torch.arange(b) + 1) * a % (2 * b) != 0
            assert torch.equal(places[0, :b][sure], expected[sure]) and (places[0, :b] - expected).abs().max() <= 1, (a, b)
            assert torch.equal(places[1, :b], places[0, :b].flip(0)), (a, b)
            assert inside[:, :b].all() and not inside[:, b:].any()


def test_weights_are_those_of_torchs_antialiased_resampling():
    for length, out in [(5, 2), (64, 9), (9, 64), (61, 61), (1, 7), (333, 100)]:
        weights, *_ = axis_weights(torch.tensor([[[length, out, 3, 0]] * 2], dtype=torch.float32), length + 4, out + 5)
        expected = F.interpolate(torch.eye(length)[None, :, :, None].expand(1, length, length, 2), (out, 2), mode="bilinear", antialias=True)[0, :, :, 0].T
        assert (weights[0, 0, 3:3 + out, :length] - expected).abs().max() < 1e-4
        assert not weights[0, 0, :3].any() and not weights[0, 0, 3 + out:].any() and not weights[0, 0, :, length:].any()


# ---- strong views

def strong_of(view, images, seeds):
    "Strong views (B,3,h,w) by the processor and by the device, and the draws."
    draws, theirs = [], []
    for image, seed in zip(images, seeds):
        torch.manual_seed(seed)
        theirs.append(view(image))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        draws.append(view.draw(image.shape[-2:]))
        assert torch.equal(after, torch.get_rng_state()), "as many numbers are drawn"
    numbers = torch.tensor([d.numbers() for d in draws])
    return torch.stack(theirs).float(), render_strong(images.float(), numbers), draws


def images_of(count, size=(45, 53)):
    scenes = load_dataset("streetscenes", "val")
    views = [WeakView(size, (0.75, 2.0))(scenes[k][0])[0] for k in range(count)]
    return torch.stack([torch.randint(256, v.shape, dtype=torch.uint8) if k % 4 == 3 else v for k, v in enumerate(views)])


@pytest.mark.parametrize("changes", [{}, dict(p_jitter=1., p_blur=1.), dict(jitter=(0.5, 0, 0.5, 0), p_jitter=1.), dict(jitter=(0, 0, 0, 0.5), p_jitter=1.), dict(p_jitter=0., p_grey=1.), dict(sigma=None)])
def test_strong_views_agree(changes):
    torch.manual_seed(0)
    images = images_of(100)
    theirs, ours, _ = strong_of(StrongView(**changes), images, range(100))
    levels = (ours - theirs).abs()
    assert levels.max() <= GREATEST and (levels > 0).float().mean() < .01 and (ours == ours.round()).all() and 0 <= ours.min() and ours.max() <= 255
    for statistic in (torch.mean, torch.std):
        spread = statistic(ours, (2, 3)) - statistic(theirs, (2, 3))
        assert spread.abs().max() < .5 and spread.mean().abs() < .01, "the same distribution"


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))], ids=lambda order: "".join(map(str, order)))
def test_every_order_of_the_changes_agrees(order):
    "Torchvision's changes one after the other, with factors at the ends of their ranges."
    torch.manual_seed(1)
    images = images_of(4)
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for factors in ((1.5, 0.5, 1.5, 0.25), (0.5, 1.5, 0.5, -0.25), (1.2, None, 0.0, None)):
        params = dict(zip(names, factors), fn_idx=torch.tensor(order))
        theirs = v2.ColorJitter(0.5, 0.5, 0.5, 0.25).transform(images, params).float()
        ours = render_strong(images.float(), torch.tensor([StrongDraws(params, False, None).numbers()] * 4))
        assert (ours - theirs).abs().max() <= GREATEST and (ours != theirs).float().mean() < .02


def test_no_change_leaves_every_pixel_as_it_is():
    images = torch.randint(256, (3, 3, 20, 31), dtype=torch.uint8).float()
    assert torch.equal(render_strong(images, torch.tensor([StrongDraws(None, False, None).numbers()] * 3)), images)


# ---- boxes

def boxes_by_loop(batch, size, generator, p=0.5, area=(0.02, 0.4), aspect=(0.3, 1/0.3)):
    (H, W), boxes = size, torch.zeros(batch, *size, dtype=torch.bool)
    for i, (chance, a, r, y, x) in enumerate(torch.rand(batch, 5, generator=generator, dtype=torch.float64).tolist()):
        if chance >= p: continue
        pixels = (area[0] + (area[1] - area[0]) * a) * H * W
        low, high = max(aspect[0], pixels / W**2), min(aspect[1], H**2 / pixels)
        ratio = low * (high / low)**r if low < high else H / W
        h, w = (min(n, max(1, round(side**0.5))) for n, side in ((H, pixels * ratio), (W, pixels / ratio)))
        top, left = int(y * (H - h + 1)), int(x * (W - w + 1))
        boxes[i, top:top + h, left:left + w] = True
    return boxes


@pytest.mark.parametrize("size", [(64, 80), (1, 1), (4, 300), (299, 7), (128, 160), (768, 769)])
@pytest.mark.parametrize("p, area", [(.5, (.02, .4)), (1., (.25, .25)), (1., (.001, 1.)), (0., (.02, .4))])
def test_boxes_are_those_of_a_loop_over_images(size, p, area):
    for seed in range(20):
        a, b = (torch.Generator().manual_seed(seed) for _ in range(2))
        assert torch.equal(cutmix_boxes(9, size, a, p, area), boxes_by_loop(9, size, b, p, area)) and torch.equal(a.get_state(), b.get_state())
    assert cutmix_boxes(9, size, p=p, area=area, device="meta").shape == (9, *size)


# ---- batches of a run

@pytest.fixture
def config(tmp_path):
    return TrainingConfig(folder=str(tmp_path), data="streetscenes", crop=(48, 64), batch_labelled=2, batch_unlabelled=3, batch_jigsaw=2, steps=3, category_ratio=.75, views="device")


def parts(batch): return {"labelled": present(batch.labelled), "unlabelled": present(batch.unlabelled) if batch.unlabelled else {}, "jigsaw": {} if batch.jigsaw is None else {"image": batch.jigsaw}}


RUNS = {"all": {}, "two strong views": dict(consistency="unimatch", w_strong=1.), "no label": dict(w_sup=0., w_semi=0., category_ratio=1.), "as the image": dict(crop=None), "labels alone": dict(w_semi=0., w_jig=0.)}


@pytest.mark.parametrize("name", RUNS)
def test_batches_of_a_run_do_not_depend_on_where_views_are_computed(config, name):
    config = dataclasses.replace(config, **RUNS[name])
    data = load_training_data(config)
    sources, plain = (list(make_batches(dataclasses.replace(config, views=views), data)) for views in ("device", "processor"))
    assert len(sources) == len(plain) == 3 and all(isinstance(s, StepSources) for s in sources) and all(isinstance(p, StepBatch) for p in plain)
    level = (normalise(torch.full((3, 1, 1), 1, dtype=torch.uint8)) - normalise(torch.zeros(3, 1, 1, dtype=torch.uint8)))
    for s, p in zip(sources, plain):
        ours, theirs = parts(s.to("cpu")), parts(p.to("cpu"))
        for batch in theirs:
            assert ours[batch].keys() == theirs[batch].keys()
            for key, x in theirs[batch].items():
                y = ours[batch][key]
                assert y.dtype == x.dtype and y.shape == x.shape
                if key == "valid": assert torch.equal(x, y)
                elif "label" in key: assert_labels(y, x)
                else: assert ((y - x) / level).abs().mean() < .5


def test_workers_and_the_first_step_change_nothing(config):
    def sources(**changes):
        start = changes.pop("start", 0)
        changed = dataclasses.replace(config, **changes)
        return [s.drawn for s in make_batches(changed, load_training_data(changed), start)]
    def same(a, b): return all(torch.equal(x, y) for p, q in zip(a, b) for name in p for x, y in zip(p[name][:4], q[name][:4]) if x is not None)
    alone = sources()
    assert same(alone, sources(workers=2)) and same(alone[2:], sources(start=2)) and not same(alone, sources(seed=1))


def test_an_image_does_not_depend_on_its_batch():
    "Two processes share a batch, and pad its windows to other sizes."
    data = drawn((61, 75), (20, 30), (75, 61), (40, 44))
    stream = Stream(data, data.ids, WeakView((48, 56)), 3, "unlabelled", on_device=True)
    samples = [stream[k] for k in range(4)]
    whole = render_streams({"x": stack_sources(samples, "unlabelled")}, "cpu")["x"]
    halves = [render_streams({"x": stack_sources(part, "unlabelled")}, "cpu")["x"] for part in (samples[:1], samples[1:])]
    for key, x in whole.items():
        levels = (torch.cat([half[key] for half in halves]).int() - x.int()).abs()
        assert levels.max() <= (GREATEST if key == "strong" else 0) and levels.float().mean() < .01


@pytest.mark.parametrize("on_device", [False, True])
def test_views_of_different_sizes_are_refused(on_device):
    data = drawn((61, 75), (20, 30))
    stream = Stream(data, data.ids, on_device=on_device)
    stack = (lambda samples: stack_sources(samples, "labelled")) if on_device else stack_samples
    with pytest.raises(ValueError, match="crop="): stack([stream[0], stream[1]])


def test_streams_of_different_sizes_are_rendered():
    data = drawn((61, 75), (40, 44))
    streams = {name: (Stream(data, data.ids, WeakView(size), kind=kind, on_device=True), 2) for name, size, kind in (("a", (48, 56), "labelled"), ("b", (40, 40), "unlabelled"), ("c", (48, 56), "jigsaw"))}
    rendered = render_streams(next(draw_batches(streams, range(1))), "cpu")
    assert list(rendered) == ["a", "b", "c"] and [next(iter(views.values())).shape[-2:] for views in rendered.values()] == [(48, 56), (40, 40), (48, 56)]


# ---- no value is read back

def test_a_batch_is_rendered_without_reading_a_value(config):
    config = dataclasses.replace(config, consistency="unimatch", w_strong=1.)
    batch = next(make_batches(config, load_training_data(config))).to("meta")
    assert batch.unlabelled.strong2.shape == (3, 3, 48, 64) and batch.unlabelled.strong2.device.type == "meta"


def test_a_value_that_is_read_is_found(config, monkeypatch):
    plain = augment._blend
    monkeypatch.setattr(augment, "_blend", lambda images, shares: plain(images, shares) if (shares != 1).any() else images)
    batch = next(make_batches(config, load_training_data(config)))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"): batch.to("meta")


# ---- the parameter

def test_auto_means_a_gpu(config):
    assert [views_on_device("auto", device) for device in ("cpu", "cuda")] == [False, True]
    assert views_on_device("device", "cpu") and not views_on_device("processor", "cuda")
    assert TrainingConfig().views == "auto"
    assert isinstance(next(make_batches(dataclasses.replace(config, views="auto"), load_training_data(config))), StepBatch)
    assert not make_streams(config, load_training_data(config))["labelled"][0].on_device


def test_a_resumed_run_computes_its_views_where_it_did(config):
    before, now = (run_identity(dataclasses.replace(config, views=views)) for views in ("auto", "device"))
    assert before["views"] == "auto" and "views" not in IGNORED_PARAMETERS and "views" in parameter_differences(before, now)


def test_a_search_with_views_of_the_device(tmp_path):
    "The record keeps the choice, and the losses are those of the processor's views."
    configs = [SearchConfig(folder=str(tmp_path/views), size=(64, 80), layers=3, channels=4, steps=4, logs=4, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, ramp=(0., 0.), budget=.8, views=views)
               for views in ("processor", "device")]
    plain, ours = [search(config) for config in configs]
    assert [result.record.parameters["views"] for result in (plain, ours)] == ["processor", "device"]
    plain, ours = (result.trained.history[0] for result in (plain, ours))
    losses = [name for name in plain if name in ("sup", "jig", "loss_sup", "loss_jig")]
    assert len(losses) == 2 and all(ours[name] == pytest.approx(plain[name], rel=.05) for name in losses)
    with pytest.raises(ValueError, match="views='device'"): search(dataclasses.replace(configs[0], folder=configs[1].folder))
