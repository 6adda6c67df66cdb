"benchmarks.py at a small size: timing in turns, the textbook network, the metrics of each part, existing records."
import dataclasses, functools
from pathlib import Path

import benchmarks
import gpu_parts
import pytest
import torch
from benchmarks import (OF_SEARCHES, ON_GPU, ON_PROCESSOR, PARTS, WAYS, Convolutions, Results, calls_part, closed_part, derive_part, evaluate_part, fitted_line,
                        largest_batches, main, memory_part, network_part, peak_alone, run_parts, scaling_part, step_in_way, step_part, terms_part, training_part)
from conftest import ROOT
from gpu_parts import (PARTS_OF_STEP, Spans, Watched, compiled_networks_part, compiled_part, count_launches, count_waits, full_size_part, input_part, launches_part, networks_part, profiled, roofline_part, shares_part)
from timed_steps import RETRAININGS, Operators, SpeedConfig, in_turns, labelled_step, make_step, matrix_product, plain_supernet, ratio, retraining_step, runnable
from torch import nn

from selfsupnas.core import RunRecord
from selfsupnas.space.supernet import build_supernet

TINY = SpeedConfig(layers=3, channels=8, images=2, size=(64, 96), rounds=3, turn=.01, num_classes=11)
SMALL = dataclasses.replace(TINY, network="streetscenes", rival="lraspp_mobilenet_v3_large", network_size=(128, 160), rounds=1)
SEARCH = ["-p", "size", "(64, 80)", "-p", "layers", "3", "-p", "channels", "8", "-p", "batch_labelled", "4", "-p", "batch_unlabelled", "4", "-p", "batch_jigsaw", "4",
          "-p", "threshold", "0.5", "-p", "budget", "0.75", "-p", "steps", "2"]
COMMITTED = sorted((ROOT/"nbs"/"experiments"/"records").glob("speed*/*/speed-record.json"))


def test_calls_take_turns_and_a_ratio_is_taken_within_a_round(monkeypatch):
    "With a fake clock that only these calls advance, each more than the one before."
    now, calls = [0.], []
    def spend(name, seconds):
        calls.append(name)
        now[0] += seconds * (1 + len(calls))
    monkeypatch.setattr("timed_steps.timer", lambda: now[0])
    times = in_turns({"one": lambda: spend("one", 1.), "two": lambda: spend("two", 2.)}, TINY)
    assert calls == ["one", "two"] * (1 + TINY.rounds), "in turns, once each: none is short"
    assert times == {"one": [4., 6., 8.], "two": [10., 14., 18.]}
    assert ratio(times, "two", "one") == 14 / 6


def test_a_short_call_is_repeated_in_its_turn(monkeypatch):
    now, calls = [0.], []
    def spend():
        calls.append(now[0])
        now[0] += .5
    monkeypatch.setattr("timed_steps.timer", lambda: now[0])
    assert in_turns({"short": spend}, dataclasses.replace(TINY, turn=2., rounds=2)) == {"short": [.5, .5]} and len(calls) == 1 + 2 * 4


def test_the_yardstick_counts_two_operations_a_multiply_add():
    product, operations = matrix_product(TINY, 64)
    assert product().shape == (64, 64) and operations == 2 * 64**3


@pytest.fixture
def pair():
    "Our supernet and the textbook's, with the same weights."
    torch.manual_seed(0)
    ours, plain = build_supernet(TINY.space), plain_supernet(TINY.space)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def test_the_plain_network_answers_and_learns_as_ours(pair):
    x = torch.randn(2, 3, *TINY.size)
    logits, textbook = (network(x) for network in pair)
    assert torch.allclose(logits, textbook, atol=1e-4)
    assert torch.allclose(*(make_step(network, TINY)() for network in pair), atol=1e-3)


def test_every_convolution_is_noted(pair):
    with Convolutions() as noted: pair[0](torch.randn(2, 3, *TINY.size))
    assert {id(w) for *_, w, _ in noted.all} == {id(m.weight) for m in pair[0].modules() if isinstance(m, nn.Conv2d)}


def test_all_ways_to_take_a_step_have_one_loss():
    losses = {}
    for name in WAYS:
        torch.manual_seed(0)
        losses[name] = step_in_way(name, TINY)()
    assert len(losses) == 5 and all(torch.allclose(loss, losses["ours"], atol=1e-4) for loss in losses.values())


