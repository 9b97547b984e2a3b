"""A real nginx and a real HAProxy (Debian's) in front of the HTTP address of a server.

Each listens on a loopback port, has its files in a directory of the test, and is ended by its process id.
"""

import shutil
import socket
import subprocess
from pathlib import Path

from support.http import Rest
from support.ports import free_port
from support.wait import wait_until

NGINX = """
daemon off;
master_process off;
pid {directory}/pid;
error_log {directory}/log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/client;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    # Its own limit would refuse what Postern is to refuse.
    client_max_body_size 10m;
    upstream postern {{
        server {upstream};
        keepalive 8;
    }}
    server {{
        listen {address};
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        location / {{
            proxy_pass http://postern;
            proxy_request_buffering {buffering};
        }}
    }}
}}
"""

HAPROXY = """
global
    maxconn 100
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    # It would send a request again, and hide that its connection was lost.
    retries 0
listen postern
    bind {address}
    option forwardfor
    server postern {upstream}
"""

# What can be started, by name: the program, its arguments, its configuration, and further values in it.
KINDS = {
    "nginx": ("nginx", ("-c",), NGINX, {"buffering": "on"}),
    "nginx that does not buffer": ("nginx", ("-c",), NGINX, {"buffering": "off"}),
    "HAProxy": ("haproxy", ("-db", "-f"), HAPROXY, {}),
}


def find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(f"/usr/sbin/{program}")


class Proxy:
    """One proxy of `KINDS` in front of one HTTP address. It runs from `start` until `close`."""

    def __init__(self, kind: str, executable: str, upstream: str, directory: Path):
        _, self._arguments, self._template, self._values = KINDS[kind]
        self._executable = executable
        self._upstream = upstream
        self._directory = directory
        self._process: subprocess.Popen | None = None
        self.address = f"127.0.0.1:{free_port()}"

    def start(self) -> "Proxy":
        configuration = self._directory / "proxy.conf"
        places = {"directory": self._directory, "upstream": self._upstream, "address": self.address}
        configuration.write_text(self._template.format(**places, **self._values))
        with (self._directory / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [self._executable, *self._arguments, configuration],
                cwd=self._directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        wait_until("the proxy accepts connections", self._accepts)
        return self

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)

    def _accepts(self) -> bool:
        assert self._process.poll() is None, (self._directory / "output").read_text(errors="replace")[-2000:]
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise AssertionError(str(error)) from None
        return True


class ThroughProxy(Rest):
    """The same calls through a proxy."""

    def __init__(self, server, proxy: Proxy):
        super().__init__(server)
        self.address = proxy.address
