"""The sweep of nbs/experiments/sweep.smk: its points, without Snakemake; its runs, through Snakemake with a command that only writes a record; a small one with real runs, stopped and killed twice."""
import dataclasses, importlib.util, json, os, signal, subprocess, sys
from pathlib import Path

import pytest
from conftest import ROOT, hear_interrupts, same_run, wait_until

from selfsupnas.core import RunRecord
from selfsupnas.stages.retraining import RetrainConfig

SNAKEFILE = ROOT/"nbs"/"experiments"/"sweep.smk"
TINY = dict(steps=4, size=[64, 80], layers=3, channels=8, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, logs=2, budget=.8)
needs_snakemake = pytest.mark.skipif(importlib.util.find_spec("snakemake") is None, reason="needs snakemake: pip install 'selfsupnas[workflow]'")


def points(folder, **sweep):
    "The names of a sweep's Snakefile before its first rule."
    names = {"config": {"folder": str(folder), **sweep}}
    exec(SNAKEFILE.read_text().partition("\nrule all:")[0], names)
    return names


# -- The points

def test_the_file_fits_a_screen(): assert max(map(len, SNAKEFILE.read_text().splitlines())) <= 100


def test_a_grid_becomes_points_in_order(tmp_path):
    names = points(tmp_path/"new", grid={"seed": [0, 1], "label_fraction": [1 / 16, 1 / 8], "crop": [None, (64, 64)]}, parameters={"steps": 3})
    assert len(names["POINTS"]) == 8 and names["MISSING"] == list(names["POINTS"]) and list(tmp_path.iterdir()) == []
    assert list(names["POINTS"])[0] == "seed=0,label_fraction=0.0625,crop=None"
    assert list(names["POINTS"].values())[-1] == {"steps": 3, "seed": 1, "label_fraction": 1 / 8, "crop": (64, 64)}


def test_a_point_is_named_by_its_values(tmp_path):
    assert list(points(tmp_path, grid={"seed": [0], "budget": [.3, .5]})["POINTS"]) == ["seed=0,budget=0.3", "seed=0,budget=0.5"]
    assert points(tmp_path)["point_name"]({"split_folder": "splits/1_8"}) == "split_folder=splits-1_8"


@pytest.mark.parametrize("grid, parameters, said", [
    ({}, {}, "grid"), ({"seed": []}, {}, "seed"), ({"seed": 3}, {}, "seed"), ({"sede": [1]}, {}, "sede"), ({"seed": [1, "x"]}, {}, "seed"), ({"seed": [1, 1]}, {}, "seed=1"),
    ({"lr": [1e-3, 1.0000001e-3]}, {}, "lr=0.001"), ({"budget": [.5, 2.]}, {}, "budget"), ({"seed": [1]}, {"seed": 2}, "seed"), ({"folder": ["a", "b"]}, {}, "folder"),
    ({"data": ["camvid"]}, {"root": "nowhere"}, "nowhere")])
def test_a_mistake_anywhere_in_the_grid_ends_it_before_the_first_run(tmp_path, grid, parameters, said):
    with pytest.raises((ValueError, TypeError, OSError), match=said): points(tmp_path/"new", grid=grid, parameters=parameters)
    assert list(tmp_path.iterdir()) == []


def test_what_is_right_together_need_not_be_right_alone(tmp_path):
    assert len(points(tmp_path, grid={"w_sup": [0., 1.]}, parameters={"w_semi": 0.})["POINTS"]) == 2
    assert len(points(tmp_path, grid={"keep_operations": [1, 2]}, parameters={"search_operations": True})["POINTS"]) == 2


def test_a_record_of_another_network_is_an_error(tmp_path):
    def sweep(architecture): return points(tmp_path, stage="retrain", grid={"seed": [0]}, parameters={"architecture": architecture, "w_jig": 0.})["MISSING"]
    assert sweep("unet_resnet18") == ["seed=0"]
    config = RetrainConfig(folder=str(tmp_path/"seed=0"/"retrain"), architecture="unet_resnet18", w_jig=0.)
    RunRecord("retrain", "seed=0", dataclasses.asdict(config), 0, {"val_miou": .5}, inputs=config.inputs()).save(config.folder)
    assert sweep("unet_resnet18") == []
    with pytest.raises(ValueError, match="architecture"): sweep("unet_resnet34")


def test_an_unknown_stage_is_named(tmp_path):
    with pytest.raises(ValueError, match="'find'.*search"): points(tmp_path, stage="find")


