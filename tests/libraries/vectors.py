"""The vectors: tokens, what is asked of them, and the verdict. The real server makes the good ones, and judges all.

Every client library runs the whole file, so that none has a rule of its own. A case is
`{name, token, demand, revocations, verdict, caller}`: `demand` is the kind of subject and the role that are wanted,
`revocations` are messages of `WatchRevocations` as proto3 JSON, in order, `verdict` is `ACCEPTED` or a reason of
`docs/errors.md`, and `caller` says who it is if the token is accepted. `algorithms` has a good token for each of the
other algorithms of signing keys. Most forgeries have a valid signature, by the
server's own key: a library that checked only signatures would accept them.
"""

import time
import uuid
from dataclasses import dataclass, field

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from google.protobuf import json_format

from staging import Stage
from support import forgeries, jose, pb
from support.client import TIMEOUT
from support.engine import Sqlite
from support.expect import reason_of
from support.keys import published_keys
from support.server import Server
from support.watch import until_caught_up, watch

ACCEPTED = "ACCEPTED"
ANYBODY = {"subject_type": None, "role": None}
PERSON = {"subject_type": "user", "role": None}
SERVICE = {"subject_type": "service", "role": None}
ADMIN = {"subject_type": None, "role": "admin"}


@dataclass
class Case:
    name: str
    token: str
    demand: dict = field(default_factory=lambda: ANYBODY)
    revocations: list[dict] = field(default_factory=list)
    verdict: str = ""

    def as_json(self) -> dict:
        written = {
            "name": self.name,
            "token": self.token,
            "demand": self.demand,
            "revocations": self.revocations,
            "verdict": self.verdict,
        }
        if self.verdict == ACCEPTED:
            written["caller"] = caller_of(self)
        return written


def make(stage: Stage) -> dict:
    """Everything, as it is written to the file."""
    person = stage.new_account()
    old_service = stage.new_service()
    old = old_service.token()
    stage.rotate_keys()
    cases = [
        Case("a person", person["accessToken"]),
        Case("a person whose token an older key signed", person["accessToken"], PERSON),
        Case("a service whose token an older key signed", old, SERVICE),
        *demanded(stage),
        *signed_by_us(stage),
        *forged(stage),
        *revoked(stage),
    ]
    for case in cases:
        case.verdict = case.verdict or judged(stage, case)
    return {
        "issuer": stage.issuer,
        "audience": stage.variables()["POSTERN_AUDIENCE"],
        "jwks": stage.jwks(),
        "cases": [case.as_json() for case in cases],
        "algorithms": [of_algorithm(stage, name) for name in ("EdDSA", "RS256")],
    }


def of_algorithm(stage: Stage, algorithm: str) -> dict:
    """A token of a server whose keys are of another kind, with all that is needed to accept it."""
    issuer = f"http://{algorithm.lower()}.example"
    directory = stage.directory / algorithm
    directory.mkdir()
    engine = Sqlite(directory / "data")
    server = Server(stage.server.binary, engine, directory, signing_algorithm=algorithm, issuer=issuer, lame_duck="0s")
    try:
        _, tokens = server.start().client.newcomer()
        return {
            "algorithm": algorithm,
            "issuer": issuer,
            "audience": "postern",
            "jwks": {"keys": published_keys(server)},
            "token": tokens.access_token,
            "subject": jose.claims_of(tokens.access_token)["sub"],
        }
    finally:
        server.close()


def judged(stage: Stage, case: Case) -> str:
    """What the server says to a call with the token that has the demands of the case."""
    client = stage.server.client
    try:
        if case.demand["role"]:
            client.call("ListUsers", pb.ListUsersRequest(page_size=1), token=case.token)
        elif case.demand == SERVICE or (case.demand == ANYBODY and is_of_a_service(case.token)):
            stream = watch(client.channel, case.token, timeout=TIMEOUT)
            next(iter(stream))
            stream.cancel()
        else:
            client.me(case.token)
    except grpc.RpcError as error:
        return reason_of(error)
    return ACCEPTED


def is_of_a_service(token: str) -> bool:
    try:
        return jose.claims_of(token).get("subject_type") == "service"
    except (ValueError, IndexError, AttributeError):
        return False


def caller_of(case: Case) -> dict:
    """Who the token stands for. A message about the roles replaces those of the token."""
    claims = jose.claims_of(case.token)
    roles = claims["roles"]
    for message in case.revocations:
        changed = message.get("rolesChanged", {})
        if changed.get("userId") == claims["sub"]:
            roles = changed.get("roles", [])
    caller = {
        "subject": claims["sub"],
        "subjectType": claims["subject_type"],
        "clientId": claims["client_id"],
        "sessionId": claims["sid"],
        "tokenId": claims["jti"],
        "username": claims["username"],
        "roles": roles,
    }
    if claims["subject_type"] == "user":
        caller |= {"email": claims["email"], "emailVerified": claims["email_verified"]}
    return caller


