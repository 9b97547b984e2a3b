"""REST over HTTP/2 by the `h2` library, frame by frame: for requests that are answered before the server has read them.

Such an answer may end with RST_STREAM and NO_ERROR. The client should then stop sending the body, and the answer is
still valid (RFC 9113 §8.1). curl 7.88 of Debian 12 loses it, so the server reads up to 1 MiB of the body instead.
"""

import socket

import h2.config
import h2.connection
import h2.errors
import h2.events

from support.client import TIMEOUT
from support.http import Rest

STREAM = 1


class H2c(Rest):
    """The same calls in HTTP/2, without TLS."""

    version = "2"

    def _exchange(self, method: str, path: str, headers: dict, body: bytes | None):
        connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        pseudo = {":method": method, ":scheme": "http", ":authority": self.address, ":path": path}
        host, _, port = self.address.rpartition(":")
        answer = _Answer()
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as wire:
            connection.initiate_connection()
            connection.send_headers(STREAM, [*pseudo.items(), *headers.items()], end_stream=body is None)
            left = body or b""
            while not answer.ended:
                left = _send_what_the_window_allows(connection, left)
                wire.sendall(connection.data_to_send())
                received = wire.recv(65536)
                assert received, f"the connection was closed in the middle of {answer}"
                answer.take(connection, connection.receive_data(received))
            return self.version, int(answer.headers.pop(":status")), answer.headers, answer.body


def _send_what_the_window_allows(connection: h2.connection.H2Connection, left: bytes) -> bytes:
    """Sends as much of the body as flow control allows now, and returns the rest."""
    while left and (size := min(connection.local_flow_control_window(STREAM), connection.max_outbound_frame_size)):
        part, left = left[:size], left[size:]
        connection.send_data(STREAM, part, end_stream=not left)
    return left


class _Answer:
    def __init__(self):
        self.headers: dict[str, str] = {}
        self.body = b""
        self.ended = False

    def __str__(self) -> str:
        return f"{self.headers} {self.body[:200]!r}"

    def take(self, connection: h2.connection.H2Connection, events) -> None:
        for event in events:
            match event:
                case h2.events.ResponseReceived():
                    self.headers.update(event.headers)
                case h2.events.DataReceived():
                    self.body += event.data
                    connection.acknowledge_received_data(event.flow_controlled_length, STREAM)
                case h2.events.StreamEnded():
                    self.ended = True
                case h2.events.StreamReset():
                    assert self.ended, f"reset with {event.error_code} in the middle of {self}"
                    assert event.error_code == h2.errors.ErrorCodes.NO_ERROR
                case h2.events.ConnectionTerminated():
                    raise AssertionError(f"GOAWAY with {event.error_code} in the middle of {self}")
