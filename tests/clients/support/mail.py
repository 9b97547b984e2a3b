"""An SMTP server that keeps the mails it receives, and that can be as unreliable as a real one.

It runs in its own thread on a private port, which it keeps when it goes down and comes back. It knows that a mail of
Postern has one link with a token, or none. Its TLS certificates are from a private CA.
"""

import asyncio
import contextlib
import email
import email.header
import email.policy
import email.utils
import re
import socket
import ssl
import struct
import threading
import time
from dataclasses import dataclass, replace
from email.message import EmailMessage
from urllib.parse import urlsplit

import trustme
from aiosmtpd.smtp import SMTP, AuthResult

from support.wait import wait_until

# Longer than a delivery takes on a busy machine. A test in which a mail waits for a retry gives its own deadline.
DELIVERY_DEADLINE = 60

VERIFY, RESET, CHANGE = "verify-email", "reset-password", "confirm-email-change"
LINK = re.compile(r"https?://[^\s<>\"]+")
TOKEN = re.compile(r"(?<![\w-])[\w-]{64}(?![\w-])", re.ASCII)


@dataclass(frozen=True)
class Mail:
    """A mail that was accepted, with its envelope."""

    sender: str
    recipients: tuple[str, ...]
    message: EmailMessage
    # The message as it was received.
    content: bytes = b""
    # Whether the connection was encrypted.
    encrypted: bool = False
    # When it was accepted, by `time.monotonic`.
    arrival: float = 0

    @property
    def author(self) -> tuple[str, str]:
        """The name and the address in `From`.

        This uses the older parser. With `email.policy.default`, Python 3.11 keeps the space between two encoded words,
        which RFC 2047 §6.2 removes. So a name of two encoded words would contain an additional space.
        """
        name, address = email.utils.parseaddr(email.message_from_bytes(self.content)["From"].replace("\r\n", ""))
        return str(email.header.make_header(email.header.decode_header(name))), address

    @property
    def text(self) -> str:
        return self.message.get_body(("plain",)).get_content()

    @property
    def html(self) -> str:
        return self.message.get_body(("html",)).get_content()

    @property
    def link(self) -> str:
        """The one link that carries a token."""
        links = [link for link in LINK.findall(self.text) if TOKEN.search(link)]
        assert len(links) == 1, f"wanted one link with a token: {self.text}"
        return links[0]

    @property
    def token(self) -> str:
        return TOKEN.search(self.link)[0]

    @property
    def kind(self) -> str | None:
        """The page that its link leads to; `None` for a notice, which carries no token."""
        return urlsplit(self.link).path.rpartition("/")[2] if TOKEN.search(self.text) else None

    def __str__(self) -> str:
        return f"{self.kind or 'a notice'} to {', '.join(self.recipients)}: {self.message['subject']}"


def parse(content: bytes) -> EmailMessage:
    return email.message_from_bytes(content, policy=email.policy.default)


@dataclass(frozen=True)
class Behaviour:
    """How the server treats its clients."""

    # It accepts connections and never sends anything.
    silent: bool = False
    # It accepts connections and resets them at once.
    resets: bool = False
    # The replies to RCPT and DATA, if the server rejects these commands.
    at_recipient: str | None = None
    at_data: str | None = None
    # It reads the whole mail and does not reply.
    hangs_in_data: bool = False
    # It reads the whole mail and resets the connection.
    resets_in_data: bool = False
    # The recipients to which the four fields above apply. `None` means all.
    towards: frozenset[str] | None = None

    def concerns(self, recipients) -> bool:
        return self.towards is None or bool(self.towards & {recipient.lower() for recipient in recipients})


GOOD = Behaviour()


@dataclass(frozen=True)
class Tls:
    """A certificate for the server, and the file with the certificate of its CA."""

    context: ssl.SSLContext
    ca_file: str


def make_tls(directory, *names: str) -> Tls:
    """A certificate for these names, issued by a private CA, and the file with the CA's certificate."""
    ca = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names).configure_cert(context)
    file = directory / f"ca-of-{names[0]}.pem"
    ca.cert_pem.write_to_path(file)
    return Tls(context, str(file))


