"""Estimates of the cost of full-size runs, and their parameter files.

    python nbs/experiments/full_size.py write # nbs/runs/recipes/*.yaml
    python nbs/experiments/full_size.py measure cityscapes-16 search --folder runs/rates

`full_size.ipynb` explains the estimates and shows them; tests/test_full_size.py compares each with
an independent one.
"""
import argparse, dataclasses, json, sys, tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from selfsupnas.core import RunRecord
from selfsupnas.data.datasets import CITYSCAPES_SPEC
from selfsupnas.data.voc import VOC_SPEC
from selfsupnas.rivals import random_architecture
from selfsupnas.space.budget import CostTable, measure_costs, static_cost
from selfsupnas.space.cell import SparseFeatures
from selfsupnas.space.grid import SearchSpace
from selfsupnas.space.network import StaticNetwork
from selfsupnas.space.supernet import RoutingNetwork, build_supernet, feature_sizes
from selfsupnas.stages.retraining import RetrainConfig
from selfsupnas.stages.searching import BudgetLosses
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.calibration import make_table
from selfsupnas.tasks.consistency import CONSISTENCY
from selfsupnas.tasks.losses import pixel_cross_entropy
from selfsupnas.train.batches import load_training_data
from selfsupnas.train.config import TrainingConfig, ramp_up
from selfsupnas.train.loop import train

HERE = Path(__file__).resolve().parent
RECIPES, RATE_RECORDS = HERE.parent/"runs"/"recipes", HERE/"records"/"rates"

# ---- Images of a step

def passes(config: TrainingConfig, semi: bool = True, # has the term a weight at this step?
           jig: bool = True, strong: bool = True) -> dict:
    """The number of images of each kind of pass in one step; `semi`, `jig` and `strong` are False
    while the weights of these terms are 0."""
    kind, semi = CONSISTENCY[config.consistency], semi and config.w_semi > 0
    views = kind.strong_views + (kind.perturbed or kind.teacher != "ema"
                                 or config.statistics == "clean")
    segmented = (config.batch_labelled * (2 if strong and config.w_strong else 1)
                 + semi * views * config.batch_unlabelled)
    return {"segmented": segmented, # labelled, strong and weak views, with gradient
            # with gradient, not classified
            "jigsaw": config.batch_jigsaw if jig and config.w_jig else 0,
            # decoded once more, with gradient
            "perturbed": config.batch_unlabelled if semi and kind.perturbed else 0,
            # through the second network, with gradient
            "peer": segmented if config.w_semi and kind.peer else 0,
            # by the averaged teacher, without gradient
            "taught": config.batch_unlabelled if semi and kind.teacher == "ema" else 0}

# ---- Multiply-adds of a step and of a run

@lru_cache
def view_table(space: SearchSpace, size: tuple, gate: str) -> CostTable: # size: (H,W) of a view
    """Multiply-adds of the parts of the grid for one image, measured on at most 4 layers because
    they do not depend on the depth."""
    shallow = dataclasses.replace(space, layers=min(space.layers, 4))
    return dataclasses.replace(measure_costs(shallow, size, gate=gate), space=space)

