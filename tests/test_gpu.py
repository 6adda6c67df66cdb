"On a GPU of CUDA: what it computes is what the processor computes, in every precision a run ends, stops and goes on, and what it leaves can be read without one."
import copy, dataclasses, json

import pytest
import torch
from accelerate import Accelerator, state
from benchmarks import ON_GPU, closed_gates, run_parts, training_part
from gpu_parts import count_launches, count_waits, full_size_part, input_part, launches_part, networks_part, reduce_overhead, roofline_part, shares_part
from timed_steps import SpeedConfig, compile_network, labelled_step, supernet_in

from selfsupnas.train.batches import load_training_data, make_batches, present
from selfsupnas.stages.evaluation import EvaluateConfig, evaluate
from selfsupnas.space.budget import measure_costs
from selfsupnas.metrics import evaluate_segmenter
from selfsupnas.space.gate import fix_gates
from selfsupnas.tasks.losses import pixel_cross_entropy
from selfsupnas.distributed import local_device
from selfsupnas.stages.retraining import RetrainConfig, load_network, retrain
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import load_supernet, search
from selfsupnas.space.supernet import build_supernet
from selfsupnas.train.loop import build_training_state, seed_step, train
from selfsupnas.train.step import step_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of CUDA here, or not asked for: make test-gpu")

SMALL = dict(size=(64, 80), layers=3, channels=8, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, logs=2, steps=6, budget=0.8,
             ramp=(0., 0.), cost_ramp=(0., 0.5), threshold=0.)


@pytest.fixture
def config(tmp_path): return SearchConfig(folder=str(tmp_path/"search"), **SMALL)


@pytest.fixture
def exact():
    "Single precision as it is on a processor, not rounded to 19 bits on its way into a product."
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def apart(a, b): return ((a.cpu() - b.cpu()).norm() / b.cpu().norm().clamp(min=1e-12)).item()


def one_pass(config, data, device):
    "Terms and gradients of the first step's objective, computed there."
    state.AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=device == "cpu")
    torch.manual_seed(0)
    run = build_training_state(build_supernet(config.space(data.train.spec.num_classes), gate=config.gate), config, data, accelerator)
    run.multitask.train()
    weights = step_weights(run.config, 1., run.objective.cost)
    losses, _ = run.objective(next(make_batches(config, data)).to(accelerator.device), weights, seed_step(0, 0))
    losses.total(weights).backward()
    state.AcceleratorState._reset_state(True)
    return present(losses), {name: p.grad for name, p in run.multitask.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["fixmatch", "mean_teacher", "cps"]) # unimatch draws which features it drops
def test_the_objective_and_its_gradients_are_the_processors(config, exact, kind):
    config = dataclasses.replace(config, consistency=kind, w_cost=0., w_binary=0.)
    data = load_training_data(config)
    (terms, gradients), (there, theirs) = (one_pass(config, data, device) for device in ("cuda", "cpu"))
    assert all(term.is_cuda for term in terms.values()) and set(terms) == set(there) == {"sup", "jig", "semi"}
    for name, term in terms.items(): assert abs(term.item() / there[name].item() - 1) < 1e-4, name
    assert set(gradients) == set(theirs)
    whole, other = (torch.cat([g[name].cpu().flatten() for name in sorted(theirs)]) for g in (gradients, theirs))
    assert apart(whole, other) < 1e-3


@pytest.mark.parametrize("execution", ["grouped", "masked"])
@pytest.mark.parametrize("p", [0., .5, .75])
def test_paths_shut_image_by_image_give_the_processors_answer(exact, p, execution):
    "The processor's answer is that of grouped execution."
    told = SpeedConfig(layers=4, channels=8, num_classes=5, images=3)
    torch.manual_seed(0)
    network, x, gates = build_supernet(told.space).train(), torch.randn(3, 3, 64, 80), closed_gates(told, p)
    label, found = torch.randint(5, (3, 64, 80)), {}
    for device in ("cpu", "cuda"):
        network.execution = "grouped" if device == "cpu" else execution
        network.to(device).zero_grad()
        with fix_gates(network, {name: g.to(device) for name, g in gates.items()}): logits = network(x.to(device))
        pixel_cross_entropy(logits, label.to(device)).backward()
        found[device] = logits.detach().cpu(), torch.cat([p.grad.cpu().flatten() for p in network.parameters() if p.grad is not None])
    for there, here in zip(found["cuda"], found["cpu"]): assert apart(there, here) < 1e-3


