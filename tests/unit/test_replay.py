"""Replay: runs are as good as blocks, each order keeps what it says, and hints know no future."""

from __future__ import annotations

import itertools
import json
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmem.cli.replaying import Options, run
from kvmem.errors import ConfigError
from kvmem.explain.replay import ORDERS, Forest, Prefill, Prompt, play
from kvmem.explain.replay.arrange import arrange, at_once
from kvmem.explain.replay.orders import Kvmem, make_order
from kvmem.explain.replay.traces import read_trace
from kvmem.policy import Duel, Keeper, Room


def conversations(
    n: int, turns: int, seed: int = 0, *, head: int = 4, gap: float = 1.0
) -> list[Prompt]:
    """Sessions that take turns, each prompt extending the last; all begin with the same blocks."""
    draw = random.Random(seed)
    fresh = itertools.count(1000)
    chains = [list(range(head)) for _ in range(n)]
    found = []
    for turn in range(turns):
        for i, chain in enumerate(chains):
            chain += [next(fresh) for _ in range(draw.randint(1, 6))]
            kind = "over" if turn == turns - 1 else "tool"
            at_s = gap * (turn * n + i)
            found.append(Prompt(at_s, list(chain), f"s{i}", kind, at_s))
    return found


def by_blocks(prompts: list[Prompt], capacity: int, *, future: bool) -> int:
    """Hits of LRU, or of Belady's order, over single blocks: leaf first, all in plain Python."""
    uses: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        for key in prompt.keys:
            uses.setdefault(key, []).append(i)
    here: OrderedDict[int, int] = OrderedDict()  # by key: its depth
    last: dict[int, int] = {}
    above = {k: p for q in prompts for p, k in zip([None, *q.keys], q.keys, strict=False)}
    hits = 0
    for i, prompt in enumerate(prompts):
        for key in prompt.keys:
            if key not in here:
                break
            hits += 1
        for depth, key in enumerate(prompt.keys):
            here[key], last[key] = depth, i
        while len(here) > capacity:
            inner = {above[key] for key in here}
            leaves = [key for key in here if key not in inner]
            if future:

                def when(key: int, i: int = i) -> int:
                    return next((u for u in uses[key] if u > i), 1 << 60)

                victim = max(leaves, key=lambda key: (when(key), here[key]))
            else:
                victim = min(leaves, key=lambda key: last[key])
            del here[victim]
    return hits


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("capacity", [20, 45, 90])
def test_runs_give_what_blocks_give(seed: int, capacity: int) -> None:
    prompts = conversations(5, 6, seed)
    draw = random.Random(seed)
    draw.shuffle(prompts)  # branches of one another, in any order
    prompts = [Prompt(float(i), p.keys) for i, p in enumerate(prompts)]
    forest = Forest([p.keys for p in prompts])
    for order, future in (("lru", False), ("belady", True)):
        assert play(prompts, forest, order, capacity).hit == by_blocks(
            prompts, capacity, future=future
        )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_every_order_keeps_prefixes_within_its_room(order: str, seed: int) -> None:
    prompts = conversations(6, 8, seed)
    forest = Forest([p.keys for p in prompts])
    for capacity in (1, 7, 40, 1000):
        room, chooser = make_order(order, forest, capacity)
        for i, (prompt, path) in enumerate(zip(prompts, forest.paths, strict=True)):
            hits = room.hits(path)
            room.fill(path, prompt.at_s)
            chooser.used(i, path, hits, prompt.at_s, prompt.agent)
            chooser.make_room(prompt.at_s)
            chooser.waits(i, prompt.kind, prompt.at_s)
            assert room.used <= capacity
            assert room.used == sum(room.here)
            for one, n in enumerate(room.here):
                above = forest.parents[one]
                if n and above >= 0:
                    assert room.here[above] == forest.sizes[above]  # I2
                below = any(room.here[r] for r, p in enumerate(forest.parents) if p == one)
                assert (one in room.leaves) == (n > 0 and not below)
                assert bool(room.empty[one]) == (n == 0)


