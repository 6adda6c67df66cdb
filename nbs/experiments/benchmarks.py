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
import argparse, dataclasses, gc, json, os, subprocess, sys, tempfile, time, timeit
import traceback, warnings
from collections import Counter
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer

from full_size import step_flops, step_memory, view_table
from selfsupnas.core import (Pair, RunRecord, checked_dataclass, from_texts, keep_freed_memory,
                             versions)
from selfsupnas.export import export_onnx, fold_batch_norm, max_relative_difference, load_onnx
from selfsupnas.metrics import check_logits, confusion_matrix
from selfsupnas.rivals import build_baseline, random_architecture
from selfsupnas.space.budget import measure_costs, realised_cost, static_cost
from selfsupnas.space.cell import GatedCell, SparseFeatures, scale_features
from selfsupnas.space.cost import count_cost
from selfsupnas.space.gate import fix_gates, record_gates
from selfsupnas.space.grid import SearchSpace
from selfsupnas.space.network import StaticNetwork
from selfsupnas.space.supernet import RoutingNetwork, build_supernet, gate_name, gates_by_edge
from selfsupnas.stages.searching import BudgetLosses
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.calibration import make_table
from selfsupnas.stages.retraining import RetrainConfig
from selfsupnas.tasks.losses import pixel_cross_entropy
from selfsupnas.train.batches import (LabelledBatch, StepBatch, TrainingData, UnlabelledBatch,
                                      load_training_data, make_batches)
from selfsupnas.train.config import TrainingConfig
from selfsupnas.train.loop import (build_training_state, forward_state, make_optimiser, seed_step,
                                   take_step, train)
from selfsupnas.train.step import LossWeights, step_weights
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

# ---- Speed: calls timed in turns, relative to a large matrix product

@checked_dataclass
class SpeedConfig:
    "Parameters of the parts of the benchmark."
    folder: str = "runs/speed" # of the records
    device: str = "cpu" # or cuda
    precision: Literal["no", "bf16", "fp16"] = "no" # autocast, if the device has it
    layers: PositiveInt = 16 # of the grid
    channels: int = 64 # C0 of the grid
    num_classes: Annotated[int, Field(ge=2)] = 19 # of Cityscapes
    images: Annotated[int, Field(ge=2)] = 4 # per term and step; published: 8 of size 768 768
    size: Pair[int] = (256, 256) # (height, width) of a view
    rounds: PositiveInt = 7 # timed turns of each call, after one warm-up turn
    turn: float = 0.2 # seconds of a turn: shorter calls are repeated
    network: str = "camvid-eighth" # derived network, see selfsupnas.zoo
    rival: str = "deeplabv3_resnet50" # hand-crafted network for comparison
    network_size: Pair[int] = (360, 480) # (height, width) of an image for both

    def __post_init__(self):
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}, but there is no GPU")

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
             config: SpeedConfig) -> dict:
    """Seconds of each round by name. The calls are timed in turns after a warm-up; short calls are
    repeated, and a GPU is synchronised."""
    # torch's `Timer` would add a call or two to each turn; `timeit` alone disables the collector
    def seconds(call, repeats):
        return timeit.timeit(call, "import gc; gc.enable()", timer, repeats) / repeats
    once = {name: seconds(call, 1) for name, call in calls.items()}
    repeats = {name: max(1, min(20, int(config.turn / s))) for name, s in once.items()}
    turns = [{name: seconds(call, repeats[name]) for name, call in calls.items()}
             for _ in range(config.rounds)]
    return {name: [turn[name] for turn in turns] for name in calls}

def median(values) -> float: return sorted(values)[len(values) // 2]

def ratio(times: dict, one: str, other: str) -> float:
    "Median over the rounds of the seconds of one call divided by those of the other."
    return median([a / b for a, b in zip(times[one], times[other])])

def matrix_product(config: SpeedConfig, n: int = 2048) -> tuple:
    "The product of two n x n matrices as a call, and its number of floating point operations."
    a, b = torch.randn(2, n, n, device=config.device, dtype=config.dtype)
    return lambda: a @ b, 2 * n**3

def reason(error: Exception) -> str:
    "The type of an error and the first line of its message."
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])

