"""Parts of `benchmarks.py` for a GPU, which also run on a processor: launches and waits, the
roofline, shares of a step, networks by size and batch, input, the full size."""
import dataclasses, os, tempfile, time, warnings
from collections import Counter
from functools import partial
from itertools import pairwise

import torch
from torch.profiler import ProfilerActivity, profile

from full_size import step_memory
from timed_steps import (compile_network, computed_bytes, count_operators, free_memory, in_turns,
                         labelled_steps, make_step, matrix_product, median, ratio, reason,
                         retraining_step, RETRAININGS, runnable, SearchStep, SpeedConfig,
                         supernet_in)
from selfsupnas.export import fold_batch_norm
from selfsupnas.rivals import build_baseline
from selfsupnas.space.cost import count_cost
from selfsupnas.space.supernet import build_supernet
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.train.batches import load_training_data, make_batches
from selfsupnas.zoo import load

# ---- Launches of kernels, waits for the GPU

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

# ---- Shares of a step

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
