"""The connection to an engine: it stops reading while nobody takes, and trusts no stale one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvmem.agents.gateway.wire import HELD_BYTES, Upstream, UpstreamGone, _Connection

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


class Transport:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.paused = 0
        self.aborted = False

    def pause_reading(self) -> None:
        self.paused += 1

    def resume_reading(self) -> None:
        self.paused -= 1

    def abort(self) -> None:
        self.aborted = True


def connection() -> tuple[_Connection, Transport]:
    one, transport = _Connection(), Transport()
    one.connection_made(transport)  # type: ignore[arg-type]
    one.begin()
    return one, transport


def test_it_stops_reading_while_nobody_takes() -> None:
    one, transport = connection()
    one.data_received(HEAD % (4 * HELD_BYTES))
    piece = b"a" * (HELD_BYTES // 2)
    one.data_received(piece * 2)
    assert transport.paused == 0
    one.data_received(piece)
    one.data_received(piece)
    assert transport.paused == 1
    assert one.take() == piece * 4
    assert transport.paused == 0
    assert not one.done


def test_bytes_that_are_no_http_end_the_connection() -> None:
    one, transport = connection()
    one.data_received(b"no answer\r\n\r\n")
    assert transport.aborted
    assert one.lost
    assert not one.reusable


def test_an_answer_without_length_ends_with_the_connection() -> None:
    one, _ = connection()
    one.data_received(b"HTTP/1.1 200 OK\r\n\r\nrest")
    assert not one.done
    one.connection_lost(None)
    assert one.done
    assert one.take() == b"rest"


async def _answers(*kinds: str) -> tuple[list[bytes], list[int]]:
    """What is read of a server that answers each connection's requests as told."""
    asked: list[int] = []
    turns = iter(kinds)

    async def serve(reader: Any, writer: Any) -> None:
        number = len(asked)
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                asked.append(number)
                if next(turns) == "close":
                    return
                writer.write(HEAD % 2 + b"ok")
        except asyncio.IncompleteReadError:
            return
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", timeout_s=10)
    try:
        return [(await upstream.get("/a"))[1] for _ in kinds if _ != "close"], asked
    finally:
        upstream.close()
        server.close()


def test_a_connection_is_used_again() -> None:
    told, asked = asyncio.run(_answers("ok", "ok", "ok"))
    assert told == [b"ok"] * 3
    assert asked == [0, 0, 0]


def test_a_request_that_a_closing_connection_swallowed_is_sent_again() -> None:
    told, asked = asyncio.run(_answers("ok", "close", "ok"))
    assert told == [b"ok", b"ok"]
    assert len(asked) == 3


def test_a_request_on_a_new_connection_is_sent_once() -> None:
    async def ask() -> None:
        async def serve(reader: Any, writer: Any) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_s=10)
        try:
            with pytest.raises(UpstreamGone, match="closed the connection"):
                await upstream.get("/a")
        finally:
            server.close()

    asyncio.run(ask())
