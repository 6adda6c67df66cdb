"One step by every recipe, against the same computed by hand; batch norm by groups; what a schedule weighs; what a teacher remembers."
import copy, dataclasses, importlib, inspect, itertools, json, math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from imports import MODULES
from selfsupnas.data.augment import cutmix_boxes
from selfsupnas.data.datasets import load_dataset
from selfsupnas.metrics import ImageSubset
from selfsupnas.train.batches import LabelledBatch, StepBatch, UnlabelledBatch, load_training_data, make_batches, make_streams, present
from selfsupnas.train.config import STATISTICS, ConsistencyConfig, JigsawConfig, OptimiserConfig, TrainingConfig, ViewConfig
from selfsupnas.space.budget import budget_loss, expected_cost, measure_costs, realised_cost, static_cost
from selfsupnas.space.grid import SearchSpace
from selfsupnas.tasks.consistency import CONSISTENCY
from selfsupnas.tasks.jigsaw import JigsawHead, cut_and_shuffle
from selfsupnas.train.step import (Losses, LossWeights, Objective, StepMetrics, UnlabelledViews, budget_term, build_multitask_model, configured_consistency, step_weights,
                                   consistency_term, draw_mix_masks, jigsaw_term, run_passes, supervised_term)
from selfsupnas.tasks.permutations import permutation_set
from selfsupnas.stages.retraining import RetrainConfig, retrain
from selfsupnas.stages.calibration import gate_statistics
from selfsupnas.stages.choice import choice_images, choose_route
from selfsupnas.stages.configs import BudgetConfig, SearchConfig
from selfsupnas.stages.searching import BudgetLosses, search
from selfsupnas.space.supernet import build_supernet, gates_from_edges
from selfsupnas.tasks.teacher import AdaptiveThreshold, ClassThreshold, EMATeacher, RelativeThreshold
from selfsupnas.train.update import OUTCOMES
from selfsupnas.train.loop import TrainResult, jigsaw_metrics, make_moving_threshold, make_optimiser, solve_jigsaws, teacher_student_views, train

SMALL = dict(size=(64, 80), batch_labelled=2, batch_unlabelled=3, batch_jigsaw=4, ramp=(0., 0.), logs=2, steps=4)
SPACE = dict(layers=3, channels=8)


@pytest.fixture
def config(tmp_path): return TrainingConfig(folder=str(tmp_path/"run"), **SMALL)


def network(config, classes):
    torch.manual_seed(0)
    return build_supernet(SearchSpace(classes, **SPACE))


def one_step(config, threshold=None, **weights):
    "Terms, metrics and all that they were made of; in evaluation mode, so that no image sees another."
    data = load_training_data(config)
    multitask = build_multitask_model(network(config, data.train.spec.num_classes), config).eval()
    with torch.no_grad(): # logits far enough apart that a threshold divides them
        multitask.model.classifier.weight *= 4000
    teacher = EMATeacher(multitask)
    with torch.no_grad():
        for p in teacher.model.parameters(): p += .001 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    batch = next(make_batches(config, data)).to("cpu")
    with torch.no_grad():
        losses, metrics = Objective(config, multitask, teacher, permutation_set(config.jigsaw_n), threshold=threshold)(batch, LossWeights(**weights), torch.Generator().manual_seed(5))
    return losses, metrics, multitask, teacher, batch


def mixed_by_hand(x, box, hole, blank):
    "Pixel by pixel: inside the box the image before, in the hole nothing."
    out = x.clone()
    for b, i, j in itertools.product(range(len(x)), *map(range, x.shape[-2:])):
        if box[b, i, j]: out[b, ..., i, j] = x[b - 1, ..., i, j]
        if hole is not None and hole[b, i, j]: out[b, ..., i, j] = blank
    return out


def drawn(config, images, generator):
    boxes = cutmix_boxes(len(images), images.shape[-2:], generator, p=config.cutmix_p, area=config.cutmix_area)
    holes = cutmix_boxes(len(images), images.shape[-2:], generator, p=config.cutout_p, area=config.cutout_area) if config.cutout_p else None
    return boxes, holes


