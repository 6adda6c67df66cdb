"""A stage at each point of a grid of parameters. Copy this file, edit SWEEP, and run the copy:

    snakemake -s sweep.smk -n -p                        the plan, with the commands
    snakemake -s sweep.smk --cores 2 --keep-going       two runs at a time on this machine
    snakemake -s sweep.smk --executor slurm --jobs 20 --keep-going --default-resources gpu=1
    snakemake -s sweep.smk --unlock                     once, after snakemake itself was killed

The extra `workflow` installs snakemake; a queue such as Slurm also needs its plugin (pip install
snakemake-executor-plugin-slurm) and a folder that all machines share. Paths are relative to the
folder in which the command is run.

The same command continues a stopped sweep. A point is done when its record exists: only points
without one are planned, so that no change of code, of times or of this file repeats a run or
removes its record. A record with other parameters is an error. With several GPUs, each run has one
of its own: set --cores to their number, times `threads`.
"""
import itertools, os, re, shlex, sys
from pathlib import Path

from selfsupnas.cli import STAGES, align_table, check_inputs, option_words
from selfsupnas.train.checkpoint import finished_run
from selfsupnas.viz.tables import read_records, record_value, summarise, to_markdown

SWEEP = {
    "stage": "search", # or retrain
    "folder": "runs/sweep", # of all runs
    "grid": {"seed": [0, 1, 2], "budget": [0.3, 0.5]},
    "parameters": {}, # of all points, such as {"size": [64, 80]}; see selfsupnas STAGE --help
    "threads": 1, # of each run
    # columns of the table at the end, with their headers; those that no record has are left out
    "metrics": {"derived_inherited_val_miou": "val mIoU, inherited", # of a search
                "realised_share": "realised cost / full",
                "derived_gflops": "GFLOPs (1e9 multiply-adds)",
                "val_miou": "val mIoU", "gflops": "GFLOPs (1e9 multiply-adds)"}, # of a retraining
} | config # from --configfile FILE.yaml; single texts and numbers also from --config folder=OTHER

STAGE, GRID = SWEEP["stage"], SWEEP["grid"]

# ---- The points: every one is checked before the first run starts

def point_name(values: dict) -> str:
    texts = (f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
             for name, value in values.items())
    return re.sub(r"[^\w.,=+-]+", "-", ",".join(texts))

def record_file(point: str) -> str: return f"{SWEEP['folder']}/{point}/{STAGE}/{STAGE}-record.json"

if STAGE not in STAGES: raise ValueError(f"there is no stage {STAGE!r}; known: {', '.join(STAGES)}")
if not SWEEP["folder"]: raise ValueError("folder is empty")
if not (isinstance(GRID, dict) and GRID
        and all(isinstance(values, list) and values for values in GRID.values())):
    raise ValueError(f"grid must have a list of values for each parameter, not {GRID}")
POINTS, MISSING = {}, [] # name -> parameters; names of the points without a record
for values in itertools.product(*GRID.values()):
    point = dict(zip(GRID, values))
    name = point_name(point)
    if name in POINTS: raise ValueError(f"two points of the grid have the name {name}")
    run = STAGES[STAGE](**SWEEP["parameters"], **point, folder=Path(record_file(name)).parent)
    check_inputs(STAGE, run)
    if not finished_run(run, STAGE): MISSING.append(name)
    POINTS[name] = SWEEP["parameters"] | point

def command_words(wildcards) -> list:
    options = [option_words(name, value) for name, value in POINTS[wildcards.point].items()]
    return [STAGE, "--folder", str(Path(record_file(wildcards.point)).parent), *sum(options, [])]

# ---- GPUs: each run locks one of several; a queue assigns its own

def lock_gpu() -> str:
    "Shell text that waits for a free GPU and takes it; no text with one GPU or none."
    import torch
    every = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    locks = shlex.quote(f"{SWEEP['folder']}/gpu-")
    return (f"until for gpu in {' '.join(gpus)}; do exec 9>{locks}$gpu.lock; flock -n 9 && break; "
            "done; do sleep 1; done; export CUDA_VISIBLE_DEVICES=$gpu; " if len(gpus) > 1 else "")

rule all:
    input: [record_file(name) for name in MISSING]

# The record is the only output, because Snakemake removes the outputs of a failed or repeated job.
rule point:
    output: record_file("{point}")
    log: f"{SWEEP['folder']}/{{point}}/{STAGE}/{STAGE}.log"
    threads: SWEEP["threads"]
    params: gpu=lock_gpu(), words=command_words
    shell: "{params.gpu}exec selfsupnas {params.words:q} >{log:q} 2>&1"

# ---- What is printed at the end

def table() -> str:
    "Mean and spread over seeds at each other point of the grid; no text without records."
    files = [record_file(name) for name in POINTS if Path(record_file(name)).exists()]
    if not files: return ""
    by = {f"parameters.{name}": name for name in GRID if name != "seed"}
    records = sorted(read_records(*files), key=lambda record: files.index(record["file"]))
    metrics = {name: header for name, header in SWEEP["metrics"].items()
               if any(record_value(record, name) is not None for record in records)}
    rows = summarise(records, list(by), list(metrics))
    for row in rows: row |= {name: str(row[name]) for name in by}
    return align_table(to_markdown(rows, by | metrics))

def report(log=None):
    for name in POINTS:
        file = Path(record_file(name)).with_name(f"{STAGE}.log")
        if Path(record_file(name)).exists() or not file.exists(): continue
        lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
        own = [line for line in lines if line.startswith(f"selfsupnas {STAGE}: ")]
        last = (own or lines or ["no output"])[-1]
        if last.startswith(f"selfsupnas {STAGE}: running"): last = "it was killed (out of memory?)"
        print(f"sweep: {name} has no record: {last} (see {file})", file=sys.stderr)
    print(table(), file=sys.stderr)

onsuccess: report()
onerror: report()
