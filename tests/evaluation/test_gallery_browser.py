"""The gallery in a real browser, from file://: no script of a prediction runs, and filter, order, keys and overlays work.

Needs selenium, Chromium and chromedriver (Debian: `apt-get install chromium chromium-driver`; other places: the environment
variables CHROMIUM and CHROMEDRIVER).
"""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from granulon_hf.evaluation import gallery as work
from tests.evaluation.test_gallery import write_run

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
CHROMEDRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
if not (CHROMIUM and CHROMEDRIVER):
    pytest.skip("needs Chromium and chromedriver (CHROMIUM, CHROMEDRIVER)", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

pytestmark = pytest.mark.slow

# A policy would stop these as well: they set the title, so that a hit is seen whoever lets it through.
EVIL = (
    "</p></article></script><script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\">"
    "<svg onload=\"document.title='hit'\"></svg><a href=\"javascript:document.title='hit'\">x</a>\u2028'\">"
    "<style>*{display:none}</style>"
)
FIRST = {"cup": "a red cup", "evil": EVIL, "dog": "a dog", "half": "a red thing"}
SECOND = {"cup": "a red cup", "evil": "a red cup", "dog": "a cat", "half": "a red cup"}


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # No sandbox: containers, where tests often run as root, have none. The pages are ours.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, tmp_path):
    """The open page of four samples by two models, with overlays of one colour."""
    a = write_run(tmp_path / "a", FIRST, model="org/first", task=lambda i: ("vqa", "caption")[i % 2])
    levels = lambda i: ("fine", "coarse", "coarse", "coarse")[i]  # noqa: E731
    b = write_run(
        tmp_path / "b", SECOND, model="org/" + "long" * 20, task=lambda i: ("vqa", "caption")[i % 2], granularity=levels
    )
    cases = work.join(work.read_runs([a, b]))

    def draw(case, images):
        return [Image.new("RGB", image.size, "red") for image in images], "coarse"

    work.write_gallery(tmp_path / "gallery.html", cases, order="data", draw=draw, overlay_model="first", mark_unsupported=True)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get((tmp_path / "gallery.html").as_uri())
    yield browser
    assert browser.title == "Case studies", "a script of a prediction ran"
    assert browser.get_log("browser") == []


def shown(browser):
    """Ids on the page, in the order in which they are seen."""
    cards = [card for card in browser.find_elements(By.TAG_NAME, "article") if card.is_displayed()]
    assert browser.find_element(By.ID, "shown").text == str(len(cards))
    return [card.find_element(By.CLASS_NAME, "id").text for card in cards]


def choose(browser, name, text):
    Select(browser.find_element(By.ID, name)).select_by_visible_text(text)


def press(browser, *keys):
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def here(browser):
    card = browser.execute_script("return document.activeElement.closest('article')")
    return card and card.find_element(By.CLASS_NAME, "id").text


def visible(browser, kind):
    return [image.is_displayed() for image in browser.find_elements(By.CSS_SELECTOR, f"img.{kind}")]


def test_what_a_model_says_is_shown_and_does_nothing(page):
    answer = page.find_elements(By.CSS_SELECTOR, "article .answer .said")[2]
    assert answer.get_property("textContent") == EVIL
    assert len(page.find_elements(By.TAG_NAME, "script")) == 1
    assert len(page.find_elements(By.TAG_NAME, "style")) == 1
    assert len(page.find_elements(By.TAG_NAME, "article")) == 4


def test_the_policy_stops_what_would_slip_through(page):
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'document.title = \"hit\"'; document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"https://example.org/x.png\" onerror=\"document.title=1\">');"
    )
    log = page.get_log("browser")  # and leaves an empty one
    assert len(log) >= 2
    assert all("Content Security Policy" in entry["message"] for entry in log)


