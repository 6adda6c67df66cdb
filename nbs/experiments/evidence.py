"""The runs of the plan in evidence.ipynb: do unlabelled images make network and search better?

    python nbs/experiments/evidence.py --processes 2

CamVid and VOC-animals are in SELFSUPNAS_DATA. Each run leaves its records in records/evidence; runs
that have them are skipped, stopped runs resume. `--only` selects names of runs by a shell pattern,
`--list` prints those that are missing.
"""
import argparse, contextlib, fnmatch, multiprocessing, os, shutil, sys, time, traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
RECORDS = HERE/"records/evidence"
RUNS, KEPT = "RUNS", "KEPT" # in a parameter: the folder of the runs, that of the records

class Run(NamedTuple):
    stages: dict # stage -> its parameters that differ from the defaults
    needs: tuple = () # names of runs whose files it reads

# ---- The plan

# name -> parameters, fractions of the labels
SETS = {"camvid": (dict(data="camvid", size=(192, 256)), (1 / 16, 1 / 8)),
        "voc-animals": (dict(data="folder", root="runs/voc-animals"), (1 / 32, 1 / 8))}
DRAWS = range(6) # of the labels; also the seed of weights and views
CROP, STEPS = (128, 160), 3200
LABELS = dict(w_jig=0., w_semi=0.)
# self-training: the network of `labels` of the same draw makes soft targets
UNLABELLED = dict(w_jig=0., consistency="mean_teacher", w_semi=10., ramp=(0., 0.))
# the same term and the same teacher on the labelled images
ARMS = {"labels": LABELS, "control": dict(UNLABELLED, consistency_images="labelled"),
        "unlabelled": UNLABELLED}

def route(name: str) -> str: # of a dataset
    "The fixed route: that of records/camvid-long with half its channels."
    return f"{KEPT}/route-{name}.json"

def training(parameters: dict, architecture: str, seed: int, arm: dict, steps: int = STEPS,
             fraction: float = 1 / 8) -> dict:
    "Stages of a training, with its evaluation on the test images."
    return {"retrain": dict(parameters, crop=CROP, label_fraction=fraction, steps=steps, seed=seed,
                            architecture=architecture, checkpoints=1, **arm),
            "evaluate": dict(baselines=())}

def arms_of(group: str, draw: int, parameters: dict, name: str, fraction: float) -> dict:
    "The trainings of all arms, GROUP/ARM/DRAW; the first is the teacher of the others."
    teacher, plan = f"{group}/labels/{draw}", {}
    for arm, own in ARMS.items():
        taught = arm != "labels"
        if taught: own = dict(own, teacher=f"{RUNS}/{teacher}/retrain")
        plan[f"{group}/{arm}/{draw}"] = Run(
            training(parameters, route(name), draw, own, fraction=fraction), (teacher,) * taught)
    return plan

def share(fraction: float) -> str: return "all" if fraction == 1 else f"1-{round(1 / fraction)}"

def draw_of(cells: list, draw: int) -> dict: # pairs of set and fraction
    "All arms of a draw in a row: on the same machine."
    teachers, taught = {}, {}
    for name, fraction in cells:
        arms = arms_of(f"{name}/{share(fraction)}", draw, SETS[name][0], name, fraction)
        (teacher,) = (run for run in arms if "/labels/" in run)
        teachers[teacher] = arms.pop(teacher)
        taught |= arms
    return teachers | taught # after all teachers, which no other process then trains

def references(name: str, fraction: float, draw: int) -> dict:
    "Labels alone for about as many seconds as the other arms, and with all labels."
    parameters, plan = SETS[name][0], {}
    for arm, own in (f"{share(fraction)}/labels-9600", dict(steps=9600, fraction=fraction)), (
            "all/labels", dict(fraction=1.)):
        plan[f"{name}/{arm}/{draw}"] = Run(training(parameters, route(name), draw, LABELS, **own))
    return plan

def networks() -> dict:
    "Questions 1 and 5: unlabelled images in the training of one fixed route."
    plan = {}
    for draw in DRAWS:
        plan |= draw_of([(name, fraction) for name, (_, fractions) in SETS.items()
                         for fraction in fractions], draw)
        for name, (_, fractions) in SETS.items() if draw < 3 else ():
            plan |= references(name, fractions[0], draw)
    return plan

# ---- The second plan: question 1 with fewer labels

FEW = {"camvid": 1 / 64, "voc-animals": 1 / 128}

def few_labels() -> dict:
    "The arms of question 1 with fewer labels."
    plan = {}
    for draw in DRAWS: plan |= draw_of([*FEW.items()], draw)
    for draw in range(3):
        for name, fraction in FEW.items(): plan |= references(name, fraction, draw)
    return plan