class Mailbox:
    """An SMTP server, and all mails that were delivered to it."""

    def __init__(
        self,
        *,
        starttls: Tls | None = None,
        implicit_tls: Tls | None = None,
        credentials: tuple[str, str] | None = None,
    ):
        self.behaviour = GOOD
        # How many mails were read completely, whether or not they were accepted.
        self.seen_in_data = 0
        # The time and the recipient of every RCPT command, whether or not it was accepted.
        self.attempts: list[tuple[float, str]] = []
        self.connections = 0
        # Whole mails that were not accepted.
        self.refused: list[Mail] = []
        self._starttls = starttls
        self._implicit_tls = implicit_tls
        self._credentials = credentials
        self._delivered: list[Mail] = []
        self._taken: set[int] = set()
        self._lock = threading.Lock()
        self._open: set[asyncio.BaseTransport] = set()
        # The open connections that get no further reply.
        self._hung: set[asyncio.BaseTransport] = set()
        self._listener: asyncio.Server | None = None
        self._port = 0
        self._loop = asyncio.new_event_loop()
        # The loop would report every connection that this server resets, which is expected.
        self._loop.set_exception_handler(lambda _loop, _context: None)
        self._thread = threading.Thread(target=self._loop.run_forever, name="smtp", daemon=True)

    # -- as a server ----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        scheme = "smtps" if self._implicit_tls else "smtp"
        return f"{scheme}://{self.address}"

    def start(self) -> "Mailbox":
        self._thread.start()
        self.come_back()
        return self

    def close(self) -> None:
        if self._thread.is_alive():
            self.go_down()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    def go_down(self) -> None:
        """Closes the port, and every connection."""

        async def down():
            self._listener.close()
            self._reset_all()

        self._run(down())

    def come_back(self) -> None:
        """Listens, on the same port as before."""

        async def up():
            context = self._implicit_tls.context if self._implicit_tls else None
            self._listener = await self._loop.create_server(self._converse, "127.0.0.1", self._port, ssl=context)
            self._port = self._listener.sockets[0].getsockname()[1]

        self._run(up())

    def behave(self, behaviour: Behaviour) -> None:
        """Changes the behaviour. Open connections are reset, because they were made under the previous one."""
        self.behaviour = behaviour

        async def cut():
            self._reset_all()

        self._run(cut())

    def recover(self) -> None:
        """Serves normally from now on. Connections that hang already stay as they are."""
        self.behaviour = GOOD

    def reset_hanging(self) -> None:
        """Serves normally from now on, and resets the connections that hang. None of their mails was accepted."""

        async def reset():
            self.behaviour = GOOD
            for transport in list(self._hung):
                _reset(transport)
            self._hung.clear()

        self._run(reset())

    def offer_starttls(self, tls: Tls) -> None:
        """Offers STARTTLS on new connections."""
        self._starttls = tls

    def _run(self, task):
        return asyncio.run_coroutine_threadsafe(task, self._loop).result(10)

    def _reset_all(self) -> None:
        for transport in list(self._open):
            _reset(transport)
        self._open.clear()

    def _converse(self) -> asyncio.Protocol:
        if self.behaviour.silent or self.behaviour.resets:
            return _Silent(self)
        authenticating = {}
        if self._credentials:
            authenticating = {
                "auth_required": True,
                "auth_require_tls": False,
                "authenticator": self._authenticate,
            }
        return _Conversation(
            self,
            hostname="mail.example.com",
            tls_context=self._starttls.context if self._starttls else None,
            require_starttls=self._starttls is not None,
            loop=self._loop,
            **authenticating,
        )

    def _authenticate(self, _server, _session, _envelope, _mechanism, given) -> AuthResult:
        right = (given.login.decode(), given.password.decode()) == self._credentials
        # With `handled`, aiosmtpd would assume that the refusal was sent already.
        return AuthResult(success=right, handled=right)

    # -- as a collection of mails ---------------------------------------------------------------------------------

    def mails(self, address: str | None = None) -> list[Mail]:
        """All delivered mails, or only those to one address. Addresses are compared exactly."""
        with self._lock:
            return [mail for mail in self._delivered if address is None or address in mail.recipients]

    def take(self, address: str, kind: str | None, deadline: float = DELIVERY_DEADLINE) -> Mail:
        """Waits for the next mail of this kind to this address and takes it. The kind of a notice is `None`."""

        def next_one() -> Mail | None:
            with self._lock:
                for number, mail in enumerate(self._delivered):
                    if number not in self._taken and address in mail.recipients and mail.kind == kind:
                        self._taken.add(number)
                        return mail
            return None

        try:
            return wait_until(f"a mail to {address} ({kind or 'a notice'})", next_one, deadline, pause=0.02)
        except AssertionError as error:
            here = [str(mail) for mail in self.mails(address)]
            raise AssertionError(f"{error}; delivered there: {here}") from None

    def token(self, address: str, kind: str, deadline: float = DELIVERY_DEADLINE) -> str:
        """The token of the next mail of this kind to this address."""
        return self.take(address, kind, deadline).token

    def notice(self, address: str, deadline: float = DELIVERY_DEADLINE) -> Mail:
        """The next mail without a token to this address."""
        return self.take(address, None, deadline)

    def _accept(self, mail: Mail) -> None:
        with self._lock:
            self._delivered.append(replace(mail, arrival=time.monotonic()))


