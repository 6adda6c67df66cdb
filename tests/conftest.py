"What several tests use: where the checkout is, small images in a folder, and the `selfsupnas` command as a shell runs it."
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Sums have one order on a processor, and results are compared to the last bit; the GPU has tests of its own: make test-gpu
if not os.environ.get("SELFSUPNAS_GPU"): os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    "Figures are compared with their baselines however pytest was called: without this, only with --mpl."
    config.option.mpl = True


def draw_folder(root, counts):
    "The layout of `data=folder`, three classes: split -> number of images of 64 x 80 pixels."
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in ("images", "masks"): (root/kind/split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(root/"images"/split/f"{i}.png")
            Image.fromarray((np.arange(64 * 80) // 900 % 3).astype(np.uint8).reshape(64, 80)).save(root/"masks"/split/f"{i}.png")
    (root/"classes.txt").write_text("road\nhouse\ntree\n")


@pytest.fixture(scope="session")
def command():
    "command(*words, cwd=...) runs the installed console script and returns the CompletedProcess."
    script = Path(sys.executable).with_name("selfsupnas")
    def run(*words, cwd, **environment):
        return subprocess.run([script, *map(str, words)], cwd=cwd, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=900)
    return run
