"""The tour in a real JupyterLab in a real browser: all cells run, a slider and a button change their pictures. `make test-browser`."""

import contextlib, io, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = Path(os.environ["SELFSUPNAS_SHOTS"]) if "SELFSUPNAS_SHOTS" in os.environ else None # where screenshots go, to be looked at

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no browser: needs chromium on the PATH"),
              pytest.mark.skipif("SELFSUPNAS_BROWSER" not in os.environ, reason="minutes in a browser: `make test-browser`")]

LIVE = """from selfsupnas.search import SearchConfig, search
from selfsupnas.widgets import live_plot

config = SearchConfig(folder="live", size=(64, 80), layers=3, channels=8, steps=120, budget=.75,
                      batch_labelled=4, batch_unlabelled=4, batch_jigsaw=4, logs=24)
found = search(config, watch=live_plot(config))
print("the end")"""

def write_notebook(path, source):
    import nbformat
    cells = [nbformat.v4.new_markdown_cell("# A live run"), nbformat.v4.new_code_cell(source)]
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}} # or JupyterLab asks
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)

@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    "Address of a JupyterLab that serves a copy of the notebooks."
    place = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT/"nbs"/"00_tour.ipynb", place)
    write_notebook(place/"live.ipynb", LIVE)
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
    words = [f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--no-browser", "--allow-root",
             "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", f"--ServerApp.root_dir={place}"]
    with open(place/"lab.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(place/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(place/"workspaces")})
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api")
                break
            assert process.poll() is None, (place/"lab.log").read_text()
            time.sleep(.5)
        yield address
    finally:
        process.terminate()
        process.wait(20)

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
    page.goto(address)
    page.locator("h1", has_text=title).first.wait_for(timeout=60_000)
    page.wait_for_function("() => /Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText ?? '')", timeout=60_000)
    return page

def run_all(page, wait=True):
    page.get_by_role("menuitem", name="Run", exact=True).first.click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(f"() => {RUNNING}", timeout=60_000)
    if wait: page.wait_for_function(f"() => !{RUNNING}", timeout=600_000)

@pytest.fixture(scope="module")
def page(jupyter, browser):
    "The tour, opened, all cells run."
    page = opened(browser, f"{jupyter}/lab/tree/00_tour.ipynb", "A tour")
    run_all(page)
    shot(page.locator(".jp-Notebook").first, "notebook")
    yield page
    page.close()

RUNNING = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(e => e.innerText.includes('*'))"

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
    "Do `act`, wait until the picture is another, compare pixels."
    before, source = shot(picture, f"{name}-before"), picture.get_attribute("src")
    act()
    from playwright.sync_api import expect
    expect(picture).not_to_have_attribute("src", source, timeout=60_000) # asked of the page anew each time: an element may be replaced
    page.wait_for_timeout(300)
    share = changed(before, shot(picture, f"{name}-after"))
    assert share > .01, f"{share:.2%} of the pixels changed"

def test_the_tour_runs_without_an_error(page):
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'] >> text=Traceback").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert page.locator(".widget-image").count() == 2, "two explorers"

def test_a_budget_slider_moves_the_route(page):
    slider = page.locator(".widget-slider .noUi-handle, .widget-hslider [role=slider]").first
    def act():
        slider.scroll_into_view_if_needed()
        slider.click()
        for _ in range(15): page.keyboard.press("ArrowRight")
    picture_changes(page, page.locator(".widget-image").nth(0), act, "budget")

def test_a_click_on_a_path_changes_cost_and_prediction(page):
    opened = page.locator(".widget-toggle-button.mod-active")
    assert opened.count(), "the derived route has open paths"
    picture_changes(page, page.locator(".widget-image").nth(1), lambda: opened.first.click(), "editor")

def test_a_live_search_can_be_watched_stopped_and_taken_up_again(jupyter, browser):
    page = opened(browser, f"{jupyter}/lab/workspaces/live/tree/live.ipynb", "A live run")
    run_all(page, wait=False)
    picture = page.locator(".jp-OutputArea .jp-RenderedImage img").first
    picture.wait_for(timeout=120_000)
    picture_changes(page, picture, lambda: None, "live")
    page.locator("[data-command='notebook:interrupt-kernel'], [title^='Interrupt the kernel']").first.click()
    page.wait_for_function(f"() => !{RUNNING}", timeout=60_000)
    said = page.locator(".jp-OutputArea").first.inner_text()
    assert "stopped after step" in said and "KeyboardInterrupt" in said and "the end" not in said.splitlines()
    shot(page.locator(".jp-Notebook").first, "interrupted")
    run_all(page)
    said = page.locator(".jp-OutputArea").first.inner_text()
    assert "interrupted before, goes on at step" in said and "the end" in said.splitlines()
    shot(page.locator(".jp-Notebook").first, "gone-on")
    page.close()
