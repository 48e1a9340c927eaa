"""The dashboard in a real browser: it loads, it is live, and it is usable by keyboard."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from benchmarks._dashboard import Synthetic
from kvmem.dashboard.app import Dashboard
from tests.browser.chromium import Chromium, find

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "build" / "pictures"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if find() is None:
        if os.environ.get("KVMEM_REQUIRE_BROWSER"):
            pytest.fail("no Chromium is installed")
        pytest.skip("no Chromium is installed (Debian: chromium)")
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def source() -> Synthetic:
    return Synthetic(500, 20_000)


@pytest.fixture(scope="module")
def dashboard(source: Synthetic) -> Dashboard:
    return Dashboard(lambda: [source])


@pytest.fixture(scope="module")
def url(dashboard: Dashboard) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        dashboard, log_level="warning", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


def text(selector: str) -> str:
    return f"document.querySelector('{selector}').textContent"


def test_the_page_is_live_and_says_nothing_on_its_console(
    browser: Chromium, url: str, source: Synthetic, dashboard: Dashboard
) -> None:
    browser.open(url)
    assert "made/up" in browser.until(f"/made.up/.test({text('#what')}) && {text('#what')}")
    browser.until("document.querySelectorAll('#tree [role=treeitem]').length > 5")
    browser.until(f"/clock out of the system prompt/.test({text('#causes')})")
    # The far store has its share of the hits, and its flows; how full it is nobody knows.
    assert "in the far store" in browser.run(text("#sums"))
    assert browser.run("document.querySelectorAll('#lanes rect.far').length") > 0
    assert "what it holds is not known" in browser.run(text("#tiers"))
    assert browser.run("document.querySelectorAll('#tiers .meter').length") == 2
    before = browser.run(text("#sums"))
    source.work(50)
    browser.until(f"{text('#sums')} !== {before!r}")
    for dark in (False, True):
        for name, width in (("wide", 1400), ("narrow", 420)):
            browser.appear(width=width, height=900, dark=dark)
            browser.picture(PICTURES / f"dashboard-{name}-{'dark' if dark else 'light'}.png")
            assert browser.run("document.documentElement.scrollWidth <= innerWidth + 1")
    assert browser.troubles == []
    assert browser.requested
    assert all(one.startswith(url) for one in browser.requested)
    assert dashboard.n_streams == 1
    browser.call("Page.navigate", url="about:blank")
    end_s = time.monotonic() + 30
    while dashboard.n_streams:  # its page is gone, so nobody is told any more
        assert time.monotonic() < end_s
        browser.run("new Promise((done) => setTimeout(done, 50))")


def test_search_and_the_way_into_the_tree_and_back(browser: Chromium, url: str) -> None:
    browser.appear(width=1400, height=900, dark=False, still=True)
    browser.open(url)
    browser.until("document.querySelectorAll('#tree [role=treeitem]').length > 5")
    browser.run(
        "(document.getElementById('query').value = 'agent-77',"
        " document.getElementById('search').requestSubmit())"
    )
    browser.until(f"!document.getElementById('found').hidden && /agent-77/.test({text('#found')})")
    browser.run("document.querySelector('#tree [role=treeitem][tabindex=\"0\"]').focus()")
    browser.key("ArrowDown")
    at = browser.run("document.activeElement.getAttribute('aria-label')")
    assert at
    browser.key("Enter")
    browser.until("document.querySelectorAll('#trail button, #trail a').length > 0")
    browser.key("Backspace")
    browser.run("document.getElementById('tree-as-table').click()")
    browser.until("document.querySelectorAll('#tree-table tbody tr').length > 3")
    assert browser.troubles == []