EXPLORED = 100 # a draw that no plan uses
HARD = dict(w_jig=0., consistency="fixmatch", w_semi=1., ramp=(0., 0.), threshold=0.)
# other recipes -> their arm of FEW that is the teacher, their parameters
RECIPES = {"hard": ("labels", HARD),
           "hard-control": ("labels", dict(HARD, consistency_images="labelled")),
           "second": ("control", ARMS["unlabelled"]),
           "second-control": ("control", ARMS["control"])}

def exploration() -> dict:
    "What the second plan rests on: one draw, validation images alone."
    def trained(data, arm, fraction, own, architecture=None, teacher=None):
        group = f"exploration/{data}/{share(fraction)}"
        needs = (f"{group}/{teacher}/{EXPLORED}",) if teacher else ()
        if teacher: own = dict(own, teacher=f"{RUNS}/{needs[0]}/retrain")
        stages = training(SETS[data][0], route(architecture or data), EXPLORED, own,
                          fraction=fraction)
        return {f"{group}/{arm}/{EXPLORED}": Run({"retrain": stages["retrain"]}, needs)}
    plan = {}
    for data, fraction in FEW.items():
        for arm, own in ARMS.items():
            plan |= trained(data, arm, fraction, own, teacher=None if arm == "labels" else "labels")
    for arm, (teacher, own) in RECIPES.items():
        plan |= trained("camvid", arm, FEW["camvid"], own, teacher=teacher)
    fast = dict(LABELS, lr=1e-2)
    plan |= trained("voc-animals", "48-channels", 1., LABELS, "voc-animals-48")
    plan |= trained("voc-animals", "rate-0.01", 1., fast)
    return plan | trained("voc-animals", "rate-0.01-weighted", 1.,
                          dict(fast, class_weights="median_frequency"))

SEEDS = range(5) # of searches
SPACE = dict(layers=8, channels=24, budget=.5, steps=800, crop=CROP, label_fraction=1 / 8,
             candidates=1) # chosen by importance: no label of a validation image
EVERYTHING = dict(w_jig=.5, w_semi=1., consistency="fixmatch")
SIGNALS = {"labels": LABELS, "jigsaw": dict(w_sup=0., w_jig=.5, w_semi=0.),
           "everything": EVERYTHING, # the next one: the best of 8 on 32 validation images
           "everything-8": dict(EVERYTHING, candidates=8)}
RANDOM = range(20)
SIMPLE = "thinner", "shallower", "fine", "narrow_unet", "fast_scnn", "batch_norm_route"
ROUTE_STEPS = 1600 # of the training of a route, with labels alone

def searches() -> dict:
    "Questions 2 and 3: searches with three signals, random routes, simple networks of equal cost."
    parameters, plan = SETS["camvid"][0], {}
    def trained(architecture, seed, needs=(), **own):
        return Run(training(parameters, architecture, seed, LABELS | own, ROUTE_STEPS), needs)
    for seed in SEEDS:
        for signal, own in SIGNALS.items():
            plan[f"search/{signal}/{seed}"] = Run({"search": parameters | SPACE | dict(seed=seed)
                                                   | own})
        for signal in SIGNALS:
            search = f"search/{signal}/{seed}"
            plan[f"route/{signal}/{seed}"] = trained(f"{KEPT}/{search}/architecture.json", seed,
                                                     (search,))
        for i in RANDOM:
            if i % len(SEEDS) == seed:
                plan[f"route/random/{i}"] = trained(f"{KEPT}/random/{i}.json", seed)
        for name in SIMPLE if seed < 3 else (): # of the cost of the route of that seed
            search = f"search/everything/{seed}"
            plan[f"route/{name}/{seed}"] = trained(name, seed, (search,),
                                                   equal_cost=f"{RUNS}/{search}/search")
    return plan

def save_random_routes(folder: Path):
    "Random architectures of the searches' space and budget, each from its own seed."
    from selfsupnas.rivals import random_architecture
    from selfsupnas.space.architecture import save_architecture
    from selfsupnas.space.budget import measure_costs, static_cost
    from selfsupnas.space.grid import SearchSpace
    space = SearchSpace(11, SPACE["layers"], SPACE["channels"])
    table = measure_costs(space, CROP)
    for i in RANDOM:
        save_architecture(random_architecture(
            space, lambda selected: static_cost(table, selected), SPACE["budget"] * table.full, i),
            folder/f"random/{i}.json")

RIVALS = "lraspp_mobilenet_v3_large", "deeplabv3plus_resnet18", "unet_resnet18"
RATES = 1e-4, 3e-4, 1e-3, 3e-3, 1e-2

