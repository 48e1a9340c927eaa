"""Scores from a vLLM server, over HTTP: every candidate forced, one token a request.

`prompt_logprobs` would score a whole prompt at once, and turns the reading of the prefix cache off
for it. So the candidates are laid out as a tree of tokens; each of its inner nodes is a prompt that
is cached but for its last block, and is asked for one token with the logprobs of its branches
(`logprob_token_ids`, in vLLM from 0.32 on). The root goes first, the others together.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvmem.blame.scorer import FRESH, SERVED
from kvmem.errors import ConfigError, EngineError
from kvmem.types import Sampled, Scored

if TYPE_CHECKING:
    import httpx

__all__ = ["ServedScorer"]

COMPLETIONS = "/v1/completions"
TIMEOUT_S = 600.0
MOST_PROMPTS = 64  # in one request
MOST_BRANCHES = 128  # token ids that vLLM gives the logprobs of in one request


class ServedScorer:
    """`kvmem.blame`'s scorer and sampler on a vLLM server. One thread uses it.

    KV that is "fresh" is computed under a salt that only this scorer knows, once for all arms that
    begin the same way; nothing that another salt has can answer it (I11).

    Args:
        url: the server, with or without `/v1`.
        model: its name there; "" asks for the first one.
        api_key: where it wants one.
        transport: instead of the network, for tests.

    Raises:
        ConfigError: httpx is not installed, or the address is none.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        api_key: str = "",
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise ConfigError(
                "A server is asked through httpx, which is not installed",
                next_step="Run `pip install 'kvmem[agents]'`.",
            ) from error
        base = url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise ConfigError(
                f"{url!r} is no address of a server", next_step="Give one like http://127.0.0.1:8000."
            )  # fmt: skip
        self._failures: tuple[type[Exception], ...] = (httpx.HTTPError, httpx.InvalidURL)
        self._client = httpx.Client(
            base_url=base, timeout=TIMEOUT_S, transport=transport,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )  # fmt: skip
        self._own_salt = f"kvmem.blame.{uuid.uuid4().hex}"  # vLLM takes no slash in one
        self._model = model

    def score(
        self,
        prefix_ids: Sequence[int],
        candidates: Sequence[Sequence[int]],
        *,
        kv: str = SERVED,
        salt: str = "",
    ) -> Scored:
        """See `kvmem.blame.scorer.Scorer`; `kv` is "served" or "fresh".

        Raises:
            ConfigError: another `kv`, or a candidate or the prompt is empty.
            EngineError: the server did not answer, refused, or left a logprob out.
        """
        if not prefix_ids or not candidates or not all(candidates):
            raise ConfigError(
                "A score needs a prompt and candidates of at least one token each",
                next_step="Leave empty answers out.",
            )
        begin = time.perf_counter()
        prefix = [int(i) for i in prefix_ids]
        tree = _tree(candidates)
        found: dict[tuple[int, ...], dict[int, float]] = {}
        cached = 0
        nodes = sorted(tree, key=len)
        for group in ([nodes[0]], *_groups(nodes[1:])):
            wanted = sorted({token for node in group for token in tree[node]})
            for first in range(0, len(wanted), MOST_BRANCHES):
                part = wanted[first : first + MOST_BRANCHES]
                told = self._ask(
                    self._body(
                        [[*prefix, *node] for node in group], kv, salt, max_tokens=1,
                        temperature=0.0, logprobs=1, logprob_token_ids=part,
                        return_tokens_as_token_ids=True, ignore_eos=True,
                    )
                )  # fmt: skip
                for node, step in zip(group, _steps(told, len(group)), strict=True):
                    found.setdefault(node, {}).update(step)
                if not group[0]:
                    cached = max(cached, _cached(told))
        sums = tuple(_sum(found, candidate) for candidate in candidates)
        return Scored(sums, len(prefix), cached, time.perf_counter() - begin)

    def sample(
        self,
        prefix_ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        kv: str = SERVED,
        salt: str = "",
    ) -> Sampled:
        """See `kvmem.blame.scorer.Sampler`; errors as in `score`."""
        begin = time.perf_counter()
        prefix = [int(i) for i in prefix_ids]
        told = self._ask(
            self._body(
                [prefix], kv, salt, max_tokens=max_tokens, temperature=temperature, seed=seed,
                return_token_ids=True,
            )
        )  # fmt: skip
        ids = told["choices"][0].get("token_ids")
        if not isinstance(ids, list):
            raise _unexpected("no token ids")
        return Sampled(tuple(ids), len(prefix), _cached(told), time.perf_counter() - begin)

    def close(self) -> None:
        """Ends its connections."""
        self._client.close()

    def _body(self, prompts: list[list[int]], kv: str, salt: str, **fields: Any) -> dict[str, Any]:
        if kv not in (SERVED, FRESH):
            raise ConfigError(
                f"A server does not serve KV {kv!r} when it is asked to",
                next_step="Replay it with --engine transformers.",
                setting="kv",
            )
        if not self._model:
            self._model = self._first_model()
        body: dict[str, Any] = {
            "model": self._model, "prompt": prompts, "add_special_tokens": False, **fields,
        }  # fmt: skip
        salt = self._own_salt if kv == FRESH else salt
        if salt:
            body["cache_salt"] = salt
        return body

    def _first_model(self) -> str:
        try:
            return str(self._client.get("/v1/models").json()["data"][0]["id"])
        except (*self._failures, ValueError, KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"{self._client.base_url} names no model: {error}",
                next_step="Is a server running there, and is --api-key right?",
            ) from error

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            told = self._client.post(COMPLETIONS, json=body)
            answer = told.json()
        except (*self._failures, ValueError) as error:
            raise EngineError(
                f"{self._client.base_url} does not answer: {error or type(error).__name__}",
                next_step="Is the server still running?",
            ) from error
        if told.status_code != 200 or not isinstance(answer, dict) or "choices" not in answer:
            raise EngineError(
                f"{self._client.base_url} refuses a replay: HTTP {told.status_code}, {answer}",
                next_step="Is the prompt longer than the server's --max-model-len?",
                status=told.status_code,
            )
        return answer


