"""Runs that are killed at random moments and taken up again end as the run that nobody disturbed.

SELFSUPNAS_KILLS says how many kills each stage gets (3 unless told; `make kills` asks for 30).
"""
import json, multiprocessing, os, random, time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from selfsupnas.core import RunRecord

KILLS = int(os.environ.get("SELFSUPNAS_KILLS", 3))
SMALL = dict(size=(64, 80), layers=3, channels=8, budget=.75, steps=16, logs=16, batch_labelled=2,
             batch_unlabelled=2, batch_jigsaw=2, threshold=.3, ramp=(0., .2), resume=True)


def run_search(folder, architecture=None):
    from selfsupnas.search import SearchConfig, search
    search(SearchConfig(folder=folder, **SMALL))


def run_retrain(folder, architecture):
    from selfsupnas.retrain import RetrainConfig, retrain
    fields = {name: value for name, value in SMALL.items() if name in RetrainConfig.__dataclass_fields__}
    retrain(RetrainConfig(folder=folder, architecture=architecture, **fields))


STAGES = {"search": (run_search, "supernet.safetensors"), "retrain": (run_retrain, "network.safetensors")}


def quietly(run, log, *args):
    "In a process of its own: its words go to a file."
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch
    torch.set_num_threads(1)
    run(*args)


@pytest.fixture(scope="module")
def context():
    "Processes that begin with everything imported: seconds are for the run."
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["selfsupnas.search", "selfsupnas.retrain", "accelerate", "tqdm.auto"])
    first = found.Process(target=int) # begins the server
    first.start(); first.join()
    return found


@pytest.fixture(scope="module")
def whole(context, tmp_path_factory):
    "Stage -> the folder of a run that nobody disturbed, and its seconds."
    here, found = tmp_path_factory.mktemp("whole"), {}
    for stage, (run, _) in STAGES.items():
        begun, folder = time.monotonic(), here/stage
        process = context.Process(target=quietly, args=(run, here/"log", str(folder), str(here/"search"/"architecture.json")))
        process.start(); process.join()
        assert process.exitcode == 0, (here/"log").read_text()[-2000:]
        found[stage] = folder, time.monotonic() - begun
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_as_if_nothing_had_been(stage, whole, context, tmp_path):
    (reference, seconds), (run, weights) = whole[stage], STAGES[stage]
    draw, killed, lives = random.Random(0), 0, 0
    architecture = str(whole["search"][0]/"architecture.json")
    while killed < KILLS:
        folder, ended = tmp_path/f"run-{lives}", False
        lives += 1
        while not ended:
            process = context.Process(target=quietly, args=(run, tmp_path/"log", str(folder), architecture))
            process.start()
            process.join(draw.uniform(.2, .7) * seconds if killed < KILLS else None)
            ended = process.exitcode is not None
            if not ended:
                process.kill(); process.join()
                killed += 1
            else: assert process.exitcode == 0, (tmp_path/"log").read_text()[-2000:]
        compare(stage, folder, reference, weights)
    assert "resumed at step" in (tmp_path/"log").read_text()
    print(f"{stage}: {killed} kills, {lives} runs, each equal to the one of {seconds:.0f} s that was left alone")


def compare(stage, folder, reference, weights):
    "Figures, log lines and weights, to the last digit; and nothing half-written."
    records = [RunRecord.load(place/f"{stage}-record.json") for place in (folder, reference)]
    assert records[0].figures == records[1].figures
    histories = [json.loads((Path(place)/"history.json").read_text()) for place in (folder, reference)]
    assert histories[0] == histories[1]
    own, other = (load_file(place/weights) for place in (folder, reference))
    assert own.keys() == other.keys() and all(own[name].equal(other[name]) for name in own)
    assert {p.name for p in folder.glob(".*")} <= {".lock"}
