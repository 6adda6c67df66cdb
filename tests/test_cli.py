"The command: what a mistake is answered with, and what a failed run leaves behind."
import dataclasses, io, json, re, shutil, subprocess, sys

import nbformat
import pytest
from conftest import ROOT, draw_folder

from selfsupnas.space.architecture import Architecture, save_architecture
from selfsupnas.data.cityscapes import draw_cityscapes
from selfsupnas.cli import main, option_words, parse_options, plan_demo, replace_pairs
from selfsupnas.cli import run_notebook, run_stage
from selfsupnas.space.grid import SearchSpace
from selfsupnas.cli import STAGES


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    "refused(*words) expects exit status 2 and not one file; it returns the text on stderr."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SELFSUPNAS_DATA", raising=False)
    def check(*words):
        assert main(list(words)) == 2
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "running" not in out and list(tmp_path.iterdir()) == []
        return " ".join(re.findall(r"[^│\s]+", err)) # without the frame
    return check


@pytest.mark.parametrize("stage", [*STAGES, "demo"])
def test_an_unknown_parameter_is_refused_with_the_near_ones(refused, stage):
    for words in (("-p", "sede", "2"), ("--sede", "2")):
        message = refused(stage, *words)
        assert "sede" in message and re.search("seed", message)


@pytest.mark.parametrize("stage", [*STAGES, "demo"])
def test_a_value_of_the_wrong_type_is_refused(refused, stage):
    for words in (("-p", "seed", "one"), ("--seed", "1.5")):
        message = refused(stage, *words)
        assert "--seed" in message and words[-1] in message


@pytest.mark.parametrize("words, named", [
    (("search", "--size", "64"), "--size"), (("search", "--consistency", "magic"), "unimatch"), (("search", "--label-fraction", "1/0"), "--label-fraction"),
    (("search", "--budget", "2"), "budget must be 1 or less"), (("search", "--steps"), "--steps"), (("serch",), "did you mean search"), (("search", "-p", "steps"), "-p needs"),
    (("retrain", "--gate", "static"), "--gate"), (("evaluate", "--split", "tset"), "'test'"), (("data",), "NAME"),
    (("report",), "which runs"), (("search", "--folder", ""), "folder must"), (("search", "--architecture", "x"), "is an option of retrain"),
    (("search", "--w-harden", "1"), "--w-binary")], ids=str)
def test_a_mistake_says_what_would_be_right(refused, words, named): assert named in refused(*words)


@pytest.mark.parametrize("words, seconds", [(["--help"], 1.5), (["search", "--help"], 1.5), (["search", "--stpes", "3"], 1.5), (["serch"], 1.5), (["search", "--budget", "2"], 1.5)], ids=str)
def test_help_and_mistakes_load_nothing_heavy(words, seconds):
    "No torch, so that the answer takes half a second on a quiet machine."
    code = f"import sys; from selfsupnas.cli import main; main({words!r}); print([m for m in ('torch', 'PIL', 'scipy', 'matplotlib', 'papermill') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_former_form_still_works_and_names_the_new_one(capsys):
    assert replace_pairs("evaluate", ["-p", "window", "(64, 80)", "-p", "root", "null", "-p", "overwrite", "True", "-p", "baselines", "()", "--flip"]) == [
        "--window", "64", "80", "--root", "None", "--overwrite", "--baselines", "--flip"]
    assert "--window 64 80 --root None" in capsys.readouterr().err


def test_a_former_value_of_text_stays_text(capsys):
    assert replace_pairs("search", ["-p", "folder", "[1]"]) == ["--folder", "[1]"]
    assert replace_pairs("search", ["-p", "folder", "a b;c"]) == ["--folder", "a b;c"] and "--folder 'a b;c'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("search", "-p", "data"), ("demo", "--data")])
def test_camvid_needs_a_place(refused, words):
    assert "SELFSUPNAS_DATA" in refused(*words, "camvid")
    assert "nowhere" in refused(*words, "camvid", "-p", "root", "nowhere")


def test_an_unknown_dataset_is_refused(refused):
    assert "streetscenes" in refused("search", "-p", "data", "street")


def test_what_the_stage_before_makes_must_be_there(refused):
    assert "no/architecture.json" in refused("retrain", "-p", "architecture", "no/architecture.json")
    assert "no/network" in refused("evaluate", "-p", "network", "no/network")


def test_the_demo_keeps_its_wiring(refused):
    for name in ("architecture", "network", "teacher"): assert name in refused("demo", f"--{name}", "elsewhere")


def test_the_demo_takes_a_split_in_place_of_a_fraction(tmp_path):
    "A fraction that would label no image is no mistake when the split is given; an unknown image in it is one."
    tree = draw_cityscapes(tmp_path/"cityscapes", dict(train=5, val=2))
    (tmp_path/"split").mkdir()
    (tmp_path/"split"/"labeled.txt").write_text("aachen_000000_000019"), (tmp_path/"split"/"unlabeled.txt").write_text("")
    words = ["--root", str(tree), "--label-fraction", "1/100"]
    with pytest.raises(ValueError, match="less than one image"): plan_demo("cityscapes", tmp_path/"run", words)
    given = [*words, "--split-folder", str(tmp_path/"split")]
    assert plan_demo("cityscapes", tmp_path/"run", given)["retrain"][1]["split_folder"] == str(tmp_path/"split")
    (tmp_path/"split"/"unlabeled.txt").write_text("nowhere_000000_000019")
    with pytest.raises(ValueError, match="unlabeled.txt, line 1"): plan_demo("cityscapes", tmp_path/"run", given)