def test_filters(page):
    assert shown(page) == ["cup", "evil", "dog", "half"]
    find = page.find_element(By.ID, "find")
    find.send_keys("CAT")
    assert shown(page) == ["dog"]
    find.clear()
    find.send_keys("no such words")
    assert shown(page) == []
    assert page.find_element(By.CLASS_NAME, "none").is_displayed()
    find.send_keys(Keys.CONTROL, "a")
    find.send_keys(Keys.BACKSPACE)
    choose(page, "task", "caption")
    assert shown(page) == ["evil", "half"]
    choose(page, "task", "any")
    choose(page, "level", "fine")
    assert shown(page) == ["cup"]
    choose(page, "level", "any")
    choose(page, "outcome", "some right, some wrong")
    assert shown(page) == ["evil"]
    choose(page, "outcome", "all wrong")
    assert shown(page) == ["dog"]
    choose(page, "outcome", "first: right")
    assert shown(page) == ["cup", "half"]
    page.find_element(By.ID, "differ").click()
    assert shown(page) == ["half"]
    choose(page, "outcome", "any")
    assert shown(page) == ["evil", "dog", "half"]


def test_orders(page):
    choose(page, "order", work.ORDERS["recall"])
    assert shown(page) == ["dog", "evil", "half", "cup"]
    choose(page, "order", work.ORDERS["difference"])
    assert shown(page) == ["evil", "half", "cup", "dog"]
    choose(page, "order", work.ORDERS["data"])
    assert shown(page) == ["cup", "evil", "dog", "half"]
    assert page.find_elements(By.CSS_SELECTOR, "option[value=judge]") == []


def test_keys(page):
    assert here(page) is None
    press(page, "j")
    assert here(page) == "cup"
    press(page, "j", Keys.ARROW_RIGHT)
    assert here(page) == "dog"
    top = page.execute_script("return document.activeElement.getBoundingClientRect().top")
    nav = page.execute_script("return document.querySelector('nav').getBoundingClientRect().bottom")
    assert top >= nav - 1, "the bar covers the sample"
    press(page, "k", Keys.ARROW_LEFT, "k")
    assert here(page) == "cup"
    press(page, "f")
    assert page.switch_to.active_element.get_attribute("id") == "find"
    press(page, "jo?")
    assert page.find_element(By.ID, "find").get_property("value") == "jo?"
    assert not any(visible(page, "overlay"))
    press(page, Keys.CONTROL + "a" + Keys.NULL, Keys.BACKSPACE, Keys.ESCAPE)
    choose(page, "task", "caption")
    page.execute_script("document.activeElement.blur()")
    press(page, "j")
    assert here(page) == "evil", "what is filtered out is skipped"
    press(page, "?")
    assert page.find_element(By.ID, "help").is_displayed()
    press(page, Keys.ESCAPE)
    assert not page.find_element(By.ID, "help").is_displayed()
    page.find_element(By.ID, "ask").click()
    page.find_element(By.ID, "close").click()
    assert not page.find_element(By.ID, "help").is_displayed()


def test_overlays(page):
    assert (visible(page, "photo"), visible(page, "overlay")) == ([True] * 4, [False] * 4)
    buttons = page.find_elements(By.CSS_SELECTOR, "figcaption button")
    buttons[1].click()
    assert visible(page, "overlay") == [False, True, False, False]
    assert visible(page, "photo") == [True, False, True, True]
    assert [button.get_attribute("aria-pressed") for button in buttons] == ["false", "true", "false", "false"]
    page.execute_script("document.activeElement.blur()")
    press(page, "o")
    assert (visible(page, "photo"), visible(page, "overlay")) == ([False] * 4, [True] * 4)
    press(page, "o")
    assert (visible(page, "photo"), visible(page, "overlay")) == ([True] * 4, [False] * 4)


def test_names_and_labels(page):
    assert all(image.get_attribute("alt") for image in page.find_elements(By.TAG_NAME, "img"))
    for control in page.find_elements(By.CSS_SELECTOR, "input, select, button"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("outerHTML")
    press(page, Keys.TAB)
    assert page.switch_to.active_element.value_of_css_property("outline-style") == "solid"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_sideways_scrolling_and_a_screenshot(page, tmp_path, width, scheme):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert page.execute_script("return innerWidth") == width
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    for part in page.find_elements(By.CSS_SELECTOR, "article, .answer, nav select, nav input"):
        box = part.rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 1, part.get_attribute("outerHTML")[:200]
    target = tmp_path / "gallery.png"
    assert page.save_screenshot(str(target))
    brightness = np.asarray(Image.open(target).convert("L"))
    assert brightness.shape[1] == width
    assert brightness.std() > 5
    assert (np.median(brightness) > 128) == (scheme == "light")