def test_the_table_has_the_metrics_of_the_records(tmp_path):
    names = points(tmp_path, stage="retrain", grid={"seed": [0, 1], "lr": [1e-3]}, parameters={"architecture": "unet_resnet18", "w_jig": 0.})
    for name, seed in (("seed=0,lr=0.001", 0), ("seed=1,lr=0.001", 1)):
        config = RetrainConfig(folder=str(tmp_path/name/"retrain"), architecture="unet_resnet18", w_jig=0., seed=seed)
        RunRecord("retrain", name, dataclasses.asdict(config), seed, {"val_miou": .5 + seed / 10, "gflops": 1.}, inputs=config.inputs()).save(config.folder)
    text = SNAKEFILE.read_text()
    exec(text[text.index("def table"):text.index("def report")], names)
    table = names["table"]()
    assert "val mIoU" in table and "n=2" in table and "inherited" not in table


# -- Snakemake

COMMAND = f"""#!{sys.executable}
"Stands in the place of `selfsupnas`: writes a record with made-up metrics, or fails."
import dataclasses, os, sys, time
from selfsupnas.core import RunRecord
from selfsupnas.cli import STAGES, parse_options
stage, *words = sys.argv[1:]
config = STAGES[stage](**parse_options(stage, words))
folder = config.folder
time.sleep(float(os.environ.get("PAUSE", 0)))
if os.environ.get("BROKEN", "none") in folder: sys.exit("selfsupnas search: failed: FloatingPointError: the loss is not finite")
metrics = {{"derived_inherited_val_miou": config.budget / 2 + config.seed / 100, "realised_share": config.budget, "derived_gflops": 1.}}
print("GPU", os.environ["CUDA_VISIBLE_DEVICES"], "from", time.time() - float(os.environ.get("PAUSE", 0)), "to", time.time())
RunRecord(stage, folder, dataclasses.asdict(config), config.seed, metrics, inputs=config.inputs()).save(folder)
"""


def arguments(tmp_path, sweep, *words):
    "The command of a sweep of which only `sweep` differs from the file."
    (tmp_path/"sweep.json").write_text(json.dumps(sweep))
    return [sys.executable, "-m", "snakemake", "-s", str(SNAKEFILE), "--configfile", "sweep.json", *words]


def environment(*places, **variables):
    path = os.pathsep.join(map(str, [*places, Path(sys.executable).parent, os.environ["PATH"]]))
    return {**os.environ, "PATH": path, **variables}


@pytest.fixture
def pretended(tmp_path):
    "pretended(sweep, *words, **variables) -> CompletedProcess of snakemake, with a command in the place of `selfsupnas`."
    command = tmp_path/"bin"/"selfsupnas"
    command.parent.mkdir()
    command.write_text(COMMAND)
    command.chmod(0o755)
    def run(sweep, *words, **variables):
        return subprocess.run(arguments(tmp_path, sweep, *words), cwd=tmp_path, env=environment(command.parent, **variables), capture_output=True, text=True, timeout=600)
    return run


def created(folder): return {path.parts[-3]: RunRecord.load(path).created for path in Path(folder).glob("*/*/*-record.json")}


@pytest.mark.long
@needs_snakemake
def test_only_what_has_no_record_is_made(tmp_path, pretended):
    sweep, go = {"folder": "runs", "grid": {"seed": [0, 1], "budget": [.3, .5]}, "parameters": {"steps": 100}}, ("--cores", "2", "--keep-going")
    plan = pretended(sweep, "-n")
    assert plan.returncode == 0 and plan.stdout.count("rule point:") == 4 and not (tmp_path/"runs").exists()
    first = pretended(sweep, *go, BROKEN="seed=1,budget=0.5")
    assert first.returncode == 1 and set(made := created(tmp_path/"runs")) == {"seed=0,budget=0.3", "seed=0,budget=0.5", "seed=1,budget=0.3"}
    assert "seed=1,budget=0.5 has no record: selfsupnas search: failed: FloatingPointError" in first.stderr, "why, not only where"
    # other times and another rule do not repeat a point
    for record in (tmp_path/"runs").rglob("*-record.json"): os.utime(record, (0, 0))
    copy = tmp_path/"copy.smk"
    copy.write_text(SNAKEFILE.read_text().replace("exec selfsupnas", "sleep 0; exec selfsupnas"))
    second = pretended(sweep, *go, "-s", str(copy))
    assert second.returncode == 0 and second.stderr.count("localrule point:") == 1, second.stderr
    assert len(created(tmp_path/"runs")) == 4 and created(tmp_path/"runs").items() >= made.items()
    rows = {line.split()[0]: line for line in second.stderr.splitlines() if line.startswith("  0.")}
    assert "0.155" in rows["0.3"] and "0.255" in rows["0.5"] and "n=2" in rows["0.3"]
    third = pretended({**sweep, "parameters": {"steps": 200}}, *go)
    assert third.returncode == 1 and "steps" in third.stderr + third.stdout and len(created(tmp_path/"runs")) == 4


