"""Routing: which adapter set a task trains, and which one answers a prompt."""

from cit_fast.methods.routing.confusion import routing_record
from cit_fast.methods.routing.grouping import GroupingRouter, LCIARouter, PerTaskRouter
from cit_fast.methods.routing.load import load_router
from cit_fast.methods.routing.router import OracleRouter, Router, SharedRouter, StackedRouter, routing_text
from cit_fast.methods.routing.switch import SwitchRouter, SwitchTokensRouter
from cit_fast.methods.routing.switch_network import SwitchNetwork, train_switch

__all__ = [
    "GroupingRouter",
    "LCIARouter",
    "OracleRouter",
    "PerTaskRouter",
    "Router",
    "SharedRouter",
    "StackedRouter",
    "SwitchNetwork",
    "SwitchRouter",
    "SwitchTokensRouter",
    "load_router",
    "routing_record",
    "routing_text",
    "train_switch",
]
