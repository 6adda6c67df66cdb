"""Time and memory of a search step, of a derived network and of what follows, as ratios.

    python nbs/experiments/benchmarks.py step closed --device cuda --precision bf16
    python nbs/experiments/benchmarks.py removal -p folder runs/terms -p steps 10
    python nbs/experiments/benchmarks.py loader -p folder runs/loader -p workers 2 -p steps 20

Without names all parts are measured, and each leaves FOLDER/PART/speed-record.json; a part with a
record is not measured again. The speed of a shared machine drifts by a factor of two within a
minute, so calls are timed in turns in one process, and a figure is the median of the ratios of
its turns. `speed.ipynb` shows what was measured.
"""
import argparse, dataclasses, json, subprocess, sys, tempfile, time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from full_size import step_flops, step_memory, view_table
from selfsupnas.core import RunRecord, check_fields, from_parameters, keep_freed_memory
from selfsupnas.data.loaders import to_device
from selfsupnas.export import export_onnx, fold_batch_norm, max_relative_difference, load_onnx
from selfsupnas.metrics import check_logits, confusion_matrix
from selfsupnas.cli import parse_parameters
from selfsupnas.rivals import build_baseline, random_architecture
from selfsupnas.space.budget import measure_costs, realised_cost, static_cost
from selfsupnas.space.cell import GatedCell, SparseFeatures, scale_features
from selfsupnas.space.cost import count_cost
from selfsupnas.space.gate import fix_gates, record_gates
from selfsupnas.space.grid import SearchSpace
from selfsupnas.space.network import StaticNetwork
from selfsupnas.space.supernet import RoutingNetwork, build_supernet, gate_name, gates_by_edge
from selfsupnas.stages.searching import BudgetLosses, SearchConfig, make_table
from selfsupnas.tasks.losses import pixel_cross_entropy
from selfsupnas.tasks.permutations import permutation_set
from selfsupnas.train.batches import load_training_data, make_batches
from selfsupnas.train.loop import (make_optimiser, build_training_parts, seed_step, forward_state,
                                   step_weights, take_step, train)
from selfsupnas.train.step import objective
from selfsupnas.zoo import load

HERE = Path(__file__).resolve().parent

# ---- Timing: what each term of a search costs, and whether the data keep up

def train_aside(model, config: SearchConfig, data, cost) -> float: # ms of a step, median
    "A training in a temporary folder: none goes on from another's checkpoint."
    with tempfile.TemporaryDirectory() as folder:
        return train(model, dataclasses.replace(config, folder=folder), data, cost).step_ms

