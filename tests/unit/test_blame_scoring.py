"""Packed scores on transformers: each candidate's own, cached or cold; nothing lossy is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvmem.engines.transformers import PrefixStore  # noqa: E402
from kvmem.engines.transformers.scoring import CODECS, PackedScorer, through_codec  # noqa: E402
from kvmem.errors import ConfigError  # noqa: E402
from tests.tiny_models import llama, plain, prompt  # noqa: E402

CANDIDATES = [[5], [5, 9, 11], [7, 9], [5, 9, 12, 3]]


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture
def store(model: Any) -> Iterator[PrefixStore]:
    with PrefixStore(model, host_gb=0.02, max_tokens=256) as store:
        yield store


def alone(model: Any, ids: list[int], candidate: list[int]) -> float:
    """By transformers alone, a forward for each candidate."""
    whole = torch.tensor([[*ids, *candidate]])
    with torch.inference_mode():
        logprobs = model(input_ids=whole).logits[0].log_softmax(-1)
    at = len(ids) - 1
    return sum(float(logprobs[at + n, token]) for n, token in enumerate(candidate))


@pytest.mark.parametrize("n_tokens", [1, 15, 16, 17, 100])
def test_packed_scores_are_those_of_each_candidate_alone(
    store: PrefixStore, model: Any, n_tokens: int
) -> None:
    ids = prompt(n_tokens)
    told = PackedScorer(store).score(ids, CANDIDATES)
    wanted = [alone(model, ids, one) for one in CANDIDATES]
    assert told.logprobs == pytest.approx(wanted, abs=1e-4)


def test_cached_and_cold_scores_are_equal_bit_for_bit(store: PrefixStore) -> None:
    scorer, ids = PackedScorer(store), prompt(100)
    cold = scorer.score(ids, CANDIDATES)
    warm = scorer.score(ids, CANDIDATES)
    fresh = scorer.score(ids, CANDIDATES, kv="fresh")
    assert (cold.cached_tokens, warm.cached_tokens, fresh.cached_tokens) == (0, 96, 0)
    assert cold.logprobs == warm.logprobs == fresh.logprobs


def test_kv_that_is_not_the_tokens_own_shows(store: PrefixStore) -> None:
    scorer, ids = PackedScorer(store), prompt(100)
    right = scorer.score(ids, CANDIDATES)
    apart = {
        kv: abs(scorer.score(ids, CANDIDATES, kv=kv).logprobs[1] - right.logprobs[1])
        for kv in ("int8", "int2")
    }
    assert apart["int2"] > 1e-3 > apart["int8"]


def test_nothing_of_lossy_kv_is_kept(store: PrefixStore) -> None:
    scorer, ids = PackedScorer(store), prompt(100)
    before = scorer.score(ids, CANDIDATES)
    n_blocks = store.cache.stats()["published"]
    scorer.score(ids, CANDIDATES, kv="int2")
    longer = prompt(100) + prompt(60, seed=1)
    scorer.score(longer, CANDIDATES, kv="int4")
    with store.open(longer) as cache:
        cache.forget()
        assert cache.kept_tokens == []
        assert cache.keep() == 0
    assert store.cache.stats()["published"] == n_blocks + 3  # the exact ones of the longer prompt
    assert scorer.score(ids, CANDIDATES).logprobs == before.logprobs


@pytest.mark.parametrize("by_channel", [True, False])
def test_more_bits_are_nearer(by_channel: bool) -> None:
    torch.manual_seed(0)
    exact = torch.randn(70, 2, 16)
    apart = []
    for bits in CODECS.values():
        lossy = exact.clone()
        through_codec(lossy, bits, by_channel=by_channel)
        apart.append(float((lossy - exact).abs().mean()))
        dim = 0 if by_channel else 2
        group = lossy[:32] if by_channel else lossy[:1]
        for row in group.movedim(dim, -1).reshape(-1, group.shape[dim]):
            assert len(row.unique()) <= 2**bits
    assert 0 < apart[0] < apart[1] < apart[2]


def test_greedy_samples_are_generates_own_and_seeds_repeat(store: PrefixStore, model: Any) -> None:
    scorer, ids = PackedScorer(store), prompt(40)
    greedy = scorer.sample(ids, max_tokens=8)
    assert list(greedy.ids) == plain(model, ids, 8)[40:]
    hot = [scorer.sample(ids, max_tokens=8, temperature=1.5, seed=s).ids for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_what_cannot_be_scored_is_refused_and_the_lane_comes_back(store: PrefixStore) -> None:
    scorer = PackedScorer(store)
    for prefix, candidates, kv in (
        ([], [[1]], "served"), ([1], [], "served"), ([1], [[]], "served"), ([1], [[1]], "int3"),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            scorer.score(prefix, candidates, kv=kv)
    assert scorer.score([1], [[1]]).prompt_tokens == 1  # the store has one lane
