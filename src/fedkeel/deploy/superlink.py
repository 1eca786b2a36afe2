"""Flower's server program, taking commands from its own machine only.

Flower answers everything on one port, and without an account service it answers anyone: whoever reaches the port could
start a run, that is, code on the server and on every node, or take the place of the server's processes. Nodes need
/v1/fleet/ (where they prove who they are by their keys); all else is refused unless it comes from this machine.
Run as a module: `python -m fedkeel.deploy.superlink` and the words of flower-superlink.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

OPEN = ("/v1/fleet/", "/health")
MARK = b"x-fedkeel-guard"
"""A header of every answer: who starts the server can see that the guard stands."""

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Application = Callable[[Scope, Callable[[], Awaitable[Event]], Callable[[Event], Awaitable[None]]], Awaitable[None]]


class Guard:
    """An ASGI application round another: only what nodes need is open to other machines."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        async def marked(event: Event) -> None:
            if event["type"] == "http.response.start":
                event = {**event, "headers": [*event.get("headers", ()), (MARK, b"on")]}
            await send(event)

        if scope["type"] == "http" and allowed(scope):
            return await self.app(scope, receive, marked)
        if scope["type"] == "http":
            await marked({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"commands are taken on the server's machine only\n"})


def allowed(scope: Scope) -> bool:
    """Whether a request may pass: a node's from anywhere, all others from this machine."""
    if str(scope["path"]).startswith(OPEN):
        return True
    client, server = scope.get("client"), scope.get("server")
    if client is None:
        return False
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    # a connection to one's own address comes from that address
    return address.is_loopback or (server is not None and client[0] == server[0])


def main() -> None:
    """flower-superlink, guarded."""
    from flwr.superlink import main as link
    from flwr.superlink.cli.flower_superlink import flower_superlink

    create: Callable[..., Any] = link.create_app

    def guarded(*args: Any, **options: Any) -> Any:
        app = create(*args, **options)
        app.add_middleware(Guard)
        return app

    link.create_app = guarded  # flower_superlink looks it up when it starts
    flower_superlink()


if __name__ == "__main__":
    main()
