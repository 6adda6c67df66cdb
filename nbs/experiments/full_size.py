"""What a full-size run takes, counted without making one, and its parameter files.

    python nbs/experiments/full_size.py write # nbs/runs/recipes/*.yaml
    python nbs/experiments/full_size.py measure cityscapes-16 search --folder runs/rates

`full_size.ipynb` explains the counts and shows them; tests/test_full_size.py compares each with
an independent one.
"""
import argparse, dataclasses, json, sys, tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from selfsupnas.core import RunRecord, from_parameters
from selfsupnas.data.datasets import CITYSCAPES_SPEC
from selfsupnas.data.voc import VOC_SPEC
from selfsupnas.rivals import random_architecture
from selfsupnas.space.budget import CostTable, measure_costs, static_cost
from selfsupnas.space.cell import SparseFeatures
from selfsupnas.space.grid import SearchSpace
from selfsupnas.space.network import StaticNetwork
from selfsupnas.space.supernet import RoutingNetwork, build_supernet, feature_sizes
from selfsupnas.stages.retraining import RetrainConfig
from selfsupnas.stages.searching import BudgetLosses, SearchConfig, make_space, make_table
from selfsupnas.tasks.consistency import CONSISTENCY
from selfsupnas.tasks.losses import pixel_cross_entropy
from selfsupnas.train.batches import load_training_data
from selfsupnas.train.config import TrainingConfig, ramp_up
from selfsupnas.train.loop import train

HERE = Path(__file__).resolve().parent
RECIPES, RATE_RECORDS = HERE.parent/"runs"/"recipes", HERE/"records"/"rates"

# ---- Images of a step

def passes(config: TrainingConfig, semi: bool = True, # does the term have a weight at this step?
           jig: bool = True, strong: bool = True) -> dict: # kind of pass -> images
    """How many images one step sends through the network, before (`semi` False) and after w_semi
    begins to rise; the same for the jigsaws and the strong views of labelled images."""
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
    """Multiply-adds of the parts of the grid for one image. They do not depend on the depth and
    are measured on a grid of at most 4 layers."""
    shallow = dataclasses.replace(space, layers=min(space.layers, 4))
    return dataclasses.replace(measure_costs(shallow, size, gate=gate), space=space)

