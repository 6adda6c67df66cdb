"""A comparison of campaign.py: the method, its rivals, ablations and seeds.

    snakemake -s nbs/experiments/compare.smk -n --config folder=runs/camvid       the plan
    snakemake -s nbs/experiments/compare.smk --cores 2 --keep-going --configfile mine.yaml

After snakemake itself was killed, its command is given once with --unlock, then again without. The
extra `workflow` installs snakemake. Parameters are those of CampaignConfig, from --configfile (see
bench-quick.yaml) or --config NAME=VALUE ..., such as steps=400 seeds='(0, 1)'.

The whole plan is known from the start; a run waits for its search and its trials. Only stages
without a record are planned, so that no change of code, of times or of this file repeats a run or
removes its record. A record with other parameters is an error. The same command continues a stopped
comparison. The plan trains nothing, but it draws splits and random architectures that are missing.
"""
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from campaign import (CampaignConfig, command_words, compared, comparison_table, keep_records,
                      lock_gpu, make_routes, make_splits, missing_stages, reason, record_of,
                      whole_plan)
from selfsupnas.cli import align_table
from selfsupnas.core import from_texts

CONFIG = from_texts(CampaignConfig, dict(config))
make_splits(CONFIG)
make_routes(CONFIG)
RUNS = whole_plan(CONFIG)
if not RUNS: raise ValueError(f"only={CONFIG.only!r} matches no run")

def record_file(name: str, stage: str) -> str:
    return f"{CONFIG.folder}/{name}/{stage}/{stage}-record.json"

def stages_left(name: str) -> list:
    "The stages without a record; all stages while a record that the run needs is missing."
    run, needs = RUNS[name]
    if all(record_of(CONFIG, *need) for need in needs):
        left = [stage for stage, _ in missing_stages(CONFIG, run())]
        if left == ["evaluate"] and Path(file := record_file(name, "evaluate")).exists():
            raise ValueError(f"{file} is older than the record of its training: remove its folder")
        return left
    return [stage for stage, _ in run().stages]

LEFT = {name: left for name in RUNS if (left := stages_left(name))}

def needed(wildcards) -> list:
    "Records to wait for; those that exist, in either folder, are left out."
    needs = ([(wildcards.name, "retrain")] if wildcards.stage == "evaluate"
             else RUNS[wildcards.name][1])
    return [record_file(*need) for need in needs if need[1] in LEFT.get(need[0], ())]

def words(wildcards) -> list: # called again when the job starts: then all parameters are known
    make_routes(CONFIG)
    folder = Path(CONFIG.folder)/wildcards.name/wildcards.stage
    return command_words(folder, wildcards.stage,
                         dict(RUNS[wildcards.name][0]().stages)[wildcards.stage])

rule all:
    input: [record_file(name, left[-1]) for name, left in LEFT.items()]

rule stage:
    wildcard_constraints: stage="search|retrain|evaluate"
    input: needed
    output: record_file("{name}", "{stage}")
    log: f"{CONFIG.folder}/{{name}}/{{stage}}/{{stage}}.log"
    threads: CONFIG.threads
    params: words=words, gpu=lock_gpu(CONFIG.folder)
    shell: "{params.gpu}selfsupnas {params.words:q} >>{log:q} 2>&1 "
           "&& cd -- \"$(dirname -- {log:q})\" && rm -f checkpoint-*.pt best.pt"

def report(log=None):
    "Keep the records of finished runs; print why others failed, and the table."
    make_routes(CONFIG)
    for name, (run, _) in RUNS.items():
        left = stages_left(name)
        if not left: keep_records(CONFIG, run())
        elif (file := Path(record_file(name, left[0])).with_name(f"{left[0]}.log")).exists():
            print(f"compare: {name} {left[0]} has no record: {reason(file, left[0])}",
                  file=sys.stderr)
    results = compared(CONFIG.folder, CONFIG.records)
    if results: print(align_table(comparison_table(results)), file=sys.stderr)

onsuccess: report()
onerror: report()
