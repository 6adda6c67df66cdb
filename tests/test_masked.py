"Masked execution is grouped execution: logits, gradients and buffers agree; no value is read back; the forward pass is one graph."
import contextlib, copy, dataclasses, logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from selfsupnas.distributed import MaskedNorm, call_masked
from selfsupnas.space.budget import binarization_loss, budget_loss, expected_cost, measure_costs, realised_cost
from selfsupnas.space.gate import fix_gates, gates_of, record_gates, set_gate_threshold
from selfsupnas.space.grid import SearchSpace
from selfsupnas.space.operations import OPERATIONS
from selfsupnas.space.supernet import build_supernet, freeze_running_statistics, gate_name
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import BudgetLosses
from selfsupnas.tasks.consistency import CONSISTENCY, consistency_loss
from selfsupnas.tasks.permutations import permutation_set
from selfsupnas.tasks.teacher import EMATeacher
from selfsupnas.train.batches import LabelledBatch, StepBatch, UnlabelledBatch
from selfsupnas.train.log import RunLog
from selfsupnas.train.loop import TrainingState, forward_state, make_moving_threshold, make_optimiser, take_step
from selfsupnas.train.step import LossWeights, Objective, build_multitask_model, jigsaw_term, supervised_term

ROUNDING = 1e-9 # largest relative difference, in double precision
logging.getLogger("torch.__trace").disabled = True # pytest's handler of logs would have torch write pages about each graph
SEARCHED = dict(operations=("sep_conv_3x3", "max_pool_3x3", "identity"), search_operations=True)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(layers=3, drop_path=0., recompute=False, gate="conditional", **space):
    torch.manual_seed(layers)
    net = build_supernet(SearchSpace(5, layers=layers, channels=8, **space), gate=gate)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)): # as in a trained network; a constant feature is not on ReLU's kink
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if values is not None: nn.init.uniform_(values, .3, 1.)
    net.drop_path(drop_path)
    net.recompute = recompute
    return net


def random_gates(space, batch, shut, absent=()):
    "Gates of each cell for each image, a share of them shut; cells of `absent` get no image by an edge."
    def gates(cell):
        values = torch.rand(batch, len(space.gated_at(*cell))) * (torch.rand(batch, len(space.gated_at(*cell))) >= shut)
        for i, kind in enumerate(space.gated_at(*cell)):
            if kind in absent: values[:, i] = 0
        return values
    return {gate_name(*cell): gates(cell) for cell in space.cells()}


def run(net, execution, call):
    "Result, gradients by parameter and buffers of one call in an execution, with the same draws."
    net = copy.deepcopy(net)
    net.execution = execution
    torch.manual_seed(7)
    result = call(net)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}
    return result.detach(), gradients, dict(net.named_buffers())