def step_flops(config: TrainingConfig, table: CostTable, # at the size of a view
               share: float = 1., # of the grid's cost that is executed
               **active) -> float: # semi, jig, strong: see passes; -> multiply-adds
    """Multiply-adds of one optimiser step: a pass with gradient counts three times, but for the
    first convolution, which computes no gradient of the image; a pass without gradient, once."""
    n, space, (h, w) = passes(config, **active), table.space, table.size
    classifier, first = (9 * space.channels * space.num_classes * -(-h // 4) * -(-w // 4),
                         27 * space.channels * -(-h // 2) * -(-w // 2))
    entering = n["segmented"] + n["peer"] + n["jigsaw"]
    with_gradient = (entering * share * table.full - n["jigsaw"] * classifier
                     + n["perturbed"] * (sum(table.raise_from) + table.head))
    return 3 * with_gradient - entering * first + n["taught"] * share * table.full

def executed_share(config: TrainingConfig, done: float) -> float: # done: share of the steps
    """Share of the grid's cost that a search executes if its cost follows the budget; 1 where
    nothing controls the executed cost."""
    if not getattr(config, "controlled", False): return 1.
    return 1 + (config.budget - 1) * ramp_up(done, *config.cost_ramp, "linear")

def active_terms(config: TrainingConfig, done: float) -> dict: # done: share of the steps
    "Which terms have a weight, as `passes` takes them."
    jig = config.jigsaw_ramp[0] <= done and (config.jigsaw_decay[0] == 1
                                             or done < config.jigsaw_decay[1])
    return {"semi": done >= config.ramp[0], "jig": jig, "strong": done >= config.sup_start}

def run_flops(config: TrainingConfig, table: CostTable,
              share: float = 1., # of the grid's cost: 1 for the supernet
              # does the executed cost follow the budget? False: no edge ever closes
              follow: bool = True) -> float:
    "Multiply-adds of all steps of a run, without validation."
    ends, total, moments = {}, 0., 1000 # a step is linear in the share that is executed
    for done in ((k + .5) / moments for k in range(moments)):
        active = active_terms(config, done)
        if (now := tuple(active.values())) not in ends:
            ends[now] = [step_flops(config, table, share * executed, **active)
                         for executed in (0, 1)]
        least, most = ends[now]
        total += least + (executed_share(config, done) if follow else 1.) * (most - least)
    return config.steps / moments * total

# ---- Memory of a step: what autograd keeps grows with the pixels

def saved_bytes(
        forward, # function without arguments that returns what a backward pass could start from
        # precision: as in TrainingConfig; both half precisions take the same
        module: nn.Module, precision: str = "no") -> int:
    """Bytes that autograd keeps of `forward()`, each storage once, without parameters and buffers
    of `module`; for a network with `recompute`, the inputs of its cells as well."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept = {}
    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own: kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    def enter(cell, args): keep(args[0].features)
    entered = [cell.register_forward_pre_hook(enter) for cell in
               (module.cells.values() if getattr(module, "recompute", False) else ())]
    half = nullcontext() if precision == "no" else torch.autocast("cpu", torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
        result = forward()
    del result # only now: a storage that is given back could be counted twice
    for hook in entered: hook.remove()
    return sum(kept.values())

def trunk_bytes(model: RoutingNetwork, precision: str, side: int) -> int:
    "Bytes kept of stem, cells and decoder, for one image of side x side."
    image = torch.randn(1, 3, side, side)
    return saved_bytes(lambda: model.encode(image), model, precision)

def cell_bytes(model: RoutingNetwork, precision: str, side: int) -> int:
    """Bytes kept of one cell at stride 4, the largest, for one image of side x side: `recompute`
    holds one cell at a time."""
    cell, (size, _) = model.cells["1_0"], feature_sizes((side, side))[:2]
    features = SparseFeatures(torch.randn(1, model.space.channels, *size))
    return saved_bytes(lambda: [out.features for out in cell(features).values()], cell, precision)

def head_bytes(model: RoutingNetwork, precision: str, side: int) -> dict: # part -> bytes
    """Bytes kept of classifier and loss (`head`), and of the decoder with them (`perturbed`), as
    perturbed features need it; for one image of side x side."""
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
    # -> {part: bytes a pixel}, bytes that do not grow, parameters
    "The lines through what a supernet keeps of images of 96x96 and 128x128."
    def line(measure, model): # through the two
        low, high = (measure(model, precision, side) for side in (96, 128))
        return (slope := (high - low) / (128**2 - 96**2)), max(0., low - slope * 96**2)
    model, shallow = (build_supernet(part, gate=gate).train()
                      for part in (space, dataclasses.replace(space, layers=3)))
    slopes = {part: line(lambda *a: head_bytes(*a)[part], shallow)[0]
              for part in ("head", "perturbed")}
    model.recompute = recompute
    slopes["trunk"], constant = line(trunk_bytes, model)
    if recompute: slopes["trunk"] += line(cell_bytes, model)[0]
    return slopes, constant, sum(p.numel() for p in model.parameters())

def grid_pixels(size: tuple) -> float: # (H,W) -> pixels
    """Pixels that the grid computes for a view: H * W, and more where 32 does not divide them, as
    features are rounded up."""
    return (sum(2**scale * h * w for scale, (h, w) in enumerate(feature_sizes(size))) * 16
            / sum(2.**-scale for scale in range(4)))

def step_memory(config: TrainingConfig, space: SearchSpace, size: tuple, # (H,W) of a view
                # share: of the grid's cost that the trained network has; -> bytes
                share: float = 1.) -> float:
    """Least memory of a training step: what is kept for the backward pass, weights, gradients,
    optimiser, averaged copy."""
    n, networks = passes(config), 1 + (config.w_semi > 0 and CONSISTENCY[config.consistency].peer)
    slopes, constant, parameters = saved_lines(space, getattr(config, "gate", "conditional"),
                                               config.precision, config.recompute)
    segmented = n["segmented"] + n["peer"]
    trunk = (segmented + n["jigsaw"]) * share * slopes["trunk"]
    heads = segmented * slopes["head"] + n["perturbed"] * slopes["perturbed"]
    # weights, gradients, averaged copy, and the optimiser's
    copies = 3 + {"sgd": 1, "adamw": 2}[config.optimiser]
    return (grid_pixels(size) * trunk + size[0] * size[1] * heads
            + networks * share * (constant + 4 * copies * parameters))

# ---- Time: multiply-adds by the rate that a device sustains

def measure_rate(
        # with size: drawn scenes are resized to it; channels and batches as in the run, layers may
        # be fewer
        config: SearchConfig,
        steps: int = 5,
        # of the grid's cost; 1: the supernet, all edges open; less: a random route of that cost
        share: float = 1.,
        ) -> tuple:
    """Train on drawn scenes for a few steps with all terms, the supernet or a network as retraining
    has it, and return multiply-adds a second, seconds of a step (median) and its multiply-adds.

    A GPU stays far from its peak: every second convolution is depthwise, and moving data decides.
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

# multiply-adds a second that a GPU may sustain: assumptions, see measure_rate
RATES = (1e12, 3e12, 1e13)

@dataclass(frozen=True)
class Estimate:
    "What a run will take; multiply-adds, if not said otherwise."
    step: float # of a step with all terms and all edges open
    run: float # of all steps, if the executed cost follows its budget
    open: float # of all steps, if no edge ever closed
    memory: float # bytes, at least

    def hours(self, rate: float) -> float: # rate: multiply-adds a second, sustained
        return self.run / rate / 3600

def estimate(config: TrainingConfig, # with crop or size
             # share: of the grid's cost that the trained network has; 1: the supernet
             space: SearchSpace, share: float = 1.) -> Estimate:
    """Multiply-adds and memory of a search, or of retraining a network of that cost; ValueError
    without crop and size."""
    size = config.crop or config.size
    if not size: raise ValueError("how large is a view? set crop=(height, width), or size")
    table = view_table(space, tuple(size), getattr(config, "gate", "conditional"))
    return Estimate(step_flops(config, table, share), run_flops(config, table, share),
                    run_flops(config, table, share, follow=False),
                    step_memory(config, space, size, share))

# ---- Recipes: what differs from the defaults of a stage, with the reason beside it

# "published": Li et al. (CVPR 2020), from scratch on Cityscapes. The sources give no schedule of
# that grid for VOC: steps, learning rate, budget and all that is not marked are choices of ours.
SETS = {"cityscapes": dict(spec=CITYSCAPES_SPEC, crop=(768, 768),
                           # data -> classes, (H,W) of a view, label fractions
                           fractions=(1 / 16, 1 / 8, 1 / 4, 1 / 2)),
        "voc_aug": dict(spec=VOC_SPEC, crop=(321, 321), fractions=(1 / 16, 1 / 8, 1 / 4))}
LAYERS, CHANNELS, BUDGET = (16, 33), 64, 0.4
SHARED = { # parameter -> value, why
    "zoom": ((0.5, 2.0), "published"),
    "batch_labelled": (8, "published"),
    "batch_unlabelled": (8, "as many as labelled ones, as UniMatch (Yang et al., CVPR 2023)"),
    "optimiser": ("sgd", "published, with momentum 0.9"),
    "lr": (0.05, "published for a start from scratch"),
    "weight_decay": (1e-4, "published"),
    "clip": (5.0, "published"), "jigsaw_n": (3, "nine tiles, 72 permutations"),
    "consistency": ("fixmatch", "unimatch and cps cost more: nbs/experiments/full_size.ipynb"),
    "threshold": (0.95, "UniMatch V2's, on both sets"),
    "ema_decay": (0.996, "UniMatch V2"), "precision": ("bf16", "halves the memory; no: 32 bits"),
    "workers": (8, "as many as keep up: python nbs/experiments/benchmarks.py loader"),
    "logs": (200, "a checkpoint each; the same command goes on after a stop")}
STAGES = {
    "search": {"steps": (190_000, "published"),
               "warmup": (1000 / 190_000, "published: 1000 steps"),
               "channels": (CHANNELS, "published"),
               "budget": (BUDGET, "of the executed cost"), "w_cost": (0.8, "published"),
               "cost_ramp": ((0.4, 0.42), "published")},
    "retrain": {"steps": (560_000, "published, the long schedule"),
                "warmup": (1000 / 560_000, "published: 1000 steps"),
                "drop_path": (0.3, "published, for the long schedule")}}

def recipes() -> dict: # name -> stage -> parameter -> (value, why)
    "All recipes, at the smallest label fraction."
    named = {}
    for data, about in SETS.items():
        for layers in LAYERS:
            name = f"{data}-{layers}"
            def stage(which, **own):
                both = dict(folder=(f"runs/{name}/{which}", ""), data=(data, ""),
                            crop=(about["crop"], "published" if data == "cityscapes"
                                  else "UniMatch"), batch_jigsaw=(8, "as many as of the others")
                            if layers == 16 else (4, "fewer than of the others, to save memory"))
                return {**both, **SHARED, **STAGES[which], **own}
            search = f"runs/{name}/search"
            named[name] = {"search": stage("search", layers=(layers, "published"),
                                           label_fraction=(about["fractions"][0],
                                                           "of the training labels")),
                           "retrain": stage("retrain",
                                            architecture=(f"{search}/architecture.json",
                                                          "what the search leaves"),
                                            split_folder=(f"{search}/split", "the labels of the "
                                                          "search, no others"))}
    return named

def recipe_config(name: str, stage: str) -> SearchConfig | RetrainConfig:
    # name: of recipes(), stage: search or retrain
    "A recipe as its stage takes it, checked."
    return from_parameters({"search": SearchConfig, "retrain": RetrainConfig}[stage],
                           {k: value for k, (value, _) in recipes()[name][stage].items()})

@lru_cache
def recipe_estimate(name: str, stage: str) -> Estimate:
    "What a recipe will take; retraining, for a network that costs its whole budget."
    searched = recipe_config(name, "search")
    space = make_space(searched, SETS[searched.data]["spec"].num_classes)
    return estimate(recipe_config(name, stage), space, 1. if stage == "search" else searched.budget)

def measure_recipe(name: str, stage: str, # as in `recipe_config`
                   folder, # of the record, which is returned
                   steps: int = 10) -> RunRecord:
    """Time a recipe's steps where it would run, as `measure_rate` does, at the size, the width, the
    depth, the batches and the precision of the recipe."""
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

def measured_text(record: RunRecord | None, e: Estimate) -> list: # one line; none without a record
    "What `measure_recipe` measured, and the hours that the run would take at that rate."
    if not record: return []
    metrics, steps = record.metrics, record.parameters["measured"]
    peak = f"{metrics['peak_bytes'] / 1e9:.0f} GB at its peak, " if metrics["peak_bytes"] else ""
    return [f"Measured on one {record.hardware['gpu'] or 'processor'}, {steps} steps on drawn "
            f"scenes: {record.timings['step']:.2f} s a step, {peak}"
            f"{metrics['multiply_adds_per_second'] / 1e12:.1f}e12 multiply-adds a second; "
            f"{e.hours(metrics['multiply_adds_per_second']):.0f} hours at that rate."]

def recipe_text(name: str, stage: str,
                record: RunRecord | None = None) -> str: # of measure_recipe
    "The parameter file of a recipe: YAML, with what the run will take in its header."
    config, e, parameters = (recipe_config(name, stage), recipe_estimate(name, stage),
                             recipes()[name][stage])
    other, fractions = (f"runs/{name}-1_8",
                        [f"1/{1 / f:.0f}" for f in SETS[config.data]["fractions"]])
    add = {"search": f"-p label_fraction 0.125 -p folder {other}/search",
           "retrain": f"-p folder {other}/retrain -p architecture {other}/search/architecture.json "
           f"-p split_folder {other}/search/split"}[stage]
    words = {"search": ("search", "with all edges open"),
             "retrain": ("retraining", f"and {BUDGET:.0%} of the grid's cost")}[stage]
    hours = [f"{float(f'{e.hours(rate):.2g}'):g} at {rate / 1e12:g}e12" for rate in RATES]
    closed = (f" ({e.open:.1e} if no edge ever closed)" if e.run < e.open
              else f", for a network of {BUDGET:.0%} of the grid's cost")
    head = [f"NOT RUN: what follows is estimated. A full-size {words[0]} on "
            f"{SETS[config.data]['spec'].name}, {recipes()[name]['search']['layers'][0]} layers, "
            f"{CHANNELS} channels.",
            f"Multiply-adds: {e.step:.1e} a step, {e.run:.1e} all {config.steps:,} steps{closed}; "
            "validation is not in it.",
            f"Memory: {e.memory / 1e9:.0f} GB (1e9 bytes) at least, on the device that trains, for "
            f"views of {config.crop[0]}x{config.crop[1]} {words[1]}.",
            f"GPU hours: {', '.join(hours)} multiply-adds a second, sustained. The rates are "
            "assumptions; measure yours with python nbs/experiments/full_size.py measure "
            f"{name} {stage}.",
            *measured_text(record, e),
            f"Start: mkdir -p {config.folder} && papermill nbs/runs/{stage}.ipynb "
            f"{config.folder}/{stage}.ipynb -f nbs/runs/recipes/{name}-{stage}.yaml",
            "Data: in the folder that SELFSUPNAS_DATA names, or add -p root FOLDER."
            + " For a published list of labelled images add -p split_folder FOLDER."
            * (stage == "search"),
            f"Label fractions of the literature: {', '.join(fractions)}; this file is for "
            f"{fractions[0]}. For 1/8, add {add}",
            "What is called published below is by Li et al. (CVPR 2020), on Cityscapes, from "
            "scratch, with 16 layers; that it suits other data or depths is a guess.",
            "Written by nbs/experiments/full_size.py; nbs/experiments/full_size.ipynb says how the "
            "estimates are made and checked. Do not edit: copy."]
    lines = [f"{k}: {json.dumps(value)}" + (f" # {why}" if why else "")
             for k, (value, why) in parameters.items()]
    return "".join(f"# {line}\n" for line in head) + "\n".join(lines) + "\n"

def write_recipes(folder,
                  rates=None, # folder of records: NAME-STAGE/rate-record.json, see measure_recipe
                 ) -> list: # of paths
    "Write every recipe into `folder` as NAME-STAGE.yaml."
    folder, texts = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, stages in recipes().items():
        for stage in stages:
            path = rates and Path(rates)/f"{name}-{stage}"/"rate-record.json"
            record = RunRecord.load(path) if path and path.exists() else None
            texts[folder/f"{name}-{stage}.yaml"] = recipe_text(name, stage, record)
    for path, text in texts.items(): path.write_text(text, "utf8")
    return list(texts)

def main(argv=None) -> int: # exit status
    "Write the parameter files, or measure the steps of one of them on this machine."
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write the files, with the measured rates in them")
    write.add_argument("--folder", type=Path, default=RECIPES)
    measure = commands.add_parser("measure", help="take a few steps of a recipe, leave a record")
    measure.add_argument("name", choices=recipes())
    measure.add_argument("stage", choices=STAGES)
    measure.add_argument("--folder", type=Path, default=Path("runs/rates"))
    measure.add_argument("--steps", type=int, default=10)
    words = parser.parse_args(argv)
    if words.command == "write": print(*write_recipes(words.folder, RATE_RECORDS), sep="\n")
    else:
        record = measure_recipe(words.name, words.stage, words.folder/f"{words.name}-{words.stage}",
                                words.steps)
        print(*measured_text(record, recipe_estimate(words.name, words.stage)))
    return 0

if __name__ == "__main__": sys.exit(main())