class _Conversation(SMTP):
    """One connection that is answered."""

    def __init__(self, mailbox: Mailbox, **options):
        super().__init__(_Handler(mailbox), **options)
        self._mailbox = mailbox

    def connection_made(self, transport):
        # This is called again after STARTTLS, with the transport inside TLS.
        if self.transport is None:
            self._mailbox.connections += 1
        self._mailbox._open.add(transport)
        super().connection_made(transport)

    def connection_lost(self, error):
        self._mailbox._open.discard(self.transport)
        self._mailbox._hung.discard(self.transport)
        super().connection_lost(error)


class _Handler:
    """Replies to the SMTP commands according to the behaviour of the mailbox."""

    def __init__(self, mailbox: Mailbox):
        self._mailbox = mailbox

    async def handle_RCPT(self, server, session, envelope, address, options):
        behaviour = self._mailbox.behaviour
        self._mailbox.attempts.append((time.monotonic(), address))
        if behaviour.at_recipient and behaviour.concerns([address]):
            # The reply repeats the address, as that of real servers does.
            return f"{behaviour.at_recipient} <{address}>"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        behaviour = self._mailbox.behaviour
        message = parse(envelope.content)
        encrypted = server.transport.get_extra_info("ssl_object") is not None
        mail = Mail(envelope.mail_from, tuple(envelope.rcpt_tos), message, envelope.content, encrypted)
        self._mailbox.seen_in_data += 1
        if behaviour.concerns(envelope.rcpt_tos) and (
            behaviour.hangs_in_data or behaviour.resets_in_data or behaviour.at_data
        ):
            self._mailbox.refused.append(mail)
            if behaviour.hangs_in_data:
                self._mailbox._hung.add(server.transport)
                # This lasts until the connection is lost, which cancels it.
                await asyncio.sleep(3600)
            if behaviour.resets_in_data:
                _reset(server.transport)
            return f"{behaviour.at_data} <{', '.join(envelope.rcpt_tos)}>"
        self._mailbox._accept(mail)
        return "250 OK"


class _Silent(asyncio.Protocol):
    """One connection that is accepted and never answered."""

    def __init__(self, mailbox: Mailbox):
        self._mailbox = mailbox
        self._transport = None

    def connection_made(self, transport):
        self._transport = transport
        self._mailbox.connections += 1
        if self._mailbox.behaviour.resets:
            _reset(transport)
        else:
            self._mailbox._open.add(transport)
            self._mailbox._hung.add(transport)

    def connection_lost(self, error):
        self._mailbox._open.discard(self._transport)
        self._mailbox._hung.discard(self._transport)


def _reset(transport: asyncio.BaseTransport) -> None:
    """Closes a connection with RST instead of FIN, as a dying process or a firewall does."""
    # A TLS transport that is closed already has no transport below it.
    with contextlib.suppress(AttributeError):
        wire = transport.get_extra_info("socket")
        if wire is not None and wire.fileno() != -1:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
