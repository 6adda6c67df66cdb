"What a saved notebook must not hold: progress bars that stopped at their first moment, and the state of widgets."
import io, json, re

import nbformat
import pytest
from conftest import ROOT

from selfsupnas.cli import run_notebook

NOTEBOOKS = [p for p in sorted(ROOT.glob("nbs/**/*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
BAR = re.compile(r"\d+%\||\[(\d+:)?\d\d:\d\d[<,]") # tqdm's text: 12%|..., [00:00<?

BARS = """import time
from selfsupnas.core import progress_bar

for _ in progress_bar(range(8), desc="whole"): time.sleep(.05)
for k in progress_bar(range(8), desc="left early"):
    time.sleep(.05)
    if k == 4: break
with progress_bar(total=8) as bar:
    for _ in range(8): time.sleep(.05); bar.update()
print("the end")"""


def text(output): return "".join(output.get("text", output.get("data", {}).get("text/plain", "")))


@pytest.mark.parametrize("bar", ["search:   0%|          | 0/50 [00:00<?, ?it/s]", "naps: 0run [00:00, ?run/s]", "100%|██████████| 8/8 [01:02<00:00,  2.50it/s]"])
def test_a_bar_is_recognised(bar): assert BAR.search(bar)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_committed_notebook_holds_no_bar(path):
    notebook = json.loads(path.read_text("utf8"))
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", ())]
    assert not [text(o) for o in outputs if BAR.search(text(o))]
    assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})], "a widget without its kernel"
    assert "widgets" not in notebook["metadata"], "megabytes of what no kernel answers for"


@pytest.mark.parametrize("live", ["0", "1"], ids=["batch", "live"])
def test_an_executed_notebook_holds_no_bar(live, tmp_path, monkeypatch):
    "In a batch run there is none; in a live one the output of each is emptied when it ends."
    monkeypatch.setenv("SELFSUPNAS_WIDGETS", live)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BARS)]), tmp_path/"in.ipynb")
    run_notebook(tmp_path/"in.ipynb", tmp_path/"out.ipynb", {}, out=io.StringIO(), err=io.StringIO())
    notebook = nbformat.read(tmp_path/"out.ipynb", 4)
    outputs = notebook.cells[-1].outputs
    nbformat.validate(notebook)
    assert [text(o) for o in outputs if o.output_type == "stream"] == ["the end\n"]
    shown = [o for o in outputs if o.output_type != "stream"]
    assert len(shown) == (3 if live == "1" else 0) and not [o for o in shown if o.data]
