"""What `kvmem lint` prints and writes: table, JSON, SARIF, one page; exit codes for CI."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmem import cli
from kvmem.explain.lint import RULES, FileReport
from tests.logs import conversation, next_turn, write


class Ran(msgspec.Struct):
    code: int
    out: str
    err: str


@pytest.fixture
def lint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `kvmem lint` in this process."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["kvmem", "lint", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write(tmp_path / "clean.jsonl", [conversation(), next_turn(conversation())])


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    second = next_turn(conversation())
    second["tools"].reverse()
    third = next_turn(second)
    third["messages"][1]["content"] = "<script>alert('&')</script>"
    return write(tmp_path / "broken log.jsonl", [conversation(), second, third])


@pytest.fixture
def unreadable(broken: Path) -> Path:
    with broken.open("a") as out:
        out.write('{"messages": \n')
    return broken


# -- exit codes -----------------------------------------------------------------------------------


def test_exit_code_0_says_clean(lint: Callable[..., Ran], clean: Path) -> None:
    ran = lint(clean)
    assert (ran.code, ran.err) == (0, "")
    assert "2 calls in 1 sessions" in ran.out
    assert "no break" in ran.out


def test_exit_code_1_says_broken(lint: Callable[..., Ran], broken: Path, clean: Path) -> None:
    ran = lint(clean, broken)
    assert (ran.code, ran.err) == (1, "")
    assert "KV201 tools-reordered" in ran.out
    assert "tools-reordered: Sort the tools by name once." in ran.out


def test_exit_code_2_says_that_something_could_not_be_read(
    lint: Callable[..., Ran], unreadable: Path
) -> None:
    ran = lint(unreadable)
    assert ran.code == 2
    assert ran.err.startswith(f"kvmem: {unreadable}:4: a cut line")
    assert "KV201" in ran.out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["gone.jsonl"], "Name a file that exists"),
        (["FILE", "--format", "yaml"], "Give one of"),
        (["FILE", "--tokenizer", "gone"], "Name a tokenizer.json"),
        (["FILE", "--json", "--output", "FILE"], "is there already"),
        (["FILE", "FILE", "--fix", "--output", "new"], "takes one file"),
    ],
)
def test_exit_code_2_says_wrong_usage(
    arguments: list[str], reason: str, lint: Callable[..., Ran], clean: Path
) -> None:
    ran = lint(*(str(clean) if a == "FILE" else a for a in arguments))
    assert ran.code == 2
    assert ran.err.startswith("kvmem: ")
    assert reason in ran.err


def test_no_file_is_wrong_usage(lint: Callable[..., Ran]) -> None:
    assert lint().code == 2


def test_a_file_that_is_no_tokenizer_is_refused(lint: Callable[..., Ran], clean: Path) -> None:
    pytest.importorskip("tokenizers")
    ran = lint(clean, "--tokenizer", clean)
    assert ran.code == 2
    assert "is no tokenizer" in ran.err


def test_a_tokenizer_counts_tokens(lint: Callable[..., Ran], broken: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (tmp_path, tmp_path / "tokenizer.json"):
        ran = lint(broken, "--json", "--tokenizer", tokenizer, "--block-tokens", "1")
        (report,) = msgspec.json.decode(ran.out, type=list[FileReport])
        assert (report.unit, report.block_tokens) == ("token", 1)
        # Every word is the one token of this tokenizer, so nothing differs but lengths.
        assert report.n_breaks == 2


# -- forms ----------------------------------------------------------------------------------------


def test_json_is_the_reports(lint: Callable[..., Ran], broken: Path) -> None:
    ran = lint(broken, "--json", "--requests")
    (report,) = msgspec.json.decode(ran.out, type=list[FileReport])
    assert [found.name for found in report.breaks] == ["tools-reordered", "history-edited"]
    assert [request.turn for request in report.requests] == [0, 1, 2]
    assert sum(request.cached for request in report.requests) == report.cached


@pytest.mark.parametrize("shown", ["terminal", "json", "sarif", "html"])
def test_the_same_input_gives_the_same_output(
    shown: str, lint: Callable[..., Ran], broken: Path
) -> None:
    assert lint(broken, "--show", shown) == lint(broken, "--show", shown)


@pytest.mark.parametrize("shown", ["json", "sarif", "html"])
def test_output_goes_into_a_new_file_of_its_owner(
    shown: str, lint: Callable[..., Ran], broken: Path, tmp_path: Path
) -> None:
    to = tmp_path / "report"
    ran = lint(broken, "--show", shown, "--output", to)
    assert (ran.code, ran.out) == (1, "")
    assert to.stat().st_mode & 0o777 == 0o600
    assert to.read_text() == lint(broken, "--show", shown).out


# The parts of the SARIF 2.1.0 schema that a run without artifacts and code flows uses: which keys
# an object may have, which it must have, and what is in them.
MESSAGE = {"text": str}
LOCATION = {
    "physicalLocation": {
        "artifactLocation": {"uri": re.compile(r"[\w./%~+-]+")},
        "region": {"startLine": int},
    },
    "logicalLocations?": [{"fullyQualifiedName": str, "kind": str}],
}
LEVEL = re.compile("none|note|warning|error")
SARIF = {
    "$schema": re.compile(r"https://json\.schemastore\.org/sarif-2\.1\.0\.json"),
    "version": re.compile(r"2\.1\.0"),
    "runs": [
        {
            "tool": {
                "driver": {
                    "name": str,
                    "semanticVersion": re.compile(r"\d+\.\d+\.\d+"),
                    "rules": [
                        {
                            "id": str,
                            "name": str,
                            "shortDescription": MESSAGE,
                            "fullDescription": MESSAGE,
                            "help": MESSAGE,
                            "defaultConfiguration": {"level": LEVEL},
                        }
                    ],
                }
            },
            "invocations": [
                {
                    "executionSuccessful": bool,
                    "toolExecutionNotifications?": [
                        {"level": LEVEL, "message": MESSAGE, "locations": [LOCATION]}
                    ],
                }
            ],
            "columnKind": re.compile("utf16CodeUnits|unicodeCodePoints"),
            "results": [
                {
                    "ruleId": str,
                    "ruleIndex": int,
                    "level": LEVEL,
                    "message": MESSAGE,
                    "locations": [LOCATION],
                    "partialFingerprints": {"kvmemBreak/v1": str},
                    "properties": dict,
                }
            ],
        }
    ],
}


def fits(value: Any, shape: Any, at: str = "$") -> list[str]:
    """What of a value the shape excludes."""
    if isinstance(shape, type):
        return [] if type(value) is shape else [f"{at} is {value!r}"]
    if isinstance(shape, re.Pattern):
        return [] if isinstance(value, str) and shape.fullmatch(value) else [f"{at} is {value!r}"]
    if type(value) is not type(shape):
        return [f"{at} is {value!r}"]
    if isinstance(shape, list):
        return [w for i, item in enumerate(value) for w in fits(item, shape[0], f"{at}[{i}]")]
    wrong = [f"{at} has {name}" for name in value if not {name, name + "?"} & shape.keys()]
    for name, inner in shape.items():
        key = name.rstrip("?")
        if key in value:
            wrong += fits(value[key], inner, f"{at}.{key}")
        elif key == name:
            wrong.append(f"{at} lacks {key}")
    return wrong


def test_sarif_has_the_structure_of_its_schema(lint: Callable[..., Ran], unreadable: Path) -> None:
    log = json.loads(lint(unreadable, "--show", "sarif").out)
    assert fits(log, SARIF) == []
    (run,) = log["runs"]
    assert [result["ruleId"] for result in run["results"]] == ["KV201", "KV301"]
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [rule.id for rule in RULES]
    assert all(rules[r["ruleIndex"]]["id"] == r["ruleId"] for r in run["results"])
    lines = [r["locations"][0]["physicalLocation"]["region"]["startLine"] for r in run["results"]]
    assert lines == [2, 3]
    assert not run["invocations"][0]["executionSuccessful"]
    uri = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri.endswith("broken%20log.jsonl")


def test_the_structure_sees_what_does_not_fit() -> None:
    assert fits({"version": "2.1.0", "runs": [], "more": 1}, SARIF) == [
        "$ has more",
        "$ lacks $schema",
    ]
    assert fits([{"text": 1}], [MESSAGE]) == ["$[0].text is 1"]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]
        self._in_title = tag == "title"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.titles.append(data)
            self._in_title = False


def test_the_page_is_whole_in_itself_and_draws_what_was_computed(
    lint: Callable[..., Ran], broken: Path
) -> None:
    text = lint(broken, "--show", "html").out
    page = Page()
    page.feed(text)
    assert page.links == []
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert re.search(r"\bfetch\(|XMLHttpRequest|@import|url\(", text) is None
    assert page.tags.count("script") == 1  # a log's own text opens no tag
    (report,) = msgspec.json.decode(lint(broken, "--json").out, type=list[FileReport])
    computed = report.prompt - report.cached
    assert f"all: {computed:,} characters computed" in page.titles[1]
    again = sum(row.again for row in report.prefill)
    assert again
    assert f"{again:,} of them again" in page.titles[1]
    assert page.tags.count("rect") == len(page.titles) - 1


def test_the_page_of_nothing_is_a_page(lint: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    assert "<svg" in lint(tmp_path / "empty", "--show", "html").out


def test_fix_says_what_it_did(lint: Callable[..., Ran], broken: Path) -> None:
    ran = lint(broken, "--fix")
    assert ran.code == 1
    fixed = broken.with_name("broken log.fixed.jsonl")
    assert f"{fixed}: 2 requests changed, 1 breaks left in it" in ran.err
    assert lint(fixed).out.count("KV") == 1
    assert "is there already" in lint(broken, "--fix").err
