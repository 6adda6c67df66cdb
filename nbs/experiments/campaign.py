"""A comparison of many runs: the method, rivals, ablations and seeds. For grids, see sweep.smk.

    python nbs/experiments/campaign.py compare --folder runs/camvid -p workers 2

The plan is plain data, and a run is done when its record exists: the same command resumes a stopped
campaign. Each run is a separate process; a failed run does not stop others and is repeated only
when the command is started again. A record with other parameters is an error.

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
import argparse, dataclasses, functools, json, os, shutil, signal, subprocess, sys, time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from selfsupnas.cli import align_table, describe, parse_parameters
from selfsupnas.core import (SEEDS, RunRecord, check_fields, from_parameters, progress_bar,
                             write_json)
from selfsupnas.data.datasets import load_dataset
from selfsupnas.data.splits import make_split, save_split
from selfsupnas.metrics import miou_text
from selfsupnas.rivals import BASELINES, all_open, random_architecture
from selfsupnas.space.architecture import load_architecture, save_architecture
from selfsupnas.space.budget import measure_costs, static_cost
from selfsupnas.train.checkpoint import FolderInUse, checkpoint_paths, deferred_interrupts
from selfsupnas.viz.tables import comparison_table

# ---- A comparison as parameters

@dataclass
class CampaignConfig:
    "Parameters of a campaign; others have the defaults of the stages."
    folder: str = "runs/campaign" # of all runs
    records: str | None = None # folder for copies of all records; runs with a record are done
    data: str = "camvid" # see selfsupnas.data.datasets
    root: str | None = None # of the data; None: the environment variable SELFSUPNAS_DATA
    size: tuple[int, int] = (192, 256) # (height, width) of images, and of the cost table
    crop: tuple[int, int] | None = (128, 160) # (height, width) of a training view; None: the image
    fractions: tuple[float, ...] = (1 / 8, 1 / 4) # of the training labels
    seeds: tuple[int, ...] = (0, 1, 2) # of each network and arm; the split has seed 0
    steps: int = 800 # of every compared training
    layers: int = 8 # of the grid
    channels: int = 48 # C0 of the grid
    budget: float = 0.5 # of the search
    search_steps: int = 800 # of every search
    searches: tuple[str, ...] = ("searched_again", "searched_by_labels", "searched_by_jigsaw")
    # further searches, by the names of their networks; see SEARCHES
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3) # learning rates to try for each network
    trial_steps: int = 100 # of each trial
    rivals: tuple[str, ...] = tuple(BASELINES) # hand-crafted networks, trained with only labels
    semi_rivals: tuple[str, ...] = ("deeplabv3plus_resnet18",) # with consistency, see semi_arms
    arms: tuple[str, ...] = ("both", "labels", "semi", "jigsaw") # of the grid's networks; see ARMS
    open: bool = True # also train the grid with all edges open?
    random: int = 6 # number of random architectures of equal cost; the first has all arms
    only: str = "*" # names of runs, as a shell pattern
    workers: int = 2 # runs at a time
    threads: int = 1 # of each run

    def __post_init__(self):
        check_fields(self, least=dict(size=(33, 33), crop=(33, 33), steps=1, search_steps=1,
                                      trial_steps=1, random=0, workers=1, threads=1),
                     ranges=dict(seeds=SEEDS))
        unknown = [name for name in (*self.rivals, *self.semi_rivals) if name not in BASELINES]
        if unknown:
            raise ValueError(f"there is no hand-crafted network {unknown[0]!r}; known: "
                             f"{', '.join(BASELINES)}")
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown: raise ValueError(f"there is no arm {unknown[0]!r}; known: {', '.join(ARMS)}")
        unknown = [name for name in self.searches if name not in SEARCHES]
        if unknown:
            raise ValueError(f"there is no further search {unknown[0]!r}; known: "
                             f"{', '.join(SEARCHES)}")
        for name in ("fractions", "seeds", "lrs", "arms"):
            if not getattr(self, name): raise ValueError(f"{name} must not be empty")

# parameters of each arm that differ from the defaults
ARMS = {"labels": dict(w_jig=0., w_semi=0.), "jigsaw": dict(w_semi=0.), "semi": dict(w_jig=0.),
        "both": {},
        "light": dict(w_jig=0., w_semi=.3),
        # soft targets instead of pseudo-labels, which suppress rare classes
        "teacher": dict(w_jig=0., consistency="mean_teacher", w_semi=10.),
        # only labels, initialised with the weights of the search
        "inherit": dict(w_jig=0., w_semi=0., initialise="inherit")}
# further searches: their parameters, and the arms of their networks
SEARCHES = {"searched_again": (dict(seed=1), ("labels",)),
            "searched_by_labels": (ARMS["labels"], ("labels",)),
            "searched_by_jigsaw": (dict(w_sup=0., w_semi=0.), ("labels", "inherit"))}

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
            **ARMS[arm], **model}

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

def routes(config: CampaignConfig, fraction: float) -> list:
    "Names of a fraction's networks of the grid; none before the search is done."
    def exists(name): return (Path(config.folder)/f"{fraction:g}"/f"{name}.json").exists()
    names = ["searched", *(["open"] if config.open else []),
             *(f"random-{i}" for i in range(config.random)),
             *(name for name in config.searches if exists(name))]
    return names if exists("searched") else []

def semi_arms(config: CampaignConfig) -> list:
    "The arms with consistency and without jigsaw, which also apply to hand-crafted networks."
    return [arm for arm in config.arms if ARMS[arm].get("w_jig") == 0
            and ARMS[arm].get("w_semi", 1) > 0] or ["semi"]

def plan(config: CampaignConfig) -> list[Run]:
    "The runs that are known now, in order."
    first = config.fractions[0]
    runs = [search_run(config, first)]
    rivals = list(dict.fromkeys([*config.rivals, *config.semi_rivals]))
    for network in [*rivals, *routes(config, first)[:1]]: runs += trial_runs(config, network)
    for seed in config.seeds:
        for fraction in config.fractions:
            if seed == config.seeds[0]:
                if fraction != first: runs.append(search_run(config, fraction))
                runs += [search_run(config, fraction, network) for network in config.searches]
            searched, *further = routes(config, fraction) or [None]
            pairs = ([(searched, arm) for arm in config.arms if searched]
                     + [(network, "labels") for network in config.rivals])
            pairs += [(network, arm) for network in config.semi_rivals
                      for arm in semi_arms(config)]
            for network in further:
                arms = (SEARCHES[network][1] if network in SEARCHES
                        else [arm for arm in config.arms if arm != "inherit"]
                        if network in ("open", "random-0") else ["labels"])
                pairs += [(network, arm) for arm in arms]
            rates = {network: best_lr(config, network if network in BASELINES else "searched")
                     for network, _ in pairs}
            runs += [compared_run(config, fraction, network, arm, seed, rates[network])
                     for network, arm in pairs if rates[network]]
    return [run for run in runs if fnmatch(run.name, config.only)]

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

# ---- Processes: one per stage, several at a time

# arguments of Python for the command `selfsupnas`
COMMAND = ("-c", "from selfsupnas.cli import main; raise SystemExit(main())")

def command_words(folder: Path, stage: str, parameters: dict) -> list:
    """The arguments of `selfsupnas` for one stage, which resumes from its checkpoint; an existing
    record is older than that of the stage before and is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [stage, "--folder", str(folder)]
    if (folder/f"{stage}-record.json").exists(): parameters = {**parameters, "overwrite": True}
    for key, value in parameters.items():
        words += ["-p", key, "null" if value is None else str(value)]
    return words