def demanded(stage: Stage) -> list[Case]:
    """Each kind of caller against each demand."""
    tokens = {
        "a person": stage.new_account()["accessToken"],
        "an admin": stage.new_account("admin")["accessToken"],
        "a service": stage.new_service().token(),
        "a service that is an admin": stage.new_service("admin").token(),
    }
    demands = {"nothing more": ANYBODY, "a person": PERSON, "a service": SERVICE, "an admin": ADMIN}
    return [
        Case(f"{who} where {what} is wanted", token, demand)
        for who, token in tokens.items()
        for what, demand in demands.items()
    ]


def signed_by_us(stage: Stage) -> list[Case]:
    """Tokens with a valid signature of the server's key that Postern would not have signed, and some that it would."""
    token, service = stage.new_account()["accessToken"], stage.new_service().token()
    header, claims = jose.header_of(token), jose.claims_of(token)
    key = load_pem_private_key(stage.private_key(header["kid"]).encode(), None)
    sign, now = jose.es256(key), int(time.time())

    def signed(changes: dict, of: dict = claims, head: dict = header) -> str:
        # `None` leaves a member out. Each token has an id of its own.
        changed = {**of, "jti": str(uuid.uuid4()), **changes}
        return jose.forge(head, {name: value for name, value in changed.items() if value is not None}, sign)

    def headed(changes: dict) -> str:
        return signed({}, head={name: value for name, value in {**header, **changes}.items() if value is not None})

    refresh_audience = "postern:refresh"
    bodies = {
        "signed by the key of the server, as it does": {},
        "expired an hour ago": {"exp": now - 3600, "iat": now - 4500},
        "expired half a minute ago": {"exp": now - 30, "iat": now - 930},
        "expires in 1970": {"exp": 1},
        "expires before 1970": {"exp": -1},
        "never expires": {"exp": None},
        "expires at a text": {"exp": str(now + 900)},
        "expires at a fraction of a second": {"exp": now + 900.5},
        "issued in an hour": {"iat": now + 3600, "exp": now + 4500},
        "issued in ten minutes": {"iat": now + 600},
        "issued at no time": {"iat": None},
        "issued at a text": {"iat": str(now)},
        "another issuer": {"iss": "http://elsewhere.example"},
        "the issuer with a slash": {"iss": claims["iss"] + "/"},
        "the issuer in capitals": {"iss": claims["iss"].upper()},
        "a list of issuers": {"iss": [claims["iss"]]},
        "no issuer": {"iss": None},
        "another audience": {"aud": "billing"},
        "the audience of refresh tokens": {"aud": refresh_audience},
        "a list with the audience": {"aud": [claims["aud"]]},
        "a list with the audience and another one": {"aud": ["billing", claims["aud"]]},
        "an audience that begins as ours": {"aud": claims["aud"] + "2"},
        "no audience": {"aud": None},
        "an empty audience": {"aud": ""},
        "no subject": {"sub": None},
        "an empty subject": {"sub": ""},
        "a subject that is a number": {"sub": 1},
        "no session": {"sid": None},
        "no token id": {"jti": None},
        "no client": {"client_id": None},
        "the client of a service": {"client_id": claims["sub"]},
        "no username": {"username": None},
        "a username that is a list": {"username": ["ada"]},
        "no roles": {"roles": None},
        "roles that are a text": {"roles": "admin user"},
        "a role that is a number": {"roles": [1]},
        "no address": {"email": None},
        "an address that is a number": {"email": 1},
        "nothing of whether the address is verified": {"email_verified": None},
        "an address verified by a text": {"email_verified": "true"},
        "another kind of subject": {"subject_type": "device"},
        "a kind of subject in capitals": {"subject_type": "USER"},
        "a person's token that says it is a service's": {"subject_type": "service"},
        "a claim that nobody knows": {"acr": "1"},
    }
    heads = {
        "typ JWT": {"typ": "JWT"},
        "typ rt+jwt": {"typ": "rt+jwt"},
        "typ application/at+jwt": {"typ": "application/at+jwt"},
        "typ AT+JWT": {"typ": "AT+JWT"},
        "no typ": {"typ": None},
        "no kid": {"kid": None},
        "an unknown kid": {"kid": "unknown"},
        "a kid that is a number": {"kid": 1},
        "alg in small letters": {"alg": "es256"},
        "alg ES384": {"alg": "ES384"},
        "alg none": {"alg": "none"},
        "crit": {"crit": ["exp"]},
        "an empty crit": {"crit": []},
        "b64": {"b64": True},
        "cty": {"cty": "JWT"},
        "zip": {"zip": "DEF"},
        "jku": {"jku": forgeries.ELSEWHERE},
        "jwk": {"jwk": jose.jwk_of(key.public_key())},
        "x5u": {"x5u": forgeries.ELSEWHERE},
    }
    service_claims = jose.claims_of(service)
    services = {
        "a service's token that says it is a person's": {"subject_type": "user"},
        "a service's token with an address": {"email": "ada@example.com", "email_verified": True},
        "a service's token of another client": {"client_id": claims["sub"]},
        "a service's token of the client of people": {"client_id": "postern"},
        "a service's token without a kind": {"subject_type": None},
    }
    other = ec.generate_private_key(ec.SECP256R1())
    return [
        *(Case(f"signed: {name}", signed(changes), PERSON) for name, changes in bodies.items()),
        *(Case(f"signed, header: {name}", headed(changes), PERSON) for name, changes in heads.items()),
        *(Case(f"signed: {name}", signed(changes, service_claims), SERVICE) for name, changes in services.items()),
        Case("signed: nine kilobytes", signed({"username": "a" * 9000}), PERSON),
        Case("signed: a payload that is a list", jose.forge(header, [claims], sign), PERSON),
        Case("signed by a key that is not published", jose.forge(header, claims, jose.es256(other)), PERSON),
    ]


