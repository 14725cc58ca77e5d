"""Prefect's server with a guard before it, and changed so that SQLite does not bring it to a halt.

A transaction that writes takes SQLite's only write lock when it begins, and waits for it. Prefect
lets most of them read first; if another one writes meanwhile, SQLite refuses theirs at once, and
clients try again after up to a minute.

Garbage is collected on a thread of its own. A cursor that is freed waits for its connection: where
the collector freed one on the event loop while that connection waited for a writer, and the writer
for the loop, everything stood still for the minute that SQLite waits.
"""

from __future__ import annotations

import gc
import threading
from contextlib import AbstractAsyncContextManager
from itertools import count
from typing import Any

from flows.guard import Guard

OPEN = ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
"""Pages that Prefect shows without a password."""


def write_in_turn() -> None:
    """Every transaction of Prefect's server takes the write lock when it begins."""
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    def at_once(
        self: AioSqliteConfiguration, session: Any, with_for_update: bool = True
    ) -> AbstractAsyncContextManager[Any]:
        return begin(self, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = at_once  # type: ignore[method-assign,assignment]


def collect(ended: threading.Event, pause: float = 1.0, full: int = 60) -> None:
    """Until `ended`: what is young every `pause` seconds, everything every `full` times."""
    for turn in count(1):
        if ended.wait(pause):
            return
        gc.collect(1 if turn % full else 2)


def stand_guard() -> None:
    """The server answers its own pages and clients only; its pages of documentation are gone."""
    from prefect.server.api import server
    from prefect.settings import PREFECT_SERVER_CORS_ALLOWED_ORIGINS

    create = server.create_app

    def guarded(*arguments: Any, **named: Any) -> Guard:
        origins = PREFECT_SERVER_CORS_ALLOWED_ORIGINS.value()
        return Guard(create(*arguments, **named), origins, OPEN)

    server.create_app = guarded  # type: ignore[assignment]


def main() -> None:
    """`prefect` with the arguments of this process."""
    gc.disable()
    never = threading.Event()
    threading.Thread(target=collect, args=(never,), daemon=True, name="garbage").start()
    write_in_turn()
    stand_guard()
    from prefect.cli import app

    app()


if __name__ == "__main__":
    main()
