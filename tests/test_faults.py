"""Bad inputs and faults: each raises an error of the right type that names the cause.

None changes finished work, and none leaves a partial file. `make faults` lists them with the full messages.
"""
import contextlib, errno, fnmatch, json, os, pickle, re, resource, shutil, struct, zlib
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, draw_folder
from PIL import Image
from safetensors.torch import load_file, save_file

import selfsupnas
from selfsupnas.space.architecture import load_architecture
from selfsupnas.train.batches import load_training_data
from selfsupnas.stages.evaluation import EvaluateConfig, evaluate
from selfsupnas.train.checkpoint import FolderInUse, checkpoint_paths, lock_folder, read_checkpoint
from selfsupnas.cli import main
from selfsupnas.train.config import TrainingConfig
from selfsupnas.core import RunRecord
from selfsupnas.export import NetworkInfo, export_onnx, export_program, export_run, from_pretrained
from selfsupnas.stages.pareto_front import ParetoConfig, pareto
from selfsupnas.viz.tables import write_page
from selfsupnas.data.files import SegmentationSpec, UnreadableFile
from selfsupnas.stages.retraining import RetrainConfig, load_network, retrain
from selfsupnas.stages.configs import SearchConfig
from selfsupnas.stages.searching import load_supernet, search

SMALL = dict(data="folder", root="data", label_fraction=.5, steps=2, logs=1, batch_labelled=2, batch_unlabelled=2, batch_jigsaw=2, threshold=.3, ramp=(0., .2))
GRID = dict(layers=2, channels=4, budget=1.)
DONE = ("search", "retrain", "evaluate") # finished before each fault


def run_search(folder="search", **changes): return search(SearchConfig(**{"folder": folder, **SMALL, **GRID, **changes}))


def run_retrain(folder="retrain", **changes): return retrain(RetrainConfig(**{"folder": folder, "architecture": "search/architecture.json", **SMALL, **changes}))


