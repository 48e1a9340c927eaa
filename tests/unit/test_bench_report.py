"""The benchmarks' report: aims as the page states them, runs kept and gone on with, all shown."""

from __future__ import annotations

import json
import stat
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.__main__ import run_all
from benchmarks._page import Aim, Benchmark, benchmarks
from benchmarks._report_page import Run, as_html, as_markdown

PAGE = """
| benchmark | question |
| --- | --- |
| `bench_a` | how fast is a? |
| `bench_b` | is b right? |

## Keys

**bench_a**: words.

| key | meaning | aim |
| --- | --- | --- |
| `speed`, `other` | how | at least 1,000.5 |
| `seconds` | how long | at most 2 |
| `wrong` | answers | 0 |
| `ok` | yes | true |
| `free` | no aim | lower |

**bench_b**: `x_vs_y` (at least
1.6) and `z` beside it.

## Soak
"""


def test_aims_are_what_the_page_states() -> None:
    a, b = benchmarks(PAGE)
    assert (a.name, a.question) == ("bench_a", "how fast is a?")
    assert a.keys["speed"] == a.keys["other"] == Aim("at least", 1000.5, "at least 1,000.5")
    assert a.keys["seconds"] == Aim("at most", 2.0, "at most 2")
    assert a.keys["wrong"] == Aim("exact", 0.0, "0")
    assert a.keys["ok"] == Aim("exact", True, "true")
    assert a.keys["free"] is None
    assert b.keys == {"x_vs_y": Aim("at least", 1.6, "at least 1.6"), "z": None}


def test_the_real_page_has_aims_for_what_must_be_reached() -> None:
    found = {b.name: b.keys for b in benchmarks()}
    assert found["bench_disk"]["read_vs_fio"] == Aim("at least", 0.95, "at least 0.95")
    assert found["bench_faults"]["wrong"] == Aim("exact", 0.0, "0")
    assert all(keys for keys in found.values())


@pytest.mark.parametrize(
    ("aim", "value", "met"),
    [
        ("at least 2", 2, True), ("at least 2", 1.99, False), ("at most 2", 2.0, True),
        ("at most 2", 2.01, False), ("0", 0, True), ("0", 1, False), ("true", True, True),
        ("true", False, False), ("at least 2", "fast", None), ("true", 1, False),
        ("at least 1", True, False),
    ],
)  # fmt: skip
def test_an_aim_is_met_or_missed(aim: str, value: object, met: bool | None) -> None:
    read = Aim.read(aim)
    assert read is not None
    assert read.met(value) is met


A, B = benchmarks(PAGE)
RUN = Run(
    name="bench_a", command="python -m benchmarks.bench_a", state="done", seconds=3.0, note="",
    environment={"commit": "abc", "machine": "<b>"}, finished="2026-01-01 00:00 UTC",
    result={"speed": 2001.0, "seconds": {"ours": 1.0, "theirs": 3.0}, "wrong": 0, "free": "x"},
)  # fmt: skip


def test_the_report_marks_what_is_met_and_missed() -> None:
    text = as_markdown([(A, RUN), (B, None)], "title")
    assert "| speed | 2,001.0 | at least 1,000.5 | met |" in text
    assert "| seconds, theirs | 3.0 | at most 2 | missed |" in text
    assert "1 done, 1 not run yet; of 4 aims 3 met, 1 not." in text
    assert "Not run yet." in text


class _Balanced(HTMLParser):
    """Fails on an end without its beginning; notes addresses outside the page."""

    VOID = frozenset({"meta", "br", "path", "use", "rect", "th"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.outside += [
            value for name, value in attrs
            if name in ("src", "href") and value and not value.startswith("#")
        ]  # fmt: skip

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_needs_nothing_else_and_has_its_pictures() -> None:
    page = as_html([(A, RUN), (B, None)], "a & b")
    parser = _Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.outside == []
    assert "a &amp; b" in page
    assert "&lt;b&gt;" in page
    assert page.count("<svg") == 1


def programs(folder: Path, **sources: str) -> dict[str, list[str]]:
    commands = {}
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
        commands[name] = [sys.executable, str(folder / f"{name}.py")]
    return commands


COUNTING = """
import json, pathlib
at = pathlib.Path(__file__).with_suffix(".count")
n = int(at.read_text()) + 1 if at.exists() else 1
at.write_text(str(n))
print("a table")
print(json.dumps({"environment": {"commit": "abc"}}))
print(json.dumps({"speed": n}))
"""


def run(folder: Path, commands: dict[str, list[str]], **options: object) -> list[Run]:
    settings = {"short": True, "again": False, "commit": "abc", **options}
    wanted = [Benchmark(name, "how?", {}) for name in commands]
    return run_all(wanted, folder / "out", command=lambda n: commands[n], **settings)


def test_what_was_done_is_not_done_again_and_what_failed_is(tmp_path: Path) -> None:
    commands = programs(tmp_path, bench_a=COUNTING, bench_b="raise SystemExit('no disk')")
    first = run(tmp_path, commands)
    assert [r.state for r in first] == ["done", "failed"]
    assert first[1].note == "exit code 1: no disk"
    (tmp_path / "bench_b.py").write_text(COUNTING)
    assert [r.result for r in run(tmp_path, commands)] == [{"speed": 1}, {"speed": 1}]
    assert [r.result["speed"] for r in run(tmp_path, commands, commit="def")] == [2, 2]
    assert [r.result["speed"] for r in run(tmp_path, commands, again=True)] == [3, 3]
    report = (tmp_path / "out" / "short" / "report.md").read_text()
    assert "2 done" in report
    assert "a table" in (tmp_path / "out" / "short" / "bench_a.log").read_text()


def test_changed_sources_are_measured_again(tmp_path: Path) -> None:
    commands = programs(tmp_path, bench_a=COUNTING.replace('"abc"', '"abc-dirty"'))
    run(tmp_path, commands, commit="abc-dirty")
    assert run(tmp_path, commands, commit="abc-dirty")[0].result == {"speed": 2}


def test_what_a_machine_lacks_is_left_out_with_the_reason(tmp_path: Path) -> None:
    commands = programs(tmp_path, bench_a="print('no GPU on this machine'); raise SystemExit(2)")
    (left,) = run(tmp_path, commands)
    assert (left.state, left.note) == ("left out", "no GPU on this machine")


def test_a_benchmark_that_ends_without_its_figures_has_failed(tmp_path: Path) -> None:
    (one,) = run(tmp_path, programs(tmp_path, bench_a="print('nothing')"))
    assert (one.state, one.note) == ("failed", "exit code 0: nothing")


def test_a_run_broken_off_leaves_what_was_done(tmp_path: Path) -> None:
    commands = programs(tmp_path, bench_a=COUNTING, bench_b=COUNTING)

    def command(name: str) -> list[str]:
        if name == "bench_b":
            raise KeyboardInterrupt
        return commands[name]

    wanted = [Benchmark(name, "how?", {}) for name in commands]
    with pytest.raises(KeyboardInterrupt):
        run_all(
            wanted, tmp_path / "out", short=True, again=False, commit="abc", command=command
        )  # fmt: skip
    assert "1 done, 1 not run yet" in (tmp_path / "out" / "short" / "report.md").read_text()
    kept = json.loads((tmp_path / "out" / "short" / "bench_a.json").read_text())
    assert kept["result"] == {"speed": 1}
    assert stat.S_ISREG((tmp_path / "out" / "short" / "report.html").stat().st_mode)