def free_memory(config: SpeedConfig):
    "Return the memory of objects that are no longer used to the device."
    gc.collect()
    if config.device != "cpu": torch.cuda.empty_cache()

def runnable(makers: dict, # name -> function that returns a call
             config: SpeedConfig, metrics: dict) -> dict:
    """Makes each call and runs it once. Returns those that run; for the others `metrics` says why
    not: out of memory, a library or a compiler that is missing."""
    def tried(make):
        call = make()
        call()
        return call
    calls = {}
    for name, make in makers.items():
        try: calls[name] = tried(make)
        except Exception as e: metrics[f"{name}: skipped"] = reason(e)
        free_memory(config)
    return calls

class PlainCell(GatedCell):
    "A textbook gated cell: each edge is computed, resized, then multiplied by its gate."
    def forward(self, sparse: SparseFeatures, finer_size=None, draws=None) -> dict:
        gates, output = self.gate(*sparse), self.apply_operations(sparse.features, draws)
        return {kind: SparseFeatures(scale_features(self.edge_output(kind, output, finer_size), g))
                for kind, g in zip(self.kinds, gates.unbind(1))}

def plain_supernet(space: SearchSpace) -> RoutingNetwork:
    "The supernet of plain cells, without skipped edges and in-place operations."
    network = RoutingNetwork(space, {cell: PlainCell(space.channels_at(cell[1]), space.operations,
                                                     space.kinds_at(*cell))
                                     for cell in space.cells()})
    for module in network.modules():
        if isinstance(module, nn.ReLU): module.inplace = False
    return network

def supernet_in(execution: str, config: SpeedConfig) -> RoutingNetwork:
    "A supernet in an execution: grouped or masked."
    network = build_supernet(config.space)
    network.execution = execution
    return network

def compile_network(network: RoutingNetwork) -> nn.Module:
    "The network compiled by regions; raises ImportError if this version cannot."
    from selfsupnas.space.compiled import compile_regions
    return compile_regions(network) or network

def make_step(network: nn.Module, config: SpeedConfig, images: int | None = None,
              size: tuple | None = None, last: bool = True, # last: channels last in memory
              optimiser=lambda network: make_optimiser(network, SearchConfig())):
    """Returns a function that takes one training step on random labelled images: forward, pixel
    cross-entropy, backward, optimiser."""
    draw = torch.Generator().manual_seed(0)
    shape = images or config.images, *(size or config.size)
    layout = torch.channels_last if last else torch.contiguous_format
    network = network.to(config.device, memory_format=layout).train()
    x = torch.randn(shape[0], 3, *shape[1:], generator=draw).to(config.device, memory_format=layout)
    y = torch.randint(config.num_classes, shape, generator=draw).to(config.device)
    optim = optimiser(network)
    def step():
        with config.autocast(): loss = pixel_cross_entropy(network(x), y)
        loss.backward()
        optim.step()
        optim.zero_grad(set_to_none=True)
        return loss.detach()
    return step

def labelled_step(execution: str, config: SpeedConfig):
    "The step of a supernet in an execution."
    return make_step(supernet_in(execution, config), config)

def textbook_step(config: SpeedConfig, last: bool = False, **options): # of make_step
    "The step of the plain supernet in PyTorch's default layout, with PyTorch's default AdamW."
    def adamw(network): return torch.optim.AdamW(network.parameters(), lr=1e-3)
    return make_step(plain_supernet(config.space), config, last=last,
                     **{"optimiser": adamw, **options})

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

def computed_bytes(config: SpeedConfig, images: int, recompute: bool) -> float:
    "Lower bound of the bytes of a step with only labels, by `full_size.step_memory`."
    only_labels = SearchConfig(batch_labelled=images, w_jig=0., w_semi=0.,
                               precision=config.precision, recompute=recompute)
    return step_memory(only_labels, config.space, config.size)

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