@pytest.mark.parametrize("consistency", ["fixmatch", "mean_teacher", "unimatch", "cps"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_search_ends_and_is_read_on_the_processor(config, precision, consistency):
    config = dataclasses.replace(config, precision=precision, consistency=consistency)
    found = search(config)
    last = found.trained.history[-1]
    assert last["semi"] > 0 and last["jig"] > 0 and torch.cuda.get_device_name(0) == found.record.hardware["gpu"]
    x = torch.randn(1, 3, 64, 80)
    here = load_supernet(config.folder)
    assert not next(here.parameters()).is_cuda
    with torch.no_grad(): assert apart(here(x), found.trained.model(x.to(local_device()))) < 0.05 # some gate may be near its edge


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_what_was_stopped_goes_on(config, precision):
    "Sums on a GPU come in any order: the same run twice is alike, not equal, and so is one that was stopped."
    config = dataclasses.replace(config, precision=precision, steps=8, logs=4, budget_gain=0.)
    data = load_training_data(config)
    def run(folder, stop=None):
        told = dataclasses.replace(config, folder=config.folder + folder)
        def model():
            torch.manual_seed(0)
            return build_supernet(told.space(data.train.spec.num_classes), gate=told.gate)
        def watch(rows):
            if rows[-1]["step"] == stop: raise KeyboardInterrupt
        try: return train(model(), told, data, watch=watch).history
        except KeyboardInterrupt: return train(model(), told, data).history
    whole, parts = run("-whole"), run("-parts", stop=4)
    assert [row["step"] for row in whole] == [row["step"] for row in parts]
    for a, b in zip(whole, parts):
        for name in ("sup", "jig", "semi"): assert abs(a[name] - b[name]) < 0.05 * abs(a[name]) + 1e-3, (a["step"], name)


def test_a_retrained_network_is_measured_alike_on_both(config, tmp_path):
    found = search(config)
    folder = str(tmp_path/"retrain")
    retrain(RetrainConfig(folder=folder, architecture=f"{config.folder}/architecture.json", split_folder=f"{config.folder}/split", w_jig=.1, w_semi=1.,
                          **{k: SMALL[k] for k in ("size", "batch_labelled", "batch_unlabelled", "batch_jigsaw", "logs", "steps")}))
    network = load_network(folder)
    assert not next(network.parameters()).is_cuda
    both = [evaluate_segmenter(network.to(device), found.data.val, progress=False) for device in ("cpu", "cuda")]
    assert abs(both[0].miou - both[1].miou) < 0.01 and abs(both[0].pixel_accuracy - both[1].pixel_accuracy) < 0.01
    record = evaluate(EvaluateConfig(folder=str(tmp_path/"evaluate"), network=folder, baselines=("unet_resnet18",)))
    assert record.record.metrics["device"] == "cuda" and json.dumps(record.record.metrics["rows"])


def test_batches_are_pinned_and_arrive(config):
    data = load_training_data(config)
    batch = next(make_batches(config, data))
    assert all(x.is_pinned() for x in present(batch.labelled).values())
    moved, plain = (present(batch.to(device).labelled) for device in ("cuda", "cpu"))
    for name in plain: assert torch.allclose(moved[name].cpu(), plain[name], atol=1e-6), name


def test_views_are_made_on_the_gpu_without_a_wait(config, exact):
    "Workers send pinned source pixels and draws; the views are those of the processor."
    config = dataclasses.replace(config, consistency="unimatch", w_strong=1.)
    data = load_training_data(config)
    sources, plain = (next(make_batches(config, data, device=device)) for device in ("cuda", "cpu"))
    assert all(x.is_pinned() for part in sources.drawn.values() for x in part[:4] if x is not None)
    sources.to("cuda") # libraries are loaded
    torch.cuda.set_sync_debug_mode("error")
    try: batch = sources.to("cuda")
    finally: torch.cuda.set_sync_debug_mode("default")
    expected = plain.to("cpu")
    assert (batch.jigsaw.cpu() - expected.jigsaw).abs().mean() < .01
    for kind in ("labelled", "unlabelled"):
        for name, x in present(getattr(expected, kind)).items():
            y = getattr(getattr(batch, kind), name)
            assert y.device.type == "cuda" and (y.cpu().double() - x.double()).abs().mean() < .01, (kind, name)


def test_latency_is_measured_where_it_will_run(config):
    table = measure_costs(config.space(5), (64, 80), "latency", device=local_device())
    assert table.full > 0


def test_memory_that_gives_out_is_explained(config):
    "In a thousandth of the GPU's memory no such batch has room."
    data = load_training_data(config)
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(MemoryError, match="lower one of these"):
            train(build_supernet(config.space(data.train.spec.num_classes), gate="conditional"),
                  dataclasses.replace(config, size=(768, 768), batch_labelled=32), load_training_data(dataclasses.replace(config, size=(768, 768))))
    finally: torch.cuda.set_per_process_memory_fraction(1.)


# ---- the benchmark of a GPU

TINY = SpeedConfig(device="cuda", layers=3, channels=8, images=2, size=(64, 96), rounds=1, turn=.01, num_classes=11, network="streetscenes",
                   rival="lraspp_mobilenet_v3_large") if torch.cuda.is_available() else None


def complete(metrics):
    "No call was left out."
    assert metrics and not [name for name in metrics if "skipped" in name], metrics
    return metrics


def test_masked_steps_wait_less_than_grouped_ones():
    grouped, masked = (labelled_step(execution, TINY) for execution in ("grouped", "masked"))
    for step in (grouped, masked): step()
    assert count_waits(masked, "cuda") < 5 < count_waits(grouped, "cuda") and count_launches(masked, "cuda") > 100


def test_a_masked_forward_and_backward_pass_never_waits():
    network = supernet_in("masked", TINY).cuda().train()
    x = torch.randn(2, 3, 64, 96, device="cuda")
    network(x).square().mean().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: network(x).square().mean().backward()
    finally: torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_each_part_of_the_benchmark_runs(precision):
    config = dataclasses.replace(TINY, precision=precision)
    metrics = complete(roofline_part(config, n=512, copied=2**20)[0])
    assert metrics["masked: times the roofline"] > 1
    complete(launches_part(config, (64, 80), 2)[0])
    shares = complete(shares_part(config)[0])
    assert sum(share for name, share in shares.items() if name.startswith("masked")) == pytest.approx(1, abs=1e-3)
    complete(input_part(config, ((64, 80),), (0, 2), .1)[0])
    assert complete(full_size_part(config, 3, 8, (64, 96), (2,))[0])["masked: peak bytes"] > 0
    assert training_part(config, (64, 80), 2)[0]["labels: ms"] > 0


def test_networks_run_as_graphs_and_compiled():
    pytest.importorskip("segmentation_models_pytorch")
    metrics = complete(networks_part(TINY, ((1, 64, 80), (2, 64, 64)))[0])
    assert metrics["rival, graph, 1x64x80, bf16: times ours"] > 0
    complete(networks_part(TINY, ((1, 64, 64),), ("bf16",), {"compiled": reduce_overhead})[0])


def test_compiled_regions_give_the_same_step():
    pytest.importorskip("selfsupnas.space.compiled")
    torch.manual_seed(0)
    eager = supernet_in("masked", TINY).cuda()
    x, compiled = torch.randn(2, 3, 64, 96, device="cuda"), compile_network(copy.deepcopy(eager))
    assert apart(compiled(x), eager(x)) < 1e-3


def test_out_of_memory_is_recorded_and_the_part_measured_again(tmp_path):
    config = dataclasses.replace(TINY, folder=str(tmp_path))
    torch.cuda.set_per_process_memory_fraction(0.0005)
    try: assert "OutOfMemory" in run_parts(config, ("roofline",))["roofline"].metrics["failed"]
    finally: torch.cuda.set_per_process_memory_fraction(1.)
    assert "roofline" in ON_GPU and run_parts(config, ("roofline",))["roofline"].metrics["masked: ms"] > 0
