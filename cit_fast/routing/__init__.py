"""Routing: which adapter set a task trains."""

from cit_fast.routing.router import Router, SharedRouter

__all__ = ["Router", "SharedRouter"]
