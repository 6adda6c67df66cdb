"""A finished run is read instead of repeated, and a different run in its folder is refused; data and classes of a network are checked.

Quick tests on drawn folders of six images; stops of all kinds are in test_stops.py.
"""
import copy, dataclasses, json, os, pickle, shutil, signal, subprocess, sys
from pathlib import Path

import campaign
import nbformat
import pytest
import torch
from conftest import ROOT, draw_folder, same_run

from selfsupnas import cli
from selfsupnas.stages.evaluation import EvaluateConfig, evaluate
from selfsupnas.train.checkpoint import IGNORED_PARAMETERS, FolderInUse, checkpoint_paths, step_of
from selfsupnas.cli import main
from selfsupnas.core import RunRecord
from selfsupnas.export import export_run
from selfsupnas.stages.pareto_front import ParetoConfig, pareto
from selfsupnas.stages.retraining import RetrainConfig, retrain
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import budget_note, load_search, search

SMALL = dict(data="folder", root="data", label_fraction=.5, steps=2, logs=1, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, threshold=.3, ramp=(0., .2))
SEARCH = SearchConfig(folder="search", layers=2, channels=4, budget=1., **SMALL)
RETRAIN = RetrainConfig(folder="retrain", architecture="search", w_jig=.1, w_semi=1., **SMALL)
EVALUATE = EvaluateConfig(folder="evaluate", network="retrain", baselines=(), latency_repeats=1)
PARETO = ParetoConfig(folder="pareto", search="search", budgets=(.9,), steps=1, random=1)
STAGES = {"search": (search, SEARCH), "retrain": (retrain, RETRAIN), "evaluate": (evaluate, EVALUATE), "pareto": (pareto, PARETO)}
ANOTHER = {"search": dict(steps=4), "retrain": dict(lr=.1), "evaluate": dict(flip=True), "pareto": dict(steps=2)}
pytestmark = pytest.mark.filterwarnings("ignore:.*labelled images are too few")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("finished")
    draw_folder(place/"data", dict(train=6, val=3, test=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for run, config in STAGES.values(): run(config)
    return place


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    "A copy of the finished runs as the current folder."
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SELFSUPNAS_DATA", raising=False)
    return tmp_path


def contents(folder="."): return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).rglob("*") if path.is_file()}


def words(config):
    "Command line arguments of a config."
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    return [word for name, value in given.items() for word in ("-p", name, str(value))]


# -- Finished runs

@pytest.mark.parametrize("stage", STAGES)
def test_the_same_run_is_read(place, capsys, stage, monkeypatch):
    run, config = STAGES[stage]
    before = contents()
    monkeypatch.setattr(torch.Tensor, "backward", None), monkeypatch.setattr("selfsupnas.train.loop.train", None)
    done = run(config)
    assert "nothing is computed" in capsys.readouterr().out
    assert {k: v for k, v in contents().items() if not k.endswith(".lock")} == {k: v for k, v in before.items() if not k.endswith(".lock")}
    assert done.record.metrics == RunRecord.load(f"{stage}/{stage}-record.json").metrics
    assert not hasattr(done, "nothing_of_the_kind")
    assert copy.deepcopy(done).record == done.record and pickle.loads(pickle.dumps(done)).record == done.record


@pytest.mark.parametrize("stage", STAGES)
def test_another_run_is_refused_before_anything_is_touched(place, stage):
    run, config = STAGES[stage]
    before = contents()
    (name, value), = ANOTHER[stage].items()
    with pytest.raises(ValueError, match=f"{stage} has a finished run .*{name}=.*now {value}.*another folder.*overwrite=True"): run(dataclasses.replace(config, **ANOTHER[stage]))
    assert {k: v for k, v in contents().items() if not k.endswith(".lock")} == {k: v for k, v in before.items() if not k.endswith(".lock")}


@pytest.mark.parametrize("stage", ["search", "retrain"])
def test_what_changes_no_result_makes_no_other_run(place, capsys, stage):
    run, config = STAGES[stage]
    changes = dict(workers=1, cache_gb=1., logs=2, checkpoints=5, resume=False)
    assert set(changes) < set(IGNORED_PARAMETERS)
    shutil.copytree(stage, "elsewhere")
    assert run(dataclasses.replace(config, folder="elsewhere", **changes)).record.seed == 0 and "nothing is computed" in capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
