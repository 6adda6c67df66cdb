"""Runs of a plan, several at a time, for recipes.py and evidence.py: each leaves a record, and what has a record is done.

A plan is a dict from names to runs. A stopped run resumes, a failed one leaves its traceback in its log. The weights stay in
the folder of the runs; records and architectures are copied to the folder of the records, which is committed.
"""
import argparse, contextlib, fnmatch, multiprocessing, os, shutil, sys, time, traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

RUNS = "RUNS" # in a parameter: the folder of the runs

class Run(NamedTuple):
    stages: dict # stage -> parameters that differ from its defaults, without those of `WITHIN`
    needs: tuple = () # names of runs whose files it reads

# parameters that name the stage before, in the same run
WITHIN = {"retrain": {}, "search": {}, "evaluate": {"network": "retrain"}}
FILES = {"search": ("architecture.json",)} # copied beside the record

def stage_function(stage: str) -> tuple: # -> its configuration, its function
    if stage == "search":
        from selfsupnas.stages.searching import SearchConfig, search
        return SearchConfig, search
    if stage == "retrain":
        from selfsupnas.stages.retraining import RetrainConfig, retrain
        return RetrainConfig, retrain
    from selfsupnas.stages.evaluation import EvaluateConfig, evaluate
    return EvaluateConfig, evaluate

def missing_stages(name: str, run: Run, records: Path) -> list:
    return [stage for stage in run.stages if not (records/name/f"{stage}-record.json").exists()]

def carry_out(name: str, run: Run, folder: Path) -> dict:
    "Run all stages in folder/name, or read the finished ones; returns the metrics by stage."
    metrics = {}
    for stage, parameters in run.stages.items():
        config, function = stage_function(stage)
        own = {key: value.replace(RUNS, str(folder)) if isinstance(value, str) else value
               for key, value in parameters.items()}
        own |= {key: f"{folder}/{name}/{before}" for key, before in WITHIN[stage].items()}
        metrics[stage] = function(config(folder=f"{folder}/{name}/{stage}", **own)).record.metrics
    return metrics

def one_run(name: str, plan: Callable, folder: Path, records: Path) -> str:
    "Carry out a run, and those that it needs; copy its records; return a line for the log."
    os.nice(19)
    runs, start, place = plan(), time.time(), folder/name
    place.mkdir(parents=True, exist_ok=True)
    with (open(place/"log.txt", "a") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        try:
            for other in runs[name].needs: carry_out(other, runs[other], folder) # mostly finished
            metrics = carry_out(name, runs[name], folder)
        except Exception:
            traceback.print_exc()
            return f"{name}: failed, see {place/'log.txt'}"
    for stage in runs[name].stages:
        (records/name).mkdir(parents=True, exist_ok=True)
        for file in (f"{stage}-record.json", *FILES.get(stage, ())):
            shutil.copy(place/stage/file, records/name)
    figures = [f"{stage} {key} {value:.4f}" for stage, of in metrics.items()
               for key, value in of.items() if key.endswith("val_miou") and value is not None]
    return f"{name}: {', '.join(figures)}; {time.time() - start:.0f} s"

def main(doc: str, plan: Callable, folder: str, records: Path,
         prepare: Callable = lambda: None): # called once before the first run
    "The command line of a plan."
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(folder))
    parser.add_argument("--records", type=Path, default=records)
    parser.add_argument("--only", default="*", help="names of runs, as a shell pattern")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    selected = [name for name, run in plan().items() if fnmatch.fnmatch(name, args.only)
                and missing_stages(name, run, args.records)]
    if args.list: return print("\n".join(selected))
    prepare()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"),
                             max_tasks_per_child=1) as pool:
        for work in [pool.submit(one_run, name, plan, args.folder, args.records)
                     for name in selected]:
            work.add_done_callback(lambda w: print(w.exception() or w.result(), flush=True))
