"""A proxy between Postern and its database that cuts connections after a commit, so that the answer is lost.

It reads the messages of PostgreSQL (chapter "Message Formats" of its manual). The answers to a statement are kept back
until the server is ready for the next one, which is after the commit. Then they go on, or the connection is cut.
"""

import asyncio
import contextlib
import random
import secrets
import threading

READY, COMPLETE = b"Z", b"C"
# These come at any time, and nobody waits for a statement before them.
ASYNCHRONOUS = b"ANS"
WRITES = (b"INSERT", b"UPDATE", b"DELETE", b"COMMIT")


class Cutter:
    """Listens on a free port. While `share` is above zero, so many of the commits lose their answer."""

    def __init__(self, upstream_port: int):
        self._upstream, self._loop = upstream_port, asyncio.new_event_loop()
        self._random = random.Random(secrets.randbits(64))
        self.share, self.cuts = 0.0, 0
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._connected, "127.0.0.1", 0), self._loop)
        self._server = server.result(10)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            writer.transport.abort()
            return
        there = asyncio.create_task(_pass(reader, far_writer))
        back = asyncio.create_task(self._answers(far_reader, writer))
        await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        for task, transport in ((there, far_writer.transport), (back, writer.transport)):
            transport.abort()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError, asyncio.IncompleteReadError):
                await task

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes on what the server says, until a connection ends or is cut."""
        logged_in, kept, wrote = False, b"", False
        while True:
            head = await reader.readexactly(5)
            message = head + await reader.readexactly(int.from_bytes(head[1:], "big") - 4)
            kind = head[:1]
            if kind == COMPLETE and message[5:].startswith(WRITES):
                wrote = True
            kept += message
            if kind == READY:
                # Outside a transaction, what was written is committed.
                if wrote and message[5:] == b"I" and self._random.random() < self.share:
                    self.cuts += 1
                    return
                logged_in, wrote = True, wrote and message[5:] != b"I"
            elif logged_in and kind not in ASYNCHRONOUS:
                continue
            writer.write(kept)
            await writer.drain()
            kept = b""


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
