"""Orders: a small HTTP service that Postern's client library protects. Orders are in memory.

A person sees and makes their own orders, a service sees all, and an admin (a person or a service) deletes them.
"""

import asyncio
import itertools
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from postern_client import Demand, RevocationFeed, TokenSource, Verifier, open_channel
from postern_client.fastapi import CallerOf, Protect, demand
from postern_client.revocations import WhenUnknown


class NewOrder(BaseModel):
    item: str


class Order(NewOrder):
    id: int
    owner: str


class Orders(BaseModel):
    orders: list[Order]


def application(verifier: Verifier) -> FastAPI:
    """The routes. One without `@demand` would be refused to everybody."""
    protect = Protect(verifier)
    app = FastAPI(
        title="orders",
        openapi_url=None,  # the pages that FastAPI adds are not protected
        dependencies=[Depends(protect)],
        exception_handlers=protect.exception_handlers,
    )
    orders: dict[int, Order] = {}
    ids = itertools.count(1)

    @app.get("/orders")
    @demand(Demand.authenticated())
    async def list_orders(caller: CallerOf) -> Orders:
        sees_all = caller.subject_type == "service"
        return Orders(orders=[order for order in orders.values() if sees_all or order.owner == caller.subject])

    @app.post("/orders", status_code=201)
    @demand(Demand.user())
    async def create_order(new: NewOrder, caller: CallerOf) -> Order:
        order = Order(id=next(ids), owner=caller.subject, item=new.item)
        orders[order.id] = order
        return order

    @app.delete("/orders/{id}", status_code=204)
    @demand(Demand.authenticated(role="admin"))
    async def delete_order(id: int) -> None:
        if orders.pop(id, None) is None:
            raise HTTPException(404, "there is no such order")

    @app.get("/healthz")
    @demand(Demand.public())
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok")

    return app


def secret() -> str:
    file = os.environ.get("POSTERN_CLIENT_SECRET_FILE")
    return Path(file).read_text().strip() if file else os.environ["POSTERN_CLIENT_SECRET"]


def when_unknown() -> WhenUnknown:
    """What happens to tokens while it is not known which were revoked. Whoever runs the service has to choose."""
    match os.environ.get("ORDERS_WHEN_REVOCATIONS_UNKNOWN"):
        case "refuse":
            return "refuse"
        case "accept":
            return "accept"
        case _:
            raise SystemExit("orders: ORDERS_WHEN_REVOCATIONS_UNKNOWN must be refuse or accept")


async def serve() -> None:
    # Plaintext, for a service beside Postern. Elsewhere it is grpc.ssl_channel_credentials().
    channel = open_channel(os.environ["POSTERN_GRPC_ADDR"], None)
    source = TokenSource.from_service_account(channel, os.environ["POSTERN_CLIENT_ID"], secret())
    staleness = float(os.environ.get("ORDERS_MAX_STALENESS_SECONDS", "30"))
    with RevocationFeed(channel, source, when_unknown=when_unknown(), max_staleness=staleness) as feed:
        verifier = Verifier(os.environ["POSTERN_ISSUER"], os.environ["POSTERN_AUDIENCE"], revocations=feed.state)
        host, _, port = os.environ["ORDERS_ADDR"].rpartition(":")
        listener = socket.create_server((host, int(port)))

        async def announce() -> None:
            await feed.wait_until_complete_async()
            print("orders is ready", flush=True)

        announcing = asyncio.create_task(announce())
        # uvicorn ends at SIGTERM and Ctrl-C, and raises the signal again when it has ended.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        await uvicorn.Server(uvicorn.Config(application(verifier), log_level="warning")).serve([listener])
        announcing.cancel()


if __name__ == "__main__":
    asyncio.run(serve())
