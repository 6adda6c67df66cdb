"""A long search takes no more memory and no more open files at its end than after its first steps.

SELFSUPNAS_SOAK says how many steps it makes (150 unless told; `make soak` asks for 2,000).
"""
import gc, os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder

from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import search

pytestmark = pytest.mark.long
STEPS = int(os.environ.get("SELFSUPNAS_SOAK", 150))
WARM = 50 # steps until caches are full
GROWTH = 20e6 # bytes, of the fitted line from its beginning to its end; what is kept a step, an image's features say, is far more over 2,000
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def handles(): return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc, where Linux says what a process holds")
def test_a_long_search_holds_no_more_at_its_end(tmp_path, monkeypatch):
    import selfsupnas.train.loop as training
    draw_folder(tmp_path/"data", dict(train=8, val=8))
    config = SearchConfig(folder=str(tmp_path/"run"), data="folder", root=str(tmp_path/"data"), label_fraction=.5, cache_gb=0., steps=STEPS, logs=max(1, STEPS // 25),
                          layers=3, channels=4, budget=.75, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, threshold=.3, drop_path=.1, adaptive_threshold=True)
    seen, plain = [], training.take_step
    def step(*args, **options):
        done = plain(*args, **options)
        seen.append((resident(), handles()))
        return done
    monkeypatch.setattr(training, "take_step", step)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: search(config)
    finally: torch.set_num_threads(threads)
    gc.collect()
    memory, files = np.array(seen[WARM:]).T
    slope = np.polyfit(np.arange(len(memory)), memory, 1)[0] # bytes a step
    print(f"{STEPS} steps: {memory[0] / 1e6:.1f} MB after {WARM}, {memory[-1] / 1e6:.1f} MB at the end, {slope:+.0f} bytes a step by the fitted line; "
          f"{files[0]} open files, then {files.min()} to {files.max()}")
    assert len(seen) == STEPS and slope * len(memory) < GROWTH, f"memory grows by {slope:.0f} bytes a step"
    assert files.max() <= files[:25].max(), f"open files: {files[:25].max()} after the first steps, then {files.max()}"
