"Corner cases of users' networks, operations and machines: each is counted, accepted or refused by name, and the caller's objects stay unchanged."
import copy, os, pickle, subprocess

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from selfsupnas.space import cost
from selfsupnas.space.budget import measure_costs
from selfsupnas.space.cost import COSTS, COUNTERS, count_cost, count_flops
from selfsupnas.space.grid import Edge, SearchSpace
from selfsupnas.space.operations import OPERATIONS, make_operation
from selfsupnas.space.supernet import build_supernet

C, H, W = 8, 12, 16


class Calls(nn.Module):
    "A module whose forward is a function of the module and x, with named parameters and submodules."
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items(): setattr(self, name, part)

    def forward(self, x): return self.function(self, x)


def weight(*shape): return nn.Parameter(torch.zeros(shape))
def pixels(x): return x.flatten(2).transpose(1, 2) # (B,C,H,W) -> (B,HW,C)
def image(pixels): return pixels.transpose(1, 2).unflatten(2, (H, W))


# ---- multiply-adds are counted, or an error names the operation

N = H * W
COUNTED = { # name: (module, multiply-adds counted by hand)
    "attention of 3 dimensions": (Calls(lambda s, x: image(F.scaled_dot_product_attention(*[pixels(x)] * 3))), 2 * N * N * C),
    "attention of 4 dimensions": (Calls(lambda s, x: F.scaled_dot_product_attention(x, x, x)), 2 * C * H * H * W),
    "attention to few keys": (Calls(lambda s, x: F.scaled_dot_product_attention(pixels(x), s.k, s.v), k=weight(1, 5, C), v=weight(1, 5, 3)), N * 5 * (C + 3)),
    "nn.MultiheadAttention": (nn.ModuleList(), None), # below: it takes three arguments
    "einsum": (Calls(lambda s, x: torch.einsum("bchw,cd->bdhw", x, s.w), w=weight(C, C)), N * C * C),
    "einsum of three": (Calls(lambda s, x: torch.einsum("bchw,cd,de->behw", x, s.w, s.w), w=weight(C, C)), 2 * N * C * C),
    "einsum of two maps": (Calls(lambda s, x: torch.einsum("bchw,bdhw->bcd", x, x)), N * C * C),
    "bmm": (Calls(lambda s, x: torch.bmm(pixels(x), s.w.expand(len(x), -1, -1)), w=weight(1, C, C)), N * C * C),
    "baddbmm": (Calls(lambda s, x: torch.baddbmm(s.b, pixels(x), s.w.expand(len(x), -1, -1)), w=weight(1, C, C), b=weight(1, 1, C)), N * C * C),
    "addbmm": (Calls(lambda s, x: torch.addbmm(s.b, pixels(x), s.w.expand(len(x), -1, -1)), w=weight(1, C, C), b=weight(1, C)), N * C * C),
    "matmul": (Calls(lambda s, x: pixels(x) @ s.w, w=weight(C, C)), N * C * C),
    "matmul spread over a batch": (Calls(lambda s, x: s.w @ x, w=weight(H, H)), C * H * H * W),
    "matmul with a vector": (Calls(lambda s, x: x @ s.w, w=weight(W)), N * C),
    "mv": (Calls(lambda s, x: torch.mv(x.flatten(0, 2), s.w), w=weight(W)), N * C),
    "conv": (nn.Conv2d(C, C, 3, padding=1), 9 * N * C * C),
    "conv padding=same": (nn.Conv2d(C, C, 3, padding="same"), 9 * N * C * C),
    "conv padding=valid": (nn.Conv2d(C, C, 1, padding="valid"), N * C * C),
    "conv reflected": (nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"), 9 * N * C * C),
    "conv of groups": (nn.Conv2d(C, C, 3, padding="same", groups=C), 9 * N * C),
    "conv_transpose": (nn.ConvTranspose2d(C, C, 3, padding=1), 9 * N * C * C),
    "conv_transpose of stride 2": (nn.ConvTranspose2d(C, C, 2, stride=2), 4 * N * C * C),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Conv2d(C, C, 1)), N * C * C),
    "linear": (Calls(lambda s, x: s.l(pixels(x)), l=nn.Linear(C, C)), N * C * C),
}
for name, part in dict(batched=dict(batch_first=True), frozen=dict(batch_first=True)).items():
    attention = nn.MultiheadAttention(C, 2, **part).requires_grad_(name != "frozen") # frozen: a single fused operator in evaluation mode
    COUNTED[f"nn.MultiheadAttention, {name}"] = Calls(lambda s, x: s.a(pixels(x), pixels(x), pixels(x), need_weights=False)[0], a=attention), N * 4 * C * C + 2 * N * N * C
del COUNTED["nn.MultiheadAttention"]


@pytest.mark.parametrize("name", COUNTED)
def test_products_are_counted(name):
    module, by_hand = COUNTED[name]
    assert count_flops(module, torch.zeros(1, C, H, W)) == by_hand
    assert COSTS["flops"](module.train(), torch.zeros(3, C, H, W)) in (3 * by_hand, by_hand), "products with images count for each image, products of weights once"
    assert all(m.training for m in module.modules()) and torch.backends.mha.get_fastpath_enabled()


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w): return image(pixels(x) @ w)
    @staticmethod
    def backward(ctx, g): return g, None


UNCOUNTABLE = { # name: (module, words of the error)
    "fft": (Calls(lambda s, x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:])), "fft"),
    "autograd.Function": (Calls(lambda s, x: Product.apply(x, s.w), w=weight(C, C)), "Product"),
    "LSTM": (Calls(lambda s, x: image(s.l(pixels(x))[0]), l=nn.LSTM(C, C)), "lstm"),
    "GRU": (Calls(lambda s, x: image(s.l(pixels(x))[0]), l=nn.GRU(C, C)), "gru"),
    "Bilinear": (Calls(lambda s, x: image(s.l(pixels(x), pixels(x))), l=nn.Bilinear(C, C, C)), "bilinear"),
    "cdist": (Calls(lambda s, x: x + torch.cdist(pixels(x), pixels(x)).sum()), "cdist"),
    "sparse": (Calls(lambda s, x: image((torch.eye(N).to_sparse() @ pixels(x)[0])[None])), ""),
    "a product written as multiplication and sum": (Calls(lambda s, x: (x[:, :, None] * s.w[..., None, None]).sum(1), w=weight(C, C)), "torch's own counter"),
    "TorchScript": (torch.jit.script(nn.Conv2d(C, C, 1)), ""),
    "checkpoint": (Calls(lambda s, x: torch.utils.checkpoint.checkpoint(s.m, x, use_reentrant=True), m=nn.Conv2d(C, C, 1)), ""),
}


