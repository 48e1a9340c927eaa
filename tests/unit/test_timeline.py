"""The demo's sums and its picture, from recorded turns."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from kvmem.demo import team
from kvmem.demo.play import Played, request_id
from kvmem.demo.report import (
    Arm,
    Equality,
    Summary,
    compare,
    new_tokens,
    percentile,
    summarise,
    table,
)
from kvmem.demo.server import Tokens, counters
from kvmem.demo.timeline import draw, save, shares


def turn(
    turn_id: str = "lead/1", start_s: float = 0.0, ttft_s: float = 1.0, **more: object
) -> Played:
    values: dict[str, object] = {
        "turn_id": turn_id,
        "agent": turn_id.split("/")[0],
        "tool": "read_document",
        "ready_s": start_s,
        "sent_s": start_s + 0.5,
        "first_s": start_s + 0.5 + ttft_s,
        "end_s": start_s + 1.5 + ttft_s,
        "queued_s": 0.25,
        "prompt_tokens": 1000,
        "cached_tokens": 640,
        "reply": f"reply of {turn_id}",
        "reply_tokens": 20,
        "host_tokens": 320,
        **more,
    }
    return msgspec.convert(values, Played)


def arm(name: str = "vLLM alone", turns: list[Played] | None = None) -> Arm:
    turns = turns or [turn("lead/1"), turn("worker 1/1", 2.0), turn("worker 1/2", 5.0, 0.2)]
    return Arm(name=name, turns=turns, tokens=Tokens(1080, 960, 960), start_s=40.0)


# -- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0], 0.95, 3.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([4.0, 1.0, 3.0, 2.0, 5.0], 0.5, 3.0),
        ([float(n) for n in range(101)], 0.95, 95.0),
        ([0.0, 10.0], 0.95, 9.5),
        ([1.0, 2.0, 3.0], 1.0, 3.0),
        ([1.0, 2.0, 3.0], 0.0, 1.0),
    ],
)
def test_percentile_interpolates_between_ranks(
    values: list[float], share: float, expected: float
) -> None:
    assert percentile(values, share) == pytest.approx(expected)


def test_summary_takes_waits_from_clients_and_tokens_from_the_server() -> None:
    assert summarise(arm()) == Summary(
        name="vLLM alone",
        ttft_p50_s=pytest.approx(1.0),
        ttft_p95_s=pytest.approx(1.0),
        prompt_tokens=3000,
        computed_tokens=1080,
        device_tokens=960,
        host_tokens=960,
        total_s=pytest.approx(6.7),
    )


def test_equal_replies_are_all_equal() -> None:
    assert compare(arm().turns, arm().turns) == Equality(3, 3, None)


def test_order_of_turns_does_not_matter_for_equality() -> None:
    assert compare(arm().turns, arm().turns[::-1]).equal == 3


def test_first_different_reply_is_named() -> None:
    one = arm().turns
    other = [one[0], *(msgspec.structs.replace(t, reply="else") for t in one[1:])]
    assert compare(one, other) == Equality(1, 3, "worker 1/1")


def test_missing_turn_counts_as_different() -> None:
    assert compare(arm().turns, arm().turns[:2]) == Equality(2, 3, "worker 1/2")
    assert compare(arm().turns[:2], arm().turns) == Equality(2, 3, None)


def test_new_tokens_count_a_forked_prompt_once() -> None:
    turns = (
        team.Turn("lead/1", "lead", "t", 0.0, ()),
        team.Turn("worker 1/1", "worker 1", "t", 0.0, (), fork_of="lead/1"),
        team.Turn("worker 1/2", "worker 1", "t", 0.0, ()),
    )
    played = [
        turn("lead/1", prompt_tokens=1000),
        turn("worker 1/1", prompt_tokens=1300),
        turn("worker 1/2", prompt_tokens=1600),
    ]
    assert new_tokens(team.Script(turns, 8), played) == 1000 + 600


def test_table_says_how_much_faster_and_how_many_are_equal() -> None:
    two = msgspec.structs.replace(summarise(arm()), ttft_p50_s=0.25, computed_tokens=540)
    drawn = table(summarise(arm()), two, Equality(2, 3, "lead/1"))
    cells = [list(column.cells) for column in drawn.columns]
    rows = {row[0].strip(): row[1:] for row in zip(*cells, strict=True)}
    assert rows["time to first token, p50"] == ("1.00 s", "0.25 s", "4.0x faster")
    assert rows["computed"] == ("1,080", "540", "2.0x fewer")
    assert rows["outputs equal"] == ("", "2/3", "")


def test_table_does_not_hide_a_slower_arm() -> None:
    two = msgspec.structs.replace(summarise(arm()), total_s=13.4)
    drawn = table(summarise(arm()), two, Equality(3, 3, None))
    assert "2.0x slower" in list(drawn.columns[3].cells)


def test_counters_are_summed_by_label() -> None:
    text = """\
