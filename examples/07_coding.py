"""A coding agent on a vLLM server: long tool results go to files, a stub stands in the prompt."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from kvmem.agents import sync, tool
from kvmem.context import BlobStore

CODE = "".join(f"def step_{n}(x):\n    return x + {n}\n\n\n" for n in range(600))
folder = Path(tempfile.mkdtemp(prefix="coding-"))
(folder / "steps.py").write_text(CODE)
results = BlobStore(folder / "results")


@tool
def read_file(name: Annotated[str, Meta(max_length=24)]) -> str:
    """Reads a file of the project, steps.py."""
    text = (folder / "steps.py").read_text()
    return results.put(text, preview_chars=120).text


@tool
def grep(text: Annotated[str, Meta(max_length=24)]) -> str:
    """Finds the lines of steps.py that hold a text."""
    found = [line for line in CODE.splitlines() if text in line]
    told = "\n".join(found) or "no line holds it"
    return told if len(told) < 400 else results.put(told, preview_chars=120).text


url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000")
system = "You are a coding agent. Look before you answer, and answer in one short sentence. " * 6
with sync.Runtime(url, max_tokens=48, fields={"temperature": 0}) as runtime:
    coder = runtime.session("coder", system=system, tools=[read_file, grep])
    for allow in ("read_file", "grep"):  # the prompt's tools stay; only one may be called now
        print(coder.run("What does step_7 do?", mode="required", allow=allow).text)

    kept = sum(one.stat().st_size for one in (folder / "results").rglob("*") if one.is_file())
    print(f"{kept:,} bytes of results are in files; the prompt is {coder.ledger.n_tokens:,} tokens")
    print(coder)
