"""Time and memory of search steps, derived networks and evaluation, as ratios.

    python nbs/experiments/benchmarks.py step closed --device cuda --precision bf16
    python nbs/experiments/benchmarks.py --device cuda --precision bf16 --images 8 --size 768 768
    python nbs/experiments/benchmarks.py removal -p folder runs/terms -p steps 10
    python nbs/experiments/benchmarks.py loader -p folder runs/loader -p workers 2 -p steps 20

Without names the parts of the device are measured: `ON_PROCESSOR` or `ON_GPU`. Each writes
FOLDER/PART/speed-record.json; a part that has a record is skipped. A part that fails writes why,
the others go on, and the next call tries it again. The speed of a shared machine may change by a
factor of two within a minute, so calls are timed in turns in one process, and a result is the
median of the ratios over the turns. `speed.ipynb` shows the results.
"""
import argparse, dataclasses, json, subprocess, sys, tempfile, time, traceback
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from full_size import step_flops, step_memory
from gpu_parts import (compiled_networks_part, compiled_part, full_size_part, input_part,
                       launches_part, networks_part, roofline_part, shares_part)
from timed_steps import (computed_bytes, count_operators, free_memory, in_turns, labelled_step,
                         make_step, matrix_product, median, plain_supernet, ratio, reason,
                         retraining_step, RETRAININGS, runnable, SearchStep, SpeedConfig,
                         supernet_in, textbook_step)
from selfsupnas.core import RunRecord, from_texts, keep_freed_memory, versions
from selfsupnas.export import export_onnx, fold_batch_norm, max_relative_difference, load_onnx
from selfsupnas.metrics import check_logits, confusion_matrix
from selfsupnas.rivals import build_baseline, random_architecture
from selfsupnas.space.budget import measure_costs, realised_cost, static_cost
from selfsupnas.space.cost import count_cost
from selfsupnas.space.gate import fix_gates, record_gates
from selfsupnas.space.network import StaticNetwork
from selfsupnas.space.supernet import build_supernet, gate_name, gates_by_edge
from selfsupnas.stages.calibration import make_table
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import BudgetLosses
from selfsupnas.train.batches import load_training_data, make_batches
from selfsupnas.train.loop import make_optimiser, train
from selfsupnas.train.step import LossWeights
from selfsupnas.zoo import load

HERE = Path(__file__).resolve().parent

# ---- Timing of each term of a search, and of the loader

def time_training(model, config: SearchConfig, data, cost) -> float:
    "Median ms per step of a training in a temporary folder, which never resumes a checkpoint."
    with tempfile.TemporaryDirectory() as folder:
        return train(model, dataclasses.replace(config, folder=folder), data, cost).step_ms