@pytest.mark.parametrize("order", ORDERS)
def test_with_room_for_all_everything_repeated_is_hit(order: str) -> None:
    prompts = conversations(4, 10)
    forest = Forest([p.keys for p in prompts])
    played = play(prompts, forest, order, forest.n_distinct + 1)
    if order != "ttl":
        assert played.hit == forest.n_asked - forest.n_distinct
    assert (played.asked, played.saved_rate > 0) == (forest.n_asked, True)


def test_no_order_beats_belady() -> None:
    for seed in range(5):
        prompts = conversations(8, 12, seed)
        forest = Forest([p.keys for p in prompts])
        for capacity in (30, 60, 120):
            best = play(prompts, forest, "belady", capacity).hit
            assert all(play(prompts, forest, o, capacity).hit <= best for o in ORDERS)


def test_sessions_that_take_turns_are_kept_whole() -> None:
    """LRU drops each one just before its turn."""
    prompts = conversations(8, 60, gap=1.0)
    forest = Forest([p.keys for p in prompts])
    capacity = forest.n_distinct // 3
    hits = {o: play(prompts, forest, o, capacity).hit for o in ("lru", "kvmem", "belady")}
    assert hits["kvmem"] - hits["lru"] > 0.6 * (hits["belady"] - hits["lru"]) > 0


def scan() -> list[Prompt]:
    """Four agents in a loop, and between their turns prompts that nobody asks for again."""
    agents = conversations(4, 40, gap=10.0)
    fresh = itertools.count(10**6)
    found = []
    for prompt in agents:
        found.append(prompt)
        for j in range(3):
            keys = [next(fresh) for _ in range(40)]
            found.append(Prompt(prompt.at_s + 1 + j, keys, f"once {keys[0]}", "over"))
    return found


def test_a_scan_of_one_off_prompts_does_not_flush_agents_out() -> None:
    prompts = scan()
    forest = Forest([p.keys for p in prompts])
    capacity = max(len(p.keys) for p in prompts) * 4 + 60
    rates = {o: play(prompts, forest, o, capacity).hit_rate for o in ("lru", "kvmem", "belady")}
    assert rates["kvmem"] > rates["belady"] - 0.1 * (rates["belady"] - rates["lru"])


def uniform(n: int, seed: int) -> list[Prompt]:
    """Prompts drawn evenly, which no order can know anything of."""
    draw = random.Random(seed)
    chains = [[1000 * i + j for j in range(10)] for i in range(60)]
    return [Prompt(float(i), draw.choice(chains)) for i in range(n)]


