"""Runs that are killed at random moments and resumed end like an uninterrupted run.

SELFSUPNAS_KILLS sets the number of kills for each stage (default 3; `make kills` sets 30).
"""
import os, random, signal, time

import pytest
from conftest import same_run, wait_until

from selfsupnas.train.checkpoint import checkpoint_paths, step_of

pytestmark = pytest.mark.long
KILLS = int(os.environ.get("SELFSUPNAS_KILLS", 3))
STEPS = 16
SMALL = dict(size=(64, 80), layers=3, channels=8, budget=.75, steps=STEPS, logs=STEPS, batch_labelled=2,
             batch_unlabelled=2, batch_jigsaw=2, threshold=.3, ramp=(0., .2))


def run_search(folder, architecture=None):
    from selfsupnas.stages.configs import SearchConfig
    from selfsupnas.stages.searching import search
    search(SearchConfig(folder=folder, **SMALL))


def run_retrain(folder, architecture):
    from selfsupnas.stages.retraining import RetrainConfig, retrain
    fields = {name: value for name, value in SMALL.items() if name in RetrainConfig.__dataclass_fields__}
    retrain(RetrainConfig(folder=folder, architecture=architecture, w_jig=.1, w_semi=1., **fields))


STAGES = {"search": (run_search, "supernet.safetensors"), "retrain": (run_retrain, "network.safetensors")}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    "Folder and seconds of an uninterrupted run, by stage."
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
    """The first kill is usually before the first checkpoint. Each further kill waits for the checkpoint of a random step
    and then up to two more steps, so that it may hit the writing of the next checkpoint."""
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
        same_run(folder, reference, stage, weights)
    assert "resumes at step" in log.read_text() or KILLS == 1
    print(f"{stage}: {killed} kills, {lives} runs, each equal to the uninterrupted run of {seconds:.0f} s")