# HELP vllm:prompt_tokens_by_source_total Number of prompt tokens by source.
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="a\\"b",source="local_compute"} 1.4296e+04
vllm:prompt_tokens_by_source_total{engine="1",model_name="a",source="local_compute"} 4.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="a",source="local_cache_hit"} 3040.0
vllm:prompt_tokens_by_source_created{engine="0",model_name="a",source="local_cache_hit"} 1.79e+09
vllm:prompt_tokens_total{engine="0",model_name="a"} 17336.0
"""
    found = counters(text, "vllm:prompt_tokens_by_source_total", "source")
    assert found == {"local_compute": 14300, "local_cache_hit": 3040}


# -- the script -----------------------------------------------------------------------------------


@pytest.fixture(params=[team.full_script, team.quick_script], ids=["full", "quick"])
def script(request: pytest.FixtureRequest) -> team.Script:
    made = request.param()
    assert isinstance(made, team.Script)
    return made


def test_script_can_be_played_to_its_end(script: team.Script) -> None:
    order = {t.turn_id: i for i, t in enumerate(script.turns)}
    assert len(order) == len(script.turns)
    for made in script.turns:
        assert all(order[needed] < order[made.turn_id] for needed in made.needs)


def test_workers_start_from_the_leads_prompt(script: team.Script) -> None:
    for worker in team.agents(script)[1:]:
        first = next(t for t in script.turns if t.agent == worker)
        assert first.fork_of == "lead/1"


def test_every_worker_is_read_by_another_agent(script: team.Script) -> None:
    readers: dict[str, set[str]] = {}
    for made in script.turns:
        for needed in made.needs:
            author = needed.split("/")[0]
            if author != made.agent:
                readers.setdefault(author, set()).add(made.agent)
    for worker in team.agents(script)[1:]:
        assert len(readers[worker]) >= 2


def test_quotes_become_the_replies_they_name() -> None:
    message = team.Message("user", ("A: ", team.Quote("lead/1"), "."))
    assert message.render({"lead/1": "yes"}) == {"role": "user", "content": "A: yes."}


def test_request_ids_are_no_part_of_one_another(script: team.Script) -> None:
    names = [request_id(t.turn_id) for t in script.turns]
    assert not [(a, b) for a in names for b in names if a != b and a in b]


# -- the picture ----------------------------------------------------------------------------------


def bars(figure: object) -> dict[str, list[object]]:
    """The bars of the arms' panels by what they stand for, `turn:phase`."""
    found: dict[str, list[object]] = {}
    for axes in figure.axes[:2]:  # type: ignore[attr-defined]
        for container in axes.containers:
            found.setdefault(container.get_label(), []).extend(container.patches)
    return found


def test_picture_has_every_bar_of_every_turn() -> None:
    figure = draw([arm(), arm("vLLM + kvmem")])
    found = bars(figure)
    for played in arm().turns:
        for part in ("tool", "queued", "waiting", "decoding", "computed", "device", "host"):
            assert len(found[f"{played.turn_id}:{part}"]) == 2  # one in each arm's panel


def test_bars_lie_where_the_time_went() -> None:
    one = arm(turns=[turn("lead/1", 2.0, 1.0)])
    found = bars(draw([one, one]))
    spans = {
        name.split(":")[1]: (patch[0].get_x(), patch[0].get_width())  # type: ignore[attr-defined]
        for name, patch in found.items()
    }
    assert spans["tool"] == pytest.approx((2.0, 0.5))
    assert spans["queued"] == pytest.approx((2.5, 0.25))
    assert spans["waiting"] == pytest.approx((2.75, 0.75))
    assert spans["decoding"] == pytest.approx((3.5, 1.0))
    assert spans["device"] == pytest.approx((2.5, 2.0 * 0.32))
    assert spans["host"] == pytest.approx((2.5 + 2.0 * 0.32, 2.0 * 0.32))
    assert spans["computed"] == pytest.approx((2.5 + 2.0 * 0.64, 2.0 * 0.36))


def test_unknown_tier_is_shown_as_unknown() -> None:
    assert shares(turn(host_tokens=None)) == {"computed": 360, "reused": 640}
    assert shares(turn()) == {"computed": 360, "device": 320, "host": 320}
    assert shares(turn(cached_tokens=0, host_tokens=0)) == {"computed": 1000}


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """The same turns drawn twice."""
    saved = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        saved.append(save(draw([arm(), arm("vLLM + kvmem")]), tmp_path / name))
    return saved[0], saved[1]


def test_same_turns_give_the_same_bytes(pictures: tuple[list[Path], list[Path]]) -> None:
    for one, two in zip(*pictures, strict=True):
        assert one.name == two.name
        assert one.read_bytes() == two.read_bytes()


def test_svg_says_its_words_as_text(pictures: tuple[list[Path], list[Path]]) -> None:
    svg = next(p for p in pictures[0] if p.suffix == ".svg").read_text()
    for words in ("worker 1", "prompt: computed", "prompt: reused from the host"):
        assert re.search(re.escape(words), svg)
