"""Commands at a pseudo-terminal, as an operator types them."""

import contextlib
import os
import pty
import subprocess
import threading

from support.wait import wait_until


def at_a_terminal(binary, environment: dict[str, str], arguments: list[str], answers: list[str]) -> tuple[int, str]:
    """Runs a command at a terminal and types the answers. Returns the exit code and the text on the terminal."""
    master, slave = pty.openpty()
    # `setsid --ctty` makes this the controlling terminal of the command, as for a login shell.
    asked = ["setsid", "--ctty", "--wait", binary, *arguments]
    process = subprocess.Popen(asked, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = bytearray()

    def read() -> None:
        # On Linux it is an error to read a terminal that no process has open any more.
        with contextlib.suppress(OSError):
            while part := os.read(master, 4096):
                seen.extend(part)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for number, answer in enumerate(answers, start=1):
            wait_until("it asks", lambda number=number: seen.count(b": ") >= number)
            os.write(master, f"{answer}\n".encode())
        code = process.wait(30)
        reader.join(5)
    finally:
        if process.poll() is None:
            process.kill()
        os.close(master)
    return code, seen.decode(errors="replace")