def test_overwriting_is_said(place, stage):
    run, config = STAGES[stage]
    done = run(dataclasses.replace(config, **ANOTHER[stage], overwrite=True))
    record = RunRecord.load(f"{stage}/{stage}-record.json")
    (name, value), = ANOTHER[stage].items()
    assert record.parameters[name] == value and record.metrics == done.record.metrics
    if hasattr(config, "checkpoints"): assert max(map(step_of, checkpoint_paths(stage))) == record.parameters["steps"]


def test_an_overwriting_run_that_is_stopped_goes_on_by_the_same_words(place, monkeypatch, capsys):
    import selfsupnas.train.batches as drawn
    config, plain, calls = dataclasses.replace(SEARCH, steps=8, logs=4, overwrite=True), drawn.to_device, []
    def stop_in_step(number):
        def moved(*args):
            calls.append(1)
            if len(calls) == 3 * number: [signal.raise_signal(signal.SIGINT) for _ in range(3)]
            return plain(*args)
        return moved
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(drawn, "to_device", stop_in_step(5))
        with pytest.raises(KeyboardInterrupt, match="resume at step 5"): search(config)
    finally: signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(drawn, "to_device", plain)
    assert not Path("search/search-record.json").exists()
    with pytest.raises(ValueError, match="search has an unfinished run with other parameters, at step 5.*steps=8 .now 2."): search(SEARCH)
    with pytest.raises(ValueError, match="resume=False"): search(dataclasses.replace(config, overwrite=False, resume=False))
    capsys.readouterr()
    search(config)
    assert "resumes at step 5" in capsys.readouterr().out
    search(dataclasses.replace(config, folder="whole"))
    same_run(Path("search"), Path("whole"))


def test_a_run_on_another_file_of_the_same_name_is_another_run(place):
    search(dataclasses.replace(SEARCH, seed=1, overwrite=True))
    with pytest.raises(ValueError, match="the files at architecture=.* have changed"): retrain(RETRAIN)
    with pytest.raises(ValueError, match="the files at search=.* have changed"): pareto(PARETO)
    retrain(dataclasses.replace(RETRAIN, lr=.1, overwrite=True))
    with pytest.raises(ValueError, match="the files at network=.* have changed"): evaluate(EVALUATE)


# -- The command

def test_the_command_reads_too_and_starts_no_kernel(place, capsys, monkeypatch):
    nbformat.write(nbformat.v4.new_notebook(), "search/search.ipynb")
    monkeypatch.setattr(cli, "run_notebook", None)
    before = contents("search")
    assert main(["search", *words(SEARCH)]) == 0 and "nothing is computed" in capsys.readouterr().out
    for more in (["-p", "steps", "4"], ["-p", "steps", "4", "-p", "resume", "True"], ["-p", "seed", "3"]):
        assert main(["search", *words(SEARCH), *more]) == 2
        assert "finished run with other parameters" in capsys.readouterr().err
    assert main(["search", *words(SEARCH), "-p", "overwrite", "True", "-p", "budget", ".01"]) == 2 and "out of reach" in capsys.readouterr().err
    assert contents("search") == before


def test_the_demo_refuses_another_run_at_once(place, capsys):
    Path("demo").mkdir()
    for stage in ("search", "retrain", "evaluate"): shutil.copytree(stage, f"demo/{stage}")
    data = ["demo", "--data", "folder", "--folder", "demo"]
    assert main([*data, *words(dataclasses.replace(SEARCH, data="streetscenes", folder="runs/search", seed=4))]) == 2
    assert "demo/search has a finished run" in capsys.readouterr().err


