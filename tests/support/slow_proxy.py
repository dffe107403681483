"""A proxy on loopback that makes an HTTP server as slow and as unreliable as a distant one.

python -m tests.support.slow_proxy 127.0.0.1:9000 --latency-ms 30     # prints its own address
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Literal, Self, TypeAlias

_PIECE = 2**18
Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Fault: TypeAlias = int | Literal["drop", "lose", "cut"] | None
"""What happens to a request: nothing; a status that the proxy answers in place of the server;
"drop": the connection is closed before the server gets it; "lose": after the server answered;
"cut": in the middle of the answer's body.
"""


class SlowProxy:
    """Forwards HTTP/1.1 requests to one server, each after a delay.

    The delay is per request, also on a connection that is kept alive, and concurrent requests wait
    at the same time.

    Attributes, which may change at any time: `latency_s`; `fault`, called with each request line
    ("GET /bucket/key HTTP/1.1"); and `requests`, the request lines so far.
    """

    def __init__(self, server: str, *, latency_s: float = 0.0) -> None:
        """`server` is its "host:port"."""
        host, _, port = server.removeprefix("http://").rpartition(":")
        self._server = host, int(port)
        self.latency_s = latency_s
        self.fault: Callable[[str], Fault] = lambda request: None
        self.requests: list[str] = []
        self._connections: set[asyncio.Task[None] | None] = set()  # asyncio itself may forget them
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._listener = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_PIECE), self._loop
        ).result()
        self.address = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        self.url = f"http://{self.address}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._listener.close()
        await asyncio.sleep(0.01)  # what was just accepted begins, so that it closes its streams
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, *client: *Streams) -> None:
        """One connection of a client, and one to the server, to their end."""
        self._connections.add(asyncio.current_task())
        server = None
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            try:
                server = await asyncio.open_connection(*self._server, limit=_PIECE)
                while await self._forward(client, server):
                    pass
            finally:
                for _, writer in filter(None, (client, server)):
                    writer.transport.abort()  # at once: close() would wait for the other side
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()

    async def _forward(self, client: Streams, server: Streams) -> bool:
        """One request and its answer; False when the connections cannot be used again."""
        head = await client[0].readuntil(b"\r\n\r\n")
        request = head.split(b"\r\n", 1)[0].decode()
        self.requests.append(request)
        fault = self.fault(request)
        await asyncio.sleep(self.latency_s)
        if fault == "drop":
            return False
        if isinstance(fault, int):
            async for _ in _body(head, client[0]):
                pass
            client[1].write(b"HTTP/1.1 %d Injected\r\nContent-Length: 0\r\n\r\n" % fault)
            return True
        server[1].write(head)
        async for piece in _body(head, client[0]):
            server[1].write(piece)
            await server[1].drain()
        head = await server[0].readuntil(b"\r\n\r\n")
        if fault == "lose":
            return False
        client[1].write(head)
        if request.startswith("HEAD ") or head.split()[1] in {b"204", b"304"}:
            return True
        async for piece in _body(head, server[0], answer=True):
            client[1].write(piece[: len(piece) // 2] if fault == "cut" else piece)
            await client[1].drain()
            if fault == "cut":
                return False
        return True


async def _body(
    head: bytes, reader: asyncio.StreamReader, *, answer: bool = False
) -> AsyncIterator[bytes]:
    """The body that follows a head, in pieces as they are sent.

    Without a length, a request has none, and an answer ends with its connection.
    """
    lines = head.decode("latin-1").lower().split("\r\n")[1:]
    fields = dict(line.split(":", 1) for line in lines if line)
    if "chunked" in fields.get("transfer-encoding", ""):
        size = 1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
        return
    left = int(fields.get("content-length", 2**62 if answer else 0))
    while left and (piece := await reader.read(min(left, _PIECE))):
        left -= len(piece)
        yield piece


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", help="host:port")
    parser.add_argument("--latency-ms", type=float, default=0.0)
    chosen = parser.parse_args()
    with (
        SlowProxy(chosen.server, latency_s=chosen.latency_ms / 1000) as proxy,
        contextlib.suppress(KeyboardInterrupt),
    ):
        print(proxy.address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
