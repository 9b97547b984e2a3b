"""Services that follow revocations, as another team would write them, on grpcio and the generated stubs."""

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator

import grpc

from support import pb
from support.admin import Somebody
from support.client import CHANNEL_OPTIONS, TIMEOUT
from support.expect import reason_of
from support.server import Server
from support.transports import ByGrpc
from support.wait import PATIENCE

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
EXPIRED = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")


class Service:
    """A service account with these roles and one key."""

    def __init__(self, admin: Somebody, server: Server, *roles: str):
        self._way, self._admin, self._server = ByGrpc(server.client), admin, server
        name = f"watcher-{uuid.uuid4().hex[:12]}"
        self.id = self.by_admin("CreateServiceAccount", name=name, roles=list(roles))["serviceAccount"]["id"]
        created = self.change("CreateServiceKey")
        self.key_id, self.secret = created["key"]["id"], created["clientSecret"]

    def by_admin(self, rpc: str, **fields) -> dict:
        return self._way.ok(rpc, credential=self._admin.credential, **fields)

    def change(self, rpc: str, **fields) -> dict:
        return self.by_admin(rpc, service_account_id=self.id, **fields)

    def token(self, server: Server | None = None) -> str:
        request = pb.IssueServiceTokenRequest(client_id=self.id, client_secret=self.secret)
        with connect(server or self._server) as channel:
            return pb.stub("TokenService", channel).IssueServiceToken(request, timeout=TIMEOUT).access_token


def connect(server: Server, *options) -> grpc.Channel:
    return grpc.insecure_channel(server.address, options=[*CHANNEL_OPTIONS, *options])


def watch(channel: grpc.Channel, token: str | None, cursor: str = "", timeout: float | None = PATIENCE):
    """A stream; the caller cancels it."""
    metadata = [("authorization", f"Bearer {token}")] if token is not None else []
    request = pb.WatchRevocationsRequest(resume_cursor=cursor)
    return pb.stub("TokenService", channel).WatchRevocations(request, metadata=metadata, timeout=timeout)


def until_caught_up(stream) -> tuple[list, str]:
    """The revocations up to the next heartbeat, and its cursor."""
    found = []
    for message in stream:
        if message.WhichOneof("event") == "heartbeat":
            return found, message.cursor
        found.append(message)
    raise AssertionError("the stream has ended")


def subject(message) -> str | None:
    """The session or the account of a message; `None` for a heartbeat."""
    match message.WhichOneof("event"):
        case "session_ended":
            return message.session_ended.session_id
        case "roles_changed":
            return message.roles_changed.user_id
    return None


class Follower:
    """Follows the revocations for as long as it runs: resumes a stream whenever it ends, at any of its servers.

    `disturb` is asked after each new message what to do: `go on`, `leave`, `stall`, or `forget` (it loses what it has
    not written down, as after a crash, and resumes at an older cursor).
    """

    def __init__(
        self,
        servers: list[Server],
        token: Callable[[], str],
        disturb: Callable[[], str] = lambda: "go on",
        seed: int = 0,
    ):
        self._servers, self._token, self._disturb = servers, token, disturb
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._stream = None
        # When each arrived first, in the order of arrival.
        self.seen: dict[str, float] = {}
        self.messages, self.ends, self.faults = 0, Counter(), []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> "Follower":
        self._thread.start()
        return self

    def close(self) -> None:
        self._stop.set()
        if self._stream is not None:
            self._stream.cancel()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            cursors, token = [""], self._token()
            while not self._stop.is_set():
                with connect(self._random.choice(self._servers)) as channel:
                    try:
                        self._follow(channel, token, cursors)
                    except grpc.RpcError as error:
                        end = error.code(), reason_of(error)
                        self.ends["/".join(filter(None, (end[0].name, end[1])))] += 1
                        if end == EXPIRED:
                            token = self._token()
                        elif end[0] is not UNAVAILABLE and not self._stop.is_set():
                            self.faults.append(f"{end}: {error.details()}")
                            return
                        time.sleep(0.05)
        except BaseException as fault:  # it must reach the test
            self.faults.append(repr(fault))
            raise

    def _follow(self, channel: grpc.Channel, token: str, cursors: list[str]) -> None:
        self._stream = watch(channel, token, cursors[-1], timeout=None)
        for message in self._stream:
            self.messages += 1
            what = subject(message)
            is_new = what is not None and what not in self.seen
            if is_new:
                self.seen[what] = time.monotonic()
            cursors.append(message.cursor)
            del cursors[:-50]
            if self._stop.is_set():
                return
            match self._disturb() if is_new else "go on":
                case "leave":
                    self.ends["left"] += 1
                    self._stream.cancel()
                    return
                case "stall":
                    self.ends["stalled"] += 1
                    self._stop.wait(self._random.uniform(0.1, 1.5))
                case "forget":
                    self.ends["forgot"] += 1
                    del cursors[self._random.randrange(1, len(cursors)) :]
                    self._stream.cancel()
                    return


def heartbeats(stream) -> Iterator:
    return (message for message in stream if message.WhichOneof("event") == "heartbeat")