def backward(result):
    if result.requires_grad: (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    return result


def assert_equal(net, call):
    (result, gradients, buffers), masked = (run(net, execution, call) for execution in ("grouped", "masked"))
    def difference(own, other): return (own - other).abs().max() / other.abs().max().clamp(min=1e-6)
    assert difference(masked[0], result) < ROUNDING
    for theirs, ours in ((gradients, masked[1]), (buffers, masked[2])):
        assert ours.keys() == theirs.keys()
        different = {name: f"{d:.1e}" for name in theirs if (d := difference(ours[name].double(), theirs[name].double()).item()) >= ROUNDING}
        assert not different
    return result, gradients


def fixed(x, values, train=True):
    "A call for `assert_equal`: logits of a network whose gates are fixed."
    def call(net):
        with fix_gates(net.train(train), values): return backward(net(x))
    return call


CASES = {"open": dict(shut=0.), "half shut": dict(shut=.5), "most shut": dict(shut=.8, layers=5), "all shut": dict(shut=1.), "two layers": dict(layers=2),
         "one image": dict(batch=1, layers=4), "odd": dict(size=(33, 47), layers=4), "no cell below": dict(absent=("down",)), "none above": dict(absent=("up", "keep")),
         "static": dict(gate="static"), "searched": dict(SEARCHED, shut=.5), "dropped": dict(drop_path=.5), "recomputed": dict(recompute=True, drop_path=.3),
         "searched and dropped": dict(SEARCHED, drop_path=.5, layers=4, size=(33, 47))}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_executions_agree_with_gates_shut_at_random(name, train):
    case = {"batch": 3, "size": (64, 80), "shut": .4, "absent": (), **CASES[name]}
    batch, size, shut, absent = (case.pop(key) for key in ("batch", "size", "shut", "absent"))
    net = network(**case)
    for seed in range(2):
        torch.manual_seed(seed)
        x, values = torch.randn(batch, 3, *size), random_gates(net.space, batch, shut, absent)
        assert_equal(net, fixed(x, values, train))


@pytest.mark.parametrize("size", [(64, 80), (33, 47), (40, 48)], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["conditional", "static"])
def test_executions_agree_with_gates_of_their_own(size, batch, kind):
    "Gates that differ by image, some shut by a threshold: their gradients and leaks agree, too; one image may reach a cell alone."
    net = network(4, gate=kind)
    torch.manual_seed(batch)
    for gate in gates_of(net).values():
        if kind == "conditional":
            nn.init.normal_(gate.logits.weight, 0., 2.)
            nn.init.normal_(gate.logits.bias, .3, .5)
        else: nn.init.normal_(gate.logits, .3, .5)
    set_gate_threshold(net, .2)
    x = torch.randn(batch, 3, *size)
    def call(net):
        with record_gates(net) as gates: logits = net(x)
        charge = sum((g * torch.linspace(1, 2, g.numel()).view_as(g)).sum() for g in gates.values())
        ((logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum() + charge).backward()
        recorded.append({name: g.detach() for name, g in gates.items()})
        return logits
    recorded = []
    assert_equal(net, call)
    grouped, masked = recorded
    assert set(masked) == set(gates_of(net)) and set(grouped) <= set(masked)
    for name, gates in masked.items(): torch.testing.assert_close(gates, grouped.get(name, torch.zeros_like(gates)), rtol=ROUNDING, atol=0)
    values = torch.cat([g.flatten() for g in grouped.values()])
    assert 0 < (values == 0).sum() < len(values), "some gates are shut"


def test_a_shut_gate_has_the_gradient_of_its_leak_alone():
    net = network()
    net.execution = "masked"
    for gate in gates_of(net).values():
        nn.init.zeros_(gate.logits.weight)
        nn.init.constant_(gate.logits.bias, -.5)
    x = torch.randn(2, 3, 64, 80)
    with record_gates(net) as gates: loss = net(x).square().sum()
    of_gates = torch.autograd.grad(loss, list(gates.values()), retain_graph=True, materialize_grads=True)
    assert not any(g.any() for g in (*gates.values(), *of_gates))
    (loss + sum(g.sum() for g in gates.values())).backward()
    assert gates_of(net)["cells.0_0.gate"].logits.bias.grad.all()


def test_frozen_statistics_stay_and_agree():
    net = network(4)
    x, values = torch.randn(3, 3, 64, 80), random_gates(net.space, 3, .4)
    def call(net):
        with freeze_running_statistics(net): return fixed(x, values)(net)
    assert_equal(net, call)
    for execution in ("grouped", "masked"):
        for name, buffer in run(net, execution, call)[2].items(): assert torch.equal(buffer, net.get_buffer(name))


def test_statistics_of_a_cell_that_no_image_reaches_stay():
    net = network(4)
    values = random_gates(net.space, 2, 0., ("down",))
    before = copy.deepcopy(net.state_dict())
    _, _, buffers = run(net, "masked", fixed(torch.randn(2, 3, 64, 80), values))
    below = [name for name in buffers if "cells." in name and ".3_2." in name and "running" in name]
    assert below and all(torch.equal(buffers[name], before[name]) for name in buffers if "cells.3_2." in name)
    assert buffers["cells.3_0.operations.sep_conv_3x3.0.2.num_batches_tracked"] == 1


class OwnBlock(nn.Module):
    "An operation of a user: batch norm without factors, another momentum, another without running statistics, a residual."
    def __init__(self, channels):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels, affine=False, momentum=None), nn.BatchNorm2d(channels, momentum=.3, track_running_stats=False)])

    def forward(self, x): return x + self.norms[1](self.last(self.norms[0](self.first(x)).tanh()))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_mask_reaches_batch_norm_in_operations_of_users(monkeypatch, train):
    monkeypatch.setitem(OPERATIONS, "own", OwnBlock)
    net = network(3, operations=("own", "identity"))
    assert_equal(net, fixed(torch.randn(3, 3, 64, 80), random_gates(net.space, 3, .4), train))


