"""The soak's judge: a wrong answer is seen; a tie of the last bits is none, but looked behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from benchmarks.soak.asks import Answer, Ask, Call
from benchmarks.soak.oracle import DRIFT, TIE, Judge, Judgement

PROMPT = (5, 6, 7)


def right(ask: Ask) -> list[int]:
    """What a model of the tests' own says: decided by the adapter and all tokens so far."""
    tokens = list(ask.prompt)
    for _ in range(ask.n_tokens):
        tokens.append((31 * sum(tokens) + len(tokens) + len(ask.adapter or "")) % 997)
    return tokens[len(ask.prompt) :]


def answer(
    tokens: Sequence[int], *, rival: int = -1, by: float = 1.0, shift: float = 0.0
) -> Answer:
    """An answer whose second-best token is `rival` everywhere, less likely by `by`."""
    best = [{token: -0.5 + shift, rival: -0.5 + shift - by} for token in tokens]
    return Answer(list(tokens), [-0.5 + shift] * len(tokens), best)


class Oracle:
    """The engine without kvmem; `close` gives the rival at one place of one answer."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        self.rivals: dict[tuple[int, ...], tuple[int, int, float]] = {}

    async def __call__(self, ask: Ask) -> Answer:
        self.asked.append(ask)
        given = answer(right(ask))
        if ask.prompt in self.rivals:
            place, rival, by = self.rivals[ask.prompt]
            given.best[place] = {given.tokens[place]: -0.5, rival: -0.5 - by}
        return given


def judged(oracle: Oracle, *calls: Call) -> Judgement:
    return asyncio.run(Judge(oracle, lambda done, of: None).judge(calls))


def asked(n_tokens: int = 6, **more: object) -> Ask:
    return Ask(kind="short", prompt=PROMPT, n_tokens=n_tokens, **more)  # type: ignore[arg-type]


def test_right_answers_are_right() -> None:
    ask = asked()
    result = judged(Oracle(), Call(ask, answer(right(ask))))
    assert (result.calls, result.wrong, result.near_ties, result.drift) == (1, [], 0, 0.0)


@pytest.mark.parametrize("place", [0, 3, 5])
def test_one_wrong_token_is_wrong_and_told_where(place: int) -> None:
    ask = asked()
    tokens = right(ask)
    tokens[place] += 1
    (wrong,) = judged(Oracle(), Call(ask, answer(tokens))).wrong
    assert (wrong.ask, wrong.place) == (ask, place)


def test_each_request_is_asked_once_and_every_call_is_compared() -> None:
    oracle, ask = Oracle(), asked()
    good, bad = answer(right(ask)), answer([t + 1 for t in right(ask)])
    result = judged(oracle, Call(ask, good), Call(ask, bad), Call(ask, good))
    assert (result.calls, result.distinct, len(oracle.asked)) == (3, 1, 1)
    assert len(result.wrong) == 1


def test_salts_and_wishes_do_not_change_what_is_right() -> None:
    oracle = Oracle()
    same = [asked(), asked(salt="tenant-a"), asked(load=False), asked(store=False, stream=True)]
    result = judged(oracle, *(Call(ask, answer(right(ask))) for ask in same))
    assert (result.distinct, result.wrong) == (1, [])
    assert (oracle.asked[0].salt, oracle.asked[0].stream) == (None, False)


def test_the_answer_of_another_adapter_is_wrong() -> None:
    base, adapted = asked(), asked(adapter="adapter-0")
    assert right(base) != right(adapted)
    result = judged(Oracle(), Call(adapted, answer(right(base))))
    assert (result.distinct, len(result.wrong)) == (1, 1)


def test_a_logprob_that_is_off_is_wrong_though_every_token_is_the_same() -> None:
    ask = asked()
    (wrong,) = judged(Oracle(), Call(ask, answer(right(ask), shift=2 * DRIFT))).wrong
    assert "logprob" in wrong.why
    rounding = judged(Oracle(), Call(ask, answer(right(ask), shift=DRIFT / 2)))
    assert rounding.wrong == []
    assert rounding.drift == pytest.approx(DRIFT / 2)


# -- ties ------------------------------------------------------------------------------------------


def tied(place: int, *, ours_by: float, theirs_by: float) -> tuple[Oracle, Ask, Answer]:
    """An answer that took another token at `place`, and is right after it."""
    oracle, ask = Oracle(), asked()
    tokens = right(ask)
    taken, other = tokens[place], tokens[place] + 1
    begun = [*tokens[:place], other]
    whole = begun + right(ask.after(begun))
    ours = answer(whole)
    ours.best[place] = {other: -0.5, taken: -0.5 - ours_by}
    oracle.rivals[ask.prompt] = (place, other, theirs_by)
    return oracle, ask, ours


@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_tie_is_no_wrong_answer_and_is_counted(place: int) -> None:
    oracle, ask, ours = tied(place, ours_by=TIE / 2, theirs_by=TIE / 2)
    result = judged(oracle, Call(ask, ours))
    assert (result.wrong, result.near_ties) == ([], 1)


@pytest.mark.parametrize(("ours_by", "theirs_by"), [(2 * TIE, 0.0), (0.0, 2 * TIE)])
def test_a_tie_is_one_only_if_both_engines_say_so(ours_by: float, theirs_by: float) -> None:
    oracle, ask, ours = tied(3, ours_by=ours_by, theirs_by=theirs_by)
    result = judged(oracle, Call(ask, ours))
    assert (len(result.wrong), result.near_ties) == (1, 0)


def test_what_follows_a_tie_is_compared_too() -> None:
    oracle, ask, ours = tied(2, ours_by=0.0, theirs_by=0.0)
    ours.tokens[4] += 1
    (wrong,) = judged(oracle, Call(ask, ours)).wrong
    assert wrong.place == 4
    assert oracle.asked[1].prompt == (*PROMPT, *ours.tokens[:3])


def test_an_oracle_that_fails_is_no_agreement() -> None:
    async def broken(ask: Ask) -> Answer:
        raise ConnectionError("gone")

    ask = asked()
    with pytest.raises(ExceptionGroup):
        asyncio.run(Judge(broken, lambda *_: None).judge([Call(ask, answer(right(ask)))]))
