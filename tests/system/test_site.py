"""The documentation in a browser, on a desktop and on a phone: no errors, and nothing is cut off or too wide.

Needs the extra `docs` and Chromium with its driver; skipped otherwise.
"""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra `docs`")
pytest.importorskip("mkdocs", reason="needs the extra `docs`")
ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
WIDTHS = {"desktop": 1280, "phone": 390}
OFFLINE = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"

pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(500),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and chromedriver"),
    pytest.mark.filterwarnings("default"),  # Selenium warns
]

WIDER = """
const room = document.documentElement.clientWidth;
const wide = [...document.querySelectorAll("article table")].filter((table) =>
  table.getBoundingClientRect().right > room + 1 || table.scrollWidth > table.parentElement.clientWidth + 1);
const cut = [...document.querySelectorAll(".doc-signature pre, .doc-signature code")].filter((code) =>
  code.scrollWidth > code.clientWidth + 1);
const printed = [...document.querySelectorAll("article .language-text pre > code")].filter((code) =>
  code.scrollWidth > code.clientWidth + 1);
return {
  page: document.documentElement.scrollWidth - room,
  tables: wide.concat(printed).map((table) => table.innerText.slice(0, 60)),
  signatures: room > 1000 ? cut.map((code) => code.innerText.slice(0, 60)) : [],
};
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The URL of the built site, and the paths of all pages."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env=dict(os.environ, NO_MKDOCS_2_WARNING="1"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages = sorted(path.parent.relative_to(folder).as_posix() + "/" for path in folder.rglob("index.html"))
    yield f"http://127.0.0.1:{server.server_port}/", pages
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", *OFFLINE.split()):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def resize(browser, device):
    metrics = {"width": WIDTHS[device], "height": 900, "deviceScaleFactor": 1, "mobile": device == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def look(browser, address):
    """Return the problems of a page: errors in the console, and elements that are wider than the page."""
    browser.get(address)
    wide = browser.execute_script(WIDER)
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return errors + wide["tables"] + wide["signatures"] + ["page"] * (wide["page"] > 0)


@pytest.mark.parametrize("device", WIDTHS)
def test_every_page_loads_and_fits(site, browser, device):
    address, pages = site
    resize(browser, device)
    found = {}
    for page in pages:
        # on a busy machine, a page may not be completely loaded and laid out the first time
        problems = look(browser, address + page) and look(browser, address + page)
        if problems:
            found[page] = problems
    assert len(pages) > 30
    assert found == {}


@pytest.mark.parametrize("device", WIDTHS)
def test_search_finds_a_page(site, browser, device):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    address, _ = site
    resize(browser, device)
    browser.get(address)
    browser.find_element(
        By.CSS_SELECTOR, "label.md-header__button[for=__search]" if device == "phone" else ".md-search__input"
    ).click()
    box = WebDriverWait(browser, 20).until(lambda at: at.find_element(By.CSS_SELECTOR, ".md-search__input"))
    WebDriverWait(browser, 20).until(lambda _: box.is_displayed())
    box.send_keys("momentum ahead")
    # in one call, since the page replaces the results while the search goes on
    links = "return [...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
    WebDriverWait(browser, 20).until(lambda at: any("methods/" in link for link in at.execute_script(links)))