# ---- targets

RECIPES = {"averaged": dict(consistency="mean_teacher"), "summed": dict(consistency="mean_teacher", squares="summed"),
           "sharpened": dict(consistency="mean_teacher", squares="summed", temperature=.5),
           "cutmix": dict(consistency="mean_teacher", cutmix_p=1., cutmix_area=(.5, .5)),
           "cutout": dict(consistency="mean_teacher", cutmix_p=0., cutout_p=1., cutout_area=(.1, .3)),
           "cutmix and cutout": dict(consistency="fixmatch", threshold=.3, cutmix_p=.5, cutout_p=.7),
           "hard": dict(consistency="fixmatch", threshold=.4), "relative": dict(consistency="fixmatch", threshold=.9, threshold_kind="relative"),
           "by class": dict(consistency="fixmatch", threshold=.9, threshold_kind="class")}


@pytest.mark.parametrize("name", RECIPES)
def test_the_consistency_term_is_what_a_hand_computes(config, name):
    config = dataclasses.replace(config, **RECIPES[name])
    threshold = {"relative": RelativeThreshold(config.threshold), "class": ClassThreshold(config.threshold, .5)}.get(config.threshold_kind)
    losses, metrics, multitask, teacher, step = one_step(config, threshold, semi=1)
    batch, labelled, (box, hole) = step.unlabelled, step.labelled, drawn(config, step.unlabelled.weak, torch.Generator().manual_seed(5))
    with torch.no_grad():
        view = mixed_by_hand(batch.strong, box, hole, 0.)
        student, taught = multitask.model(view).double().softmax(1), teacher.model.model(batch.weak).double()
        own = multitask.model(labelled.image).double().softmax(1)
    goal, valid = mixed_by_hand(taught, box, None, 0.), mixed_by_hand(batch.valid, box, hole, False)
    tau = [config.threshold] * goal.shape[1]
    if config.threshold_kind == "relative":
        sure = [own[b, :, i, j].max().item() for b, i, j in (labelled.label != 255).nonzero().tolist()]
        tau = [config.threshold * sum(sure) / len(sure)] * goal.shape[1]
    if config.threshold_kind == "class":
        means = []
        for k in range(goal.shape[1]):
            of_class = [p.max().item() for b, i, j in batch.valid.nonzero().tolist() if (p := taught[b, :, i, j].softmax(0)).argmax() == k]
            means.append((1 + sum(of_class) / len(of_class)) / 2 if of_class else 1.)
        tau = [config.threshold * m / max(means) for m in means]
    total, kept = 0., [0, 0]
    for b, i, j in valid.nonzero().tolist():
        p, q = student[b, :, i, j], (goal[b, :, i, j] / config.temperature).softmax(0)
        k = int(goal[b, :, i, j].argmax())
        over = goal[b, :, i, j].softmax(0)[k].item() >= tau[k]
        kept[over] += 1
        if config.consistency == "fixmatch": total -= math.log(p[k]) * over
        else: total += (p - q).square().sum().item() / (1 if config.squares == "summed" else len(p))
    assert losses.semi.item() == pytest.approx(total / valid.sum().item(), rel=1e-3)
    assert metrics.pseudo_share.item() == pytest.approx(kept[1] / sum(kept), abs=2e-4)
    assert metrics.pseudo_counts.view(4, -1).sum(1).tolist()[0] == valid.sum()
    if config.consistency == "fixmatch": assert 0 < kept[1] < sum(kept), "the threshold divides the pixels"


def test_strong_views_of_labelled_images_have_their_labels_mixed_alike(config):
    config = dataclasses.replace(config, w_strong=1., w_semi=0., cutmix_p=1., cutout_p=.6)
    losses, _, multitask, _, step = one_step(config, strong=1)
    batch, (box, hole) = step.labelled, drawn(config, step.labelled.image, torch.Generator().manual_seed(5))
    with torch.no_grad(): logits = multitask.model(mixed_by_hand(batch.strong, box, hole, 0.))
    labels = mixed_by_hand(batch.label, box, hole, 255)
    assert set(present(losses)) == {"strong"}
    torch.testing.assert_close(losses.strong, F.cross_entropy(logits, labels, ignore_index=255), rtol=1e-4, atol=1e-5)
    assert not torch.equal(batch.strong, batch.image) and step.unlabelled is None