@pytest.fixture
def operation():
    "operation(make) registers it under the name `mine` until the test ends."
    yield lambda make: OPERATIONS.update(mine=make)
    OPERATIONS.pop("mine", None)


def table(kind="flops"): return measure_costs(SearchSpace(3, 2, C, ("mine", "identity")), (4 * H, 4 * W), kind)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNCOUNTABLE)
def test_what_cannot_be_counted_is_refused_where_the_table_is_made(name, operation):
    module, told = UNCOUNTABLE[name]
    class AtHome(nn.Module): # with an input of its own, because at the sizes of the grid the module would fail for another reason
        def __init__(self):
            super().__init__()
            self.m = copy.deepcopy(module) if name != "TorchScript" else module
        def forward(self, x):
            return x + self.m(torch.zeros(1, C, H, W)).mean()
    operation(lambda channels: AtHome())
    with pytest.raises(ValueError, match="mine") as e: table()
    assert told in str(e.value)
    assert table("parameters").operations[0]["mine"] >= 0, "another kind of cost is available"


def test_a_count_of_ones_own_is_taken(operation):
    operation(lambda channels: Calls(lambda s, x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:])))
    COUNTERS.update({name: lambda ins, out: 7 for name in ("aten::fft_rfft2", "aten::fft_irfft2")})
    try: assert table().operations[0]["mine"] == 14
    finally: [COUNTERS.pop(name) for name in ("aten::fft_rfft2", "aten::fft_irfft2")]


@pytest.mark.parametrize("module", [nn.GELU(), nn.Softmax(1), nn.PixelShuffle(2), nn.Unfold(3), nn.Hardswish(), nn.PReLU(C), nn.GLU(1), nn.ChannelShuffle(2), nn.LocalResponseNorm(2),
                                    nn.AdaptiveMaxPool2d(3), nn.AvgPool2d(2), nn.ReflectionPad2d(1), nn.Dropout2d(), nn.InstanceNorm2d(C), nn.RMSNorm(W), nn.Hardtanh(inplace=True),
                                    Calls(lambda s, x: x.sort(1)[0].cumsum(1).flip(1).roll(1, 3).amax(1, keepdim=True) + x.var((2, 3), keepdim=True)),
                                    Calls(lambda s, x: F.grid_sample(x, F.affine_grid(torch.eye(2, 3)[None], x.shape, align_corners=False), align_corners=False)),
                                    Calls(lambda s, x: F.normalize(x).square().clamp(0, 1).masked_fill(x > 0, 1) * F.interpolate(x, scale_factor=1, mode="bicubic"))], ids=lambda m: type(m).__name__)
def test_what_multiplies_nothing_is_not_refused(module): count_flops(module, torch.ones(1, C, H, W))


def both_counts(module, *inputs):
    products = sum(n for name, n in cost.analyse(module, *inputs).by_operator().items() if name in cost.PRODUCTS)
    return products, cost.torch_products(module, *inputs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_fvcore_and_torch_agree_on_every_operation(name):
    ours, theirs = both_counts(make_operation(name, C), torch.zeros(1, C, H, W))
    assert ours == theirs and (ours > 0) == any(isinstance(m, nn.Conv2d) for m in make_operation(name, C).modules())


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "deeplabv3plus_resnet18", "unet_resnet18"])
def test_fvcore_and_torch_agree_on_rivals(name):
    from selfsupnas.rivals import build_baseline
    try: rival = build_baseline(name, 3).eval()
    except ImportError as e: pytest.skip(str(e))
    ours, theirs = both_counts(rival, torch.zeros(1, 3, 64, 64))
    assert ours == theirs > 0 and count_cost(rival, (64, 64)).flops == count_flops(rival, torch.zeros(1, 3, 64, 64))


def test_fvcore_and_torch_agree_on_the_supernet():
    ours, theirs = both_counts(build_supernet(SearchSpace(3, 2, C, tuple(OPERATIONS))).eval(), torch.zeros(1, 3, 64, 64))
    assert ours == theirs > 0


def test_a_networks_cost_that_is_too_low_is_said():
    with pytest.warns(UserWarning, match="fft_fft2"): count_cost(Calls(lambda s, x: torch.fft.fft2(x).real), (32, 32))


# ---- operations keep shape and dtype

def odd_operations():
    "Name, factory, type of the error, and words of the message beside the operation's name."
    def calls(f): return lambda channels: Calls(f)
    yield "one channel", lambda c: nn.Conv2d(c, 1, 1), ValueError, "(2, 1, "
    yield "more channels", lambda c: nn.Conv2d(c, 2 * c, 1), ValueError, f"(2, {2 * C}, "
    yield "shrinks", lambda c: nn.Conv2d(c, c, 3), ValueError, f"(2, {C}, {H - 2}, "
    yield "widens", lambda c: nn.Conv2d(c, c, 1, padding=1), ValueError, f"(2, {C}, {H + 2}, "
    yield "halves", lambda c: nn.MaxPool2d(2), ValueError, "(2, "
    yield "pools all", lambda c: nn.AdaptiveAvgPool2d(1), ValueError, "1, 1)"
    yield "one image of two", calls(lambda s, x: x.mean(0, keepdim=True)), ValueError, "(1, "
    yield "no batch", calls(lambda s, x: x[0]), ValueError, f"({C}, "
    yield "a scalar", calls(lambda s, x: x.sum()), ValueError, "()"
    yield "turned", calls(lambda s, x: x.transpose(2, 3)), ValueError, f"{W}, {H})"
    yield "a tuple", calls(lambda s, x: (x, x)), TypeError, "tuple"
    yield "a dict", calls(lambda s, x: {"out": x}), TypeError, "dict"
    yield "nothing", calls(lambda s, x: None), TypeError, "NoneType"
    yield "a number", calls(lambda s, x: 1.), TypeError, "float"
    yield "double", calls(lambda s, x: x.double()), TypeError, "float64"
    yield "half", calls(lambda s, x: x.half()), TypeError, "float16"
    yield "whole numbers", calls(lambda s, x: x.long()), TypeError, "int64"
    yield "complex", calls(lambda s, x: torch.complex(x, x)), TypeError, "complex64"
    yield "bool", calls(lambda s, x: x > 0), TypeError, "bool"
    yield "changes its input", lambda c: nn.ReLU(inplace=True), ValueError, "in place"
    yield "changes a view of it", calls(lambda s, x: x[:, :1].mul_(2).expand_as(x) + 0), ValueError, "in place"
    yield "other channels", lambda c: nn.Conv2d(c + 1, c, 1), ValueError, "channels"
    yield "cannot be made", lambda c: nn.Conv2d(c, c, 3, groups=c - 1), ValueError, f"{C} channels"
    yield "a function, no module", lambda c: (lambda x: x), TypeError, "nn.Module"
    yield "a class, no module", lambda c: nn.ReLU, TypeError, "nn.Module"
    yield "made of nothing", lambda c: None, TypeError, "nn.Module"