def step_flops(config: TrainingConfig, table: CostTable, # at the size of a view
               share: float = 1., # executed share of the grid's cost
               **active) -> float: # semi, jig, strong: see passes
    """Multiply-adds of one optimiser step: passes with gradient count three times (the first
    convolution twice, as it needs no gradient of the image), passes without gradient once."""
    n, space, (h, w) = passes(config, **active), table.space, table.size
    classifier, first = (9 * space.channels * space.num_classes * -(-h // 4) * -(-w // 4),
                         27 * space.channels * -(-h // 2) * -(-w // 2))
    entering = n["segmented"] + n["peer"] + n["jigsaw"]
    with_gradient = (entering * share * table.full - n["jigsaw"] * classifier
                     + n["perturbed"] * (sum(table.raise_from) + table.head))
    return 3 * with_gradient - entering * first + n["taught"] * share * table.full

def executed_share(config: TrainingConfig, done: float) -> float: # done: share of the steps
    """Share of the grid's cost that a search executes if its cost follows the budget; 1 if the
    executed cost is not controlled."""
    if not getattr(config, "controlled", False): return 1.
    return 1 + (config.budget - 1) * ramp_up(done, *config.cost_ramp, "linear")

def active_terms(config: TrainingConfig, done: float) -> dict: # done: share of the steps
    "Which terms have a weight, as arguments of `passes`."
    jig = config.jigsaw_ramp[0] <= done and (config.jigsaw_decay[0] == 1
                                             or done < config.jigsaw_decay[1])
    return {"semi": done >= config.ramp[0], "jig": jig, "strong": done >= config.sup_start}

def run_flops(config: TrainingConfig, table: CostTable,
              share: float = 1., # of the grid's cost: 1 for the supernet
              # does the executed cost follow the budget? False: no edge closes
              follow: bool = True) -> float:
    "Multiply-adds of all steps of a run, without validation."
    ends, total, moments = {}, 0., 1000 # the cost of a step is linear in the executed share
    for done in ((k + .5) / moments for k in range(moments)):
        active = active_terms(config, done)
        if (key := tuple(active.values())) not in ends:
            ends[key] = [step_flops(config, table, share * executed, **active)
                         for executed in (0, 1)]
        least, most = ends[key]
        total += least + (executed_share(config, done) if follow else 1.) * (most - least)
    return config.steps / moments * total

# ---- Memory of a step: the tensors that autograd saves grow with the pixels

def saved_bytes(
        forward, # function without arguments; a backward pass can start from its result
        # precision: as in TrainingConfig; both half precisions need the same
        module: nn.Module, precision: str = "no") -> int:
    """Bytes that autograd saves in `forward()`, each storage once, without parameters and buffers
    of `module`; for a network with `recompute`, also the inputs of its cells."""
    permanent = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    sizes = {}
    def add(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in permanent: sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
    def add_input(cell, args): add(args[0].features)
    hooks = [cell.register_forward_pre_hook(add_input) for cell in
             (module.cells.values() if getattr(module, "recompute", False) else ())]
    half = nullcontext() if precision == "no" else torch.autocast("cpu", torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(add, lambda tensor: tensor), half:
        result = forward()
    del result # not earlier: a freed storage could be counted twice
    for hook in hooks: hook.remove()
    return sum(sizes.values())

def trunk_bytes(model: RoutingNetwork, precision: str, side: int) -> int:
    "Bytes saved in stem, cells and decoder, for one image of side x side."
    image = torch.randn(1, 3, side, side)
    return saved_bytes(lambda: model.encode(image), model, precision)

def cell_bytes(model: RoutingNetwork, precision: str, side: int) -> int:
    """Bytes saved in one cell at stride 4, the largest, for one image of side x side; `recompute`
    needs one cell at a time."""
    cell, (size, _) = model.cells["1_0"], feature_sizes((side, side))[:2]
    features = SparseFeatures(torch.randn(1, model.space.channels, *size))
    return saved_bytes(lambda: [out.features for out in cell(features).values()], cell, precision)

def head_bytes(model: RoutingNetwork, precision: str, side: int) -> dict:
    """Bytes saved in classifier and loss (`head`), and in decoder, classifier and loss for
    perturbed features (`perturbed`); for one image of side x side."""
    image, label, size = (torch.randn(1, 3, side, side),
                          torch.zeros(1, side, side, dtype=torch.long), (side, side))
    with torch.no_grad(): by_scale = model.run_grid(image)
    by_scale = {scale: sparse._replace(features=sparse.features.requires_grad_())
               for scale, sparse in by_scale.items()}
    finest = model.decode(by_scale, size)[0].detach().requires_grad_()
    def head(features): return pixel_cross_entropy(model.classify(features, size), label)
    return {"head": saved_bytes(lambda: head(finest), model, precision),
            "perturbed": saved_bytes(lambda: head(model.decode(by_scale, size)[0]), model,
                                     precision)}

@lru_cache
def saved_lines(space: SearchSpace, gate: str, precision: str, recompute: bool = False) -> tuple:
    """Bytes per pixel of each part, constant bytes and parameters of a supernet, from images of
    96x96 and 128x128."""
    def line(measure, model): # slope and intercept
        low, high = (measure(model, precision, side) for side in (96, 128))
        return (slope := (high - low) / (128**2 - 96**2)), max(0., low - slope * 96**2)
    model, shallow = (build_supernet(s, gate=gate).train()
                      for s in (space, dataclasses.replace(space, layers=3)))
    slopes = {part: line(lambda *a: head_bytes(*a)[part], shallow)[0]
              for part in ("head", "perturbed")}
    model.recompute = recompute
    slopes["trunk"], constant = line(trunk_bytes, model)
    if recompute: slopes["trunk"] += line(cell_bytes, model)[0]
    return slopes, constant, sum(p.numel() for p in model.parameters())

def grid_pixels(size: tuple) -> float:
    """Pixels that the grid computes for a view of (H, W): H * W, or more if these are no multiples
    of 32, because features are rounded up."""
    return (sum(2**scale * h * w for scale, (h, w) in enumerate(feature_sizes(size))) * 16
            / sum(2.**-scale for scale in range(4)))

def step_memory(config: TrainingConfig, space: SearchSpace, size: tuple, # (H,W) of a view
                share: float = 1.) -> float: # of the grid's cost, of the trained network
    """Lower bound of the bytes of a training step: saved tensors, weights, gradients, state of the
    optimiser, averaged copy."""
    n, networks = passes(config), 1 + (config.w_semi > 0 and CONSISTENCY[config.consistency].peer)
    slopes, constant, parameters = saved_lines(space, getattr(config, "gate", "conditional"),
                                               config.precision, config.recompute)
    segmented = n["segmented"] + n["peer"]
    trunk = (segmented + n["jigsaw"]) * share * slopes["trunk"]
    heads = segmented * slopes["head"] + n["perturbed"] * slopes["perturbed"]
    # weights, gradients, averaged copy, and the state of the optimiser
    copies = 3 + {"sgd": 1, "adamw": 2}[config.optimiser]
    return (grid_pixels(size) * trunk + size[0] * size[1] * heads
            + networks * share * (constant + 4 * copies * parameters))

# ---- Time: multiply-adds divided by the rate of a device

def measure_rate(
        config: SearchConfig, # with size; layers may be fewer than in the run
        steps: int = 5,
        share: float = 1., # of the grid's cost; 1: the supernet; less: a random route
        ) -> tuple:
    """Train the supernet or a static network for a few steps with all terms on drawn scenes;
    returns multiply-adds per second, seconds per step (median) and multiply-adds per step.

    A GPU stays far below its peak, because every second convolution is depthwise and limited by
    memory bandwidth.
    """
    config = dataclasses.replace(config, data="streetscenes", root=None, split_folder=None,
                                 crop=None, label_fraction=1 / 10, steps=steps, logs=1,
                                 ramp=(0., 0.), cost_ramp=(0., 0.), w_cost=1e-9,
                                 budget_gain=0., w_binary=0.)
    with tempfile.TemporaryDirectory() as config.folder:
        data = load_training_data(config)
        table = make_table(config, data)
        model, cost = build_supernet(table.space, gate=config.gate), None
        if share < 1:
            def route_cost(kept): return static_cost(table, kept)
            route = random_architecture(table.space, route_cost, share * table.full, seed=0)
            model, share = StaticNetwork(route), route_cost(route.selected) / table.full
        else: cost = BudgetLosses(model, table, config)
        seconds = train(model, config, data, cost).step_ms / 1e3
    flops = step_flops(config, table, share)
    return flops / seconds, seconds, flops

# assumed multiply-adds per second of a GPU, see measure_rate
RATES = (1e12, 3e12, 1e13)

@dataclass(frozen=True)
class Estimate:
    "The estimated cost of a run."
    step: float # multiply-adds of a step with all terms and all edges open
    run: float # multiply-adds of all steps, if the executed cost follows its budget
    open: float # multiply-adds of all steps, if no edge closes
    memory: float # lower bound in bytes

    def hours(self, rate: float) -> float: # rate: multiply-adds per second
        return self.run / rate / 3600

def estimate(config: TrainingConfig, # with crop or size
             space: SearchSpace, share: float = 1., # of the grid's cost; 1: the supernet
            ) -> Estimate:
    """Multiply-adds and memory of a search, or of retraining a network of that cost; raises
    ValueError without crop and size."""
    size = config.crop or config.size
    if not size:
        raise ValueError("the size of a view is unknown: set crop=(height, width), or size")
    table = view_table(space, tuple(size), getattr(config, "gate", "conditional"))
    return Estimate(step_flops(config, table, share), run_flops(config, table, share),
                    run_flops(config, table, share, follow=False),
                    step_memory(config, space, size, share))

# ---- Recipes: parameters that differ from the defaults of a stage, with reasons

# "published": Li et al. (CVPR 2020), from scratch on Cityscapes. There is no published schedule of
# this grid for VOC: steps, learning rate, budget and all unmarked parameters are our choices.
SETS = {"cityscapes": dict(spec=CITYSCAPES_SPEC, crop=(768, 768),
                           fractions=(1 / 16, 1 / 8, 1 / 4, 1 / 2)),
        "voc_aug": dict(spec=VOC_SPEC, crop=(321, 321), fractions=(1 / 16, 1 / 8, 1 / 4))}
LAYERS, CHANNELS, BUDGET = (16, 33), 64, 0.4
SHARED = { # parameter -> value, reason
    "zoom": ((0.5, 2.0), "published"),
    "batch_labelled": (8, "published"),
    "batch_unlabelled": (8, "as many as labelled, as in UniMatch (Yang et al., CVPR 2023)"),
    "optimiser": ("sgd", "published, with momentum 0.9"),
    "lr": (0.05, "published for training from scratch"),
    "weight_decay": (1e-4, "published"),
    "clip": (5.0, "published"), "jigsaw_n": (3, "nine tiles, 72 permutations"),
    "consistency": ("fixmatch", "unimatch and cps cost more: nbs/experiments/full_size.ipynb"),
    "threshold": (0.95, "UniMatch V2, on both datasets"),
    "ema_decay": (0.996, "UniMatch V2"), "precision": ("bf16", "halves the memory; no: 32 bits"),
    "workers": (8, "enough: check with python nbs/experiments/benchmarks.py loader"),
    "logs": (200, "each with a checkpoint; the same command resumes a stopped run")}
STAGES = {
    "search": {"steps": (190_000, "published"),
               "warmup": (1000 / 190_000, "published: 1000 steps"),
               "channels": (CHANNELS, "published"),
               "budget": (BUDGET, "of the executed cost"), "w_cost": (0.8, "published"),
               "cost_ramp": ((0.4, 0.42), "published")},
    "retrain": {"steps": (560_000, "published, the long schedule"),
                "warmup": (1000 / 560_000, "published: 1000 steps"),
                "drop_path": (0.3, "published, for the long schedule"),
                "w_semi": (1., "as in the search, and in UniMatch"),
                "w_jig": (0.1, "its effect at full size is unknown")}}

def recipes() -> dict:
    "All recipes at the smallest label fraction: name -> stage -> parameter -> (value, reason)."
    by_name = {}
    for data, info in SETS.items():
        for layers in LAYERS:
            name = f"{data}-{layers}"
            def parameters(stage, **extra):
                common = dict(folder=(f"runs/{name}/{stage}", ""), data=(data, ""),
                              crop=(info["crop"], "published" if data == "cityscapes"
                                    else "UniMatch"), batch_jigsaw=(8, "as many as labelled")
                              if layers == 16 else (4, "fewer than labelled, to save memory"))
                return {**common, **SHARED, **STAGES[stage], **extra}
            search = f"runs/{name}/search"
            by_name[name] = {
                "search": parameters("search", layers=(layers, "published"),
                                     label_fraction=(info["fractions"][0],
                                                     "of the training labels")),
                "retrain": parameters("retrain", architecture=(f"{search}/architecture.json",
                                                               "result of the search"),
                                      split_folder=(f"{search}/split",
                                                    "the same labels as the search"))}
    return by_name

def recipe_config(name: str, stage: str) -> SearchConfig | RetrainConfig:
    # name: of recipes(), stage: search or retrain
    "The checked parameters of a recipe."
    cls = {"search": SearchConfig, "retrain": RetrainConfig}[stage]
    return cls(**{k: value for k, (value, _) in recipes()[name][stage].items()})

@lru_cache
def recipe_estimate(name: str, stage: str) -> Estimate:
    "The estimate for a recipe; retraining assumes a network that costs the whole budget."
    searched = recipe_config(name, "search")
    space = searched.space(SETS[searched.data]["spec"].num_classes)
    return estimate(recipe_config(name, stage), space, 1. if stage == "search" else searched.budget)

def measure_recipe(name: str, stage: str, # as in `recipe_config`
                   folder, # of the record
                   steps: int = 10) -> RunRecord:
    """Time steps of a recipe on this machine with `measure_rate`, at its size, width, depth,
    batches and precision; returns the record."""
    config, searched = recipe_config(name, stage), recipe_config(name, "search")
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainingConfig)}
    if on_gpu := torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    rate, seconds, flops = measure_rate(
        SearchConfig(**shared | {"size": config.crop, "layers": searched.layers,
                                 "channels": searched.channels}),
        steps, 1. if stage == "search" else searched.budget)
    metrics = {"multiply_adds": flops, "multiply_adds_per_second": rate,
               "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}
    record = RunRecord("rate", f"{name} {stage}", {**dataclasses.asdict(config), "measured": steps},
                       config.seed, metrics, {"step": seconds})
    record.save(folder)
    return record

# ---- The parameter files

def measured_text(record: RunRecord | None, e: Estimate) -> list:
    "One line with the measured rate and the hours of the run at that rate; none without a record."
    if not record: return []
    metrics, steps = record.metrics, record.parameters["measured"]
    peak = f"{metrics['peak_bytes'] / 1e9:.0f} GB at the peak, " if metrics["peak_bytes"] else ""
    return [f"Measured on one {record.hardware['gpu'] or 'processor'}, {steps} steps on drawn "
            f"scenes: {record.timings['step']:.2f} s per step, {peak}"
            f"{metrics['multiply_adds_per_second'] / 1e12:.1f}e12 multiply-adds per second; "
            f"{e.hours(metrics['multiply_adds_per_second']):.0f} hours at that rate."]

def recipe_text(name: str, stage: str,
                record: RunRecord | None = None) -> str: # of measure_recipe
    "The parameter file of a recipe: YAML, with the estimates in its header."
    config, e, parameters = (recipe_config(name, stage), recipe_estimate(name, stage),
                             recipes()[name][stage])
    other, fractions = (f"runs/{name}-1_8",
                        [f"1/{1 / f:.0f}" for f in SETS[config.data]["fractions"]])
    add = {"search": f"-p label_fraction 0.125 -p folder {other}/search",
           "retrain": f"-p folder {other}/retrain -p architecture {other}/search/architecture.json "
           f"-p split_folder {other}/search/split"}[stage]
    terms = {"search": ("search", "with all edges open"),
             "retrain": ("retraining", f"and {BUDGET:.0%} of the grid's cost")}[stage]
    hours = [f"{float(f'{e.hours(rate):.2g}'):g} at {rate / 1e12:g}e12" for rate in RATES]
    closed = (f" ({e.open:.1e} if no edge closes)" if e.run < e.open
              else f", for a network of {BUDGET:.0%} of the grid's cost")
    head = [f"NOT RUN: these are estimates. A full-size {terms[0]} on "
            f"{SETS[config.data]['spec'].name}, {recipes()[name]['search']['layers'][0]} layers, "
            f"{CHANNELS} channels.",
            f"Multiply-adds: {e.step:.1e} per step, {e.run:.1e} for all {config.steps:,} "
            f"steps{closed}; without validation.",
            f"Memory: at least {e.memory / 1e9:.0f} GB (1e9 bytes) on the training device, for "
            f"views of {config.crop[0]}x{config.crop[1]} {terms[1]}.",
            f"GPU hours: {', '.join(hours)} multiply-adds per second. The rates are "
            "assumptions; measure yours with python nbs/experiments/full_size.py measure "
            f"{name} {stage}.",
            *measured_text(record, e),
            f"Start: mkdir -p {config.folder} && papermill nbs/runs/{stage}.ipynb "
            f"{config.folder}/{stage}.ipynb -f nbs/runs/recipes/{name}-{stage}.yaml",
            "Data: in the folder of SELFSUPNAS_DATA, or add -p root FOLDER."
            + " For a published list of labelled images, add -p split_folder FOLDER."
            * (stage == "search"),
            f"Label fractions in the literature: {', '.join(fractions)}; this file is for "
            f"{fractions[0]}. For 1/8, add {add}",
            "Published values are by Li et al. (CVPR 2020), on Cityscapes, from scratch, with 16 "
            "layers; whether they suit other data or depths is untested.",
            "Written by nbs/experiments/full_size.py; nbs/experiments/full_size.ipynb explains and "
            "checks the estimates. Do not edit this file: copy it."]
    lines = [f"{k}: {json.dumps(value)}" + (f" # {reason}" if reason else "")
             for k, (value, reason) in parameters.items()]
    return "".join(f"# {line}\n" for line in head) + "\n".join(lines) + "\n"

def write_recipes(folder,
                  rates=None, # folder of NAME-STAGE/rate-record.json, see measure_recipe
                 ) -> list:
    "Write every recipe into `folder` as NAME-STAGE.yaml; returns the paths."
    folder, texts = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, stages in recipes().items():
        for stage in stages:
            path = rates and Path(rates)/f"{name}-{stage}"/"rate-record.json"
            record = RunRecord.load(path) if path and path.exists() else None
            texts[folder/f"{name}-{stage}.yaml"] = recipe_text(name, stage, record)
    for path, text in texts.items(): path.write_text(text, "utf8")
    return list(texts)

def main(argv=None) -> int:
    "Write the parameter files, or measure the steps of one of them on this machine."
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write the files with the measured rates")
    write.add_argument("--folder", type=Path, default=RECIPES)
    measure = commands.add_parser("measure", help="take a few steps of a recipe, write a record")
    measure.add_argument("name", choices=recipes())
    measure.add_argument("stage", choices=STAGES)
    measure.add_argument("--folder", type=Path, default=Path("runs/rates"))
    measure.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    if args.command == "write": print(*write_recipes(args.folder, RATE_RECORDS), sep="\n")
    else:
        record = measure_recipe(args.name, args.stage, args.folder/f"{args.name}-{args.stage}",
                                args.steps)
        print(*measured_text(record, recipe_estimate(args.name, args.stage)))
    return 0

if __name__ == "__main__": sys.exit(main())