def time_terms(config: SearchConfig, rounds: int = 3) -> RunRecord:
    """Median step time (ms) of the search with no term removed and with each removed, in turns,
    each from a fresh supernet with all edges open; leaves terms-record.json in `config.folder`."""
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
            times[name].append(train_aside(model, variant, data, cost))
    record = RunRecord("terms", Path(config.folder).name, dataclasses.asdict(config),
                       config.seed, {}, {k: sorted(v)[rounds // 2] for k, v in times.items()})
    record.save(config.folder)
    return record

def time_loader(config: SearchConfig, rounds: int = 3) -> RunRecord:
    """Median ms of a search step with all terms, without the making of its batches, and of the
    loader alone making them, in turns; leaves loader-record.json in `config.folder`."""
    config = dataclasses.replace(config, ramp=(0., 0.), logs=1)
    data = load_training_data(config)
    table = make_table(config, data)
    alone = dataclasses.replace(config, workers=0) # no worker competes with the step that is timed
    def step():
        model = build_supernet(table.space, gate=config.gate)
        return train_aside(model, alone, data, BudgetLosses(model, table, config))
    def batches():
        # the first fill the workers' queues
        many, begun = dataclasses.replace(config, steps=20 + 10 * config.steps), 20
        drawn = make_batches(many, data)
        for _ in range(begun): next(drawn)
        start = time.perf_counter()
        for _ in drawn: pass
        return 1e3 * (time.perf_counter() - start) / (many.steps - begun)
    times = [(step(), batches()) for _ in range(rounds)]
    step_ms, loader_ms = (sorted(column)[rounds // 2] for column in zip(*times))
    record = RunRecord("loader", Path(config.folder).name, dataclasses.asdict(config),
                       config.seed, {},
                       {"step_ms": step_ms, "loader_ms": loader_ms,
                        "loader_times_faster": step_ms / loader_ms})
    record.save(config.folder)
    return record

# ---- Speed: calls in turns, with a large matrix product as the yardstick

@dataclass
class SpeedConfig:
    "What the parts of the benchmark measure."
    folder: str = "runs/speed" # where the records are written
    device: str = "cpu" # or cuda
    precision: str = "no" # bf16 or fp16: autocast, where the device has them
    layers: int = 16 # of the grid
    channels: int = 64 # C0 of the grid
    num_classes: int = 19 # of Cityscapes
    images: int = 4 # of a step, for each term; the published step: 8, with size 768 768
    size: tuple[int, int] = (256, 256) # (height, width) of a view
    rounds: int = 7 # turns that each call gets, after one that does not count
    turn: float = 0.2 # seconds that a call shorter than that is repeated for in its turn
    network: str = "camvid-eighth" # the discovered network, see selfsupnas.zoo
    rival: str = "deeplabv3_resnet50" # what it is compared with
    network_size: tuple[int, int] = (360, 480) # (height, width) of an image for both

    def __post_init__(self):
        check_fields(self, least=dict(layers=1, images=2, rounds=1, num_classes=2),
                     choices=dict(precision=("no", "bf16", "fp16")))
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}, and no GPU is to be had here")

    @property
    def space(self) -> SearchSpace:
        return SearchSpace(self.num_classes, self.layers, self.channels)

    @property
    def dtype(self) -> torch.dtype:
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def autocast(self):
        return (nullcontext() if self.precision == "no"
                else torch.autocast(self.device.split(":")[0], self.dtype))

def in_turns(calls: dict, # name -> function without arguments
             config: SpeedConfig) -> dict: # name -> seconds of each round
    """Time the calls in turns, after one round that does not count; a short call is repeated in its
    turn, and a GPU is waited for."""
    def seconds(call, repeats):
        wait = torch.cuda.synchronize if config.device != "cpu" else lambda: None
        wait(); start = time.perf_counter()
        for _ in range(repeats): call()
        wait()
        return (time.perf_counter() - start) / repeats
    once = {name: seconds(call, 1) for name, call in calls.items()}
    repeats = {name: max(1, min(20, int(config.turn / s))) for name, s in once.items()}
    turns = [{name: seconds(call, repeats[name]) for name, call in calls.items()}
             for _ in range(config.rounds)]
    return {name: [turn[name] for turn in turns] for name in calls}

def median(values) -> float: return sorted(values)[len(values) // 2]

def ratio(times: dict, one: str, other: str) -> float:
    "The median over the rounds of one call's seconds divided by the other's."
    return median([a / b for a, b in zip(times[one], times[other])])

def matrix_product(config: SpeedConfig, n: int = 2048): # a call, and its floating point operations
    "The yardstick: the product of two n x n matrices."
    a, b = torch.randn(2, n, n, device=config.device, dtype=config.dtype)
    return lambda: a @ b, 2 * n**3

class PlainCell(GatedCell):
    "A gated cell by the textbook: each edge is computed, enlarged, then multiplied by its gate."
    def forward(self, sparse: SparseFeatures, finer_size=None) -> dict:
        gates, output = self.gate(*sparse), self.apply_operations(sparse.features)
        return {kind: SparseFeatures(scale_features(self.edge_output(kind, output, finer_size), g))
                for kind, g in zip(self.kinds, gates.unbind(1))}

def plain_supernet(space: SearchSpace) -> RoutingNetwork:
    "The supernet of plain cells: nothing is skipped, nothing happens in place."
    network = RoutingNetwork(space, {cell: PlainCell(space.channels_at(cell[1]), space.operations,
                                                     space.kinds_at(*cell))
                                     for cell in space.cells()})
    for module in network.modules():
        if isinstance(module, nn.ReLU): module.inplace = False
    return network

def make_step(network: nn.Module, config: SpeedConfig, images: int | None = None,
              size: tuple | None = None, last: bool = True, # last: the channels, in memory
              optimiser=lambda network: make_optimiser(network, SearchConfig())):
    """A function that takes one training step on labelled images drawn once: forward, pixel
    cross-entropy, backward, optimiser."""
    draw = torch.Generator().manual_seed(0)
    shape = images or config.images, *(size or config.size)
    layout = torch.channels_last if last else torch.contiguous_format
    network = network.to(config.device, memory_format=layout).train()
    x = torch.randn(shape[0], 3, *shape[1:], generator=draw).to(config.device, memory_format=layout)
    y = torch.randint(config.num_classes, shape, generator=draw).to(config.device)
    steps = optimiser(network)
    def step():
        with config.autocast(): loss = pixel_cross_entropy(network(x), y)
        loss.backward()
        steps.step()
        steps.zero_grad(set_to_none=True)
        return loss.detach()
    return step

class Convolutions(TorchFunctionMode):
    """`with Convolutions() as noted: network(x)` notes the arguments of each convolution in
    `noted.all`."""
    def __init__(self):
        super().__init__()
        self.all = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d:
            x, weight, bias, *others = args
            self.all.append((x.shape, x.requires_grad, weight, others))
        return function(*args, **(kwargs or {}))

def replay(network: nn.Module, config: SpeedConfig): # -> a function without arguments
    "The network's convolutions of a training step alone, forward and backward."
    x = torch.randn(config.images, 3, *config.size, device=config.device)
    with Convolutions() as noted, config.autocast(): network.train()(x)
    layout, features = torch.channels_last, {}
    for shape, *_ in noted.all:
        features[shape] = torch.randn(shape, device=config.device).contiguous(memory_format=layout)
    def run():
        with config.autocast():
            for shape, learns, weight, others in noted.all:
                x = features[shape].detach().requires_grad_(learns)
                y = F.conv2d(x, weight, None, *others)
                torch.autograd.grad(y, [x, weight] if learns else [weight], torch.ones_like(y))
    return run

def step_part(config: SpeedConfig) -> tuple[dict, dict]: # metrics, seconds
    """Shares of the yardstick: of the search step, all gates open, of the plain implementation, and
    of the convolutions alone."""
    ours, (product, product_flops) = build_supernet(config.space), matrix_product(config)
    macs = config.images * count_cost(ours, config.size).flops
    def adamw(network): return torch.optim.AdamW(network.parameters(), lr=1e-3)
    plain, plain_last = (make_step(plain_supernet(config.space), config, last=last, optimiser=adamw)
                         for last in (False, True))
    times = in_turns({"yardstick": product, "plain": plain, "plain, channels last": plain_last,
                      "ours": make_step(ours, config), "convolutions": replay(ours, config)},
                     config)
    per_step = 6 * macs / product_flops # yardsticks' worth of operations: 3 passes, 2 each
    metrics = {"multiply_adds": macs,
               "yardstick_gflops": product_flops / median(times["yardstick"]) / 1e9}
    for name in list(times)[1:]:
        metrics[f"{name}: share of yardstick"] = per_step * ratio(times, "yardstick", name)
        metrics[f"{name}: times ours"] = ratio(times, name, "ours")
    return metrics, times

def closed_gates(config: SpeedConfig, p: float) -> dict: # p: share that is shut; for fix_gates
    "Gates by name, (images, edges), each 0 with probability p, else 0.9."
    draw, space = torch.Generator().manual_seed(0), config.space
    def gates(cell): return torch.rand(config.images, len(space.kinds_at(*cell)), generator=draw)
    return {gate_name(*cell): .9 * (gates(cell) >= p).float().to(config.device)
            for cell in space.cells()}

def closed_part(config: SpeedConfig, shares: tuple = (.5, .75)) -> tuple[dict, dict]:
    """How much faster a step is with a share of the edges shut at random, image by image, and the
    most that the multiply-adds left allow."""
    network = build_supernet(config.space)
    step, table = make_step(network, config), measure_costs(config.space, config.size)
    x, calls, metrics = torch.randn(config.images, 3, *config.size, device=config.device), {}, {}
    def held(values):
        def call():
            with fix_gates(network, values): step()
        return call
    for p in (0., *shares):
        values = closed_gates(config, p)
        with torch.no_grad(), fix_gates(network, values), record_gates(network) as seen: network(x)
        calls[f"{p:g}"] = held(values)
        cost = realised_cost(table, gates_by_edge(config.space, seen)).mean().item()
        metrics[f"{p:g}: multiply-adds left"] = cost / table.full
    times = in_turns(calls, config)
    for p in shares:
        metrics[f"{p:g}: times faster"] = ratio(times, "0", f"{p:g}")
        metrics[f"{p:g}: at most"] = 1 / metrics[f"{p:g}: multiply-adds left"]
    return metrics, times

def fitted_line(work: list, seconds: list) -> dict: # slope, intercept, r2
    "The least-squares line of seconds over work."
    x, y = torch.tensor([work, seconds], dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean())**2).sum()
    left = y - y.mean() - slope * (x - x.mean())
    return {"slope": slope.item(), "intercept": (y.mean() - slope * x.mean()).item(),
            "r2": 1 - (left.square().sum() / (y - y.mean()).square().sum()).item()}

def scaling_part(config: SpeedConfig, images: tuple = (1, 2, 4, 8), layers: tuple = (4, 8, 16, 24),
                 sides: tuple = (192, 384, 576, 768)) -> tuple[dict, dict]:
    "Lines of a step's seconds over images, pixels and layers: a line if only the work takes time."
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

# ---- Memory: how far a step raises what is in use, and which batches fit

WAYS = ("plain, keeping all", "plain", "ours", "recompute") # to take a step, with the same loss

class Results(TorchFunctionMode):
    "Within the block every tensor that an operation returns is kept."
    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.kept.append(result := function(*args, **(kwargs or {})))
        return result

def step_in_way(name: str, config: SpeedConfig): # a function that takes a step
    """The step in one of `WAYS`: `plain, keeping all` holds every intermediate result until the
    gradient is done, `recompute` computes a cell again when its gradient is due."""
    network = (plain_supernet if "plain" in name
               else build_supernet)(config.space)
    network.recompute = name == "recompute"
    step = make_step(network, config, last="plain" not in name)
    if name != "plain, keeping all": return step
    def keeping():
        with Results(): return step()
    return keeping

def peak_bytes(name: str, config: SpeedConfig) -> int: # run in a process of its own
    """How far the second of two steps raises the memory in use over what it was before the first,
    by the allocator of a GPU or by Linux."""
    step = step_in_way(name, config)
    if config.device != "cpu":
        before = torch.cuda.memory_allocated()
        step(); step()
        return torch.cuda.max_memory_allocated() - before
    def by_system(what): # bytes
        line = next(line for line in open("/proc/self/status") if line.startswith(what))
        return 1024 * int(line.split()[1])
    Path("/proc/self/clear_refs").write_text("5") # the peak begins anew
    before = by_system("VmRSS")
    step(); step()
    return by_system("VmHWM") - before

def peak_alone(name: str, config: SpeedConfig) -> int:
    "`peak_bytes` in a process of its own, whose allocator holds nothing of an earlier step."
    parameters = json.dumps(dataclasses.asdict(config))
    code = (f"import json, sys; sys.path.insert(0, {str(HERE)!r}); "
            "from benchmarks import SpeedConfig, peak_bytes; "
            f"print(peak_bytes({name!r}, SpeedConfig(**json.loads({parameters!r}))))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{name}: {done.stderr}")
    return int(done.stdout.split()[-1])

def computed_bytes(config: SpeedConfig, images: int, recompute: bool) -> float:
    "The least bytes of a step with labels alone, by `full_size.step_memory`."
    labels_alone = SearchConfig(batch_labelled=images, w_jig=0., w_semi=0.,
                                precision=config.precision, recompute=recompute)
    return step_memory(labels_alone, config.space, config.size)

def memory_part(config: SpeedConfig) -> tuple[dict, dict]:
    """Peaks of the ways to take a step, as shares of the plain one's; the seconds of `recompute`;
    bytes an image, measured and computed."""
    if config.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise ValueError("the peak of a process is read from /proc, which Linux has: take a GPU")
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
                    # usable: the share that the allocator does not lose
                    size: tuple = (768, 768), usable: float = .9) -> dict: # name -> images
    """How many labelled, unlabelled and jigsaw images each a step of the search can have on views
    of that size, computed: precision, and with or without `recompute`."""
    def fits(n, precision, recompute, memory):
        search = SearchConfig(batch_labelled=n, batch_unlabelled=n, batch_jigsaw=n,
                              optimiser="sgd", precision=precision, recompute=recompute)
        return step_memory(search, config.space, size) <= usable * 1e9 * memory
    return {f"{memory} GB, {precision}{', recompute' * recompute}":
            next(n for n in range(1000) if not fits(n + 1, precision, recompute, memory))
            for memory in memories for precision in ("no", "bf16") for recompute in (False, True)}

# ---- The terms of a search step, and what is beside them

class SearchStep:
    "One search step as `train` takes it, on one batch, and its parts; all edges stay open."
    def __init__(self, config: SpeedConfig, data, folder: str, **changes): # of SearchConfig
        from accelerate import Accelerator
        n = config.images
        self.config = c = SearchConfig(
            folder=folder, size=config.size, layers=config.layers, channels=config.channels,
            batch_labelled=n, batch_unlabelled=n, batch_jigsaw=n, ramp=(0., 0.), threshold=0.,
            cost_ramp=(0., 0.), binary_ramp=(0., 0.), budget=1., budget_gain=0., **changes)
        self.accelerator = Accelerator(mixed_precision=c.precision, cpu=config.device == "cpu")
        space = dataclasses.replace(config.space, num_classes=data.train.spec.num_classes)
        self.table = view_table(space, config.size, c.gate)
        network = build_supernet(space, gate=c.gate)
        self.cost = BudgetLosses(network, self.table, c) if c.w_cost else None
        self.parts = build_training_parts(network, c, self.accelerator)
        self.parts["multitask"].train()
        self.network, self.optimiser = self.accelerator.prepare(self.parts["multitask"],
                                                                self.parts["optimiser"])
        self.permutations = permutation_set(c.jigsaw_n, c.jigsaw_permutations)
        self.views = make_batches(dataclasses.replace(c, steps=10**6), data)
        self.batches = {name: to_device(b, self.accelerator.device)
                        for name, b in next(self.views).items()}

    def __call__(self):
        weights, before = step_weights(self.config, 1., self.cost), forward_state(self.parts)
        charge = self.cost and (lambda gates: self.cost(gates, 1.))
        with self.accelerator.autocast():
            losses, metrics = objective(self.network, self.parts["multitask"],
                                        self.parts["teacher"],
                                       self.batches, weights, self.config, self.permutations,
                                       seed_step(0, 0), charge)
        loss = sum(weights[name] * term for name, term in losses.items())
        take_step(loss, self.accelerator, self.parts, self.optimiser, lambda name: True,
                  self.config, 1, before)

def terms_part(config: SpeedConfig) -> tuple[dict, dict]:
    """The step with all terms against one with labels alone, by seconds and by multiply-adds, and
    the shares of views, gates (against static ones), budget and teacher in it."""
    with tempfile.TemporaryDirectory() as folder:
        data = load_training_data(SearchConfig(folder=folder, size=config.size))
        alone = dict(w_jig=0., w_semi=0., w_cost=0., w_binary=0.)
        kinds = {"all terms": {}, "labels alone": alone, "static gates": dict(gate="static")}
        steps = {name: SearchStep(config, data, folder, precision=config.precision, **changes)
                 for name, changes in kinds.items()}
        whole = steps["all terms"]
        with torch.no_grad(), record_gates(whole.parts["multitask"].model) as gates:
            whole.parts["multitask"].model(torch.cat([whole.batches["labelled"]["image"],
                                                    whole.batches["unlabelled"]["weak"]]))
        gates = {name: g.detach().requires_grad_() for name, g in gates.items()}
        calls = {**steps, "views": lambda: next(whole.views),
                 "budget": lambda: sum(whole.cost(gates, 1.)[0].values()).backward(),
                 "teacher": lambda: whole.parts["teacher"].update(whole.parts["multitask"], 1)}
        times = in_turns(calls, config)
    times["gates"] = [a - b for a, b in zip(times["all terms"], times["static gates"])]
    flops = {name: step_flops(step.config, step.table) for name, step in steps.items()}
    more = flops["all terms"] / flops["labels alone"]
    beside = {name: ratio(times, name, "all terms") for name in ("views", "gates", "budget",
                                                                 "teacher")}
    return {"times as long": ratio(times, "all terms", "labels alone"),
            "times the multiply-adds": more,
            "time over multiply-adds": ratio(times, "all terms", "labels alone") / more,
            **{f"{name}: share of the step": share for name, share in beside.items()},
            "beside the terms": sum(beside.values())}, times

# ---- The discovered network, derivation, evaluation

def network_part(config: SpeedConfig, runtimes: tuple = ("torch", "onnx")) -> tuple[dict, dict]:
    """Multiply-adds and milliseconds of the discovered network and of its rival, one image at a
    time, batch norm folded, in PyTorch (channels last) and in ONNX Runtime."""
    ours = load(config.network).eval()
    pair = {"ours": ours, "rival": build_baseline(config.rival, ours.space.num_classes).eval()}
    flops = {name: count_cost(network, config.network_size).flops for name, network in pair.items()}
    x = torch.randn(1, 3, *config.network_size, generator=torch.Generator().manual_seed(0))
    metrics = {**{f"{name}: multiply-adds": n for name, n in flops.items()},
               "multiply-adds, rival over ours": flops["rival"] / flops["ours"]}
    calls, times = {"torch": {}, "onnx": {}}, {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        image = x.to(config.device).contiguous(memory_format=torch.channels_last)
        for name, network in pair.items():
            folded = fold_batch_norm(network).to(config.device, memory_format=torch.channels_last)
            calls["torch"][name] = lambda network=folded: network(image)
            if "onnx" not in runtimes or config.device != "cpu": continue # it is the processor's
            path = export_onnx(network, config.network_size, f"{folder}/{name}.onnx")
            calls["onnx"][name] = lambda run=load_onnx(path): run(x)
            metrics[f"{name}: gap of the exported"] = max_relative_difference(network, load_onnx(path),
                                                                  config.network_size)
        for runtime, both in calls.items(): # apart: threads that wait for more would be in the way
            seconds = in_turns(both, config)
            times |= {f"{name}, {runtime}": s for name, s in seconds.items()}
            if not both: continue
            gain = metrics[f"{runtime}: times faster"] = ratio(seconds, "rival", "ours")
            metrics[f"{runtime}: of the gain in multiply-adds"] = (gain * flops["ours"]
                                                                   / flops["rival"])
    return metrics, times

def derive_part(config: SpeedConfig, count: int = 50, checked: int = 3) -> tuple[dict, dict]:
    """Seconds to derive architectures and to count them by the cost table; how many of some are
    counted alike by fvcore on the static network."""
    table = measure_costs(config.space, config.size)
    def cost(kept): return static_cost(table, kept)
    least, most = cost(()), cost(config.space.gated())
    def derived(k):
        budget = least + (most - least) * (k + 1) / count
        return random_architecture(config.space, cost, budget, seed=k, tolerance=.2)
    architectures = [derived(k) for k in range(count)]
    some = architectures[::max(1, count // checked)][:checked]
    def built(): return [count_cost(StaticNetwork(a), config.size).flops for a in some]
    calls = {"derive": lambda: [derived(k) for k in range(count)],
             "count": lambda: [cost(a.selected) for a in architectures],
             "build, count by fvcore": built}
    equal = sum(cost(a.selected) == flops for a, flops in zip(some, built()))
    times = in_turns(calls, dataclasses.replace(config, rounds=max(1, config.rounds // 2)))
    by_fvcore = median(times["build, count by fvcore"]) * count / len(some)
    return {"architectures": count, "seconds to derive them": median(times["derive"]),
            "seconds to count them": median(times["count"]),
            "times faster than to build and count by fvcore": by_fvcore / median(times["count"]),
            f"of {len(some)} counted as by fvcore": equal}, times

def evaluate_part(config: SpeedConfig, size: tuple = (512, 1024)) -> tuple[dict, dict]:
    "From logits to a confusion matrix: the textbook's seconds over ours."
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
    if not torch.equal(ours(), textbook()): raise ValueError("two ways to count, two results")
    times = in_turns({"ours": ours, "textbook": textbook}, config)
    return {"textbook: times ours": ratio(times, "textbook", "ours")}, times

# ---- All parts, and the command

PARTS = {"step": step_part, "closed": closed_part, "terms": terms_part, "memory": memory_part,
         "scaling": scaling_part, "network": network_part, "derive": derive_part,
         "evaluate": evaluate_part}
OF_SEARCHES = {"removal": time_terms, "loader": time_loader} # short searches, by SearchConfig

def run_parts(config: SpeedConfig, parts=tuple(PARTS)) -> dict: # part -> RunRecord
    """Measure the parts in turn, with a record of each as it is done, PART/speed-record.json;
    ValueError for an unknown part, or a record that was made with other parameters."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"there is no part {unknown[0]!r}; known: {', '.join(PARTS)}")
    keep_freed_memory()
    records = {}
    for part in parts:
        folder = Path(config.folder)/part
        path, asked = folder/"speed-record.json", json.loads(json.dumps(dataclasses.asdict(config)))
        if path.exists():
            recorded = RunRecord.load(path).parameters
            for name in (k for k in asked if k != "folder" and recorded.get(k) != asked[k]):
                raise ValueError(f"{path} was made with {name} = {recorded.get(name)!r}, and "
                                 f"{asked[name]!r} is asked for: take another folder")
        else:
            torch.manual_seed(0)
            start = time.perf_counter()
            metrics, times = PARTS[part](config)
            RunRecord("speed", part, dataclasses.asdict(config), 0, metrics,
                      {**{name: median(seconds) for name, seconds in times.items()},
                       "whole part": time.perf_counter() - start}).save(folder)
            print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
        records[part] = RunRecord.load(folder/"speed-record.json")
        print(json.dumps(records[part].metrics, indent=1), flush=True)
    return records

def main(argv=None) -> int: # exit status
    "Measure parts of the benchmark, or short searches (removal, loader); without names all parts."
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("parts", metavar="PART", nargs="*", help=", ".join([*PARTS, *OF_SEARCHES]))
    for f in dataclasses.fields(SpeedConfig):
        shape = (dict(nargs=2, type=int) if isinstance(f.default, tuple)
                 else dict(type=type(f.default)))
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS,
                            help=f"of the parts; default: {f.default}", **shape)
    parser.add_argument("-p", nargs=2, action="append", default=[], dest="pairs",
                        metavar=("NAME", "VALUE"), help="a parameter of removal and loader, see "
                        "selfsupnas search --parameters")
    words = vars(parser.parse_args(argv))
    parts, pairs, options = words.pop("parts"), words.pop("pairs"), words
    try:
        if [part for part in parts if part in OF_SEARCHES]:
            if len(parts) > 1 or options:
                parser.error("removal and loader are measured alone, with parameters by -p")
            config = from_parameters(SearchConfig, parse_parameters(SearchConfig, pairs))
            print(parts[0], OF_SEARCHES[parts[0]](config).timings)
        elif pairs: parser.error("-p is for removal and loader")
        else:
            options = {name: tuple(value) if isinstance(value, list) else value
                       for name, value in options.items()}
            run_parts(SpeedConfig(**options), parts or tuple(PARTS))
    except (ValueError, TypeError, OSError) as e: parser.error(str(e))
    return 0

if __name__ == "__main__": sys.exit(main())