@pytest.mark.parametrize("kind", ["flops", "parameters"])
@pytest.mark.parametrize("make, error, told", [pytest.param(*rest, id=name) for name, *rest in odd_operations()])
def test_operations_that_would_not_fit_the_sum_are_named(make, error, told, kind, operation):
    operation(make)
    with pytest.raises(error, match="mine") as e: table(kind)
    assert told in str(e.value)


@pytest.mark.parametrize("search_operations", [False, True])
def test_an_operation_that_breaks_later_is_named_in_the_network(search_operations, operation):
    "It keeps even sizes but not odd ones; tested in a network without a cost table."
    operation(lambda c: nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2)))
    net = build_supernet(SearchSpace(3, 1, C, ("mine", "identity"), search_operations))
    net(torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match="mine"): net(torch.rand(2, 3, 36, 36))


def test_operations_in_half_precision_fit(operation):
    operation(lambda c: nn.Conv2d(c, c, 1))
    with torch.autocast("cpu", torch.bfloat16): build_supernet(SearchSpace(3, 1, C, ("mine", "identity")))(torch.rand(2, 3, 64, 64))


# ---- models that return a dict

class Dict(nn.Module):
    "Returns a dict, as torchvision's segmenters do."
    def __init__(self, network, key="out"):
        super().__init__()
        self.network, self.key = network, key

    def forward(self, x): return {self.key: self.network(x), "aux": None}


def dict_terms(out, valid, labels, permutations=None):
    "Functions of the output (B,3,16,16) of a model, by name."
    from selfsupnas.tasks import consistency; from selfsupnas.tasks import jigsaw; from selfsupnas.tasks import teacher
    from selfsupnas.tasks.losses import pixel_cross_entropy
    goal = torch.rand(out)
    def loss_of(kind): return lambda answer: consistency.consistency_loss(
        consistency.CONSISTENCY[kind], *({view: what for view in consistency.CONSISTENCY[kind].weights} for what in (answer, answer, valid)), .3)
    yield from {f"consistency_loss {kind}": loss_of(kind) for kind in consistency.CONSISTENCY}.items()
    for term in (consistency.mean_teacher, consistency.fixmatch, consistency.hard_labels):
        yield f"{term.__name__}, student", lambda answer, term=term: term(answer, goal, valid)
        yield f"{term.__name__}, teacher", lambda answer, term=term: term(goal, answer, valid)
    yield "pixel_counts", lambda answer: teacher.pixel_counts(answer, valid, .3)
    yield "pseudo_label_diagnostics", lambda answer: teacher.pseudo_label_diagnostics(answer, valid, .3)
    yield "AdaptiveThreshold", lambda answer: teacher.AdaptiveThreshold().update(answer, valid)
    yield "pixel_cross_entropy", lambda answer: pixel_cross_entropy(answer, labels)
    yield "perturb_features", lambda answer: consistency.perturb_features(answer, 0.)
    yield "JigsawHead", lambda answer: torch.manual_seed(0) and jigsaw.JigsawHead(3, 2, 24)(answer)
    yield "predict", lambda answer: __import__("selfsupnas.metrics", fromlist=["predict"]).predict(lambda x: answer, torch.rand(out))


OUT = (2, 3, 16, 16)
TERMS = dict(dict_terms(OUT, torch.ones(2, 16, 16, dtype=torch.bool), torch.zeros(2, 16, 16, dtype=torch.int64)))


@pytest.mark.parametrize("name", TERMS)
def test_answers_in_a_dict_are_taken_by_every_term(name):
    logits = torch.randn(OUT)
    def told(x): return repr(TERMS[name](x))
    assert told({"out": logits, "aux": torch.zeros(1)}) == told(logits)
    for wrong in ({"logits": logits}, (logits, logits), None, {"out": None}):
        with pytest.raises(ValueError, match="out") as e: TERMS[name](wrong)
        assert type(wrong).__name__ in str(e.value)


@pytest.mark.parametrize("of", ["jigsaw_loss", "jigsaw_guess", "jigsaw_accuracy", "solve_positions"])
def test_answers_in_a_dict_are_taken_by_the_jigsaw(of):
    from selfsupnas.tasks import jigsaw
    from selfsupnas.tasks.permutations import permutation_set
    permutations, logits = permutation_set(2), torch.randn(2, 4, 4)
    more = {"jigsaw_loss": (torch.tensor([0, 1]), permutations), "jigsaw_guess": (permutations,), "jigsaw_accuracy": (torch.tensor([0, 1]), permutations)}.get(of, ())
    assert repr(getattr(jigsaw, of)({"out": logits}, *more)) == repr(getattr(jigsaw, of)(logits, *more))


@pytest.fixture
def folder(tmp_path):
    from conftest import draw_folder
    draw_folder(tmp_path/"data", dict(train=6, val=3, test=2))
    return tmp_path


def config(place, **changes):
    from selfsupnas.train.config import TrainingConfig
    return TrainingConfig(**{**dict(folder=str(place/"run"), data="folder", root=str(place/"data"), label_fraction=.5, steps=2, logs=1, batch_labelled=2, batch_unlabelled=2,
                                    batch_jigsaw=2, threshold=.3, ramp=(0., 0.), w_jig=0.), **changes})


