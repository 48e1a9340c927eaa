"""The labelled set: what broke a conversation is what is said of it, by every route."""

from __future__ import annotations

import pytest

from benchmarks import _corpus, _explain_set
from benchmarks._explain_set import CASES, Scene, false_evicted, outcomes, tally
from benchmarks._explain_world import BLOCK, Conversation, Message, World, conversations
from kvmem.explain.misses.reasons import NAMES

ASKED = {
    "first_time", "input_changed", "tools_changed", "system_changed", "template_rewrote_history",
    "retokenized", "tool_args_reserialized", "context_compacted", "salt_changed",
    "adapter_changed", "weights_changed", "block_floor", "evicted", "demoted_too_slow",
    "tier_error", "quarantined", "disabled_by_request",
}  # fmt: skip


def talk() -> Conversation:
    return next(conversations(None, most=1))


def scene(**changes: object) -> Scene:
    return Scene(talk(), 4, "main", outlines=False, **changes)  # type: ignore[arg-type]


def test_every_reason_that_was_asked_for_has_a_case() -> None:
    expected = {expected for expected, _, _ in CASES.values()}
    assert expected >= ASKED
    assert expected <= set(NAMES)


def test_made_conversations_are_explained_right() -> None:
    found = [one for each in conversations(None, most=2) for one in outcomes(each)]
    assert len(found) > 150
    assert [one for one in found if not one.right] == []
    assert tally(found)["false_evicted"] == tally(found)["unexplained"] == 0


def test_recorded_conversations_are_explained_right() -> None:
    folder = _corpus.trace_folder(None)
    if folder is None:
        pytest.skip("no folder of traces: name one with KVMEM_DATA")
    found = [one for each in conversations(folder, most=3) for one in outcomes(each)]
    figures = tally(found)
    assert figures["accuracy"] >= 0.99, [one for one in found if not one.right]
    assert figures["false_evicted"] == figures["unexplained"] == 0


def test_the_set_sees_a_false_eviction() -> None:
    world, served = _explain_set._evicted(scene())
    assert any(run.reason == "evicted" for run in served.runs)
    assert false_evicted(world, served) == 0
    world.evicted.clear()
    assert false_evicted(world, served) > 0
    world.close()


# -- what is told beside the reason --------------------------------------------------------------


def test_an_edited_message_is_named_with_its_first_differing_token() -> None:
    world, served = _explain_set._edit(scene())
    first = served.runs[0]
    before, _ = world.render(scene().asked)
    same = next(i for i, (a, b) in enumerate(zip(before, served.prompt, strict=False)) if a != b)
    assert (first.token, first.role, first.message) == (same, "user", 2)
    assert first.first == same - same % BLOCK
    world.close()


def test_an_outline_names_the_message_without_decoding() -> None:
    world, served = _explain_set._edit(Scene(talk(), 4, "main", outlines=True))
    assert (served.runs[0].role, served.runs[0].message) == ("user", 2)
    assert served.runs[0].rule == ""  # the namer was not asked
    world.close()


def test_a_compaction_says_its_epoch() -> None:
    world, served = _explain_set._compacted(Scene(talk(), 4, "main", outlines=True))
    assert (served.runs[0].reason, served.runs[0].epoch) == ("context_compacted", 1)
    world.close()


def test_what_follows_the_change_is_first_time_where_nobody_had_it() -> None:
    world, served = _explain_set._edit(scene())
    assert [run.reason for run in served.runs] == ["input_changed", "first_time", "block_floor"]
    old = len(world.render(scene().asked)[0]) + len(world.reply(scene().asked, scene().answer))
    # Only what the earlier prompt had there was lost by the change.
    assert served.runs[1].first == (old - 1) // BLOCK * BLOCK
    world.close()


def test_a_block_that_left_says_when_from_where_and_for_whom() -> None:
    world, served = _explain_set._evicted(scene())
    left = served.runs[0]
    assert (left.tier, left.policy, left.at_s) == ("host", "lru", world.now[0])
    assert left.for_request.startswith("r")
    world.close()


def test_estimates_are_tokens_at_the_speed_of_prefill() -> None:
    world, served = _explain_set._edit(scene())
    for run in served.runs:
        assert run.ms == round(run.tokens * world.explainer.pace.s_per_token * 1e3, 3)
    world.close()


# -- never across tenants (I11) ------------------------------------------------------------------


def fill(world: World, salt: str) -> None:
    for n in range(20):
        filler = Conversation(f"Filler {n}", ("{}",), (Message("user", "word " * 1000),))
        world.serve(filler, session=f"other-{n}", salt=salt)


def test_a_block_that_made_room_for_another_salt_was_evicted_and_no_more() -> None:
    for salt, told in (("a", True), ("b", False)):
        world = World(n_slots=1024)
        world.serve(scene().asked, scene().answer, session="main", salt="a")
        fill(world, salt)
        left = world.serve(scene().next, session="main", salt="a").runs[0]
        assert left.reason == "evicted"
        assert bool(left.for_request) is told
        assert bool(left.at_s) is told
        world.close()


@pytest.mark.parametrize("session", ["", "another"])
def test_the_same_prompt_under_another_salt_is_first_time(session: str) -> None:
    """Neither hash, nor token, nor message of another salt's prompt shows in a reason."""
    world = World()
    world.serve(scene().asked, scene().answer, session="main" if session else "", salt="a")
    other, never = (
        one.serve(scene().next, session=session, salt="b").runs for one in (world, World())
    )
    assert other == never
    assert {run.reason for run in other} == {"first_time", "block_floor"}
    world.close()


def test_a_changed_salt_says_the_same_whatever_was_asked_under_the_other() -> None:
    said = []
    for asked in (scene().asked, Conversation("Else", ("{}",), (Message("user", "Else. " * 50),))):
        world = World()
        world.serve(asked, session="main", salt="a")
        said.append(world.serve(scene().next, session="main", salt="b").runs)
        world.close()
    assert said[0] == said[1]
    assert said[0][0].reason == "salt_changed"
