"""The plan of a comparison: the method, its rivals, ablations and seeds; compare.smk runs it.

The plan is plain data, and a run is done when its record exists. A record with other parameters is
an error.

Rules of a comparison:
- All runs of a fraction use the same split file, drawn from seed 0. The seeds vary initial weights,
  views and batches, but not the labelled images: an architecture found with the labels of one
  split must not be trained with those of another.
- Terms are compared in the training of one network (arms) and in the search (searches). Networks of
  further searches are trained with only labels, so that architectures are compared.
- Every network gets the same number of trials; its learning rate has the best *validation* mIoU
  after a short training with the first fraction and seed 0.
- The test split is read once per run, at its end; the plan depends only on trials.
"""
import itertools, json, os, shlex, shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveInt

from selfsupnas.cli import option_words
from selfsupnas.core import (PositiveShare, RunRecord, Seed, Several, check_names,
                             checked_dataclass, write_json)
from selfsupnas.data.datasets import load_dataset
from selfsupnas.data.splits import make_split, save_split
from selfsupnas.rivals import BASELINES, all_open, random_architecture
from selfsupnas.space.architecture import load_architecture, save_architecture
from selfsupnas.space.budget import measure_costs, static_cost
from selfsupnas.train.config import Size
from selfsupnas.viz.tables import summarise, to_markdown

# ---- A comparison as parameters

# parameters of each arm; consistency is fixmatch if nothing else is said
ARMS = {"labels": dict(w_jig=0., w_semi=0.), "jigsaw": dict(w_jig=.1, w_semi=0.),
        "semi": dict(w_jig=0., w_semi=1.), "both": dict(w_jig=.1, w_semi=1.),
        "light": dict(w_jig=0., w_semi=.3),
        # soft targets instead of pseudo-labels, which suppress rare classes
        "teacher": dict(w_jig=0., consistency="mean_teacher", w_semi=10.),
        # only labels, initialised with the weights of the search
        "inherit": dict(w_jig=0., w_semi=0., initialise="inherit")}
# further searches: their parameters, and the arms of their networks
SEARCHES = {"searched_again": (dict(seed=1), ("labels",)),
            "searched_by_labels": (ARMS["labels"], ("labels",)),
            "searched_by_jigsaw": (dict(w_sup=0., w_semi=0.), ("labels", "inherit"))}

@checked_dataclass
class CampaignConfig:
    "Parameters of a campaign; others have the defaults of the stages."
    folder: str = "runs/campaign" # of all runs
    records: str | None = None # folder for copies of all records; runs with a record are done
    data: str = "camvid" # see selfsupnas.data.datasets
    root: str | None = None # of the data; None: the environment variable SELFSUPNAS_DATA
    size: Size = (192, 256) # (height, width) of images, and of the cost table
    crop: Size | None = (128, 160) # (height, width) of a training view; None: the image
    fractions: Several[PositiveShare] = (1 / 8, 1 / 4) # of the training labels
    seeds: Several[Seed] = (0, 1, 2) # of each network and arm; the split has seed 0
    steps: PositiveInt = 800 # of every compared training
    layers: int = 8 # of the grid
    channels: int = 48 # C0 of the grid
    budget: float = 0.5 # of the search
    search_steps: PositiveInt = 800 # of every search
    searches: Several[str] = tuple(SEARCHES) # further searches, by the names of their networks
    lrs: Several[float] = (3e-4, 1e-3, 3e-3) # learning rates to try for each network
    trial_steps: PositiveInt = 100 # of each trial
    rivals: Several[str] = tuple(BASELINES) # hand-crafted networks, trained with only labels
    semi_rivals: Several[str] = ("deeplabv3plus_resnet18",) # with consistency, see semi_arms
    arms: Several[str] = ("both", "labels", "semi", "jigsaw") # of the grid's networks; see ARMS
    open: bool = True # also train the grid with all edges open?
    random: NonNegativeInt = 6 # random architectures of equal cost; the first has all arms
    only: str = "*" # names of runs, as a shell pattern
    threads: PositiveInt = 1 # of each run

    def __post_init__(self):
        for name, known in (("rivals", BASELINES), ("semi_rivals", BASELINES), ("arms", ARMS),
                            ("searches", SEARCHES)):
            check_names(name, getattr(self, name), known)
        for name in ("fractions", "seeds", "lrs", "arms"):
            if not getattr(self, name): raise ValueError(f"{name} must not be empty")

# ---- The plan, which grows: trainings need a learning rate, architectures a search

class Run(NamedTuple):
    name: str # and folder: FRACTION/found, FRACTION/NETWORK-ARM/SEED, or FRACTION/trials/NETWORK/LR
    stages: tuple # of (stage, parameters), each in the folder NAME/STAGE