def test_a_dict_is_taken_alike_where_networks_are_judged_and_counted(folder):
    from selfsupnas.data.datasets import load_dataset
    from selfsupnas.metrics import evaluate_segmenter, segment
    net, val = nn.Conv2d(3, 3, 3, padding=1), load_dataset("folder", "val", folder/"data")
    images = torch.stack([val[i][0] for i in range(2)])
    for views in ({}, dict(window=(40, 50)), dict(flip=True, scales=(1., .5))):
        assert evaluate_segmenter(Dict(net), val, progress=False, **views).confusion.equal(evaluate_segmenter(net, val, progress=False, **views).confusion)
        assert segment(Dict(net), images, **views).equal(segment(net, images, **views))
    assert count_cost(Dict(net), (64, 64)).flops == count_cost(net, (64, 64)).flops
    with pytest.raises(ValueError, match="dict.*logits.*out"): evaluate_segmenter(Dict(net, "logits"), val, progress=False)
    assert net.training


def test_a_dict_is_exported_as_its_logits(tmp_path):
    from selfsupnas.export import export_program
    net, x = nn.Conv2d(3, 3, 3, padding=1), torch.rand(1, 3, 40, 50)
    got = torch.export.load(export_program(Dict(net), (64, 64), tmp_path/"a.pt2")).module()(x)
    assert got.allclose(net(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["mean_teacher", "fixmatch", "cps"])
def test_a_model_that_returns_a_dict_trains_as_its_logits(kind, folder):
    from selfsupnas.train.batches import load_training_data
    from selfsupnas.train.loop import train
    def run(wrap):
        torch.manual_seed(0)
        settings = config(folder, consistency=kind, folder=str(folder/wrap.__name__))
        return train(wrap(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))), settings, load_training_data(settings)).history
    def plain(net): return net
    assert run(Dict) == run(plain)


def test_what_only_the_grid_can_do_is_said(folder):
    from selfsupnas.train.step import build_multitask_model
    for wrong in (dict(w_jig=1.), dict(consistency="unimatch"), dict(recompute=True), dict(drop_path=.1)):
        with pytest.raises(ValueError, match=next(iter(wrong))) as e: build_multitask_model(nn.Conv2d(3, 3, 1), config(folder, **wrong))
        assert "Conv2d" in str(e.value)


# ---- the teacher pairs its tensors with the student's once

def test_the_teacher_pairs_once_and_again_when_it_must():
    from selfsupnas.tasks import teacher as room
    from unittest.mock import patch
    def student():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        net.tied = net[2] # a module under two names
        return net
    def step(net):
        with torch.no_grad(): [p.normal_(generator=draw) for p in net.parameters()]
        net(torch.rand(2, 3, 5, 5, generator=draw))
    def by_hand(ours, net, decay):
        with torch.no_grad():
            for a, b in room.paired_tensors(ours, net): a.copy_(torch.lerp(b, a, decay) if isinstance(a, nn.Parameter) else b)
    net, draw = student(), torch.Generator().manual_seed(0)
    kept = room.EMATeacher(net, .9)
    shadow = copy.deepcopy(kept.model)
    count = 0
    def check(t=kept, s=shadow):
        nonlocal count
        step(net)
        t.update(net, count + 5)
        by_hand(s, net, min(1 - 1 / (count + 6), .9))
        count += 1
        for a, b in zip(t.model.state_dict().values(), s.state_dict().values()): torch.testing.assert_close(a, b)
    with patch.object(room, "paired_places", wraps=room.paired_places) as paired:
        check(), check()
        once = paired.call_count - 2 # without the calls by hand
        assert once == 1
        net.load_state_dict(student().state_dict()), check()
        net.load_state_dict(student().state_dict(), assign=True), check() # new parameter tensors
        kept.load_state_dict(kept.state_dict()), check()
        net.to(torch.float64), net.to(torch.float32), check() # new buffer tensors
        net.to(memory_format=torch.channels_last), check()
        torch.__future__.set_overwrite_module_params_on_conversion(True) # new parameter tensors, too
        try: net.to(torch.float64), net.to(torch.float32), check()
        finally: torch.__future__.set_overwrite_module_params_on_conversion(False)
        assert paired.call_count - count == 1
        other, others = copy.deepcopy(kept), copy.deepcopy(shadow) # a second teacher of the same student
        check(other, others), check()
        assert pickle.loads(pickle.dumps(kept)).paired is None
        net[2] = nn.Conv2d(4, 4, 1) # a new module of the same shape; `tied` is still the old one
        step(net)
        with pytest.raises(ValueError, match="differs"): kept.update(net, 3)
        net.tied = net[2]
        kept.update(net, 0)
        assert torch.equal(kept.model[2].weight, net[2].weight)
        net[2].register_parameter("more", nn.Parameter(torch.zeros(1)))
        with pytest.raises(ValueError, match="more"): kept.update(net, 3)


# ---- the caller's model is unchanged

def traits(net): return [(name, t.device, t.dtype, t.requires_grad, t.stride(), t.data_ptr()) for name, t in [*net.named_parameters(), *net.named_buffers()]], [m.training for m in net.modules()]


def test_evaluate_leaves_the_model_where_it_is(folder):
    from selfsupnas.data.datasets import load_dataset
    from selfsupnas.metrics import evaluate_segmenter
    net, val = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)), load_dataset("folder", "val", folder/"data")
    net[1].eval()
    before = traits(net)
    here = evaluate_segmenter(net, val, progress=False)
    assert evaluate_segmenter(net, val, device="cpu", progress=False).confusion.equal(here.confusion) and traits(net) == before
    with pytest.raises(Exception): evaluate_segmenter(net, val, device="meta", progress=False) # meta tensors have no values
    assert traits(net) == before
    with pytest.raises(ValueError, match="finite"): evaluate_segmenter(nn.Sequential(net, Calls(lambda s, x: x / 0)), val, progress=False)
    assert traits(net) == before


@pytest.mark.parametrize("fails", [False, True])
def test_counting_timing_and_exporting_leave_the_model_as_it_is(fails, tmp_path):
    from selfsupnas.space.cost import measure_latency
    from selfsupnas.export import export_program, fold_batch_norm
    def end(s, x):
        if fails: raise RuntimeError("here")
        return x
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), Calls(end)).to(memory_format=torch.channels_last)
    net[0].weight.requires_grad_(False), net[1].eval()
    before, fast = traits(net), torch.backends.mha.get_fastpath_enabled()
    for act in (lambda: count_cost(net, (40, 40)), lambda: count_flops(net, torch.zeros(1, 3, 40, 40)), lambda: measure_latency(net, (40, 40), repeats=1, warmup=0),
                lambda: export_program(net, (40, 40), tmp_path/"a.pt2"), lambda: fold_batch_norm(net)):
        try: act()
        except Exception as e: assert fails and "here" in str(e)
        assert traits(net) == before and torch.backends.mha.get_fastpath_enabled() == fast