def test_results_of_operations_are_kept():
    with Results() as noted: torch.relu(torch.zeros(2, 3) + 1)
    assert len(noted.tensors) == 3, "zeros, their sum with 1, and the larger of that and 0"


def test_a_step_is_a_share_of_the_yardstick():
    metrics, times = step_part(TINY)
    assert metrics["ours: share of yardstick"] > 0 and metrics["ours: times ours"] == 1
    assert set(times) == {"yardstick", "plain", "plain, channels last", "ours", "masked", "convolutions"} and metrics["multiply_adds"] > 0


def test_closed_paths_leave_less_to_do():
    metrics, _ = closed_part(TINY)
    assert metrics["0: multiply-adds left"] == 1 > metrics["0.5: multiply-adds left"] > metrics["0.75: multiply-adds left"] > 0
    assert metrics["0.5: at most"] == 1 / metrics["0.5: multiply-adds left"] and metrics["0.5: times faster"] > 0
    assert all(metrics[f"{kind}{p}: plain times ours"] > 0 for kind in ("", "masked ") for p in ("0", "0.5", "0.75"))


def test_a_line_is_fitted():
    exact = fitted_line([1, 2, 3], [5, 7, 9])
    assert (exact["slope"], exact["intercept"], exact["r2"]) == pytest.approx((2, 3, 1))
    metrics, times = scaling_part(TINY, images=(1, 2), layers=(3, 4), sides=(64, 96))
    assert {kind: line["work"] for kind, line in metrics.items()} == {"images": [1, 2], "pixels": [64**2, 96**2], "layers": [3, 4]}
    assert all(line["r2"] == pytest.approx(1) for line in metrics.values()) and len(times) == 6 # two points are a line


def test_terms_and_what_is_beside_them():
    metrics, times = terms_part(TINY)
    assert metrics["times the multiply-adds"] > 2 and metrics["views: share of the step"] > 0
    assert metrics["beside the terms"] == sum(metrics[f"{name}: share of the step"] for name in ("views", "gates", "budget", "teacher"))
    assert times["gates"] == [a - b for a, b in zip(times["all terms"], times["static gates"])]


def test_larger_batches_fit_with_less_memory_an_image():
    found = largest_batches(dataclasses.replace(TINY, layers=8, channels=16))
    for memory in (24, 80):
        plain, half, again, both = (found[f"{memory} GB, {kind}"] for kind in ("no", "bf16", "no, recompute", "bf16, recompute"))
        assert 0 < plain < half < both and plain < again < both
    assert all(found[f"24 GB, {kind}"] < found[f"80 GB, {kind}"] for kind in ("no", "bf16"))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_what_is_computed_again_is_not_kept():
    larger = dataclasses.replace(TINY, size=(128, 192), layers=6, channels=16)
    assert peak_alone("recompute", larger) < peak_alone("plain, keeping all", larger)
    metrics, _ = memory_part(dataclasses.replace(larger, rounds=1))
    assert metrics["recompute: bytes an image"] < metrics["ours: bytes an image"] and metrics["ours: bytes an image, over computed"] > .8
    assert metrics["recompute: of plain"] < 1


def test_the_discovered_network_and_its_rival():
    metrics, times = network_part(SMALL, ("folded", "torch"))
    assert metrics["multiply-adds, rival over ours"] == metrics["rival: multiply-adds"] / metrics["ours: multiply-adds"]
    assert metrics["torch: times faster"] > 0 and set(times) == {f"{name}, {runtime}" for name in ("ours", "rival") for runtime in ("folded", "torch")} and not any("onnx" in name for name in metrics)


def test_architectures_are_counted_as_fvcore_counts_them():
    assert derive_part(TINY, 3)[0]["of 3 counted as by fvcore"] == 3
    assert evaluate_part(TINY, (64, 96))[0]["textbook: times ours"] > 0


# ---- operators, launches, waits

def test_operators_are_counted_without_views():
    x = torch.zeros(2, 3)
    with Operators() as noted: x.t().add(1).mul_(2)
    assert noted.calls == {"aten.add.Tensor": 1, "aten.mul_.Tensor": 1} and noted.views == 1
    assert noted.bytes == 2 * 2 * x.nbytes, "each reads and writes six numbers"


