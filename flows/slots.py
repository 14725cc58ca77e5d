"""One holder at a time, over all machines: Prefect's concurrency limits, held through outages.

Prefect's own `concurrency` stops renewing its lease after a few seconds without a server; the slot
would then go to another while its holder still works. Here renewing goes on until the holder ends.
"""

from __future__ import annotations

import fcntl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError

R = TypeVar("R")
LEASE = 60.0
"""Seconds after which a slot is free again when its holder was killed."""
INPUTS = "inputs-"
"""Names of the limits of stages with certain inputs begin with this."""


@contextmanager
def slot(name: str, say: Callable[[str], None], lease: float = LEASE) -> Iterator[None]:
    """Holds the only slot of the limit `name`, waiting for it.

    Where a holder's server is away for longer than `lease`, the slot may be given to another.
    """
    with get_client(sync_client=True) as client:
        _make(client, name)
        held = _acquire(client, name, lease, say)
    ended = threading.Event()
    keeper = threading.Thread(target=_renew, args=(held, lease, ended), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join(timeout=5)
        with get_client(sync_client=True) as client:
            try:
                client.release_concurrency_slots_with_lease(held)
            except (httpx.TransportError, PrefectHTTPStatusError):
                say(f"the server is away: {name} is free in {lease:.0f} s")


def _make(client: SyncPrefectClient, name: str) -> None:
    try:
        patient(client.upsert_global_concurrency_limit_by_name, name, 1)
    except ObjectAlreadyExists:
        return
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 409:  # another made it at the same moment
            raise


def _acquire(
    client: SyncPrefectClient, name: str, lease: float, say: Callable[[str], None]
) -> UUID:
    told = False
    while True:
        try:
            answer = patient(
                client.increment_concurrency_slots_with_lease, [name], 1, "concurrency", lease
            )
            return UUID(answer.json()["lease_id"])
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 423:  # locked
                raise
            if not told:
                say(f"{name} is held by another run; waiting for it")
                told = True
            time.sleep(min(5.0, float(error.response.headers["Retry-After"])))


def _renew(held: UUID, lease: float, ended: threading.Event) -> None:
    with get_client(sync_client=True) as client:
        while not ended.wait(lease / 4):
            try:
                client.renew_concurrency_lease(held, lease)
            except (httpx.TransportError, PrefectHTTPStatusError):
                continue


@contextmanager
def device(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the GPU `name` of this host: the limit, and a file lock that needs no server."""
    file = Path(tempfile.gettempdir()) / f"drawplate-{name.replace('/', '-')}.lock"
    with suppress(FileExistsError):
        file.touch(exist_ok=False)
        file.chmod(0o644)  # workers of other users need to read it, whatever this one's umask
    with slot(name, say), file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def forget(client: SyncPrefectClient, age: timedelta = timedelta(days=1)) -> int:
    """Removes limits of inputs that nobody asked for in `age`; returns how many."""
    known: list[Any] = []
    while page := client.read_global_concurrency_limits(limit=200, offset=len(known)):
        known += page
    now = datetime.now(UTC)
    old = [
        limit
        for limit in known
        if limit.name.startswith(INPUTS) and not limit.active_slots and now - limit.updated > age
    ]
    for limit in old:
        client.delete_global_concurrency_limit_by_name(limit.name)
    return len(old)


def patient(call: Callable[..., R], *arguments: Any, patience: float = 1800) -> R:
    """Calls the server, and again while it is away or restarting."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return call(*arguments)
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            status = getattr(getattr(error, "response", None), "status_code", 503)
            if isinstance(error, ObjectNotFound) or status < 500 or time.monotonic() > deadline:
                raise
            time.sleep(2)
