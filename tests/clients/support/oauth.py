"""The OAuth endpoints by plain HTTP: forms, client authentication, and the form of the errors of RFC 6749."""

import base64
import uuid
from urllib.parse import quote, quote_plus, urlencode

from support.admin import AnyByRest, Somebody
from support.http import Answer, Rest
from support.services import ServiceAccount

FORM = "application/x-www-form-urlencoded"
TOKEN, INTROSPECT, REVOKE = "/oauth2/token", "/oauth2/introspect", "/oauth2/revoke"
BASIC = 'Basic realm="postern", charset="UTF-8"'


def basic(client_id: str, secret: str, encode=quote_plus) -> str:
    """The value of `authorization` (RFC 6749 §2.3.1)."""
    pair = f"{encode(client_id)}:{encode(secret)}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def every_byte(text: str) -> str:
    """A text with every byte percent-encoded, as a client may do it."""
    return "".join(f"%{byte:02x}" for byte in text.encode())


class OAuth:
    """Requests to the endpoints of one server."""

    def __init__(self, server):
        self._rest = Rest(server)
        self._secrets = server.secrets

    def post(self, path: str, fields=(), *, authorization: str | None = None, headers=()) -> Answer:
        """Posts a form. Fields are a dict, a list of pairs, or the text of a body."""
        pairs = fields.items() if isinstance(fields, dict) else fields
        if not isinstance(pairs, str | bytes):
            pairs = list(pairs)
            self._secrets.update(value for _, value in pairs if len(value) >= 32 and not _is_id(value))
            pairs = urlencode(pairs)
        sent = {"content-type": FORM, **dict(headers)}
        if authorization is not None:
            sent["authorization"] = authorization
        return self._rest.call("POST", path, pairs, headers=sent)

    def ok(self, path: str, fields=(), **options) -> dict:
        answer = self.post(path, fields, **options)
        assert answer.header("cache-control") == "no-store"
        assert answer.header("pragma") == "no-cache"
        return answer.ok()

    def revoke(self, **fields) -> None:
        """Posts to the revocation endpoint, which must say that it is done."""
        answer = self.post(REVOKE, fields)
        assert (answer.status, answer.body) == (200, b""), answer

    def refused(self, status: int, error: str, path: str, fields=(), **options) -> Answer:
        """Makes a request that must be refused with this status and error, in the form of RFC 6749 §5.2."""
        answer = self.post(path, fields, **options)
        return expect_error(answer, status, error)


def expect_error(answer: Answer, status: int, error: str) -> Answer:
    """Asserts that an answer is this error of RFC 6749 §5.2."""
    assert answer.status == status, (answer.status, answer.body)
    assert answer.header("content-type") == "application/json"
    assert answer.header("cache-control") == "no-store"
    document = answer.json()
    assert set(document) == {"error", "error_description"}
    assert document["error"] == error, document
    described = document["error_description"]
    assert described
    assert all(" " <= char <= "~" and char not in '"\\' for char in described), "the characters that §5.2 allows"
    assert not any(secret in described for secret in answer.secrets)
    if status == 401:
        assert answer.header("www-authenticate")
    return answer


class Service(ServiceAccount):
    """A service account with one key, made by an admin over REST, and how it authenticates."""

    def __init__(self, server, *roles: str):
        way = AnyByRest(Rest(server))
        super().__init__(way, Somebody(way, server.engine, "admin"), *roles)

    def basic(self, encode=quote) -> str:
        return basic(self.id, self.secret, encode)

    def bearer(self) -> str:
        return f"Bearer {self.token()}"

    @property
    def in_body(self) -> dict[str, str]:
        return {"client_id": self.id, "client_secret": self.secret}


def _is_id(value: str) -> bool:
    try:
        uuid.UUID(value)
    except ValueError:
        return False
    return True
