"Compiled regions compute what the network computes; specialised execution equals masked execution while nothing reopens; a miss is counted."
import copy, logging, os, subprocess, sys, warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from selfsupnas.space.architecture import Architecture, save_architecture
from selfsupnas.distributed import use_masked_norms
from selfsupnas.space.cell import GatedCell, SparseFeatures
from selfsupnas.space.compiled import CompiledNetwork, compile_regions, compiled_or_plain, fold_batch_norm
from selfsupnas.space.gate import fix_gates, record_gates
from selfsupnas.space.grid import SearchSpace
from selfsupnas.space.network import StaticNetwork
from selfsupnas.space.supernet import build_supernet, gate_name
from selfsupnas.stages.retraining import load_network
from selfsupnas.train.checkpoint import save_weights

ROUNDING = 1e-9 # largest relative difference, in double precision
logging.getLogger("torch.__trace").disabled = True # pytest's handler of logs would have torch write pages about each graph
SEARCHED = dict(operations=("sep_conv_3x3", "identity"), search_operations=True)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def supernet(execution="masked", layers=2, drop_path=0., recompute=False, **space):
    torch.manual_seed(layers)
    net = build_supernet(SearchSpace(5, layers=layers, channels=4, **space)).train()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)): nn.init.uniform_(norm.bias, .3, 1.) # not on ReLU's kink
    net.execution, net.recompute = execution, recompute
    net.drop_path(drop_path)
    return net


def static():
    space = SearchSpace(5, layers=2, channels=4)
    torch.manual_seed(0)
    return StaticNetwork(Architecture(space, {edge: .5 + .1 * i / 9 for i, edge in enumerate(space.edges())}))


def gates(space, batch=3, shut=.4, **fixed):
    "Gates of each cell for each image, a share of them shut; fixed: name of an edge such as down_1_0 -> gate."
    torch.manual_seed(4)
    values = {}
    for layer, scale in space.cells():
        columns = space.gated_at(layer, scale)
        part = torch.rand(batch, len(columns)) + .1
        part *= torch.rand(part.shape) >= shut
        for i, kind in enumerate(columns):
            if (key := f"{kind}_{layer}_{scale}") in fixed: part[:, i] = torch.as_tensor(fixed[key])
        values[gate_name(layer, scale)] = part
    return values


def step(net, x, values=None):
    "Logits, gradients by parameter (zero if there is none) and buffers of one training step, with the same draws."
    torch.manual_seed(7)
    net.zero_grad()
    with fix_gates(net, values or {}):
        logits = net(x)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}
    return {"logits": logits.detach()}, gradients, dict(net.named_buffers())


def assert_equal(ours, theirs):
    for own, other in zip(ours, theirs):
        assert own.keys() == other.keys()
        for name, value in other.items():
            difference = (own[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-6)
            assert difference < ROUNDING, (name, difference)


# ---- regions

CASES = {"plain": dict(), "searched and dropped": dict(SEARCHED, drop_path=.4), "recomputed": dict(recompute=True, drop_path=.4)}


def test_traced_regions_give_the_same_step():
    "Hooks on gates were set after the network had been compiled."
    net, x = supernet(drop_path=.4), torch.randn(3, 3, 33, 47)
    compiled, values = compile_regions(copy.deepcopy(net), "eager"), gates(net.space)
    for hooked in (None, values): assert_equal(step(compiled, x, hooked), step(net, x, hooked))


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_regions_with_traced_gradients_give_the_same_step(name):
    net, x = supernet(**CASES[name]), torch.randn(3, 3, 33, 47)
    compiled, values = compile_regions(copy.deepcopy(net), "aot_eager"), gates(net.space)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "not compiled")
        for hooked in (None, values): assert_equal(step(compiled, x, hooked), step(net, x, hooked))
        with torch.no_grad(): torch.testing.assert_close(compiled.eval()(x), net.eval()(x), rtol=ROUNDING, atol=1e-12)


@pytest.mark.long
def test_compiled_regions_give_the_same_step():
    net, x = supernet(layers=1), torch.randn(3, 3, 33, 47)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "not compiled")
        assert_equal(step(compile_regions(copy.deepcopy(net)), x), step(net, x))


def test_cells_of_one_shape_share_a_compilation():
    cells, backend = nn.ModuleList(GatedCell(4, ("sep_conv_3x3",), ("keep", "down")) for _ in range(3)).train(), CompileCounter()
    use_masked_norms(compile_regions(cells, backend))
    x = SparseFeatures(torch.randn(2, 4, 8, 8))
    for i, cell in enumerate(cells):
        cell.masked, cell.drop_path = True, i / 4 # which is no part of the region
        cell(x, None, torch.ones(2, 1))
    assert backend.frame_count == 1


