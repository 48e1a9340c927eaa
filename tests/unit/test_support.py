"""What this version does not serve is refused at start, with the flag to change."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from kvmem.engines.vllm import interface, support
from kvmem.errors import UnsupportedEngine


def engine_config(**changes: Any) -> Any:
    """The parts of a VllmConfig that are looked at, as a served engine has them."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        kv_transfer_config=SimpleNamespace(kv_role="kv_both", engine_id="8c0f"),
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"),
        lora_config=None,
        speculative_config=None,
    )
    for path, value in changes.items():
        target, *rest = path.split("__")
        if rest:
            setattr(getattr(config, target), rest[0], value)
        else:
            setattr(config, target, value)
    return config


def test_the_plain_engine_is_served() -> None:
    support.check_engine(engine_config())


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("parallel_config__tensor_parallel_size", 2),
        ("speculative_config", SimpleNamespace(method="ngram")),
    ],
)
def test_what_is_served_beside_the_plain_engine(change: str, value: Any) -> None:
    support.check_engine(engine_config(**{change: value}))


@pytest.mark.parametrize(
    ("change", "value", "flag"),
    [
        ("parallel_config__pipeline_parallel_size", 2, "--pipeline-parallel-size"),
        ("parallel_config__data_parallel_size", 2, "--data-parallel-size"),
        ("parallel_config__decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("speculative_config", SimpleNamespace(method="eagle"), "--speculative-config"),
        ("cache_config__prefix_caching_hash_algo", "xxhash", "--prefix-caching-hash-algo"),
        ("kv_transfer_config__kv_role", "kv_producer", "kv_both"),
        ("kv_transfer_config__engine_id", "8c0f_dp1", "--data-parallel-size"),
    ],
)
def test_what_is_not_served_names_its_flag(change: str, value: Any, flag: str) -> None:
    with pytest.raises(UnsupportedEngine, match=flag):
        support.check_engine(engine_config(**{change: value}))


@pytest.mark.parametrize(
    ("change", "value", "flag"),
    [
        ("pipeline_parallel_size", 2, "--pipeline-parallel-size"),
        ("data_parallel_size", 2, "--data-parallel-size"),
        ("speculative_config", {"model": "a-draft"}, "--speculative-config"),
        ("prefix_caching_hash_algo", "xxhash", "--prefix-caching-hash-algo"),
    ],
)
def test_what_is_not_served_is_seen_in_the_flags_too(change: str, value: Any, flag: str) -> None:
    plain = {
        "tensor_parallel_size": 2,
        "speculative_config": None,
        "prefix_caching_hash_algo": "sha256",
    }
    support.check_flags(Namespace(**plain))
    with pytest.raises(UnsupportedEngine, match=flag):
        support.check_flags(Namespace(**{**plain, change: value}))


def test_a_connector_that_was_named_past_its_entry_asks_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interface, "_lacks_here", lambda: ("Request.block_hashes",))
    with pytest.raises(UnsupportedEngine, match=r"lacks Request\.block_hashes"):
        support.check_engine(engine_config())