@pytest.mark.parametrize("share", [0., .5])
def test_a_share_of_jigsaws_keeps_its_order(config, share):
    config = dataclasses.replace(config, jigsaw_share=share, w_semi=0., batch_jigsaw=8)
    losses, _, multitask, _, batch = one_step(config, jig=1)
    draws, permutations = torch.Generator().manual_seed(5), permutation_set(2)
    target = torch.randint(24, (8,), generator=draws)
    target[torch.rand(8, generator=draws) >= share] = 0 # the first is the order itself
    assert permutations[0].tolist() == [0, 1, 2, 3] and (share or not target.any())
    shuffled, _ = cut_and_shuffle(batch.jigsaw, permutations, draws, target)
    with torch.no_grad(): logits = multitask.head(multitask.model.encode(shuffled)[1])
    torch.testing.assert_close(losses.jig, F.cross_entropy(logits, target), rtol=1e-4, atol=1e-5)
    if share: assert 0 < (target == 0).sum() < 8
    with pytest.raises(ValueError, match="share"): cut_and_shuffle(batch.jigsaw, permutations[1:], draws, share=.5)


# ---- schedules

def test_what_a_step_weighs(config):
    def at(share, **changes): return step_weights(dataclasses.replace(config, **changes), share)
    assert at(.0) == LossWeights(sup=1., jig=.5, semi=1.) == at(1.), "as ever"
    stages = dict(sup_start=.2, jigsaw_decay=(.2, .2), ramp=(.5, .5), w_strong=2.)
    assert [at(share, **stages) for share in (.0, .19, .2, .5)] == [
        LossWeights(0., 0., .5, 0.)] * 2 + [LossWeights(1., 2., 0., 0.), LossWeights(1., 2., 0., 1.)]
    assert at(.3, jigsaw_decay=(.2, .4)).jig == pytest.approx(.25)
    assert at(.1, jigsaw_ramp=(.0, .2)).jig == pytest.approx(.5 * math.exp(-5 / 4))
    assert at(.325, ramp=(.15, .5)).semi == pytest.approx(math.exp(-5 / 4)) and at(.1, ramp=(.15, .5)).semi == 0


def test_a_stage_of_jigsaws_alone_moves_no_classifier(config):
    config = dataclasses.replace(config, sup_start=.5, jigsaw_decay=(.5, .5), ramp=(.5, .5), optimiser="sgd", lr=.1, weight_decay=0., warmup=0.)
    data = load_training_data(config)
    model = network(config, data.train.spec.num_classes)
    seen, before = [], model.classifier.weight.clone()
    from selfsupnas.train import loop as training
    plain = training.take_step
    def watched(loss, state, *more):
        done = plain(loss, state, *more)
        seen.append((torch.equal(state.multitask.model.classifier.weight, before), state.multitask.head.classify.weight.clone()))
        return done
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "take_step", watched)
        history = train(model, config, data).history
    assert [same for same, _ in seen] == [True, True, False, False]
    assert not torch.equal(seen[0][1], seen[1][1]) and torch.equal(seen[1][1], seen[3][1]), "the head learns first, and then no more"
    assert "sup" not in history[0] and "jig" in history[0] and "jig" not in history[1]


# ---- the teacher

def test_a_teacher_starts_again_as_a_copy_of_the_student(config):
    last = dataclasses.replace(config, ema_start=.75, ema_buffers="averaged")
    data = load_training_data(last)
    trained = train(network(last, data.train.spec.num_classes), last, data)
    for name, value in trained.student.state_dict().items(): assert torch.equal(trained.model.state_dict()[name], value), name
    first = train(network(config, data.train.spec.num_classes), dataclasses.replace(config, folder=config.folder + "-2"), data)
    assert not torch.equal(first.student.classifier.weight, first.model.classifier.weight)
    for a, b in zip(first.student.parameters(), trained.student.parameters()): torch.testing.assert_close(a, b, atol=1e-2, rtol=1)


