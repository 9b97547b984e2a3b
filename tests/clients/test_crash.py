"""Acknowledged changes are durable: SIGKILL right after an OK loses nothing, on both engines.

It tests a server process that is killed. A database that stops is in `test_outage`, clients that cancel calls are in
`test_cancellation`, mail that is being sent is in `test_mail_faults`.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc

from support.client import Person
from support.expect import expect_error, expect_unauthenticated, failure_of
from support.mail import RESET, VERIFY
from support.wait import wait_until


def test_a_sign_up_is_there_after_a_kill(engine, start_server):
    server = start_server(engine)
    person = Person()

    made = server.client.sign_up(person)
    server.kill()
    server.restart()

    assert server.client.me(server.client.login(person).access_token) == made


def test_a_session_is_there_after_a_kill(engine, start_server):
    server = start_server(engine)
    person = Person()
    server.client.sign_up(person)

    tokens = server.client.login(person)
    server.kill()
    server.restart()

    assert server.client.me(tokens.access_token).email == person.email
    assert server.client.refresh(tokens.refresh_token)


def test_a_rotation_is_there_after_a_kill(engine, start_server):
    server = start_server(engine, refresh_retry_window="60s")
    _, first = server.client.newcomer()
    second = server.client.refresh(first.refresh_token)

    third = server.client.refresh(second.refresh_token)
    server.kill()
    server.restart()

    assert server.client.refresh(second.refresh_token).refresh_token == third.refresh_token, "rotated only once"
    expect_unauthenticated(lambda: server.client.refresh(first.refresh_token), "REFRESH_TOKEN_INVALID")


def test_a_logout_is_there_after_a_kill(engine, start_server):
    server = start_server(engine)
    person, tokens = server.client.newcomer()
    living = server.client.login(person)

    server.client.logout(tokens.refresh_token)
    server.kill()
    server.restart()

    expect_unauthenticated(lambda: server.client.me(tokens.access_token), "SESSION_REVOKED")
    expect_unauthenticated(lambda: server.client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID")
    assert server.client.me(living.access_token)


def test_a_theft_is_there_after_a_kill(engine, start_server):
    server = start_server(engine)
    _, first = server.client.newcomer()
    second = server.client.refresh(first.refresh_token)
    third = server.client.refresh(second.refresh_token)

    expect_unauthenticated(lambda: server.client.refresh(first.refresh_token), "REFRESH_TOKEN_INVALID")
    server.kill()
    server.restart()

    expect_unauthenticated(lambda: server.client.me(third.access_token), "SESSION_REVOKED")
    expect_unauthenticated(lambda: server.client.refresh(third.refresh_token), "REFRESH_TOKEN_INVALID")


def test_what_a_token_from_a_mail_did_is_there_after_a_kill(engine, start_server, start_mailbox):
    mailbox = start_mailbox()
    server = start_server(engine, mail_url=mailbox.url)
    verified, _ = server.client.newcomer()
    reset, tokens = server.client.newcomer()
    server.client.request_password_reset(reset.email)
    used = mailbox.token(verified.email, VERIFY), mailbox.token(reset.email, RESET)
    again = replace(reset, password=Person().password)

    server.client.verify_email(used[0])
    server.client.reset_password(used[1], again.password)
    server.kill()
    server.restart()

    assert server.client.me(server.client.login(verified).access_token).email_verified
    assert server.client.login(again)
    expect_unauthenticated(lambda: server.client.login(reset), "INVALID_CREDENTIALS")
    expect_unauthenticated(lambda: server.client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    expect_error(lambda: server.client.verify_email(used[0]), invalid, "ONE_TIME_TOKEN_INVALID")
    expect_error(lambda: server.client.reset_password(used[1], again.password), invalid, "ONE_TIME_TOKEN_INVALID")


def test_a_kill_amid_sign_ups_keeps_every_one_that_was_acknowledged(engine, start_server):
    server = start_server(engine)
    # A separate connection, because `server.client` is closed as soon as the process has ended.
    client = server.new_client()
    acknowledged = []

    def sign_up_until_it_ends():
        while True:
            person = Person()
            try:
                client.sign_up(person)
            except grpc.RpcError:
                return
            acknowledged.append(person.email)

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(sign_up_until_it_ends) for _ in range(4)]
        wait_until("some sign-ups are acknowledged", lambda: len(acknowledged) >= 40, pause=0.005)
        server.kill()
        for worker in workers:
            worker.result()
    client.close()

    server.restart()
    assert set(acknowledged) <= engine.emails()
    assert server.client.newcomer(), "the server accepts sign-ups again"


def test_sigterm_finishes_the_calls_in_flight_and_exits_cleanly(engine, start_server):
    # With one slow hashing thread, the other logins are still queued when the first is answered. All six must end
    # within the server's deadline of ten seconds, even on a busy machine.
    server = start_server(engine, argon2_memory_kib=32768, argon2_iterations=2, hash_threads=1, hash_queue=8)
    person, _ = server.client.newcomer()
    # A separate connection, because `server.client` is closed as soon as the process has ended.
    client = server.new_client()

    with ThreadPoolExecutor(6) as pool:
        logins = [pool.submit(client.login, person) for _ in range(6)]
        wait_until("the first login is answered", lambda: any(login.done() for login in logins), pause=0.002)
        unanswered = [login for login in logins if not login.done()]
        server.stop()

    assert unanswered, "some calls were in flight"
    for login in unanswered:
        assert login.result().access_token
    client.close()


def test_after_sigterm_nobody_new_is_let_in_and_a_restart_serves_again(engine, start_server):
    server = start_server(engine)
    person, tokens = server.client.newcomer()
    address = server.address

    server.stop()

    late = server.new_client()
    assert failure_of(lambda: late.me(tokens.access_token)).code() is grpc.StatusCode.UNAVAILABLE
    late.close()
    server.restart()
    assert server.address == address
    assert server.client.me(tokens.access_token).email == person.email
