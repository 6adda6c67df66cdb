"""A comparison: its plan, with hand-written records; and a small one through Snakemake, stopped and resumed."""
import dataclasses, importlib.util, json, os, signal, subprocess, sys
from pathlib import Path

import pytest
from campaign import CampaignConfig, best_lr, command_words, compared, comparison_table, lock_gpu, make_routes, make_splits, missing_stages, plan, whole_plan
from conftest import ROOT, hear_interrupts, wait_until

from selfsupnas.core import RunRecord
from selfsupnas.rivals import all_open
from selfsupnas.space.architecture import save_architecture
from selfsupnas.space.grid import SearchSpace

def long(test):
    needs = pytest.mark.skipif(importlib.util.find_spec("snakemake") is None, reason="needs snakemake: pip install 'selfsupnas[workflow]'")
    return pytest.mark.long(needs(test))


# -- The plan, without training anything

@pytest.fixture
def planned(tmp_path):
    config = CampaignConfig(folder=str(tmp_path/"runs"), records=str(tmp_path/"kept"), data="streetscenes", size=(64, 80), crop=None, fractions=(1 / 40,), seeds=(0, 1), steps=8,
                            trial_steps=4, search_steps=8, layers=3, channels=8, rivals=("lraspp_mobilenet_v3_large",), semi_rivals=(), arms=("both", "labels"), random=2,
                            searches=("searched_by_jigsaw",))
    make_splits(config)
    return config


def leave_record(config, run, stage, **metrics):
    "A record as if the stage had been run, with made-up metrics."
    timings = {"training": 1., "step_ms": 1., "latency": {"x": {"latency_ms": 1.}}}
    RunRecord(stage, run.name, dict(run.stages)[stage], 0, metrics, timings).save(Path(config.folder)/run.name/stage)


def leave_searches(config):
    for run in plan(config):
        if run.stages[0][0] != "search": continue
        save_architecture(all_open(SearchSpace(11, config.layers, config.channels)), Path(config.folder)/run.name/"search/architecture.json")
        leave_record(config, run, "search")
    make_routes(config)


def leave_trials(config):
    "A trial is the better, the nearer its learning rate is to 0.001."
    for run in plan(config):
        if "trials" in run.name: leave_record(config, run, "retrain", val_miou=-abs(float(run.name.rsplit("/")[-1]) - 1e-3))


def leave_compared(config, count):
    runs = [run for run in plan(config) if run.stages[-1][0] == "evaluate"][:count]
    for run in runs:
        leave_record(config, run, "retrain", val_miou=.4)
        leave_record(config, run, "evaluate", split="test", rows={"x": {"miou": .5, "iou": {}, "gflops": 1., "parameters": 1}})
    return runs


def test_a_plan_grows_with_its_searches_and_its_trials(planned):
    assert [run.name for run in plan(planned)] == ["0.025/found", *(f"0.025/trials/lraspp_mobilenet_v3_large/{lr:g}" for lr in planned.lrs), "0.025/found_by_jigsaw"]
    leave_searches(planned)
    assert len(plan(planned)) == 2 + 3 + 3, "the searched network has trials"
    leave_trials(planned)
    runs = plan(planned)
    assert len(runs) == 8 + 2 * (2 * 3 + 2 + 2), "and compared runs for two seeds"
    assert dict(runs[-1].stages)["retrain"]["lr"] == best_lr(planned, "searched") == 1e-3, "that of the best validation mIoU"
    by_jigsaw = {run.name: dict(run.stages) for run in runs if "by_jigsaw" in run.name}
    assert set(by_jigsaw) == {"0.025/found_by_jigsaw", *(f"0.025/searched_by_jigsaw-{arm}/{seed}" for arm in ("labels", "inherit") for seed in (0, 1))}
    assert by_jigsaw["0.025/found_by_jigsaw"]["search"]["w_sup"] == 0
    assert len({json.dumps(dict(run.stages)["retrain"]["split_folder"]) for run in runs if "retrain" in dict(run.stages)}) == 1


def test_a_rival_with_consistency_alone_has_trials(planned):
    assert any("trials/unet_resnet18" in run.name for run in plan(dataclasses.replace(planned, rivals=(), semi_rivals=("unet_resnet18",))))