def test_a_teacher_starts_again_where_that_step_is_refused(config, monkeypatch):
    from selfsupnas.train import loop as training
    config, plain, seen = dataclasses.replace(config, ema_start=.5, bad_loss="skip"), training.take_step, []
    def poisoned(loss, state, *more):
        bad = plain(loss * (math.nan if len(seen) == 2 else 1), state, *more)
        seen.append((OUTCOMES[bad], all(torch.equal(a, b) for a, b in zip(state.teacher.model.parameters(), state.multitask.parameters()))))
        return bad
    monkeypatch.setattr(training, "take_step", poisoned)
    data = load_training_data(config)
    train(network(config, data.train.spec.num_classes), config, data)
    assert seen == [(None, True), (None, False), ("the loss", True), (None, False)]


def test_a_horizon_is_a_share_of_the_steps(config):
    assert TrainingConfig(steps=800, ema_horizon=.02).decay == pytest.approx(1 - 1 / 16) and TrainingConfig().decay == .98
    assert TrainingConfig(steps=10, ema_horizon=.02).decay == 0, "a horizon within a step: the student itself"


def test_averaged_statistics_come_back_after_a_step_that_is_not_finite(config, monkeypatch):
    from selfsupnas.train import loop as training
    config = dataclasses.replace(config, ema_buffers="averaged", bad_loss="skip", statistics="clean", threshold_kind="class")
    plain, seen = training.take_step, []
    def poisoned(loss, state, *more):
        kept = [b.clone() for b in state.multitask.buffers()], copy.deepcopy(state.threshold.state_dict()) if seen else None
        bad = plain(loss * (math.nan if len(seen) == 2 else 1), state, *more)
        seen.append((OUTCOMES[bad], kept, [b.clone() for b in state.multitask.buffers()]))
        return bad
    monkeypatch.setattr(training, "take_step", poisoned)
    data = load_training_data(config)
    train(network(config, data.train.spec.num_classes), config, data)
    assert [bad for bad, *_ in seen] == [None, None, "the loss", None]
    for after, before in zip(seen[2][2], seen[1][2]): assert torch.equal(after, before)
    assert any(not torch.equal(a, b) for a, b in zip(seen[2][1][0], seen[2][2])), "the forward pass had moved them"


def test_a_step_that_went_wrong_is_reported_with_the_next_row(config, monkeypatch):
    "As on a GPU, whose values are read only when a row is due."
    from selfsupnas.train import loop as training
    config, plain, read, steps = dataclasses.replace(config, steps=8, logs=2, bad_loss="skip"), training.take_step, training.RunLog.read, []
    def poisoned(loss, state, step, *more):
        steps.append(step)
        return plain(loss * (math.nan if step in (1, 6) else 1), state, step, *more)
    def late(log):
        if not log.unread or (log.unread[-1].number + 1) % 4 == 0: read(log)
    monkeypatch.setattr(training, "take_step", poisoned)
    monkeypatch.setattr(training.RunLog, "read", late)
    data = load_training_data(config)
    phases = [training.Phase(data, lambda name: True), training.Phase(dataclasses.replace(data, split=dataclasses.replace(data.split, labelled=data.split.labelled[:1])), lambda name: True)]
    trained = train(network(config, data.train.spec.num_classes), config, data, phases=phases)
    assert [row["step"] for row in trained.history] == [4, 8] and steps == list(range(8))
    for step in (1, 6):
        report = json.loads((Path(config.folder)/f"bad-step-{step:06}.json").read_text())
        assert report["step"] == step and report["images"] == training.ids_of_step(config, phases[step % 2].data, step)
    assert len(list(Path(config.folder).glob("bad-step-*"))) == 2


# ---- groups of statistics

