"benchmarks.py at a small size: timing in turns, the textbook network, the metrics of each part, existing records."
import dataclasses, functools
from pathlib import Path

import benchmarks
import pytest
import torch
from benchmarks import (OF_SEARCHES, PARTS, WAYS, Convolutions, Results, SpeedConfig, closed_part, derive_part, evaluate_part, fitted_line, in_turns, largest_batches, main,
                        make_step, matrix_product, memory_part, network_part, peak_alone, plain_supernet, ratio, run_parts, scaling_part, step_in_way, step_part, terms_part)
from conftest import ROOT
from torch import nn

from selfsupnas.core import RunRecord
from selfsupnas.space.supernet import build_supernet

TINY = SpeedConfig(layers=3, channels=8, images=2, size=(64, 96), rounds=3, turn=.01, num_classes=11)
SEARCH = ["-p", "size", "(64, 80)", "-p", "layers", "3", "-p", "channels", "8", "-p", "batch_labelled", "4", "-p", "batch_unlabelled", "4", "-p", "batch_jigsaw", "4",
          "-p", "threshold", "0.5", "-p", "budget", "0.75", "-p", "steps", "2"]
COMMITTED = sorted((ROOT/"nbs"/"experiments"/"records").glob("speed*/*/speed-record.json"))


def test_calls_take_turns_and_a_ratio_is_taken_within_a_round(monkeypatch):
    "With a fake clock that only these calls advance, each more than the one before."
    now, calls = [0.], []
    def spend(name, seconds):
        calls.append(name)
        now[0] += seconds * (1 + len(calls))
    monkeypatch.setattr("benchmarks.timer", lambda: now[0])
    times = in_turns({"one": lambda: spend("one", 1.), "two": lambda: spend("two", 2.)}, TINY)
    assert calls == ["one", "two"] * (1 + TINY.rounds), "in turns, once each: none is short"
    assert times == {"one": [4., 6., 8.], "two": [10., 14., 18.]}
    assert ratio(times, "two", "one") == 14 / 6


def test_a_short_call_is_repeated_in_its_turn(monkeypatch):
    now, calls = [0.], []
    def spend():
        calls.append(now[0])
        now[0] += .5
    monkeypatch.setattr("benchmarks.timer", lambda: now[0])
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


def test_four_ways_to_take_a_step_have_one_loss():
    losses = {}
    for name in WAYS:
        torch.manual_seed(0)
        losses[name] = step_in_way(name, TINY)()
    assert len(losses) == 4 and all(torch.allclose(loss, losses["ours"], atol=1e-4) for loss in losses.values())


def test_results_of_operations_are_kept():
    with Results() as noted: torch.relu(torch.zeros(2, 3) + 1)
    assert len(noted.tensors) == 3, "zeros, their sum with 1, and the larger of that and 0"


def test_a_step_is_a_share_of_the_yardstick():
    metrics, times = step_part(TINY)
    assert metrics["ours: share of yardstick"] > 0 and metrics["ours: times ours"] == 1
    assert set(times) == {"yardstick", "plain", "plain, channels last", "ours", "convolutions"} and metrics["multiply_adds"] > 0


def test_closed_paths_leave_less_to_do():
    metrics, _ = closed_part(TINY)
    assert metrics["0: multiply-adds left"] == 1 > metrics["0.5: multiply-adds left"] > metrics["0.75: multiply-adds left"] > 0
    assert metrics["0.5: at most"] == 1 / metrics["0.5: multiply-adds left"] and metrics["0.5: times faster"] > 0


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
    small = dataclasses.replace(TINY, network="streetscenes", rival="lraspp_mobilenet_v3_large", network_size=(128, 160))
    metrics, times = network_part(small, ("torch",))
    assert metrics["multiply-adds, rival over ours"] == metrics["rival: multiply-adds"] / metrics["ours: multiply-adds"]
    assert metrics["torch: times faster"] > 0 and set(times) == {"ours, torch", "rival, torch"} and not any("onnx" in name for name in metrics)


def test_architectures_are_counted_as_fvcore_counts_them():
    assert derive_part(TINY, 3)[0]["of 3 counted as by fvcore"] == 3
    assert evaluate_part(TINY, (64, 96))[0]["textbook: times ours"] > 0


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
    monkeypatch.setattr(benchmarks, "run_parts", lambda *words: asked.append(words))
    assert main(["step", "closed", "--precision", "bf16", "--size", "64", "96", "--turn", "0.5"]) == main([]) == 0
    assert asked == [(SpeedConfig(precision="bf16", size=(64, 96), turn=.5), ["step", "closed"]), (SpeedConfig(), tuple(PARTS))]
    assert not set(PARTS) & set(OF_SEARCHES)


@pytest.mark.parametrize("words, named", [
    (["step", "--precision", "half"], "precision"), (["nothing", "--folder", "unused"], "nothing"), (["step", "--device", "cuda"], "device"), (["step", "--rounds", "0"], "rounds"),
    (["loader", "step"], "alone"), (["removal", "--rounds", "1"], "alone"), (["step", "-p", "steps", "3"], "-p"), (["loader", "-p", "stpes", "3"], "stpes")])
def test_a_mistake_is_named(tmp_path, monkeypatch, capsys, words, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(words)
    assert e.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1] and list(tmp_path.iterdir()) == []
