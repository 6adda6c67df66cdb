"""Every way to stop a run, at every moment, in Python and as a command: only the steps since the last checkpoint are lost.

Each run is stopped once and repeated by the same call; its files are compared with those of an uninterrupted run.
A fourth of the cases run here, with every way, moment and stop among them; `make stops` runs all and writes the table to runs/stops.md.
"""
import contextlib, os, re, resource, signal, sys, time
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import ROOT, same_run, wait_until

from selfsupnas.train.checkpoint import checkpoint_paths, step_of

pytestmark = pytest.mark.long
STEPS, EVERY = 24, 6
SMALL = dict(size=(64, 80), layers=3, channels=8, budget=.75, steps=STEPS, logs=STEPS // EVERY, batch_labelled=2,
             batch_unlabelled=2, batch_jigsaw=2, threshold=.3, ramp=(0., .2))


def in_python(folder):
    from selfsupnas.stages.configs import SearchConfig
    from selfsupnas.stages.searching import search
    search(SearchConfig(folder=folder, **SMALL))


def as_command(folder):
    "As `selfsupnas search`, with a notebook without figures."
    from selfsupnas.cli import run_stage
    sys.exit(run_stage("search", SMALL, folder, source=Path(folder).parent/"search.ipynb"))


WAYS = {"Python": in_python, "command": as_command}


def begun(folder): return (folder/"split"/"split.json").exists()
def newest(folder): return max(map(step_of, checkpoint_paths(folder)), default=0)
def half_written(folder): return newest(folder) and any(folder.glob(".checkpoint-*"))


MOMENTS = {"before the first checkpoint": begun, "while one is written": half_written,
           "between two": lambda folder: newest(folder) == EVERY and not half_written(folder), "after the last": lambda folder: newest(folder) == STEPS}


def workers(process):
    "The processes that do the work; for a command, its kernel."
    own = psutil.Process(process.pid)
    return [child for child in own.children() if any("ipykernel" in word for word in child.cmdline())] or [own]


def click(process, folder): os.kill(process.pid, signal.SIGINT)


def double_click(process, folder):
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError): os.kill(process.pid, signal.SIGINT)
        time.sleep(.2) # the pause of a double click


def fill(process, folder):
    "From now on, files of the working process are cut off at 300 bytes, as on a full disk."
    for worker in workers(process): worker.rlimit(resource.RLIMIT_FSIZE, (300, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def kill_kernel(process, folder): workers(process)[0].kill()


STOPS = {"click": click, "double click": double_click, "SIGTERM": lambda process, folder: process.terminate(),
         "SIGKILL": lambda process, folder: process.kill(), "dead kernel": kill_kernel, "full disk": fill}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    "The folder of an uninterrupted run."
    here = tmp_path_factory.mktemp("whole")
    process = start(in_python, here/"log", str(here/"run"))
    process.join()
    assert process.exitcode == 0, (here/"log").read_text()[-2000:]
    return here/"run"


@pytest.fixture(scope="module")
def table():
    "A row for each stop; written to the file that SELFSUPNAS_STOPS names."
    rows = []
    yield rows
    if file := os.environ.get("SELFSUPNAS_STOPS"):
        lines = ["| way | moment | stop | newest checkpoint, of 24 steps | ended with | what was said | made again, equal to an undisturbed run |", "|---|---|---|---|---|---|---|"]
        Path(file).write_text("\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n", "utf8")


def short_notebook(path):
    "Write the run notebook up to the search, without its metrics."
    cells = [cell for cell in nbformat.read(ROOT/"nbs"/"runs"/"search.ipynb", 4).cells if cell.cell_type == "code"][:4]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


CASES = [(way, moment, stop) for w, way in enumerate(WAYS) for m, moment in enumerate(MOMENTS) for s, stop in enumerate(STOPS)
         if "SELFSUPNAS_STOPS" in os.environ or (w + m + s) % 4 == 0]


@pytest.mark.parametrize("way, moment, stop", CASES)
def test_a_stopped_run_goes_on(way, moment, stop, whole, start, table, tmp_path):
    folder, log = tmp_path/"run", tmp_path/"log"
    short_notebook(tmp_path/"search.ipynb")
    process = start(WAYS[way], log, str(folder))
    assert wait_until(lambda: MOMENTS[moment](folder), lambda: not process.is_alive()), log.read_text()[-2000:]
    working = workers(process)
    STOPS[stop](process, folder)
    process.join()
    psutil.wait_procs(working, 600) # a kernel ends about a second after its killed command
    said = log.read_text()
    left, ended = newest(folder), process.exitcode
    if not (folder/"search-record.json").exists(): # otherwise the run ended before the stop
        assert ended != 0, said[-2000:]
        if "click" in stop: assert ended == 130
        if stop == "SIGTERM": assert ended in (143, -signal.SIGTERM)
    # a second signal may reach a progress bar's destructor, where Python prints it and continues
    noted = re.sub(r"Exception ignored in: <function tqdm\.__del__.*?\nKeyboardInterrupt: ?\n", "", said, flags=re.S)
    if stop != "full disk": assert "Traceback" not in noted, said[-3000:]
    process = start(WAYS[way], log, str(folder))
    process.join()
    again = log.read_text()[len(said):]
    assert process.exitcode == 0, again[-2000:]
    if left and left < STEPS: assert f"resumes at step {left} " in again
    same_run(folder, whole)
    assert not (folder/"search-running.ipynb").exists() and not list(folder.glob("*-failed.ipynb"))
    line = next((line for line in reversed(said.splitlines()) if "stopped" in line or "cannot write" in line), "").replace(f"{tmp_path}/", "")
    table.append((way, moment, stop, str(left), str(ended), line[-200:].replace("|", "/"), "yes"))


LOSSY = """kernel = get_ipython().kernel
send = kernel.session.send
def lossy(stream, kind, *args, **options):
    if kind != "execute_reply": return send(stream, kind, *args, **options)
kernel.session.send = lossy
open(f"{folder}/lossy", "w").close()"""


def test_a_kernel_whose_reply_is_lost_is_ended(start, tmp_path):
    "As after an interrupt at the end of a cell: the kernel waits for a request, papermill for a reply."
    cells = [nbformat.v4.new_code_cell("folder = ''", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(LOSSY)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/"search.ipynb")
    process = start(as_command, tmp_path/"log", str(tmp_path/"run"))
    assert wait_until(lambda: (tmp_path/"run"/"lossy").exists(), lambda: not process.is_alive()), (tmp_path/"log").read_text()[-2000:]
    click(process, tmp_path/"run")
    process.join(300)
    assert process.exitcode == 130, (tmp_path/"log").read_text()[-2000:]
