"""gRPC requests written directly in HTTP/2, for requests that no gRPC library would send.

`post` opens a socket for one call and returns everything that came back, including a reset. `Shared` makes many calls
on one connection, as a proxy does for its clients. Neither validates requests, because tests send unusual paths and
raw `grpc-timeout` values.
"""

import functools
import socket
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events

PING, GOAWAY, ACK = 6, 7, 1


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
    address: str,
    path: str,
    message: bytes,
    headers: dict[str, str] | None = None,
    deadline: float = 15,
    flag: int = 0,
) -> Answer:
    """Sends one framed message to `path` and reads until the stream ends. The flag 1 means that it is compressed."""
    connection = _connection()
    with _socket(address, deadline) as wire:
        connection.initiate_connection()
        _send(connection, 1, address, path, message, headers or {}, flag)
        wire.sendall(connection.data_to_send())
        return _read(connection, wire)


class Shared:
    """One connection for the calls of many clients. Its headers are not compressed, as most gRPC clients send them."""

    def __init__(self, address: str, deadline: float = 15):
        self._address = address
        self._connection = _connection()
        encoder = self._connection.encoder
        encoder.encode = functools.partial(encoder.encode, huffman=False)
        self._answers: dict[int, Answer] = {}
        self._wire = _socket(address, deadline)
        self._connection.initiate_connection()

    def __enter__(self) -> "Shared":
        return self

    def __exit__(self, *_) -> None:
        self._wire.close()

    def begin(self, path: str, message: bytes = b"", headers=()) -> int:
        """Sends one framed message to `path`, and returns the number of the call."""
        stream = self._connection.get_next_available_stream_id()
        self._answers[stream] = Answer()
        _send(self._connection, stream, self._address, path, message, headers)
        self._wire.sendall(self._connection.data_to_send())
        return stream

    def ends(self) -> bool:
        """Waits until the server ends the connection, and returns whether it said GOAWAY without an error before.

        Reads the frames itself: `h2` takes none after a first GOAWAY, and the server first announces the end by one.
        """
        self._wire.sendall(self._connection.data_to_send())
        received, errors = b"", set()
        while part := self._wire.recv(65536):
            received += part
            while len(received) >= 9 and len(received) >= (end := 9 + int.from_bytes(received[:3], "big")):
                kind, flags, payload, received = received[3], received[4], received[9:end], received[end:]
                if kind == GOAWAY:
                    errors.add(int.from_bytes(payload[4:8], "big"))
                elif kind == PING and not flags & ACK:
                    self._wire.sendall(bytes([0, 0, 8, PING, ACK, 0, 0, 0, 0]) + payload)
        return errors == {0}

    def finished(self) -> list[tuple[int, Answer]]:
        """Waits until calls have ended, and returns them. When the connection ends, all calls end."""
        done = []
        while not done and self._answers:
            received = self._wire.recv(65536)
            for event in self._connection.receive_data(received) if received else ():
                answer = self._answers.get(getattr(event, "stream_id", None))
                if isinstance(event, h2.events.ConnectionTerminated):
                    received = b""
                elif answer is not None and _take(answer, event):
                    done.append((event.stream_id, self._answers.pop(event.stream_id)))
            if not received:
                done += [(stream, Answer(closed=True)) for stream in self._answers]
                self._answers.clear()
            else:
                self._wire.sendall(self._connection.data_to_send())
        return done


def _connection() -> h2.connection.H2Connection:
    return h2.connection.H2Connection(
        h2.config.H2Configuration(
            header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False
        )
    )


def _socket(address: str, deadline: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=deadline)


def _send(connection, stream: int, address: str, path: str, message: bytes, headers, flag: int = 0) -> None:
    request = {
        ":method": "POST",
        ":scheme": "http",
        ":authority": address,
        ":path": path,
        "te": "trailers",
        "content-type": "application/grpc",
        **dict(headers),
    }
    connection.send_headers(stream, list(request.items()))
    framed = bytes([flag]) + len(message).to_bytes(4, "big") + message
    # What the window allows at first. The server refuses a larger message before it has read all of it.
    room = connection.local_flow_control_window(stream)
    for start in range(0, min(len(framed), room), connection.max_outbound_frame_size):
        end = min(start + connection.max_outbound_frame_size, room)
        connection.send_data(stream, framed[start:end], end_stream=end >= len(framed))


def _take(answer: Answer, event) -> bool:
    """Adds what an event says to the answer. Returns whether the answer is complete."""
    match event:
        case h2.events.ResponseReceived() | h2.events.TrailersReceived():
            answer.headers.update(event.headers)
        case h2.events.DataReceived():
            answer.body += event.data
        case h2.events.StreamReset():
            answer.reset = event.error_code
            return True
        case h2.events.StreamEnded():
            return True
        case h2.events.ConnectionTerminated():
            answer.closed = True
            return True
    return False


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
            if _take(answer, event):
                return answer
        wire.sendall(connection.data_to_send())