@pytest.mark.long
def test_a_network_has_fewer_regions_than_cells_and_changes_compile_nothing():
    backend = CompileCounter()
    net = compile_regions(supernet(layers=4, drop_path=.2), backend)
    x = torch.randn(2, 3, 32, 32)
    step(net, x)
    first = backend.frame_count
    assert first < 2 * len(net.cells), "cells and gates"
    net.drop_path(.3)
    with record_gates(net) as recorded: step(net, x)
    step(copy.deepcopy(net), x) # as a teacher is
    assert backend.frame_count == first and len(recorded) == len(net.cells)


def test_a_static_network_is_compiled_by_cells():
    net, x = static(), torch.randn(2, 3, 33, 47)
    assert_equal(step(compile_regions(copy.deepcopy(net), "eager"), x), step(net, x))


def test_a_compiler_that_fails_leaves_one_warning():
    def broken(graph, inputs): raise OSError("no such compiler")
    net, x = supernet(), torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_equal(step(compile_regions(copy.deepcopy(net), broken), x), step(net, x))
    assert [str(w.message) for w in caught if "no such compiler" in str(w.message)] and len(caught) == 1


MISSING = """import torch, warnings
from selfsupnas.space.grid import SearchSpace
from selfsupnas.space.supernet import build_supernet
from selfsupnas.space.compiled import compile_regions
net = build_supernet(SearchSpace(5, layers=2, channels=4)).train()
net.execution = "masked"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    compile_regions(net)(torch.randn(2, 3, 32, 32)).sum().backward()
print("warnings", sum("not compiled" in str(w.message) for w in caught))"""


@pytest.mark.long
def test_a_missing_compiler_leaves_one_warning(tmp_path):
    environment = {**os.environ, "CXX": str(tmp_path/"nowhere"/"g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", MISSING], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "warnings 1" in done.stdout, done.stderr[-2000:]


def test_errors_of_the_function_are_not_hidden():
    def wrong(x): return x.view(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="shape"): compiled_or_plain(wrong, [], backend="eager")(torch.zeros(3))


# ---- prediction

def trained():
    net = static().train()
    for _ in range(3): net(torch.randn(2, 3, 64, 64))
    return net.eval()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_network_for_prediction_gives_the_same_logits(backend):
    net = trained()
    compiled = CompiledNetwork(net, backend=backend)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in compiled.modules()) and not any(p.requires_grad for p in compiled.parameters())
    for shape in ((2, 3, 45, 67), (1, 3, 64, 64))[:1 if backend == "eager" else 2]:
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), net(x).float(), rtol=1e-5, atol=1e-5)
    halves = CompiledNetwork(net, torch.bfloat16, backend)
    halves.calls = compiled.calls if backend == "eager" else {} # other weights, no other trace
    difference = (halves(x) - net(x)).abs().max()
    assert halves(x).dtype == torch.float32 and 0 < difference < .1 * net(x).abs().max()


def test_load_network_compiles(tmp_path):
    torch.set_default_dtype(torch.float32)
    net = trained()
    save_architecture(net.architecture, tmp_path/"architecture.json")
    save_weights(net, tmp_path/"network.safetensors")
    x, plain, compiled = torch.randn(1, 3, 64, 64), load_network(tmp_path), load_network(tmp_path, compile=True, dtype=torch.bfloat16)
    assert type(plain) is StaticNetwork and next(compiled.parameters()).dtype == torch.bfloat16
    compiled.backend = "eager"
    assert (compiled(x) - plain(x)).abs().max() < .1 * plain(x).abs().max()
    with pytest.raises(ValueError, match="dtype"): load_network(tmp_path, dtype=torch.bfloat16)


# ---- specialised

def shut_below(space, gate=0.):
    "Gates of images that use the finest scale alone; `gate` of the edge to the next scale in the second cell, one an image."
    values = {gate_name(*cell): torch.full((3, len(space.gated_at(*cell))), .7) for cell in space.cells()}
    for layer in range(space.layers):
        if (layer, 0) in space.cells() and "down" in space.gated_at(layer, 0): values[gate_name(layer, 0)][:, space.gated_at(layer, 0).index("down")] = 0
    values[gate_name(1, 0)][:, space.gated_at(1, 0).index("down")] = torch.as_tensor(gate)
    return values