def assign_gpu(slot: int) -> dict:
    "Environment variables that give each concurrent run a GPU; none if there is only one GPU."
    every = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if len(gpus) > 1 else {}

def start_stage(config, # has folder and threads
                name: str, stage: str, parameters: dict,
                slot: int = 0, # number among the concurrent runs
               ) -> subprocess.Popen:
    "Start one stage of a run as a process that prints to STAGE.log in its folder."
    folder = Path(config.folder)/name/stage
    words = command_words(folder, stage, parameters)
    with open(folder/f"{stage}.log", "a", encoding="utf8") as log:
        return subprocess.Popen([sys.executable, *COMMAND, *words], stdout=log, stderr=log,
                                start_new_session=True,
                                env={**os.environ, **assign_gpu(slot),
                                     "OMP_NUM_THREADS": str(config.threads)})

def reason(log: Path, stage: str, status: int) -> str:
    "Why a run failed, in one line: its last output, or its exit status."
    text = log.read_text(encoding="utf8", errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    messages = [line for line in lines if line.startswith(f"selfsupnas {stage}: ")]
    last = (messages or lines or ["no output"])[-1]
    if f"selfsupnas {stage}: running" in last:
        last = f"it ended with status {status}" + " (killed; out of memory?)" * (status < 0)
    return f"{last} (more in {log})"

def stop_stage(process: subprocess.Popen):
    "Stop a stage and its kernel after the current step is done and saved."
    if process.poll() is None: os.killpg(process.pid, signal.SIGTERM)
    process.wait()

def drive(look: Callable, # returns the current list of (run, its stages without a record)
          start: Callable, # name of a run, stage, parameters, slot below `workers` -> process
          ended: Callable, # run, stage, exit status -> did it succeed?
          workers: int, what: str, # concurrent processes; title of the progress bar
          pause: float = 1.) -> list: # seconds between checks of the processes
    "Run missing stages, `workers` at a time, each once; returns the names of failed runs."
    # running: name -> (run, stage, slot, process)
    running, failed, bar = {}, [], progress_bar(desc=what, unit="run")
    try:
        while True:
            runs = look()
            todo = [(run, missing[0]) for run, missing in runs if missing
                    and run.name not in (*running, *failed)]
            for run, (stage, parameters) in todo[:workers - len(running)]:
                slot = min({*range(workers)} - {k for _, _, k, _ in running.values()})
                running[run.name] = run, stage, slot, start(run.name, stage, parameters, slot)
            bar.total, bar.n = len(runs), sum(not missing for _, missing in runs)
            bar.set_postfix_str(", ".join(running)); bar.refresh()
            if not running: return failed
            while all(process.poll() is None for *_, process in running.values()): time.sleep(pause)
            for run, stage, _, process in [entry for entry in running.values()
                                           if entry[-1].poll() is not None]:
                del running[run.name]
                if not ended(run, stage, process.poll()): failed.append(run.name)
    finally:
        with deferred_interrupts(): # a second ctrl-C must not leave runs behind
            for *_, process in running.values(): stop_stage(process)
        bar.close()

# ---- Running a comparison

def keep_records(config: CampaignConfig, run: Run):
    "Copy the records and architectures of a finished run to the folder of records."
    for stage, _ in run.stages if config.records else ():
        for name in [f"{stage}-record.json"] + ["architecture.json"] * (stage == "search"):
            source, copy = (Path(place)/run.name/stage/name
                            for place in (config.folder, config.records))
            if source.exists() and not (copy.exists() and copy.read_bytes() == source.read_bytes()):
                write_json(copy, json.loads(source.read_text(encoding="utf8")))

def drop_checkpoints(config: CampaignConfig, run: Run):
    "Remove the checkpoints of a finished run."
    for stage, _ in run.stages:
        folder = Path(config.folder)/run.name/stage
        for path in (*checkpoint_paths(folder), folder/"best.pt"): path.unlink(missing_ok=True)

def outcome(record: RunRecord) -> str:
    "The main metric of a stage; of a search, that of its derived network with inherited weights."
    metrics = record.metrics
    if record.stage == "evaluate":
        return f"{metrics['split']} mIoU {miou_text(next(iter(metrics['rows'].values()))['miou'])}"
    if record.stage == "search" and not record.parameters.get("w_sup", 1): # no labels
        return f"val jigsaw accuracy {metrics['jigsaw_val_accuracy']:.3f}"
    miou = metrics.get("val_miou", metrics.get("derived_inherited_val_miou"))
    return f"val mIoU {miou_text(miou)}"

def run_campaign(config: CampaignConfig,
                 start=start_stage, # start(config, name, stage, parameters, slot) -> process
                 pause: float = 1., # seconds between checks of the processes
                ) -> list:
    """Make all runs without a record, `config.workers` at a time, and return the names of failed
    runs; ValueError if `config.only` matches no run."""
    make_splits(config)
    make_routes(config)
    if not plan(config):
        known = plan(dataclasses.replace(config, only="*"))
        raise ValueError(f"only={config.only!r} matches no run; there are now {len(known)}, from "
                         f"{known[0].name} to {known[-1].name} (further runs are added when "
                         "searches and trials are done)")
    def look():
        make_routes(config)
        runs = [(run, missing_stages(config, run)) for run in plan(config)]
        for run, missing in runs:
            if missing: continue
            keep_records(config, run)
            drop_checkpoints(config, run)
        return runs
    return drive(look, functools.partial(start, config),
                 functools.partial(comparison_ended, config), config.workers, "compare", pause)

def comparison_ended(config: CampaignConfig, run: Run, stage: str,
                     status: int) -> bool:
    "Print the result of a stage of a run; returns whether it succeeded."
    record = record_of(config, run.name, stage)
    if status or record is None:
        log = Path(config.folder)/run.name/stage/f"{stage}.log"
        print(f"compare: {run.name} {stage} FAILED: {reason(log, stage, status)}", flush=True)
        return False
    seconds = sum(v for k, v in record.timings.items() if k not in ("step_ms", "latency"))
    print(f"compare: {run.name} {stage}: {outcome(record)}, {seconds:.0f} s", flush=True)
    return True

# ---- The command

def compare(args) -> list:
    """Make the runs of a comparison and print its table, or list its parameters; returns the names
    of failed runs."""
    if args.parameters:
        print("Parameters of a comparison, to be set with -p NAME VALUE:",
              describe(CampaignConfig), sep="\n")
        return []
    pairs = args.pairs + ([("folder", args.folder)] if args.folder else [])
    config = from_parameters(CampaignConfig, parse_parameters(CampaignConfig, pairs))
    failed, results = run_campaign(config), compared(config.folder, config.records)
    if results: print(align_table(comparison_table(results)))
    return failed

def make_parser() -> argparse.ArgumentParser:
    "The arguments of the command."
    parser = argparse.ArgumentParser(prog="campaign.py", description=__doc__.splitlines()[0],
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "method, rivals, ablations, seeds; can be stopped and resumed"
    command = commands.add_parser("compare", help=text, description=text, allow_abbrev=False)
    command.add_argument("-p", nargs=2, action="append", default=[], dest="pairs",
                         metavar=("NAME", "VALUE"), help="set a parameter; may be repeated")
    command.add_argument("--folder", help="folder of the results; default: runs/campaign")
    command.add_argument("--parameters", action="store_true", help="list them and stop")
    return parser

def interrupt(number: int, frame):
    "Treat SIGTERM as ctrl-C, so that started processes are stopped first."
    raise KeyboardInterrupt(number)

def main(argv=None) -> int:
    "The command; returns its status: 0, 1 (a run failed), 2 (invalid arguments) or 130 (stopped)."
    args = make_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, interrupt)
    try: failed = compare(args)
    except KeyboardInterrupt as e:
        print(f"campaign.py {args.command}: stopped; repeat the command to continue",
              file=sys.stderr)
        return 128 + (e.args or (signal.SIGINT,))[0]
    except (ValueError, TypeError, OSError, ImportError, FolderInUse) as e:
        print(f"campaign.py {args.command}: {e}", file=sys.stderr)
        return 2
    if failed:
        print(f"campaign.py {args.command}: {len(failed)} failed: {', '.join(failed)}",
              file=sys.stderr)
    return int(bool(failed))

if __name__ == "__main__": sys.exit(main())
