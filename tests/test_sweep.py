"A sweep: its grid and table without training, and small sweeps with real processes on this machine and through submitit's local queue."
import functools, subprocess, sys
from pathlib import Path

import pytest
from campaign import COMMAND, Job, SweepConfig, grid_line, main, make_executor, make_parser, members, plan_sweep, run_sweep, sweep_table
from conftest import wait_until

from selfsupnas.core import RunRecord

TINY = ["-p", "steps", "2", "-p", "size", "(64, 80)", "-p", "layers", "3", "-p", "channels", "8", "-p", "batch_labelled", "2", "-p", "batch_unlabelled", "2",
        "-p", "batch_jigsaw", "2", "-p", "logs", "1", "-p", "budget", "0.8"]


def planned(*words): return plan_sweep(make_parser().parse_args(["sweep", "search", *words]))


def test_a_grid_becomes_runs_in_order_with_values_of_the_right_type():
    grid, runs = planned("--grid", "seed=0,1", "--grid", "label_fraction=1/16,1/8", "--grid", "crop=null,(64, 64)", "-p", "steps", "3")
    assert grid == {"seed": [0, 1], "label_fraction": [1 / 16, 1 / 8], "crop": [None, (64, 64)]}
    assert len(runs) == 8 and runs[0].name == "seed=0,label_fraction=0.0625,crop=None"
    assert runs[-1].stages == (("search", {"steps": 3, "seed": 1, "label_fraction": 1 / 8, "crop": (64, 64)}),)


@pytest.mark.parametrize("words, said", [
    ((), "--grid"), (("--grid", "sede=1"), "sede"), (("--grid", "seed=1,x"), "seed must be int"), (("--grid", "seed=1,1"), "twice"), (("--grid", "seed"), "NAME=VALUE"),
    (("--grid", "budget=0.5,2"), "budget"), (("--grid", "seed=1", "-p", "seed", "2"), "for all runs"), (("--grid", "folder=a,b"), "--folder"),
    (("--grid", "seed=1", "--grid", "seed=2"), "two lines"), (("--grid", "data=camvid", "-p", "root", "nowhere"), "nowhere"), (("--grid", "seed=1", "--workers", "0"), "workers")])
def test_a_mistake_anywhere_in_the_grid_ends_it_before_the_first_run(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "search", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("campaign.py sweep: ") and list(tmp_path.iterdir()) == []


def test_a_grid_is_named_by_its_points():
    runs = members("search", {"seed": [0, 1], "budget": [0.3, 0.5]}, {"steps": 100})
    assert [run.name for run in runs] == ["seed=0,budget=0.3", "seed=0,budget=0.5", "seed=1,budget=0.3", "seed=1,budget=0.5"]
    assert runs[1].stages == (("search", {"steps": 100, "seed": 0, "budget": 0.5}),)
    assert grid_line("crop=(96, 96),(128,160)") == ("crop", ["(96, 96)", "(128,160)"])
    assert members("search", {"split_folder": ["splits/1_8"]}, {})[0].name == "split_folder=splits-1_8"


@pytest.mark.parametrize("wrong", ["seed", "seed=", "=1", "seed=1,,2", "seed=1,1"])
def test_what_is_no_line_of_a_grid(wrong):
    with pytest.raises(ValueError, match="NAME=VALUE" if wrong != "seed=1,1" else "twice"): grid_line(wrong)


@pytest.mark.parametrize("grid, shared, named", [({}, {}, "--grid"), ({"seed": [0]}, {"seed": 1}, "seed is in the grid"), ({"lr": [1e-3, 1.0000001e-3]}, {}, "same name")])
def test_what_is_no_grid(grid, shared, named):
    with pytest.raises(ValueError, match=named): members("search", grid, shared)


class Ended:
    "A process that has ended."
    def __init__(self, status): self.status = status
    def poll(self): return self.status


def pretend(started, broken, config, name, stage, parameters, slot):
    "Writes a record with made-up metrics, or fails."
    started.append(name)
    if name in broken: return Ended(1)
    metrics = {"derived_inherited_val_miou": parameters["budget"] / 2 + parameters["seed"] / 100, "realised_share": parameters["budget"], "derived_gflops": 1.}
    RunRecord(stage, name, parameters, parameters["seed"], metrics).save(Path(config.folder)/name/stage)
    return Ended(0)


def forbidden(*words): raise AssertionError("nothing is left to be made")


def test_only_what_has_no_record_is_made(tmp_path, capsys):
    grid, config, started = {"seed": [0, 1], "budget": [0.3, 0.5]}, SweepConfig(str(tmp_path)), []
    runs = members("search", grid, {"steps": 100})
    assert sweep_table(config, runs, grid) == ""
    assert run_sweep(config, runs, functools.partial(pretend, started, ["seed=1,budget=0.5"]), pause=0.) == ["seed=1,budget=0.5"] and len(started) == 4
    out = capsys.readouterr().out
    assert "sweep: seed=1,budget=0.5 FAILED" in out and "sweep: seed=0,budget=0.3: derived_inherited_val_miou 0.150" in out
    assert run_sweep(config, runs, functools.partial(pretend, started, []), pause=0.) == [] and started[4:] == ["seed=1,budget=0.5"]
    table = sweep_table(config, runs, grid)
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()}
    assert "0.155" in rows["0.3"] and "0.255" in rows["0.5"] and "n=2" in rows["0.3"] and "val mIoU, supernet" not in table
    with pytest.raises(ValueError, match="steps = 100, not 200"): run_sweep(config, members("search", grid, {"steps": 200}), forbidden, pause=0.)