def adversarial(n: int) -> list[Prompt]:
    """What seldom came back is asked for most, again and again: whatever is learned is wrong."""
    found = []
    for i in range(n):
        turn, group = i % 10, i // 400
        which = (turn if group % 2 else 0 if turn < 5 else turn * 7 + i // 10 % 40) + 1000 * group
        found.append(Prompt(float(i), [10_000 * which + j for j in range(12)]))
    return found


@pytest.mark.parametrize("traffic", ["uniform", "adversarial", "heavy"])
def test_where_nothing_can_be_learned_it_is_no_worse_than_lru(traffic: str) -> None:
    if traffic == "heavy":
        draw = random.Random(2)
        prompts = [
            Prompt(float(i), [100 * which + j for j in range(8)])
            for i, which in enumerate(int(draw.paretovariate(0.6)) for _ in range(3000))
        ]
    else:
        prompts = uniform(3000, 1) if traffic == "uniform" else adversarial(3000)
    forest = Forest([p.keys for p in prompts])
    for share in (0.05, 0.2, 0.5):
        capacity = int(forest.n_distinct * share)
        rates = {o: play(prompts, forest, o, capacity).hit_rate for o in ("lru", "kvmem")}
        assert rates["kvmem"] >= rates["lru"] - 0.003, (share, rates)


def test_a_keeper_that_is_wrong_loses_the_duel(monkeypatch: pytest.MonkeyPatch) -> None:
    def upside_down(self: Keeper, now_s: float) -> tuple[Any, Any]:
        """Whatever was used last goes first."""
        return self._run, np.where(self._run >= 0, now_s - self._since_s, 0.0)

    draw = random.Random(4)
    popular = [  # three at a time, soon three others
        Prompt(float(i), [100 * which + j for j in range(8)])
        for i, which in enumerate(i // 60 * 3 + draw.randrange(3) for i in range(4000))
    ]
    forest = Forest([p.keys for p in popular])
    capacity = 40
    lru = play(popular, forest, "lru", capacity).hit_rate
    monkeypatch.setattr(Keeper, "worths", upside_down)
    guarded = play(popular, forest, "kvmem", capacity)
    assert guarded.switches
    assert guarded.hit_rate > lru - 0.02
    monkeypatch.setattr(Duel, "played", lambda *_: None)
    assert play(popular, forest, "kvmem", capacity).hit_rate < lru - 0.05


def test_a_duel_is_decided_by_a_margin_and_can_be_won_back() -> None:
    duel = Duel()
    for _ in range(1000):
        duel.played(100, 50, 50)
    assert not duel.second
    for _ in range(50):
        duel.played(100, 40, 60)
    assert duel.second
    for _ in range(2000):
        duel.played(100, 60, 40)
    assert (duel.second, duel.switches) == (False, 2)


def test_hints_are_told_when_the_reply_is_over_and_not_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[int, str, float]] = []
    monkeypatch.setattr(Kvmem, "waits", lambda self, i, kind, now: told.append((i, kind, now)))
    prompts = [
        Prompt(0.0, [1, 2], "a", "tool", 5.0),
        Prompt(4.0, [7], "b", "user", 4.5),
        Prompt(6.0, [1, 2, 3], "a", "over", 7.0),
        Prompt(9.0, [8], "c", "?", 9.0),
    ]
    play(prompts, Forest([p.keys for p in prompts]), "kvmem_hints", 10)
    assert told == [(1, "user", 4.5), (0, "tool", 5.0), (2, "over", 7.0)]


def test_what_is_over_is_worth_nothing_and_what_an_agent_left_is_over() -> None:
    keeper = Keeper()
    first = keeper.used([0, 1], 0.0, "a")
    other = keeper.used([0, 2], 1.0, "b")
    runs, worth = keeper.worths(2.0)
    assert worth[first] > 0
    assert worth[other] > 0
    keeper.waits(other, "over", 2.0)
    again = keeper.used([0, 3], 3.0, "a")  # its history was rewritten
    runs, worth = keeper.worths(4.0)
    assert (worth[first], worth[other]) == (0.0, 0.0)
    assert worth[again] > 0
    assert [runs[first], runs[other], runs[again]] == [1, 2, 3]
    assert keeper.used([0, 1, 4], 5.0, "c") == first  # somebody took it up again
    assert keeper.worths(6.0)[1][first] > 0


def test_branches_are_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmem.policy.keeper.MOST_BRANCHES", 100)
    keeper = Keeper()
    for i in range(500):
        keeper.used([i], float(i), f"a{i}")
    assert keeper.n_branches == 100
    runs, _ = keeper.worths(500.0)
    assert sorted(runs[runs >= 0].tolist()) == list(range(400, 500))
    assert len(keeper._branch_of) == 100


def test_a_room_is_copied_whole() -> None:
    forest = Forest([[1, 2, 3], [1, 2, 9]])
    room = Room(forest, 10)
    room.fill(forest.paths[0], 1.0)
    other = room.copy()
    other.cut(forest.paths[0][-1], 1)
    other.fill(forest.paths[1], 2.0)
    assert (room.used, other.used) == (3, 3)
    assert room.hits(forest.paths[0]) == 3
    assert other.hits(forest.paths[0]) == 2


def test_prefill_grows_with_depth() -> None:
    cost = Prefill(tokens_s=1000.0, half_at_tokens=10_000.0)
    assert cost.seconds(0, 0) == 0
    parts = cost.seconds(0, 500) + cost.seconds(500, 2000)
    assert parts == pytest.approx(cost.seconds(0, 2000))
    assert cost.seconds(10_000, 10_001) == pytest.approx(0.002, rel=0.01)


# -- logs ----------------------------------------------------------------------------------------


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_trace_says_what_agents_wait_for(tmp_path: Path) -> None:
    head = {"kvtrace": 1, "kind": "blocks", "block_size": 64, "hash_scope": "session",
            "order": "by_session"}  # fmt: skip
    rows = [
        {"id": 0, "session": "s", "t": 0.0, "block_hashes": [1, 2]},
        {"id": 1, "session": "s", "t": 9.0, "block_hashes": [1, 2, 3], "tool_gap_s": 3.0,
         "gap_kind": "tool", "output": '{"name": "ls"}'},
        {"id": 2, "session": "s", "t": 50.0, "block_hashes": [1, 2, 3, 4], "tool_gap_s": 30.0,
         "gap_kind": "user"},
        {"id": 3, "session": "u", "t": 0.0, "block_hashes": [1, 2, 3]},
    ]  # fmt: skip
    trace = read_trace(write(tmp_path / "t.jsonl", head, *rows))
    assert trace.block_tokens == 64
    assert [c.kind for c in trace.calls] == ["tool", "user", "over", "over"]
    a, b, _, other = (c.keys for c in trace.calls)
    assert b[: len(a)] == a
    assert other[0] != a[0]  # ids of another session are others
    prompts = arrange(trace.calls, "round-robin:2")
    assert [p.agent for p in prompts] == ["s/main", "u/main", "s/main", "s/main"]
    timed = arrange(trace.calls, "poisson:1", seed=3)
    times = [p.at_s for p in timed if p.agent == "s/main"]
    assert np.diff(times).tolist() == pytest.approx([9.0, 41.0])
    replied = [p.replied_s - p.at_s for p in timed if p.agent == "s/main"]
    assert replied == pytest.approx([6.0, 11.0, 0.0])


def test_text_and_ids_that_begin_alike_share_blocks(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.jsonl",
        *({"messages": [{"role": "user", "content": "x" * 200 + end * 90}]} for end in "ab"),
    )
    one, two = (c.keys for c in read_trace(log).calls)
    assert len(one) == len(two) == 4
    assert one[:3] == two[:3]
    assert one[3] != two[3]


def test_mooncake_is_read_with_its_times(tmp_path: Path) -> None:
    log = write(
        tmp_path / "m.jsonl",
        {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 27482, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 2]},
    )
    trace = read_trace(log)
    assert trace.block_tokens == 512
    assert [(c.at_s, c.agent, c.kind) for c in trace.calls] == [(0.0, "", "?"), (27.482, "", "?")]
    prompts = arrange(trace.calls, "recorded")
    assert play(prompts, Forest([p.keys for p in prompts]), "kvmem_hints", 9).hit == 2