def test_operators_of_the_backward_pass_are_counted_too():
    x = torch.ones(3, requires_grad=True)
    with Operators() as noted: x.exp().sum().backward()
    assert noted.calls["aten.exp.default"] == noted.calls["aten.mul.Tensor"] == 1


def test_values_that_are_read_back_are_waits():
    x = torch.ones(3)
    assert count_waits(lambda: x * 2, "cpu") == 0
    assert count_waits(lambda: (x.sum().item(), x[x > 0], bool(x.any())), "cpu") == 3
    assert count_launches(lambda: (x * 2).exp().view(1, 3), "cpu") == 2
    assert profiled(lambda: x * 2, "cpu")["aten::mul"] == 1


def test_masked_execution_waits_for_less_than_grouped(tmp_path):
    grouped, masked = (count_waits(labelled_step(execution, TINY), "cpu") for execution in ("grouped", "masked"))
    assert masked < 5 < grouped


def test_calls_of_a_step():
    metrics, _ = calls_part(SMALL)
    assert metrics["grouped: of plain"] == metrics["grouped: calls"] / metrics["plain: calls"]
    assert metrics["retraining, labels: calls"] < metrics["retraining, three terms: calls"] < metrics["retraining, four terms: calls"]


def test_launches_of_a_gpu_are_counted_as_calls_here():
    metrics, _ = launches_part(dataclasses.replace(SMALL, layers=2, channels=4), (64, 80), 2)
    names = {"plain", "plain, channels last", "grouped", "masked", "search, grouped", "search, masked", *(f"retraining, {terms}" for terms in RETRAININGS)}
    assert set(metrics) == {f"{name}: {kind}" for name in names for kind in ("launches", "waits")}
    assert metrics["search, masked: waits"] < metrics["search, grouped: waits"]


def test_a_profiler_without_launches_says_so(monkeypatch):
    monkeypatch.setattr("gpu_parts.profiled", lambda step, device: {"aten::mul": 3, "cudaLaunchKernel": 2, "cuLaunchKernelEx": 1, "cudaMemcpyAsync": 1})
    assert count_launches(None, "cuda") == 3
    monkeypatch.setattr("gpu_parts.profiled", lambda step, device: {"aten::mul": 3})
    with pytest.raises(RuntimeError, match="CUPTI"): count_launches(None, "cuda")


# ---- the parts of a GPU, on the processor

def test_spans_leave_out_what_is_inside_them(monkeypatch):
    now = [0.]
    monkeypatch.setattr("gpu_parts.time.perf_counter", lambda: now[0])
    spans = Spans("cpu")
    def spend(seconds): now[0] += seconds
    inner = Watched(spans, "inner", spend)
    def outer_call():
        spend(1.)
        inner(10.)
        spend(2.)
    spans.mark("rest")
    spend(100.)
    Watched(spans, "outer", outer_call)()
    assert spans.seconds() == {"rest": 100., "outer": 3., "inner": 10.} and spans.marks == []
    assert Watched(spans, "list", [1]).append, "other attributes are those of the object"


def test_shares_of_a_step_add_up():
    metrics, times = shares_part(SMALL)
    for execution in ("grouped", "masked"):
        shares = {name: metrics[f"{execution}, {name}: share of the step"] for name in PARTS_OF_STEP}
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0, execution
    assert times["masked, step"][0] == pytest.approx(sum(times[f"masked, {name}"][0] for name in PARTS_OF_STEP))


def test_a_step_is_no_faster_than_its_roofline():
    metrics, _ = roofline_part(SMALL, n=256, copied=2**20)
    assert metrics["roofline: ms"] == pytest.approx(max(metrics["operations"] / metrics["matrix_gflops"], metrics["bytes"] / metrics["copy_gbytes"]) / 1e6)
    for name in ("plain", "grouped", "masked"):
        assert metrics[f"{name}: times the roofline"] == pytest.approx(metrics[f"{name}: ms"] / metrics["roofline: ms"])
        assert metrics[f"{name}: bytes of its operators"] > metrics["bytes"] and 0 < metrics[f"{name}: share of the matrix rate"]


def test_networks_by_batch_and_size():
    metrics, times = networks_part(SMALL, ((1, 64, 80), (2, 64, 64)), ("fp32",), {"eager": lambda call: call, "broken": lambda call: call.missing})
    assert "ours, eager, 2x64x64, fp32" in times and not any("broken" in name for name in times)
    assert metrics["ours, broken, 1x64x80, fp32: skipped"].startswith("AttributeError")
    assert metrics["rival, eager, 1x64x80, fp32: times ours"] > 0 and metrics["unet_resnet18, eager, 2x64x64, fp32: times ours"] > 0