@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("again", [False, True])
def test_perturbed_views_and_cells_that_run_again(statistics, again):
    "The plain loop of the chapter on objective, with perturbed features, shut gates and cells that run again."
    torch.manual_seed(0)
    config = TrainingConfig(w_jig=.5, consistency="unimatch", recompute=again)
    multitask = build_multitask_model(build_supernet(SearchSpace(5, **SPACE)), config)
    with torch.no_grad():
        for m in multitask.modules():
            if hasattr(m, "threshold"): m.logits.bias.normal_(.1, .3)
    views = {name: torch.randn(n, 3, 64, 80) for name, n in (("labelled", 2), ("strong", 2), ("strong2", 2), ("weak", 2), ("jigsaw", 2))}
    ours, loop = copy.deepcopy(multitask), copy.deepcopy(multitask)
    loop.model.recompute = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfsupnas.train.step.perturb_features", lambda x: x * .5)
        said = run_passes(ours, ours, views, statistics, perturb=True)
        (sum(x.square().mean() for x in said.logits.values()) + said.jigsaw.square().mean() + said.perturbed.square().mean()).backward()
        passes = {"shared": [["labelled", "strong", "strong2", "weak", "jigsaw"]], "clean": [["labelled", "weak"], ["strong", "strong2"], ["jigsaw"]],
                  "separate": [["labelled"], ["weak"], ["strong", "strong2"], ["jigsaw"]]}[statistics]
        for number, names in enumerate(passes):
            before = copy.deepcopy(dict(loop.named_buffers()))
            images, part = torch.cat([views[n] for n in names]), 0.
            plain = 2 * len([n for n in names if n != "jigsaw"])
            out = loop(images, plain, 2 if "weak" in names else 0, statistics != "shared")
            for n, x in zip([n for n in names if n != "jigsaw"], out.logits.split(2) if plain else []):
                torch.testing.assert_close(said.logits[n], x)
                part = part + x.square().mean()
            if "jigsaw" in names: part = part + out.jigsaw.square().mean()
            if "weak" in names:
                torch.testing.assert_close(said.perturbed, out.perturbed)
                part = part + out.perturbed.square().mean()
            part.backward()
            if number:
                for name, b in loop.named_buffers(): b.copy_(before[name])
    for (name, a), b in zip(ours.named_parameters(), loop.parameters()):
        if a.grad is not None: torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3, msg=name)
    for (name, a), b in zip(ours.named_buffers(), loop.buffers()): torch.testing.assert_close(a, b, msg=name)
    assert all(len(g) == 8 for g in said.gates.values()) and any((g == 0).any() for g in said.gates.values())
    assert all(m.track_running_stats for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_perturbed_features_apart_move_nothing():
    torch.manual_seed(0)
    multitask = build_multitask_model(build_supernet(SearchSpace(5, **SPACE)), TrainingConfig(w_jig=0., consistency="unimatch"))
    with_them, without, images = copy.deepcopy(multitask), copy.deepcopy(multitask), torch.randn(4, 3, 64, 80)
    out = with_them(images, 4, perturb=2, apart=True)
    torch.testing.assert_close(out.logits, without(images, 4).logits)
    for a, b in zip(with_them.buffers(), without.buffers()): torch.testing.assert_close(a, b)
    assert out.perturbed.shape == (2, 5, 64, 80)


# ---- what is drawn, what is refused, what is recorded

def test_the_control_sees_no_unlabelled_image(config):
    control = dataclasses.replace(config, consistency_images="labelled", jitter=(.1, .2, .3, .05), grey_p=1., blur_p=0.)
    data = load_training_data(control)
    stream, _ = make_streams(control, data)["unlabelled"]
    assert {stream.dataset.ids[stream.source(k)] for k in range(50)} <= set(data.split.labelled)
    strong = stream[0]["strong"]
    assert torch.equal(strong[0], strong[1]) and torch.equal(strong[1], strong[2]), "grey, as asked"
    from selfsupnas.data.augment import StrongView
    edge = torch.zeros(3, 32, 32, dtype=torch.uint8)
    edge[:, :, 16:] = 255
    def greys(view): return max(len(view(edge).unique()) for _ in range(20))
    assert greys(StrongView(p_jitter=0, p_grey=0, p_blur=1, sigma=None)) < greys(StrongView(p_jitter=0, p_grey=0, p_blur=1)), "less blur on a small view"


@pytest.mark.parametrize("wrong, named", [
    (dict(sup_start=.2, w_jig=0.), "sup_start"), (dict(sup_start=.5, jigsaw_decay=(.2, .3), ramp=(.5, .6)), "jigsaw_decay"), (dict(sup_start=.2), "ramp"),
    (dict(jigsaw_ramp=(0., .5), jigsaw_decay=(.2, .4)), "jigsaw_decay"), (dict(ema_horizon=0.), "ema_horizon"), (dict(ema_horizon=1.5), "ema_horizon"),
    (dict(blur=(0., 1.)), "blur"), (dict(jitter=(.5, .5, .5, .6)), "jitter"), (dict(jitter=(2., 0., 0., 0.)), "jitter"), (dict(statistics="own"), "clean"),
    (dict(w_sup=0., w_semi=0., jigsaw_ramp=(.3, .5)), "jigsaw_ramp"), (dict(w_sup=0., w_semi=0., jigsaw_decay=(.2, .4)), "jigsaw_decay"),
    (dict(jigsaw_share=.5, jigsaw_n=5), "jigsaw_share"), (dict(jigsaw_share=.5, jigsaw_n=3, jigsaw_permutations=505), "jigsaw_share"),
    (dict(threshold_kind="class", adaptive_threshold=True), "adaptive_threshold"), (dict(cutout_area=(.5, .2)), "cutout_area"),
    (dict(temperature=0.), "temperature"), (dict(ema_buffers="mean"), "averaged"), (dict(consistency_images="all"), "labelled"),
    (dict(ramp=(1., 1.)), "ramp"), (dict(jigsaw_ramp=(1., 1.)), "jigsaw_ramp"), (dict(ema_start=1.), "ema_start"), (dict(sup_start=1.), "sup_start"),
    (dict(jigsaw_decay=(0., 0.)), "jigsaw_decay"), (dict(w_sup=0., w_semi=0., w_strong=1.), "w_strong"), (dict(squares="mean"), "summed"), (dict(jigsaw_share=2.), "jigsaw_share")])
def test_what_no_run_could_be_made_with_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named): TrainingConfig(**{**dict(ramp=(.1, .4)), **wrong})


