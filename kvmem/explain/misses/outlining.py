"""A ledger's outline, to be sent with its request."""

from __future__ import annotations

from kvmem.context import Ledger
from kvmem.explain.misses.outline import Outline, OutlineSpan, digests_of

__all__ = ["outline_of"]


def outline_of(ledger: Ledger) -> str:
    """What a ledger's prompt is made of, so that the engine can name the message that changed:

        ledger.request(kv_transfer_params={"kvmem": {"outline": outline_of(ledger)}})

    Roles, lengths and digests, no text. Cost: a hash for each message.
    """
    spans = []
    for span in ledger.spans:
        said, form = digests_of(span.message)
        spans.append(
            OutlineSpan(span.role, span.stop, said, form, sampled=span.source == "sampled")
        )
    return Outline.make(
        epoch=ledger.epoch, system=ledger.system, tools=ledger.tools, spans=spans
    ).text()