class TrainingStep:
    "One step as in `train`, on one batch."
    def __init__(self, network: nn.Module, config: TrainingConfig, device: str,
                 batch: StepBatch, # on the device
                 data: TrainingData | None = None, # None: nothing that a loss computes once
                 execution: str | None = None, # of a supernet; None: as it is
                 cost=None): # see `train`
        from accelerate import Accelerator, state
        state.AcceleratorState._reset_state() # an earlier step may have had another precision
        accelerator = Accelerator(mixed_precision=config.precision, cpu=device == "cpu")
        self.state = build_training_state(network, config, data, accelerator, cost)
        for module in (*self.state.multitask.modules(), *self.state.teacher.model.modules()):
            if execution and isinstance(module, RoutingNetwork): module.execution = execution
        self.state.multitask.train()
        self.batch = batch

    def __call__(self):
        weights = step_weights(self.state.config, 1., self.state.objective.cost)
        before = forward_state(self.state)
        with self.state.accelerator.autocast():
            losses, _ = self.state.objective(self.batch, weights, seed_step(0, 0))
        take_step(losses.total(weights), self.state, 1, lambda name: True, before)

class SearchStep(TrainingStep):
    "One step of a search with views of drawn scenes; all edges stay open."
    def __init__(self, config: SpeedConfig, data, folder: str, execution: str = "grouped",
                 **changes): # of SearchConfig
        n = config.images
        self.config = c = SearchConfig(
            folder=folder, size=config.size, layers=config.layers, channels=config.channels,
            batch_labelled=n, batch_unlabelled=n, batch_jigsaw=n, ramp=(0., 0.), threshold=0.,
            cost_ramp=(0., 0.), binary_ramp=(0., 0.), budget=1., budget_gain=0.,
            **{"precision": config.precision, **changes})
        space = dataclasses.replace(config.space, num_classes=data.train.spec.num_classes)
        self.table = view_table(space, config.size, c.gate)
        network = build_supernet(space, gate=c.gate)
        self.cost = BudgetLosses(network, self.table, c) if c.w_cost else None
        self.views = make_batches(dataclasses.replace(c, steps=10**6), data,
                                  device=config.device)
        super().__init__(network, c, config.device, next(self.views).to(config.device), data,
                         execution, self.cost)

def drawn_batch(config: TrainingConfig, # with the numbers of images
                size: tuple, num_classes: int, device: str) -> StepBatch:
    "Views without any content, and labels of every class."
    draw = torch.Generator().manual_seed(0)
    def views(n):
        return torch.randn(n, 3, *size, generator=draw).to(device,
                                                           memory_format=torch.channels_last)
    def labels(n): return torch.randint(num_classes, (n, *size), generator=draw).to(device)
    n, m = config.batch_labelled, config.batch_unlabelled
    unlabelled = UnlabelledBatch(views(m), torch.ones(m, *size, dtype=torch.bool, device=device),
                                 labels(m), views(m))
    return StepBatch(LabelledBatch(views(n), labels(n), views(n)), unlabelled,
                     views(config.batch_jigsaw))

# losses of a retraining
RETRAININGS = {"labels": dict(w_jig=0., w_semi=0.), "three terms": {},
               "four terms": dict(w_strong=1.)} # also on strong views of labelled images

def retraining_step(terms: str, config: SpeedConfig, size: tuple, # (H,W) of a view
                    images: int, # of each kind
                    prepare=lambda network: network) -> TrainingStep: # before its state is built
    "The step of a retraining of the derived network, from new weights, with some RETRAININGS."
    network = StaticNetwork(load(config.network).architecture.unweighted())
    c = RetrainConfig(batch_labelled=images, batch_unlabelled=images, batch_jigsaw=images,
                      ramp=(0., 0.), threshold=0., precision=config.precision,
                      **RETRAININGS[terms])
    return TrainingStep(prepare(network.to(config.device)), c, config.device,
                        drawn_batch(c, size, network.space.num_classes, config.device))

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

# ---- Calls of operators, launches of kernels, waits for the GPU

