"""Notebooks in a real JupyterLab in a real browser: all cells run, controls change their pictures, pictures have their own size and
exact colours, and what is saved holds no bar, and a picture in place of each explorer. `make test-browser`."""

import base64, contextlib, io, json, os, re, shutil, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, same_run, wait_until
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = Path(os.environ["SELFSUPNAS_SHOTS"]) if "SELFSUPNAS_SHOTS" in os.environ else None # where screenshots go, to be looked at

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no browser: needs chromium on the PATH"),
              pytest.mark.long]
PATIENCE = 600_000 # ms until a page that does not answer ends a test

LIVE = """from selfsupnas.stages.searching import SearchConfig, search
from selfsupnas.viz.widgets import live_plot

config = SearchConfig(folder=FOLDER, size=(64, 80), layers=3, channels=8, steps=120, budget=.75,
                      batch_labelled=4, batch_unlabelled=4, batch_jigsaw=4, logs=12)
found = search(config, watch=live_plot(config))
print("the end")"""

BARS = """import time
from selfsupnas.core import progress_bar

for i in progress_bar(range(40), desc="whole"): time.sleep(.05)
for i in progress_bar(range(40), desc="left early"):
    time.sleep(.05)
    if i == 9: break
print("the end")"""

BAR = re.compile(r"\d+%\||\[(\d+:)?\d\d:\d\d[<,]") # tqdm's text: 12%|..., [00:00<?

