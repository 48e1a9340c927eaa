"""The page on vLLM's own server, over the engine that is behind it."""

from __future__ import annotations

import json

import httpx
import pytest

from kvmem.demo.server import Server
from tests.e2e.host import BLOCK

pytestmark = [pytest.mark.engine, pytest.mark.slow]

N_TOKENS = 5 * BLOCK


def test_the_page_of_a_served_engine_shows_its_prompts(served: Server) -> None:
    with httpx.Client(base_url=served.url, timeout=120) as client:
        asked = {
            "model": "smol", "prompt": list(range(1000, 1000 + N_TOKENS)), "max_tokens": 1,
            "session_id": "looked-at", "return_token_ids": True,
        }  # fmt: skip
        assert client.post("/v1/completions", json=asked).status_code == 200
        page = client.get("/kvmem", follow_redirects=True)
        assert page.status_code == 200
        assert "Prefix tree" in page.text
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert client.get("/kvmem/static/main.js").status_code == 200
        assert len(client.get("/kvmem/api/engines").json()) == 1
        found = client.get("/kvmem/api/search", params={"text": "looked-at"}).json()["chains"]
        assert [session for session, _ in found] == ["looked-at"]
        tree = client.get("/kvmem/api/tree", params={"node": found[0][1]}).json()["nodes"]
        *_, start, blocks, _, prompts = tree[0][:6]
        assert (start + blocks, prompts) == (N_TOKENS // BLOCK, 1)
        with client.stream("GET", "/kvmem/api/stream") as stream:
            told = next(line for line in stream.iter_lines() if line.startswith("data:"))
    overview = json.loads(told.removeprefix("data:"))
    assert overview["tokens"]["computed"] >= N_TOKENS - 1
    assert {tier["tier"]["name"] for tier in overview["tiers"]} >= {"host"}