@pytest.mark.long
@needs_snakemake
def test_each_run_has_a_gpu_of_its_own(tmp_path, pretended):
    ran = pretended({"folder": "runs", "grid": {"seed": [0, 1, 2, 3]}}, "--cores", "4", CUDA_VISIBLE_DEVICES="2,5", PAUSE="2")
    assert ran.returncode == 0, ran.stderr
    spans = sorted((words[1], float(words[3]), float(words[5])) for words in (log.read_text().split() for log in (tmp_path/"runs").glob("*/search/search.log")))
    assert [gpu for gpu, *_ in spans] == ["2", "2", "5", "5"]
    for one, other in (spans[:2], spans[2:]): assert one[2] <= other[1] + .1, "one after the other"


# -- Real runs

def kill_all(process):
    "kill -9 of a process and all its descendants, kernels included."
    import psutil
    for one in (everyone := [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]): one.suspend()
    for one in everyone: one.kill()
    process.wait()


@pytest.mark.long
@needs_snakemake
def test_a_sweep_killed_twice_has_the_records_of_an_undisturbed_one(tmp_path):
    def sweep(folder): return {"folder": folder, "grid": {"w_jig": [0., 1.], "seed": [0, 1]}, "parameters": TINY}
    def start(folder, log, *words):
        with open(tmp_path/log, "w") as file:
            return subprocess.Popen(arguments(tmp_path, sweep(folder), "--cores", "2", "--keep-going", *words), cwd=tmp_path, env=environment(), stdout=file, stderr=file,
                                    start_new_session=True, preexec_fn=hear_interrupts)
    def checkpoints(): return {path for path in (tmp_path/"killed").rglob("checkpoint-*.pt") if not list(path.parent.glob("*-record.json"))}
    assert start("whole", "whole.log").wait(900) == 0, (tmp_path/"whole.log").read_text()

    one = start("killed", "1.log")
    assert wait_until(checkpoints, lambda: one.poll() is not None)
    os.killpg(one.pid, signal.SIGINT) # ctrl-C
    assert one.wait(300) == 1 and not created(tmp_path/"killed")
    left = checkpoints()
    assert left, "a stopped run keeps its checkpoint"

    two = start("killed", "2.log")
    assert wait_until(lambda: checkpoints() - left or created(tmp_path/"killed"), lambda: two.poll() is not None)
    os.killpg(two.pid, signal.SIGKILL) # kernels have groups of their own, and end when they miss their parent
    two.wait()
    locked = start("killed", "3.log")
    assert locked.wait(300) == 1 and "--unlock" in (tmp_path/"3.log").read_text()
    assert start("killed", "4.log", "--unlock").wait(300) == 0

    three = start("killed", "5.log")
    assert wait_until(lambda: created(tmp_path/"killed") and checkpoints(), lambda: three.poll() is not None)
    kill_all(three)
    before, left = created(tmp_path/"killed"), checkpoints()
    assert 0 < len(before) < 4 and left, "in the middle of a run"
    assert start("killed", "6.log", "--unlock").wait(300) == 0
    last = start("killed", "7.log")
    assert last.wait(900) == 0, (tmp_path/"7.log").read_text()
    assert len(created(tmp_path/"killed")) == 4 and created(tmp_path/"killed").items() >= before.items()
    for folder in (tmp_path/"whole").glob("*/search"): same_run(tmp_path/"killed"/folder.parent.name/"search", folder)
    for path in left: assert "resumes at step" in path.with_name("search.log").read_text(), path


@pytest.mark.long
@needs_snakemake
def test_a_failing_run_stops_no_other_and_says_why(tmp_path):
    words = arguments(tmp_path, {"folder": "runs", "grid": {"lr": [1e30, 1e-3]}, "parameters": {**TINY, "steps": 2, "logs": 1}}, "--cores", "2", "--keep-going")
    ran = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900)
    assert ran.returncode == 1 and set(created(tmp_path/"runs")) == {"lr=0.001"}
    assert "lr=1e+30 has no record: selfsupnas search: failed: FloatingPointError" in ran.stderr and "GFLOPs" in ran.stderr
    assert (tmp_path/"runs"/"lr=0.001"/"search"/"search.ipynb").exists(), "a run is an executed notebook"