def rivals() -> dict:
    "Question 4: hand-crafted networks, each with the rates of the grid; the route, too."
    parameters = SETS["camvid"][0]
    return {f"rate/{network}/{lr:g}/{seed}": Run(training(
                parameters, route("camvid") if network == "route" else network, seed,
                dict(LABELS, lr=lr), 800))
            for seed in range(2) for network in ("route", *RIVALS) for lr in RATES}

def lengths() -> dict:
    "Question 5: accuracy over the number of steps; what is missing here is in question 1."
    (parameters, fractions), plan = SETS["camvid"], {}
    for steps, group in {800: "steps/800/labels", 9600: "camvid/1-16/labels-9600"}.items():
        for seed in range(3):
            def trained(arm, *needs):
                return Run(training(parameters, route("camvid"), seed, arm, steps, fractions[0]),
                           needs)
            teacher = f"{group}/{seed}"
            if steps == 800: plan[teacher] = trained(LABELS)
            plan[f"steps/{steps}/unlabelled/{seed}"] = trained(
                dict(UNLABELLED, teacher=f"{RUNS}/{teacher}/retrain"), teacher)
    return plan

def runs() -> dict:
    "All runs by name, the second plan first."
    return few_labels() | searches() | rivals() | networks() | lengths() | exploration()

# ---- Carrying it out

def link_data():
    "runs/voc-animals leads to the data, so that records name no folder of this machine."
    link, data = Path("runs/voc-animals"), os.environ.get("SELFSUPNAS_DATA")
    if not data: raise SystemExit("SELFSUPNAS_DATA must name a folder with camvid and voc-animals")
    link.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(Path(data).absolute()/"voc-animals")

def stage_function(stage: str) -> tuple: # -> its configuration, its function
    import selfsupnas
    names = {"search": "SearchConfig", "retrain": "RetrainConfig", "evaluate": "EvaluateConfig"}
    return getattr(selfsupnas, names[stage]), getattr(selfsupnas, stage)

def carry_out(name: str, run: Run, folder: Path, records: Path) -> dict:
    "Run all stages in folder/name, or read those that are finished; returns their metrics."
    metrics = {}
    for stage, parameters in run.stages.items():
        config, function = stage_function(stage)
        own = {key: value.replace(RUNS, str(folder)).replace(KEPT, str(records))
               if isinstance(value, str) else value for key, value in parameters.items()}
        if stage == "evaluate": own["network"] = f"{folder}/{name}/retrain"
        metrics[stage] = function(config(folder=f"{folder}/{name}/{stage}", **own)).record.metrics
    return metrics

def one_run(name: str, folder: Path, records: Path) -> str:
    "Carry out a run after those that it needs; copy its records; return a line for the log."
    os.nice(19)
    start, plan = time.time(), runs()
    (folder/name).mkdir(parents=True, exist_ok=True)
    log = open(folder/name/"log.txt", "a")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            for needed in plan[name].needs: keep_records(needed, plan, folder, records)
            metrics = keep_records(name, plan, folder, records)
        except Exception:
            traceback.print_exc()
            return f"{name}: failed, see {folder/name/'log.txt'}"
    figures = [f"{key} {value:.4f}" for of in metrics.values() for key, value in of.items()
               if key.endswith("val_miou") and value is not None]
    return f"{name}: {', '.join(figures)}; {time.time() - start:.0f} s"

def keep_records(name: str, plan: dict, folder: Path, records: Path) -> dict:
    "Carry out one run and copy its records, and its architecture if it searched one."
    metrics = carry_out(name, plan[name], folder, records)
    target = records/name
    target.mkdir(parents=True, exist_ok=True)
    for stage in plan[name].stages:
        place = folder/name/stage
        if not (target/f"{stage}-record.json").exists():
            shutil.copy(place/f"{stage}-record.json", target)
            if stage == "search": shutil.copy(place/"architecture.json", target)
    return metrics

def missing(records: Path, pattern: str = "*") -> list:
    "Names of the runs without a record of each stage."
    return [name for name, run in runs().items() if fnmatch.fnmatch(name, pattern)
            and any(not (records/name/f"{stage}-record.json").exists() for stage in run.stages)]

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--only", default="*")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    names = missing(args.records, args.only)
    if args.list: return print("\n".join(names))
    link_data()
    args.records = Path(os.path.relpath(args.records))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"),
                             max_tasks_per_child=1) as pool:
        for work in [pool.submit(one_run, name, args.folder, args.records) for name in names]:
            work.add_done_callback(lambda w: print(w.exception() or w.result(), flush=True))

if __name__ == "__main__": sys.exit(main())
