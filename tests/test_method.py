"The method end to end in miniature: every variant trains, and the gradient of each loss reaches exactly its parameters."
import dataclasses, subprocess, sys

import pytest
import torch

from selfsupnas.train.batches import load_training_data, make_batches, present
from selfsupnas.tasks.consistency import CONSISTENCY
from selfsupnas.metrics import evaluate_segmenter
from selfsupnas.stages.pareto_front import ParetoConfig, pareto
from selfsupnas.train.step import LossWeights, Objective, build_multitask_model
from selfsupnas.tasks.permutations import permutation_set
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import split_in_halves, load_supernet, make_phases, search
from selfsupnas.space.supernet import build_supernet
from selfsupnas.tasks.teacher import EMATeacher
from selfsupnas.train.loop import train

SMALL = dict(size=(64, 80), steps=4, layers=3, channels=8, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, logs=2, budget=0.8,
             ramp=(0., 0.), cost_ramp=(0., 0.5), threshold=0.)


@pytest.fixture
def config(tmp_path): return SearchConfig(folder=str(tmp_path/"search"), **SMALL)


VARIANTS = {"mean_teacher": dict(consistency="mean_teacher"), "unimatch": dict(consistency="unimatch"), "cps": dict(consistency="cps"),
            "adaptive threshold": dict(adaptive_threshold=True), "position head": dict(jigsaw_head="position", jigsaw_n=3, jigsaw_permutations=50),
            "four by four": dict(jigsaw_n=4), "searched cells": dict(search_operations=True, keep_operations=1, operations=(
                "sep_conv_5x5", "dil_sep_conv_3x3", "mbconv_3x3", "mbconv_5x5", "conv_3x3", "avg_pool_3x3", "max_pool_3x3", "identity")),
            "static gates": dict(gate="static"), "alternating": dict(update="alternating"), "drop path": dict(drop_path=0.3),
            "parameters": dict(cost="parameters"), "latency": dict(cost="latency"), "expected": dict(budget_of="expected"),
            "no cost": dict(w_cost=0., w_binary=0.)}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_searches_and_leaves_what_can_be_loaded(config, variant):
    config = dataclasses.replace(config, **variant)
    found = search(config)
    metrics, last = found.record.metrics, found.trained.history[-1]
    assert metrics["derived_cost"] <= metrics["budget_cost"]
    assert metrics["supernet_val_miou"] == pytest.approx(evaluate_segmenter(found.trained.model, found.data.val, progress=False).miou, abs=1e-3)
    assert last["semi"] > 0 and last["jig"] > 0
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad(): assert torch.allclose(load_supernet(config.folder)(x), found.trained.model(x), atol=1e-4)
    for name, network in (("derived", found.derived), ("supernet", found.trained.model)): assert network(x).isfinite().all(), name


def test_the_pretext_alone_drives_a_search_and_no_label_is_read(config):
    config = dataclasses.replace(config, w_sup=0., w_semi=0.)
    data = load_training_data(config)
    class Bare: # a dataset whose labels cannot be read
        ids, spec, unreadable, skip_unreadable = data.train.ids, data.train.spec, {}, False
        def __getitem__(self, i): raise AssertionError("a label was read")
        def image(self, i): return data.train.image(i)
        def __len__(self): return len(data.train)
    def run(train_set):
        torch.manual_seed(0)
        part = dataclasses.replace(data, train=train_set)
        return train(build_supernet(found.table.space), dataclasses.replace(config, folder=config.folder + "-2"), part).history
    found = search(config)
    assert not data.split.labelled and found.record.metrics["supernet_val_miou"] is None
    assert "sup" not in found.trained.history[-1] and found.record.metrics["derived_cost"] <= found.record.metrics["budget_cost"]
    assert run(data.train) == run(Bare())


def terms_of(config, weights):
    "MultiTaskModel, teacher and losses of one step; losses that are not in `weights` have weight 0."
    data = load_training_data(config)
    space = search_space(config, data)
    torch.manual_seed(0)
    multitask = build_multitask_model(build_supernet(space), config)
    teacher = EMATeacher(multitask)
    objective = Objective(config, multitask, teacher, permutation_set(config.jigsaw_n))
    losses, _ = objective(next(make_batches(config, data)).to("cpu"), LossWeights(**weights), torch.Generator().manual_seed(0))
    return multitask, teacher, present(losses)


def search_space(config, data): return config.space(data.train.spec.num_classes)


