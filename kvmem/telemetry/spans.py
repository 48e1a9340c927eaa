"""A request's part in kvmem as one OpenTelemetry span, in the trace of whoever sent the request.

Only opentelemetry-api is used: whoever runs the process sets a provider (vLLM does, with
`--otlp-traces-endpoint`), and without one nothing is made. Names are those of the semantic
conventions for generative AI where they have one; what they have none for begins with `kvmem.`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvmem import events

__all__ = ["NAME", "tell"]

NAME = "kvmem.prefix"
PROVIDER = "vllm"
_PROPAGATOR = TraceContextTextMapPropagator()


def tell(
    headers: Mapping[str, str],
    one: events.Answered,
    misses: Sequence[Mapping[str, Any]],
    *,
    model: str,
    tracer: Tracer | None = None,
) -> None:
    """Makes the span of a request that is over, below the caller's.

    Args:
        headers: the request's, with `traceparent`.
        one: what became of it.
        misses: the runs that were computed, as its receipt has them; each is an event of the span.
        model: that was asked.
        tracer: whose; None for the process's own.
    """
    tracer = tracer or trace.get_tracer("kvmem")
    attributes: dict[str, str | int | float] = {
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.id": one.request_id,
        "gen_ai.usage.input_tokens": one.prompt,
        "gen_ai.usage.cache_read.input_tokens": one.prompt - one.computed,
        "kvmem.tokens.device": one.device,
        "kvmem.tokens.host": one.host,
        "kvmem.tokens.disk": one.disk,
        "kvmem.tokens.far": one.far,
        "kvmem.tokens.computed": one.computed,
        "kvmem.wait.disk_seconds": one.disk_s,
        "kvmem.wait.far_seconds": one.far_s,
        "kvmem.wait.load_seconds": one.load_s,
        "kvmem.store_seconds": one.store_s,
    }
    if one.session:
        attributes["gen_ai.conversation.id"] = one.session
    span = tracer.start_span(
        NAME,
        context=_PROPAGATOR.extract(headers),
        kind=SpanKind.INTERNAL,
        attributes=attributes,
        start_time=int(one.began_s * 1e9),
    )
    for run in misses:
        about = {f"kvmem.miss.{name}": value for name, value in run.items() if value is not None}
        span.add_event("kvmem.miss", about, timestamp=int(one.began_s * 1e9))
    span.end(int(one.ended_s * 1e9))