def test_a_library_that_is_missing_leaves_one_network_out(monkeypatch):
    def missing(name, *args):
        if name == "unet_resnet18": raise ImportError("pip install it")
        return build(name, *args)
    build = gpu_parts.build_baseline
    monkeypatch.setattr(gpu_parts, "build_baseline", missing)
    metrics, times = compiled_networks_part(SMALL, ((1, 64, 64),), lambda call: call)
    assert metrics["unet_resnet18: skipped"] == "ImportError: pip install it" and "rival, compiled, 1x64x64, fp32: times ours" in metrics


def test_compiled_steps_are_measured_or_skipped_with_a_reason(monkeypatch):
    tiny = dataclasses.replace(SMALL, layers=2, channels=4, size=(64, 64))
    monkeypatch.setattr(gpu_parts, "compile_network", lambda network: network)
    metrics, times = compiled_part(tiny, size=(64, 64), images=2, n=64, copied=2**12)
    assert {"masked, compiled", "retraining, compiled"} <= set(times) and metrics["masked, compiled: plain times ours"] > 0
    assert metrics["masked, compiled: seconds to compile"] > 0 and metrics["masked, compiled: times the roofline"] > 0 and metrics["retraining, compiled: retraining times ours"] > 0
    def missing(network): raise ImportError("no compiler")
    monkeypatch.setattr(gpu_parts, "compile_network", missing)
    metrics, times = compiled_part(tiny, ("grouped",), (64, 64), 2, n=64, copied=2**12)
    assert {"grouped", "retraining"} <= set(times) and metrics["grouped, compiled: skipped"] == metrics["retraining, compiled: skipped"] == "ImportError: no compiler"


def test_images_a_second():
    metrics, _ = input_part(SMALL, ((64, 80),), (0,), .01)
    assert metrics["64x80, 0 workers: images a second"] > 0


def test_the_largest_number_of_images_that_fits(monkeypatch):
    class Step(gpu_parts.SearchStep):
        def __init__(self, config, *args):
            if config.images > 3: raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(config, *args)
    monkeypatch.setattr(gpu_parts, "SearchStep", Step)
    metrics, times = full_size_part(SMALL, 2, 4, (64, 80), (4, 3, 2))
    assert metrics["masked: images"] == metrics["grouped: images"] == 3 and not any("skipped" in name for name in metrics)
    assert metrics["masked: peak bytes"] is None and metrics["masked: computed bytes"] > 0 and set(times) == {"masked", "grouped"}


def test_a_step_of_retraining_has_its_terms():
    metrics, times = training_part(SMALL, (64, 80), 2)
    assert set(times) == {"yardstick", *RETRAININGS} and all(metrics[f"{terms}: ms"] > 0 and metrics[f"{terms}: yardsticks"] > 0 for terms in RETRAININGS)
    step = retraining_step("four terms", SMALL, (64, 80), 2)
    seen = []
    objective = step.state.objective
    step.state.objective = Watched(Spans("cpu"), "", lambda *args: seen.append(objective(*args)) or seen[-1])
    step.state.objective.cost = None
    step()
    assert {name for name in ("sup", "strong", "jig", "semi") if getattr(seen[0][0], name) is not None} == {"sup", "strong", "jig", "semi"}


def test_what_fails_is_left_out_and_says_why():
    def broken(): raise RuntimeError("out of memory\nand more")
    metrics = {}
    assert list(runnable({"right": lambda: len, "broken": broken, "later": lambda: broken, "fine": lambda: dict}, TINY, metrics)) == ["fine"]
    assert metrics["broken: skipped"] == metrics["later: skipped"] == "RuntimeError: out of memory" and metrics["right: skipped"].startswith("TypeError")


# ---- records, and the command

