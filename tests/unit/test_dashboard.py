"""The dashboard's tree against a count by hand, who may look, and what is told over HTTP."""

from __future__ import annotations

import random
import re
from importlib import resources
from typing import Any

import pytest
from starlette.testclient import TestClient

from benchmarks._dashboard import Synthetic
from kvmem.dashboard.app import Dashboard
from kvmem.dashboard.guard import HEADERS, Access
from kvmem.dashboard.state import State
from kvmem.dashboard.tree import MARK, Drawn, Forest
from kvmem.errors import ConfigError
from kvmem.telemetry.chains import Chain

TOKEN = "0123456789abcdef0123456789abcdef"


def mark(*way: int) -> bytes:
    """A block's, which says where it lies, as chained keys do."""
    return (hash(way) & (1 << 64) - 1).to_bytes(MARK, "little")


def chain(number: int, way: list[int], session: str = "") -> Chain:
    marks = b"".join(mark(*way[: i + 1]) for i in range(len(way)))
    return Chain(number, session or f"s{number % 7}", "", f"r{number}", marks)


def prefixes(chains: dict[int, Chain]) -> set[bytes]:
    return {
        one.marks[: MARK * (i + 1)] for one in chains.values() for i in range(len(one.marks) // 8)
    }


def check(forest: Forest, chains: dict[int, Chain]) -> None:
    assert forest.n_blocks == len(prefixes(chains))
    view = forest.view(most=10_000, levels=64)
    assert sum(one.blocks for one in view) == forest.n_blocks
    for one in view[1:]:
        inside = [c for c in chains.values() if bytes.fromhex(one.name) in marks_of(c)]
        assert one.prompts == len(inside)
        assert one.sessions == len({c.session for c in inside})
        # All of its blocks are in each of them, and the next one is not in all of them.
        assert {marks_of(c)[one.start] for c in inside} == {bytes.fromhex(one.name)}
        after = {tuple(marks_of(c)[one.start : one.start + one.blocks]) for c in inside}
        assert len(after) == 1
        assert len({tuple(marks_of(c)[: one.start + one.blocks + 1]) for c in inside}) != 1 or all(
            len(marks_of(c)) == one.start + one.blocks for c in inside
        )


def marks_of(one: Chain) -> list[bytes]:
    return [one.marks[i : i + MARK] for i in range(0, len(one.marks), MARK)]


@pytest.mark.parametrize("seed", range(8))
def test_the_tree_is_what_counting_gives(seed: int) -> None:
    draw = random.Random(seed)
    forest, chains = Forest(), dict[int, Chain]()
    for _ in range(60):
        if chains and draw.random() < 0.3:
            gone = draw.choice(list(chains))
            forest.remove(gone)
            del chains[gone]
        else:
            number = draw.randrange(30)
            new = chain(number, [draw.randrange(2) for _ in range(draw.randrange(1, 9))])
            forest.put(new)
            chains[number] = new
        check(forest, chains)
    forest.keep_only([])
    assert forest.n_blocks == 0
    assert not forest.nodes


def test_what_is_left_out_is_summed_up_and_the_cut_holds() -> None:
    forest = Forest()
    for number in range(200):
        forest.put(chain(number, [number % 5, number, number + 1]))
    view = forest.view(most=20)
    assert len([one for one in view if not one.hidden]) <= 20
    assert sum(one.hidden for one in view) > 0
    for at, one in enumerate(view):
        below = [child for child in view if child.parent == at]
        if below:
            assert one.total == one.blocks + sum(child.total for child in below)
    assert forest.view("00" * 8) == []
    assert forest.view("no hex") == []


def test_blocks_that_are_here_are_those_that_some_chain_says() -> None:
    forest = Forest()
    forest.put(chain(1, [1, 1, 1, 1]))
    forest.put(chain(2, [1, 1, 2]))
    forest.host, forest.disk = {1: 3, 2: 2}, {1: -1, 2: -1}
    told = {(one.start, one.blocks): (one.host, one.disk) for one in forest.view()[1:]}
    assert told == {(0, 2): (2, -1), (2, 2): (1, -1), (2, 1): (0, -1)}


def test_a_block_is_found_by_its_key_and_a_session_by_its_name() -> None:
    forest = Forest()
    forest.put(chain(1, [1, 2, 3], "planner"))
    forest.put(chain(2, [1, 2, 4], "writer"))
    inner = mark(1, 2)
    assert forest.node_of(inner.hex()) == mark(1).hex()
    assert forest.node_of("ab") == forest.node_of("zz" * 8) == forest.node_of("00" * 8) == ""
    assert forest.find("writ") == [("writer", mark(1, 2, 4).hex())]
    assert [one.start for one in forest.above(mark(1, 2, 4).hex())] == [0, 0]


@pytest.fixture
def source() -> Synthetic:
    return Synthetic(200, 4_000)


def client(source: Any, access: Access | None = None) -> TestClient:
    return TestClient(
        Dashboard(lambda: [source], access), base_url="http://127.0.0.1", follow_redirects=False
    )


def test_the_pages_figures_are_the_engines(source: Synthetic) -> None:
    with client(source) as page:
        tree = page.get("/api/tree?most=50").json()
        lanes = page.get("/api/lanes?most=5&sort=session").json()
        session = page.get(f"/api/session?name={lanes['lanes'][0]['session']['session']}").json()
        found = page.get("/api/search?text=agent-7").json()
        assert page.get("/api/engines").json() == [source.name]
    state = State(source)
    state.look()
    whole = prefixes({n: c for n, (_, c) in source.chains_now.items()})
    top = Drawn(*tree["nodes"][0])
    assert (top.total, top.prompts) == (len(whole), len(source.chains_now))
    assert lanes["n"] == len(source.sessions_now)
    names = [one["session"]["session"] for one in lanes["lanes"]]
    assert names == sorted(source.sessions_now)[:5]
    assert session["session"]["session"] == names[0]
    assert all("agent-7" in name for name, _ in found["chains"])
    assert len(found["chains"]) == len([n for n in source.sessions_now if "agent-7" in n])


@pytest.mark.parametrize(
    ("query", "code"),
    [("tree?most=x", 400), ("lanes?sort=secrets", 400), ("tree?engine=other", 404), ("no", 404)],
)
def test_a_wrong_question_is_answered_as_one(source: Synthetic, query: str, code: int) -> None:
    with client(source) as page:
        assert page.get(f"/api/{query}").status_code == code
        assert page.get("/static/../app.py").status_code == 404


def test_an_engine_is_asked_once_for_all_that_look(source: Synthetic) -> None:
    with client(source) as page:
        for _ in range(5):
            page.get("/api/tree")
            page.get("/api/lanes")
    assert source.asked["snapshot"] <= 2


def test_other_hosts_and_those_without_the_token_see_nothing(source: Synthetic) -> None:
    with client(source) as page:
        assert page.get("/", headers={"host": "rebound.example"}).status_code == 421
    with client(source, Access.of("0.0.0.0", TOKEN)) as page:
        assert page.get("/api/tree").status_code == 401
        assert page.get("/static/main.js").status_code == 401
        assert page.get("/").headers["location"] == "/login"
        assert page.post("/login", data={"token": "x" * 32}).status_code == 401
        assert page.get("/api/tree", headers={"authorization": "Bearer no"}).status_code == 401
        given = {"authorization": f"Bearer {TOKEN}"}
        assert page.get("/api/tree", headers=given).status_code == 200
        logged_in = page.post("/login", data={"token": TOKEN})
        assert logged_in.status_code == 303
        cookie = logged_in.headers["set-cookie"]
        assert "httponly" in cookie.lower()
        assert "samesite=strict" in cookie.lower()
        assert TOKEN not in cookie
        assert page.get("/api/tree").status_code == 200  # by the cookie


def test_beyond_loopback_a_token_is_wanted_that_nobody_guesses() -> None:
    with pytest.raises(ConfigError, match="there is no --token"):
        Access.of("0.0.0.0", "")
    with pytest.raises(ConfigError, match="has 5 characters"):
        Access.of("0.0.0.0", "short")
    assert Access.of("127.0.0.1", "").admits({})  # type: ignore[arg-type]


def test_every_answer_has_the_headers_and_no_page_has_inline_code(source: Synthetic) -> None:
    with client(source) as page:
        for path in ("/", "/login", "/static/main.js", "/api/tree", "/api/no", "/static/no"):
            told = page.get(path).headers
            assert {name: told[name] for name in HEADERS} == HEADERS
    for file in (resources.files("kvmem.dashboard") / "static").iterdir():
        text = file.read_text()
        assert "//" not in re.sub(r"(?m)^\s*//.*$|http://www\.w3\.org/2000/svg", "", text) or not (
            re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
        ), f"{file.name} names another host"
        if file.name.endswith(".html"):
            assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style", text)


def test_an_engine_that_began_anew_is_seen_anew(source: Synthetic) -> None:
    clock = iter(range(0, 1000, 10))
    state = State(source, clock=lambda: float(next(clock)))
    state.look()
    assert state.forest.n_blocks > 0
    other = Synthetic(3, 30, seed=9)
    snapshot = other.snapshot

    def later(sessions: int, events_since: int) -> Any:
        import msgspec

        return msgspec.structs.replace(snapshot(sessions, events_since), pid=2)

    other.snapshot = later  # type: ignore[method-assign]
    state.source = other
    state.look()
    assert state.lanes(span_s=1e9).n == 3
    assert len(state.forest.chains) == 3
