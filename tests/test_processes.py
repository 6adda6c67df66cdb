"""Two processes that share each batch equal one process up to rounding: losses, gates, thresholds, evaluation, checkpoints.

torchrun starts this file, too: `torchrun --standalone --nproc_per_node 2 tests/test_processes.py FOLDER CASE...` runs cases in two processes.
SELFSUPNAS_STEPS sets the number of compared steps (default 12): rounding errors grow about threefold a step, by a factor that depends on the processor.
"""
import json, os, signal, subprocess, sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.long
ROUNDING = 1e-7 # over all steps
STEPS = int(os.environ.get("SELFSUPNAS_STEPS", 12))
SMALL = dict(size=(64, 80), layers=4, channels=8, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, logs=STEPS, steps=STEPS, budget=.6,
             ramp=(0., .2), cost_ramp=(0., .5), binary_ramp=(.2, .6), threshold=.1, optimiser="sgd", lr=.003) # a threshold near chance gives pseudo-labels from the start
SHORT = dict(steps=6, logs=6)
CELLS = dict(SHORT, consistency="mean_teacher", search_operations=True, operations=("sep_conv_3x3", "max_pool_3x3", "identity"))
CASES = {"search": dict(), "adamw": dict(SHORT, optimiser="adamw", lr=1e-3, adaptive_threshold=True),
         "unimatch": dict(SHORT, consistency="unimatch", jigsaw_head="position"), "cps": dict(SHORT, consistency="cps", w_jig=0.),
         "cells": CELLS,
         "alternating": dict(SHORT, update="alternating", class_weights="inverse_log"), "stopped": dict(SHORT),
         "clean": dict(SHORT, consistency="unimatch", statistics="clean", threshold_kind="class", cutout_p=.5, jigsaw_share=.5),
         "masked": dict(execution="masked"), "masked cells": dict(CELLS, execution="masked"), "masked adamw": dict(SHORT, optimiser="adamw", lr=1e-3, adaptive_threshold=True, execution="masked"),
         "separate": dict(SHORT, statistics="separate", threshold_kind="relative", threshold=.5, w_strong=1., ema_start=.3, ema_buffers="averaged")}


def run_case(name, folder):
    "One run; the first process writes the history."
    from selfsupnas.data import augment; from selfsupnas.tasks import consistency; from selfsupnas import metrics as evaluation; from selfsupnas.data import loaders; from selfsupnas.train import step as objective; from selfsupnas.train import loop as training
    from selfsupnas.train.batches import load_training_data
    from selfsupnas.core import write_json
    from selfsupnas.metrics import evaluate_segmenter
    from selfsupnas.distributed import world
    from selfsupnas.stages.searching import BudgetLosses, make_phases
    from selfsupnas.stages.configs import SearchConfig
    from selfsupnas.stages.calibration import make_table
    from selfsupnas.space.supernet import build_supernet
    # in double precision, because small gated networks amplify rounding errors about threefold a step
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    for module in (loaders, evaluation): module.normalise = lambda images: augment.normalise(images).double()
    # without feature perturbation, which each process draws for itself
    objective.perturb_features = lambda features: consistency.perturb_features(features, 0.)
    config = SearchConfig(folder=f"{folder}/{name}", **{**SMALL, **CASES[name]})
    data = load_training_data(config)
    table = make_table(config, data)
    def run():
        torch.manual_seed(config.seed)
        model = build_supernet(table.space)
        with torch.no_grad(): # some gates are closed from the start, so that one process may use an edge alone
            for gate in (m for m in model.modules() if hasattr(m, "threshold")): gate.logits.bias.normal_(0., .2)
        return training.train(model, config, data, BudgetLosses(model, table, config), make_phases(data, config.update, config.seed))
    if name == "stopped" and world().rank == 1: stop_at(training, 3)
    try: trained = run()
    except KeyboardInterrupt: trained = run()
    metrics = evaluate_segmenter(trained.model, data.val, progress=False)
    if world().first:
        write_json(f"{folder}/{name}.json", {"processes": world().size, "history": trained.history, "confusion": metrics.confusion.tolist(), "miou": metrics.miou})


def stop_at(training, step):
    "Interrupt this process once, at the given step."
    plain, steps = training.take_step, []
    def take_step(*args):
        steps.append(1)
        if len(steps) == step: signal.raise_signal(signal.SIGINT)
        return plain(*args)
    training.take_step = take_step


