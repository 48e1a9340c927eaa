"""The benchmarks' own arithmetic, against examples worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks._fleet import Call, score
from benchmarks._math import (
    SeenPrefixes,
    bandwidth_for_ratio,
    bootstrap_ci,
    gap_s,
    host_bound,
    ideal_cached_tokens,
    live_set_blocks,
    percentile,
    user_gap_s,
)


def seen(*prompts: list[int], block_tokens: int = 4) -> SeenPrefixes:
    prefixes = SeenPrefixes(block_tokens)
    for prompt in prompts:
        prefixes.add(prompt)
    return prefixes


# -- the ideal -------------------------------------------------------------------------------------


def test_an_unseen_prompt_has_no_ideal_hit() -> None:
    assert ideal_cached_tokens(seen(), [1, 2, 3, 4, 5]) == 0


def test_only_whole_blocks_count() -> None:
    # 7 tokens were seen, the first 6 are the same: one block of 4 is whole.
    assert ideal_cached_tokens(seen([1, 2, 3, 4, 5, 6, 7]), [1, 2, 3, 4, 5, 6, 9, 9, 9]) == 4


def test_the_last_token_is_always_computed() -> None:
    # Both blocks were seen, but (8 - 1) // 4 = 1 may be taken; a ninth token frees the second.
    prefixes = seen([1, 2, 3, 4, 5, 6, 7, 8])
    assert ideal_cached_tokens(prefixes, [1, 2, 3, 4, 5, 6, 7, 8]) == 4
    assert ideal_cached_tokens(prefixes, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8


def test_the_longest_of_several_earlier_prompts_counts() -> None:
    prefixes = seen([1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9, 9])
    assert ideal_cached_tokens(prefixes, [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]) == 8


def test_equal_tokens_after_another_prefix_are_another_block() -> None:
    assert ideal_cached_tokens(seen([1, 1, 1, 1, 5, 5, 5, 5]), [5, 5, 5, 5, 0]) == 0


def test_an_empty_prompt_has_no_ideal_hit() -> None:
    assert ideal_cached_tokens(seen([1, 2, 3, 4]), []) == 0


def test_adding_twice_adds_nothing() -> None:
    prefixes = seen([1, 2, 3, 4, 5, 6, 7, 8])
    assert prefixes.add([1, 2, 3, 4, 5, 6, 7, 8, 9]) == 0
    assert prefixes.add([1, 2, 3, 4, 0, 0, 0, 0]) == 1


# -- budgets ---------------------------------------------------------------------------------------


def test_the_live_set_counts_a_shared_prefix_once() -> None:
    # Two prompts share 4 tokens and have a whole block each beyond it: 1 + 2 blocks.
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9]]
    assert live_set_blocks(prompts, 4) == 3


def test_the_live_set_counts_the_unfinished_block_of_each_prompt() -> None:
    assert live_set_blocks([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], 4) == 3
    assert live_set_blocks([[1, 2, 3, 4]], 4) == 1
    assert live_set_blocks([], 4) == 0


def test_the_throttle_keeps_the_ratio_of_load_to_compute() -> None:
    # 1,000 tokens/s computed; a token's load may take 3.9 % of 1 ms = 39 us; 46,080 B in 39 us.
    assert bandwidth_for_ratio(46_080, 1_000.0, 0.039) == pytest.approx(1.1815e9, rel=1e-4)


def test_host_bound_is_the_extra_time_over_the_gather() -> None:
    # 130 MB at 13 GB/s are 10 ms; the hit took 15 ms longer than the engine's own.
    assert host_bound(0.115, 0.100, 130_000_000, 13e9) == pytest.approx(1.5)


# -- statistics ------------------------------------------------------------------------------------


def test_percentile_is_linear_between_ranks() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.95) == pytest.approx(3.85)
    assert percentile([7.0], 0.95) == 7.0
    assert percentile([1.0, 2.0], 1.0) == 2.0


def test_bootstrap_of_equal_values_is_that_value() -> None:
    assert bootstrap_ci([1.02] * 7, seed=1, resamples=200) == (1.02, 1.02)


def test_bootstrap_of_two_values_reaches_both() -> None:
    # A draw of two from {1, 3} has the median 1, 2 or 3 with chances 1/4, 1/2, 1/4.
    assert bootstrap_ci([1.0, 3.0], seed=1, resamples=4_000) == (1.0, 3.0)


def test_bootstrap_of_the_median_of_three_is_that_of_the_binomial() -> None:
    # P(median of a draw = smallest) = P(at least 2 of 3 draws smallest) = 7/27 > 2.5 %.
    # At level 0.3, 35 % lie outside at each end: more than 7/27, so the ends are the middle value.
    assert bootstrap_ci([1.0, 2.0, 5.0], seed=1, resamples=4_000) == (1.0, 5.0)
    assert bootstrap_ci([1.0, 2.0, 5.0], seed=1, resamples=4_000, level=0.3) == (2.0, 2.0)


def test_bootstrap_is_the_same_for_a_seed() -> None:
    values = [1.0, 1.1, 0.9, 1.3, 1.05]
    assert bootstrap_ci(values, seed=3) == bootstrap_ci(values, seed=3)


def test_gaps_pass_through_the_measured_quantiles() -> None:
    assert [gap_s(q) for q in (0.1, 0.5, 0.9, 0.99)] == pytest.approx([4.0, 9.0, 64.0, 980.0])


def test_gaps_are_log_linear_between_quantiles() -> None:
    # Half-way between the quantiles 0.5 (9 s) and 0.9 (64 s): their geometric mean, 24 s.
    assert gap_s(0.7) == pytest.approx(24.0)


# -- an arm's score --------------------------------------------------------------------------------


def call(
    turn: int,
    prompt: list[int],
    *,
    cached: int = 0,
    sent_s: float = 0.0,
    done_s: float = 1.0,
    output: tuple[int, ...] = (0,),
    miss: str | None = None,
) -> Call:
    return Call(
        agent=0,
        turn=turn,
        sent_s=sent_s,
        done_s=done_s,
        ttft_s=0.5,
        prompt=prompt,
        output=list(output),
        cached=cached,
        receipt={"miss": miss} if miss else None,
    )


COMPUTED = "vllm:prompt_tokens_by_source_total/local_compute"


def test_a_reply_counts_as_seen_but_for_its_last_token() -> None:
    # Prompt 3 + reply 2: of 5 tokens 4 have KV, one whole block. The next prompt may take it.
    calls = [
        call(0, [1, 2, 3], output=(4, 5), sent_s=0.0, done_s=1.0),
        call(1, [1, 2, 3, 4, 5, 6], sent_s=2.0, done_s=3.0),
    ]
    result = score(calls, calls, {COMPUTED: 5.0}, block_tokens=4)
    assert (result.ideal, result.computed_over_ideal) == (5, 1.0)


def test_a_reply_that_came_later_is_not_seen() -> None:
    calls = [
        call(0, [1, 2, 3], output=(4, 5), sent_s=0.0, done_s=9.0),
        call(1, [1, 2, 3, 4, 5, 6], sent_s=2.0, done_s=3.0),
    ]
    assert score(calls, calls, {COMPUTED: 9.0}, block_tokens=4).ideal == 9


def test_a_prompt_that_is_being_computed_is_seen() -> None:
    calls = [
        call(0, [1, 2, 3, 4, 5], sent_s=0.0, done_s=9.0),
        call(1, [1, 2, 3, 4, 6], sent_s=2.0, done_s=3.0),
    ]
    assert score(calls, calls, {COMPUTED: 6.0}, block_tokens=4).ideal == 6


@pytest.mark.parametrize(
    ("cached", "miss", "unexplained"),
    [(4, "new", 0), (0, "evicted", 0), (0, "pending", 0), (0, "new", 1), (0, "none", 1)],
)
def test_a_miss_without_a_reason_is_unexplained(cached: int, miss: str, unexplained: int) -> None:
    calls = [
        call(0, [1, 2, 3, 4], sent_s=0.0, done_s=1.0, miss="new"),
        call(1, [1, 2, 3, 4, 5], sent_s=2.0, done_s=3.0, cached=cached, miss=miss),
    ]
    result = score(calls, calls, {COMPUTED: 9.0}, block_tokens=4)
    assert result.misses_unexplained == unexplained


def test_a_prompt_that_is_still_waiting_needs_no_reason() -> None:
    calls = [
        call(0, [1, 2, 3, 4], sent_s=0.0, done_s=9.0, miss="new"),
        call(1, [1, 2, 3, 4, 5], sent_s=2.0, done_s=8.0, miss="new"),
    ]
    assert score(calls, calls, {COMPUTED: 9.0}, block_tokens=4).misses_unexplained == 0


def test_every_output_that_differs_from_the_oracle_is_wrong() -> None:
    oracle = [call(0, [1], output=(5, 6)), call(1, [2], output=(7, 8))]
    arm = [call(0, [1], output=(5, 6)), call(1, [2], output=(7, 9))]
    assert score(arm, oracle, {COMPUTED: 2.0}, block_tokens=4).wrong == 1
    assert score(oracle, oracle, {COMPUTED: 2.0}, block_tokens=4).wrong == 0


def test_arms_that_got_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="agent 0, turn 0"):
        score([call(0, [1])], [call(0, [2])], {COMPUTED: 1.0}, block_tokens=4)


def test_persons_take_as_long_as_they_did() -> None:
    found = [user_gap_s(q) for q in (0.1, 0.5, 0.9, 0.99, 1.0)]
    assert found == pytest.approx([19.0, 126.0, 1114.0, 4195.0, 17000.0])