class Operators(TorchDispatchMode):
    """`with Operators() as noted: step()` counts the calls of ATen operators and the bytes of the
    tensors that they read and write, without views. A mask as an index also counts as `nonzero`."""
    def __init__(self):
        super().__init__()
        self.calls, self.views, self.bytes = Counter(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in function._schema.returns if r.alias_info]
        if any(not alias.is_write for alias in aliases): self.views += 1
        else:
            self.calls[str(function)] += 1
            if str(function).startswith("aten.index") and any(
                    getattr(i, "dtype", None) is torch.bool for i in tree_leaves(args[1])):
                self.calls["aten.nonzero.default"] += 1
            tensors = [t for t in tree_leaves((args, kwargs, result))
                       if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in tensors)
        return result

def count_operators(step) -> Operators:
    "What one step calls; not the first one, which sets up the optimiser."
    with Operators() as noted: step()
    return noted

def labelled_steps(config: SpeedConfig) -> dict:
    "Makers of the step on labelled images: the textbook's, and those of both executions."
    return {"plain": lambda: textbook_step(config),
            "plain, channels last": lambda: textbook_step(config, last=True),
            **{execution: partial(labelled_step, execution, config)
               for execution in ("grouped", "masked")}}

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

def profiled(step, device: str) -> Counter:
    "Names of the events of one step in torch's profiler."
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device != "cpu")]
    with profile(activities=activities) as events:
        step()
        if device != "cpu": torch.cuda.synchronize()
    return Counter(event.name for event in events.events())

def count_launches(step, device: str) -> int:
    """Kernels that one step launches; on a processor, the operators that it calls. RuntimeError if
    the profiler sees no launch."""
    if device == "cpu": return count_operators(step).calls.total()
    launches = sum(n for name, n in profiled(step, device).items() if "LaunchKernel" in name)
    if not launches: raise RuntimeError("the profiler saw no launch: is CUPTI missing or locked?")
    return launches

READ_BACK = "aten._local_scalar_dense.default", "aten.nonzero.default" # they need values

def count_waits(step, device: str) -> int:
    """How often one step waits for the GPU, by the warnings of torch's debug mode; on a processor,
    the operators that would wait."""
    if device == "cpu":
        calls = count_operators(step).calls
        return sum(calls[name] for name in READ_BACK)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally: torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in found)

def launches_part(config: SpeedConfig, size: tuple = (128, 160), # (H,W) of a view, and the
                  images: int = 8) -> tuple[dict, dict]: # number of each kind, of a retraining
    """Launches and waits of one step: on labelled images, of a search with all terms, and of a
    retraining. They do not depend on the number of images with all edges open."""
    metrics, config = {}, dataclasses.replace(config, images=2)
    with tempfile.TemporaryDirectory() as folder:
        data = load_training_data(SearchConfig(folder=folder, size=config.size))
        makers = {**labelled_steps(config),
                  **{f"search, {execution}": partial(SearchStep, config, data, folder, execution)
                     for execution in ("grouped", "masked")},
                  **{f"retraining, {terms}": partial(retraining_step, terms, config, size, images)
                     for terms in RETRAININGS}}
        for name, make in makers.items():
            for step in runnable({name: make}, config, metrics).values():
                for kind, count in (("launches", count_launches), ("waits", count_waits)):
                    try: metrics[f"{name}: {kind}"] = count(step, config.device)
                    except RuntimeError as e: metrics[f"{name}, {kind}: skipped"] = reason(e)
                del step # before the next is made
            free_memory(config)
    return metrics, {}

# ---- The step against the limits of the device