def run_evaluate(folder="new", **changes): return evaluate(EvaluateConfig(**{"folder": folder, "network": "retrain", "baselines": (), "latency_repeats": 1, **changes}))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    "Data, a search, its retraining and its evaluation, with relative paths in the records."
    place = tmp_path_factory.mktemp("finished")
    draw_folder(place/"data", dict(train=6, val=3, test=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run_search(), run_retrain(), run_evaluate("evaluate")
    return place


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    "A copy of the finished runs, to be damaged, as the current folder."
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SELFSUPNAS_DATA", raising=False)
    return tmp_path


def command(*words):
    "A command that is refused: status 2, no new file."
    def do(capsys):
        before = listing()
        try: status = main(list(words))
        except SystemExit as e: status = e.code
        out, err = capsys.readouterr()
        assert status == 2 and "Traceback" not in err and "running" not in out and listing() == before
        return " ".join(re.findall(r"[^│\s]+", err)) # in one line, without the frame of tyro
    return do


def given(stage, **parameters):
    "A refused command of a stage with these parameters."
    return command(stage, "--folder", "new", *(w for name, value in parameters.items() for w in ("-p", name, value)))


def raises(kind, act):
    "A call that raises exactly this type of error."
    def do(capsys):
        with pytest.raises(kind) as e: act()
        assert type(e.value) is kind, f"a {type(e.value).__name__}"
        return str(e.value)
    return do


def after(spoil, do):
    "A fault that follows `spoil`, whose changes count as finished work."
    do.spoil = spoil
    return do


def unfinished(stage, do):
    "A fault in a run that was stopped just before its record."
    plain = getattr(do, "spoil", lambda: None)
    def spoil(): plain(), Path(stage, f"{stage}-record.json").unlink()
    do.spoil = spoil
    return do


def of_another_network():
    "Write a checkpoint of the same parameters whose tensors have other shapes."
    path, = checkpoint_paths("retrain")
    state = torch.load(path, weights_only=True)
    state["parts"]["multitask"] = {name: torch.cat([value.reshape(-1)] * 2) for name, value in state["parts"]["multitask"].items()}
    torch.save(state, path)


def listing(): return sorted(str(p) for p in Path(".").rglob("*"))


def contents(): return {str(p): p.read_bytes() for folder in DONE for p in Path(folder).rglob("*") if p.is_file()}


def check_whole(path):
    "Raise unless a file is complete and has the format of its suffix."
    if path.suffix == ".json": json.loads(path.read_text())
    elif path.suffix == ".safetensors": load_file(path)
    elif path.suffix == ".pt": read_checkpoint(path)
    elif path.suffix == ".ipynb": nbformat.read(path, 4)
    else: assert path.suffix in (".txt", ".png", ".md") or path.suffix == ".lock" or path.name == ".lock", f"{path} is left"


# -- Damage to files, and faults of the disk

def cut(path): Path(path).write_bytes(Path(path).read_bytes()[:Path(path).stat().st_size // 2])


def rewrite(path, change):
    "Change the content of a JSON file."
    data = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(change(data)))


def put(**entries): return lambda data: {**data, **entries}


def less(*names): return lambda data: {k: v for k, v in data.items() if k not in names}


def within(key, change): return lambda data: {**data, key: change(data[key])}


def mask(numbers, path="data/masks/train/0.png"): Image.fromarray(np.full((64, 80), numbers, np.uint8)).save(path)


def bomb(path="data/images/train/0.png"):
    "Write a PNG of a few bytes whose header claims 10 gigapixels."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
                           + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


class Evil:
    def __reduce__(self): return os.system, ("touch executed",)


def every_checkpoint(write):
    def spoil():
        for path in checkpoint_paths("retrain"): write(path)
    return spoil


@contextlib.contextmanager
def small_files(most):
    "Files are cut off at `most` bytes, as on a full disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_room_for(pattern, code=errno.ENOSPC):
    "Moving a file to a name of this pattern fails, as on a full or read-only disk."
    plain = os.replace
    def replace(source, target, **options):
        if fnmatch.fnmatch(Path(target).name, pattern): raise OSError(code, os.strerror(code))
        return plain(source, target, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        yield


def full(pattern, act):
    def do():
        with no_room_for(pattern): act()
    return raises(OSError, do)


def too_large(most, act):
    def do():
        with small_files(most): act()
    return raises(OSError, do)


def read_only(act):
    def mkdir(self, *args, **options): raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
    def do(capsys):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "mkdir", mkdir)
            return act(capsys)
    return do


def taken():
    with lock_folder("new"): run_search("new")


def split_of(labelled, unlabelled="", **more):
    "Write a split folder with these texts."
    def spoil():
        Path("split").mkdir()
        for name, text in {"labeled.txt": labelled, "unlabeled.txt": unlabelled, **more}.items():
            Path("split", name.replace("_json", ".json")).write_bytes(text if isinstance(text, bytes) else text.encode())
    return spoil


def by_notebook(stage, **parameters):
    "Run the first cells of a run notebook with parameters, as papermill does."
    def act():
        cells = [c for c in nbformat.read(ROOT/"nbs"/"runs"/f"{stage}.ipynb", 4).cells if c.cell_type == "code"]
        at = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
        space = {}
        exec(cells[at].source, space)
        space.update(parameters)
        exec(cells[at + 1].source, space)
    return act


def use_split(**changes): return lambda: load_training_data(TrainingConfig(**{"folder": "new", **SMALL, "split_folder": "split", **changes}))


def load_data(**changes): return lambda: load_training_data(TrainingConfig(**{"folder": "new", **SMALL, **changes}))


SAME = [w for name, value in {**SMALL, **GRID}.items() for w in ("-p", name, str(value))]
A, R, N, C = "search/architecture.json", "retrain/retrain-record.json", "retrain/network.safetensors", "new/architecture.json"
def spoilt(change, path=A): return lambda: rewrite(path, change)
def read_architecture(): return load_architecture(A)


# -- The table: group -> fault -> (how it is provoked, pattern of the message)

FAULTS = {
    "The command line": {
        "an unknown stage": (command("serch"), "no such command.*did you mean search"),
        "an unknown option": (command("search", "--stpes", "3"), "--stpes.*--steps"),
        "a parameter without a value": (command("search", "--steps"), "--steps"),
        "a former parameter without a value": (command("search", "-p", "steps"), "-p needs a name and a value"),
        "an unknown parameter": (given("search", stpes="5"), "--stpes.*--steps"),
        "a parameter of another stage": (given("evaluate", steps="5"), "--steps"),
        "a parameter that the demo sets itself": (command("demo", "--network", "retrain"), "the demo has no parameter network"),
        "a folder that is a file": (after(lambda: Path("new").write_text(""), given("search")), "cannot write to new: File exists; take another --folder"),
        "a folder below a file": (after(lambda: Path("new").write_text(""), command("search", "--folder", "new/run")), "cannot write to new/run: Not a directory"),
        "a read-only folder": (read_only(given("search")), "cannot write to new: Read-only file system"),
        "no architecture": (given("retrain", architecture="no.json"), "no architecture at no.json; `selfsupnas search` writes one"),
        "no network to evaluate": (given("evaluate", network="search"), "no retrained network in search; .*`selfsupnas retrain`"),
        "no search for a front": (given("pareto", search="retrain"), "no search in retrain .*`selfsupnas search`"),
        "no data": (given("search", data="camvid"), "SELFSUPNAS_DATA"),
        "a root that is not there": (given("search", data="folder", root="nowhere"), "no folder .*nowhere/images"),
        "a root that is a file": (given("search", data="folder", root="data/classes.txt"), "no folder .*classes.txt/images"),
        "an unknown dataset": (given("search", data="street"), "no dataset 'street'; there are streetscenes"),
        "a report of nothing": (command("report", "nowhere"), "no run record or folder at nowhere"),
        "a report of half a record": (after(lambda: cut(R), command("report", "retrain")), "retrain-record.json is not a run record"),
        "a report into a folder": (command("report", "retrain", "--to", "data"), "cannot write data: Is a directory"),
        "an export of nothing": (command("export", "nowhere"), "no run record at nowhere/retrain-record.json"),
        "an export of a hand-crafted network": (after(spoilt(within("parameters", put(architecture="unet_resnet18")), R), command("export", "retrain")), "only networks of the grid"),
        "an export into a file": (command("export", "retrain", "--to", "data/classes.txt"), "cannot write data/classes.txt/model.safetensors"),
        "an export with the metrics of another folder": (command("export", "retrain", "--evaluate", "search"), "no run record at search/evaluate-record.json"),
        "a sheet of no samples": (command("data", "folder", "data", "--samples", "0"), "samples must be 1 or more, not 0"),
        "a command that is gone, campaign": (given("campaign", steps="1"), "selfsupnas campaign: .*nbs/experiments/compare.smk"),
        "a command that is gone, sweep": (command("sweep", "search", "--grid", "seed=0,1"), "selfsupnas sweep: .*nbs/experiments/sweep.smk"),
    },
    "Parameters of another type": {
        **{f"{stage} -p {name} {value}": (given(stage, **{name: value}), rf"--(no-)?{name.replace('_', '-')}\b") for stage, name, value in (
            ("search", "seed", "one"), ("search", "seed", "1.5"), ("search", "seed", "True"), ("search", "steps", "1e3"), ("search", "lr", "fast"), ("search", "resume", "maybe"),
            ("search", "size", "64"), ("search", "size", "(64,)"), ("search", "crop", "('a', 80)"), ("search", "zoom", "(1, 2, 3)"), ("search", "jigsaw_permutations", "many"),
            ("pareto", "budgets", "('half',)"), ("evaluate", "batch_size", "8.5"), ("evaluate", "flip", "3"))},
        "in Python: SearchConfig(steps='5')": (raises(ValueError, lambda: SearchConfig(steps="5")), "steps must be a valid integer, not '5'"),
        "in Python: RetrainConfig(size=64)": (raises(ValueError, lambda: RetrainConfig(size=64)), "size must be "),
        "a run notebook by itself, seed = 'x'": (raises(ValueError, by_notebook("search", seed="x")), "seed must be a valid integer, not 'x'"),
        "a run notebook by itself, split = 'tset'": (raises(ValueError, by_notebook("evaluate", split="tset")), "split must be 'train', 'val' or 'test', not 'tset'"),
        "a run notebook by itself, budgets = [2]": (raises(ValueError, by_notebook("pareto", budgets=[2])), "budgets.0 must be 1 or less"),
    },
    "Parameters out of range": {
        **{f"{stage} -p {name} {value}": (given(stage, **{name: value}), rf"{name.replace('_fraction', '.fraction')}.* must be .*{re.escape(right)}.*, not ") for stage, name, value, right in (
            ("search", "seed", "-1", "0 or more"), ("search", "seed", "4294967296", "4294967295 or less"), ("search", "steps", "0", "over 0"), ("search", "steps", "-5", "over 0"),
            ("search", "batch_labelled", "0", "over 0"), ("search", "logs", "0", "over 0"), ("search", "workers", "-1", "0 or more"), ("search", "checkpoints", "0", "over 0"),
            ("search", "lr", "-0.1", "0 or more"), ("search", "lr", "1e999", "finite"), ("search", "weight_decay", "-1", "0 or more"), ("search", "clip", "0", "over 0"), ("search", "clip", "1e999", "finite"),
            ("search", "warmup", "2", "1 or less"), ("search", "ema_decay", "1", "under 1"), ("search", "drop_path", "1", "under 1"), ("search", "threshold", "1.5", "1 or less"),
            ("search", "cutmix_p", "-0.5", "0 or more"), ("search", "category_ratio", "2", "1 or less"), ("search", "cache_gb", "-1", "0 or more"),
            ("search", "zoom", "(2, 1)", "non-decreasing"), ("search", "zoom", "(0, 1)", "0.01 or more"), ("search", "jigsaw_zoom", "(-1, 1)", "0.01 or more"), ("search", "ramp", "(0.5, 0.1)", "non-decreasing"),
            ("search", "ramp", "(0, 2)", "1 or less"), ("search", "cost_ramp", "(0.4, 0.1)", "non-decreasing"), ("search", "size", "(16, 16)", "33 or more"), ("search", "crop", "(0, 80)", "33 or more"),
            ("search", "jigsaw_n", "1", "2 or more"), ("search", "jigsaw_n", "100", "8 or less"), ("search", "jigsaw_permutations", "25", "from 2 to 24"), ("search", "jigsaw_permutations", "0", "from 2"),
            ("search", "label_fraction", "0", "over 0"), ("search", "label_fraction", "3/2", "1 or less"), ("search", "label_fraction", "-0.1", "over 0"),
            ("search", "layers", "0", "over 0"), ("search", "channels", "7", "multiple of 2"), ("search", "channels", "0", "over 0"), ("search", "budget", "0", "over 0"), ("search", "budget", "1.01", "1 or less"),
            ("search", "w_cost", "-1", "0 or more"), ("search", "leak", "-0.1", "0 or more"), ("search", "keep_operations", "0", "over 0"), ("retrain", "w_jig", "-1", "0 or more"),
            ("pareto", "budgets", "(0.5, 0)", "over 0"), ("pareto", "steps", "-1", "0 or more"), ("pareto", "random", "-1", "0 or more"), ("pareto", "seed", "-1", "0 or more"),
            ("evaluate", "batch_size", "0", "over 0"), ("evaluate", "latency_repeats", "0", "over 0"))},
        **{f"in Python: SearchConfig({name}=nan)": (raises(ValueError, lambda name=name: SearchConfig(**{name: float("nan")})), f"{name} must be finite, not nan")
           for name in ("lr", "w_jig", "budget", "threshold", "label_fraction")},
        "in Python: SearchConfig(zoom=(1, inf))": (raises(ValueError, lambda: SearchConfig(zoom=(1, float("inf")))), "zoom.1 must be finite"),
        "class weights of no kind": (given("search", class_weights="rare"), "--class-weights.*median_frequency"),
        "a probability over 1 for hard pixels": (given("search", ohem_threshold="2"), "ohem_threshold must be 1 or less, not 2"),
        "cells of a hand-crafted network that run again": (given("retrain", architecture="unet_resnet18", w_jig="0", recompute="True"), "no routing network: recompute must be False"),
        "no operation": (given("search", operations="()"), "operations is empty"),
        "an operation twice": (given("search", operations="('identity', 'identity')"), "must differ"),
        "no budget for a front": (given("pareto", budgets="()"), "budgets must be one share or more"),
        "nothing to learn from": (given("search", w_sup="0", w_jig="0", w_semi="0"), "w_sup and w_jig are both 0"),
        "a teacher without labels": (given("search", w_sup="0"), "w_sup=0 needs w_semi=0"),
        "retraining without labels": (given("retrain", w_sup="0", w_jig="0.1"), "retraining needs labels: w_sup must be over 0"),
        "a jigsaw for a hand-crafted network": (given("retrain", architecture="unet_resnet18", w_jig="0.1"), "unet_resnet18 is no routing network: w_jig must be 0"),
        "a budget that the emptiest route exceeds": (raises(ValueError, lambda: run_search("new", budget=.01)), "budget 0.01 is out of reach: .*take a larger budget"),
        "the same in the folder of a finished search": (raises(ValueError, lambda: run_search(budget=.01, overwrite=True)), "budget 0.01 is out of reach"),
        "a front that asks for less than that": (raises(ValueError, lambda: pareto(ParetoConfig(folder="new", search="search", budgets=(.9, .01)))), "budget 0.01 is out of reach"),
        "alternating updates with one labelled image": (raises(ValueError, lambda: run_search("new", update="alternating", label_fraction=1/6)), "halves the labelled images.*raise label_fraction"),
        "views that no memory holds": (raises(MemoryError, lambda: run_search("new", crop=(10**8, 10**8))), r"out of memory with 2 labelled.*\(100000000, 100000000\).*lower"),
        "tiles of less than a feature": (raises(ValueError, lambda: run_search("new", crop=(40, 40), jigsaw_n=8, jigsaw_permutations=9)), "cannot be pooled to 8x8 tiles: .*larger images"),
        "a rate of learning at which all is lost": (raises(FloatingPointError, lambda: run_search("new", lr=1e30, clip=1e30, steps=8, warmup=0.)), "is not finite at step .*Lower lr"),
    },
    "Names that are unknown": {
        **{f"{stage} -p {name} {value}": (given(stage, **{name: value}), rf"{name} must be (one|some) of .*{right}.*, not |--{name.replace('_', '-')}.*{right}") for stage, name, value, right in (
            ("search", "consistency", "fixmatsch", "fixmatch"), ("search", "optimiser", "adam", "adamw"), ("search", "gate", "hard", "conditional"), ("search", "cost", "watts", "flops"),
            ("search", "update", "never", "alternating"), ("search", "budget_of", "hoped", "realised"), ("search", "jigsaw_head", "magic", "position"), ("search", "jigsaw_stride", "5", "8"),
            ("search", "bad_loss", "ignore", "skip"), ("search", "precision", "int8", "bf16"), ("search", "operations", "('conv_9x9',)", "conv_3x3"), ("retrain", "initialise", "magic", "inherit"),
            ("evaluate", "split", "tset", "test"), ("evaluate", "baselines", "('deeplab',)", "deeplabv3_resnet50"), ("pareto", "split", "tset", "test"), ("pareto", "baselines", "('unet',)", "unet_resnet18"))},
        "a preset": (raises(ValueError, lambda: selfsupnas.load("nowhere")), "the zoo has no .nowhere.; known: .*streetscenes"),
    },
    "Data": {
        "no folder of images": (after(lambda: shutil.rmtree("data/images"), raises(FileNotFoundError, load_data())), "no folder .*data/images: put your dataset into"),
        "an empty split": (after(lambda: [p.unlink() for p in Path("data/images/val").iterdir()], raises(ValueError, load_data())), "data/images/val holds no image"),
        "no classes.txt": (after(lambda: Path("data/classes.txt").unlink(), raises(FileNotFoundError, load_data())), "write .*data/classes.txt"),
        "classes.txt in another encoding": (after(lambda: Path("data/classes.txt").write_bytes("Straße\nHaus".encode("latin1")), raises(ValueError, load_data())), "data/classes.txt is not a list of class names: byte 4 is no UTF-8"),
        "a class twice": (after(lambda: Path("data/classes.txt").write_text("a\nb\na\n"), raises(ValueError, load_data())), "data/classes.txt names the class 'a' twice"),
        "one class": (after(lambda: Path("data/classes.txt").write_text("a\n"), raises(ValueError, load_data())), "data/classes.txt names fewer than 2 classes"),
        "more classes than a mask can number": (after(lambda: Path("data/classes.txt").write_text("\n".join(map(str, range(300)))), raises(ValueError, load_data())), "more than 255 classes"),
        "two images of one name": (after(lambda: shutil.copy("data/images/train/0.png", "data/images/train/0.jpg"), raises(ValueError, load_data())), "0.png and 0.jpg have the same name: keep one"),
        "a header that promises 10 gigapixels": (after(bomb, raises(UnreadableFile, lambda: run_search("new", label_fraction=1.))), "cannot read the image .*data/images/train/0.png"),
        "half a mask": (after(lambda: cut("data/masks/train/0.png"), raises(UnreadableFile, lambda: run_search("new", label_fraction=1.))), "cannot read the mask .*data/masks/train/0.png"),
        "a class number outside": (after(lambda: mask(7), raises(ValueError, lambda: run_search("new", label_fraction=1.))), r"masks/train/0.png holds the numbers \[7\], but data has the classes 0 to 2"),
        "a mask of another size": (after(lambda: Image.new("L", (30, 20)).save("data/masks/train/0.png"), raises(ValueError, lambda: run_search("new", label_fraction=1.))), "0.png is 30 x 20 pixels, its image 80 x 64"),
        "validation images without a labelled pixel": (after(lambda: [mask(255, p) for p in Path("data/masks/val").iterdir()], raises(ValueError, lambda: run_search("new"))), "none of the 3 images has a labelled pixel"),
        "images of 20 pixels": (after(lambda: [Image.open(p).resize((20, 20)).save(p) for p in Path("data").rglob("*.png")], raises(ValueError, lambda: run_search("new"))), "images of data are 20 pixels high and 20 wide.* 33 .*set size"),
        "images of many sizes, no crop": (after(lambda: [Image.new(m, (90, 70)).save(f"data/{k}/train/0.png") for k, m in (("images", "RGB"), ("masks", "L"))], raises(ValueError, load_data())), "images of data differ in size: set crop"),
        "a fraction of no image": (raises(ValueError, load_data(label_fraction=.1)), "0.1 of 6 images is less than one image: use 1/6 or more"),
        "no split files": (raises(FileNotFoundError, use_split()), "no split file split/labeled.txt"),
        "a split that labels nothing": (after(split_of("", "train/0"), raises(ValueError, use_split())), "split/labeled.txt is empty: label at least one image"),
        "a split of unknown images": (after(split_of("train/0\ntrain/99"), raises(ValueError, use_split())), "split/labeled.txt, line 2: 'train/99' names no image of data"),
        "a split that names validation images": (after(split_of("val/0"), raises(ValueError, use_split())), "line 1: 'val/0' names no image"),
        "a split that names an image twice": (after(split_of("train/0\ntrain/0"), raises(ValueError, use_split())), "1 images more than once, such as 'train/0'"),
        "an image on both sides of a split": (after(split_of("train/0", "train/0"), raises(ValueError, use_split())), "1 images are labelled and unlabelled at once"),
        "a split file in another encoding": (after(split_of("Straße".encode("latin1")), raises(ValueError, use_split())), "split/labeled.txt is not a split file: byte 4 is no UTF-8 text"),
        "half a split.json": (after(split_of("train/0", split_json='{"seed": '), raises(ValueError, use_split())), "split/split.json is not the origin of a split: no JSON"),
        "a split.json that is a list": (after(split_of("train/0", split_json="[]"), raises(ValueError, use_split())), "split/split.json .* holds a list"),
        "an evaluation on data of other classes": (after(lambda: Path("data/classes.txt").write_text("a\nb\nc\nd\n"), raises(ValueError, run_evaluate)), "retrain has 3 classes, data has 4"),
        "an evaluation on other data of other classes": (after(lambda: (shutil.copytree("data", "other"), Path("other/classes.txt").write_text("a\nb\nc\nd\n")), raises(ValueError, lambda: run_evaluate(root="other"))),
                                                         "retrain has 3 classes, other has 4"),
        "an evaluation without test images": (after(lambda: shutil.rmtree("data/images/test"), raises(FileNotFoundError, run_evaluate)), "no folder .*data/images/test"),
    },
    "JSON": {
        "half an architecture": (after(lambda: cut(A), given("retrain", architecture=A)), "search/architecture.json is not an architecture: "),
        "an architecture that is a list": (after(lambda: Path(A).write_text("[]"), given("retrain", architecture=A)), "not an object"),
        "an architecture nested without end": (after(lambda: Path(A).write_text("[" * 100_000), given("retrain", architecture=A)), "nested too deeply"),
        "an architecture of a later version": (after(spoilt(put(schema=9)), given("retrain", architecture=A)), "schema is 9, .*install a later version"),
        "an architecture without edges": (after(spoilt(less("edges")), given("retrain", architecture=A)), "edges is missing"),
        "an architecture with an unknown entry": (after(spoilt(put(colour="red")), given("retrain", architecture=A)), "unknown parameter colour"),
        "an architecture with an edge that the grid lacks": (after(spoilt(put(edges=[[0, 3, "up", 1.]])), given("retrain", architecture=A)), "is not an edge of"),
        "an architecture with an edge of weight NaN": (after(spoilt(put(edges=[[0, 0, "keep", float("nan")]])), given("retrain", architecture=A)), "edges.0.3 must be finite, not nan"),
        "an architecture with an edge twice": (after(spoilt(put(edges=[[0, 0, "keep", 1.]] * 2)), given("retrain", architecture=A)), "twice"),
        "an architecture with a layer in words": (after(spoilt(put(edges=[["first", 0, "keep", 1.]])), given("retrain", architecture=A)), "edges.0.0 must be a valid integer, not 'first'"),
        "an architecture of odd channels": (after(spoilt(within("space", put(channels=5))), given("retrain", architecture=A)), "space: channels must be a multiple of 2, not 5"),
        "an architecture with an unknown operation": (after(spoilt(within("space", put(operations=["conv_9x9"]))), raises(ValueError, lambda: run_retrain("new"))), "search/architecture.json: unknown operation 'conv_9x9'; known: "),
        "an architecture for other classes": (after(spoilt(within("space", put(num_classes=19))), raises(ValueError, lambda: run_retrain("new"))), "architecture.json has 19 classes, data 3: set --data and --root"),
        "half a record": (after(lambda: cut(R), given("evaluate", network="retrain")), "retrain-record.json is not a run record: no JSON, or cut short"),
        "a record that is a list": (after(lambda: Path(R).write_text("[1]"), given("evaluate", network="retrain")), "retrain-record.json is not a run record: it holds a list"),
        "a record nested without end": (after(lambda: Path(R).write_text("[" * 100_000), given("evaluate", network="retrain")), "nested too deeply"),
        "a record that is no text": (after(lambda: Path(R).write_bytes(b"\xff\xfe"), given("evaluate", network="retrain")), "byte 0 is no UTF-8 text"),
        "a record with a seed in words": (after(spoilt(put(seed="one"), R), given("evaluate", network="retrain")), "seed must be a valid integer, not 'one'"),
        "a record without parameters": (after(spoilt(less("parameters"), R), given("evaluate", network="retrain")), "parameters is missing"),
        "a record that lacks a parameter": (after(spoilt(within("parameters", less("data")), R), given("evaluate", network="retrain")), "retrain-record.json: its parameters lack data"),
        "a record of another stage": (after(lambda: shutil.copy("search/search-record.json", R), given("evaluate", network="retrain")), "retrain-record.json is the record of another stage: search"),
        "an evaluation whose metrics are gone": (after(spoilt(put(metrics={}), "evaluate/evaluate-record.json"), command("export", "retrain", "--to", "new")), "evaluate-record.json: its metrics lack rows"),
        "a retraining whose metrics are gone": (after(spoilt(put(metrics={}), R), command("export", "retrain", "--to", "new")), "retrain-record.json: its metrics lack "),
        "a search record with an unknown gate": (after(spoilt(within("parameters", put(gate="hard")), "search/search-record.json"), raises(ValueError, lambda: load_supernet("search"))), "gate must be one of conditional, static"),
    },
    "Checkpoints": {
        "of other parameters": (unfinished("retrain", raises(ValueError, lambda: run_retrain(lr=.5))), r"retrain has an unfinished run .*checkpoint-000002.pt.*: lr=0.003 \(now 0.5\).*another folder, or overwrite=True"),
        "of another grid": (unfinished("search", raises(ValueError, lambda: run_search(channels=8))), r"other parameters.*: channels=4 \(now 8\)\. Use the same parameters"),
        "of another stage": (unfinished("search", raises(ValueError, lambda: run_retrain("search"))), "other parameters.*: .*layers=2"),
        "of a run that is not to go on": (unfinished("retrain", raises(ValueError, lambda: run_retrain(resume=False))), "retrain has an unfinished run .*resume=False: .*overwrite=True"),
        "of another architecture under the same name": (unfinished("retrain", after(spoilt(within("space", put(channels=8))), raises(ValueError, lambda: run_retrain()))),
                                                        "the files at architecture=.* have changed"),
        "of another network under the same name": (unfinished("retrain", after(of_another_network, raises(ValueError, lambda: run_retrain()))),
                                                   "holds another network, although its parameters are the same.*another folder"),
        **{f"{what}, all of them": (unfinished("retrain", after(every_checkpoint(write), raises(ValueError, lambda: run_retrain()))), "none of the checkpoints in retrain is intact .*: .*overwrite=True") for what, write in (
            ("cut short", cut), ("empty", lambda p: p.write_bytes(b"")), ("pickles that would run a command", lambda p: p.write_bytes(pickle.dumps(Evil()))),
            ("torch's own pickles that would", lambda p: torch.save({"step": Evil()}, p)), ("with other things in them", lambda p: torch.save({"step": 2, "parameters": [], "parts": {}}, p)))},
        "in a folder that another run holds": (raises(FolderInUse, taken), "another run is writing to new: wait until it ends"),
    },
    "Folders with a finished run": {
        "more steps": (raises(ValueError, lambda: run_search(steps=4)), r"search has a finished run with other parameters: steps=2 \(now 4\)\. .*another folder, or overwrite=True"),
        "more steps, to be resumed": (raises(ValueError, lambda: run_retrain(steps=4, resume=True)), r"retrain has a finished run with other parameters: steps=2 \(now 4\)"),
        "more steps, as a command": (command("search", "--folder", "search", *SAME, "-p", "steps", "4"), r"finished run with other parameters: steps=2 \(now 4\)"),
        "an evaluation of another kind": (raises(ValueError, lambda: run_evaluate("evaluate", flip=True)), r"evaluate has a finished run .*: flip=False \(now True\)"),
        "another stage": (raises(ValueError, lambda: run_retrain("search", overwrite=True)), "search has a run of another stage .search-record.json.: take another folder"),
        "an evaluation in the folder of its network": (raises(ValueError, lambda: run_evaluate("retrain")), "retrain has a run of another stage"),
        "the same on another architecture": (after(spoilt(within("provenance", put(seed=9))), raises(ValueError, run_retrain)), "the files at architecture=.* have changed"),
        "another run whose parameters are wrong, to replace it": (raises(ValueError, lambda: run_search(root="data", overwrite=True, label_fraction=.1)), "less than one image"),
        "another run whose data is gone, to replace it": (raises(FileNotFoundError, lambda: run_search(root="nowhere", overwrite=True)), "nowhere/images"),
        "half its record": (after(lambda: cut("search/search-record.json"), raises(ValueError, run_search)), "search-record.json is not a run record"),
        "all but its weights": (after(lambda: Path("search/supernet.safetensors").unlink(), raises(FileNotFoundError, run_search)), "record of a search, but not supernet.safetensors: .*overwrite=True"),
    },
    "Weights": {
        "of the retraining, gone": (after(lambda: Path(N).unlink(), raises(FileNotFoundError, run_evaluate)), "no weights at retrain/network.safetensors; `selfsupnas retrain` writes them"),
        "of the retraining, cut short": (after(lambda: cut(N), raises(ValueError, run_evaluate)), "retrain/network.safetensors is damaged, or holds no weights"),
        "of the retraining, a pickle": (after(lambda: Path(N).write_bytes(pickle.dumps(Evil())), raises(ValueError, run_evaluate)), "retrain/network.safetensors is damaged"),
        "of another network": (after(lambda: save_file({"a": torch.zeros(3)}, N), raises(ValueError, run_evaluate)), "does not hold the weights of this network: "),
        "of the supernet, gone": (after(lambda: Path("search/supernet.safetensors").unlink(), raises(FileNotFoundError, lambda: run_retrain("new", initialise="inherit"))), "needs the supernet's weights at search/supernet.safetensors"),
        "of the supernet, cut short": (after(lambda: cut("search/supernet.safetensors"), raises(ValueError, lambda: run_retrain("new", initialise="inherit"))), "search/supernet.safetensors is damaged"),
        "of the supernet of another search space": (after(spoilt(within("space", put(channels=8))), raises(ValueError, lambda: run_retrain("new", initialise="inherit"))), "from search/supernet.safetensors: .*another search space"),
        "of a supernet, for a front, cut short": (after(lambda: cut("search/supernet.safetensors"), raises(ValueError, lambda: pareto(ParetoConfig(folder="new", search="search", steps=0, budgets=(.9,))))), "search/supernet.safetensors is damaged"),
        "that are NaN": (after(lambda: save_file({k: v * float("nan") if v.is_floating_point() else v for k, v in load_file(N).items()}, N), raises(ValueError, run_evaluate)), "logits of image .* are not finite"),
        "of an exported folder, cut short": (after(lambda: (export_run("retrain", "away"), cut("away/model.safetensors")), raises(ValueError, lambda: from_pretrained("away"))), "away/model.safetensors is damaged"),
        "of no folder": (raises(FileNotFoundError, lambda: from_pretrained("./away")), "there is no folder ./away"),
        "for an export of 8 pixels": (raises(ValueError, lambda: export_program(load_network("retrain"), (8, 8), "new/network.pt2")), "each 33 or more"),
        "for an export under another ending": (raises(ValueError, lambda: export_onnx(load_network("retrain"), (64, 80), "new/network.pt2")), "must end in .onnx, not network.pt2"),
        "for an export with other classes": (raises(ValueError, lambda: export_run_with("ab")), "2 classes, but the network has 3"),
    },
    "The disk": {
        "full at a checkpoint of a new run": (too_large(30_000, lambda: run_search("new")), "cannot write new/checkpoint-000002.pt: File too large; .*; there is no checkpoint"),
        "full at the second checkpoint": (full("checkpoint-000002.pt", lambda: run_retrain("new", logs=2)), "cannot write new/checkpoint-000002.pt: No space left.*last checkpoint is new/checkpoint-000001.pt"),
        "full at the copy of the best": (full("best.pt", lambda: run_retrain("new")), "cannot write new/best.pt: No space left on device"),
        "full at the network of a run that is made": (unfinished("retrain", too_large(9_000, lambda: run_retrain())), "cannot write retrain/network.safetensors: "),
        "full at the supernet of a run that is made": (unfinished("search", too_large(9_000, lambda: run_search())), "cannot write search/supernet.safetensors: "),
        "full at the architecture": (unfinished("search", full("architecture.json", run_search)), "cannot write search/architecture.json: No space left"),
        "full at the history": (unfinished("search", full("history.json", run_search)), "cannot write search/history.json: No space left"),
        "full at the record": (unfinished("search", full("*-record.json", run_search)), "cannot write search/search-record.json: No space left on device; make room, or write elsewhere"),
        "full at the record of an evaluation": (unfinished("evaluate", full("*-record.json", lambda: run_evaluate("evaluate"))), "cannot write evaluate/evaluate-record.json"),
        "full at the split": (full("unlabeled.txt", lambda: run_search("new")), "cannot write new/split/unlabeled.txt: No space left"),
        "full at an export": (full("model.safetensors", lambda: export_run("retrain", "new")), "cannot write new/model.safetensors: No space left"),
        "full at the card of an export": (full("README.md", lambda: export_run("retrain", "new")), "cannot write new/README.md"),
        "full at a report": (full("page.html", lambda: write_page(["retrain"], "page.html")), "cannot write page.html: No space left"),
        "read-only, in Python": (read_only(raises(OSError, lambda: run_search("new"))), "cannot write to new: .*Read-only file system.*take another folder"),
    },
}


def export_run_with(classes):
    from selfsupnas.export import save_pretrained
    save_pretrained(load_network("retrain"), "new", info=NetworkInfo(SegmentationSpec("data", tuple(classes), ((0, 0, 0),) * len(classes)), (64, 80)))


CASES = [(group, what) for group, rows in FAULTS.items() for what in rows]


def as_markdown(answers):
    "The table as Markdown, with the messages of this machine."
    def cell(text):
        line = " ".join(text.split()).replace("|", r"\|").replace("*", r"\*")
        return line if len(line) <= 260 else line[:260] + " ..."
    lines = ["# Bad inputs and faults, and how they are answered"]
    for group, rows in FAULTS.items():
        lines += ["", f"## {group}", "", "| what is wrong | answer |", "|---|---|"]
        lines += [f"| {cell(what)} | {cell(answers[group, what])} |" for what in rows if (group, what) in answers]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def answers():
    "Messages by fault; written as a table to the file that SELFSUPNAS_FAULTS names."
    found, file = {}, os.environ.get("SELFSUPNAS_FAULTS")
    yield found
    if file: Path(file).write_text(as_markdown(found), "utf8")


@pytest.mark.parametrize("group, what", CASES, ids=[f"{group}: {what}" for group, what in CASES])
@pytest.mark.filterwarnings("ignore:.*it is skipped", "ignore:.*labelled images are too few")
def test_a_fault_is_answered_and_costs_nothing(place, capsys, answers, group, what):
    do, words = FAULTS[group][what]
    getattr(do, "spoil", lambda: None)()
    before, there = contents(), set(listing())
    message = do(capsys)
    assert re.search(words, message), message
    assert contents() == {**contents(), **before} and not Path("executed").exists(), "finished work was touched"
    for path in set(listing()) - there:
        if Path(path).is_file(): check_whole(Path(path))
    answers[group, what] = message.replace(f"{Path.cwd()}/", "")


def test_a_batch_of_nan_costs_its_step_and_no_more(place, monkeypatch):
    "With bad_loss='skip', no NaN enters the history, and the search ends."
    import selfsupnas.train.batches as drawn
    plain, calls = drawn.to_device, []
    def poisoned(batch, device):
        calls.append(1)
        return {name: x * float("nan") if x.is_floating_point() and len(calls) in (4, 5, 6) else x for name, x in plain(batch, device).items()}
    monkeypatch.setattr(drawn, "to_device", poisoned)
    found = run_search("new", bad_loss="skip", steps=4, logs=4)
    rows = json.loads(Path("new/history.json").read_text())
    assert rows == found.trained.history and [row["step"] for row in rows] == [1, 2, 3, 4] and json.loads(Path("new/bad-step-000001.json").read_text())["images"]
    assert rows[1]["sup"] is None and "gates" not in rows[1] and rows[2]["sup"] > 0 and RunRecord.load("new/search-record.json").metrics == found.record.metrics


def test_a_checkpoint_that_is_damaged_costs_the_steps_since_the_one_before(place):
    run_retrain("new", steps=4, logs=4)
    reference = load_file("new/network.safetensors")
    cut("new/checkpoint-000004.pt"), Path("new/retrain-record.json").unlink()
    with pytest.warns(UserWarning, match="new/checkpoint-000004.pt is damaged, or not a checkpoint of selfsupnas: .*; it is skipped"): run_retrain("new", steps=4, logs=4)
    again = load_file("new/network.safetensors")
    assert again.keys() == reference.keys() and all(again[name].equal(reference[name]) for name in again)