def test_a_run_of_another_network_is_not_made_in_its_place(tmp_path):
    config = SweepConfig(str(tmp_path))
    one, other = (members("retrain", {"seed": [0]}, {"architecture": name}) for name in ("unet_resnet18", "unet_resnet34"))
    RunRecord("retrain", "seed=0", one[0].stages[0][1], 0, {"val_miou": .5}).save(tmp_path/"seed=0"/"retrain")
    assert run_sweep(config, one, forbidden, pause=0.) == []
    with pytest.raises(ValueError, match="architecture"): run_sweep(config, other, forbidden, pause=0.)


@pytest.mark.long
def test_a_job_is_seen_as_a_process(tmp_path):
    "With submitit's local queue: a command that succeeds, and an invalid one that gives a reason."
    executor, log = make_executor(tmp_path/"queue", {"cluster": "local", "timeout_min": 5}), tmp_path/"wrong.log"
    right, wrong = (Job(executor.submit(subprocess.run, [sys.executable, *COMMAND, "search", *words], check=True), log) for words in (["--parameters"], ["-p", "steps", "none"]))
    assert wait_until(lambda: right.poll() is not None and wrong.poll() is not None)
    assert (right.poll(), wrong.poll()) == (0, 1) and "--steps" in right.job.stdout()
    assert "--steps" in log.read_text()


def created(folder): return {path.parts[-3]: RunRecord.load(path).created for path in folder.glob("*/search/search-record.json")}


@pytest.fixture
def single(monkeypatch): monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_what_is_right_together_need_not_be_right_alone():
    assert [run.stages[0][1]["w_sup"] for run in planned("--grid", "w_sup=0,1", "-p", "w_semi", "0")[1]] == [0., 1.]
    assert len(planned("--grid", "keep_operations=1,2", "-p", "search_operations", "True")[1]) == 2


@pytest.mark.long
def test_a_sweep_goes_on_where_it_was_and_a_failing_run_stops_no_other(tmp_path, capsys, single):
    folder = tmp_path/"sweep"
    # at such a rate all is lost: this run fails, and the two after it are made
    words = ["sweep", "search", "--grid", "lr=1e30,0.001,0.003", "--folder", str(folder), "--workers", "2", *TINY]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "1 failed: lr=1e+30" in said.err and set(made := created(folder)) == {"lr=0.001", "lr=0.003"}
    assert "lr=1e+30 FAILED: selfsupnas search: failed: FloatingPointError" in said.out, "why, not only where"
    rows = [line.split() for line in said.out.splitlines() if line.strip().startswith("0.")]
    assert [row[0] for row in rows] == ["0.001", "0.003"] and "GFLOPs" in said.out and "(n=1)" in said.out
    assert (folder/"lr=0.001"/"search"/"search.ipynb").exists(), "a run is an executed notebook"
    words[2:4] = ["--grid", "lr=0.001,0.003"]
    assert main(words) == 0 and created(folder) == made, "nothing is made twice"
    assert main([*words, "-p", "w_jig", "0"]) == 2
    assert "another folder" in capsys.readouterr().err


@pytest.mark.long
def test_the_same_through_a_queue(tmp_path, capsys, single):
    folder = tmp_path/"sweep"
    words = ["sweep", "search", "--grid", "lr=1e30,0.001", "--grid", "seed=0,1", "--folder", str(folder), "--slurm", "cluster=local", "timeout_min=20", *TINY]
    assert main(words) == 1
    said = capsys.readouterr()
    assert set(created(folder)) == {"lr=0.001,seed=0", "lr=0.001,seed=1"} and "2 failed" in said.err
    assert "(n=2)" in said.out, "seeds are summarised"
    assert said.out.count("FAILED: selfsupnas search: failed: FloatingPointError") == 2
    assert any("is not finite" in path.read_text() for path in (folder/"queue").rglob("*.err")), "what a job said is kept"


def test_without_submitit_the_cure_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["sweep", "search", "--grid", "seed=0", "--folder", str(tmp_path/"sweep"), "--slurm", "partition=gpu"]) == 2
    assert "pip install 'selfsupnas[slurm]'" in capsys.readouterr().err