def test_gate_statistics_and_inherited_networks_leave_the_supernet_as_it_is(folder):
    from selfsupnas.rivals import all_open
    from selfsupnas.data.datasets import load_dataset
    from selfsupnas.stages.dynamic import run_dynamic
    from selfsupnas.stages.calibration import calibrate_gate_threshold, gate_statistics
    from selfsupnas.stages.choice import inherited_network
    space = SearchSpace(3, 1, 4)
    net, table, val = build_supernet(space), measure_costs(space, (64, 80)), load_dataset("folder", "val", folder/"data")
    net.stem.eval()
    before = traits(net)
    images = torch.stack([val[i][0] for i in range(3)])
    for act in (lambda: gate_statistics(net, val, table), lambda: run_dynamic(net, val, table), lambda: inherited_network(all_open(space), net.state_dict(), images),
                lambda: calibrate_gate_threshold(net, table, .6, images)):
        act()
        assert traits(net) == before


# ---- the least gate threshold that meets the budget

def static_supernet(values):
    "A supernet whose gates are the same for every image, its cost table, and a function from threshold to share of the full cost, by the rules of the grid."
    import dataclasses
    from selfsupnas.space.budget import static_cost
    from selfsupnas.space.gate import gates_of
    from selfsupnas.space.grid import trace_route
    from selfsupnas.space.supernet import gates_from_edges
    space = SearchSpace(3, 2, 4)
    net, table = build_supernet(space, gate="static"), measure_costs(space, (64, 80), gate="static")
    table = dataclasses.replace(table, raise_from=(0, *(20 * cost for cost in table.raise_from[1:]))) # a decoder that is expensive at coarse scales
    held = gates_from_edges(space, {edge: values.get(edge, .02) for edge in space.gated()})
    for name, gate in gates_of(net).items(): gate.logits.data = torch.atanh(held[name])
    def share(threshold):
        kept = {edge for edge in space.gated() if values.get(edge, .02) > threshold}
        gates = sum(table.gates[scale][len(space.gated_at(layer, scale))] for layer, scale in trace_route(space, kept))
        return (static_cost(table, kept) + gates) / table.full
    return net, table, share


def test_the_least_threshold_is_found_where_the_cost_rises_with_it():
    from selfsupnas.space.gate import CLOSED, gates_of
    from selfsupnas.stages.calibration import calibrate_gate_threshold
    # above .3 the cell (1, 1) passes its input on, and the decoder must upsample it
    net, table, share = static_supernet({Edge(0, 0, "down"): .9, Edge(0, 0, "keep"): .1, Edge(1, 1, "up"): .3, Edge(1, 0, "keep"): .6, Edge(2, 0, "keep"): .95})
    images = torch.zeros(2, 3, 64, 80, dtype=torch.uint8)
    grid = [CLOSED + (1 - CLOSED) * k / 1024 for k in range(1025)]
    assert share(.2) < .58 < share(.5) and share(.92) < .58, "the cost falls, rises and falls"
    for budget in (.43, .5, .58, .61, .7, .999):
        found = calibrate_gate_threshold(net, table, budget, images)
        assert found == pytest.approx(next(threshold for threshold in grid if share(threshold) <= budget), abs=1e-4)
        assert all(gate.threshold.item() == pytest.approx(found) for gate in gates_of(net).values())
    assert calibrate_gate_threshold(net, table, .3, images) == 1 and calibrate_gate_threshold(net, table, 1., images) == CLOSED


def test_shares_at_many_thresholds_are_those_of_one_after_the_other():
    from selfsupnas.data.augment import normalise
    from selfsupnas.space.budget import realised_cost
    from selfsupnas.space.gate import CLOSED, gates_of, set_gate_threshold, record_gates
    from selfsupnas.stages.calibration import calibrate_gate_threshold, costs_at_thresholds
    from selfsupnas.space.supernet import gates_by_edge
    torch.manual_seed(0)
    space = SearchSpace(3, 3, 4, search_operations=True)
    net, table, images = build_supernet(space).eval(), measure_costs(space, (64, 80)), torch.randint(0, 256, (20, 3, 64, 80), dtype=torch.uint8)
    for gate in gates_of(net).values(): nn.init.normal_(gate.logits.weight, 0, 5.), nn.init.normal_(gate.logits.bias, .5, .7)
    levels = torch.linspace(.05, .95, 19)
    got, by_hand = costs_at_thresholds(net, table, images, levels), []
    for threshold in levels.tolist():
        set_gate_threshold(net, threshold)
        with record_gates(net) as gates, torch.no_grad(): net(normalise(images))
        by_hand.append(realised_cost(table, gates_by_edge(space, gates)).mean().item() / table.full)
    assert len(set(by_hand)) > 5
    torch.testing.assert_close(got, torch.tensor(by_hand).double())
    found, grid = calibrate_gate_threshold(net, table, .6, images), torch.arange(1, 1025) / 1024 * (1 - CLOSED) + CLOSED
    set_gate_threshold(net, CLOSED)
    assert found == pytest.approx(grid[costs_at_thresholds(net, table, images, grid) <= .6][0].item(), abs=1e-4)


# ---- two networks that teach each other: budget and drop path apply to both

def cps_search(place, **changes):
    from selfsupnas.train.batches import load_training_data
    from selfsupnas.stages.searching import BudgetLosses
    from selfsupnas.stages.configs import SearchConfig
    from selfsupnas.stages.calibration import make_table
    from selfsupnas.train.loop import train
    settings = SearchConfig(**{**vars(config(place, consistency="cps", steps=4, logs=4)), "layers": 2, "channels": 4, "budget": .8, "cost_ramp": (0., 0.), "budget_gain": .2, **changes})
    data = load_training_data(settings)
    table = make_table(settings, data)
    torch.manual_seed(0)
    net = build_supernet(table.space)
    return settings, data, table, net, lambda: train(net, settings, data, BudgetLosses(net, table, settings))


