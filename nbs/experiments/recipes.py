"""Trainings of one network on CamVid with many recipes, for `recipes.ipynb`.

    python nbs/experiments/recipes.py --processes 2 # CamVid is in SELFSUPNAS_DATA

Runs that have a record are skipped, and stopped runs resume. `--only` selects names of runs by a
shell pattern, `--list` prints them: STEPS/ARM/DRAW on the standard split, few-STEPS/ARM/DRAW with
11 labels, and SEQUENCE-STEPS/ARM/DRAW, in which all images of that video sequence validate and
those of the others train a thinner network.
"""
import argparse, contextlib, fnmatch, multiprocessing, os, shutil, sys, time, traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
NETWORK = os.path.relpath(HERE/"records/camvid-long/0.125/found/search/architecture.json")
THIN = os.path.relpath(HERE/"records/recipes/thin.json") # the same with 24 instead of 48 channels
# 46 labelled images; they and the initial weights depend on the seed
COMMON = dict(data="camvid", size=(192, 256), crop=(128, 160), label_fraction=1/8,
              architecture=NETWORK, w_jig=0., w_semi=1., consistency="fixmatch", recalibrate=128,
              checkpoints=1)
STRONG = dict(cutmix_p=1., cutmix_area=(.5, .5), jitter=(.4, .4, .4, .1), blur=None)
LABELS = dict(w_semi=0., **STRONG)
TEACHER = dict(consistency="mean_teacher", squares="summed", **STRONG)
CLEAN = dict(statistics="clean", **TEACHER)
LONG = dict(ramp=(.15, .5), ema_start=.15, ema_buffers="averaged", **CLEAN)
ARMS = {
    # without unlabelled images
    "labels": LABELS,
    "control-strong": dict(w_strong=1., **LABELS), # strong views of labelled images
    "control-clean": dict(w_strong=1., statistics="clean", **LABELS),
    "control-teacher": dict(consistency_images="labelled", ema_horizon=.02, **LONG),
    # batch norm by groups
    "shared": TEACHER, "clean": CLEAN, "separate": {**TEACHER, "statistics": "separate"},
    # delay and ramp
    "constant": dict(ramp=(0., 0.), **CLEAN),
    # horizon of the teacher's average, as a share of the steps
    "horizon-1": dict(ema_horizon=.01, **LONG), "horizon-2": dict(ema_horizon=.02, **LONG),
    "horizon-6": dict(ema_horizon=.06, **LONG),
    # weight, with and without strong views of the labelled images
    "weight-0.3": dict(w_semi=.3, ema_horizon=.02, **LONG),
    "weight-3": dict(w_semi=3., ema_horizon=.02, **LONG),
    "strong+teacher": dict(w_strong=1., ema_horizon=.02, **LONG),
    # hard targets
    "hard-0.8": {**LONG, "ema_horizon": .02, "consistency": "fixmatch"},
    "hard-relative": {**LONG, "ema_horizon": .02, "consistency": "fixmatch", "threshold": .9,
                      "threshold_kind": "relative"},
    "unimatch-0": {**CLEAN, "consistency": "unimatch", "threshold": 0., "ramp": (.15, .5)},
}
LONGER = ("labels", "control-strong", "clean", "horizon-2", "strong+teacher", "shared")
DRAWS = 0, 1
# with 11 labelled images, the question is whether labels alone stop improving earlier
FEW = ("labels", "control-teacher", "horizon-2", "weight-0.3")
FEW_DRAWS = 0, 1, 2
# The validation images of the standard split are from 0016E5, like 204 of the 367 that train. Those
# of a sequence that does not train ask what a network knows of a new one.
OLD = dict(consistency="mean_teacher", w_semi=10.) # `teacher` of records/camvid-long
UNSEEN = {"labels": dict(w_semi=0.), "old-teacher": OLD,
          "control-old-teacher": dict(consistency_images="labelled", **OLD),
          # the network of `labels` as the teacher of another one
          "self-training": dict(ramp=(0., 0.), **OLD),
          "control-self-training": dict(ramp=(0., 0.), consistency_images="labelled", **OLD)}
SEQUENCES = "0006R0", "0016E5" # those with more than 100 images

def runs() -> dict:
    "Parameters by name; the longest runs first, so that no process idles at the end."
    few = {f"few-3200/{arm}/{draw}": dict(COMMON, **ARMS[arm], label_fraction=1/32, steps=3200,
                                          seed=draw) for draw in FEW_DRAWS for arm in FEW}
    unseen = {f"{sequence}-3200/{arm}/{draw}": dict(COMMON, **own, steps=3200, seed=draw,
                                                    architecture=THIN,
                                                    root=f"runs/camvid-but-{sequence}")
              for sequence in SEQUENCES for arm, own in UNSEEN.items() for draw in DRAWS}
    for name, parameters in unseen.items():
        if "self-training" in name:
            sequence, _, draw = name.split("/")
            parameters["teacher"] = f"runs/recipes/{sequence}/labels/{draw}"
    standard = {f"{steps}/{arm}/{draw}": dict(COMMON, **ARMS[arm], steps=steps, seed=draw)
                for steps, arms in ((3200, LONGER), (800, ARMS), (1600, LONGER))
                for draw in DRAWS for arm in arms}
    return few | unseen | standard

def hold_out(sequence: str, root: str):
    """Links to CamVid in `root`: images of a video sequence validate, those of the others train;
    the test images of the standard split are left out."""
    source = Path(os.environ["SELFSUPNAS_DATA"]).absolute()/"camvid"
    for split in ("train", "val"):
        for image in sorted((source/split).iterdir()):
            target = Path(root)/("val" if image.name.startswith(sequence) else "train")
            mask = source/f"{split}annot"/f"{image.stem}.png"
            for file, folder in ((image, target), (mask, target.with_name(f"{target.name}annot"))):
                folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError): (folder/file.name).symlink_to(file)

def one_run(name: str, parameters: dict, folder: Path, records: Path) -> str:
    "Train one network, copy its record, and return a line for the log."
    place = folder/name
    place.mkdir(parents=True, exist_ok=True)
    os.nice(19)
    with open(place/"log.txt", "a") as log, contextlib.redirect_stdout(log):
        with contextlib.redirect_stderr(log):
            from selfsupnas.stages.retraining import RetrainConfig, retrain
            start = time.time()
            try: result = retrain(RetrainConfig(folder=str(place), **parameters))
            except Exception:
                traceback.print_exc()
                return f"{name}: failed, see {place/'log.txt'}"
    target = records/name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(place/"retrain-record.json", target)
    metrics = result.record.metrics
    return (f"{name}: val mIoU {metrics['val_miou']:.4f}, as trained "
            f"{metrics['val_miou_before_recalibration']:.4f}, {time.time() - start:.0f} s")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--records", type=Path, default=HERE/"records/recipes")
    parser.add_argument("--only", default="*")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    selected = {name: parameters for name, parameters in runs().items()
                if fnmatch.fnmatch(name, args.only)
                and not (args.records/name/"retrain-record.json").exists()}
    if args.list: return print("\n".join(selected))
    for sequence in SEQUENCES:
        if any(name.startswith(sequence) for name in selected):
            hold_out(sequence, f"runs/camvid-but-{sequence}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"),
                             max_tasks_per_child=1) as pool:
        for work in [pool.submit(one_run, name, parameters, args.folder, args.records)
                     for name, parameters in selected.items()]:
            work.add_done_callback(lambda w: print(w.exception() or w.result(), flush=True))

if __name__ == "__main__": sys.exit(main())