# parameters for paths and logging, which do not identify a run
PLACES = ("root", "split_folder", "architecture", "supernet", "network", "logs")

def record_of(config: CampaignConfig, name: str, stage: str) -> RunRecord | None:
    """The record of one stage of a run, from the campaign's folder or the folder of records, or
    None."""
    paths = [Path(place)/name/stage/f"{stage}-record.json"
             for place in (config.folder, config.records) if place]
    return next((RunRecord.load(path) for path in paths if path.exists()), None)

def missing_stages(config: CampaignConfig, run: Run) -> list:
    """(stage, parameters) of the stages without a record, or with one older than that of the stage
    before; ValueError for a record with other parameters, because such runs are not comparable."""
    missing, before = [], ""
    for stage, parameters in run.stages:
        record = record_of(config, run.name, stage)
        for key, value in json.loads(json.dumps(parameters)).items():
            if record and key not in PLACES and record.parameters.get(key) != value:
                places = " and ".join(str(Path(place)/run.name)
                                      for place in (config.folder, config.records) if place)
                raise ValueError(f"{run.name}: its {stage} record has {key} = "
                                 f"{record.parameters.get(key)!r}, not {value!r}: use another "
                                 f"folder, or remove {places}")
        if missing or record is None or record.created < before: missing.append((stage, parameters))
        else: before = record.created
    return missing

def trial_name(config: CampaignConfig, network: str, lr: float) -> str:
    return f"{config.fractions[0]:g}/trials/{network}/{lr:g}"

def best_lr(config: CampaignConfig, network: str) -> float | None:
    "The learning rate with the best validation mIoU in a network's trials; None before they end."
    trials = {lr: record_of(config, trial_name(config, network, lr), "retrain")
              for lr in config.lrs}
    return (None if None in trials.values()
            else max(trials, key=lambda lr: trials[lr].metrics["val_miou"] or 0.)) # None: undefined

def shared_parameters(config: CampaignConfig, fraction: float) -> dict:
    return dict(data=config.data, root=config.root, size=config.size, crop=config.crop,
                split_folder=f"{config.folder}/{fraction:g}/split")

def search_name(fraction: float, network: str) -> str:
    "Name of the search run of a network."
    return f"{fraction:g}/{network.replace('searched', 'found')}"

def training(config: CampaignConfig, fraction: float, network: str, arm: str, seed: int, lr: float,
             steps: int) -> dict:
    "Parameters of one retraining."
    model = (dict(architecture=network, w_jig=0.) if network in BASELINES
             else dict(architecture=f"{config.folder}/{fraction:g}/{network}.json"))
    if arm == "inherit":
        search = f"{config.folder}/{search_name(fraction, network)}/search"
        model["supernet"] = f"{search}/supernet.safetensors"
    return {**shared_parameters(config, fraction), "seed": seed, "steps": steps, "lr": lr,
            "consistency": "fixmatch", **ARMS[arm], **model}

def search_run(config: CampaignConfig, fraction: float, network: str = "searched") -> Run:
    search = dict(seed=0, steps=config.search_steps, layers=config.layers,
                  channels=config.channels, budget=config.budget)
    return Run(search_name(fraction, network),
               (("search", {**shared_parameters(config, fraction), **search,
                           **SEARCHES.get(network, ({},))[0]}),))

def trial_runs(config: CampaignConfig, network: str) -> list[Run]:
    # networks of the grid: with all terms; hand-crafted networks: with only labels
    arm = "labels" if network in BASELINES else "both"
    # few log lines, because each comes with a checkpoint of up to half a gigabyte
    return [Run(trial_name(config, network, lr),
                (("retrain",
                  {**training(config, config.fractions[0], network, arm, 0, lr, config.trial_steps),
                   "logs": 4}),)) for lr in config.lrs]

def compared_run(config: CampaignConfig, fraction: float, network: str, arm: str, seed: int,
                 lr: float) -> Run:
    name = f"{fraction:g}/{network}-{arm}/{seed}"
    return Run(name, (("retrain", training(config, fraction, network, arm, seed, lr, config.steps)),
                      ("evaluate",
                       dict(network=f"{config.folder}/{name}/retrain", root=config.root,
                            baselines=()))))

def grid_networks(config: CampaignConfig) -> list:
    "Names of a fraction's networks of the grid."
    return ["searched", *["open"] * config.open, *(f"random-{i}" for i in range(config.random)),
            *config.searches]

def semi_arms(config: CampaignConfig) -> list:
    "The arms with consistency and without jigsaw, which also apply to hand-crafted networks."
    return [arm for arm in config.arms
            if ARMS[arm]["w_jig"] == 0 < ARMS[arm]["w_semi"]] or ["semi"]