def test_compared_runs_are_read_with_their_network_arm_and_seed(planned):
    leave_searches(planned), leave_trials(planned)
    runs, results = leave_compared(planned, 3), compared(planned.folder)
    assert [(r["parameters"]["network"], r["parameters"]["arm"], r["seed"]) for r in results] == sorted((*run.name.split("/")[1].rsplit("-", 1), 0) for run in runs)
    assert all(r["metrics"]["test_miou"] == .5 and r["parameters"]["lr"] == 1e-3 for r in results)


def test_results_are_not_mixed(planned):
    "A record of other parameters is an error; an evaluation older than its training is made again."
    leave_searches(planned), leave_trials(planned)
    whole = leave_compared(planned, 1)[0]
    assert missing_stages(planned, whole) == []
    longer = next(run for run in plan(dataclasses.replace(planned, steps=9)) if run.name == whole.name)
    with pytest.raises(ValueError, match="steps = 8, not 9"): missing_stages(planned, longer)
    file = Path(planned.folder)/whole.name/"retrain"/"retrain-record.json"
    file.write_text(file.read_text().replace('"created": "2', '"created": "3'))
    assert [stage for stage, _ in missing_stages(planned, whole)] == ["evaluate"]
    file.unlink()
    assert [stage for stage, _ in missing_stages(planned, whole)] == ["retrain", "evaluate"]


def test_a_route_that_changed_under_its_runs_is_an_error(planned):
    leave_searches(planned)
    save_architecture(all_open(SearchSpace(11, 4, 8)), Path(planned.folder)/"0.025"/"found"/"search"/"architecture.json")
    with pytest.raises(ValueError, match="searched.json differs"): make_routes(planned)


@pytest.mark.parametrize("bad, named", [(dict(rivals=("deeplab",)), "deeplab"), (dict(arms=("all",)), "'all'"), (dict(seeds=()), "seeds"),
                                        (dict(searches=("searched",)), "'searched'")])
def test_a_wrong_parameter_is_named(bad, named):
    with pytest.raises(ValueError, match=named): CampaignConfig(**bad)


def test_the_whole_plan_is_known_from_the_start(planned):
    whole, before = whole_plan(planned), plan(planned)
    assert len(whole) > len(before)
    leave_searches(planned), leave_trials(planned)
    assert [run.name for run in plan(planned)] == list(whole) and [run().name for run, _ in whole.values()] == list(whole)
    assert set(whole["0.025/random-0-labels/0"][1]) == {("0.025/found", "search"), *((f"0.025/trials/searched/{lr:g}", "retrain") for lr in planned.lrs)}
    assert [need[0] for need in whole["0.025/searched_by_jigsaw-labels/0"][1]][-1] == "0.025/found_by_jigsaw"


# -- The commands