def test_other_batch_norm_is_refused(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "own", lambda channels: nn.SyncBatchNorm(channels))
    net = network(2, operations=("own",))
    with pytest.raises(TypeError, match="SyncBatchNorm"): net.execution = "masked"
    with pytest.raises(ValueError, match="grouped, masked"): net.execution = "magic"
    assert net.execution == "grouped"


def test_executions_share_parameters_and_may_change():
    net = network()
    names, state = [n for n, _ in net.named_parameters()], copy.deepcopy(net.state_dict())
    optimised = set(map(id, net.parameters()))
    net.execution = "masked"
    assert net.execution == "masked" and set(map(id, net.parameters())) == optimised and [n for n, _ in net.named_parameters()] == names
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values())) and list(net.state_dict()) == list(state)
    x, values = torch.randn(2, 3, 64, 80), random_gates(net.space, 2, .5)
    back = copy.deepcopy(net)
    back.execution = "grouped"
    fresh = network()
    with fix_gates(back.train(), values), fix_gates(fresh.train(), values): assert torch.equal(back(x), fresh(x))
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), fresh.state_dict().values()))


def test_masked_norm_is_batch_norm_of_the_rows():
    torch.manual_seed(0)
    norm, x, mask = nn.BatchNorm2d(4), (1e3 + torch.randn(5, 4, 3, 2)).requires_grad_(), torch.tensor([True, False, True, True, False])
    own = copy.deepcopy(norm)
    own.__class__ = MaskedNorm
    weights = torch.randn(5, 4, 3, 2)
    (norm(x[mask]) * weights[mask]).sum().backward()
    expected, x.grad = x.grad, None
    out = call_masked(own, mask, x)
    assert own.mask is None
    (out * weights)[mask].sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-9, atol=1e-9)
    for name, value in norm.state_dict().items(): torch.testing.assert_close(own.state_dict()[name], value, rtol=1e-9, atol=0)
    inputs = torch.randn(3, 4, 2, 2, requires_grad=True)
    own.eps = .1
    assert torch.autograd.gradcheck(lambda x, *_: call_masked(own, mask[:3], x), (inputs, own.weight, own.bias)), "absent images are normalised, too"


def test_an_image_that_does_not_count_changes_nothing_even_if_it_overflows():
    "Statistics of other images, or of none, may make it overflow in half precision."
    torch.manual_seed(0)
    norm, mask = nn.BatchNorm2d(4).float(), torch.tensor([True, False, True])
    norm.__class__ = MaskedNorm
    x = torch.randn(3, 4, 3, 2).half()
    x[1] = torch.inf
    x.requires_grad_()
    out = call_masked(norm, mask, x)
    (out * torch.randn(3, 4, 3, 2).half()).sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in norm.parameters())
    assert x.grad.isfinite().all() and not x.grad[1].any() and norm.running_var.isfinite().all()
    assert call_masked(norm, torch.zeros_like(mask), x.detach().nan_to_num() * 6e4).isfinite().all()
    assert call_masked(norm.eval(), mask, x).isfinite().all()


def test_a_mean_far_from_zero_costs_no_more_accuracy_than_in_grouped_execution():
    "In single precision, with few images that count; against double precision."
    torch.manual_seed(0)
    for mean in (0., 10., 1e3):
        x, mask, norm = mean + torch.randn(8, 4, 16, 16), torch.arange(8) < 2, nn.BatchNorm2d(4)
        exact, single = norm(x[mask]), nn.BatchNorm2d(4).float()
        rows = single(x[mask].float()).double()
        single.__class__ = MaskedNorm
        error, grouped = ((own - exact).abs().max() for own in (call_masked(single, mask, x.float())[mask], rows))
        assert error < 4 * grouped + 1e-6