@pytest.mark.parametrize("case", [dict(), dict(SEARCHED), dict(recompute=True, drop_path=.3)], ids=str)
def test_specialised_is_masked_while_nothing_reopens(case):
    net = supernet("specialised", 3, **case)
    x, values = torch.randn(3, 3, 33, 47), gates(net.space, shut=.3, down_1_0=0., keep_2_1=0., up_1_1=0., sep_conv_3x3_2_0=0., identity_1_1=0.)
    masked = copy.deepcopy(net)
    masked.execution = "masked"
    assert_equal(step(net, x, values), step(masked, x, values))
    assert net.respecialise().skipped >= 2
    for _ in range(2): assert_equal(step(net, x, values), step(masked, x, values))
    assert net.respecialise().misses == 0


def test_a_miss_is_counted_once_an_image_and_the_edge_comes_back():
    net = supernet("specialised", 4)
    masked, x = copy.deepcopy(net), torch.randn(3, 3, 64, 64)
    masked.execution = "masked"
    shut, reopened = shut_below(net.space), shut_below(net.space, [0., .5, .5])
    assert_equal(step(net, x, shut), step(masked, x, shut))
    first = net.respecialise()
    assert (first.misses, first.respecialisations) == (0, 1) and "down" in net.cells["1_0"].skipped
    unreached = sum(len(net.space.gated_at(*cell)) for cell in net.space.cells() if cell[1])
    assert first.skipped == unreached + sum("down" in net.space.gated_at(layer, 0) for layer in range(4)), "all but the finest scale"
    assert_equal(step(net, x, shut), step(masked, x, shut))
    step(net, x, reopened)
    step(masked, x, reopened)
    second = net.respecialise()
    assert second.misses == 2 and second.respecialisations == 2 and second.skipped < first.skipped
    net.load_state_dict(masked.state_dict())
    assert_equal(step(net, x, reopened), step(masked, x, reopened))
    assert net.respecialise().misses == 0
    with torch.no_grad(), fix_gates(net, {**shut, **{gate_name(0, 0): torch.ones(2)}}), fix_gates(masked, {**shut, **{gate_name(0, 0): torch.ones(2)}}):
        assert torch.equal(net.eval()(x), masked.eval()(x)), "evaluation leaves nothing out"


def test_a_search_respecialises_five_times_and_misses_bring_cells_back():
    net, x = supernet("specialised", 4), torch.randn(3, 3, 32, 32)
    found = []
    for turn in range(8):
        step(net, x, shut_below(net.space, .5 * (turn % 2)))
        found.append(net.respecialise())
    assert [f.respecialisations for f in found] == [1, 2, 3, 4, 5, 5, 5, 5] and [f.misses for f in found] == [0, 3, 0, 3, 0, 3, 0, 0]
    assert not net.cells["1_0"].skipped and net.cells["0_0"].skipped
    masked = copy.deepcopy(net)
    masked.execution = "masked"
    with pytest.raises(ValueError, match="specialised"): masked.respecialise()
    assert_equal(step(net, x, shut_below(net.space, .5)), step(masked, x, shut_below(net.space, .5)))


def test_specialised_reads_no_value_within_a_window():
    net = supernet("specialised", 4)
    step(net, torch.randn(3, 3, 64, 64), shut_below(net.space))
    net.respecialise()
    net.to("meta")
    for _ in range(2): net(torch.randn(3, 3, 64, 64, device="meta")).sum().backward()
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"): net.respecialise()


def test_what_is_left_out_leaves_the_compiled_graph():
    backend = CompileCounter()
    net = compile_regions(supernet("specialised"), backend)
    x = torch.randn(3, 3, 32, 32)
    for _ in range(2): step(net, x, shut_below(net.space))
    before, operations = backend.frame_count, backend.op_count
    assert net.respecialise().skipped
    step(net, x, shut_below(net.space))
    assert 0 < backend.frame_count - before < before and backend.op_count - operations < operations
    before = backend.frame_count
    for gate in (0., [0., 0., .5], 0.): step(net, x, shut_below(net.space, gate))
    assert backend.frame_count == before, "a miss compiles nothing"


# ---- calls

class Calls(TorchDispatchMode):
    "Counts operations but for views."
    count = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not (function.is_view or function._schema.name in ("aten::detach", "aten::t", "aten::promote_types"))
        return function(*args, **(kwargs or {}))


def test_masked_execution_makes_little_more_calls_than_grouped():
    counts = []
    for execution in ("grouped", "masked"):
        net = supernet(execution, 4)
        with Calls() as calls: net(torch.randn(4, 3, 128, 128)).square().mean().backward()
        counts.append(calls.count)
    assert counts[1] < 1.35 * counts[0]


def test_folding_changes_no_logits():
    net, x = trained(), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(fold_batch_norm(net)(x), net(x), rtol=ROUNDING, atol=1e-9)