def large_copy(config: SpeedConfig, n: int = 2**28) -> tuple: # bytes of a tensor
    "A copy of a large tensor as a call, and the bytes that it reads and writes."
    source = torch.zeros(n // 4, device=config.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes

def step_limits(config: SpeedConfig, n: int = 8192, # of the matrix product
                copied: int = 2**28) -> tuple: # bytes
    """Calls that measure the limits of the device, and a function of their times that gives the
    roofline of the step on labelled images with all edges open.

    The roofline is the longer of two times: the multiply-adds (3 passes, 2 operations each) at the
    rate of a matrix product in the same precision, and the bytes at the rate of a large copy. The
    bytes are what every implementation moves: each tensor that autograd saves, weights, gradients
    and the optimiser's state, by `full_size.step_memory`, once written and once read. In single
    precision the product has no TF32.
    """
    (product, product_flops), (copy, copy_bytes) = matrix_product(config, n), large_copy(config,
                                                                                         copied)
    flops = 6 * config.images * count_cost(build_supernet(config.space), config.size).flops
    least = 2 * computed_bytes(config, config.images, recompute=False)
    def metrics(times):
        rate = product_flops / median(times["product"])
        bandwidth = copy_bytes / median(times["copy"])
        return {"operations": flops, "bytes": least, "matrix_gflops": rate / 1e9,
                "copy_gbytes": bandwidth / 1e9,
                "roofline: ms": 1e3 * max(flops / rate, least / bandwidth),
                "roofline: limited by": ("memory" if least / bandwidth > flops / rate
                                         else "arithmetic")}
    return {"product": product, "copy": copy}, metrics

def roofline_part(config: SpeedConfig, **limits) -> tuple[dict, dict]: # see `step_limits`
    """The step in both executions relative to the textbook's and to its roofline. `bytes of its
    operators` are those of the tensors that each operator of the implementation reads and
    writes."""
    (calls, roofline), skipped = step_limits(config, **limits), {}
    steps = runnable(labelled_steps(config), config, skipped)
    times = in_turns({**calls, **steps}, config)
    metrics = {**roofline(times), **skipped}
    for name, step in steps.items():
        ms, moved = 1e3 * median(times[name]), count_operators(step).bytes
        metrics |= {f"{name}: ms": ms, f"{name}: times the roofline": ms / metrics["roofline: ms"],
                    f"{name}: share of the matrix rate":
                    metrics["operations"] / metrics["matrix_gflops"] / 1e6 / ms,
                    f"{name}: bytes of its operators": moved,
                    f"{name}: share of the bandwidth": moved / metrics["copy_gbytes"] / 1e6 / ms}
        if "plain" in times: metrics[f"{name}: plain times ours"] = ratio(times, "plain", name)
    return metrics, times

def compiled_part(config: SpeedConfig, executions: tuple = ("masked",), size: tuple = (128, 160),
                  images: int = 8, # size, images: of the retraining
                  **limits) -> tuple[dict, dict]: # see `step_limits`
    """The same step, and one of retraining with labels, compiled by regions: relative to the
    textbook's, to eager ones and to the roofline."""
    (calls, roofline), metrics = step_limits(config, **limits), {}
    def timed(name, make):
        def made():
            start = time.perf_counter()
            step = make()
            step()
            metrics[f"{name}: seconds to compile"] = time.perf_counter() - start
            return step
        return name, made
    def supernet_step(execution):
        network = supernet_in(execution, config).to(config.device)
        return make_step(compile_network(network), config)
    retraining = partial(retraining_step, "labels", config, size, images)
    makers = {**labelled_steps(config), "retraining": retraining, **dict(
        [timed(f"{execution}, compiled", partial(supernet_step, execution))
         for execution in executions]
        + [timed("retraining, compiled", partial(retraining, compile_network))])}
    times = in_turns({**calls, **runnable(makers, config, metrics)}, config)
    metrics |= roofline(times)
    for name in list(times)[len(calls):]:
        of_search = not name.startswith("retraining")
        if of_search:
            metrics[f"{name}: times the roofline"] = (1e3 * median(times[name])
                                                      / metrics["roofline: ms"])
        for other in ("plain", "masked") if of_search else ("retraining",):
            if other in times: metrics[f"{name}: {other} times ours"] = ratio(times, other, name)
    return metrics, times

class Spans:
    """Seconds of named calls, without those of the named calls inside them; on a GPU by events on
    its stream, so that nothing waits."""
    def __init__(self, device: str): self.device, self.name, self.marks = device, "rest", []

    def mark(self, name: str):
        "What follows is `name`."
        if self.device == "cpu": now = time.perf_counter()
        else:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.name = name
        self.marks.append((now, name))

    def seconds(self) -> dict:
        "Seconds by name since the last call."
        self.mark("rest")
        if self.device != "cpu": torch.cuda.synchronize()
        total = Counter()
        for (start, name), (end, _) in pairwise(self.marks):
            total[name] += end - start if self.device == "cpu" else start.elapsed_time(end) / 1e3
        self.marks = []
        return dict(total)

class Watched:
    "A function or an object whose calls are a span; otherwise the object itself."
    def __init__(self, spans: Spans, name: str, watched):
        self.spans, self.name, self.watched = spans, name, watched

    def __call__(self, *args, **kwargs):
        outer = self.spans.name
        self.spans.mark(self.name)
        try: return self.watched(*args, **kwargs)
        finally: self.spans.mark(outer)

    def __getattr__(self, name): return getattr(self.watched, name)

def watch_step(step: SearchStep, spans: Spans):
    "Watch the parts of a step: forward, backward, optimiser, teacher, budget."
    state = step.state
    for name, owner, attribute in (
            ("budget", state.objective, "cost"), ("teacher", state.teacher.model.model, "forward"),
            ("teacher", state.teacher, "update"), ("forward", state, "objective"),
            ("backward", state.accelerator, "backward"), ("optimiser", state.optimiser, "step")):
        setattr(owner, attribute, Watched(spans, name, getattr(owner, attribute)))

PARTS_OF_STEP = "views", "forward", "backward", "optimiser", "teacher", "budget", "rest"

def shares_part(config: SpeedConfig) -> tuple[dict, dict]:
    """Shares of a search step with all terms by part. The views are made in the same process; rest:
    clipping, checks, copies of buffers."""
    metrics, times = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        data = load_training_data(SearchConfig(folder=folder, size=config.size))
        for execution in ("grouped", "masked"):
            step, spans = SearchStep(config, data, folder, execution), Spans(config.device)
            watch_step(step, spans)
            rows = []
            for _ in range(1 + config.rounds):
                spans.mark("views")
                step.batch = next(step.views).to(config.device)
                spans.mark("rest")
                step()
                rows.append(spans.seconds())
            for name in PARTS_OF_STEP:
                times[f"{execution}, {name}"] = [row.get(name, 0.) for row in rows[1:]]
            totals = times[f"{execution}, step"] = [sum(row.values()) for row in rows[1:]]
            for name in PARTS_OF_STEP:
                metrics[f"{execution}, {name}: share of the step"] = median(
                    [s / total for s, total in zip(times[f"{execution}, {name}"], totals)])
            del step
            free_memory(config)
    return metrics, times

# ---- Networks at several sizes and batches, input, and the full size

SHAPES = tuple((n, *size) for size in ((360, 480), (1024, 2048)) for n in (1, 8, 32))
UNET = "unet_resnet18"

def graphed(call):
    "The call as a CUDA graph, which is launched at once; only for a GPU."
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3): call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): call()
    return graph.replay

