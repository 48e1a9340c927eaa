"""What kvmem tells of itself, for those who watch it: figures, spans, log lines, a live snapshot.

    metrics      the catalogue: every metric's name, labels and bounds
    meter        counts what goes over the bus
    live         one struct that says how an engine stands now; all pages and exporters read it
    prometheus   the snapshot as Prometheus metrics
    spans        a request as an OpenTelemetry span, in its caller's trace
    logs         events as lines of JSON

Nothing here knows a tier, an index or an engine. Whoever owns them fills the snapshot's tiers and
hands in its bus. Nothing here is text of a prompt, and no label names a session or a salt (I11).
"""

from kvmem.telemetry.live import Snapshot
from kvmem.telemetry.meter import Meter
from kvmem.telemetry.metrics import METRICS

__all__ = ["METRICS", "Meter", "Snapshot"]