def forged(stage: Stage) -> list[Case]:
    """What somebody without the key would try. A thinned selection keeps the file readable."""
    person = stage.new_account()
    made = forgeries.of(person["accessToken"], stage.jwks()["keys"])
    truncations = [name for name in made if name.startswith("the first ")]
    for name in truncations[:-1:2]:
        del made[name]
    forged = [Case(f"forged: {name}", text, PERSON) for name, text in made.items()]
    return [*forged, Case("a refresh token", person["refreshToken"], PERSON)]


class News:
    """What the stream of revocations says, for a service that follows it."""

    def __init__(self, stage: Stage):
        self._token = stage.new_service().token()
        self._channel = stage.server.client.channel
        self._cursor = ""

    def after(self, action, about: str) -> list[dict]:
        """Does something, and returns the messages that it causes about the session, token or account of this id."""
        self._read()
        action()
        found, deadline = [], time.monotonic() + TIMEOUT
        while not found:
            assert time.monotonic() < deadline, "the stream says nothing about it"
            found = [message for message in self._read() if about in ids_of(message)]
        return found

    def _read(self) -> list[dict]:
        stream = watch(self._channel, self._token, self._cursor)
        messages, self._cursor = until_caught_up(stream)
        stream.cancel()
        return [json_format.MessageToDict(message) for message in messages]


def ids_of(message: dict) -> set[str]:
    return {message.get("sessionEnded", {}).get("sessionId"), message.get("rolesChanged", {}).get("userId")}


def revoked(stage: Stage) -> list[Case]:
    """Tokens whose session, key or account ended, or whose roles changed, with what the stream says about it."""
    news, cases = News(stage), []

    def add(*case) -> None:
        """Judged at once: what follows may change the verdict."""
        cases.append(Case(*case))
        cases[-1].verdict = judged(stage, cases[-1])

    def by_admin(rpc: str, id: str, **fields) -> list[dict]:
        """A change of a person's account, and what is said about it."""
        return news.after(lambda: stage.way.ok(rpc, credential=stage.admin.credential, user_id=id, **fields), id)

    person = stage.new_account()
    sid = jose.claims_of(person["accessToken"])["sid"]
    ended = news.after(lambda: stage.log_out(person["refreshToken"]), sid)
    add("a session that was logged out", person["accessToken"], PERSON, ended)
    add("another session, after that", stage.new_account()["accessToken"], PERSON, ended)

    service = stage.new_service()
    spent, spare = service.token(), service.token()
    ended = news.after(lambda: stage.way.ok("RevokeToken", token=spent), jose.claims_of(spent)["jti"])
    add("a service's token that was revoked", spent, SERVICE, ended)
    add("the service's other token", spare, SERVICE, ended)
    ended = news.after(service.delete_key, jose.claims_of(spare)["sid"])
    add("a token whose key was deleted", spare, SERVICE, ended)

    person = stage.new_account()
    add("a person who was disabled", person["accessToken"], PERSON, by_admin("DisableUser", person["id"]))
    person = stage.new_account()
    messages = by_admin("SetUserRoles", person["id"], roles=["user", "admin"])
    add("a person who became an admin", person["accessToken"], ADMIN, messages)
    admin = stage.new_account("admin")
    messages = by_admin("SetUserRoles", admin["id"], roles=["user"])
    add("an admin who is none any more", admin["accessToken"], ADMIN, messages)
    add("an admin who is none any more, as a person", admin["accessToken"], PERSON, messages)
    admin = stage.new_account("admin")
    messages = by_admin("SetUserRoles", admin["id"], roles=["user"])
    messages += by_admin("SetUserRoles", admin["id"], roles=["user", "admin"])
    add("an admin who was none for a while", admin["accessToken"], ADMIN, messages)

    service = stage.new_service()
    token = service.token()
    messages = news.after(lambda: service.change("DisableServiceAccount"), service.id)
    add("a service that was disabled", token, SERVICE, messages)
    service = stage.new_service()
    token = service.token()
    messages = news.after(lambda: service.change("DisableServiceAccount"), service.id)
    messages += news.after(lambda: service.change("EnableServiceAccount"), service.id)
    add("a service that was disabled and enabled again", token, SERVICE, messages)
    return cases