def time_terms(config: SearchConfig, rounds: int = 3) -> RunRecord:
    """Median step time (ms) of the search with all terms and without each, in turns, each from a
    new supernet with all edges open; writes terms-record.json to `config.folder`."""
    config = dataclasses.replace(config, ramp=(0., 0.), cost_ramp=(0., 0.), logs=1, w_cost=1e-9,
                                 budget_gain=0., w_binary=0.)
    data = load_training_data(config)
    table = make_table(config, data)
    removed = {"none": (), "w_jig": ("w_jig",), "w_semi": ("w_semi",), "w_cost": ("w_cost",),
               "all": ("w_jig", "w_semi", "w_cost")}
    times = {name: [] for name in removed}
    for _ in range(rounds):
        for name, weights in removed.items():
            variant = dataclasses.replace(config, **dict.fromkeys(weights, 0.))
            model = build_supernet(table.space, gate=config.gate)
            cost = BudgetLosses(model, table, variant) if variant.w_cost else None
            times[name].append(time_training(model, variant, data, cost))
    record = RunRecord("terms", Path(config.folder).name, dataclasses.asdict(config),
                       config.seed, {}, {k: sorted(v)[rounds // 2] for k, v in times.items()})
    record.save(config.folder)
    return record

def time_loader(config: SearchConfig, rounds: int = 3) -> RunRecord:
    """Median ms of a search step without its loader, and of the loader alone, in turns; writes
    loader-record.json to `config.folder`."""
    config = dataclasses.replace(config, ramp=(0., 0.), logs=1)
    data = load_training_data(config)
    table = make_table(config, data)
    alone = dataclasses.replace(config, workers=0) # no worker competes with the timed step
    def step():
        model = build_supernet(table.space, gate=config.gate)
        return time_training(model, alone, data, BudgetLosses(model, table, config))
    def batches():
        warmup = 20 # fills the queues of the workers
        longer = dataclasses.replace(config, steps=warmup + 10 * config.steps)
        loader = make_batches(longer, data)
        for _ in range(warmup): next(loader)
        start = time.perf_counter()
        for _ in loader: pass
        return 1e3 * (time.perf_counter() - start) / (longer.steps - warmup)
    times = [(step(), batches()) for _ in range(rounds)]
    step_ms, loader_ms = (sorted(column)[rounds // 2] for column in zip(*times))
    record = RunRecord("loader", Path(config.folder).name, dataclasses.asdict(config),
                       config.seed, {},
                       {"step_ms": step_ms, "loader_ms": loader_ms,
                        "loader_times_faster": step_ms / loader_ms})
    record.save(config.folder)
    return record

# ---- The search step

class Convolutions(TorchFunctionMode):
    """`with Convolutions() as recorded: network(x)` records the arguments of each convolution in
    `recorded.all`."""
    def __init__(self):
        super().__init__()
        self.all = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d:
            x, weight, bias, *options = args
            self.all.append((x.shape, x.requires_grad, weight, options))
        return function(*args, **(kwargs or {}))

def replay(network: nn.Module, config: SpeedConfig):
    "Returns a function that computes only the convolutions of a training step and their gradients."
    x = torch.randn(config.images, 3, *config.size, device=config.device)
    with Convolutions() as recorded, config.autocast(): network.train()(x)
    layout, features = torch.channels_last, {}
    for shape, *_ in recorded.all:
        features[shape] = torch.randn(shape, device=config.device).contiguous(memory_format=layout)
    def run():
        with config.autocast():
            for shape, needs_grad, weight, options in recorded.all:
                x = features[shape].detach().requires_grad_(needs_grad)
                y = F.conv2d(x, weight, None, *options)
                torch.autograd.grad(y, [x, weight] if needs_grad else [weight],
                                    torch.ones_like(y))
    return run

def step_part(config: SpeedConfig) -> tuple[dict, dict]:
    """Metrics and seconds: speed, relative to the matrix product, of the search step with all gates
    open (ours: grouped execution), the plain implementation, and the convolutions alone."""
    ours, (product, product_flops) = build_supernet(config.space), matrix_product(config)
    macs = config.images * count_cost(ours, config.size).flops
    times = in_turns({"yardstick": product, "plain": textbook_step(config),
                      "plain, channels last": textbook_step(config, last=True),
                      "ours": make_step(ours, config),
                      "masked": labelled_step("masked", config),
                      "convolutions": replay(ours, config)}, config)
    # in matrix products: 3 passes, 2 operations per multiply-add
    per_step = 6 * macs / product_flops
    metrics = {"multiply_adds": macs,
               "yardstick_gflops": product_flops / median(times["yardstick"]) / 1e9}
    for name in list(times)[1:]:
        metrics[f"{name}: share of yardstick"] = per_step * ratio(times, "yardstick", name)
        metrics[f"{name}: times ours"] = ratio(times, name, "ours")
    return metrics, times

def closed_gates(config: SpeedConfig, p: float) -> dict:
    "Gates by name for `fix_gates`, (images, edges), each 0 with probability p, else 0.9."
    draw, space = torch.Generator().manual_seed(0), config.space
    def gates(cell): return torch.rand(config.images, len(space.kinds_at(*cell)), generator=draw)
    return {gate_name(*cell): .9 * (gates(cell) >= p).float().to(config.device)
            for cell in space.cells()}

def closed_part(config: SpeedConfig, shares: tuple = (.5, .75)) -> tuple[dict, dict]:
    """Speed-up of a step with a share of the edges closed at random, image by image, and its upper
    bound from the remaining multiply-adds, in both executions; relative to the step with all edges
    open, and to the plain implementation, which computes everything. Ours has fixed gates."""
    networks = {"": supernet_in("grouped", config), "masked ": supernet_in("masked", config)}
    table, metrics = measure_costs(config.space, config.size), {}
    x = torch.randn(config.images, 3, *config.size, device=config.device)
    def with_gates(network, values):
        step = make_step(network, config)
        def call():
            with fix_gates(network, values): step()
        return call
    calls = {"plain": textbook_step(config)}
    for p in (0., *shares):
        values = closed_gates(config, p)
        for kind, network in networks.items():
            calls[f"{kind}{p:g}"] = with_gates(network, values)
        with (torch.no_grad(), fix_gates(networks[""], values),
              record_gates(networks[""]) as gates): networks[""](x)
        cost = realised_cost(table, gates_by_edge(config.space, gates)).mean().item()
        metrics[f"{p:g}: multiply-adds left"] = cost / table.full
    times = in_turns(calls, config)
    for p in shares: metrics[f"{p:g}: at most"] = 1 / metrics[f"{p:g}: multiply-adds left"]
    for kind in networks:
        for p in shares:
            metrics[f"{kind}{p:g}: times faster"] = ratio(times, f"{kind}0", f"{kind}{p:g}")
        for p in (0., *shares):
            metrics[f"{kind}{p:g}: plain times ours"] = ratio(times, "plain", f"{kind}{p:g}")
    return metrics, times

def fitted_line(work: list, seconds: list) -> dict:
    "Slope, intercept and r2 of the least-squares line of seconds over work."
    x, y = torch.tensor([work, seconds], dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean())**2).sum()
    residual = y - y.mean() - slope * (x - x.mean())
    return {"slope": slope.item(), "intercept": (y.mean() - slope * x.mean()).item(),
            "r2": 1 - (residual.square().sum() / (y - y.mean()).square().sum()).item()}

def scaling_part(config: SpeedConfig, images: tuple = (1, 2, 4, 8), layers: tuple = (4, 8, 16, 24),
                 sides: tuple = (192, 384, 576, 768)) -> tuple[dict, dict]:
    "Lines fitted to the seconds of a step over images, pixels and layers."
    def step(n=2, side=config.size[0], depth=config.layers):
        network = build_supernet(dataclasses.replace(config.space, layers=depth))
        return make_step(network, config, n, (side, side))
    calls = {"images": {n: step(n) for n in images},
             "pixels": {side**2: step(1, side) for side in sides},
             "layers": {depth: step(depth=depth) for depth in layers}}
    flat = {f"{kind} {work}": call for kind, steps in calls.items() for work, call in steps.items()}
    times = in_turns(flat, dataclasses.replace(config, rounds=max(1, config.rounds // 2)))
    def seconds(kind): return [median(times[f"{kind} {work}"]) for work in calls[kind]]
    return {kind: {"work": list(steps), **fitted_line(list(steps), seconds(kind))}
            for kind, steps in calls.items()}, times

# ---- Memory: the peak of a step, and the largest batches

# implementations of the same step
WAYS = ("plain, keeping all", "plain", "ours", "recompute", "masked")

class Results(TorchFunctionMode):
    "Context that keeps every tensor returned by an operation."
    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.tensors.append(result := function(*args, **(kwargs or {})))
        return result

def step_in_way(name: str, config: SpeedConfig):
    """Returns a function that takes the step in one of `WAYS`: `plain, keeping all` keeps every
    intermediate result, `recompute` computes each cell again for its gradient."""
    network = (plain_supernet if "plain" in name else build_supernet)(config.space)
    network.recompute = name == "recompute"
    network.execution = "masked" if name == "masked" else "grouped"
    step = make_step(network, config, last="plain" not in name)
    if name != "plain, keeping all": return step
    def keeping():
        with Results(): return step()
    return keeping

def peak_bytes(name: str, config: SpeedConfig) -> int:
    """Peak of the memory in use during two steps, minus that before them, by the allocator of a GPU
    or by Linux; needs a process of its own."""
    step = step_in_way(name, config)
    if config.device != "cpu":
        before = torch.cuda.memory_allocated()
        step(); step()
        return torch.cuda.max_memory_allocated() - before
    def by_system(field): # bytes
        line = next(line for line in open("/proc/self/status") if line.startswith(field))
        return 1024 * int(line.split()[1])
    Path("/proc/self/clear_refs").write_text("5") # resets the peak
    before = by_system("VmRSS")
    step(); step()
    return by_system("VmHWM") - before

def peak_alone(name: str, config: SpeedConfig) -> int:
    "`peak_bytes` in a new process, so that earlier steps have no effect."
    parameters = json.dumps(dataclasses.asdict(config))
    code = (f"import json, sys; sys.path.insert(0, {str(HERE)!r}); "
            "from benchmarks import SpeedConfig, peak_bytes; "
            f"print(peak_bytes({name!r}, SpeedConfig(**json.loads({parameters!r}))))")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if process.returncode: raise RuntimeError(f"{name}: {process.stderr}")
    return int(process.stdout.split()[-1])

def memory_part(config: SpeedConfig) -> tuple[dict, dict]:
    """Memory peaks of the implementations relative to the plain one; the seconds of `recompute`;
    bytes per image, measured and computed."""
    if config.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise ValueError("the memory peak is read from /proc: use Linux or a GPU")
    peaks = {name: peak_alone(name, config) for name in WAYS}
    times = in_turns({name: step_in_way(name, config) for name in WAYS[2:]}, config)
    metrics = {f"{name}: bytes": peak for name, peak in peaks.items()}
    n = config.images
    for name in WAYS[2:]:
        for other in WAYS[:2]: metrics[f"{name}: of {other}"] = peaks[name] / peaks[other]
        twice = peak_alone(name, dataclasses.replace(config, images=2 * n))
        least = [computed_bytes(config, k, name == "recompute") for k in (n, 2 * n)]
        metrics[f"{name}: bytes an image"] = (twice - peaks[name]) / n
        metrics[f"{name}: bytes an image, over computed"] = ((twice - peaks[name])
                                                             / (least[1] - least[0]))
    return {**metrics, "recompute: times the seconds": ratio(times, "recompute", "ours"),
            "largest batch": largest_batches(config)}, times

def largest_batches(config: SpeedConfig, memories: tuple = (24, 80), # of a GPU, 1e9 bytes
                    # usable: share of the memory without the allocator's losses
                    size: tuple = (768, 768), usable: float = .9) -> dict:
    """The largest number of labelled, unlabelled and jigsaw images each in a step of the search,
    computed for both precisions, with and without `recompute`."""
    def fits(n, precision, recompute, memory):
        search = SearchConfig(batch_labelled=n, batch_unlabelled=n, batch_jigsaw=n,
                              optimiser="sgd", precision=precision, recompute=recompute)
        return step_memory(search, config.space, size) <= usable * 1e9 * memory
    return {f"{memory} GB, {precision}{', recompute' * recompute}":
            next(n for n in range(1000) if not fits(n + 1, precision, recompute, memory))
            for memory in memories for precision in ("no", "bf16") for recompute in (False, True)}

# ---- Steps of the training loop, and their parts

def training_part(config: SpeedConfig, size: tuple = (128, 160), # (H,W) of a view
                  images: int = 8) -> tuple[dict, dict]:
    """Milliseconds of a step of retraining the derived network as in `make camvid`, and the same in
    matrix products, which can be compared between versions."""
    product, product_flops = matrix_product(config)
    steps = {terms: retraining_step(terms, config, size, images) for terms in RETRAININGS}
    metrics, times = {"size": size, "images": images}, in_turns({"yardstick": product, **steps},
                                                                config)
    metrics["yardstick_gflops"] = product_flops / median(times["yardstick"]) / 1e9
    for name in list(times)[1:]:
        metrics[f"{name}: ms"] = 1e3 * median(times[name])
        metrics[f"{name}: yardsticks"] = ratio(times, name, "yardstick")
    return metrics, times

OF_BUDGET = LossWeights(cost=1., binary=1.)

def terms_part(config: SpeedConfig) -> tuple[dict, dict]:
    """The step with all terms relative to one with only labels, in seconds and multiply-adds, and
    its shares of views, gates (relative to static gates), budget and teacher."""
    with tempfile.TemporaryDirectory() as folder:
        data = load_training_data(SearchConfig(folder=folder, size=config.size))
        only_labels = dict(w_jig=0., w_semi=0., w_cost=0., w_binary=0.)
        kinds = {"all terms": {}, "labels alone": only_labels, "static gates": dict(gate="static")}
        steps = {name: SearchStep(config, data, folder, **changes)
                 for name, changes in kinds.items()}
        whole = steps["all terms"]
        with torch.no_grad(), record_gates(whole.state.multitask.model) as gates:
            whole.state.multitask.model(torch.cat([whole.batch.labelled.image,
                                                   whole.batch.unlabelled.weak]))
        gates = {name: g.detach().requires_grad_() for name, g in gates.items()}
        calls = {**steps, "views": lambda: next(whole.views),
                 "budget": lambda: whole.cost(gates, 1.)[0].total(OF_BUDGET).backward(),
                 "teacher": lambda: whole.state.teacher.update(whole.state.multitask, 1)}
        times = in_turns(calls, config)
    times["gates"] = [a - b for a, b in zip(times["all terms"], times["static gates"])]
    flops = {name: step_flops(step.config, step.table) for name, step in steps.items()}
    work = flops["all terms"] / flops["labels alone"]
    parts = {name: ratio(times, name, "all terms") for name in ("views", "gates", "budget",
                                                                 "teacher")}
    return {"times as long": ratio(times, "all terms", "labels alone"),
            "times the multiply-adds": work,
            "time over multiply-adds": ratio(times, "all terms", "labels alone") / work,
            **{f"{name}: share of the step": share for name, share in parts.items()},
            "beside the terms": sum(parts.values())}, times

def calls_part(config: SpeedConfig, size: tuple = (64, 64)) -> tuple[dict, dict]:
    """Calls of ATen operators in one eager step: forward, backward and optimiser, which is fused
    for the textbook, too. With all edges open they do not depend on the size of the images."""
    small, metrics = dataclasses.replace(config, images=2, size=size), {}
    def plain():
        return textbook_step(small, optimiser=lambda net: make_optimiser(net, SearchConfig()))
    makers = {"plain": plain,
              **{execution: partial(labelled_step, execution, small)
                 for execution in ("grouped", "masked")},
              **{f"retraining, {terms}": partial(retraining_step, terms, small, size, 2)
                 for terms in RETRAININGS}}
    for name, step in runnable(makers, small, metrics).items():
        noted = count_operators(step)
        metrics[f"{name}: calls"], metrics[f"{name}: views"] = noted.calls.total(), noted.views
    for name in ("grouped", "masked"):
        metrics[f"{name}: of plain"] = metrics[f"{name}: calls"] / metrics["plain: calls"]
    return metrics, {}

# ---- The derived network, derivation, evaluation

def network_part(config: SpeedConfig,
                 runtimes: tuple = ("eager", "folded", "torch", "onnx")) -> tuple[dict, dict]:
    """Multiply-adds and seconds of the derived network and of its rival for one image, in PyTorch
    (eager; with folded batch norm; torch: folded and channels last) and in ONNX Runtime."""
    ours = load(config.network).eval()
    pair = {"ours": ours, "rival": build_baseline(config.rival, ours.space.num_classes).eval()}
    flops = {name: count_cost(network, config.network_size).flops for name, network in pair.items()}
    x = torch.randn(1, 3, *config.network_size, generator=torch.Generator().manual_seed(0))
    metrics = {**{f"{name}: multiply-adds": n for name, n in flops.items()},
               "multiply-adds, rival over ours": flops["rival"] / flops["ours"]}
    calls, times = {runtime: {} for runtime in runtimes}, {}
    def add(runtime, name, network, layout=torch.contiguous_format):
        network = network.to(config.device, memory_format=layout)
        image = x.to(config.device).contiguous(memory_format=layout)
        if runtime in calls: calls[runtime][name] = lambda: network(image)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, network in pair.items():
            # ONNX Runtime is timed only on the processor
            if "onnx" in runtimes and config.device == "cpu":
                path = export_onnx(network, config.network_size, f"{folder}/{name}.onnx")
                calls["onnx"][name] = lambda run=load_onnx(path): run(x)
                gap = max_relative_difference(network, load_onnx(path), config.network_size)
                metrics[f"{name}: gap of the exported"] = gap
            add("folded", name, fold_batch_norm(network))
            add("torch", name, fold_batch_norm(network), torch.channels_last)
            add("eager", name, network)
        for runtime, timed in calls.items(): # separately: idle threads of one slow the other
            seconds = in_turns(timed, config)
            times |= {f"{name}, {runtime}": s for name, s in seconds.items()}
            if not timed: continue
            gain = metrics[f"{runtime}: times faster"] = ratio(seconds, "rival", "ours")
            metrics[f"{runtime}: of the gain in multiply-adds"] = (gain * flops["ours"]
                                                                   / flops["rival"])
    return metrics, times

def derive_part(config: SpeedConfig, count: int = 50, checked: int = 3) -> tuple[dict, dict]:
    """Seconds to derive architectures and to compute their costs by the cost table; for how many of
    a sample fvcore counts the same on the static network."""
    table = measure_costs(config.space, config.size)
    def cost(kept): return static_cost(table, kept)
    least, most = cost(()), cost(config.space.gated())
    def derived(k):
        budget = least + (most - least) * (k + 1) / count
        return random_architecture(config.space, cost, budget, seed=k, tolerance=.2)
    architectures = [derived(k) for k in range(count)]
    sample = architectures[::max(1, count // checked)][:checked]
    def built(): return [count_cost(StaticNetwork(a), config.size).flops for a in sample]
    calls = {"derive": lambda: [derived(k) for k in range(count)],
             "count": lambda: [cost(a.selected) for a in architectures],
             "build, count by fvcore": built}
    equal = sum(cost(a.selected) == flops for a, flops in zip(sample, built()))
    times = in_turns(calls, dataclasses.replace(config, rounds=max(1, config.rounds // 2)))
    by_fvcore = median(times["build, count by fvcore"]) * count / len(sample)
    return {"architectures": count, "seconds to derive them": median(times["derive"]),
            "seconds to count them": median(times["count"]),
            "times faster than to build and count by fvcore": by_fvcore / median(times["count"]),
            f"of {len(sample)} counted as by fvcore": equal}, times

def evaluate_part(config: SpeedConfig, size: tuple = (512, 1024)) -> tuple[dict, dict]:
    "Seconds from logits to a confusion matrix, the textbook code relative to ours."
    draw, k = torch.Generator().manual_seed(0), config.num_classes
    logits = torch.randn(1, k, *size, generator=draw).to(config.device)
    labels = torch.randint(k + 1, (1, *size), generator=draw).to(config.device)
    labels[labels == k] = 255
    def ours():
        return confusion_matrix(check_logits(logits, logits, k, [""]).max(1).indices, labels, k)
    def textbook():
        if not logits.isfinite().all(): raise ValueError
        guess, counted = logits.argmax(1), labels != 255
        return torch.bincount(labels[counted] * k + guess[counted], minlength=k**2).view(k, k)
    if not torch.equal(ours(), textbook()): raise ValueError("the two confusion matrices differ")
    times = in_turns({"ours": ours, "textbook": textbook}, config)
    return {"textbook: times ours": ratio(times, "textbook", "ours")}, times

# ---- All parts, and the command

ON_PROCESSOR = {"step": step_part, "closed": closed_part, "calls": calls_part,
                "training": training_part, "network": network_part, "terms": terms_part,
                "memory": memory_part, "scaling": scaling_part, "derive": derive_part,
                "evaluate": evaluate_part}
ON_GPU = {"training": training_part, "roofline": roofline_part, "launches": launches_part,
          "shares": shares_part, "full-size": full_size_part, "networks": networks_part,
          "input": input_part, "compiled": compiled_part, # what compiles is last
          "compiled-networks": compiled_networks_part,
          "compiled-grouped": partial(compiled_part, executions=("grouped",))}
PARTS = ON_PROCESSOR | ON_GPU
OF_SEARCHES = {"removal": time_terms, "loader": time_loader} # short searches, by SearchConfig

def all_versions() -> dict:
    "Versions of a record, with those of the libraries that only benchmarks use."
    def version(name):
        try: return metadata.version(name)
        except metadata.PackageNotFoundError: return None
    others = "onnxruntime", "segmentation_models_pytorch", "triton"
    return {**versions(), **{name: version(name) for name in others}, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None}

def measure_part(part: str, config: SpeedConfig) -> RunRecord:
    "The record of a part; its only metric is `failed`, the reason, if the part raises an error."
    torch.manual_seed(0)
    start = time.perf_counter()
    try: metrics, times = PARTS[part](config)
    except Exception as e:
        traceback.print_exc()
        metrics, times = {"failed": reason(e)}, {}
    free_memory(config)
    seconds = time.perf_counter() - start
    print(f"{part}: {seconds:.0f} s", flush=True)
    return RunRecord("speed", part, dataclasses.asdict(config), 0, metrics,
                     {**{name: median(turns) for name, turns in times.items()},
                      "whole part": seconds}, versions=all_versions())

def run_parts(config: SpeedConfig, parts: tuple | None = None) -> dict: # None: of the device
    """Measure the parts, write PART/speed-record.json, and return the records by part; ValueError
    for an unknown part or a record with other parameters. A part that failed is measured again."""
    if parts is None: parts = tuple(ON_PROCESSOR if config.device == "cpu" else ON_GPU)
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"there is no part {unknown[0]!r}; known: {', '.join(PARTS)}")
    keep_freed_memory()
    records = {}
    for part in parts:
        folder = Path(config.folder)/part
        path = folder/"speed-record.json"
        parameters = json.loads(json.dumps(dataclasses.asdict(config)))
        record = RunRecord.load(path) if path.exists() else None
        if record is None or "failed" in record.metrics: measure_part(part, config).save(folder)
        else:
            for name, value in parameters.items():
                if name != "folder" and record.parameters.get(name) != value:
                    raise ValueError(f"{path} has {name} = {record.parameters.get(name)!r}, not "
                                     f"{value!r}: use another folder")
        records[part] = RunRecord.load(path)
        print(json.dumps(records[part].metrics, indent=1), flush=True)
    return records

def main(argv=None) -> int:
    """Measure parts of the benchmark, or short searches (removal, loader); without names the parts
    of the device. Returns 1 if a part failed."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("parts", metavar="PART", nargs="*", help=", ".join([*PARTS, *OF_SEARCHES]))
    for f in dataclasses.fields(SpeedConfig):
        shape = (dict(nargs=2, type=int) if isinstance(f.default, tuple)
                 else dict(type=type(f.default)))
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS,
                            help=f"of the parts; default: {f.default}", **shape)
    parser.add_argument("-p", nargs=2, action="append", default=[], dest="pairs",
                        metavar=("NAME", "VALUE"), help="a parameter of removal and loader, see "
                        "selfsupnas search --help")
    options = vars(parser.parse_args(argv))
    parts, pairs = options.pop("parts"), options.pop("pairs")
    try:
        if [part for part in parts if part in OF_SEARCHES]:
            if len(parts) > 1 or options:
                parser.error("removal and loader are measured alone, with parameters by -p")
            config = from_texts(SearchConfig, dict(pairs))
            print(parts[0], OF_SEARCHES[parts[0]](config).timings)
        elif pairs: parser.error("-p is for removal and loader")
        else:
            options = {name: tuple(value) if isinstance(value, list) else value
                       for name, value in options.items()}
            records = run_parts(SpeedConfig(**options), tuple(parts) or None)
            failed = [part for part, record in records.items() if "failed" in record.metrics]
            if failed: print(f"failed: {', '.join(failed)}", file=sys.stderr)
            return int(bool(failed))
    except (ValueError, TypeError, OSError) as e: parser.error(str(e))
    return 0

if __name__ == "__main__": sys.exit(main())
