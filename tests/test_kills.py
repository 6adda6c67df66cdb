"""Runs that are killed at random moments and taken up again end as the run that nobody disturbed.

SELFSUPNAS_KILLS says how many kills each stage gets (3 unless told; `make kills` asks for 30).
"""
import json, multiprocessing, os, random, signal, time
from pathlib import Path

import pytest
from conftest import wait_until
from safetensors.torch import load_file

from selfsupnas.checkpoints import checkpoint_paths, step_of
from selfsupnas.core import RunRecord

pytestmark = pytest.mark.long
KILLS = int(os.environ.get("SELFSUPNAS_KILLS", 3))
STEPS = 16
SMALL = dict(size=(64, 80), layers=3, channels=8, budget=.75, steps=STEPS, logs=STEPS, batch_labelled=2,
             batch_unlabelled=2, batch_jigsaw=2, threshold=.3, ramp=(0., .2))


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
def start():
    "start(run, log, *args) starts a process that has imported everything."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selfsupnas.search", "selfsupnas.retrain", "accelerate", "tqdm.auto"])
    def start(*args):
        process = context.Process(target=quietly, args=args)
        process.start()
        return process
    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    "Stage -> the folder of a run that nobody disturbed, and its seconds."
    here, found = tmp_path_factory.mktemp("whole"), {}
    for stage, (run, _) in STAGES.items():
        begun, folder = time.monotonic(), here/stage
        process = start(run, here/"log", str(folder), str(here/"search"/"architecture.json"))
        process.join()
        assert process.exitcode == 0, (here/"log").read_text()[-2000:]
        found[stage] = folder, time.monotonic() - begun
    return found


def newest(folder): return max(map(step_of, checkpoint_paths(folder)), default=0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_as_if_nothing_had_been(stage, whole, start, tmp_path):
    """The first kill comes whenever it comes, before the first checkpoint as a rule. The others wait for the checkpoint
    of a drawn step, and then for a drawn moment of up to two steps, in which the next one may be being written."""
    (reference, seconds), (run, weights) = whole[stage], STAGES[stage]
    draw, killed, lives, log = random.Random(0), 0, 0, tmp_path/"log"
    architecture = str(whole["search"][0]/"architecture.json")
    while killed < KILLS:
        folder, ended = tmp_path/f"run-{lives}", False
        lives += 1
        while not ended:
            done = newest(folder)
            process = start(run, log, str(folder), architecture)
            if killed < KILLS and done < STEPS - 1:
                target = draw.randint(done + 1, STEPS - 1) if killed else 0
                wait_until(lambda: newest(folder) >= target, lambda: not process.is_alive())
                time.sleep(draw.uniform(0, 2 * seconds / STEPS))
                process.kill()
            process.join()
            ended = process.exitcode == 0
            assert ended or process.exitcode == -signal.SIGKILL, log.read_text()[-2000:]
            killed += not ended
        compare(stage, folder, reference, weights)
    assert "goes on at step" in log.read_text() or KILLS == 1
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