def test_a_stage_is_told_its_parameters_and_goes_to_its_gpu(tmp_path, monkeypatch):
    assert command_words(tmp_path/"a", "retrain", {"lr": 1e-3, "crop": None}) == ["retrain", "--folder", str(tmp_path/"a"), "--lr", "0.001", "--crop", "None"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert "for gpu in 2 5 7;" in lock_gpu("runs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert lock_gpu("runs") == ""


# -- In miniature, with real processes

@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("campaign")
    return CampaignConfig(folder=str(place/"runs"), records=str(place/"kept"), data="streetscenes", size=(64, 80), crop=None, fractions=(1 / 40,), seeds=(0,), steps=4, trial_steps=2,
                          search_steps=4, layers=6, channels=8, lrs=(1e-3,), rivals=("unet_resnet18",), semi_rivals=("unet_resnet18",), arms=("both",), open=False, random=0,
                          searches=("searched_by_jigsaw",))


def snakemake(config, *words):
    "A process of snakemake with the parameters of `config`."
    folder = Path(config.folder).parent
    (folder/"config.json").write_text(json.dumps(dataclasses.asdict(config)))
    file = ROOT/"nbs"/"experiments"/"compare.smk"
    with open(folder/"snakemake.log", "a") as log:
        return subprocess.Popen([sys.executable, "-m", "snakemake", "-s", file, "--configfile", "config.json", "--cores", "2", "--keep-going", *words], cwd=folder, stdout=log,
                                stderr=log, start_new_session=True, preexec_fn=hear_interrupts, env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})


@pytest.fixture(scope="module")
def done(config):
    "Stopped after its first record, then run to its end."
    driver = snakemake(config)
    assert wait_until(lambda: any(not missing_stages(config, run) for run in plan(config)), lambda: driver.poll() is not None), "ended without a record"
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait(600) == 1
    before = {run.name: {stage: RunRecord.load(f"{config.folder}/{run.name}/{stage}/{stage}-record.json").created for stage, _ in run.stages}
              for run in plan(config) if not missing_stages(config, run)}
    assert before and len(before) < 9, "stopped on its way"
    return snakemake(config).wait(1800), before


@long
def test_nothing_is_made_twice_and_nothing_is_missing(config, done):
    status, before = done
    assert status == 0
    runs = plan(config)
    assert {run.name for run in runs} == {"0.025/found", "0.025/trials/searched/0.001", "0.025/trials/unet_resnet18/0.001", "0.025/searched-both/0",
                                          "0.025/unet_resnet18-labels/0", "0.025/unet_resnet18-semi/0", "0.025/found_by_jigsaw", "0.025/searched_by_jigsaw-labels/0",
                                          "0.025/searched_by_jigsaw-inherit/0"}
    assert not any(missing_stages(config, run) for run in runs)
    for name, stages in before.items():
        for stage, created in stages.items(): assert RunRecord.load(f"{config.folder}/{name}/{stage}/{stage}-record.json").created == created


@long
def test_all_runs_share_split_views_and_steps(config, done):
    records = [json.loads(path.read_text()) for path in Path(config.records).glob("*/*-*/*/retrain/retrain-record.json")]
    assert len(records) == 5
    for key in ("data", "size", "crop", "zoom", "steps", "batch_labelled", "split_folder", "ema_decay", "warmup", "weight_decay", "optimiser"):
        assert len({json.dumps(r["parameters"][key]) for r in records}) == 1, key
    assert {r["metrics"]["labelled_images"] for r in records} == {10}


@long
def test_trials_never_read_the_test_split(config, done):
    for run in plan(config):
        if "trials" in run.name or run.name.endswith("found"): assert "evaluate" not in [stage for stage, _ in run.stages]
    assert best_lr(config, "unet_resnet18") == 1e-3


@long
def test_a_search_by_the_jigsaw_reads_no_label(config, done):
    record = RunRecord.load(f"{config.records}/0.025/found_by_jigsaw/search/search-record.json")
    assert record.parameters["w_sup"] == record.parameters["w_semi"] == 0 and record.metrics["derived_inherited_val_miou"] is None


@long
def test_what_is_compared_is_what_was_evaluated(config, done):
    rows = {(r["parameters"]["network"], r["parameters"]["arm"]): r["metrics"] for r in compared(config.records)}
    assert set(rows) == {("searched", "both"), ("unet_resnet18", "labels"), ("unet_resnet18", "semi"), ("searched_by_jigsaw", "labels"), ("searched_by_jigsaw", "inherit")}
    assert rows["unet_resnet18", "labels"]["gflops"] == rows["unet_resnet18", "semi"]["gflops"] > rows["searched", "both"]["gflops"]
    for row in rows.values():
        known = [iou for iou in row["iou"].values() if iou is not None]
        assert len(row["iou"]) == 11 and row["test_miou"] == pytest.approx(sum(known) / len(known))


@long
def test_the_committed_records_are_enough(config, done, tmp_path):
    elsewhere = CampaignConfig(**{**config.__dict__, "folder": str(tmp_path)})
    make_routes(elsewhere)
    assert len(plan(elsewhere)) == 9 and not any(missing_stages(elsewhere, run) for run in plan(elsewhere))


# -- The table

def result(network, seed, miou, gflops):
    "An entry of `compared` with made-up metrics."
    return {"stage": "compared", "name": network, "seed": seed, "file": f"{network}-{seed}", "parameters": {"fraction": .125, "network": network, "arm": "labels"},
            "metrics": {"test_miou": miou, "val_miou": miou, "gflops": gflops, "parameter_count": 2_000_000}, "timings": {"latency_ms": 20 + 2 * seed}}


def test_the_best_network_is_first():
    results = [result("small", 0, .30, .1), result("large", 0, .38, 10.), result("small", 1, .34, .1)]
    lines = comparison_table(results).splitlines()
    assert "large" in lines[2] and "32.0 ± 2.8 (n=2)" in lines[3] and lines[3].endswith("| 2.000 | 20 |"), "mean and spread of 30 and 34; the less of 20 and 22 ms"
    assert comparison_table(results, latency=False).splitlines()[3].endswith("| 2.000 |")
    assert comparison_table(results, lambda row: row["network"] == "large").splitlines()[2:] == lines[2:3]
