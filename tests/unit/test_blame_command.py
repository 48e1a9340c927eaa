"""`kvmem blame` on a tiny model of random weights: what it prints, writes and exits with."""

from __future__ import annotations

import json
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import _models
from kvmem import cli
from kvmem.blame import Verdict
from kvmem.blame.steps import steps_of
from tests import tiny_tokenizers
from tests.unit.test_blame import ASKED, FULL, USER


class Ran(msgspec.Struct):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _models.make("llama", tmp_path_factory.mktemp("model"))
    tiny_tokenizers.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def blame(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
) -> Callable[..., Ran]:
    """Runs `kvmem blame` in this process."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str | Path) -> Ran:
        given = ["kvmem", "blame", *map(str, arguments), "--model", str(model), "--host-gb", "0.02"]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return run


def write(path: Path, **more: Any) -> Path:
    turn = {
        "question": ASKED["content"], "served": [USER, *FULL[3:]], "expected": "4300",
        "candidates": ["900", "7"], **more,
    }  # fmt: skip
    run = {"blame": 1, "session": path.stem, "history": FULL, "turns": [turn, turn]}
    path.write_text(json.dumps(run))
    return path


def test_json_has_every_arm_of_every_turn(blame: Callable[..., Ran], tmp_path: Path) -> None:
    ran = blame(write(tmp_path / "one.json"), "--json")
    (told,) = json.loads(ran.out)
    verdicts = msgspec.convert(told["verdicts"], list[Verdict])
    assert [v.turn for v in verdicts] == ["one/0", "one/1"]
    for verdict in verdicts:
        if verdict.fault == "ok":  # weights are random: it may be right
            continue
        assert {arm.name for arm in verdict.arms} == set("EXFNROP")
        assert verdict.prompt_tokens >= sum(a.prompt_tokens for a in verdict.arms if not a.note)
    # The second turn is the first again: all of it but the last blocks is cached.
    assert verdicts[1].cached_tokens > verdicts[0].cached_tokens
    assert verdicts[0].arms[0].logprob == verdicts[1].arms[0].logprob
    assert ran.code == (verdicts[0].fault in ("context", "both", "cache"))


def test_one_turn_is_chosen_and_a_wrong_number_refused(
    blame: Callable[..., Ran], tmp_path: Path
) -> None:
    path = write(tmp_path / "one.json")
    ran = blame(path, "--turn", "1")
    assert "one/1: " in ran.out
    assert "one/0: " not in ran.out
    ran = blame(path, "--turn", "2")
    assert (ran.code, "has 2 turns" in ran.err) == (2, True)


def test_the_page_is_private_and_never_overwrites(
    blame: Callable[..., Ran], tmp_path: Path
) -> None:
    path, page = write(tmp_path / "one.json"), tmp_path / "page.html"
    blame(path, "--show", "html", "--output", page, "--influence")
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert page.read_text().startswith("<!doctype html>")
    ran = blame(path, "--show", "html", "--output", page)
    assert (ran.code, "is there already" in ran.err) == (2, True)


def test_a_folder_gives_a_table_and_says_what_it_could_not_read(
    blame: Callable[..., Ran], tmp_path: Path
) -> None:
    write(tmp_path / "one.json")
    write(tmp_path / "two.json")
    ran = blame(tmp_path)
    assert "2 runs" in ran.out
    assert re.search(r"two\.json\W+2\W", ran.out)
    (tmp_path / "zero.json").write_text("{}")
    ran = blame(tmp_path)
    assert ran.code == 2
    assert "zero.json" in ran.err
    assert "2 runs" in ran.out


def test_a_judge_and_another_model_are_asked(
    blame: Callable[..., Ran], tmp_path: Path, model: Path
) -> None:
    path = write(tmp_path / "one.json")
    ran = blame(path, "--json", "--turn", "0", "--judge", "regex:^$", "--other-model", model)
    (told,) = json.loads(ran.out)
    names = [arm["name"] for arm in told["verdicts"][0]["arms"]]
    assert names[:2] == ["E", "X"]
    assert "M" in names or names == ["E", "X"]
    ran = blame(path, "--judge", "guess")
    assert (ran.code, "no judge 'guess'" in ran.err) == (2, True)


def test_a_step_is_worth_what_it_adds_to_the_right_answer() -> None:
    from kvmem.context import ChatRenderer
    from kvmem.types import Scored

    renderer = ChatRenderer.of(tiny_tokenizers.tokenizer())

    class Counter:
        def score(self, prefix_ids: Any, candidates: Any, **more: Any) -> Scored:
            text = renderer.decode(prefix_ids)
            return Scored((2.0 * text.count("good") - 3.0 * text.count("bad"),), 10, 8, 0.0)

    said = [{"role": "user", "content": t} for t in ("good", "hm", "bad", "good")]
    found = steps_of(said, "Well?", "x", renderer, Counter())
    assert (found.worth, found.blamed) == ((2.0, 0.0, -3.0, 2.0), 2)
    assert (found.prompt_tokens, found.cached_tokens) == (50, 40)
    assert steps_of(said[:1], "Well?", "x", renderer, Counter()).blamed is None
