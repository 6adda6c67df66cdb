"A campaign in miniature, with real processes: it is stopped on the way, started again, and leaves comparable records."
import json, os, signal, subprocess, sys
from pathlib import Path

import pytest
from conftest import wait_until

from selfsupnas.campaign import CampaignConfig, best_lr, compared, make_routes, missing_stages, plan
from selfsupnas.core import RunRecord
from selfsupnas.driver import run_campaign

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("campaign")
    return CampaignConfig(folder=str(place/"runs"), records=str(place/"kept"), data="streetscenes", size=(64, 80), crop=None, fractions=(1 / 40,), seeds=(0,), steps=4, trial_steps=2,
                          search_steps=4, layers=6, channels=8, lrs=(1e-3,), rivals=("unet_resnet18",), semi_rivals=("unet_resnet18",), arms=("both",), open=False, random=0,
                          searches=("searched_by_jigsaw",))


@pytest.fixture(scope="module")
def done(config):
    "Stopped after its first record, then run to its end."
    command = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from selfsupnas.campaign import CampaignConfig; from selfsupnas.driver import run_campaign; run_campaign(CampaignConfig(**{config.__dict__!r}))"
    driver = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL, start_new_session=True)
    assert wait_until(lambda: any(not missing_stages(config, run) for run in plan(config)), lambda: driver.poll() is not None), "ended without a record"
    os.killpg(driver.pid, signal.SIGINT)
    driver.wait(600)
    before = {run.name: {stage: RunRecord.load(f"{config.folder}/{run.name}/{stage}/{stage}-record.json").created for stage, _ in run.stages}
              for run in plan(config) if not missing_stages(config, run)}
    assert before and len(before) < 9, "stopped on its way"
    return run_campaign(config), before


def test_nothing_is_made_twice_and_nothing_is_missing(config, done):
    failed, before = done
    assert failed == []
    runs = plan(config)
    assert {run.name for run in runs} == {"0.025/found", "0.025/trials/searched/0.001", "0.025/trials/unet_resnet18/0.001", "0.025/searched-both/0",
                                          "0.025/unet_resnet18-labels/0", "0.025/unet_resnet18-semi/0", "0.025/found_by_jigsaw", "0.025/searched_by_jigsaw-labels/0",
                                          "0.025/searched_by_jigsaw-inherit/0"}
    assert not any(missing_stages(config, run) for run in runs)
    for name, stages in before.items():
        for stage, created in stages.items(): assert RunRecord.load(f"{config.folder}/{name}/{stage}/{stage}-record.json").created == created


def test_all_runs_share_split_views_and_steps(config, done):
    records = [json.loads(path.read_text()) for path in Path(config.records).glob("*/*-*/*/retrain/retrain-record.json")]
    assert len(records) == 5
    for key in ("data", "size", "crop", "zoom", "steps", "batch_labelled", "split_folder", "ema_decay", "warmup", "weight_decay", "optimiser"):
        assert len({json.dumps(r["parameters"][key]) for r in records}) == 1, key
    assert {r["metrics"]["labelled_images"] for r in records} == {10}


def test_trials_never_read_the_test_split(config, done):
    for run in plan(config):
        if "trials" in run.name or run.name.endswith("found"): assert "evaluate" not in [stage for stage, _ in run.stages]
    assert best_lr(config, "unet_resnet18") == 1e-3


def test_a_search_by_the_jigsaw_reads_no_label(config, done):
    record = RunRecord.load(f"{config.records}/0.025/found_by_jigsaw/search/search-record.json")
    assert record.parameters["w_sup"] == record.parameters["w_semi"] == 0 and record.metrics["derived_inherited_val_miou"] is None


def test_what_is_compared_is_what_was_evaluated(config, done):
    rows = {(r["parameters"]["network"], r["parameters"]["arm"]): r["metrics"] for r in compared(config.records)}
    assert set(rows) == {("searched", "both"), ("unet_resnet18", "labels"), ("unet_resnet18", "semi"), ("searched_by_jigsaw", "labels"), ("searched_by_jigsaw", "inherit")}
    assert rows["unet_resnet18", "labels"]["gflops"] == rows["unet_resnet18", "semi"]["gflops"] > rows["searched", "both"]["gflops"]
    for row in rows.values():
        known = [iou for iou in row["iou"].values() if iou is not None]
        assert len(row["iou"]) == 11 and row["test_miou"] == pytest.approx(sum(known) / len(known))


def test_the_committed_records_are_enough(config, done, tmp_path):
    elsewhere = CampaignConfig(**{**config.__dict__, "folder": str(tmp_path)})
    make_routes(elsewhere)
    assert len(plan(elsewhere)) == 9 and not any(missing_stages(elsewhere, run) for run in plan(elsewhere))
