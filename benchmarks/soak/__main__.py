"""The command line of the soak."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

from benchmarks import soak as about
from benchmarks._process import exit_on_sigterm
from benchmarks._report import finish
from benchmarks.soak.plan import LONG_MINUTES, SHORT_MINUTES, Plan
from benchmarks.soak.run import run
from kvmem.demo import model as demo_model


def main() -> None:
    """Runs the soak and prints the line."""
    parser = argparse.ArgumentParser(
        description=about.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=LONG_MINUTES, help="of traffic")
    parser.add_argument(
        "--short", action="store_const", dest="minutes", const=SHORT_MINUTES, help="five minutes"
    )
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seed", type=int, default=20_261_126)
    parser.add_argument("--adapters", type=int, default=2, help="LoRA adapters beside the model")
    parser.add_argument("--folder", type=Path, help="keep the servers' logs here")
    args = parser.parse_args()
    exit_on_sigterm()
    model = demo_model.ensure(print)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmem-soak-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        plan = Plan(
            minutes=args.minutes,
            folder=folder,
            streams=args.streams,
            seed=args.seed,
            adapters=args.adapters,
        )
        result = run(plan, model, lambda line: print(line, flush=True))
    finish({**result.line(), "trouble": result.trouble})
    sys.exit(1 if result.trouble else 0)


if __name__ == "__main__":
    main()
