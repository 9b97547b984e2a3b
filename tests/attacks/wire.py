"""HTTP/2 by the `h2` library, for clients that do what no honest client does."""

import socket

import h2.config
import h2.connection
import h2.exceptions
import h2.settings

from bystander import ATTACKER

GRPC = {"content-type": "application/grpc", "te": "trailers"}


class Wire:
    """A connection of the attacker."""

    def __init__(self, address: str, window: int | None = None):
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=5, source_address=ATTACKER)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()
        if window is not None:
            self._h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self._address = address
        self.flush()

    def open(self, path: str, headers: dict[str, str], body: bytes | None = b"", method: str = "POST", end: bool = True) -> int:
        """Opens a stream. Without `end` the request stays unfinished."""
        stream = self._h2.get_next_available_stream_id()
        pseudo = {":method": method, ":scheme": "http", ":authority": self._address, ":path": path}
        self._h2.send_headers(stream, [*pseudo.items(), *headers.items()], end_stream=end and not body)
        if body:
            self._h2.send_data(stream, body, end_stream=end)
        return stream

    def flush(self) -> None:
        self.socket.sendall(self._h2.data_to_send())

    def take(self) -> None:
        """Reads what has come, and answers pings and settings."""
        self.socket.settimeout(0.01)
        try:
            while data := self.socket.recv(65_536):
                self._h2.receive_data(data)
        except (TimeoutError, h2.exceptions.ProtocolError):
            pass
        finally:
            self.socket.settimeout(5)
        self.flush()

    def close(self) -> None:
        self.socket.close()


def http1(address: str, path: str, body: bytes, source) -> bytes:
    """Posts JSON and returns everything that comes back."""
    host, _, port = address.rpartition(":")
    head = f"POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with socket.create_connection((host, int(port)), timeout=15, source_address=source) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        received = b""
        while data := connection.recv(65_536):
            received += data
    return received
