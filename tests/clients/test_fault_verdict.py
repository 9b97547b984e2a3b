"""`scripts/faults` finds what is lost: its verdict is asked about a database in which something acknowledged is missing.

The faults themselves are injected in nightly runs, into a cluster (tests/faults).
"""

import sys

import pytest

from support import pb
from support.admin import give_role
from support.client import Person
from support.mail import Mailbox

sys.path.insert(0, str(pb.REPOSITORY / "tests"))
from faults import verdict  # noqa: E402
from faults.calls import Caller  # noqa: E402
from faults.load import Admin, Client  # noqa: E402

LOSSES = {
    "nothing": ([], []),
    "a sign-up": (["DELETE FROM users WHERE email = ?"], ["cannot log in", "REFRESH_TOKEN_INVALID", "NOT_FOUND"]),
    "a logout": (["UPDATE sessions SET revoke_time = NULL, revoke_reason = NULL"], ["was ended"]),
    "a login": (["UPDATE sessions SET revoke_time = 1, revoke_reason = 'logout'"], ["was opened or refreshed"]),
    "a change of roles": (["DELETE FROM user_roles WHERE role = 'editor'"], ["has the roles"]),
}


@pytest.fixture
def told(embedded, start_server, tmp_path):
    """A client with an account that has a role, a session that is alive, and one that was ended."""
    server = start_server(embedded)
    chief = Person()
    give_role(embedded, server.client.sign_up(chief).id, "admin")
    caller, admin = Caller(server.address), Admin(chief.email, chief.password)
    admin.login(caller)
    client = Client(tmp_path / "ledger", [caller], admin)
    client.fault = "a fault"
    assert client.sign_up()
    (account,) = client.state.accounts
    client.make_sessions(2)
    first, second = client.state.sessions
    client.refresh(first)
    client.logout(second)
    client.change_roles(account, "editor")
    yield embedded, client, caller, client.state.accounts[account]
    caller.close()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_verdict_names_what_was_acknowledged_and_is_lost(told, loss):
    engine, client, caller, account = told
    statements, expected = LOSSES[loss]
    for statement in statements:
        assert engine.execute(statement, *([account.email] if "?" in statement else []))
    found = verdict.check([client], [caller], caller, "a fault")
    assert all(loss.during == "a fault" for loss in found)
    assert bool(found) == bool(expected), found
    for text in expected:
        assert any(text in loss.what for loss in found), (text, found)


def test_the_verdict_names_a_mail_that_was_not_sent(told, monkeypatch):
    _, client, _, account = told
    monkeypatch.setattr(verdict, "MAIL_PATIENCE", 0)
    mailbox = Mailbox().start()
    try:
        assert [loss.what for loss in verdict.mails([client], mailbox)] == [f"no mail was sent to {account.email}"]
    finally:
        mailbox.close()
