"""The models table of docs/vllm.md, made from the engine matrix's `MODELS`.

`python -m tests.docs.models_table` writes it into the page.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks._matrix_setups import MODELS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "vllm.md"
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->"
SERVED = {"right": "yes", "refused": "refused at start", "not run": "not by vLLM itself"}


def table() -> str:
    """One row a model, in the order of `MODELS`."""
    rows = ["| model | keeps KV as | served | notes |", "| --- | --- | --- | --- |"]
    for name, model in MODELS.items():
        notes = [model.why, model.limit and f"vLLM needs {model.limit}"]
        notes += [model.unless and f"served where the CPU has `{model.unless}`"]
        row = (name, model.keeps, SERVED[model.verdict], "; ".join(filter(None, notes)))
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows) + "\n"


def in_page(text: str) -> str:
    """The table as the page has it."""
    return text.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + in_page(page), BEGIN + table()))
