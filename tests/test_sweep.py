"A sweep in miniature, with real processes: through the pool of this machine and through submitit's local queue."
import sys

import pytest

from selfsupnas.cli import main, make_parser, plan_sweep
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
    assert said in err and err.startswith("selfsupnas sweep: ") and list(tmp_path.iterdir()) == []


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
