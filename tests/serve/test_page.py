"""The chat page: its files, and in a browser a message that is answered while one looks on."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import fake
import pytest
from werkzeug.serving import make_server

from llmc.prompt import chat_ids
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.routes.page import FILES
from llmc.serve.service import Service
from llmc.tokenizer import Tokenizer

MakeEngine = Callable[..., Engine]


class Named(HTMLParser):
    """Collects what a page refers to, and its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links |= {str(found[key]) for key in ("src", "href") if key in found}
        self.ids += [str(found["id"])] if "id" in found else []


def test_the_page_and_all_it_needs_are_served_to_anybody(make_engine: MakeEngine) -> None:
    client = create_app(Service(make_engine(), "toy", 1, api_keys=("secret",))).test_client()
    for path, (_, kind) in FILES.items():
        response = client.get(path)
        assert (response.status_code, response.mimetype) == (200, kind)
        assert "'self'" in response.headers["Content-Security-Policy"]
    page = Named()
    page.feed(client.get("/").get_data(as_text=True))
    assert page.links == set(FILES) - {"/"}
    assert len(set(page.ids)) == len(page.ids) >= 10
    script = client.get("/web/chat.js").get_data(as_text=True)
    used = set(re.findall(r'\$\("(\w+)"\)', script))
    assert len(used) >= 8
    assert used <= set(page.ids)
    for text in (script, client.get("/").get_data(as_text=True), client.get("/web/chat.css").get_data(as_text=True)):
        assert "http" not in re.sub(r"https?-equiv", "", text), "something from elsewhere"
    assert client.get("/web/../app.py").status_code == client.get("/web/page.py").status_code == 401
    assert client.get("/v1/models").status_code == 401


class Browser:
    """As much of the WebDriver protocol (W3C) as is needed."""

    def __init__(self, port: int) -> None:
        self._port = port
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        wanted = {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}}}
        self._session = self._ask("POST", "/session", {"capabilities": wanted})["sessionId"]

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            found = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        assert not (isinstance(found, dict) and "error" in found), found
        return found

    def open(self, url: str) -> None:
        self._ask("POST", f"/session/{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        return self._ask("POST", f"/session/{self._session}/execute/sync", {"script": script, "args": []})

    def wait_for(self, script: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.run(f"return {script}"):
            assert time.monotonic() < end, f"{script}; the page has {self.run('return document.body.innerText')!r}"
            time.sleep(0.02)

    def write(self, element: str, text: str) -> None:
        found = self._ask("POST", f"/session/{self._session}/element", {"using": "css selector", "value": element})
        (number,) = found.values()
        self._ask("POST", f"/session/{self._session}/element/{number}/value", {"text": text})

    def close(self) -> None:
        self._ask("DELETE", f"/session/{self._session}")


@pytest.fixture
def browser() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = next(
            int(found[1]) for line in process.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        browser = Browser(port)
        yield browser
        browser.close()
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


@pytest.mark.slow
def test_a_browser_sends_a_message_and_shows_the_answer(
    browser: Browser, make_engine: MakeEngine, tokenizer: Tokenizer
) -> None:
    engine = make_engine(fake.FakeRunner(max_length=4000, delay=0.02))
    server = make_server("127.0.0.1", 0, create_app(Service(engine, "toy", 1)), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        browser.wait_for("document.getElementById('model').textContent === 'toy'")
        browser.run("$('temperature').value = 0; $('max_tokens').value = 40")
        browser.write("#message", "hello\ue007")
        browser.wait_for("document.querySelector('.assistant')?.textContent.length > 5")
        assert browser.run("return !$('stop').hidden && $('send').hidden")
        browser.wait_for("!document.getElementById('send').hidden")
        wanted = tokenizer.decode(fake.greedy(chat_ids(tokenizer, [{"role": "user", "content": "hello"}]), 40))
        shown = browser.run("return [...document.querySelectorAll('.turn')].map(each => each.textContent)")
        assert shown == ["hello", wanted]
        assert re.fullmatch(r"[\d.]+ tokens/s", browser.run("return $('speed').textContent"))
        # The stop button ends the request, and the page goes on.
        browser.run("$('max_tokens').value = 3000")
        browser.write("#message", "more\ue007")
        browser.wait_for("document.querySelectorAll('.assistant')[1]?.textContent.length > 5")
        browser.run("document.getElementById('stop').click()")
        browser.wait_for("!document.getElementById('send').hidden")
        end = time.monotonic() + 5
        while engine.num_running and time.monotonic() < end:
            time.sleep(0.02)
        assert engine.stats.finished["abort"] == 1
        # An error is shown, not lost.
        browser.run("$('temperature').value = 9")
        browser.write("#message", "again\ue007")
        browser.wait_for("document.querySelector('.error')?.textContent.includes('temperature')")
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
