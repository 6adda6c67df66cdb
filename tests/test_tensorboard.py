"The log as event files: what TensorBoard reads is what the history holds; nothing is there unless asked for."
import dataclasses, importlib.util, math, subprocess, sys

import pytest

from selfsupnas.train.config import TrainingConfig
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import search

SMALL = dict(size=(64, 80), steps=6, layers=3, channels=8, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, logs=3, budget=0.8, ramp=(0., 0.), threshold=0.)


def scalars(folder):
    "name -> {step: value} of the event files under a folder."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = {}
    for path in sorted(folder.rglob("events.*")):
        events = EventAccumulator(str(path)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({e.step: e.value for e in events.Scalars(name)})
    return found


def test_event_files_hold_the_history(tmp_path):
    config = SearchConfig(folder=str(tmp_path), tensorboard=True, **SMALL)
    history = search(config).trained.history
    shown = scalars(tmp_path)
    wanted = {name for row in history for name, value in row.items() if isinstance(value, (int, float))} - {"step"}
    assert set(shown) == wanted and {"sup", "jig", "semi", "cost", "val_miou", "realised", "w_semi"} <= wanted
    for row in history:
        for name in wanted:
            if row.get(name) is not None: assert math.isclose(shown[name][row["step"]], row[name], rel_tol=1e-6), name
    assert {step for values in shown.values() for step in values} == {2, 4, 6}


def test_nothing_is_written_or_loaded_unless_asked(tmp_path):
    code = f"""
import sys
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import search
search(SearchConfig(folder={str(tmp_path)!r}, **{SMALL!r}))
print("loaded:", [name for name in sys.modules if name.split(".")[0] in ("tensorboard", "tensorboardX")])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "loaded: []" in done.stdout, done.stdout[-500:] + done.stderr[-500:]
    assert not list(tmp_path.rglob("events.*"))


def test_without_the_package_the_cure_is_named(monkeypatch):
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "tensorboard" else plain(name, *args))
    with pytest.raises(ImportError, match=r"pip install 'selfsupnas\[tensorboard\]'"): TrainingConfig(tensorboard=True)
    assert not TrainingConfig().tensorboard


def test_it_changes_no_result_and_so_may_be_switched_on_when_a_run_goes_on(tmp_path):
    config = SearchConfig(folder=str(tmp_path/"run"), **SMALL)
    first = search(config).trained.history
    again = search(dataclasses.replace(config, folder=str(tmp_path/"shown"), tensorboard=True)).trained.history
    assert first == again
    assert search(dataclasses.replace(config, tensorboard=True)).trained.history == first