def _tree(candidates: Sequence[Sequence[int]]) -> dict[tuple[int, ...], set[int]]:
    """Each beginning of a candidate, and the tokens that follow it in some."""
    tree: dict[tuple[int, ...], set[int]] = {}
    for candidate in candidates:
        ids = [int(i) for i in candidate]
        for n, token in enumerate(ids):
            tree.setdefault(tuple(ids[:n]), set()).add(token)
    return tree


def _groups(nodes: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    return [nodes[i : i + MOST_PROMPTS] for i in range(0, len(nodes), MOST_PROMPTS)]


def _steps(told: dict[str, Any], n: int) -> list[dict[int, float]]:
    """Of each prompt, in their order, the logprobs of its next token by token id."""
    choices = sorted(told["choices"], key=lambda c: int(c.get("index", 0)))
    if len(choices) != n:
        raise _unexpected(f"{len(choices)} choices for {n} prompts")
    found = []
    for choice in choices:
        top = ((choice.get("logprobs") or {}).get("top_logprobs") or [None])[0]
        if not isinstance(top, dict):
            raise _unexpected("no logprobs")
        found.append({int(k.removeprefix("token_id:")): float(v) for k, v in top.items()})
    return found


def _sum(found: dict[tuple[int, ...], dict[int, float]], candidate: Sequence[int]) -> float:
    ids = [int(i) for i in candidate]
    total = 0.0
    for n, token in enumerate(ids):
        step = found[tuple(ids[:n])]
        if token not in step:
            raise _unexpected(f"no logprob of token {token}")
        total += step[token]
    return total


def _cached(told: dict[str, Any]) -> int:
    details = (told.get("usage") or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def _unexpected(what: str) -> EngineError:
    return EngineError(
        f"The server's answer to a replay has {what}",
        next_step="vLLM from 0.32 on is needed (`logprob_token_ids`).",
    )
