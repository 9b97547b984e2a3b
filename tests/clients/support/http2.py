"""One gRPC request written directly in HTTP/2, for requests that no gRPC library would send.

It opens a socket for one call and returns everything that came back, including a reset. It does not validate requests,
because tests send unusual paths and raw `grpc-timeout` values.
"""

import socket
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events


@dataclass
class Answer:
    """What the server sent before the stream or the connection ended."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    reset: int | None = None
    closed: bool = False

    @property
    def grpc_status(self) -> int | None:
        value = self.headers.get("grpc-status")
        return int(value) if value is not None else None


def post(
    address: str, path: str, message: bytes, headers: dict[str, str] | None = None, deadline: float = 15
) -> Answer:
    """Sends one framed message to `path` and reads until the stream ends."""
    host, _, port = address.rpartition(":")
    configuration = h2.config.H2Configuration(
        header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False
    )
    connection = h2.connection.H2Connection(configuration)
    request = {
        ":method": "POST",
        ":scheme": "http",
        ":authority": address,
        ":path": path,
        "te": "trailers",
        "content-type": "application/grpc",
        **(headers or {}),
    }
    with socket.create_connection((host, int(port)), timeout=deadline) as wire:
        connection.initiate_connection()
        connection.send_headers(1, list(request.items()))
        connection.send_data(1, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
        wire.sendall(connection.data_to_send())
        return _read(connection, wire)


def _read(connection: h2.connection.H2Connection, wire: socket.socket) -> Answer:
    answer = Answer()
    while True:
        try:
            received = wire.recv(65536)
        except ConnectionResetError:
            received = b""
        if not received:
            answer.closed = True
            return answer
        for event in connection.receive_data(received):
            match event:
                case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                    answer.headers.update(event.headers)
                case h2.events.DataReceived():
                    answer.body += event.data
                case h2.events.StreamReset():
                    answer.reset = event.error_code
                    return answer
                case h2.events.StreamEnded():
                    return answer
                case h2.events.ConnectionTerminated():
                    answer.closed = True
                    return answer
        wire.sendall(connection.data_to_send())
