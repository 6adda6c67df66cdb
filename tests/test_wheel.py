"The wheel: what is in it, and that it works where there is no checkout."
import email, os, re, shutil, subprocess, sys, sysconfig, zipfile

import pytest
from conftest import ROOT

STAGES = ("search", "retrain", "evaluate")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy, so that no residue of an earlier build gets in and none is left in the checkout."
    place = tmp_path_factory.mktemp("wheel")
    source = place/"source"
    source.mkdir()
    for file in ("setup.py", "settings.ini", "README.md", "LICENSE", "MANIFEST.in"): shutil.copy(ROOT/file, source)
    shutil.copytree(ROOT/"selfsupnas", source/"selfsupnas", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT/"nbs"/"runs", source/"nbs"/"runs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    done = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place, source],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = list(place.glob("*.whl"))
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "The interpreter of an environment that has the wheel, and everything else from the environment of the tests."
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place/"bin"/"python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    # After the installation, or pip would find the editable selfsupnas there. These paths come last and their own .pth
    # files are not read, so that the editable installation stays out of the way. A .pth file is read in the locale's
    # encoding, hence in ASCII.
    site, paths = next(place.glob("lib/python*/site-packages")), {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site/"rest.pth").write_text("".join(f"import sys; sys.path.append({path!a})\n" for path in sorted(paths)), "ascii")
    return python


def run(words, cwd):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_the_wheel_is_complete(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        info = next(n.split("/")[0] for n in names if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(z.read(f"{info}/METADATA").decode())
        entries = z.read(f"{info}/entry_points.txt").decode()
    assert {f"selfsupnas/runs/{stage}.ipynb" for stage in STAGES} <= names
    modules = {f"selfsupnas/{p.name}" for p in (ROOT/"selfsupnas").glob("*.py")}
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT/"selfsupnas"/"presets").rglob("*") if p.is_file()} <= names
    assert modules <= names and not [n for n in names if n.startswith(("tests", "nbs", "build"))]
    assert any(n.startswith(info) and n.endswith("LICENSE") for n in names)
    assert re.search(r"^selfsupnas\s*=\s*selfsupnas\.cli:main$", entries, re.M)
    assert metadata["Name"] == "selfsupnas" and metadata["Requires-Python"]
    needs = metadata.get_all("Requires-Dist")
    assert any(n.startswith("torch") and "extra" not in n for n in needs)
    assert {"dev", "bluemarble", "rivals", "export"} <= set(metadata.get_all("Provides-Extra"))


def test_it_works_without_the_checkout(python, tmp_path):
    code = ("import selfsupnas; from selfsupnas.cli import STAGES, stage_notebook; print(selfsupnas.__file__); "
            "print(*map(stage_notebook, STAGES), sep='\\n')")
    done = run([python, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert len(lines) == 5 and all(line.startswith(str(python.parent.parent)) for line in lines)


def test_a_preset_is_loaded_without_the_checkout(python, tmp_path):
    code = "import selfsupnas, torch; print(tuple(selfsupnas.load('streetscenes')(torch.zeros(1, 3, 64, 80)).shape))"
    done = run([python, "-c", code], tmp_path)
    assert done.stdout.strip() == "(1, 11, 64, 80)", done.stderr


def test_its_command_lists_parameters(python, tmp_path):
    done = run([python.with_name("selfsupnas"), "search", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("folder", "seed", "steps", "label-fraction"): assert f"--{name} " in done.stdout
