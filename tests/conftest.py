"Shared fixtures: the same environment everywhere, small images in a folder, the `selfsupnas` command."
import json, multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Results are compared to the last bit, and sums have one order on one thread of a processor; the GPU has tests of its own: make test-gpu
if not os.environ.get("SELFSUPNAS_GPU"): os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", NO_COLOR="1")
for name in ("FORCE_COLOR", "PYTHON_COLORS"): os.environ.pop(name, None)
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT/"nbs"/"experiments")) # what is there is no part of the package


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes, or a browser; `make test-long`, or pytest -m long")
    if not config.option.markexpr: config.option.markexpr = "not long"


def wait_until(condition, ended=lambda: False, seconds=900):
    """Return True as soon as `condition()` holds, False once `ended()` does without it.

    `seconds` only ends a test that hangs; a busy machine may take its time.
    """
    until = time.monotonic() + seconds
    while not condition():
        if ended(): return bool(condition())
        assert time.monotonic() < until, f"nothing happened for {seconds} s"
        time.sleep(.01)
    return True


def draw_folder(root, counts):
    "The layout of `data=folder`, three classes: split -> number of images of 64 x 80 pixels."
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in ("images", "masks"): (root/kind/split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(root/"images"/split/f"{i}.png")
            Image.fromarray((np.arange(64 * 80) // 900 % 3).astype(np.uint8).reshape(64, 80)).save(root/"masks"/split/f"{i}.png")
    (root/"classes.txt").write_text("road\nhouse\ntree\n")


def same_run(folder, reference, stage="search", weights="supernet.safetensors"):
    "Two runs have exactly the same metrics, log lines and weights, and left no partial files."
    from safetensors.torch import load_file
    from selfsupnas.core import RunRecord
    records = [RunRecord.load(place/f"{stage}-record.json") for place in (folder, reference)]
    assert records[0].metrics == records[1].metrics
    assert json.loads((folder/"history.json").read_text()) == json.loads((reference/"history.json").read_text())
    own, other = (load_file(place/weights) for place in (folder, reference))
    assert own.keys() == other.keys() and all(own[name].equal(other[name]) for name in own)
    assert {path.name for path in folder.glob(".*")} <= {".lock", ".command.lock"}


def quietly(run, log, *args):
    "Run in a separate process, as from a terminal, with output to a file."
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    run(*args)


def hear_interrupts():
    "For `preexec_fn`: a process in the background of a shell ignores ctrl-C, and so would its children."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def start():
    "start(run, log, *args) starts a process that has imported everything."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selfsupnas.stages.searching", "selfsupnas.stages.retraining", "selfsupnas.cli", "accelerate", "papermill", "tqdm.auto"])
    def start(*args):
        process = context.Process(target=quietly, args=args)
        process.start()
        return process
    return start


@pytest.fixture(scope="session")
def command():
    "command(*words, cwd=...) runs the installed console script and returns the CompletedProcess."
    script = Path(sys.executable).with_name("selfsupnas")
    def run(*words, cwd, **environment):
        return subprocess.run([script, *map(str, words)], cwd=cwd, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=900)
    return run