def test_a_part_that_fails_says_why_and_is_measured_again(tmp_path, monkeypatch, capsys):
    def broken(config): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setitem(PARTS, "broken", broken)
    monkeypatch.setitem(PARTS, "right", lambda config: ({"value": 1}, {"call": [1., 3., 2.]}))
    words = ["broken", "right", "--folder", str(tmp_path)]
    assert main(words) == 1 and "failed: broken" in capsys.readouterr().err
    records = {name: RunRecord.load(tmp_path/name/"speed-record.json") for name in ("broken", "right")}
    assert records["broken"].metrics == {"failed": "OutOfMemoryError: CUDA out of memory"} and records["right"].metrics == {"value": 1}
    assert records["right"].timings["call"] == 2. and {"threads", "processor", "capability"} <= set(records["right"].hardware)
    assert {"torch", "onnxruntime", "cuda"} <= set(records["right"].versions)
    monkeypatch.setitem(PARTS, "broken", lambda config: ({"value": 2}, {}))
    monkeypatch.setitem(PARTS, "right", None)
    assert main(words) == 0 and RunRecord.load(tmp_path/"broken"/"speed-record.json").metrics == {"value": 2}


def test_each_device_has_its_parts(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(benchmarks, "measure_part", lambda part, config: asked.append(part) or RunRecord("speed", part, {}, 0, {"failed": "no"}))
    run_parts(dataclasses.replace(TINY, folder=str(tmp_path)))
    assert asked == list(ON_PROCESSOR)
    config = dataclasses.replace(TINY, folder=str(tmp_path))
    config.device = "cuda"
    asked.clear()
    run_parts(config)
    assert asked == list(ON_GPU) and set(ON_GPU) <= set(PARTS)


def test_a_part_with_a_record_is_not_measured_again(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, folder=str(tmp_path))
    record = run_parts(config, ("closed",))["closed"]
    monkeypatch.setitem(PARTS, "closed", None)
    assert run_parts(config, ("closed",))["closed"] == record == RunRecord.load(tmp_path/"closed"/"speed-record.json")
    with pytest.raises(ValueError, match="layers = 3, not 4"): run_parts(dataclasses.replace(config, layers=4), ("closed",))
    with pytest.raises(ValueError, match="no part 'none'.*step, closed"): run_parts(config, ("none",))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_committed_records_are_read(path):
    "Committed records belong to existing parts and parameters."
    record = RunRecord.load(path)
    assert record.stage == "speed" and record.name in PARTS and record.metrics
    assert set(record.parameters) == {f.name for f in dataclasses.fields(SpeedConfig)}


def test_there_are_committed_records(): assert len(COMMITTED) >= 10


@pytest.fixture
def once(monkeypatch):
    "One round instead of three."
    for name, measure in list(OF_SEARCHES.items()): monkeypatch.setitem(OF_SEARCHES, name, functools.partial(measure, rounds=1))


def test_a_search_without_terms_is_timed(tmp_path, once):
    assert main(["removal", *SEARCH, "-p", "folder", str(tmp_path)]) == 0
    record = RunRecord.load(tmp_path/"terms-record.json")
    assert list(record.timings) == ["none", "w_jig", "w_semi", "w_cost", "all"] and min(record.timings.values()) > 0
    assert not list(tmp_path.glob("checkpoint*")), "each training has a folder of its own"


def test_a_loader_is_timed(tmp_path, once):
    assert main(["loader", *SEARCH, "-p", "folder", str(tmp_path)]) == 0
    timed = RunRecord.load(tmp_path/"loader-record.json").timings
    assert timed["loader_ms"] > 0 and timed["loader_times_faster"] == timed["step_ms"] / timed["loader_ms"]


def test_the_command_measures_what_it_is_asked_for(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(benchmarks, "run_parts", lambda *words: asked.append(words) or {})
    assert main(["step", "closed", "--precision", "bf16", "--size", "64", "96", "--turn", "0.5"]) == main([]) == 0
    assert asked == [(SpeedConfig(precision="bf16", size=(64, 96), turn=.5), ("step", "closed")), (SpeedConfig(), None)]
    assert not set(PARTS) & set(OF_SEARCHES)


@pytest.mark.parametrize("words, named", [
    (["step", "--precision", "half"], "precision"), (["nothing", "--folder", "unused"], "nothing"), (["step", "--device", "cuda"], "device"), (["step", "--rounds", "0"], "rounds"),
    (["loader", "step"], "alone"), (["removal", "--rounds", "1"], "alone"), (["step", "-p", "steps", "3"], "-p"), (["loader", "-p", "stpes", "3"], "stpes")])
def test_a_mistake_is_named(tmp_path, monkeypatch, capsys, words, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(words)
    assert e.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1] and list(tmp_path.iterdir()) == []