def reached_by(multitask, term):
    multitask.zero_grad(); term.backward()
    return {name for name, p in multitask.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("kind", CONSISTENCY)
def test_gradients_reach_exactly_the_right_parameters(config, kind):
    config = dataclasses.replace(config, consistency=kind)
    names = {n for n, _ in terms_of(config, {"sup": 1})[0].named_parameters()}
    model, head, peer = ({n for n in names if n.startswith(part)} for part in ("model.", "head.", "peer."))
    assert any(".gate." in n for n in model) and bool(peer) == (kind == "cps")
    for term, weights in (("sup", {"sup": 1}), ("jig", {"jig": 1}), ("semi", {"semi": 1})):
        multitask, teacher, losses = terms_of(config, weights)
        assert set(losses) == {term}
        got = reached_by(multitask, losses[term])
        if term == "jig": assert got & head == head and not got & peer and not any("classifier" in n for n in got)
        else: assert not got & head and {n for n in got if n.startswith("peer.")} == peer
        if term != "jig": assert got >= model, sorted(model - got)[:5]
        else: # the head reads the fused feature at stride 8, which depends on all gates but that of the last cell at stride 4
            assert {n for n in model if ".gate." in n} - got == {n for n in model if n.startswith("model.cells.3_0.gate.")}
        assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters()), "the teacher has no gradient"


def test_alternating_turns_split_data_and_parameters(config):
    config = dataclasses.replace(config, update="alternating")
    data = load_training_data(config)
    a, b = split_in_halves(data, config.seed)
    assert not set(a.split_ids) & set(b.split_ids) and set(a.split_ids) | set(b.split_ids) == set(data.split_ids)
    model = build_supernet(search_space(config, data))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, dataclasses.replace(config, steps=1), data, phases=make_phases(data, config.update, config.seed))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not any(".gate." in n for n in moved), "the first phase trains the weights"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, dataclasses.replace(config, steps=1, folder=config.folder + "-reversed"), data, phases=make_phases(data, config.update, config.seed)[::-1])
    assert {n.split(".")[2] for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"gate"}


@pytest.mark.parametrize("variant", [dict(drop_path=0.3, adaptive_threshold=True), dict(consistency="unimatch"), dict(update="alternating", consistency="cps")], ids=str)
def test_an_interrupted_run_is_the_same_run(config, variant, monkeypatch):
    import selfsupnas.train.batches as drawn
    config = dataclasses.replace(config, steps=6, logs=3, **variant)
    data = load_training_data(config)
    def run(config):
        torch.manual_seed(0)
        return train(build_supernet(search_space(config, data)), config, data, phases=make_phases(data, config.update, config.seed))
    whole, plain = run(dataclasses.replace(config, folder=config.folder + "-whole")), drawn.to_device
    calls = []
    def interrupt(*args):
        calls.append(1)
        if len(calls) > 12: raise InterruptedError # three batches a step, so in the fifth of six steps
        return plain(*args)
    monkeypatch.setattr(drawn, "to_device", interrupt)
    with pytest.raises(InterruptedError): run(config)
    monkeypatch.setattr(drawn, "to_device", plain)
    resumed = run(config)
    assert resumed.history == whole.history
    for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()): assert torch.equal(a, b)


def test_a_front_of_a_search_without_labels_is_trained_with_them(config, tmp_path):
    search(dataclasses.replace(config, w_sup=0., w_semi=0.))
    found = pareto(ParetoConfig(folder=str(tmp_path/"pareto"), search=config.folder, budgets=(0.8,), steps=2, random=1, baselines=("lraspp_mobilenet_v3_large",)))
    assert {row["kind"] for row in found.rows} == {"dynamic", "derived", "random", "baseline"}
    assert found.record.metrics["ranks"]["0.8"]["of"] == 2 and len(found.data.split.labelled) == 10


@pytest.mark.parametrize("wrong", [dict(w_sup=0.), dict(w_sup=0., w_semi=0., w_jig=0.), dict(jigsaw_head="magic"), dict(drop_path=1.), dict(consistency="magic"),
                                   dict(gate="hard"), dict(cost="watts"), dict(update="never"), dict(keep_operations=1), dict(w_binary=float("nan"))], ids=str)
def test_bad_parameters_are_refused_before_anything_runs(wrong):
    with pytest.raises(ValueError) as refused: SearchConfig(**wrong)
    assert any(name in str(refused.value) for name in wrong)


def test_down_is_the_convolution_of_stride_2_and_survives_an_odd_batch():
    "In a separate process: with stride 2 in the convolution, it ends in a segmentation fault on processors with AVX-512."
    code = """
import torch
from torch.nn.functional import conv2d
from selfsupnas.space.cell import Down
torch.set_num_threads(2)
down = Down(8).to(memory_format=torch.channels_last)
for _ in range(300):
    x = torch.randn(11, 8, 17, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    down(x).sum().backward()
trained = down(x)
with torch.no_grad(): torch.testing.assert_close(down(x), trained)
conv, norm, relu = down
torch.testing.assert_close(relu(norm(conv2d(x, conv.weight, stride=2))), trained)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