def networks_by_name(config: SpeedConfig, dtype: torch.dtype, metrics: dict) -> dict:
    "The derived network and its rivals with folded batch norm, channels last."
    ours = load(config.network).eval()
    def prepared(network):
        return fold_batch_norm(network).to(config.device, dtype, memory_format=torch.channels_last)
    networks = {"ours": prepared(ours)}
    for name, rival in (("rival", config.rival), (UNET, UNET)):
        try: networks[name] = prepared(build_baseline(rival, ours.space.num_classes).eval())
        except ImportError as e: metrics[f"{name}: skipped"] = reason(e)
    return networks

def networks_part(config: SpeedConfig, shapes: tuple = SHAPES, # (images, H, W)
                  precisions: tuple = ("fp32", "bf16"),
                  runtimes: dict | None = None, # name -> call -> faster call
                  ) -> tuple[dict, dict]:
    """Seconds of the derived network, of its rival and of a U-Net by batch, size and precision, in
    eager mode and as a CUDA graph."""
    metrics, times = {}, {}
    if runtimes is None:
        runtimes = {"eager": lambda call: call, **({"graph": graphed} if config.device != "cpu"
                                                   else {})}
    quick = dataclasses.replace(config, rounds=max(1, config.rounds // 2), turn=config.turn / 2)
    with torch.inference_mode():
        for precision in precisions:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            networks = networks_by_name(config, dtype, metrics)
            for images, *size in shapes:
                x = torch.randn(images, 3, *size).to(config.device, dtype,
                                                     memory_format=torch.channels_last)
                where = f"{images}x{size[0]}x{size[1]}, {precision}"
                for runtime, faster in runtimes.items(): # separately: graphs keep their memory
                    names = {name: f"{name}, {runtime}, {where}" for name in networks}
                    makers = {names[name]: partial(faster, partial(network, x))
                              for name, network in networks.items()}
                    times |= in_turns(runnable(makers, config, metrics), quick)
                    for other in list(names.values())[1:]:
                        if {names["ours"], other} <= times.keys():
                            metrics[f"{other}: times ours"] = ratio(times, other, names["ours"])
                    free_memory(config)
    return metrics, times

def reduce_overhead(call):
    "The network of a call compiled by torch, with CUDA graphs on a GPU."
    return partial(torch.compile(call.func, mode="reduce-overhead", dynamic=False), *call.args)

def compiled_networks_part(config: SpeedConfig, shapes: tuple = ((1, 360, 480),),
                           compiler=reduce_overhead) -> tuple[dict, dict]:
    "The same networks compiled; one shape and precision, because each takes a minute to compile."
    return networks_part(config, shapes, ("bf16",) if config.device != "cpu" else ("fp32",),
                         {"eager": lambda call: call, "compiled": compiler})

def input_part(config: SpeedConfig, sizes: tuple = ((128, 160), (768, 768)), # (H,W) of a view
               workers: tuple = (0, 8), seconds: float = 3.) -> tuple[dict, dict]:
    """Images a second of the input pipeline: labelled, unlabelled (a weak and a strong view each)
    and jigsaw images of drawn scenes, on the device, normalised."""
    metrics, n = {}, config.images
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            for count in sorted({min(k, cores) for k in workers}):
                c = SearchConfig(folder=folder, size=size, workers=count, steps=10**6,
                                 batch_labelled=n, batch_unlabelled=n, batch_jigsaw=n)
                batches, taken = make_batches(c, load_training_data(c), device=config.device), 0
                for _ in range(2 * count + 1): next(batches).to(config.device) # fills the queues
                start = time.perf_counter()
                while taken < 3 or time.perf_counter() - start < seconds:
                    next(batches).to(config.device)
                    taken += 1
                if config.device != "cpu": torch.cuda.synchronize()
                rate = 3 * n * taken / (time.perf_counter() - start)
                metrics[f"{size[0]}x{size[1]}, {count} workers: images a second"] = rate
                batches.close()
    return metrics, {}

def full_size_part(config: SpeedConfig, layers: int = 16, channels: int = 64,
                   size: tuple = (768, 768), # (H,W) of a view
                   images: tuple = (8, 6, 4, 3, 2)) -> tuple[dict, dict]:
    """Seconds and peak memory of one full-size search step with all terms, for the largest of these
    numbers of images, labelled, unlabelled and jigsaw each, that fits."""
    metrics, times = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        data = load_training_data(SearchConfig(folder=folder, size=size))
        for execution in ("masked", "grouped"):
            for n in images:
                full = dataclasses.replace(config, layers=layers, channels=channels, size=size,
                                           images=n, rounds=min(3, config.rounds))
                if config.device != "cpu": torch.cuda.reset_peak_memory_stats()
                make = {execution: partial(SearchStep, full, data, folder, execution)}
                if not (steps := runnable(make, full, metrics)): continue
                metrics.pop(f"{execution}: skipped", None)
                times |= in_turns(steps, full)
                metrics[f"{execution}: images"] = n
                metrics[f"{execution}: peak bytes"] = (
                    None if config.device == "cpu" else torch.cuda.max_memory_allocated())
                metrics[f"{execution}: computed bytes"] = step_memory(
                    steps[execution].config, full.space, size)
                del steps
                free_memory(config)
                break
    return metrics, times

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