def arms_of(config: CampaignConfig, network: str) -> list:
    "The arms of one network of the grid."
    if network == "searched": return list(config.arms)
    if network in SEARCHES: return list(SEARCHES[network][1])
    return ([arm for arm in config.arms if arm != "inherit"] if network in ("open", "random-0")
            else ["labels"])

def whole_plan(config: CampaignConfig) -> dict:
    """name -> (function that returns the Run, the (name, stage) that must be done before), in
    order; a learning rate and an architecture are known only then."""
    first, runs, rivals = config.fractions[0], {}, [*config.rivals, *config.semi_rivals]
    def searched(fraction, network): # the search of a network of the grid
        return (search_name(fraction, network if network in SEARCHES else "searched"), "search")
    def add_search(fraction, network="searched"):
        runs[search_name(fraction, network)] = (
            lambda: search_run(config, fraction, network), [])
    def add_trial(network, i):
        needs = [] if network in BASELINES else [searched(first, network)]
        runs[trial_name(config, network, config.lrs[i])] = (
            lambda: trial_runs(config, network)[i], needs)
    def add_compared(fraction, network, arm, seed):
        of = network if network in BASELINES else "searched" # whose learning rate it has
        needs = [(trial_name(config, of, lr), "retrain") for lr in config.lrs]
        if network not in BASELINES:
            needs += dict.fromkeys([searched(fraction, "searched"), searched(fraction, network)])
        runs[f"{fraction:g}/{network}-{arm}/{seed}"] = (
            lambda: compared_run(config, fraction, network, arm, seed, best_lr(config, of)), needs)
    add_search(first)
    for network in [*rivals, "searched"]:
        for i in range(len(config.lrs)): add_trial(network, i)
    for seed, fraction in itertools.product(config.seeds, config.fractions):
        if seed == config.seeds[0]:
            for network in ("searched", *config.searches): add_search(fraction, network)
        networks = grid_networks(config)
        pairs = ([("searched", arm) for arm in config.arms]
                 + [(network, "labels") for network in config.rivals]
                 + [(network, arm) for network in config.semi_rivals for arm in semi_arms(config)]
                 + [(network, arm) for network in networks[1:] for arm in arms_of(config, network)])
        for network, arm in pairs: add_compared(fraction, network, arm, seed)
    return {name: run for name, run in runs.items() if fnmatch(name, config.only)}

def plan(config: CampaignConfig) -> list[Run]:
    "The runs whose parameters are known now, in order."
    return [run() for run, needs in whole_plan(config).values()
            if all(record_of(config, *need) for need in needs)]

# ---- Splits and architectures, which runs share

