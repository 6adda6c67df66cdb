"Corners that users' networks, operations and machines reach: each is counted, taken or refused by name, and nothing of the caller's is left changed."
import copy, os, pickle, subprocess, sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from selfsupnas import cost
from selfsupnas.budget import measure_costs
from selfsupnas.cost import COSTS, COUNTERS, count_cost, count_flops
from selfsupnas.grid import Path, SearchSpace
from selfsupnas.operations import OPERATIONS, make_operation
from selfsupnas.space import supernet

C, H, W = 8, 12, 16


class Calls(nn.Module):
    "A module from a function of itself and x, with parameters and parts by name."
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items(): setattr(self, name, part)

    def forward(self, x): return self.function(self, x)


def weight(*shape): return nn.Parameter(torch.zeros(shape))
def pixels(x): return x.flatten(2).transpose(1, 2) # (B,C,H,W) -> (B,HW,C)
def image(pixels): return pixels.transpose(1, 2).unflatten(2, (H, W))


# ---- multiply-adds: counted, or refused by name

N = H * W
COUNTED = { # a module and its products by hand
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
    attention = nn.MultiheadAttention(C, 2, **part).requires_grad_(name != "frozen") # frozen: one fused operator, in evaluation mode
    COUNTED[f"nn.MultiheadAttention, {name}"] = Calls(lambda s, x: s.a(pixels(x), pixels(x), pixels(x), need_weights=False)[0], a=attention), N * 4 * C * C + 2 * N * N * C
del COUNTED["nn.MultiheadAttention"]


@pytest.mark.parametrize("name", COUNTED)
def test_products_are_counted(name):
    module, by_hand = COUNTED[name]
    assert count_flops(module, torch.zeros(1, C, H, W)) == by_hand
    assert COSTS["flops"](module.train(), torch.zeros(3, C, H, W)) in (3 * by_hand, by_hand), "a batch counts as a batch, a product of weights alone once"
    assert all(m.training for m in module.modules()) and torch.backends.mha.get_fastpath_enabled()


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w): return image(pixels(x) @ w)
    @staticmethod
    def backward(ctx, g): return g, None


UNCOUNTABLE = { # a module and what its error must name
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
    class AtHome(nn.Module): # the grid has other sizes and channels, where these would fail for another reason
        def __init__(self):
            super().__init__()
            self.m = copy.deepcopy(module) if name != "TorchScript" else module
        def forward(self, x):
            return x + self.m(torch.zeros(1, C, H, W)).mean()
    operation(lambda channels: AtHome())
    with pytest.raises(ValueError, match="mine") as e: table()
    assert told in str(e.value)
    assert table("parameters").operations[0]["mine"] >= 0, "another cost can be asked for"


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
    assert ours == theirs and (ours > 0) == ("conv" in name)


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "deeplabv3plus_resnet18", "unet_resnet18"])
def test_fvcore_and_torch_agree_on_rivals(name):
    from selfsupnas.baselines import build_baseline
    try: rival = build_baseline(name, 3).eval()
    except ImportError as e: pytest.skip(str(e))
    ours, theirs = both_counts(rival, torch.zeros(1, 3, 64, 64))
    assert ours == theirs > 0 and count_cost(rival, (64, 64)).flops == count_flops(rival, torch.zeros(1, 3, 64, 64))


def test_fvcore_and_torch_agree_on_the_supernet():
    ours, theirs = both_counts(supernet(SearchSpace(3, 2, C, tuple(OPERATIONS))).eval(), torch.zeros(1, 3, 64, 64))
    assert ours == theirs > 0


def test_a_networks_cost_that_is_too_low_is_said():
    with pytest.warns(UserWarning, match="fft_fft2"): count_cost(Calls(lambda s, x: torch.fft.fft2(x).real), (32, 32))


# ---- operations keep shape and kind

def odd_operations():
    "Name -> maker, the type of its error and what this must say beside the operation's name."
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
    "At even sizes it keeps the size, at odd ones it does not; in a network that had no cost table, too."
    operation(lambda c: nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2)))
    net = supernet(SearchSpace(3, 1, C, ("mine", "identity"), search_operations))
    net(torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match="mine"): net(torch.rand(2, 3, 36, 36))


def test_operations_in_half_precision_fit(operation):
    operation(lambda c: nn.Conv2d(c, c, 1))
    with torch.autocast("cpu", torch.bfloat16): supernet(SearchSpace(3, 1, C, ("mine", "identity")))(torch.rand(2, 3, 64, 64))