# ---- the objective with its four terms

def step_batch(batch=2, size=(64, 80), device="cpu"):
    draws = torch.Generator().manual_seed(3)
    def images(): return torch.randn(batch, 3, *size, generator=draws).to(device)
    def labels():
        label = torch.randint(5, (batch, *size), generator=draws)
        return label.masked_fill(torch.rand(batch, *size, generator=draws) < .1, 255).to(device)
    valid = torch.ones(batch, *size, dtype=torch.bool, device=device)
    return StepBatch(labelled=LabelledBatch(images(), labels(), images()),
                     unlabelled=UnlabelledBatch(images(), valid, labels(), images(), images()), jigsaw=images())


RUNS = {"averaged": dict(consistency="mean_teacher"), "unimatch": dict(consistency="unimatch"), "cps": dict(consistency="cps"),
        "clean": dict(consistency="unimatch", statistics="clean"), "separate": dict(statistics="separate", w_strong=1.), "dropped": dict(drop_path=.4, consistency="unimatch")}


def objective_of(net, config, table, execution):
    "The objective of a copy of the network, with gates that differ by image."
    net = copy.deepcopy(net)
    net.execution = execution
    torch.manual_seed(1)
    multitask = build_multitask_model(net, config).train()
    multitask.drop_path(config.drop_path)
    teacher = EMATeacher(multitask)
    return Objective(config, multitask, teacher, permutation_set(config.jigsaw_n), BudgetLosses(net, table, config))


@pytest.mark.parametrize("name", RUNS)
def test_all_terms_of_the_objective_agree(name, tmp_path):
    config = SearchConfig(folder=str(tmp_path), threshold=.1, w_jig=.5, budget=.6, cost_ramp=(0., .5), **RUNS[name])
    net = network(4)
    for gate in gates_of(net).values():
        nn.init.normal_(gate.logits.weight, 0., 2.)
        nn.init.normal_(gate.logits.bias, .3, .5)
    table = measure_costs(net.space, (64, 80))
    results = []
    for execution in ("grouped", "masked"):
        objective = objective_of(net, config, table, execution)
        torch.manual_seed(5)
        losses, metrics = objective(step_batch(), weights := LossWeights(sup=1., strong=config.w_strong or None, jig=.5, semi=1., cost=1., binary=1.), torch.Generator().manual_seed(5), .6)
        losses.total(weights).backward()
        results.append((losses, metrics, objective.multitask))
    (losses, metrics, grouped), (own_losses, own_metrics, masked) = results
    for kind in ("sup", "strong", "jig", "semi", "cost", "binary"):
        loss, own = getattr(losses, kind), getattr(own_losses, kind)
        assert (own is None) == (loss is None) and (loss is None or own.item() == pytest.approx(loss.item(), rel=ROUNDING)), kind
    assert losses.semi > 0 and losses.cost > 0 and 0 < float(own_metrics.realised) < 1
    for field in dataclasses.fields(metrics):
        ours, theirs = (getattr(m, field.name) for m in (own_metrics, metrics))
        if theirs is not None: torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=ROUNDING, atol=1e-12, equal_nan=True)
    for (key, p), q in zip(grouped.named_parameters(), masked.parameters()):
        ours, theirs = (torch.zeros_like(p) if r.grad is None else r.grad for r in (q, p))
        assert (ours - theirs).abs().max() <= ROUNDING * theirs.abs().max().clamp(min=1e-6), key
    for (key, b), c in zip(grouped.named_buffers(), masked.buffers()): torch.testing.assert_close(c, b, rtol=ROUNDING, atol=1e-12, msg=key)


# ---- no wait

def on_meta(net, execution="masked"):
    "A copy on the device without data, where reading a value raises."
    net = copy.deepcopy(net).to("meta")
    net.execution = execution
    return net


def step_on_meta(net, size=(64, 80)):
    with record_gates(net) as gates: logits = net(torch.randn(3, 3, *size, device="meta"))
    (logits.square().mean() + sum(g.sum() for g in gates.values())).backward()
    return logits