def write_notebook(path, source):
    import nbformat
    cells = [nbformat.v4.new_markdown_cell("# A live run"), nbformat.v4.new_code_cell(source)]
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}} # or JupyterLab asks
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address, folder and process of a JupyterLab that serves a copy of the notebooks."
    place = tmp_path_factory.mktemp("lab")
    for name in ("00_tour.ipynb", "viz/05_widgets.ipynb"): shutil.copy(ROOT/"nbs"/name, place)
    for name in ("live", *map(live_name, STOPS)): write_notebook(place/f"{name}.ipynb", LIVE.replace("FOLDER", repr(name)))
    write_notebook(place/"bars.ipynb", BARS)
    settings = {"notebook-extension/tracker": '{"windowingMode": "none"}', # cells out of sight are in the page, too
                "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}'}
    for name, text in settings.items():
        path = place/"settings"/"@jupyterlab"/f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    words = [f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", "--no-browser", "--allow-root",
             "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", f"--ServerApp.root_dir={place}"]
    with open(place/"lab.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(place/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(place/"workspaces")})
    try:
        def answers():
            with contextlib.suppress(OSError): return urllib.request.urlopen(f"{address}/api").status == 200
        assert wait_until(answers, lambda: process.poll() is not None), (place/"lab.log").read_text()
        yield address, place, process
    finally:
        process.terminate()
        process.wait(600)

@pytest.fixture(scope="module")
def jupyter(lab): return lab[0]

@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no driver: pip install playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield browser
        browser.close()

def opened(browser, address, title):
    "A page with that notebook, its kernel ready."
    page = browser.new_page(viewport={"width": 1300, "height": 1500})
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    return ready(page, title)

def ready(page, title):
    page.locator("h1", has_text=title).first.wait_for()
    page.wait_for_function("() => /Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText ?? '')")
    return page

def run_all(page, wait=True):
    page.get_by_role("menuitem", name="Run", exact=True).first.click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(f"() => {RUNNING}")
    if wait: page.wait_for_function(f"() => !{RUNNING}")

@pytest.fixture(scope="module")
def page(jupyter, browser):
    "The tour, opened, all cells run."
    page = opened(browser, f"{jupyter}/lab/tree/00_tour.ipynb", "A tour")
    run_all(page)
    shot(page.locator(".jp-Notebook").first, "notebook")
    yield page
    page.close()

@pytest.fixture(scope="module")
def explorers(jupyter, browser):
    "The notebook of explorers, opened, all cells run."
    page = opened(browser, f"{jupyter}/lab/workspaces/explorers/tree/05_widgets.ipynb", "widgets")
    run_all(page)
    shot(page.locator(".jp-Notebook").first, "explorers")
    yield page
    page.close()

RUNNING = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(e => e.innerText.includes('*'))"
IMAGES = ".jp-OutputArea .widget-image"
STILLS = ".jp-OutputArea-child:has(.selfsupnas-still) + .jp-OutputArea-child img" # what a saved notebook shows of an explorer

def sizes(picture) -> dict:
    "CSS pixels of a picture, when it is decoded: its own width, the width and height shown, and the width of the cell."
    return picture.evaluate("""async img => {
        await img.decode()
        const box = img.getBoundingClientRect(), own = img.naturalWidth
        return {own: own / 2, width: box.width, height: box.height, ratio: img.naturalHeight / own,
                cell: img.closest('.jp-OutputArea-output').clientWidth}}""")

def assert_own_size(picture):
    "A live explorer draws two pixels for one of CSS, and shows them at that size where the cell is wide enough."
    found = sizes(picture)
    assert found["own"] > 0 and found["width"] == pytest.approx(min(found["own"], found["cell"]), abs=1), found
    assert found["height"] == pytest.approx(found["width"] * found["ratio"], abs=1), found
    return found

def colours(picture) -> dict: # (r, g, b) -> count
    "The colours of a picture of the page, as it was sent."
    data = picture.evaluate("""async img => {
        const bytes = new Uint8Array(await (await fetch(img.src)).arrayBuffer())
        return btoa(Array.from(bytes, b => String.fromCharCode(b)).join(''))}""")
    drawn = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    return {colour: count for count, colour in drawn.getcolors(drawn.width * drawn.height)}

def saved(page, jupyter, name) -> list: # of cells
    "Save the notebook of the page, and read what was saved."
    with page.expect_response(lambda r: r.request.method == "PUT" and f"/api/contents/{name}" in r.url) as answer:
        page.locator("[data-command='docmanager:save']").first.click()
    assert answer.value.ok
    with urllib.request.urlopen(f"{jupyter}/api/contents/{name}") as content:
        return json.load(content)["content"]["cells"]

def assert_no_bars(cells):
    outputs = [o for cell in cells for o in cell.get("outputs", ())]
    texts = ["".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs]
    assert outputs and not [text for text in texts if BAR.search(text)]

def end_kernel(jupyter, name):
    with urllib.request.urlopen(f"{jupyter}/api/sessions") as sessions:
        own = [session["id"] for session in json.load(sessions) if session["path"] == name]
    assert own
    for session in own: urllib.request.urlopen(urllib.request.Request(f"{jupyter}/api/sessions/{session}", method="DELETE"))

def reopened(browser, jupyter, name, title):
    "The saved notebook in a new page, when the kernel that made its outputs is gone."
    end_kernel(jupyter, name)
    return opened(browser, f"{jupyter}/lab/workspaces/again/tree/{name}?reset", title)

def shot(element, name) -> Image.Image:
    element.scroll_into_view_if_needed()
    data = element.screenshot()
    if SHOTS:
        SHOTS.mkdir(parents=True, exist_ok=True)
        (SHOTS/f"{name}.png").write_bytes(data)
    return Image.open(io.BytesIO(data)).convert("RGB")

def changed(before, after) -> float: # share of pixels
    if before.size != after.size: return 1.
    return float((np.asarray(before) != np.asarray(after)).any(-1).mean())

def picture_changes(page, picture, act, name):
    "Do `act`, wait until the picture is another by more than its words: several pictures may follow each other."
    before, source = shot(picture, f"{name}-before"), picture.get_attribute("src")
    act()
    from playwright.sync_api import expect
    expect(picture).not_to_have_attribute("src", source, timeout=PATIENCE) # asked of the page anew each time: an element may be replaced
    shares = []
    def differs():
        picture.evaluate("img => img.decode()")
        shares.append(changed(before, shot(picture, f"{name}-after")))
        return shares[-1] > .01
    wait_until(differs, seconds=PATIENCE / 1000)

def test_the_tour_runs_without_an_error(page):
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'] >> text=Traceback").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert page.locator(IMAGES).count() == 2, "two explorers"

def test_a_budget_slider_moves_the_route(page):
    slider = page.locator(".widget-slider .noUi-handle, .widget-hslider [role=slider]").first
    def act():
        slider.scroll_into_view_if_needed()
        slider.click()
        for _ in range(15): page.keyboard.press("ArrowRight")
    picture_changes(page, page.locator(".widget-image").nth(0), act, "budget")

def test_a_click_on_a_path_changes_cost_and_prediction(page):
    opened = page.locator(".widget-toggle-button.mod-active")
    assert opened.count(), "the derived route has open edges"
    picture_changes(page, page.locator(".widget-image").nth(1), lambda: opened.first.click(), "editor")

def test_the_pictures_of_the_tour_have_their_own_size_and_the_colours_of_classes(page):
    from selfsupnas.data.datasets import load_dataset
    from selfsupnas.viz.routes import GATE_COLOURS
    from matplotlib import colormaps
    budget, editor = (page.locator(IMAGES).nth(k) for k in range(2))
    for picture in (budget, editor): assert assert_own_size(picture)["own"] >= 800
    gates = 255 * colormaps[GATE_COLOURS](np.linspace(0, 1, 256))[:, None, :3]
    off = abs(np.array([*colours(budget)]) - gates).max(-1).min(1) # of each colour of the bar, from the nearest of the picture
    assert (off < 1).sum() > 250 and off.max() < 3, "a palette of 256 colours is 31 off; the ends touch the frame"
    assert_classes(colours(editor), load_dataset("streetscenes", "val", size=(64, 80)), 3) # the image that the tour shows

def test_the_tour_is_saved_without_bars(page, jupyter): assert_no_bars(saved(page, jupyter, "00_tour.ipynb"))

def test_every_explorer_shows_its_picture_at_its_own_size(explorers):
    assert explorers.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    pictures = explorers.locator(IMAGES)
    assert pictures.count() == 6
    for k in range(pictures.count()):
        assert_own_size(pictures.nth(k))
        shot(pictures.nth(k), f"explorer-{k}")
    assert explorers.locator(".widget-html b").count() == 0, "no explorer says that something went wrong"

def test_the_split_is_drawn_in_the_colours_of_its_classes(explorers):
    from selfsupnas.data.datasets import load_dataset
    drawn, spec = colours(explorers.locator(IMAGES).last), load_dataset("streetscenes", "train", size=(64, 80)).spec
    assert (128, 128, 0) in spec.palette, "trees, which a palette of 256 colours draws as something else"
    for name, colour in zip(spec.classes, spec.palette): assert drawn.get(colour, 0) > 1000, f"the bar of {name} is not {colour}"

def assert_classes(drawn, dataset, index):
    "Each class of the label of an image is drawn in its exact colour, in at least ten pixels for each of the label's."
    label, spec = dataset[index][1], dataset.spec
    assert (128, 128, 0) in spec.palette and (label == spec.classes.index("car")).any()
    for k, colour in enumerate(spec.palette):
        assert drawn.get(colour, 0) >= 10 * (label == k).sum(), f"{spec.classes[k]} {colour} is drawn in another colour"

@pytest.mark.parametrize("k", (2, 3), ids=("editor", "images"))
def test_predictions_are_drawn_in_the_colours_of_their_classes(explorers, k):
    from selfsupnas.data.datasets import load_dataset
    assert_classes(colours(explorers.locator(IMAGES).nth(k)), load_dataset("streetscenes", "val", size=(64, 80)), 3)

def explorer_of(page, k):
    "The output of an explorer: its controls and its picture."
    return page.locator(".selfsupnas-explorer").nth(k)

def reaction(page, k, act) -> float:
    "Do `act` to an explorer, and wait for another picture; seconds."
    picture = explorer_of(page, k).locator(".widget-image")
    source, begun = picture.get_attribute("src"), time.monotonic()
    act()
    page.wait_for_function("([image, source]) => image.src != source", arg=[picture.element_handle(), source])
    return time.monotonic() - begun

def press(page, k, key):
    explorer_of(page, k).locator("[role=slider], button:not([disabled]), select").first.press(key)

EXPLORERS = {"bars": "ArrowRight", "budget": "ArrowRight", "editor": "Space", "images": "ArrowRight", "jigsaw": "ArrowRight", "split": "ArrowRight"}

@pytest.mark.parametrize("name", EXPLORERS)
def test_each_explorer_follows_the_keyboard(explorers, name):
    "Where no other work disturbs it, within 1.5 s."
    k, key = list(EXPLORERS).index(name), EXPLORERS[name]
    idle = psutil.cpu_percent(1) < 15
    seconds = [reaction(explorers, k, lambda: press(explorers, k, key)) for _ in range(3)]
    wait_until(lambda: not explorer_of(explorers, k).locator(".widget-html-content").last.inner_text()) # the busy sign
    print(f"{name}: {min(seconds):.2f} s")
    if idle: assert min(seconds) < 1.5, f"{name}: {min(seconds):.2f} s"
    shot(explorer_of(explorers, k), f"explorer-{name}")

def test_many_keys_are_drawn_together(explorers):
    "The picture is soon that of the last of them."
    slider = explorer_of(explorers, 0).locator("[role=slider]").first
    picture = explorer_of(explorers, 0).locator(".widget-image")
    explorers.evaluate("""image => {
        window.sources = []
        new MutationObserver(() => window.sources.push(image.src)).observe(image, {attributeFilter: ['src']})}""", picture.element_handle())
    for _ in range(20): slider.press("ArrowLeft"); slider.press("ArrowRight")
    wait_until(lambda: not explorer_of(explorers, 0).locator(".widget-html-content").last.inner_text())
    assert 0 < explorers.evaluate("window.sources.length") < 40

def test_pieces_of_a_jigsaw_are_exchanged(explorers):
    choices = explorer_of(explorers, 4).locator("select")
    before = [choice.input_value() for choice in choices.all()]
    assert len(before) == 4
    reaction(explorers, 4, lambda: choices.first.select_option(before[2]))
    assert [choice.input_value() for choice in choices.all()] == [before[2], before[1], before[0], before[3]]
    assert explorer_of(explorers, 4).locator(".widget-html b").count() == 0

def test_an_edge_that_nothing_reaches_is_grey(explorers):
    from selfsupnas.viz.widgets import SIGNS
    buttons = explorer_of(explorers, 2).locator("button")
    grey = sum(button.is_disabled() for button in buttons.all())
    assert buttons.count() == 29 and grey < 29 and buttons.first.inner_text() == SIGNS["keep"]
    for button in buttons.all()[:2]: # close all that leaves the first cell
        if "mod-active" in button.get_attribute("class"): reaction(explorers, 2, button.click)
    assert sum(button.is_disabled() for button in buttons.all()) > grey

def test_a_picture_that_was_redrawn_has_its_own_size(explorers):
    from selfsupnas.viz.widgets import DPI
    first = explorers.locator(".jp-OutputArea-output", has=explorers.locator(".widget-image")).first
    picture, width = first.locator(".widget-image"), first.locator("[role=slider]").nth(1)
    before = assert_own_size(picture)["width"]
    picture_changes(explorers, picture, lambda: width.press("ArrowRight"), "wider")
    assert assert_own_size(picture)["width"] == before + DPI, "an inch more"
    picture_changes(explorers, picture, lambda: width.press("End"), "widest")
    found = assert_own_size(picture)
    assert found["width"] == pytest.approx(found["cell"], abs=1) and found["own"] > found["cell"]

def test_a_saved_notebook_shows_the_last_picture_of_each_explorer(explorers, jupyter, browser):
    "First on a page that was reloaded, where the kernel answers; then without it."
    from selfsupnas.data.datasets import load_dataset
    assert not any(still.is_visible() for still in explorers.locator(STILLS).all()), "as the explorer shows the same"
    last = colours(explorers.locator(IMAGES).nth(1))
    outputs = [cell["outputs"] for cell in saved(explorers, jupyter, "05_widgets.ipynb") if cell.get("outputs")]
    assert sum("image/png" in output.get("data", {}) for each in outputs for output in each) >= 6
    explorers.reload()
    ready(explorers, "Widgets")
    explorers.locator(".selfsupnas-explorer").nth(5).wait_for()
    reaction(explorers, 5, lambda: press(explorers, 5, "ArrowLeft"))
    assert not any(still.is_visible() for still in explorers.locator(STILLS).all())
    again = reopened(browser, jupyter, "05_widgets.ipynb", "Widgets")
    errors = again.locator(".jp-OutputArea-output.jupyter-widgets", has_text="model not found")
    wait_until(lambda: errors.count() == 6)
    assert not any(error.is_visible() for error in errors.all())
    stills = again.locator(STILLS)
    assert stills.count() == 6
    for k in range(6):
        assert stills.nth(k).is_visible()
        assert_own_size(stills.nth(k))
        shot(stills.nth(k), f"reopened-{k}")
    assert colours(stills.nth(1)) == last, "the state in which it was saved"
    for k in (2, 3):
        drawn, spec = colours(stills.nth(k)), load_dataset("streetscenes", "val", size=(64, 80)).spec
        assert all(drawn.get(spec.palette[spec.classes.index(name)], 0) > 100 for name in ("road", "building", "sky"))
    again.close()

def test_a_saved_notebook_holds_no_bar(jupyter, browser):
    page = opened(browser, f"{jupyter}/lab/workspaces/bars/tree/bars.ipynb", "A live run")
    run_all(page, wait=False)
    page.locator(".jp-OutputArea .widget-hprogress").first.wait_for()
    shot(page.locator(".jp-Notebook").first, "bar")
    page.wait_for_function(f"() => !{RUNNING}")
    assert page.locator(".jp-OutputArea .widget-hprogress").count() == 0, "gone when it is done"
    assert_no_bars(saved(page, jupyter, "bars.ipynb"))
    page.close()
    again = reopened(browser, jupyter, "bars.ipynb", "A live run")
    text = again.locator(".jp-OutputArea").first.inner_text()
    assert text.split() == ["the", "end"], text
    shot(again.locator(".jp-Notebook").first, "bars-reopened")
    again.close()

BEGUN, WRITTEN, ENDED = "before the first checkpoint", "between two", "after the last"
# the moment and the stop: clicks on the button, or a signal for the kernel
STOPS = [(moment, stop) for moment in (BEGUN, WRITTEN, ENDED) for stop in (1, 2, signal.SIGTERM, signal.SIGKILL)
         if "SELFSUPNAS_STOPS" in os.environ or stop == 2 or (moment, stop) == (WRITTEN, signal.SIGKILL)]

def live_name(stop): return f"stopped-{stop[0].replace(' ', '-')}-{stop[1]:d}"

def stop_kernel(lab, page, name, stop):
    "Clicks as an impatient hand makes them, or a signal for the kernel that works in that folder."
    if stop < 9 and stop != signal.SIGTERM:
        button = page.locator("[data-command='notebook:interrupt-kernel'], [title^='Interrupt the kernel']").first
        for _ in range(stop): button.click(delay=30)
        return
    kernels = [child for child in psutil.Process(lab[2].pid).children(recursive=True) if any("ipykernel" in word for word in child.cmdline())]
    own = [kernel for kernel in kernels if any(name in file.path for file in kernel.open_files())] # the lock of its run
    own[0].send_signal(stop)

def said_by(page): return page.locator(".jp-OutputArea").first.inner_text()

def test_a_live_search_can_be_watched_stopped_and_taken_up_again(jupyter, browser):
    page = opened(browser, f"{jupyter}/lab/workspaces/live/tree/live.ipynb", "A live run")
    run_all(page, wait=False)
    picture = page.locator(".jp-OutputArea .jp-RenderedImage img").first
    picture.wait_for()
    picture_changes(page, picture, lambda: None, "live")
    page.locator("[data-command='notebook:interrupt-kernel'], [title^='Interrupt the kernel']").first.click()
    page.wait_for_function(f"() => !{RUNNING}")
    said = said_by(page)
    assert "stopped; run it again to resume at step" in said and "Traceback" not in said and "the end" not in said.splitlines()
    shot(page.locator(".jp-Notebook").first, "interrupted")
    run_all(page)
    said = said_by(page)
    assert "resumes at step" in said and "the end" in said.splitlines()
    shot(page.locator(".jp-Notebook").first, "gone-on")
    run_all(page)
    assert "nothing is computed" in said_by(page), "the same cell once more"
    shot(page.locator(".jp-Notebook").first, "read")
    assert_no_bars(saved(page, jupyter, "live.ipynb"))
    page.close()

@pytest.mark.parametrize("moment, stop", STOPS)
def test_a_stop_in_the_browser_loses_nothing(lab, browser, moment, stop, request):
    """Whatever is pressed, or kills the kernel: the same cell goes on from the newest checkpoint, to the end of the run that
    nobody disturbed."""
    name, place = live_name((moment, stop)), lab[1]
    page, folder = opened(browser, f"{lab[0]}/lab/workspaces/{name}/tree/{name}.ipynb", "A live run"), place/name
    run_all(page, wait=False)
    steps = {BEGUN: lambda: (folder/"split"/"split.json").exists(), WRITTEN: lambda: (folder/"checkpoint-000020.pt").exists(),
             ENDED: lambda: (folder/"checkpoint-000120.pt").exists()}
    wait_until(steps[moment])
    stop_kernel(lab, page, name, stop)
    page.wait_for_function(f"() => !{RUNNING}")
    said, left = said_by(page), max((int(path.stem[-6:]) for path in folder.glob("checkpoint-*.pt")), default=0)
    shot(page.locator(".jp-Notebook").first, name)
    if stop in (1, 2) and not (folder/"search-record.json").exists(): assert "stopped" in said and "Traceback" not in said, said
    if (dialog := page.locator(".jp-Dialog button.jp-mod-accept")).count(): dialog.first.click() # the kernel has restarted
    ready(page, "A live run")
    run_all(page)
    said = said_by(page)
    assert "the end" in said.splitlines() and (not left or f"resumes at step {left} " in said or "nothing is computed" in said), said
    same_run(folder, place/"live")
    page.close()
    end_kernel(lab[0], f"{name}.ipynb")
