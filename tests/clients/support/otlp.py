"""A receiver of OTLP over gRPC, as a collector has it, on the messages and the service of `opentelemetry-proto`.

It keeps what it gets. It can hang, so that whoever sends to it has to wait.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import trustme
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service
from opentelemetry.proto.trace.v1 import trace_pb2

from support.ports import free_port

KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")


@dataclass(frozen=True)
class Span:
    """One span as it was received."""

    name: str
    trace: str
    id: str
    # Empty for the root of a trace.
    parent: str
    kind: str
    failed: bool
    attributes: dict
    resource: dict
    events: int


def attributes_of(pairs) -> dict:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


class Collector(service.TraceServiceServicer):
    def __init__(self, port: int | None = None, certificate: trustme.LeafCert | None = None):
        self.port = port or free_port()
        self.requests: list[messages.ExportTraceServiceRequest] = []
        self.metadata: list[dict[str, str]] = []
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._server = grpc.server(ThreadPoolExecutor(4))
        service.add_TraceServiceServicer_to_server(self, self._server)
        address = f"127.0.0.1:{self.port}"
        if certificate is None:
            assert self._server.add_insecure_port(address) == self.port
        else:
            pair = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
            assert self._server.add_secure_port(address, grpc.ssl_server_credentials([pair])) == self.port
        self._server.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def Export(self, request, context):  # noqa: N802 (the name of the RPC)
        self._goes_on.wait()
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        return messages.ExportTraceServiceResponse()

    def hang(self) -> None:
        """Answers nothing any more."""
        self._goes_on.clear()

    def spans(self) -> list[Span]:
        return list(self._spans())

    def tree(self, trace: str) -> dict[str, list[Span]]:
        """The spans of one trace, by the id of their parent."""
        found: dict[str, list[Span]] = {}
        for span in self.spans():
            if span.trace == trace:
                found.setdefault(span.parent, []).append(span)
        return found

    def bytes(self) -> bytes:
        """Everything that was received, as it was sent."""
        return b"".join(request.SerializeToString() for request in self.requests)

    def close(self) -> None:
        self._goes_on.set()
        self._server.stop(None).wait()

    def _spans(self) -> Iterator[Span]:
        for request in list(self.requests):
            for part in request.resource_spans:
                resource = attributes_of(part.resource.attributes)
                for span in (span for scope in part.scope_spans for span in scope.spans):
                    yield Span(
                        name=span.name,
                        trace=span.trace_id.hex(),
                        id=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        kind=KINDS[span.kind],
                        failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                        attributes=attributes_of(span.attributes),
                        resource=resource,
                        events=len(span.events) + len(span.links),
                    )
