"""The demo's page in a real browser, with a toy model: it answers, shows levels and clusters, and loads nothing from elsewhere.

Needs gradio, selenium, Chromium and chromedriver (see tests/evaluation/test_gallery_browser.py). As a script it asks the
embedded demo model about a photograph and takes the screenshot of the README:

    python -m tests.demo.test_app_browser examples/images/chelsea.jpg "What is in the picture?" examples/images/demo_app.png
"""

import json
import os
import shutil
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
CHROMEDRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
if not (CHROMIUM and CHROMEDRIVER):
    pytest.skip("needs Chromium and chromedriver (CHROMIUM, CHROMEDRIVER)", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
pytest.importorskip("gradio", reason="needs gradio")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from granulon_hf.demo import app as work  # noqa: E402
from tests.conftest import make_picture  # noqa: E402
from tests.demo import test_app  # noqa: E402

QUESTION, TOKENS = "What is in the picture?", 6
talkative = test_app.talkative  # a fixture
EVIL = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script>"


@contextmanager
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # No sandbox: containers, where tests often run as root, have none. The pages are ours. No calls home of its own.
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,1000"),
        *("--disable-background-networking", "--no-proxy-server"),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def served(model, processor, name, compact=False):
    """Address of the page."""
    app = work.create_app(model, processor, name, compact)
    _, address, _ = work.launch(app, host="127.0.0.1", quiet=True, prevent_thread_lock=True)
    try:
        yield address
    finally:
        app.close()


class Page:
    """The page as a visitor uses it."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.wait(lambda: self.find("#ask").is_displayed())

    def wait(self, condition, seconds=60):
        return WebDriverWait(self.browser, seconds, ignored_exceptions=[Exception]).until(lambda _: condition())

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def upload(self, path):
        self.find("#picture input[type=file]").send_keys(str(path))
        self.wait(lambda: self.find("#picture img").get_property("naturalWidth") > 0)

    def type(self, text):
        box = self.find("#question textarea")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text)

    def text(self, name):
        return self.find(f"#{name} textarea").get_property("value")

    def force(self, position):
        """Move the slider with the keyboard."""
        slider = self.find("#granularity input[type=range]")
        slider.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * position)
        self.wait(lambda: slider.get_property("value") == str(position))

    def ask(self, expected):
        """Press the button, and wait for the whole answer, with this in its numbers."""
        self.find("#ask").click()
        self.wait(lambda: expected in self.text("numbers") and f"tokens of the answer: {TOKENS}," in self.text("numbers"))

    def bars(self):
        return [row.text.split("\n") for row in self.all("#levels .confidence-set")]

    def clusters(self):
        """Bytes of the overlay as the browser has it."""
        self.wait(lambda: self.find("#clusters img").get_property("naturalWidth") > 0)
        script = (
            "const done = arguments[0]; fetch(document.querySelector('#clusters img').src).then(r => r.arrayBuffer())"
            ".then(b => done([...new Uint8Array(b)]))"
        )
        return bytes(self.browser.execute_async_script(script))

    def alert(self):
        """The sentence of the toast, which is then closed."""
        toast = "[data-testid=toast-text]"
        text = self.wait(lambda: self.find(toast).text)
        self.find("[data-testid=toast-close]").click()
        self.wait(lambda: not self.all(toast))
        return text


def requests(browser):
    """What the page asked for, since the log was last read."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls += [event["params"]["url"] for event in events if event["method"] == "Network.webSocketCreated"]
    return [url for url in urls if not url.startswith(("data:", "blob:", "about:"))]


def answering():
    return any(thread.name == work.WORKER for thread in threading.enumerate())


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture
def visit(browser, talkative, monkeypatch):
    """Opens the page of a toy variant; afterwards nothing has gone wrong in it, and nothing came from elsewhere."""
    monkeypatch.setattr(work.Answerer.__init__, "__defaults__", (TOKENS,))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    with ExitStack() as stack:

        def visit(variant="granulon-qwen2.5"):
            address = stack.enter_context(served(*talkative(variant), "toy <script>document.title='hit'</script>"))
            browser.get("about:blank")
            browser.get_log("performance"), browser.get_log("browser")
            return Page(browser, address)

        yield visit
        assert browser.title == "Granulon", "a script ran"
        assert {urlsplit(url).hostname for url in requests(browser)} == {"127.0.0.1"}
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.fixture
def photo(tmp_path):
    make_picture(0).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_visit(visit, photo):
    page = visit()
    page.upload(photo)
    page.type(QUESTION)
    page.ask("level: fine (chosen by the question)")
    page.wait(lambda: page.text("answer"))  # boxes of one update are not drawn at one moment
    answer, chosen = page.text("answer"), page.clusters()
    assert "visual tokens: 36 pixel + 20 semantic" in page.text("numbers")
    bars = page.bars()
    assert sorted(name for name, _ in bars) == ["coarse", "fine (used)", "middle"]
    assert 98 <= sum(int(share.removesuffix("%")) for _, share in bars) <= 102

    page.force(2)
    page.ask("level: middle (forced; the question asks for fine)")
    assert "visual tokens: 36 pixel + 9 semantic" in page.text("numbers")
    assert sorted(name for name, _ in page.bars()) == ["coarse", "fine", "middle (used)"]
    page.wait(lambda: page.clusters() != chosen)
    assert page.find("#clusters img").get_attribute("alt").startswith("9 clusters of the level middle")

    page.force(0)
    page.ask("level: fine (chosen by the question)")
    page.wait(lambda: page.text("answer") == answer)
    page.wait(lambda: page.clusters() == chosen)


def test_a_sentence_for_what_is_missing_or_broken(visit, photo):
    page = visit()
    page.find("#ask").click()
    assert page.alert() == "Give a picture first."
    photo.write_bytes(photo.read_bytes()[:200])
    page.find("#picture input[type=file]").send_keys(str(photo))
    page.wait(lambda: page.all("#picture img"))
    page.type(QUESTION + Keys.ENTER)
    assert page.alert().startswith("This picture cannot be used: ")


def test_stop(visit, photo, monkeypatch):
    def put(streamer, value, put=work.TimedStreamer.put):
        time.sleep(0.3)
        put(streamer, value)

    monkeypatch.setattr(work.Answerer.__init__, "__defaults__", (200,))  # a minute
    monkeypatch.setattr(work.TimedStreamer, "put", put)
    page = visit()
    page.upload(photo)
    page.type(QUESTION)
    page.find("#ask").click()
    page.wait(lambda: "tokens of the answer: 3" in page.text("numbers"))
    page.find("#stop").click()
    page.wait(lambda: not answering(), seconds=10)
    assert 3 <= int(page.text("numbers").split("answer: ")[1].split(",")[0]) < 50
    monkeypatch.undo()
    page.find("#ask").click()
    page.wait(lambda: "tokens of the answer: 200" in page.text("numbers"))


def test_what_a_model_says_is_text(visit, photo, monkeypatch):
    page = visit()
    page.upload(photo)
    page.type(QUESTION)
    monkeypatch.setattr(work.Answerer, "answer", lambda self, *arguments: iter([work.Progress(text=EVIL)]))
    page.find("#ask").click()
    page.wait(lambda: page.text("answer") == EVIL)

    def fail(self, *arguments):
        raise RuntimeError(EVIL)
        yield

    monkeypatch.setattr(work.Answerer, "answer", fail)
    page.find("#ask").click()
    assert page.alert() == f"The model failed (RuntimeError: {EVIL})."


def test_a_model_without_levels(visit, photo):
    page = visit("clip-llama3.2")
    assert "no granularity levels" in page.find("body").text
    assert not any(element.is_displayed() for element in page.all("#granularity, #levels, #clusters"))
    page.upload(photo)
    page.type(QUESTION)
    page.ask("visual tokens: 36\n")
    assert page.text("answer")


@pytest.mark.parametrize("width", [360, 1280])
def test_no_sideways_scrolling_and_names_for_all_controls(visit, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page = visit()
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.wait(lambda: page.browser.execute_script("return innerWidth") == width)
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    for part in page.all("#picture, #question, #granularity, #ask, #stop, #answer, #levels, #clusters, #numbers"):
        assert part.rect["x"] >= 0
        assert part.rect["x"] + part.rect["width"] <= width + 1, part.get_attribute("id")
    for control in page.all("#question textarea, #granularity input, #ask, #stop, #answer textarea, #numbers textarea"):
        assert control.accessible_name, control.get_attribute("outerHTML")


def test_an_example_fills_the_form(visit):
    page = visit()
    page.all(".gallery-item, table tbody tr")[0].click()
    page.wait(lambda: page.text("question") == QUESTION)
    page.wait(lambda: page.find("#picture img").get_property("naturalWidth") > 0)


def screenshot(photo: str, question: str, out: str, size: tuple[int, int] = (1080, 955)) -> None:
    """The page with the embedded demo model's answer, as it is."""
    from PIL import Image

    model, processor, _ = work.load_model(str(work.demo_folder()), "cpu")
    with served(model, processor, "granulon-demo", compact=True) as address, chromium() as browser:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
        page = Page(browser, address)
        page.upload(Path(photo).resolve())
        page.type(question)
        page.find("#ask").click()
        page.wait(lambda: page.clusters() and not answering() and "at 32 visual tokens" in page.text("numbers"))
        time.sleep(1)  # bars grow
        browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
        browser.save_screenshot(out)
        image = Image.open(out).convert("RGB")
        image.quantize(palette=image.quantize(256), dither=Image.Dither.FLOYDSTEINBERG).save(out, optimize=True)
        print(page.text("answer"), page.text("numbers"), sep="\n")


if __name__ == "__main__":
    screenshot(*sys.argv[1:])
