"""What this version serves; everything else is refused at start, with the flag to change.

What it needs of vLLM itself is another question, with another answer: `interface`.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from kvmem.engines.vllm import interface
from kvmem.errors import UnsupportedEngine

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["check_engine", "check_flags", "refuse"]


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuses what this version does not serve yet.

    Raises:
        UnsupportedEngine: naming the flag and what to do.
    """
    from vllm.platforms import current_platform

    interface.check()  # the connector may have been named by its own module, past `entry`
    transfer = vllm_config.kv_transfer_config
    if not current_platform.is_cpu():
        refuse(f"device {current_platform.device_type!r}", "Use vLLM's CPU build.")
    if transfer is not None and transfer.kv_role != "kv_both":
        refuse(f"kv_role {transfer.kv_role!r}", 'Set "kv_role": "kv_both".')
    if transfer is not None and re.search(r"_dp[0-9]+$", str(transfer.engine_id)):
        # vLLM tells each engine of several that it is alone, and marks its id.
        refuse("--data-parallel-size above 1", "Set --data-parallel-size 1.")
    _check_features(
        vllm_config.parallel_config,
        speculative=getattr(vllm_config.speculative_config, "method", None),
        hash_algorithm=vllm_config.cache_config.prefix_caching_hash_algo,
    )


def check_flags(arguments: Namespace) -> None:
    """Refuses the flags that `check_engine` would, before vLLM judges what they come to.

    Raises:
        UnsupportedEngine: naming the flag and what to do.
    """
    _check_features(
        arguments,
        speculative=_method_of(arguments.speculative_config),
        hash_algorithm=arguments.prefix_caching_hash_algo,
    )


def _method_of(speculative_config: object) -> str | None:
    if isinstance(speculative_config, Mapping):  # as given: vLLM finds the method by the model
        return str(speculative_config.get("method", "a draft model"))
    return getattr(speculative_config, "method", None)


def _check_features(parallel: object, *, speculative: str | None, hash_algorithm: str) -> None:
    for name, flag in (
        ("pipeline_parallel_size", "--pipeline-parallel-size"),
        ("data_parallel_size", "--data-parallel-size"),
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        size = getattr(parallel, name, 1)
        if size != 1:
            refuse(f"{flag} {size}", f"Set {flag} 1.")
    if speculative not in (None, "ngram"):  # it drafts from the prompt: no KV of its own
        refuse(
            f"speculative decoding by {speculative}",
            'Set --speculative-config \'{"method": "ngram", ...}\', or leave it out.',
        )
    if hash_algorithm not in ("sha256", "sha256_cbor"):
        refuse(
            f"--prefix-caching-hash-algo {hash_algorithm} (its collisions can be made on purpose)",
            "Set --prefix-caching-hash-algo sha256.",
        )


def refuse(what: str, next_step: str) -> NoReturn:
    """Ends the start, since kvmem does not serve `what`.

    Raises:
        UnsupportedEngine: always.
    """
    raise UnsupportedEngine(
        f"kvmem's vLLM connector does not serve {what} yet",
        next_step=f"{next_step} Or start vLLM without kvmem.".lstrip(),
        feature=what,
    )
