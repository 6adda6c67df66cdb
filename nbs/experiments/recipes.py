"""Trainings of one network on CamVid by many recipes, for `recipes.ipynb`; several at a time.

    python nbs/experiments/recipes.py --processes 2 # SELFSUPNAS_DATA says where CamVid is

A run that has a record is passed over, and one that was stopped goes on. `--only` takes names of
runs (STEPS/ARM/DRAW) as a shell pattern, `--list` prints them.
"""
import argparse, contextlib, fnmatch, multiprocessing, os, shutil, sys, time, traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
NETWORK = os.path.relpath(HERE/"records/camvid-long/0.125/found/search/architecture.json")
# 46 labelled images; which ones, and the weights at the start, are drawn from the seed
COMMON = dict(data="camvid", size=(192, 256), crop=(128, 160), label_fraction=1/8,
              architecture=NETWORK, w_jig=0., recalibrate=128, checkpoints=1)
STRONG = dict(cutmix_p=1., cutmix_area=(.5, .5), jitter=(.4, .4, .4, .1), blur=None)
LABELS = dict(w_semi=0., **STRONG)
TEACHER = dict(consistency="mean_teacher", squares="summed", **STRONG)
CLEAN = dict(statistics="clean", **TEACHER)
LONG = dict(ramp=(.15, .5), ema_start=.15, ema_buffers="averaged", **CLEAN)
ARMS = {
    # without an unlabelled image
    "labels": LABELS,
    "control-strong": dict(w_strong=1., **LABELS), # strong views of labelled images and labels
    "control-clean": dict(w_strong=1., statistics="clean", **LABELS),
    "control-teacher": dict(consistency_images="labelled", ema_horizon=.02, **LONG),
    # batch norm by groups (RECIPES 1 and 5)
    "shared": TEACHER, "clean": CLEAN, "separate": {**TEACHER, "statistics": "separate"},
    # delay and ramp (3)
    "constant": dict(ramp=(0., 0.), **CLEAN),
    # memory of the teacher, as a share of the steps (4)
    "horizon-1": dict(ema_horizon=.01, **LONG), "horizon-2": dict(ema_horizon=.02, **LONG),
    "horizon-6": dict(ema_horizon=.06, **LONG),
    # weight (6), with and without strong views of the labelled images
    "weight-0.3": dict(w_semi=.3, ema_horizon=.02, **LONG),
    "weight-3": dict(w_semi=3., ema_horizon=.02, **LONG),
    "strong+teacher": dict(w_strong=1., ema_horizon=.02, **LONG),
    # hard targets (7)
    "hard-0.8": {**LONG, "ema_horizon": .02, "consistency": "fixmatch"},
    "hard-relative": {**LONG, "ema_horizon": .02, "consistency": "fixmatch", "threshold": .9,
                      "threshold_kind": "relative"},
    "unimatch-0": {**CLEAN, "consistency": "unimatch", "threshold": 0., "ramp": (.15, .5)},
}
LONGER = ("labels", "control-strong", "clean", "horizon-2", "strong+teacher", "shared")
DRAWS = 0, 1

def runs() -> dict: # name -> parameters; the long ones first, so that they do not end alone
    return {f"{steps}/{arm}/{draw}": dict(COMMON, **ARMS[arm], steps=steps, seed=draw)
            for steps, arms in ((3200, LONGER), (800, ARMS), (1600, LONGER))
            for draw in DRAWS for arm in arms}

def one_run(name: str, parameters: dict, folder: Path, records: Path) -> str:
    place = folder/name
    place.mkdir(parents=True, exist_ok=True)
    os.nice(10)
    with open(place/"log.txt", "a") as log, contextlib.redirect_stdout(log):
        with contextlib.redirect_stderr(log):
            from selfsupnas.stages.retraining import RetrainConfig, retrain
            start = time.time()
            try: done = retrain(RetrainConfig(folder=str(place), **parameters))
            except Exception:
                traceback.print_exc()
                return f"{name}: failed, see {place/'log.txt'}"
    target = records/name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(place/"retrain-record.json", target)
    metrics = done.record.metrics
    return (f"{name}: val mIoU {metrics['val_miou']:.4f}, as trained "
            f"{metrics['val_miou_before_recalibration']:.4f}, {time.time() - start:.0f} s")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--records", type=Path, default=HERE/"records/recipes")
    parser.add_argument("--only", default="*")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    wanted = {name: parameters for name, parameters in runs().items()
              if fnmatch.fnmatch(name, asked.only)
              and not (asked.records/name/"retrain-record.json").exists()}
    if asked.list: return print("\n".join(wanted))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(asked.processes, multiprocessing.get_context("spawn"),
                             max_tasks_per_child=1) as pool:
        for work in [pool.submit(one_run, name, parameters, asked.folder, asked.records)
                     for name, parameters in wanted.items()]:
            work.add_done_callback(lambda w: print(w.exception() or w.result(), flush=True))

if __name__ == "__main__": sys.exit(main())
