"""Many ordinary calls: nothing in the server grows with their number, whether or not anybody reads the metrics."""

import concurrent.futures
import socket
import threading
import time

import pytest
from bystander import resident
from support.http import address_of

COUNT = 200_000
CONNECTIONS, BATCH = 4, 100
# A sample of a histogram that nobody moves into its bucket takes 20 bytes.
MOST_BYTES_PER_CALL = 10
CALL = b"GET /v1/me HTTP/1.1\r\nhost: localhost\r\n\r\n"
STATUS = b"HTTP/1.1 401"


def call_in_batches(address: str, batches: int) -> None:
    """Sends calls that are refused for want of a token, many at a time, and reads the answers."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as wire:
        for _ in range(batches):
            wire.sendall(CALL * BATCH)
            answered, rest = 0, b""
            while answered < BATCH:
                part = wire.recv(1 << 20)
                assert part, "the server has closed the connection"
                received = rest + part
                answered += received.count(STATUS)
                rest = received[-(len(STATUS) - 1) :]
            # The end of the last answer follows its head at once.


def call(address: str, count: int) -> None:
    with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as callers:
        batches = count // CONNECTIONS // BATCH
        for done in [callers.submit(call_in_batches, address, batches) for _ in range(CONNECTIONS)]:
            done.result()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scraped", [False, True], ids=["never scraped", "scraped"])
def test_memory_does_not_grow_with_the_number_of_calls(start_server, embedded, scraped):
    server = start_server(embedded)
    address, operations = address_of(server, "http_addr"), address_of(server, "ops_addr")
    done = threading.Event()

    def scrape() -> None:
        host, _, port = operations.rpartition(":")
        while scraped and not done.wait(1):
            with socket.create_connection((host, int(port)), timeout=10) as wire:
                wire.sendall(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                while wire.recv(1 << 16):
                    pass

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        # The samples between two upkeeps, and what every thread keeps for itself, take their memory first.
        call(address, COUNT // 5)
        before, begun = resident(server), time.monotonic()
        call(address, COUNT)
        seconds, grown = time.monotonic() - begun, (resident(server) - before) * 2**20
    finally:
        done.set()
        scraper.join()
    print(f"{COUNT} calls in {seconds:.0f} s: {grown / 2**20:.1f} MiB more, {grown / COUNT:.1f} bytes for each call")
    assert grown / COUNT < MOST_BYTES_PER_CALL
