"The house rules that ruff does not know (`make lint`): import direction, run notebooks, sizes, outputs, import time."
import ast, base64, dataclasses, importlib, inspect, re, subprocess, sys

import pytest
from conftest import ROOT
from imports import CHAPTERS, MODULES, NOTEBOOKS, cells, is_exported, module_of, package_imports, wrong_imports

from selfsupnas.cli import STAGES

OUTSIDE = sorted((ROOT/"nbs"/"experiments").glob("*.py")) # plain files, no part of the package
HEAVY = ("matplotlib", "fvcore", "ipywidgets", "papermill", "onnx", "onnxruntime", "onnxscript", "huggingface_hub", "tensorboard", "snakemake", "torchvision")


def name(path): return str(path.relative_to(ROOT/"nbs"))


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_a_module_imports_only_from_what_comes_before(path):
    for source, _ in cells(path):
        if not is_exported(source): continue
        for module in package_imports(source): assert module in MODULES, f"{path.name} imports {module}, which no notebook exports"
        assert wrong_imports(path, source) == []


def test_an_import_turned_round_is_seen():
    path = MODULES["space.gate"]
    assert wrong_imports(path, "from selfsupnas.train.loop import train") == ["train.loop"]
    assert wrong_imports(path, "from selfsupnas.space import cell") == ["space.cell"] and wrong_imports(path, "from selfsupnas.core import Timer") == []


def test_every_module_comes_from_one_notebook():
    package = ROOT/"selfsupnas"
    modules = {".".join(p.relative_to(package).with_suffix("").parts) for p in package.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")}
    assert modules == set(MODULES)
    assert len(MODULES) == len([p for p in CHAPTERS if module_of(p)]), "two notebooks export to one module"
    assert not [p.name for p in CHAPTERS if p.name[:2] != "00" and module_of(p) is None]
    for module, path in MODULES.items(): assert path.parent.relative_to(ROOT/"nbs").parts == tuple(module.split(".")[:-1]), f"{path} exports to {module}"


def test_a_module_and_what_it_exports_never_share_a_name():
    "To import the module would hide the function from those who type `from selfsupnas.FOLDER import`."
    for module in MODULES:
        if "." in module: assert module.split(".")[-1] not in getattr(importlib.import_module(f"selfsupnas.{module}"), "__all__", ()), module


def test_no_module_imports_what_it_does_not_use():
    "Ruff reads whole notebooks: there, a demonstration may be the only user of what is exported."
    for path in sorted((ROOT/"selfsupnas").rglob("[!_]*.py")):
        tree = ast.parse(path.read_text("utf8"))
        imported = {(a.asname or a.name).split(".")[0] for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
        assert imported <= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}, path.name


def imported_modules(path):
    "What a file imports, by full name."
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module


def test_the_package_imports_nothing_from_the_experiments():
    names = {p.stem for p in OUTSIDE}
    assert {"benchmarks", "campaign", "full_size"} <= names and not names & set(MODULES)
    for path in sorted((ROOT/"selfsupnas").rglob("*.py")): assert not names & {m.split(".")[0] for m in imported_modules(path)}, path.name
    assert "full_size" in imported_modules(ROOT/"nbs"/"experiments"/"benchmarks.py"), "such an import is seen"


@pytest.mark.parametrize("path", OUTSIDE, ids=name)
def test_a_definition_of_the_experiments_fits_a_screen(path):
    tree = ast.parse(path.read_text("utf8"))
    assert [node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.end_lineno - node.lineno >= 60] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_prose_comes_before_code(path):
    for source, _ in cells(path, "markdown"):
        assert [line for line in source.splitlines() if line.strip() and not line.startswith("#")], f"nothing but a heading: {source}"


@pytest.mark.parametrize("stage", STAGES)
def test_the_parameters_cell_mirrors_the_dataclass(stage):
    path, cls = ROOT/"nbs"/"runs"/f"{stage}.ipynb", STAGES[stage]
    tagged = [source for source, cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    values = {}
    exec(tagged[0], values)
    del values["__builtins__"]
    assert values == {f.name: f.default for f in dataclasses.fields(cls)}
    assert cls(**values) == cls()
    comments = {line.split(" = ")[0]: line.partition(" # ")[2] for line in tagged[0].splitlines()}
    docs = {m[1]: m[2] for base in reversed(cls.__mro__[:-1]) for m in re.finditer(r"^    (\w+): .*? # (.*)$", inspect.getsource(base), re.M)}
    assert comments == docs, "the same explanations"


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_notebook_is_a_report(stage):
    "The result and what differs from the defaults are above the parameters; the file is one that ran from top to bottom."
    path = ROOT/"nbs"/"runs"/f"{stage}.ipynb"
    code = list(cells(path))
    tagged = next(k for k, (_, cell) in enumerate(code) if "parameters" in cell["metadata"].get("tags", []))
    heads = ["".join(o["data"].get("text/markdown", "")) for _, cell in code[:tagged] for o in cell["outputs"]]
    assert len(heads) == 1 and "Differs from the defaults" in heads[0] and "GFLOPs" in heads[0]
    assert not [source for source, _ in code if "globals" in source]
    texts = ["".join(o.get("data", {}).get("text/plain", "")) for _, cell in code for o in cell["outputs"]]
    assert not [text for text in texts if text.startswith("{")], "a raw dict"


def test_every_run_notebook_has_a_stage():
    assert {p.stem for p in NOTEBOOKS if p.parent.name == "runs"} == set(STAGES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_committed_notebook_is_whole_and_small(path):
    outputs = [o for _, cell in cells(path) for o in cell["outputs"]]
    assert not [o["ename"] for o in outputs if o["output_type"] == "error"]
    assert outputs, "no outputs: readers see no pictures"
    assert path.stat().st_size <= 700_000
    for data in (o.get("data", {}).get(kind) for o in outputs for kind in ("image/png", "image/jpeg")):
        if data: assert len(base64.b64decode("".join(data))) <= 150_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_outputs_name_no_place_of_a_machine(path):
    "Neither a temporary folder nor the checkout in which the notebook was run, as warnings print it."
    texts = ["".join(o.get("text", []) or o.get("data", {}).get("text/plain", [])) for _, cell in cells(path) for o in cell["outputs"]]
    for text in texts: assert not re.search(r"/(tmp|home|root|Users)/[\w.]|site-packages|/[\w.-]+/selfsupnas/[\w/]+\.py", text), text[:300]


def test_records_name_no_place_of_a_machine():
    records = sorted((ROOT/"nbs"/"experiments"/"records").rglob("*.json"))
    assert records and [str(path) for path in records if re.search(r'": "(/|~|[A-Z]:)', path.read_text("utf8"))] == []


def test_the_package_itself_loads_nothing_heavy():
    code = f"import selfsupnas, sys; print(*[m for m in {('torch', 'numpy', 'scipy', 'PIL', *HEAVY)} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_heavy_libraries_load_when_used():
    "One process imports every module of the package, and none of them has drawn in a heavy library."
    modules = "; ".join(f"import selfsupnas.{module}" for module in MODULES)
    code = f"{modules}\nimport sys; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", ["", ".data", ".data.toy", ".space", ".tasks", ".train", ".stages", ".viz"])
def test_what_users_type_is_taken_from_its_module(package):
    "What a package offers is there, and is no module; what it does not offer is refused with what it has."
    found = importlib.import_module(f"selfsupnas{package}")
    names = dir(found)
    assert names
    for name in names: assert getattr(found, name) is not None and not hasattr(getattr(found, name), "__path__"), name
    with pytest.raises(AttributeError, match=names[0]): found.nothing_of_that_name