@pytest.mark.parametrize("case", [dict(), dict(gate="static"), dict(SEARCHED), dict(drop_path=.3), dict(recompute=True)], ids=str)
def test_no_value_is_read_back(case):
    net = network(4, **case)
    assert step_on_meta(on_meta(net).train(), (33, 47)).shape == (3, 5, 33, 47)
    with torch.no_grad(): on_meta(net).eval()(torch.randn(1, 3, 64, 80, device="meta"))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"): step_on_meta(on_meta(net, "grouped").train())


def test_a_planted_wait_is_found(monkeypatch):
    from selfsupnas.space import cell
    plain = cell.run_masked
    def planted(own, sparse, edges, *rest):
        if (edges > 0).any(): return plain(own, sparse, edges, *rest)
    monkeypatch.setattr(cell, "run_masked", planted)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"): step_on_meta(on_meta(network()).train())


@pytest.mark.parametrize("name", ["averaged", "unimatch", "cps", "clean"])
def test_the_objective_reads_nothing_back(name, tmp_path, monkeypatch):
    "The draws of boxes and jigsaws are on the processor, as are those of the data: their copies are the only ones between devices."
    config = SearchConfig(folder=str(tmp_path), threshold=.1, w_jig=.5, cost_ramp=(0., .5), **RUNS[name])
    net = network(3)
    objective = objective_of(net, config, measure_costs(net.space, (64, 80)), "masked")
    objective.multitask.to("meta")
    objective.teacher.model.to("meta")
    losses, _ = objective(step_batch(device="meta"), weights := LossWeights(sup=1., jig=.5, semi=1., cost=1., binary=1.), torch.Generator().manual_seed(5), .6)
    losses.total(weights).backward()


class NoCopies(TorchDispatchMode):
    "Refuses tensors that change their device, and values that are read."
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name != "aten::_local_scalar_dense", "a value is read"
        result = function(*args, **(kwargs or {}))
        if function._schema.name in ("aten::_to_copy", "aten::copy_") and isinstance(args[0], torch.Tensor):
            devices = {t.device for t in (*args, result) if isinstance(t, torch.Tensor)}
            assert len(devices) == 1, f"{function} between {devices}"
        return result


def test_nothing_is_copied_between_devices():
    net = on_meta(network(4, drop_path=.3)).train()
    with NoCopies(): step_on_meta(net)
    with pytest.raises(AssertionError, match="between"), NoCopies(): torch.ones(2).to("meta")


class MetaAccelerator:
    "What `take_step` needs of Accelerate's, in full precision."
    scaler = None
    def backward(self, loss): loss.backward()
    def clip_grad_norm_(self, parameters, clip): return nn.utils.clip_grad_norm_(parameters, clip)


def state_on_meta(config, net):
    "The state of a search on the device without data; SGD, since fused AdamW does not know that device."
    objective = objective_of(net, config, measure_costs(net.space, (64, 80)), "masked")
    teacher, multitask = objective.teacher, objective.multitask.to("meta")
    teacher.model.to("meta")
    objective.threshold = make_moving_threshold(config, config.decay)
    state = TrainingState(config, MetaAccelerator(), multitask, teacher, make_optimiser(multitask, config), RunLog(config), objective.threshold, objective)
    state.log.execution = "masked"
    return state


def search_step(state, step, mode):
    "One step as in `train`; the draws are copied to the device before."
    weights, before = LossWeights(sup=1., strong=state.config.w_strong or None, jig=.5, semi=1., cost=1., binary=1.), forward_state(state)
    losses, metrics = state.objective(step_batch(device="meta"), weights, torch.Generator().manual_seed(5), .6)
    with mode:
        outcome = take_step(losses.total(weights), state, step, lambda name: True, before)
        assert state.log.add(step, losses, metrics, weights, .1, outcome) is None
    return outcome


