"""The router of a stage, whichever of cit-fast's own it is."""

from __future__ import annotations

import typing
from pathlib import Path

from cit_fast.errors import CitFastError, RunError
from cit_fast.methods.routing.grouping import GroupingRouter, LCIARouter, PerTaskRouter
from cit_fast.methods.routing.router import (
    OracleRouter,
    Router,
    SavedRouter,
    SharedRouter,
    StackedRouter,
    read_router_file,
)
from cit_fast.methods.routing.switch import SwitchRouter, SwitchTokensRouter

_ROUTERS: dict[str, type[SavedRouter]] = {
    each.name: each
    for each in (
        SharedRouter,
        StackedRouter,
        OracleRouter,
        PerTaskRouter,
        GroupingRouter,
        LCIARouter,
        SwitchRouter,
        SwitchTokensRouter,
    )
}


def load_router(folder: str | Path) -> Router:
    """The router of a stage, from its folder ``stages/NN/router``.

    Raises:
        RunError: a missing or damaged file, or a router of the user's own, whose class only they can name.
    """
    folder = Path(folder)
    kind = read_router_file(folder / "router.json")["router"]
    if kind not in _ROUTERS:
        raise RunError(
            f"{folder / 'router.json'}: the router {kind!r} is not one of {', '.join(sorted(_ROUTERS))}; "
            "load one of your own with its class: MyRouter.load(folder)"
        )
    try:
        router = _ROUTERS[kind].load(folder)
    except CitFastError as error:  # an option out of range is damage, too
        raise RunError(str(error)) from None
    return typing.cast("Router", router)
