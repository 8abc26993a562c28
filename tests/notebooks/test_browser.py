"""The live panels in JupyterLab, in a real browser: a slider is moved, a pixel clicked, and the picture changes."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
TOKEN = "only-for-this-test"
# Playwright's browser, or one of the system.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
ROUNDS = 10
# Generous: on a busy machine JupyterLab alone may take a minute to open a notebook. Nothing here asserts a time.
PATIENCE = 300  # seconds
# JupyterLab renders exceptions as it does stderr.
STDERR = ".jp-Notebook .jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']"
WARNING = "is a smoke run"  # printed where the networks are opened; any other line is an error
ERROR = f"{STDERR}:not(:has-text('{WARNING}'))"
SCREEN = {"width": 1280, "height": 720}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * PATIENCE)]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    own = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=own, args=FLAGS)
        except api.Error as error:
            pytest.skip(
                f"no Chromium here (apt install chromium, or playwright install chromium): {error.message[:80]}"
            )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, smoke_run):
    """JupyterLab over copies of the notebooks that use the smoke run; gives its address."""
    root = tmp_path_factory.mktemp("lab")
    for name in ("affinity", "frequency"):
        notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
        (cell,) = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
        cell["source"] = [*cell["source"], f"\nrun = {str(smoke_run)!r}\nsmoke = True\n"]
        (root / f"{name}.ipynb").write_text(json.dumps(notebook))
    settings = {
        f"JUPYTER{part}": str(root / "settings" / part.lower())
        for part in ("_CONFIG_DIR", "_DATA_DIR", "_RUNTIME_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")
    }
    preferences = {
        "notebook-extension/tracker": {"windowingMode": "none"},  # render cells outside the viewport too
        "apputils-extension/notification": {"fetchNews": "false"},
    }
    for name, values in preferences.items():
        path = Path(settings["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={root}"]
    with (root / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log)
    try:
        yield _address(Path(settings["JUPYTER_RUNTIME_DIR"]), server, root / "lab.log")
    finally:
        server.terminate()
        server.wait(20)


def _address(runtime, server, log):
    """Wait for the server and return its address."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        for path in runtime.glob("jpserver-*.json"):
            address = json.loads(path.read_text())["url"]
            try:
                urllib.request.urlopen(f"{address}api?token={TOKEN}", timeout=5).close()
                return address
            except (urllib.error.URLError, OSError):
                pass
        time.sleep(0.3)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()}")


@pytest.fixture
def opened(browser, lab, request):
    """A notebook in JupyterLab with all cells run."""
    page = browser.new_page(viewport=SCREEN)
    page.set_default_timeout(1000 * PATIENCE)
    try:
        yield page, _run_all(page, lab, request.param)
    finally:
        if keep := os.environ.get("MISA_SCREENSHOTS"):
            page.screenshot(path=Path(keep) / f"{request.param}.png")
        page.close()