def launch(folder, count, *cases):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    done = subprocess.run([sys.executable, *torchrun, __file__, str(folder), *cases], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {name: json.loads((Path(folder)/f"{name}.json").read_text()) for name in cases}, done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Results and output of all cases, in one process and in two."
    return {count: launch(tmp_path_factory.mktemp(f"in-{count}"), count, *CASES) for count in (1, 2)}


def curves(run):
    keys = [k for k, v in run["history"][-1].items() if k not in ("gates", "pseudo_counts")]
    return {k: np.array([row.get(k) for row in run["history"]], float) for k in keys}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(runs, name):
    one, two = (runs[count][0][name] for count in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["history"]) == len(two["history"]) == CASES[name].get("steps", STEPS)
    ours, theirs = curves(two), curves(one)
    assert ours.keys() == theirs.keys() and {"sup", "semi", "cost", "binary", "realised", "gate_threshold"} <= ours.keys()
    known = [k for k in ours if not np.isnan(theirs[k]).all()]
    print(name, {k: f"{np.nanmax(np.abs(ours[k] - theirs[k])):.1e}" for k in known}, "mIoU", one["miou"], two["miou"])
    for k in known: np.testing.assert_allclose(ours[k], theirs[k], rtol=0, atol=ROUNDING, err_msg=k)
    gates = [np.array([row["gates"] for row in run["history"]]) for run in (one, two)]
    np.testing.assert_allclose(*gates, rtol=0, atol=ROUNDING)
    assert (gates[0] == 0).any(1).all() and theirs["semi"][-1] > 0, "at every step a gate is closed, and the consistency loss is positive"
    assert one["confusion"] == two["confusion"] and one["miou"] == two["miou"]


@pytest.mark.parametrize("grouped, masked", [("search", "masked"), ("cells", "masked cells"), ("adamw", "masked adamw")])
def test_a_masked_run_is_a_grouped_one(runs, grouped, masked):
    ours, theirs = (curves(runs[1][0][name]) for name in (masked, grouped))
    assert ours.keys() == theirs.keys()
    for name in ours: np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=ROUNDING, err_msg=name)


def test_a_stop_that_one_process_hears_of_stops_all_and_they_go_on(runs):
    said = runs[2][1]
    assert said.count("stopped; run it again to resume at step 3") == 1 and said.count("resumes at step 3") == 1


def test_a_batch_that_cannot_be_shared_is_refused():
    from selfsupnas.train.batches import check_shares
    from selfsupnas.train.config import TrainingConfig
    from selfsupnas.distributed import World
    check_shares(TrainingConfig(), World(0, 4))
    with pytest.raises(ValueError, match="batch_jigsaw=12 cannot be shared evenly by 8 processes"): check_shares(TrainingConfig(), World(1, 8))
    check_shares(TrainingConfig(w_jig=0.), World(0, 8))
    with pytest.raises(ValueError, match="ohem_threshold is for one process"): check_shares(TrainingConfig(ohem_threshold=.7), World(0, 2))
    check_shares(TrainingConfig(recompute=True), World())
    with pytest.raises(ValueError, match="recompute=True is for one process"): check_shares(TrainingConfig(recompute=True), World(0, 2))


STAGE = dict(SMALL, **SHORT, seed=3)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    "The search stage in this process, by notebook_launcher in a kernel, and by torchrun as a command."
    from selfsupnas.cli import run_notebook
    from selfsupnas.stages.configs import SearchConfig
    from selfsupnas.stages.searching import search
    place = tmp_path_factory.mktemp("stages")
    search(SearchConfig(folder=str(place/"one"), **STAGE))
    code = f"""
import socket
from accelerate import notebook_launcher
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import search
def run():
    import torch
    torch.set_num_threads(1)
    search(SearchConfig(folder={str(place/'notebook')!r}, **{STAGE!r}))
with socket.socket() as tried:
    tried.bind(("127.0.0.1", 0))
    port = str(tried.getsockname()[1])
notebook_launcher(run, num_processes=2, use_port=port)"""
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), place/"in.ipynb")
    run_notebook(place/"in.ipynb", place/"out.ipynb", {})
    torchrun("search", place/"command", STAGE)
    return place


def torchrun(stage, folder, parameters):
    "Run a stage as a command in two processes."
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", Path(sys.executable).with_name("selfsupnas"), stage,
                           "--folder", folder, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def assert_alike(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, dict): assert_alike(value, two[name])
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            assert len(value) == len(two[name]), name
            for ours, theirs in zip(value, two[name]): assert_alike(ours, theirs)
        else: assert two[name] == (pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value), name


def files_of(folder): return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("way", ["notebook", "command"])
def test_a_stage_in_two_processes_leaves_what_it_leaves_in_one(stages, way):
    from selfsupnas.core import RunRecord
    one, two = (RunRecord.load(stages/place/"search-record.json") for place in ("one", way))
    assert (one.hardware["processes"], two.hardware["processes"]) == (1, 2)
    assert_alike(one.metrics, two.metrics)
    assert files_of(stages/"one") == files_of(stages/way)


def test_a_front_in_two_processes_is_that_of_one(stages, tmp_path):
    from selfsupnas.core import RunRecord
    from selfsupnas.stages.pareto_front import ParetoConfig, pareto
    asked = dict(search=str(stages/"one"), budgets=(.6,), steps=2, random=1)
    pareto(ParetoConfig(folder=str(tmp_path/"one"), **asked))
    torchrun("pareto", tmp_path/"two", asked)
    one, two = (RunRecord.load(tmp_path/place/"pareto-record.json") for place in ("one", "two"))
    assert (one.hardware["processes"], two.hardware["processes"]) == (1, 2)
    assert [row["kind"] for row in one.metrics["rows"]] == ["dynamic", "derived", "random"] and len(two.metrics["rows"]) == 3
    for ours, theirs in zip(one.metrics["rows"], two.metrics["rows"]): assert_alike(ours, theirs)
    assert files_of(tmp_path/"one") == files_of(tmp_path/"two")


if __name__ == "__main__":
    for case in sys.argv[2:]: run_case(case, sys.argv[1])