def test_the_budget_counts_both_networks_that_teach_each_other(folder):
    from selfsupnas.train.batches import make_batches
    from selfsupnas.space.budget import expected_cost, binarization_loss
    from selfsupnas.space.gate import gates_of, record_gates
    from selfsupnas.train.step import LossWeights, Objective, build_multitask_model
    from selfsupnas.stages.searching import BudgetLosses
    from selfsupnas.space.supernet import gates_by_edge
    settings, data, table, net, _ = cps_search(folder, budget_of="expected")
    multitask = build_multitask_model(net, settings)
    for network, bias in ((net, 1.), (multitask.peer, .3)):
        for gate in gates_of(network).values(): nn.init.constant_(gate.logits.bias, bias)
    batch = next(make_batches(settings, data)).to("cpu")
    with record_gates(net) as own, record_gates(multitask.peer) as others:
        objective = Objective(settings, multitask, cost=BudgetLosses(net, table, settings))
        losses, metrics = objective(batch, LossWeights(sup=1., semi=1.), torch.Generator().manual_seed(0))
    each = [gates_by_edge(table.space, gates) for gates in (own, others)]
    spent = [expected_cost(table, gates).mean() / table.full for gates in each]
    assert spent[1] < spent[0] - .1, "they differ"
    torch.testing.assert_close(losses.cost.double(), (spent[0] - .8) ** 2 + (spent[1] - .8) ** 2)
    torch.testing.assert_close(losses.binary, binarization_loss(each[0]) + binarization_loss(each[1]))
    assert float(metrics.expected) == pytest.approx(spent[0].item())
    for network in (net, multitask.peer):
        gradients = torch.autograd.grad(losses.cost, [gate.logits.bias for gate in gates_of(network).values()], retain_graph=True, allow_unused=True)
        assert sum(g.abs().sum() for g in gradients if g is not None) > 0, "the budget moves its gates"


def test_each_of_two_networks_closes_by_its_own_cost(folder):
    from selfsupnas.space.gate import CLOSED
    from selfsupnas.stages.searching import BudgetLosses, gate_threshold_of
    _, _, table, net, _ = cps_search(folder)
    settings = cps_search(folder)[0]
    peer, terms_of = copy.deepcopy(net), BudgetLosses(net, table, settings)
    from selfsupnas.space.gate import fix_gates, record_gates
    from selfsupnas.space.supernet import gates_from_edges
    x = torch.rand(2, 3, 64, 80)
    for network, value in ((net, 0.), (peer, .9)): # all closed, and all open
        with fix_gates(network, gates_from_edges(table.space, dict.fromkeys(table.space.gated(), value))), record_gates(network) as gates: network(x)
        metrics = terms_of(gates, 1., network)[1]
        expected = min(.95, max(CLOSED, CLOSED + settings.budget_gain * (metrics.realised - settings.budget)))
        assert gate_threshold_of(network) == pytest.approx(expected)
    assert gate_threshold_of(net) == pytest.approx(CLOSED) and gate_threshold_of(peer) > 2 * CLOSED


def test_two_networks_drop_paths_alike(folder):
    from selfsupnas.train.step import build_multitask_model
    settings, _, _, net, run = cps_search(folder, drop_path=.5)
    trained = run()
    assert [row["peer_realised"] for row in trained.history] and trained.history[-1]["realised"] > 0
    multitask = build_multitask_model(net, settings)
    multitask.drop_path(.4)
    rates = [[cell.drop_path for cell in network.cells.values()] for network in (multitask.model, multitask.peer)]
    assert rates[0] == rates[1] and max(rates[0]) == pytest.approx(.4)


# ---- precision and overflow

def test_a_processor_refuses_half_precision_it_does_not_have(folder):
    from selfsupnas.train.batches import load_training_data
    from selfsupnas.train.config import check_precision
    from selfsupnas.train.loop import train
    settings = config(folder, precision="fp16") # valid, because the config may be for another machine
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="precision fp16.*bf16"): train(nn.Conv2d(3, 3, 1), settings, load_training_data(settings))
        assert not list((folder/"run").glob("*.pt")) if (folder/"run").exists() else True
    for fine in ("no", "bf16"): check_precision(fine, "cpu")
    check_precision("fp16", "cuda")
    half = config(folder, precision="bf16", folder=str(folder/"half"))
    whole = config(folder, folder=str(folder/"whole"))
    histories = []
    for s in (half, whole):
        torch.manual_seed(0)
        histories.append(train(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)), s, load_training_data(s)).history)
    if not torch.cuda.is_available(): assert histories[0][0]["sup"] != histories[1][0]["sup"], "bf16 is used"


class Scaled:
    "Stands in for Accelerate and its optimiser with fp16: a real scaler on the processor."
    def __init__(self, multitask, rate=.1, scale=2.**6):
        self.scaler, self.inner = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000), torch.optim.SGD(multitask.parameters(), rate)
        self.multitask = multitask
    def backward(self, loss): self.scaler.scale(loss).backward()
    def clip_grad_norm_(self, parameters, clip):
        self.scaler.unscale_(self.inner)
        return nn.utils.clip_grad_norm_(parameters, clip)
    def step(self): self.scaler.step(self.inner), self.scaler.update()
    @property
    def state(self): return self.inner.state
    def zero_grad(self, set_to_none=True): self.inner.zero_grad(set_to_none=set_to_none)