def _run_all(page, lab, name):
    """Run a notebook to its end; returns its live picture."""
    page.goto(f"{lab}lab/tree/{name}.ipynb?token={TOKEN}&reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.get_by_text("| Idle").wait_for()  # without a running kernel, Run All would ask for one
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    # An error ends Run All before the panel: say which, now.
    page.wait_for_selector(f".jp-Notebook .widget-image, {ERROR}", state="attached", timeout=1000 * PATIENCE)
    assert page.locator(ERROR).all_inner_texts() == []
    # The solutions come after the panel: when the last one has run, the notebook is done.
    page.wait_for_function(
        "() => !document.querySelector('.jp-Notebook .jp-InputPrompt') || "
        "![...document.querySelectorAll('.jp-Notebook .jp-InputPrompt')].some(p => p.textContent.includes('*'))",
        timeout=1000 * PATIENCE,
    )
    picture = page.locator(".jp-Notebook img.widget-image")
    picture.scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelector('img.widget-image').naturalWidth > 100")
    return picture


def pixels(page):
    """Returns the pixels of the image as decoded by the browser."""
    return page.evaluate(
        """async () => {
            const image = document.querySelector('img.widget-image');
            await image.decode();
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext('2d').drawImage(image, 0, 0);
            return canvas.toDataURL();
        }"""
    )


def changed(page, act):
    """Perform an action and wait for another image; returns the seconds that it took."""
    before, source = pixels(page), page.evaluate("() => document.querySelector('img.widget-image').src")
    start = time.perf_counter()
    act()
    page.wait_for_function("old => document.querySelector('img.widget-image').src !== old", arg=source)
    took = time.perf_counter() - start
    assert pixels(page) != before
    return took


def assert_it_fits(page, picture):
    """Check that controls and image are visible together, and that the image is not scaled."""
    natural = page.evaluate("() => document.querySelector('img.widget-image').naturalWidth")
    assert picture.bounding_box()["width"] == pytest.approx(natural, abs=1)
    panel = picture.locator("xpath=..")
    panel.evaluate("element => element.scrollIntoView({block: 'center'})")
    assert panel.evaluate("element => element.scrollWidth <= element.clientWidth"), "the panel is wider than its cell"
    page.wait_for_timeout(300)
    for place in (picture.bounding_box(), panel.locator(".widget-dropdown").last.bounding_box()):
        assert place["x"] >= 0
        assert place["x"] + place["width"] <= SCREEN["width"]
        assert place["y"] >= 0
        assert place["y"] + place["height"] <= SCREEN["height"]


def press(page, label, key):
    page.locator(".widget-hslider", has_text=label).locator(".noUi-handle").focus()
    page.keyboard.press(key)


def readout(page, label):
    return page.locator(".widget-hslider", has_text=label).locator(".widget-readout").inner_text()


def assert_no_error(page):
    assert page.locator(ERROR).all_inner_texts() == []


def report(what, seconds):
    seconds = sorted(seconds)
    late = seconds[int(0.95 * len(seconds))]
    print(f"{what}: median {1e3 * statistics.median(seconds):.0f} ms, 95th percentile {1e3 * late:.0f} ms")


@pytest.mark.parametrize("opened", ["affinity"], indirect=True)
def test_affinity_a_slider_and_a_click(opened):
    page, picture = opened
    assert_no_error(page)
    assert_it_fits(page, picture)
    report(
        "slider, in the browser", [changed(page, lambda: press(page, "balance", "ArrowRight")) for _ in range(ROUNDS)]
    )
    box = picture.bounding_box()
    scale = box["width"] / page.evaluate("() => document.querySelector('img.widget-image').naturalWidth")
    # The first tile is the image: 88 pixels from (10, 44) on.
    places = [(20 + 7 * i, 60 + 6 * i) for i in range(ROUNDS)]
    clicks = [
        changed(page, lambda x=x, y=y: picture.click(position={"x": x * scale, "y": y * scale})) for x, y in places
    ]
    report("click, in the browser", clicks)
    expected = int((places[-1][1] - 44) / 88 * 32), int((places[-1][0] - 10) / 88 * 32)
    readouts = [int(readout(page, f"seed {name}")) for name in ("row", "column")]
    assert readouts == pytest.approx(expected, abs=1)
    # As in the parameters; the browser rounds to the nearest step of a slider.
    assert [readout(page, name) for name in ("bandwidth of A", "A on the tree", "scale of")] == [
        "0.150",
        "0.400",
        "8.00",
    ]
    assert_no_error(page)


@pytest.mark.parametrize("opened", ["frequency"], indirect=True)
def test_frequency_sliders(opened):
    page, picture = opened
    assert_no_error(page)
    assert_it_fits(page, picture)
    seconds = [changed(page, lambda: press(page, "radius", "ArrowRight")) for _ in range(ROUNDS)]
    report("slider, in the browser", seconds)
    changed(page, lambda: press(page, "channel", "ArrowRight"))
    assert_no_error(page)