def test_sessions_at_once_are_replaced_when_they_end(tmp_path: Path) -> None:
    rows = [{"id": i, "session": f"s{i // 2}", "t": float(i % 2), "token_ids": list(range(32))}
            for i in range(8)]  # fmt: skip
    head = {"kvtrace": 1, "kind": "token_ids", "order": "by_session"}
    trace = read_trace(write(tmp_path / "t.jsonl", head, *rows))
    prompts = at_once(trace.calls, 2, lambda call: 2.0)
    assert [p.agent[:2] for p in prompts] == ["s0", "s1", "s0", "s1", "s2", "s3", "s2", "s3"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (Options(orders="lru,best"), "best"),
        (Options(capacities="5%,x"), "'x'"),
        (Options(capacities="0"), "'0'"),
        (Options(how="poisson:0"), "poisson:0"),
        (Options(how="recorded"), "no time"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: Options, named: str) -> None:
    head = {"kvtrace": 1, "kind": "token_ids", "order": "by_session"}
    log = write(tmp_path / "t.jsonl", head, {"id": 0, "session": "s", "token_ids": list(range(64))})
    with pytest.raises(ConfigError, match=named):
        run([log], options)


def test_the_command_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    head = {"kvtrace": 1, "kind": "token_ids", "order": "by_session"}
    rows = [{"id": i, "session": f"s{i // 3}", "token_ids": list(range(i % 3 * 32 + 32))}
            for i in range(9)]  # fmt: skip
    log = write(tmp_path / "t.jsonl", head, *rows)
    picture = tmp_path / "p.png"
    assert run([log], Options(capacities="3,50%", as_json=True, plot=picture)) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["prompts"], told["distinct"], told["arrangement"]) == (9, 6, "round-robin:8")
    assert {one["order"] for one in told["played"]} == set(ORDERS)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert run([log], Options(orders="lru,belady")) == 0
    assert "belady" in capsys.readouterr().out