def test_an_overflow_is_counted_logged_and_changes_nothing(folder):
    from selfsupnas.train.step import Losses, LossWeights, MultiTaskModel, StepMetrics
    from selfsupnas.train.log import RunLog, log_line
    from selfsupnas.tasks.teacher import AdaptiveThreshold, EMATeacher
    from selfsupnas.train.loop import TrainingState, forward_state, take_step
    from selfsupnas.train.update import OUTCOMES
    torch.manual_seed(0)
    multitask = MultiTaskModel(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    accelerator = Scaled(multitask)
    settings = config(folder, precision="fp16", steps=8, logs=1)
    run = TrainingState(settings, accelerator, multitask, EMATeacher(multitask, .9), accelerator, RunLog(settings), AdaptiveThreshold(.8))
    factor = 1.
    multitask.model[0].weight.register_hook(lambda g: g * factor) # makes the gradient overflow
    def state(): return copy.deepcopy((dict(multitask.state_dict()), dict(run.teacher.model.state_dict())))
    def same(a, b): return all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one.values(), two.values()))
    rows = []
    for step, factor in enumerate([1., float("inf"), float("nan"), 1., float("inf"), float("inf"), float("inf"), 1.]):
        old, scale, before = state(), accelerator.scaler.get_scale(), forward_state(run)
        loss = multitask.model(torch.rand(2, 3, 4, 4)).square().sum()
        run.threshold.value = run.threshold.value + .01
        outcome = take_step(loss, run, step, lambda name: True, before)
        finite = factor == 1
        assert OUTCOMES[outcome] == (None if finite else "overflow") and same(old, state()) != finite and (accelerator.scaler.get_scale() < scale) != finite
        assert run.threshold.value == pytest.approx(before.threshold["value"] + .01 * finite)
        assert all(p.grad is None for p in multitask.parameters())
        if row := run.log.add(step, Losses(sup=loss), StepMetrics(), LossWeights(sup=1.), .1, outcome): rows.append(row)
    assert run.log.overflows == 5 and rows[-1]["overflows"] == 5 and "overflows 5" in log_line(rows[-1], 8)
    other = RunLog(run.log.config)
    other.load_state_dict(run.log.state_dict())
    assert other.overflows == 5
    other.load_state_dict({"rows": [], "window": []}) # of an older checkpoint
    assert other.overflows == 0
    factor, found = float("inf"), []
    for step in range(6): # the scale falls to 2, then 1; below, an overflow is a fault of the gradient
        found.append(OUTCOMES[take_step(multitask.model(torch.rand(2, 3, 4, 4)).sum(), run, step, lambda name: True, forward_state(run))])
    assert found[-1] == "the gradient" and found[0] == "overflow" and set(found) == {"overflow", "the gradient"}


def test_a_run_without_a_scale_logs_no_overflows(folder):
    from selfsupnas.train.log import RunLog
    from selfsupnas.train.step import Losses, LossWeights, StepMetrics
    assert "overflows" not in RunLog(config(folder, steps=1)).add(0, Losses(), StepMetrics(), LossWeights(), .1)


# ---- metrics

def test_how_pseudo_labels_were_can_be_recorded(folder):
    import json
    from selfsupnas.train.batches import load_training_data
    from selfsupnas.train.log import consistency_metrics
    from selfsupnas.train.loop import train
    names = {"pseudo_label_share", "pseudo_label_accuracy", "pseudo_label_share_mean", "pseudo_label_accuracy_mean"}
    settings = config(folder, steps=4, logs=4, ramp=(.5, .5), threshold=0.)
    history = train(nn.Conv2d(3, 3, 1), settings, load_training_data(settings)).history
    ran, got = [row for row in history if "pseudo_share" in row], consistency_metrics(history)
    assert len(ran) == 2 and set(got) == names and got["pseudo_label_share"] == 1
    assert got["pseudo_label_accuracy"] == ran[-1]["pseudo_accuracy"] and got["pseudo_label_accuracy_mean"] == pytest.approx(np.mean([r["pseudo_accuracy"] for r in ran]))
    nan = float("nan")
    for rows in ([], [{"step": 1}], [{"pseudo_share": None, "pseudo_accuracy": None}], [{"pseudo_share": nan, "pseudo_accuracy": nan}]):
        assert consistency_metrics(rows) == dict.fromkeys(names)
    assert consistency_metrics([{"pseudo_share": .5, "pseudo_accuracy": .25}, {"pseudo_share": 0., "pseudo_accuracy": None}]) == {
        "pseudo_label_share": 0., "pseudo_label_share_mean": .25, "pseudo_label_accuracy": None, "pseudo_label_accuracy_mean": .25}
    json.dumps(got, allow_nan=False)


def test_an_undefined_iou_is_no_zero_in_the_figure():
    import json
    from conftest import ROOT
    cells = json.loads((ROOT/"nbs/experiments/camvid.ipynb").read_text("utf8"))["cells"]
    source, = (s for c in cells if "def by_class" in (s := "".join(c["source"])))
    names = {"NAMES": {"labels": "labels"}, "results": []}
    exec(source, names)
    def run(network, iou): return {"parameters": {"fraction": .1, "network": network, "arm": "labels"}, "metrics": {"val_miou": .5, "iou": iou}}
    rows = names["by_class"]([run("searched", {"a": .5, "b": None, "c": None}), run("searched", {"a": .7, "b": .4, "c": None})], .1)
    assert rows == {"searched, labels": {"a": pytest.approx(.6), "b": .4, "c": None}}


# ---- the environment of a run stays unchanged

def test_a_users_process_keeps_its_memory_options(folder, monkeypatch):
    from selfsupnas.train import loop as training
    from selfsupnas.train.batches import load_training_data
    from selfsupnas.core import OWN_PROCESS
    asked = []
    monkeypatch.setattr(training, "keep_freed_memory", lambda: asked.append(1))
    for value, times in ((None, 0), ("0", 0), ("1", 1)):
        monkeypatch.delenv(OWN_PROCESS, raising=False)
        if value: monkeypatch.setenv(OWN_PROCESS, value)
        settings = config(folder, steps=1, w_semi=0., folder=str(folder/f"run{value}"))
        training.train(nn.Conv2d(3, 3, 1), settings, load_training_data(settings))
        assert len(asked) == times, value


@pytest.fixture
def checkout(tmp_path):
    def git(*words): return subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x", *words], check=True, capture_output=True, text=True).stdout.strip()
    git("init", "-q")
    (tmp_path/"a.py").write_text("1\n")
    git("add", "."), git("commit", "-qm", "first")
    return tmp_path, git


def test_the_commit_of_a_record_writes_nothing_into_the_checkout(checkout):
    from selfsupnas.core import commit
    edge, git = checkout
    head = git("rev-parse", "HEAD")
    def files(): return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted((edge/".git").rglob("*")) if p.is_file()}
    os.utime(edge/"a.py", (1, 1)) # `git status` would refresh the index
    before = files()
    assert commit(edge/"a.py") == head and files() == before
    (edge/"a.py").write_text("22\n")
    assert commit(edge/"a.py") == head + "+changes" and files() == before
    subprocess.run(["git", "-C", str(edge), "status"], check=True, capture_output=True)
    (edge/".git"/"index.lock").touch() # another git process is running
    assert commit(edge/"a.py") == head + "+changes"