def copy_folder(source: Path, to: Path):
    "Copy a folder completely or not at all."
    part = to.with_name(f"{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part).rename(to)

def make_splits(config: CampaignConfig):
    """Write FRACTION/split for each fraction, from the folder of records or drawn from seed 0, and
    copy it to the folder of records."""
    for fraction in config.fractions:
        to, copy = (Path(place or config.folder)/f"{fraction:g}"/"split"
                    for place in (config.folder, config.records))
        if copy.exists() and not to.exists(): copy_folder(copy, to)
        if not to.exists():
            save_split(make_split(load_dataset(config.data, "train", config.root, config.size),
                                  fraction, 0), to)
        if not copy.exists(): copy_folder(to, copy)

def found_architecture(config: CampaignConfig, fraction: float, network: str = "searched",
                      ) -> Path | None:
    "Path of the architecture of a finished search, in the campaign's or the records' folder."
    name = search_name(fraction, network)
    places = (Path(place)/name/"search"/"architecture.json"
              for place in (config.folder, config.records) if place)
    return next((path for path in places if path.exists() and record_of(config, name, "search")),
                None)

def make_routes(config: CampaignConfig):
    """Write FRACTION/searched.json, open.json and random-I.json for each fraction whose search is
    done, and a file for each further search that is done; ValueError if a search has changed,
    because runs may have used its old architecture."""
    for fraction in config.fractions:
        place = Path(config.folder)/f"{fraction:g}"
        for network in ("searched", *config.searches):
            source, to = found_architecture(config, fraction, network), place/f"{network}.json"
            if not source: continue
            route = load_architecture(source)
            if not to.exists(): save_architecture(route, to)
            elif load_architecture(to) != route:
                raise ValueError(f"{to} differs from {source}: the search was repeated, and "
                                 f"{place} has runs of the old architecture; use another folder")
        if not (place/"searched.json").exists(): continue
        searched = load_architecture(place/"searched.json")
        if not (place/"open.json").exists():
            save_architecture(all_open(searched.space), place/"open.json")
        missing = [i for i in range(config.random) if not (place/f"random-{i}.json").exists()]
        if not missing: continue
        table = measure_costs(searched.space, config.size)
        def cost(kept): return static_cost(table, kept)
        for i in missing:
            save_architecture(random_architecture(searched.space, cost, cost(searched.selected), i),
                              place/f"random-{i}.json")

# ---- Results

def compared(folder, more=None) -> list:
    """A dict as of `viz.tables.read_records` for each evaluated run, from the records in `folder`,
    and in `more` for runs that are not in `folder`."""
    results, paths = [], {}
    for place in (folder, more) if more else (folder,):
        for path in Path(place).glob("*/*-*/*/evaluate/evaluate-record.json"):
            paths.setdefault(path.relative_to(place), path)
    for _, path in sorted(paths.items()):
        test, trained = (RunRecord.load(path),
                         RunRecord.load(path.parent.parent/"retrain"/"retrain-record.json"))
        fraction, network, seed = path.parts[-5:-2]
        name, row = next(iter(test.metrics["rows"].items()))
        results.append({"stage": "compared", "name": f"{fraction} {network}", "seed": int(seed),
                      "file": str(path),
                      "parameters": {"fraction": float(fraction),
                                     **dict(zip(("network", "arm"), network.rsplit("-", 1))),
                                     "lr": trained.parameters["lr"],
                                     "steps": trained.parameters["steps"]},
                      "metrics": {"test_miou": row["miou"], "val_miou": trained.metrics["val_miou"],
                                  "iou": row["iou"], "gflops": row["gflops"],
                                  "parameter_count": row["parameters"]},
                      "timings": {"latency_ms": test.timings["latency"][name]["latency_ms"],
                                  "minutes": trained.timings["training"] / 60,
                                  "step_ms": trained.timings["step_ms"]}})
    return results

def comparison_table(results:list, # from `compared`
                     keep:Callable=None, # row -> is it shown?; None: all rows
                     latency:bool=True, # False for latencies measured on a busy machine
                    ) -> str:
    """A Markdown table of test and validation mIoU over seeds, GFLOPs, parameters and latency,
    sorted by fraction and test mIoU."""
    rows = summarise(results, ["fraction", "network", "arm"],
                     ["test_miou", "val_miou", "gflops", "parameter_count", "latency_ms"])
    def identity(row): # the same for all label fractions
        return row["network"], row["gflops"].values[0], row["parameter_count"].values[0]
    latencies = {}
    for row in rows: latencies.setdefault(identity(row), []).extend(row["latency_ms"].values)
    for row in rows: # other work only adds to a latency, so a network has the least of its runs
        row.update(latency=min(latencies[identity(row)]), gflops=row["gflops"].mean,
                   millions=row["parameter_count"].mean / 1e6)
    rows = sorted(filter(keep, rows), key=lambda row: (row["fraction"], -row["test_miou"].mean))
    columns = {"fraction": "label fraction", "network": "network", "arm": "trained with",
               "test_miou": "test mIoU", "val_miou": "val mIoU",
               "gflops": "GFLOPs (1e9 multiply-adds)", "millions": "parameters (million)",
               "latency": "latency (ms, batch 1)"}
    formats = {"fraction": ".3f", "test_miou": ".1%", "val_miou": ".1%", "gflops": ".3f",
               "millions": ".3f", "latency": ".0f"}
    if not latency: del columns["latency"], formats["latency"]
    return to_markdown(rows, columns, formats)

# ---- The command of a stage

def command_words(folder: Path, stage: str, parameters: dict) -> list:
    "The arguments of `selfsupnas` for one stage, which resumes from its checkpoint."
    options = [option_words(name, value) for name, value in parameters.items()]
    return [stage, "--folder", str(folder), *sum(options, [])]

def lock_gpu(folder: str) -> str: # folder: for the lock files
    "Shell text that waits for a free GPU and takes it; no text with one GPU or none."
    every = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    locks = shlex.quote(f"{folder}/gpu-")
    return (f"until for gpu in {' '.join(gpus)}; do exec 9>{locks}$gpu.lock; flock -n 9 && break; "
            "done; do sleep 1; done; export CUDA_VISIBLE_DEVICES=$gpu; " if len(gpus) > 1 else "")

def reason(log: Path, stage: str) -> str:
    "Why a run has no record, in one line: the last output of its command."
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith(f"selfsupnas {stage}: ")]
    last = (own or lines or ["no output"])[-1]
    if last.startswith(f"selfsupnas {stage}: running"): last = "it was killed (out of memory?)"
    return f"{last} (more in {log})"

def keep_records(config: CampaignConfig, run: Run):
    "Copy the records and architectures of a finished run to the folder of records."
    for stage, _ in run.stages if config.records else ():
        for name in [f"{stage}-record.json"] + ["architecture.json"] * (stage == "search"):
            source, copy = (Path(place)/run.name/stage/name
                            for place in (config.folder, config.records))
            if source.exists() and not (copy.exists() and copy.read_bytes() == source.read_bytes()):
                write_json(copy, json.loads(source.read_text(encoding="utf8")))
