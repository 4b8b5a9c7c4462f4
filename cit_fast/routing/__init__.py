"""Routing: which adapter set a task trains, and which one answers a prompt."""

from cit_fast.routing.confusion import routing_record
from cit_fast.routing.router import (
    BASE,
    OracleRouter,
    Router,
    RouterContext,
    SharedRouter,
    load_router,
    routing_text,
)

__all__ = [
    "BASE",
    "OracleRouter",
    "Router",
    "RouterContext",
    "SharedRouter",
    "load_router",
    "routing_record",
    "routing_text",
]