def test_a_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path/"file").write_text("")
    assert main(["search", "--folder", str(tmp_path/"file"), "-p", "steps", "1"]) == 2
    assert str(tmp_path/"file") in capsys.readouterr().err


@pytest.mark.parametrize("words", [("serch",), ("search", "-p", "steps"), ("search", "--steps", "3", "4"), ("demo", "--data", "x")], ids=" ".join)
def test_words_that_are_no_command_are_refused(capsys, words):
    assert main(list(words)) == 2 and capsys.readouterr().err


def test_the_installed_command_answers_a_mistake_in_words(command, tmp_path):
    done = command("serch", cwd=tmp_path)
    assert done.returncode == 2 and "serch" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_every_default_can_be_said_on_the_command_line(stage):
    cls = STAGES[stage]
    for f in dataclasses.fields(cls):
        assert parse_options(stage, option_words(f.name, f.default)) == {f.name: f.default}


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_listed_with_defaults(stage, capsys):
    assert main([stage, "--help"]) == 0
    out = capsys.readouterr().out
    for f in dataclasses.fields(STAGES[stage]): assert re.search(rf"--(no-)?{f.name.replace('_', '-')}\b", out), f.name
    assert f"(default: {STAGES[stage].folder})" in out and f"Example: selfsupnas {stage} --" in out


def test_a_file_that_is_no_architecture_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"architecture.json").write_text(json.dumps({"no": "architecture"}))
    assert main(["retrain", "-p", "architecture", "architecture.json"]) == 2
    assert "architecture.json is not an architecture" in capsys.readouterr().err


def test_a_failed_run_keeps_its_notebook(command, tmp_path):
    space = SearchSpace(3, layers=1, channels=2) # of three classes: too few for street scenes
    save_architecture(Architecture(space, dict.fromkeys(space.edges(), 1.)), tmp_path/"architecture.json")
    done = command("retrain", "--folder", "out", "-p", "architecture", "architecture.json", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    notebook = nbformat.read(tmp_path/"out"/"retrain-failed.ipynb", 4)
    errors = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert len(errors) == 1
    assert f"{errors[0].ename}: {errors[0].evalue.splitlines()[-1]}" in done.stderr
    assert "out/retrain-failed.ipynb" in done.stderr and not (tmp_path/"out"/"retrain.ipynb").exists()


def test_a_kernel_that_dies_is_reported(tmp_path, capsys):
    cells = [nbformat.v4.new_code_cell("folder = ''", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("import os; os._exit(9)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/"dies.ipynb")
    assert run_stage("search", {}, tmp_path/"out", source=tmp_path/"dies.ipynb") == 1
    assert "Kernel died" in capsys.readouterr().err


def test_the_kernel_is_this_interpreter(tmp_path, monkeypatch):
    "Also where Jupyter knows another kernel by the name python3, and where pictures are switched off."
    kernel = tmp_path/"jupyter"/"kernels"/"python3"
    kernel.mkdir(parents=True)
    (kernel/"kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "no", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"jupyter"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = [nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("import sys; print(seed, sys.executable)"),
             nbformat.v4.new_code_cell("import matplotlib.pyplot as plt; fig, ax = plt.subplots(); plt.close(); fig")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/"in.ipynb")
    out = io.StringIO()
    run_notebook(tmp_path/"in.ipynb", tmp_path/"out.ipynb", {"seed": 5}, out=out, err=out)
    assert out.getvalue() == f"5 {sys.executable}\n"
    assert "image/png" in nbformat.read(tmp_path/"out.ipynb", 4).cells[-1].outputs[0].data


def test_an_image_in_two_splits_of_a_folder_is_told(tmp_path, capsys):
    draw_folder(tmp_path/"data", dict(train=3, val=2))
    words = ["data", "folder", str(tmp_path/"data"), "--folder", str(tmp_path/"sheets")]
    assert main(words) == 0 and "no image is in two splits: 5 compared" in capsys.readouterr().out
    shutil.copy(tmp_path/"data/images/train/0.png", tmp_path/"data/images/val/1.png")
    assert main(words) == 1 and "the same image is in two splits: 'train/0' of train and 'val/1' of val" in capsys.readouterr().out


def test_a_report_needs_runs(refused): assert "no run record or folder at nowhere" in refused("report", "nowhere")


def test_a_report_is_one_page(tmp_path, capsys):
    runs = [str(ROOT/"nbs/experiments/records/camvid/0.125"/name/"0") for name in ("searched-labels", "searched-semi")]
    assert main(["report", *runs, "--to", str(tmp_path/"page.html")]) == 0
    page = (tmp_path/"page.html").read_text("utf8")
    assert page.count("<tr>") > 20 and "w_semi" in page and "searched-semi/0/evaluate" in page
    assert page.index("mIoU (%)") < page.index("Parameters that differ") < page.index("All parameters"), "results first"
    assert "width=device-width" in page and not re.search(r"(src|href)=\"?(?!data:)", page), "one file, readable on a phone"
