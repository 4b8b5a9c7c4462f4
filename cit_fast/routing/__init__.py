"""Routing: which adapter set a task trains, and which one answers a prompt."""

from cit_fast.routing.confusion import routing_record
from cit_fast.routing.grouping import LCIARouter, PerTaskRouter
from cit_fast.routing.router import (
    BASE,
    OracleRouter,
    Router,
    RouterContext,
    SharedRouter,
    load_router,
    routing_text,
)
from cit_fast.routing.switch import SwitchNetwork, SwitchRouter, train_switch

__all__ = [
    "BASE",
    "LCIARouter",
    "OracleRouter",
    "PerTaskRouter",
    "Router",
    "RouterContext",
    "SharedRouter",
    "SwitchNetwork",
    "SwitchRouter",
    "load_router",
    "routing_record",
    "routing_text",
    "train_switch",
]