def test_the_commit_where_git_looks_elsewhere_or_is_missing(checkout, tmp_path_factory, monkeypatch):
    from selfsupnas.core import commit
    edge, git = checkout
    head = git("rev-parse", "HEAD")
    other = tmp_path_factory.mktemp("other")
    subprocess.run(["git", "init", "-q", str(other)], check=True)
    for name, value in dict(GIT_DIR=other/".git", GIT_WORK_TREE=other, GIT_INDEX_FILE=other/"index").items(): monkeypatch.setenv(name, str(value)) # as in a git hook
    assert commit(edge/"a.py") == head
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"): monkeypatch.delenv(name)
    tree = other/"tree"
    git("worktree", "add", "-q", str(tree))
    assert commit(tree/"a.py") == head, "a second working tree"
    subprocess.run(["git", "clone", "-q", "--bare", str(edge), str(other/"bare")], check=True)
    assert commit(other/"bare") is None and commit(other/"bare"/"HEAD") is None
    (edge/"b.py").write_text("not tracked")
    assert commit(edge/"b.py") is None
    (edge/"\u00e4\u6f22.py").write_text("1")
    git("add", "."), git("config", "core.quotepath", "false")
    assert commit(edge/"a.py") == head + "+changes"
    (edge/".git"/"HEAD").write_text("damaged")
    assert commit(edge/"a.py") is None
    monkeypatch.setenv("PATH", str(other))
    assert commit(edge/"a.py") is None, "no git"


# ---- equal objects are one key

def frozen_kinds():
    "Functions that return two equal objects and a different one, by name."
    from selfsupnas.space.architecture import Architecture
    from selfsupnas.tasks.consistency import CONSISTENCY
    from selfsupnas.space.cost import Cost
    from selfsupnas.export import NetworkInfo
    from selfsupnas.data.files import SegmentationSpec
    import dataclasses
    def space(layers=2, **more): return SearchSpace(3, layers, 4, ["sep_conv_3x3", "identity"], **more)
    def spec(*classes): return SegmentationSpec("s", list(classes), [[0, 0, 0], [1, 2, 3]])
    kept, searched = {Edge(0, 0, "keep"): .5, Edge(0, 0, "down"): 1.}, space(search_operations=True)
    cells = {Edge(0, 0, "identity"): 1, Edge(0, 0, "sep_conv_3x3"): .5}
    assert SegmentationSpec("s", ("a", "b"), np.array([[0, 0, 0], [1, 2, 3]], np.uint8)) == spec("a", "b"), "a palette of NumPy"
    return {
        "SearchSpace": lambda: (space(), SearchSpace(3, 2, 4, ("sep_conv_3x3", "identity")), space(3)),
        "Architecture": lambda: (Architecture(space(), kept, {"seed": 1}), Architecture(space(), dict(reversed(kept.items())), {"seed": [2]}), Architecture(space(), {**kept, Edge(0, 0, "keep"): .6})),
        "a searched Architecture": lambda: (Architecture(searched, kept, operations=cells), Architecture(searched, kept, operations=dict(reversed(cells.items()))), Architecture(searched, kept)),
        "CostTable": lambda: (measure_costs(space(), (64, 80)), measure_costs(space(), [64, 80]), measure_costs(space(), (64, 64))),
        "Cost": lambda: (Cost((1, 2), 3, 4, {"conv": 3, "mm": 1}, {"add": 1}), Cost((1, 2), 3, 4, {"mm": 1, "conv": 3}, {"add": 1}), Cost((1, 2), 3, 4, {"conv": 4}, {})),
        "Consistency": lambda: (CONSISTENCY["cps"], dataclasses.replace(CONSISTENCY["cps"]), CONSISTENCY["unimatch"]),
        "SegmentationSpec": lambda: (spec("a", "b"), SegmentationSpec("s", ("a", "b"), ((0, 0, 0), (1, 2, 3))), spec("b", "a")),
        "NetworkInfo": lambda: (NetworkInfo(spec("a", "b"), [64, 80]), NetworkInfo(spec("a", "b"), (64, 80)), NetworkInfo(spec("a", "b"), (64, 64)))}


FROZEN = frozen_kinds()


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_equal_is_one_key(name):
    one, equal, other = FROZEN[name]()
    assert one == equal != other and hash(one) == hash(equal) and {one: 1}[equal] == 1 and len({one, equal, other}) == 2
    for again in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert again == one and hash(again) == hash(one) and type(again) is type(one)
    with pytest.raises(Exception): one.anything = 1


def test_what_an_architecture_keeps_cannot_change_under_its_hash(tmp_path):
    from selfsupnas.space.architecture import Architecture, architecture_to_json, load_architecture, save_architecture
    given = {Edge(0, 0, "keep"): .5}
    found = Architecture(SearchSpace(3, 2, 4), given)
    before = hash(found)
    given[Edge(0, 0, "down")] = 1. # the architecture has its own copy
    for change in (lambda: found.edges.update(given), lambda: found.edges.pop(Edge(0, 0, "keep")), lambda: found.edges.clear(), lambda: found.operations.setdefault("a", 1),
                   lambda: found.edges.__setitem__(Edge(0, 0, "keep"), 1.), lambda: found.edges.__delitem__(Edge(0, 0, "keep")), lambda: found.edges.popitem(), lambda: found.edges.__ior__(given)):
        with pytest.raises(TypeError): change()
    assert hash(found) == before and found.edges == {Edge(0, 0, "keep"): .5} and {**found.edges, "a": 1}
    found.provenance["seed"] = 3 # provenance is not part of its identity
    assert hash(found) == before
    assert load_architecture(save_architecture(found, tmp_path/"a.json")) == found and architecture_to_json(copy.deepcopy(found)) == architecture_to_json(found)


def test_every_frozen_dataclass_has_a_hash_that_takes_its_fields():
    "Frozen dataclasses with a dict or list field define their hash."
    import dataclasses, importlib, pkgutil, typing
    import selfsupnas
    for found in pkgutil.walk_packages(selfsupnas.__path__, "selfsupnas."):
        if found.name.split(".")[-1].startswith("_"): continue
        module = importlib.import_module(found.name)
        for cls in vars(module).values():
            if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__): continue
            if not (cls.__dataclass_params__.frozen and cls.__dataclass_params__.eq): continue
            kinds = typing.get_type_hints(cls)
            held = [f.name for f in dataclasses.fields(cls) if f.compare and (typing.get_origin(kinds[f.name]) or kinds[f.name]).__name__ in ("dict", "list", "Mapping", "set")]
            assert not held or cls.__hash__.__name__ == "hash_fields", (cls, held)