def fails_or_not(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in ("folder = ''", *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_only_a_whole_notebook_has_the_name_of_its_stage(tmp_path, capsys):
    good, bad = fails_or_not(tmp_path/"good.ipynb", "1 + 1"), fails_or_not(tmp_path/"bad.ipynb", "1 / 0")
    folder = tmp_path/"run"
    assert cli.run_stage("search", {}, folder, source=good) == 0
    whole = (folder/"search.ipynb").read_bytes()
    assert cli.run_stage("search", {}, folder, source=bad) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err and (folder/"search-failed.ipynb").exists()
    assert (folder/"search.ipynb").read_bytes() == whole and not (folder/"search-running.ipynb").exists()
    assert cli.run_stage("search", {}, folder, source=good) == 0 and not (folder/"search-failed.ipynb").exists()


def test_the_same_command_at_once_is_refused(tmp_path, capsys):
    "The second command is refused, and the notebook of the first is unchanged."
    folder, seconds = tmp_path/"run", fails_or_not(tmp_path/"second.ipynb", "1 + 1")
    code = f"import pathlib, sys; sys.path.insert(0, {str(ROOT)!r}); from selfsupnas.train.checkpoint import lock_folder\nwith lock_folder({str(folder)!r}, lock='.command.lock'): print('holds', flush=True); sys.stdin.read()"
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "holds\n"
        with pytest.raises(FolderInUse, match="another run is writing to .*run"): cli.run_stage("search", {}, folder, source=seconds)
        assert main(["search", "--folder", str(folder), "-p", "steps", "1"]) == 2 and "another run is writing" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == [".command.lock"]
    finally: first.communicate("")
    assert cli.run_stage("search", {}, folder, source=seconds) == 0


def test_a_budget_out_of_reach_is_refused_before_a_kernel_starts(place, capsys, monkeypatch):
    monkeypatch.setattr(cli, "run_notebook", None)
    assert main(["search", *words(dataclasses.replace(SEARCH, folder="runs/search", budget=.01)), "--folder", "new"]) == 2 and "out of reach" in capsys.readouterr().err
    assert main(["search", "-p", "budget", ".01", "--folder", "new"]) == 2 and "out of reach" in capsys.readouterr().err
    assert main(["pareto", "-p", "search", "search", "-p", "budgets", "(.9, .01)", "--folder", "new"]) == 2 and "out of reach" in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_missed_budget_is_said(place, capsys):
    found = search(dataclasses.replace(SEARCH, folder="missed", budget=.8, budget_gain=0.))
    assert not found.record.metrics["budget_met"] and "budget_gain" in budget_note(found.record)
    said = capsys.readouterr().out
    assert "budget missed" in said and "the budget is 0.8" in said and f"of {found.record.metrics['edges']} edges" in said
    short = search(dataclasses.replace(SEARCH, folder="short", budget=.63)).record
    assert short.metrics["budget_met"] and short.metrics["last_step_realised_share"] > .95 and "too short" in budget_note(short)
    assert budget_note(load_search("search").record) is None and found.record.metrics["realised_share"] > .8


# -- Data and classes of a network

def test_a_folder_of_a_search_is_an_architecture(place):
    assert retrain(dataclasses.replace(RETRAIN, folder="new", architecture="search", initialise="inherit")).record.inputs["supernet"]
    with pytest.raises(FileNotFoundError, match="unet_resnet50.*folder of a search.*unet_resnet18"): retrain(dataclasses.replace(RETRAIN, folder="other", architecture="unet_resnet50"))
    assert not Path("other/split").exists()


@pytest.fixture
def shuffled(place):
    "The data with another order of classes in masks and names: tree, road, house for road, house, tree."
    import numpy as np
    from PIL import Image
    shutil.copytree("data", "shuffled")
    Path("shuffled/classes.txt").write_text("tree\nroad\nhouse\n")
    table = np.array([1, 2, 0], np.uint8)
    for path in Path("shuffled/masks").rglob("*.png"): Image.fromarray(table[np.asarray(Image.open(path))]).save(path)
    return "shuffled"


def test_classes_in_another_order_are_refused_or_mapped(place, shuffled):
    from selfsupnas.metrics import segment
    plain = evaluate(EVALUATE)
    other = dataclasses.replace(EVALUATE, folder="new", data="folder", root=shuffled)
    with pytest.raises(ValueError, match="same classes in another order.*tree, road, house.*road, house, tree.*classes="): evaluate(other)
    mapped = evaluate(dataclasses.replace(other, classes=("road", "house", "tree")))
    own, theirs = (done.record.metrics["rows"] for done in (plain, mapped))
    assert theirs["searched"]["miou"] == own["searched"]["miou"] and theirs["searched"]["iou"] == own["searched"]["iou"]
    assert theirs["most frequent class"]["iou"] == own["most frequent class"]["iou"]
    image = plain.data[0][0][None]
    assert torch.equal(segment(mapped.network, image), torch.tensor([1, 2, 0])[segment(plain.network, image)])
    assert evaluate(dataclasses.replace(other, classes=("road", "house", "tree"))).metrics.miou == mapped.metrics.miou, "read again"
    with pytest.raises(ValueError, match="classes must name each class"): evaluate(dataclasses.replace(other, folder="newer", classes=("road", "house", "roof")))


def test_other_names_are_refused_or_mapped(place):
    shutil.copytree("data", "renamed")
    Path("renamed/classes.txt").write_text("Straße\nHaus\nBaum\n")
    other = dataclasses.replace(EVALUATE, folder="new", data="folder", root="renamed")
    with pytest.raises(ValueError, match="other classes.*Straße.*road"): evaluate(other)
    assert evaluate(dataclasses.replace(other, classes=("Straße", "Haus", "Baum"))).record.metrics["rows"]["searched"]["miou"] == evaluate(EVALUATE).metrics.miou


def test_weights_are_not_inherited_by_other_classes(place, shuffled):
    with pytest.raises(ValueError, match="searched for road, house, tree.*tree, road, house"):
        retrain(dataclasses.replace(RETRAIN, folder="new", root=shuffled, initialise="inherit"))


def test_an_export_asks_for_the_classes_of_the_network(place, shuffled):
    with pytest.raises(ValueError, match="road, house, tree.*tree, road, house"): export_run("retrain", "away", root=shuffled)


@pytest.mark.parametrize("act", [lambda **root: evaluate(EvaluateConfig(folder="new", network="../retrain", baselines=(), latency_repeats=1, **root)),
                                 lambda **root: pareto(ParetoConfig(folder="new", search="../search", budgets=(.9,), steps=0, random=0, **root)),
                                 lambda **root: export_run("../retrain", "away", **root)], ids=["evaluate", "pareto", "export"])
def test_a_relative_root_is_explained_elsewhere(place, monkeypatch, act):
    (place/"elsewhere").mkdir()
    monkeypatch.chdir(place/"elsewhere")
    with pytest.raises(FileNotFoundError, match="record of .*has root='data'.*elsewhere.*give another root"): act()
    act(root="../data")


def test_the_command_explains_a_relative_root_too(place, monkeypatch, capsys):
    (place/"elsewhere").mkdir()
    monkeypatch.chdir(place/"elsewhere")
    assert main(["evaluate", "-p", "network", "../retrain"]) == 2 and "has root='data'" in capsys.readouterr().err
    assert main(["export", "../retrain", "--to", "away", "--root", "../data"]) == 0


def test_a_script_that_is_stopped_ends_in_one_line():
    "Exit status 130, no traceback, and `finally` blocks run."
    code = "from selfsupnas.train.checkpoint import stop_in_one_line\nimport signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\ntry:\n    with stop_in_one_line('run'): signal.raise_signal(signal.SIGINT)\nfinally: print('last')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 130 and done.stderr == "" and done.stdout.splitlines()[-1] == "last" and len(done.stdout.splitlines()) == 2


def test_gate_statistics_come_back(place):
    found = load_search("search")
    assert set(found.statistics.importance) == set(found.table.space.gated())
    Path("search/statistics.json").write_text(json.dumps({"edges": [[0]]}))
    with pytest.raises(ValueError, match="search/statistics.json"): load_search("search")


# -- Data is part of the identity of a run

def more_images(): draw_folder(Path("more"), dict(train=7, val=3, test=2)), shutil.copytree("more", "data", dirs_exist_ok=True)
def other_masks():
    import numpy as np
    from PIL import Image
    for path in Path("data/masks").rglob("*.png"): Image.fromarray(np.flipud(np.asarray(Image.open(path))).copy()).save(path)
def other_classes(): Path("data/classes.txt").write_text("tree\nroad\nhouse\n")


@pytest.mark.parametrize("change", [more_images, other_masks, other_classes])
@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_on_other_data_is_another_run(place, stage, change):
    run, config = STAGES[stage]
    if stage == "evaluate" and change is more_images: change = other_masks # because more_images leaves the test split unchanged
    change()
    with pytest.raises(ValueError, match="the files at root=.* have changed"): run(config)


def test_an_unfinished_run_does_not_go_on_with_other_data(place, monkeypatch):
    import selfsupnas.stages.searching as module
    config = dataclasses.replace(SEARCH, folder="new")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(module, "save_statistics", lambda *_: 1 / 0)
        search(config)
    more_images()
    with pytest.raises(ValueError, match="unfinished run.*the files at root='data' have changed"): search(config)


def test_the_same_data_may_be_elsewhere(place, capsys):
    shutil.copytree("data", "moved")
    for root in ("data/", str(Path("data").resolve()), "moved"):
        assert search(dataclasses.replace(SEARCH, root=root)).record.seed == 0 and "nothing is computed" in capsys.readouterr().out


def test_what_a_finished_run_builds_on_may_have_moved(place, capsys):
    shutil.move("retrain", "retrained"), shutil.move("search", "searched")
    assert evaluate(dataclasses.replace(EVALUATE, network="retrained")).network is not None
    assert pareto(dataclasses.replace(PARETO, search="searched")).data is not None
    assert capsys.readouterr().out.count("nothing is computed") == 2


def test_a_front_on_classes_in_another_order_is_refused(place, shuffled):
    with pytest.raises(ValueError, match="search was searched for the classes road, house, tree.*tree, road, house"):
        pareto(dataclasses.replace(PARETO, folder="new", root=shuffled, steps=0, random=0))


def test_rivals_are_mapped_as_well(place, shuffled):
    asked = dict(baselines=("unet_resnet18",), train_baselines=True)
    plain = evaluate(dataclasses.replace(EVALUATE, folder="one", **asked))
    mapped = evaluate(dataclasses.replace(EVALUATE, folder="two", root=shuffled, classes=("road", "house", "tree"), **asked))
    assert mapped.record.metrics["rows"]["unet_resnet18"]["iou"] == plain.record.metrics["rows"]["unet_resnet18"]["iou"]


# -- Files of users stay

def test_hidden_files_of_a_user_stay(place):
    Path("new/.data.2024").mkdir(parents=True)
    for name in (".notes.2024.txt", ".env.1", ".history.4711.json"): (Path("new")/name).write_text("mine")
    search(dataclasses.replace(SEARCH, folder="new"))
    assert Path("new/.notes.2024.txt").exists() and Path("new/.env.1").exists() and Path("new/.data.2024").is_dir() and not Path("new/.history.4711.json").exists()


@pytest.mark.parametrize("stage, name", [("search", "supernet.safetensors"), ("retrain", "network.safetensors"), ("search", "architecture.json")])
def test_results_without_a_record_are_not_replaced(place, stage, name):
    run, config = STAGES[stage]
    Path("new").mkdir(), Path("new", name).write_text("precious")
    with pytest.raises(ValueError, match=f"new has {name} of a run without a record.*overwrite=True"): run(dataclasses.replace(config, folder="new"))
    assert Path("new", name).read_text() == "precious"


def test_a_retraining_does_not_write_over_what_it_reads(place):
    Path("new").mkdir(), shutil.copy("search/architecture.json", "new")
    with pytest.raises(ValueError, match="would write over new/architecture.json"): retrain(dataclasses.replace(RETRAIN, folder="new", architecture="new"))


def test_an_overwritten_front_goes_on_where_it_was_stopped(place, monkeypatch):
    import selfsupnas.stages.pareto_front as module
    plain, done = module.retrain_or_load, []
    def stops(config):
        if len(done) == 1: raise KeyboardInterrupt
        done.append(config.folder)
        return plain(config)
    monkeypatch.setattr(module, "retrain_or_load", stops)
    again = dataclasses.replace(PARETO, steps=2, overwrite=True)
    with pytest.raises(KeyboardInterrupt): pareto(again)
    monkeypatch.setattr(module, "retrain_or_load", plain)
    first = Path(done[0])/"retrain-record.json"
    made = first.read_text()
    pareto(again)
    assert first.read_text() == made and RunRecord.load("pareto/pareto-record.json").parameters["steps"] == 2


def test_a_finished_run_is_read_where_nothing_can_be_written(place, monkeypatch):
    def mkdir(self, *args, **options): raise OSError(30, "Read-only file system", str(self))
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert search(SEARCH).record.seed == 0
    with pytest.raises(ValueError, match="finished run with other parameters"): search(dataclasses.replace(SEARCH, seed=1))


def test_a_folder_may_have_braces(tmp_path):
    assert cli.run_stage("search", {}, tmp_path/"a {x} b", source=fails_or_not(tmp_path/"good.ipynb", "1 + 1")) == 0
    assert (tmp_path/"a {x} b"/"search.ipynb").exists()


def test_why_a_run_of_a_sweep_failed_is_said(tmp_path):
    log = tmp_path/"search.log"
    log.touch()
    assert "no output" in campaign.reason(log, "search")
    log.write_text("selfsupnas search: failed: ValueError: an old one\nselfsupnas search: running; its notebook is x\nstep 1\n")
    assert "killed" in campaign.reason(log, "search") and "old" not in campaign.reason(log, "search")
    log.write_text("selfsupnas search: running; its notebook is x\nselfsupnas search: failed: ValueError: the loss\nThe notebook with the error is y\n")
    assert "ValueError: the loss" in campaign.reason(log, "search")


def test_a_damaged_history_is_named(place):
    for text in ("", "[1, 2]", "{}"):
        Path("search/history.json").write_text(text)
        with pytest.raises(ValueError, match="search/history.json"): search(SEARCH)
