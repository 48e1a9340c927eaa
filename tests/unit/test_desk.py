"""A desk answers its own user, whatever is asked, and is gone with its owner."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmem.errors import ArenaError, KVMemError, NotAnswered, NotUnderstood
from kvmem.store import desk as desks
from kvmem.store.desk import Desk, ask


@pytest.fixture
def path(arena_name: str) -> Path:
    return Path(f"/dev/shm/kvmem-{os.getuid()}-{arena_name}")


@pytest.fixture
def failures() -> list[str]:
    return []


@pytest.fixture
def desk(path: Path, failures: list[str]) -> Iterator[Desk]:
    def wrong(asked: dict[str, Any]) -> Any:
        raise KVMemError("not so", next_step="Ask otherwise.")

    def broken(asked: dict[str, Any]) -> Any:
        raise RuntimeError("a secret")

    answers = {"echo": lambda asked: asked, "wrong": wrong, "broken": broken}
    desk = Desk(path, answers, failures.append)
    yield desk
    desk.close()


def test_what_is_asked_is_answered(desk: Desk, path: Path) -> None:
    long = os.urandom(3 << 20)
    raw = ask(path, "echo", long=long, n=1)
    assert msgspec.msgpack.decode(raw) == {"long": long, "n": 1}


def test_a_question_that_is_wrong_is_told_and_counts_as_nobodys_failure(
    desk: Desk, path: Path, failures: list[str]
) -> None:
    with pytest.raises(NotUnderstood, match=r"not so\. Ask otherwise\."):
        ask(path, "wrong")
    with pytest.raises(NotUnderstood, match="nobody here knows 'else'"):
        ask(path, "else")
    assert failures == []


def test_an_answer_that_fails_is_the_owners_failure(
    desk: Desk, path: Path, failures: list[str]
) -> None:
    with pytest.raises(NotAnswered, match="RuntimeError") as told:
        ask(path, "broken")
    assert not isinstance(told.value, NotUnderstood)
    assert "a secret" not in str(told.value)
    assert failures == ["RuntimeError: a secret"]
    assert ask(path, "echo") == b"\x80"


@pytest.mark.parametrize(
    "sent", [b"", b"\x01", b"\xff\xff\xff\xff", b"\x05\x00\x00\x00abc", b"\x03\x00\x00\x00abc",
             b"\x01\x00\x00\x00\x80", b"\x02\x00\x00\x00\xc1\xc1"],
)  # fmt: skip
def test_whatever_is_sent_the_next_one_is_answered(
    desk: Desk, path: Path, failures: list[str], sent: bytes
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(f"\0{path.name}")
        peer.sendall(sent)
        peer.shutdown(socket.SHUT_WR)
        peer.settimeout(10)
        while peer.recv(1 << 16):  # it says what is wrong, or nothing, and hangs up
            pass
    assert ask(path, "echo") == b"\x80"
    assert failures == []


def test_somebody_who_says_nothing_holds_nobody_up_for_long(
    desk: Desk, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "PATIENCE_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(f"\0{path.name}")
        assert ask(path, "echo") == b"\x80"


def test_another_user_is_not_answered_and_not_believed(
    desk: Desk, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "_user_of", lambda peer: os.getuid() + 1)
    with pytest.raises(ArenaError, match="another user"):
        ask(path, "echo")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(f"\0{path.name}")
        peer.settimeout(10)
        try:
            peer.sendall(b"\x05\x00\x00\x00\x81\xa3ask")
            told = peer.recv(1)
        except ConnectionError:
            told = b""
        assert told == b""


def test_a_second_owner_of_the_name_is_refused(desk: Desk, path: Path) -> None:
    with pytest.raises(OSError, match="in use"):
        Desk(path, {}, lambda error: None)


def test_a_desk_that_is_closed_or_was_killed_leaves_nothing(path: Path) -> None:
    Desk(path, {}, lambda error: None).close()
    with pytest.raises(FileNotFoundError):
        ask(path, "echo")
    code = (
        "import os, sys; from pathlib import Path; from kvmem.store.desk import Desk;"
        f"Desk(Path({str(path)!r}), {{'echo': lambda asked: asked}}, print);"
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"open\n"
        assert ask(path, "echo") == b"\x80"
        owner.kill()
        owner.wait()
    with pytest.raises(FileNotFoundError):
        ask(path, "echo")
    Desk(path, {}, lambda error: None).close()  # the name is free again


def test_many_at_once_are_all_answered(desk: Desk, path: Path) -> None:
    told: list[bytes] = []
    threads = [threading.Thread(target=lambda: told.append(ask(path, "echo"))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [b"\x80"] * 12