STEPS = {**RUNS, "adaptive": dict(adaptive_threshold=True), "relative": dict(threshold_kind="relative"), "by class": dict(threshold_kind="class"), "position": dict(jigsaw_head="position"),
         "averaged buffers": dict(ema_buffers="averaged"), "hard pixels": dict(ohem_threshold=.7)}


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_reads_nothing_back(name, tmp_path):
    "Forward, losses, backward, clipping, optimiser, averaging and log, three times."
    config = SearchConfig(folder=str(tmp_path), optimiser="sgd", steps=20, logs=1, cost_ramp=(0., .5), ema_start=.1, **{"threshold": .1, **STEPS[name]})
    state = state_on_meta(config, network(2))
    for step in range(2): assert search_step(state, step, NoCopies()).device.type == "meta"
    assert len(state.log.unread) == 2
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"): state.log.read()


def test_a_wait_planted_in_the_update_is_found(tmp_path, monkeypatch):
    from selfsupnas.train import loop
    state = state_on_meta(SearchConfig(folder=str(tmp_path), optimiser="sgd", steps=20, logs=1), network(2))
    plain = loop.zero_gradients
    def planted(parameters):
        zero = plain(parameters)
        return zero if zero.any() else zero
    monkeypatch.setattr(loop, "zero_gradients", planted)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"): search_step(state, 0, contextlib.nullcontext())


# ---- one graph

@pytest.mark.parametrize("case", [dict(), dict(SEARCHED, drop_path=.3)], ids=str)
def test_the_forward_pass_is_one_graph(case):
    net = network(2, **case)
    net.execution = "masked"
    plain, x = copy.deepcopy(net), torch.randn(2, 3, 64, 80)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    results = []
    for model in (compiled, plain):
        torch.manual_seed(0)
        results.append(model(x))
        results[-1].square().mean().backward()
    torch.testing.assert_close(*results, rtol=ROUNDING, atol=1e-12)
    for ours, theirs in ((net.parameters(), plain.parameters()), (net.buffers(), plain.buffers())):
        for a, b in zip(ours, theirs):
            if a.requires_grad: a, b = a.grad, b.grad
            torch.testing.assert_close(a, b, rtol=ROUNDING, atol=1e-15)


def terms_of(space, table, labels, valid, permutations):
    "Each term of the objective as a function of tensors."
    def consistency(kind):
        def by_view(value): return dict.fromkeys(CONSISTENCY[kind].weights, value)
        return lambda student, teacher: consistency_loss(CONSISTENCY[kind], by_view(student), by_view(teacher), by_view(valid), .3, by_view(labels))[0]
    def budget(columns):
        gates = dict(zip(space.gated(), columns.unbind(1)))
        return budget_loss(table, expected_cost(table, gates), realised_cost(table, gates), .5) + binarization_loss(gates)
    weights, order = torch.linspace(.5, 1.5, 5), torch.tensor([0, 5, 11])
    logits, solved = (torch.randn(2, 5, 8, 8), torch.randn(2, 5, 8, 8)), lambda logits: jigsaw_term(logits, order, permutations)[0]
    return {"supervised": (lambda x: supervised_term([x], labels), logits[:1]), "hard pixels": (lambda x: supervised_term([x], labels, weights, .7), logits[:1]),
            "jigsaw": (solved, (torch.randn(3, len(permutations)),)), "jigsaw by place": (solved, (torch.randn(3, 4, 4),)),
            **{kind: (consistency(kind), logits) for kind in CONSISTENCY}, "budget": (budget, (torch.rand(2, len(space.gated())),))}


def test_each_term_is_one_graph():
    torch.manual_seed(0)
    space, labels = SearchSpace(5, layers=3, channels=4), torch.randint(5, (2, 8, 8))
    labels[0, 0] = 255
    for name, (term, inputs) in terms_of(space, measure_costs(space, (64, 80)), labels, labels != 255, permutation_set(2)).items():
        results = []
        for function in (term, torch.compile(term, fullgraph=True, backend="eager")): # the first fills the cost table
            own = [x.clone().requires_grad_() for x in inputs]
            (loss := function(*own)).backward()
            results.append((loss.detach(), own[0].grad))
        for ours, theirs in zip(*results): torch.testing.assert_close(ours, theirs, rtol=ROUNDING, atol=1e-15, msg=name)
