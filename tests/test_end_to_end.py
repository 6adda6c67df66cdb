"The demo from end to end, through the installed command, in miniature: 4 steps, 64 x 80 pixels."
import json, re
from pathlib import Path

import nbformat
import pytest

from selfsupnas.space.architecture import load_architecture
from selfsupnas.space.cost import count_cost
from selfsupnas.data.datasets import load_dataset
from selfsupnas.metrics import evaluate_segmenter
from selfsupnas.viz.tables import read_records
from selfsupnas.stages.retraining import load_network

SMALL = {"steps": 4, "logs": 2, "size": (64, 80), "layers": 3, "channels": 8, "budget": 0.8, "batch_labelled": 2, "batch_unlabelled": 2,
         "batch_jigsaw": 2, "baselines": ("lraspp_mobilenet_v3_large",), "latency_repeats": 2, "seed": 3}
WORDS = [word for name, value in SMALL.items() for word in ("-p", name, value)]
RUNS = {"search": "search", "retrain": "retrain", "evaluate": "evaluate", "retrain-unlabelled": "retrain", "evaluate-unlabelled": "evaluate"} # run -> its stage


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    "The folder that the demo wrote, what it printed, and the place it was called in."
    place = tmp_path_factory.mktemp("demo")
    done = command("demo", "--folder", "tiny", *WORDS, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return place/"tiny", done, place


def test_every_stage_leaves_its_files(run):
    folder, _, place = run
    wanted = {"search": {"architecture.json", "supernet.safetensors", "history.json"},
              "retrain": {"architecture.json", "network.safetensors", "history.json"}, "evaluate": set()}
    for name, stage in RUNS.items():
        names = {p.name for p in (folder/name).iterdir()}
        assert wanted[stage] | {f"{stage}-record.json", f"{stage}.ipynb"} <= names
    assert [p.name for p in place.iterdir()] == ["tiny"], "something was written outside of the folder"


def test_the_records_hold_what_was_asked_for(run):
    folder, _, _ = run
    records = {Path(r["file"]).parent.name: r for r in read_records(folder)}
    assert {name: record["stage"] for name, record in records.items()} == RUNS
    for run_name, record in records.items():
        for name in SMALL.keys() & record["parameters"].keys():
            value = record["parameters"][name]
            wanted = () if name == "baselines" and run_name == "evaluate-unlabelled" else SMALL[name]
            assert (tuple(value) if isinstance(value, list) else value) == wanted
        assert record["seed"] == SMALL["seed"] and record["parameters"]["folder"] == f"tiny/{run_name}"
        assert record["versions"]["torch"] and record["timings"]
    assert records["retrain"]["parameters"]["architecture"] == "tiny/search/architecture.json"
    assert records["evaluate"]["parameters"]["network"] == "tiny/retrain"
    assert records["retrain"]["parameters"]["w_semi"] == records["retrain"]["parameters"]["w_jig"] == 0
    assert records["retrain-unlabelled"]["parameters"]["teacher"] == "tiny/retrain"
    rows = records["evaluate"]["metrics"]["rows"]
    network = load_network(folder/"retrain")
    by_hand = evaluate_segmenter(network, load_dataset("streetscenes", "test", size=SMALL["size"]), progress=False)
    assert rows["searched"]["miou"] == pytest.approx(by_hand.miou, abs=1e-3) and rows["searched"]["gflops"] == count_cost(network, SMALL["size"]).gflops
    assert rows["lraspp_mobilenet_v3_large"]["miou"] is None


def test_a_log_says_first_what_runs_and_then_how_far_it_is(run):
    _, done, _ = run
    for stage in done.stdout.split("] ")[1:3]: # after [1/5] and [2/5]
        lines = stage.splitlines()
        first = next(k for k, line in enumerate(lines) if line.startswith("step "))
        assert [line.split()[0] for line in lines[first - 4:first]] == ["data", "images", "network", "steps"], lines
        assert re.fullmatch(r"step 2/4  [\d.]+ (s|min|h) left  loss sup [\d.]+( .*)?", lines[first])


def test_retraining_built_what_the_search_found(run):
    folder, _, _ = run
    found, built = (load_architecture(folder/stage/"architecture.json") for stage in ("search", "retrain"))
    assert set(found.edges) == set(built.edges) and found.space == built.space
    assert set(load_network(folder/"retrain").architecture.edges) == set(found.edges)
    split = [(folder/stage/"split"/"labeled.txt").read_text() for stage in ("search", "retrain")]
    assert split[0] == split[1]


@pytest.mark.parametrize("name, stage", RUNS.items())
def test_the_executed_notebook_can_be_read(run, name, stage):
    notebook = nbformat.read(run[0]/name/f"{stage}.ipynb", 4)
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    assert [o for o in outputs if "image/png" in o.get("data", {})], "not one picture"
    injected = [c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert len(injected) == 1 and "seed = 3" in injected[0].source


def test_the_demo_says_what_it_does_and_where_things_are(run):
    folder, done, _ = run
    for number, name in enumerate(RUNS, 1): assert f"[{number}/5] {name} on" in done.stdout
    assert len(re.findall(r"^step\b|\bstep +\d", done.stdout, re.M)) >= 2 * SMALL["logs"], "no line a log step"
    for name, stage in RUNS.items(): assert f"tiny/{name}/{stage}-record.json" in done.stdout
    metrics = json.loads((folder/"retrain"/"retrain-record.json").read_text())["metrics"]
    assert re.search(rf"^  val mIoU \(%\) +{100 * metrics['val_miou']:.1f}$", done.stdout, re.M)
    table = done.stdout.split("On the test images")[1]
    for name, label in (("evaluate", "labels alone"), ("evaluate-unlabelled", "labels + unlabelled")):
        rows = json.loads((folder/name/"evaluate-record.json").read_text())["metrics"]["rows"]
        assert re.search(rf"^  {re.escape(label)} +{100 * rows['searched']['miou']:.1f} ", table, re.M)
    assert "Traceback" not in done.stderr


def test_a_second_run_overwrites_and_repeats(run, command):
    folder, _, place = run
    def metrics(): return json.loads((folder/"search"/"search-record.json").read_text())["metrics"]
    before, files = metrics(), sorted(p.name for p in (folder/"search").iterdir())
    words = [w for name, value in SMALL.items() if name not in ("baselines", "latency_repeats") for w in ("-p", name, value)]
    done = command("search", "--folder", "tiny/search", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    assert metrics() == before and sorted(p.name for p in (folder/"search").iterdir()) == files
