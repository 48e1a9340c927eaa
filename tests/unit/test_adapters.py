"""What adapters have in common: names, gaps, histories that were edited, hints to the engine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from kvmem.agents.adapters import Conversations, EngineAnnouncer
from kvmem.agents.adapters.gaps import MOST
from kvmem.agents.announcing import Hint


class Heard:
    def __init__(self) -> None:
        self.hints: list[Hint] = []

    def announce(self, hint: Hint) -> None:
        self.hints.append(hint)


def test_a_tool_that_raises_has_ended() -> None:
    heard = Heard()
    mine = Conversations(heard).of("a")
    mine.heard(321)
    with pytest.raises(ZeroDivisionError), mine.gap("ls"):
        raise ZeroDivisionError
    mine.end()
    told = [(hint.what, hint.session_id, hint.tool, hint.n_tokens) for hint in heard.hints]
    assert told == [
        ("tool_start", "a", "ls", 321), ("tool_end", "a", "ls", 321), ("session_end", "a", "", 321),
    ]  # fmt: skip


def test_how_long_a_tool_takes_is_learned_over_all_conversations() -> None:
    heard = Heard()
    all_of_them = Conversations(heard)
    for name in ("a", "b"):
        with all_of_them.of(name).gap("ls"):
            pass
    first, second = (hint.expected_s for hint in heard.hints if hint.what == "tool_start")
    assert first is None
    assert second is not None
    assert second >= 0


def test_an_end_is_announced_once() -> None:
    heard = Heard()
    ended = Conversations(heard).of("a").started("ls")
    ended()
    ended()
    assert [hint.what for hint in heard.hints] == ["tool_start", "tool_end"]


def test_a_listener_that_raises_costs_no_tool(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def announce(self, hint: Hint) -> None:
            raise ValueError

    with Conversations(Broken()).of("a").gap("ls"):
        pass
    assert "was lost" in caplog.text


@pytest.mark.parametrize(
    ("later", "at"),
    [
        ([["user", "a"], ["assistant", "b"], ["tool", "c"]], None),
        ([["user", "a"], ["assistant", "b"]], None),
        ([["user", "A"], ["assistant", "b"], ["tool", "c"]], 0),
        ([["user", "a"], ["tool", "c"]], 1),
        ([["user", "a"]], 1),
    ],
)
def test_an_edited_history_is_said(
    later: list[Any], at: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    mine = Conversations().of("a")
    assert mine.sends([["user", "a"], ["assistant", "b"]]) is None
    with caplog.at_level(logging.WARNING, "kvmem.agents"):
        assert mine.sends(later) == at
    assert ("was edited" in caplog.text) == (at is not None)


def test_prefixes_keep_ids_of_two_frameworks_apart() -> None:
    names = [Conversations(prefix=one).of("1").headers["X-Session-ID"] for one in ("a-", "b-")]
    assert names == ["a-1", "b-1"]


def test_conversations_are_bounded() -> None:
    known = Conversations()
    first = known.of("0")
    assert known.of("0") is first
    for n in range(1, MOST + 1):
        known.of(str(n))
    assert known.of(str(MOST)) is known.of(str(MOST))
    assert known.of("0") is not first


class Engine:
    """Takes hints, and answers with `status`."""

    def __init__(self, status: int) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                engine.bodies.append({"path": self.path, **msgspec.json.decode(data)})
                engine.keys.append(self.headers.get("authorization", ""))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture(params=[200])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    one = Engine(request.param)
    yield one
    one.close()


def test_hints_reach_the_engine_in_order_from_any_thread(engine: Engine) -> None:
    with EngineAnnouncer(engine.url, api_key="secret") as announcer:
        mine = Conversations(announcer).of("trip")

        def work() -> None:
            with mine.gap("ls"):
                pass

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        mine.end()
    assert {body["path"] for body in engine.bodies} == {"/v1/kvmem/hints"}
    assert {body["version"] for body in engine.bodies} == {1}
    assert [one for body in engine.bodies for one in body["actions"]] == [
        {"do": "tool_started", "session": "trip", "tool": "ls"},
        {"do": "tool_ended", "session": "trip", "tool": "ls"},
        {"do": "session_end", "session": "trip"},
    ]
    assert set(engine.keys) == {"Bearer secret"}
    assert (announcer.n_sent, announcer.n_lost) == (3, 0)


def test_a_session_is_told_of_under_its_own_salt(engine: Engine) -> None:
    with EngineAnnouncer(engine.url) as announcer:
        for session, salt in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "")):
            announcer.announce(Hint("session_end", session, 0, cache_salt=salt))
    told = {one["session"]: body["cache_salt"] for body in engine.bodies for one in body["actions"]}
    assert told == {"a": "x", "b": "x", "c": "y", "d": ""}


@pytest.mark.parametrize("engine", [404], indirect=True)
def test_an_engine_without_the_endpoint_is_asked_once(engine: Engine) -> None:
    announcer = EngineAnnouncer(engine.url)
    announcer.announce(Hint("session_end", "a", 0))
    announcer._thread.join()
    announcer.announce(Hint("session_end", "b", 0))
    announcer.close()
    assert announcer.off
    assert len(engine.bodies) == 1
    assert (announcer.n_sent, announcer.n_lost) == (0, 1)  # the second was not taken


@pytest.mark.parametrize("engine", [503], indirect=True)
def test_hints_that_an_engine_does_not_take_are_counted(engine: Engine) -> None:
    with EngineAnnouncer(engine.url) as announcer:
        announcer.announce(Hint("session_end", "a", 0))
    assert (announcer.n_sent, announcer.n_lost) == (0, 1)


def test_an_engine_that_is_gone_costs_nothing() -> None:
    with EngineAnnouncer("http://127.0.0.1:9") as announcer:
        announcer.announce(Hint("session_end", "a", 0))
        announcer.announce(Hint("session_end", "", 0))
        announcer.announce(Hint("session_end", "n" * 257, 0))
    assert (announcer.n_sent, announcer.n_lost) == (0, 1)
