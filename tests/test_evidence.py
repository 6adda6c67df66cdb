"The plan of nbs/experiments/evidence.py can be carried out, its page says what the records say (`make evidence-check`)."
import contextlib, io, json, sys

import pytest
from conftest import ROOT

from selfsupnas.core import RunRecord
from selfsupnas.space.architecture import load_architecture
from selfsupnas.stages.configs import STAGES

sys.path.insert(0, str(ROOT/"nbs"/"experiments"))
import evidence

PLAN = evidence.runs()
PAGE = json.loads((ROOT/"nbs"/"experiments"/"evidence.ipynb").read_text("utf8"))
MADE = [name for name in PLAN if name not in evidence.missing(evidence.RECORDS)]


@pytest.mark.parametrize("name", PLAN)
def test_a_planned_run_is_valid(name):
    "Its parameters are those of its stages, what it needs comes before it, the files that it names are there."
    run, names = PLAN[name], list(PLAN)
    for stage, parameters in run.stages.items():
        config = STAGES[stage](**parameters)
        kept = getattr(config, "architecture", "").partition(evidence.KEPT + "/")[2]
        if kept and not run.needs: assert load_architecture(evidence.RECORDS/kept).space.channels == (48 if kept.endswith("-48.json") else 24)
        if stage == "retrain": assert config.checkpoints == 1 and not config.w_jig and config.crop == evidence.CROP
    assert all(names.index(needed) < names.index(name) for needed in run.needs)


def test_the_arms_differ_in_one_thing():
    "The control has the same term on labelled images; no other parameter differs."
    for name, (_, fractions) in evidence.SETS.items():
        for fraction in (*fractions, evidence.FEW[name]):
            for draw in evidence.DRAWS:
                labels, control, unlabelled = (PLAN[f"{name}/{evidence.share(fraction)}/{arm}/{draw}"].stages["retrain"] for arm in evidence.ARMS)
                assert {k for k in control if control[k] != unlabelled.get(k)} == {"consistency_images"}
                assert {k for k in labels if labels[k] != unlabelled[k]} == {"w_semi"} and unlabelled["teacher"].endswith(f"/labels/{draw}/retrain")


@pytest.mark.parametrize("name", MADE)
def test_a_record_is_of_its_run(name):
    for stage, parameters in PLAN[name].stages.items():
        record = RunRecord.load(evidence.RECORDS/name/f"{stage}-record.json")
        for key, value in json.loads(json.dumps(parameters)).items():
            if not isinstance(value, str) or evidence.KEPT not in value and evidence.RUNS not in value: assert record.parameters[key] == value, key
        assert not any("/" == str(v)[:1] for v in record.parameters.values()), "no folder of a machine"


def test_a_plan_is_carried_out(tmp_path, monkeypatch):
    "A small search and a training of its route: records are kept, a second call has nothing to do, a failure is told."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evidence.os, "nice", lambda by: None)
    tiny = dict(data="streetscenes", size=(64, 80), steps=2, logs=1, w_jig=0., w_semi=0.)
    plan = {"search/0": evidence.Run({"search": dict(tiny, layers=3, channels=8, candidates=1, budget=.9)}),
            "route/0": evidence.Run({"retrain": dict(tiny, architecture=f"{evidence.KEPT}/search/0/architecture.json"),
                                     "evaluate": dict(baselines=(), latency_repeats=1)}, ("search/0",)),
            "bad": evidence.Run({"retrain": dict(tiny, architecture="nowhere")})}
    monkeypatch.setattr(evidence, "runs", lambda: plan)
    records = tmp_path/"records"
    assert "val_miou" in evidence.one_run("route/0", tmp_path/"runs", records), "with the search that it needs"
    assert evidence.missing(records) == ["bad"] and "failed" in evidence.one_run("bad", tmp_path/"runs", records)
    assert "nowhere" in (tmp_path/"runs"/"bad"/"log.txt").read_text()
    assert (records/"search/0/architecture.json").exists() and (records/"route/0/evaluate-record.json").exists()


def test_the_page_says_what_the_records_say():
    "Its cells, run again, make the same tables and print the same lines."
    names = {}
    for cell in PAGE["cells"]:
        if cell["cell_type"] != "code": continue
        source, printed = "".join(cell["source"]), io.StringIO()
        tables = ["".join(o["data"]["text/markdown"]) for o in cell["outputs"] if "text/markdown" in o.get("data", {})]
        body, _, last = source.rpartition("\n") if tables else (source, "", "")
        with contextlib.redirect_stdout(printed): exec(body, names)
        assert printed.getvalue() == "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
        if tables: assert eval(last, names).data == tables[0]
