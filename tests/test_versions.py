"Files that version 0.1 wrote are read: a search, a retraining, an evaluation and a front of a tiny network, kept in tests/version-0.1."
import json, shutil
from pathlib import Path

import pytest
import torch

import selfsupnas
from selfsupnas.cli import main
from selfsupnas.core import RENAMED
from selfsupnas.space.architecture import load_architecture
from selfsupnas.space.gate import gates_of
from selfsupnas.space.grid import Edge
from selfsupnas.stages.evaluation import EvaluateConfig, evaluate, load_evaluation
from selfsupnas.stages.pareto_front import ParetoConfig, load_pareto, pareto
from selfsupnas.stages.retraining import RetrainConfig, load_network, load_retrain, retrain
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import load_search, load_supernet, search
from selfsupnas.train.checkpoint import read_checkpoint
from selfsupnas.viz.tables import read_records

OLD = Path(__file__).parent/"version-0.1"
TINY = dict(size=(64, 64), steps=4, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, optimiser="sgd", jigsaw_n=2)
SEARCH = SearchConfig(folder="search", layers=2, channels=2, budget=.95, candidates=2, choice_images=2, w_binary=.1, recompute=True, **TINY)
RETRAIN = RetrainConfig(folder="retrain", architecture="search/architecture.json", w_jig=.1, w_semi=1., consistency="fixmatch", **TINY) # defaults of 0.1
# command of each stage as it was made, and how its folder is read
STAGES = {"search": (search, SEARCH, load_search), "retrain": (retrain, RETRAIN, load_retrain),
          "evaluate": (evaluate, EvaluateConfig(folder="evaluate", network="retrain", baselines=()), load_evaluation),
          "pareto": (pareto, ParetoConfig(folder="front", search="search", budgets=(.97,), steps=0, random=1), load_pareto)}


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory with what version 0.1 left in it."
    shutil.copytree(OLD, tmp_path/"old")
    monkeypatch.chdir(tmp_path/"old")


def old_record(folder):
    path, = Path(folder).glob("*-record.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_is_read_and_not_made_again(stage, here, capsys):
    run, config, load = STAGES[stage]
    before = old_record(config.folder)
    assert before["versions"]["selfsupnas"] == "0.1.0" and "figures" in before
    record = load(config.folder).record
    assert record.stage == stage and not set(RENAMED) & {*record.parameters, *record.metrics}
    assert len(record.metrics) == len(before["figures"]) and len(record.parameters) == len(before["parameters"])
    assert run(config).record == record and "holds this run" in capsys.readouterr().out
    assert old_record(config.folder) == before, "the file stays as it was"


def test_values_come_with_the_new_names(here):
    made, before = load_search("search"), old_record("search")
    for old, new in (("closing_threshold", "gate_threshold"), ("paths_kept", "edges_kept"), ("paths", "edges")):
        assert made.record.metrics[new] == before["figures"][old]
    assert made.record.parameters["w_binary"] == before["parameters"]["w_harden"] == .1
    row, old = made.trained.history[-1], json.loads(Path("search/history.json").read_text())[-1]
    assert (row["binary"], row["pseudo_share"], row["gate_threshold"]) == (old["harden"], old["kept"], old["closing"])
    front = load_pareto("front")
    assert [row["gate_threshold"] for row in front.rows if row["kind"] == "dynamic"] == [row["closing"] for row in old_record("front")["figures"]["rows"] if "closing" in row]
    assert {r["stage"] for r in read_records(".")} == {"search", "retrain", "evaluate", "pareto"}


def test_architectures_and_weights_are_read(here):
    data = json.loads(Path("search/architecture.json").read_text())
    assert data["schema"] == 1
    found = load_architecture("search")
    assert found.edges == {Edge(*entry[:3]): entry[3] for entry in data["paths"]}
    supernet = load_supernet("search")
    threshold = old_record("search")["figures"]["closing_threshold"]
    assert all(gate.threshold.item() == pytest.approx(threshold) for gate in gates_of(supernet).values())
    with torch.no_grad():
        logits = load_network("retrain")(torch.zeros(1, 3, 64, 64))
        assert logits.shape == (1, 11, 64, 64) and torch.isfinite(logits).all()


@pytest.mark.parametrize("stage, miou", [("search", "supernet_val_miou"), ("retrain", "val_miou")])
def test_a_stopped_run_goes_on(stage, miou, here, capsys):
    run, config, _ = STAGES[stage]
    before = old_record(stage)["figures"]
    for path in Path(stage).iterdir():
        if path.is_file() and path.name != "checkpoint-000003.pt": path.unlink()
    shutil.rmtree(f"{stage}/split")
    assert read_checkpoint(f"{stage}/checkpoint-000003.pt")["step"] == 3
    record = run(config).record
    assert "resumes at step 3" in capsys.readouterr().out
    assert record.metrics[miou] == pytest.approx(before[miou], abs=5e-3)
    assert record.metrics["labels_consumed"] == before["labels_consumed"]


@pytest.mark.parametrize("cls, old", [(SearchConfig, "w_harden"), (SearchConfig, "harden_ramp")])
def test_an_old_name_by_hand_is_refused_with_the_new_one(cls, old):
    with pytest.raises(ValueError, match=f"{old} is {RENAMED[old]} since version 0.2"): cls(**{old: 1.})


def test_the_old_command_is_refused_with_the_new_one(capsys):
    assert main(["front", "-p", "search", "runs/search"]) == 2 and "pareto" in capsys.readouterr().err


def test_a_file_of_a_later_version_says_which_version_reads_it(tmp_path):
    data = json.loads((OLD/"search"/"architecture.json").read_text())
    (tmp_path/"later.json").write_text(json.dumps({**data, "schema": 9}))
    with pytest.raises(ValueError, match=f"later.json.*schema is 9.*{selfsupnas.__version__}"): load_architecture(tmp_path/"later.json")


def test_a_parameter_that_an_earlier_run_lacks_had_its_default_then():
    from selfsupnas.train.checkpoint import ADDED_PARAMETERS, parameter_differences, run_identity
    now = run_identity(SearchConfig())
    before = {name: value for name, value in now.items() if name not in ADDED_PARAMETERS}
    assert parameter_differences(before, now) == "" and "gate_lr" in parameter_differences(before, {**now, "gate_lr": 2.5})
