"The parameter files of full-size runs: written by full_size.py, readable by papermill, valid for the stages."
import dataclasses, os, re, shlex, subprocess, sys
from pathlib import Path

import full_size
import pytest
import yaml
from conftest import ROOT
from full_size import SETS, main, recipe_config, recipe_estimate, recipes, write_recipes
from papermill.iorw import load_notebook_node, read_yaml_file
from papermill.parameterize import parameterize_notebook

from selfsupnas.data.cityscapes import draw_cityscapes
from selfsupnas.core import RunRecord
from selfsupnas.stages.retraining import retrain
from selfsupnas.stages.searching import search
from selfsupnas.cli import STAGES
from selfsupnas.data.voc import draw_voc

RATES = ROOT/"nbs"/"experiments"/"records"/"rates"
FILES = sorted((ROOT/"nbs"/"runs"/"recipes").iterdir())
SMALL = dict(crop=(64, 64), steps=6, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, workers=0, logs=2)


def named(path): return path.stem.rsplit("-", 1)


def test_the_committed_files_are_those_that_are_written(tmp_path):
    assert FILES, "run python nbs/experiments/full_size.py write"
    written = {path.name: path.read_text("utf8") for path in write_recipes(tmp_path, RATES)}
    assert written == {path.name: path.read_text("utf8") for path in FILES}


def test_there_is_a_file_for_each_stage_of_each_recipe():
    assert sorted(map(named, FILES)) == sorted([name, stage] for name, stages in recipes().items() for stage in stages)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestFile:
    def test_its_first_words_are_that_it_was_not_run(self, path):
        lines = path.read_text("utf8").splitlines()
        assert lines[0].startswith("# NOT RUN")
        head = "\n".join(line for line in lines if line.startswith("#"))
        for word in ("Multiply-adds", "Memory", "GPU hours", "assumptions", "papermill"): assert word in head

    def test_the_stage_takes_it(self, path):
        name, stage = named(path)
        config = STAGES[stage](**yaml.safe_load(path.read_text("utf8")))
        assert config == recipe_config(name, stage)
        assert config.crop == SETS[config.data]["crop"] and isinstance(config.zoom, tuple)

    def test_the_run_notebook_takes_it(self, path):
        "As `papermill -f` reads it: the parameters cell, then the injected one, make the same configuration."
        name, stage = named(path)
        notebook = parameterize_notebook(load_notebook_node(str(ROOT/"nbs"/"runs"/f"{stage}.ipynb")), read_yaml_file(str(path)), kernel_name="python3", language="python")
        values = {}
        for cell in notebook.cells:
            if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])): exec(cell.source, values)
        fields = [f.name for f in dataclasses.fields(STAGES[stage])]
        assert STAGES[stage](**{k: values[k] for k in fields}) == recipe_config(name, stage)


@pytest.mark.parametrize("stage", ["search", "retrain"])
def test_the_command_in_the_header_is_right(stage, tmp_path):
    "The command of the header with another label fraction; papermill prepares the notebook without running it."
    text = (ROOT/"nbs"/"runs"/"recipes"/f"voc_aug-16-{stage}.yaml").read_text("utf8")
    start, more = re.search(r"^# Start: (.*)$", text, re.M)[1], re.search(r"For 1/8, add (.*)$", text, re.M)[1]
    (tmp_path/"nbs").symlink_to(ROOT/"nbs")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(["bash", "-c", f"{start} {more} --prepare-only"], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = {}
    for cell in load_notebook_node(str(tmp_path/"runs"/"voc_aug-16"/stage/f"{stage}.ipynb")).cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])): exec(cell.source, values)
    words = shlex.split(more)
    assert len(words) >= 6
    for name, value in zip(words[1::3], words[2::3]): assert values[name] == (float(value) if name == "label_fraction" else value)


def test_depth_and_size_of_a_view_are_what_costs():
    one, deep, other = (recipe_estimate(name, "search") for name in ("cityscapes-16", "cityscapes-33", "voc_aug-16"))
    assert one.run < deep.run < 33 / 16 * one.run and one.memory < deep.memory
    assert 321**2 / 768**2 < other.step / one.step < 1.1 * 321**2 / 768**2 # 32 does not divide 321: features are rounded up
    assert one.hours(2e12) == pytest.approx(one.run / 2e12 / 3600)


@pytest.fixture
def fresh_accelerator():
    "Reset accelerate, which keeps the precision of its first use in a process."
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("data", SETS)
def test_a_recipe_in_miniature_runs(fresh_accelerator, data, tmp_path, monkeypatch):
    "A recipe at a small size, on drawn data: the retraining finds the results of the search."
    monkeypatch.chdir(tmp_path)
    if data == "cityscapes": root = draw_cityscapes(tmp_path/"drawn", dict(train=6, val=2))
    else: root = draw_voc(tmp_path/"drawn", dict(train=4, val=2, extra=4, test=1))
    small = dict(SMALL, root=str(root))
    found = search(dataclasses.replace(recipe_config(f"{data}-16", "search"), **small, layers=4, channels=4, label_fraction=1 / 2, budget=.8))
    done = retrain(dataclasses.replace(recipe_config(f"{data}-16", "retrain"), **small))
    assert done.record.parameters["precision"] == "bf16" and done.trained.model.architecture.live == found.architecture.live
    assert done.data.split.labelled == found.data.split.labelled


@pytest.mark.parametrize("stage", ["search", "retrain"])
def test_a_recipe_can_be_timed(stage, tmp_path, monkeypatch):
    "Small: fewer layers, smaller views and batches."
    full = full_size.recipe_config
    def small(name, stage):
        return dataclasses.replace(full(name, stage), **{k: v for k, v in SMALL.items() if k != "steps"}, **({"layers": 6, "channels": 16} if stage == "search" else {}))
    monkeypatch.setattr(full_size, "recipe_config", small)
    assert main(["measure", "voc_aug-16", stage, "--folder", str(tmp_path), "--steps", "2"]) == 0
    record = RunRecord.load(tmp_path/f"voc_aug-16-{stage}"/"rate-record.json")
    assert record.parameters["measured"] == 2 and record.parameters["crop"] == [64, 64]
    assert record.metrics["multiply_adds"] / record.metrics["multiply_adds_per_second"] == pytest.approx(record.timings["step"])
    line, = full_size.measured_text(record, recipe_estimate("voc_aug-16", stage))
    assert "2 steps" in line and "hours" in line and "GB" not in line
