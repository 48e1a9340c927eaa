"""Two real engines share one node, a process of its own: what one has computed the other loads, a
prompt that both get at once is computed once, and what they answer is what vLLM answers alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvmem.node.status import ask
from tests import nodes
from tests.e2e.host import (
    BLOCK,
    Engine,
    EngineHost,
    Turn,
    assert_agrees,
    assert_settled,
    generate_one,
    prompt,
)

pytestmark = pytest.mark.engine
SHORT, LONG, LATER = prompt(300, 21), prompt(1500, 22), prompt(400, 23)
FLAGS = ("--host-gb", "0.5")


def whole(tokens: list[int]) -> int:
    return (len(tokens) - 1) // BLOCK * BLOCK


@pytest.fixture(scope="module")
def shared(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    path = tmp_path_factory.mktemp("node")
    path.chmod(0o700)
    alone = EngineHost(smollm2, kvmem=None)
    names = {"short": SHORT, "long": LONG, "later": LATER}
    plain = {name: alone.run(generate_one, tokens) for name, tokens in names.items()}
    alone.close()
    found = {"path": path, "plain": plain, "node": nodes.process(path, *FLAGS), "hosts": []}
    try:
        for _ in range(2):
            settings = {"node": str(path), "scrub_mb_s": 0, "shadow_share": 0.0}
            found["hosts"].append(EngineHost(smollm2, kvmem=settings))
        yield found
    finally:
        for host in found["hosts"]:
            host.close()
        found["node"].terminate()
        assert found["node"].wait(30) == 0


def loaded(engine: Engine) -> int:
    return int(engine.half.totals.blocks_loaded)


def again(engine: Engine, tokens: list[int]) -> Turn:
    engine.forget_device()
    return engine.generate([tokens])[0]


def attached(engine: Engine) -> bool:
    return bool(engine.half.cache.adopt())


def failures(engine: Engine) -> tuple[int, str | None]:
    return engine.half.page.failures, engine.half.page.last_failure


def test_what_one_engine_computed_the_other_loads(shared: dict[str, Any]) -> None:
    one, two = shared["hosts"]
    first = one.run(generate_one, SHORT)
    assert first.receipt["tokens"]["computed"] == len(SHORT)
    second = two.run(generate_one, SHORT)
    assert second.receipt["tokens"]["host"] == whole(SHORT)
    assert two.run(loaded) == whole(SHORT) // BLOCK
    assert_agrees(first, shared["plain"]["short"])
    assert_agrees(second, shared["plain"]["short"])


def test_a_prompt_that_both_get_at_once_is_computed_once(shared: dict[str, Any]) -> None:
    one, two = shared["hosts"]
    with ThreadPoolExecutor(2) as pool:
        turns = list(pool.map(lambda host: host.run(generate_one, LONG), (one, two)))
    computed = sorted(turn.receipt["tokens"]["computed"] for turn in turns)
    assert computed == [len(LONG) - whole(LONG), len(LONG)]
    for turn in turns:
        assert_agrees(turn, shared["plain"]["long"])
    assert ask(shared["path"])["flights"]["waited"] >= 1


def test_engines_run_on_while_their_node_is_killed_and_use_the_next(
    shared: dict[str, Any],
) -> None:
    one, two = shared["hosts"]
    shared["node"].kill()
    assert shared["node"].wait(30) == -signal.SIGKILL
    alone = [host.run(again, LATER) for host in (one, two)]
    assert [turn.receipt["tokens"]["computed"] for turn in alone] == [len(LATER)] * 2
    shared["node"] = nodes.process(shared["path"], *FLAGS)
    for host in (one, two):
        _until(lambda: host.run(attached))  # noqa: B023 called at once
    stored = one.run(again, LATER)
    assert stored.receipt["tokens"]["computed"] == len(LATER)  # it is another memory
    restored = two.run(again, LATER)
    assert restored.receipt["tokens"]["host"] == whole(LATER)
    for turn in (*alone, stored, restored):
        assert_agrees(turn, shared["plain"]["later"])
    for host in (one, two):
        assert host.run(failures)[1].startswith("node: ")
        host.run(assert_settled)


def _until(reached: Callable[[], Any]) -> None:
    from tests.unit.test_node import until

    until(reached, 60.0)
