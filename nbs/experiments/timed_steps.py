"What the benchmarks time, and how: the clock, networks, the steps of searches and trainings."
import dataclasses, gc, timeit
from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer

from full_size import step_memory, view_table
from selfsupnas.core import Pair, checked_dataclass
from selfsupnas.space.cell import GatedCell, SparseFeatures, scale_features
from selfsupnas.space.grid import SearchSpace
from selfsupnas.space.network import StaticNetwork
from selfsupnas.space.supernet import RoutingNetwork, build_supernet
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.retraining import RetrainConfig
from selfsupnas.stages.searching import BudgetLosses
from selfsupnas.tasks.losses import pixel_cross_entropy
from selfsupnas.train.batches import (LabelledBatch, StepBatch, TrainingData, UnlabelledBatch,
                                      make_batches)
from selfsupnas.train.config import TrainingConfig
from selfsupnas.train.loop import (build_training_state, forward_state, make_optimiser, seed_step,
                                   take_step)
from selfsupnas.train.step import step_weights
from selfsupnas.zoo import load

# ---- Calls timed in turns, relative to a large matrix product

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

# ---- Networks and their steps

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

def labelled_steps(config: SpeedConfig) -> dict:
    "Makers of the step on labelled images: the textbook's, and those of both executions."
    return {"plain": lambda: textbook_step(config),
            "plain, channels last": lambda: textbook_step(config, last=True),
            **{execution: partial(labelled_step, execution, config)
               for execution in ("grouped", "masked")}}

# ---- Steps of the training loop

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
RETRAININGS = {"labels": dict(w_jig=0., w_semi=0.), "three terms": dict(w_jig=.1, w_semi=1.),
               # also on strong views of labelled images
               "four terms": dict(w_jig=.1, w_semi=1., w_strong=1.)}

def retraining_step(terms: str, config: SpeedConfig, size: tuple, # (H,W) of a view
                    images: int, # of each kind
                    prepare=lambda network: network) -> TrainingStep: # before its state is built
    "The step of a retraining of the derived network, from new weights, with some RETRAININGS."
    network = StaticNetwork(load(config.network).architecture.unweighted())
    c = RetrainConfig(batch_labelled=images, batch_unlabelled=images, batch_jigsaw=images,
                      ramp=(0., 0.), threshold=0., precision=config.precision,
                      consistency="fixmatch", **RETRAININGS[terms])
    return TrainingStep(prepare(network.to(config.device)), c, config.device,
                        drawn_batch(c, size, network.space.num_classes, config.device))

# ---- Operators and bytes of a step

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

def computed_bytes(config: SpeedConfig, images: int, recompute: bool) -> float:
    "Lower bound of the bytes of a step with only labels, by `full_size.step_memory`."
    only_labels = SearchConfig(batch_labelled=images, w_jig=0., w_semi=0.,
                               precision=config.precision, recompute=recompute)
    return step_memory(only_labels, config.space, config.size)