def test_a_retraining_records_its_diagnostics_and_recalibrates(tmp_path):
    small = dict(size=(64, 80), batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, logs=1, steps=2, ramp=(0., 0.), threshold=0.)
    search(SearchConfig(folder=str(tmp_path/"search"), layers=3, channels=8, budget=.8, **small))
    found = json.loads((tmp_path/"search/search-record.json").read_text())["metrics"]
    done = retrain(RetrainConfig(folder=str(tmp_path/"retrain"), architecture=str(tmp_path/"search"), recalibrate=4, statistics="clean",
                                  w_jig=.1, w_semi=1., consistency="fixmatch", **small))
    metrics = done.record.metrics
    for name in ("train_miou", "train_val_gap", "student_val_miou"): assert 0 <= abs(metrics[name]) <= 1 and name in found, name
    assert metrics["train_val_gap"] == pytest.approx(metrics["train_miou"] - metrics["val_miou"])
    assert {"val_miou_before_recalibration", "student_recalibrated_val_miou", "jigsaw_val_accuracy", "jigsaw_chance"} <= metrics.keys()
    by_class = metrics["pseudo_label_by_class"]
    assert set(by_class) == set(done.data.train.spec.classes)
    known = [entry for entry in by_class.values() if entry["share"] is not None]
    assert known and all(entry["share"] == 1 for entry in known), "tau is 0"
    from selfsupnas.stages.calibration import plain_images
    from selfsupnas.data.augment import normalise
    x = normalise(plain_images(done.data, None, 0, 4)) # the stem's first norm, by hand
    first = done.trained.model.stem
    features = F.conv2d(x, first[0].weight, None, 2, 1)
    torch.testing.assert_close(first[1].running_mean, features.mean((0, 2, 3)).detach(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(first[1].running_var, features.var((0, 2, 3)).detach(), atol=1e-3, rtol=1e-3)


def test_recalibration_drops_nothing_and_is_that_of_one_process(tmp_path):
    "A student whose edges drop and whose batch norm is that of several processes, and a rival with dropout."
    from selfsupnas.rivals import build_baseline
    from selfsupnas.distributed import MaskedNorm
    from selfsupnas.stages.retraining import recalibrated_metrics
    from selfsupnas.stages.calibration import plain_images, recalibrate_batch_norm
    from selfsupnas.train.loop import TrainResult
    config = RetrainConfig(folder=str(tmp_path), recalibrate=6, **SMALL)
    data = load_training_data(config)
    first, second = (build_supernet(SearchSpace(data.train.spec.num_classes, **SPACE)) for _ in range(2))
    plain = recalibrate_batch_norm(copy.deepcopy(second), images := plain_images(data, config.crop, config.seed, 6))
    second.drop_path(.9)
    for module in second.modules():
        if isinstance(module, torch.nn.BatchNorm2d): module.__class__, module.synchronised = MaskedNorm, True
    from selfsupnas.metrics import ImageSubset, evaluate_segmenter
    report = ImageSubset(data.val, data.val.ids[:8])
    metrics = recalibrated_metrics(TrainResult(first, None, second, [], 0., None), images, report)
    assert metrics["student_recalibrated_val_miou"] == pytest.approx(evaluate_segmenter(plain, report, progress=False).miou, abs=1e-9)
    rival = build_baseline("deeplabv3_mobilenet_v3_large", 5)
    once, again = (recalibrate_batch_norm(copy.deepcopy(rival), images) for _ in range(2))
    for (name, a), b in zip(once.named_buffers(), again.buffers()): assert torch.equal(a, b), name
    assert [m.p for m in once.modules() if isinstance(m, torch.nn.Dropout)] == [.5]


# ---- each term alone, on a network that is none of ours

def segmenter(outputs):
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large
    torch.manual_seed(0)
    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=outputs)


def supervised_alone(net, config, batch):
    return supervised_term([net(batch.labelled.image)], batch.labelled.label)


def jigsaw_alone(net, config, batch):
    permutations = permutation_set(2)
    shuffled, target = cut_and_shuffle(batch.jigsaw, permutations, torch.Generator().manual_seed(0))
    return jigsaw_term(JigsawHead(40, 2, 24)(net.backbone(shuffled)["low"]), target, permutations)[0]


def consistency_alone(net, config, batch):
    views, teacher = UnlabelledViews(batch.unlabelled, CONSISTENCY["fixmatch"], ViewConfig(), torch.Generator().manual_seed(0)), EMATeacher(net)
    student = {name: net(images)["out"] for name, images in views.images().items()}
    loss, metrics = consistency_term(views, student, {"strong": teacher(batch.unlabelled.weak)["out"]}, 0.)
    assert metrics.pseudo_share == 1
    return loss


def budget_alone(net, config, batch):
    "A network that predicts the gates of the grid: an output for each edge."
    space = SearchSpace(5, **SPACE)
    table = measure_costs(space, (64, 80))
    def cost(gates, share):
        by_edge = dict(zip(space.edges(), gates["router"].T))
        return Losses(cost=budget_loss(table, expected_cost(table, by_edge), realised_cost(table, by_edge), .3)), StepMetrics()
    values = net(batch.labelled.image)["out"].mean((2, 3)).sigmoid()
    return budget_term(cost, {"model.router": values}, 1.)[0].cost


@pytest.mark.parametrize("term", [supervised_alone, jigsaw_alone, consistency_alone, budget_alone])
def test_a_term_is_used_alone_on_any_segmenter(term, config):
    data = load_training_data(config)
    batch = next(make_batches(config, data)).to("cpu")
    net = segmenter(len(SearchSpace(5, **SPACE).edges()) if term is budget_alone else data.train.spec.num_classes)
    loss = term(net, config, batch)
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    part = net.backbone if term is jigsaw_alone else net.classifier
    assert any(p.grad is not None and p.grad.any() for p in part.parameters())


# ---- each function that takes a group of parameters reads no other

SPACE_ALONE = SearchSpace(5, **SPACE)


def views_alone(group):
    images, generator = torch.randint(256, (2, 3, 64, 80), dtype=torch.uint8), torch.Generator().manual_seed(0)
    batch = UnlabelledBatch(images, torch.ones(2, 64, 80, dtype=bool), torch.zeros(2, 64, 80).long(), images, images)
    for kind in CONSISTENCY.values(): assert "strong" in UnlabelledViews(batch, kind, group(cutout_p=.5), generator).images()
    assert draw_mix_masks(images, group(cutmix_p=1.), generator).box.any()
    model = build_supernet(SPACE_ALONE).eval()
    shown = teacher_student_views(TrainResult(model, None, model, [], 0., None), StepBatch(LabelledBatch(images), batch), group(), 0)
    assert set(shown) == {"weak", "strong", "taught", "student"}
    return draw_mix_masks, UnlabelledViews, teacher_student_views


def consistency_settings_alone(group):
    for kind in CONSISTENCY: assert configured_consistency(group(consistency=kind)).weights == CONSISTENCY[kind].weights
    moving = [make_moving_threshold(group(**changes), .9) for changes in ({}, dict(threshold_kind="class"), dict(threshold_kind="relative"), dict(adaptive_threshold=True))]
    assert [type(threshold) for threshold in moving] == [type(None), ClassThreshold, RelativeThreshold, AdaptiveThreshold]
    return configured_consistency, make_moving_threshold


def optimiser_alone(group):
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        assert isinstance(make_optimiser(torch.nn.Linear(2, 2), group(optimiser=name)), kind)
    return make_optimiser,


def jigsaw_settings_alone(group):
    model, head, data = build_supernet(SPACE_ALONE).eval(), JigsawHead(SPACE_ALONE.channels_at(1), 2, 24), load_dataset("streetscenes", "val", size=(64, 80))
    images = ImageSubset(data, data.ids[:2])
    solved = solve_jigsaws(model, head, torch.stack([image for image, _ in images]), group(), torch.Generator())
    assert solved["guess"].shape == solved["truth"].shape == (2, 4)
    assert jigsaw_metrics(TrainResult(model, head, None, [], 0., None), images, group(), 0)["jigsaw_chance"] == 1 / 24
    return solve_jigsaws, jigsaw_metrics


def choice_alone(group):
    model, data = build_supernet(SPACE_ALONE).eval(), load_dataset("streetscenes", "val", size=(64, 80))
    images, table = choice_images(data, group(choice_images=3), 0), measure_costs(SPACE_ALONE, (64, 80))
    assert len(images) == 3 and choice_images(data, group(candidates=1), 0) is None
    statistics = gate_statistics(model, images, table)
    route, rows = choose_route(table, statistics, group(budget=.6), {}, lambda _: 1 / 0, None)
    assert len(rows) == 1 and static_cost(table, route.selected) <= .6 * table.full
    losses = BudgetLosses(model, table, group(w_cost=2.))
    assert losses.weights(1.).cost == 2. and losses({name: gate.expand(2, -1) for name, gate in gates_from_edges(SPACE_ALONE, {}).items()}, 1.)[1].realised < .5
    return choice_images, choose_route, BudgetLosses


ALONE = {ViewConfig: views_alone, ConsistencyConfig: consistency_settings_alone, OptimiserConfig: optimiser_alone, JigsawConfig: jigsaw_settings_alone,
         BudgetConfig: choice_alone}


@pytest.mark.parametrize("group", ALONE, ids=lambda group: group.__name__)
def test_a_function_that_takes_a_group_reads_no_other(group):
    "A group alone has no other field: reading one would raise AttributeError. None of these functions is left out."
    taking = {function for module in MODULES for function in vars(importlib.import_module(f"selfsupnas.{module}")).values()
              if inspect.isfunction(function) or inspect.isclass(function)
              if any(a is group for a in inspect.get_annotations(function.__init__ if inspect.isclass(function) else function).values())}
    assert set(ALONE[group](group)) == taking
