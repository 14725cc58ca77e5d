"""The server goes on while its database waits, and after it was started again."""

import gc
import os
import sqlite3
import subprocess
import sys
import threading
import time
from importlib import import_module

import pytest
from workers_cases import ROOT

from flows.server import collect, write_in_turn
from flows.services import SERVER


class Knot:
    """Garbage that only the collector frees."""

    def __init__(self, held):
        self.held, self.self = held, self


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


def write_beside(file, collector):
    """A writer waits for another, which ends after `collector`; what became of the one that waited.

    As in Prefect's server: connections have threads, and a cursor of the one that waits is garbage.
    """
    first = sqlite3.connect(file, isolation_level=None)
    first.execute("create table if not exists a (b)")
    first.execute("begin immediate")
    second = sqlite3.connect(file, isolation_level=None, timeout=4, check_same_thread=False)
    first.execute("insert into a values (1), (2)")
    cursor = second.execute("select 1 union select 2")
    cursor.fetchone()
    Knot(cursor)
    del cursor
    begun, found = threading.Event(), []

    def wait():
        try:
            begun.set()
            second.execute("begin immediate")
            second.execute("commit")
            found.append("written")
        except sqlite3.OperationalError as error:
            found.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    begun.wait()
    collector()
    first.execute("commit")
    waiting.join()
    first.close()
    second.close()
    return found[0]


@pytest.mark.usefixtures("no_collector")
def test_garbage_of_a_waiting_connection_does_not_stop_the_writer_it_waits_for(tmp_path):
    ended = threading.Event()

    def elsewhere():
        threading.Thread(target=collect, args=(ended, 0.3, 1)).start()
        time.sleep(0.6)

    def here():
        time.sleep(0.3)
        gc.collect()

    # It gave up; the message is that of whichever call on the connection came last.
    assert write_beside(tmp_path / "control", here) != "written"
    found = write_beside(tmp_path / "db", elsewhere)
    ended.set()
    assert found == "written"


def test_the_server_is_prefects_own_command():
    command = [sys.executable, "-m", "flows.server", "server", "start", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--host" in done.stdout


def both_write(file):
    """One transaction reads, another writes, then the first one writes; what each of them met."""
    import asyncio

    import sqlalchemy
    from prefect.server.database.configurations import AioSqliteConfiguration

    config = AioSqliteConfiguration(f"sqlite+aiosqlite:///{file}")

    async def transaction(mine, other, rows):
        engine = await config.engine()
        async with await config.session(engine) as session:
            try:
                async with config.begin_transaction(session):
                    await session.execute(sqlalchemy.text("select * from a"))
                    mine.set()
                    # The other is given time, but cannot be waited for: it may have to wait itself.
                    await asyncio.wait([asyncio.ensure_future(other.wait())], timeout=1)
                    await session.execute(sqlalchemy.text(f"insert into a values ({rows})"))
            except sqlalchemy.exc.OperationalError as error:
                return str(error.orig)
        return "written"

    async def run():
        engine = await config.engine()
        async with engine.begin() as connection:
            await connection.execute(sqlalchemy.text("create table a (b)"))
        begun, never = asyncio.Event(), asyncio.Event()

        async def later():
            await begun.wait()
            return await transaction(asyncio.Event(), begun, 2)

        return await asyncio.gather(transaction(begun, never, 1), later())

    return asyncio.run(run())


def test_a_transaction_waits_for_another_instead_of_being_refused(tmp_path, monkeypatch):
    from prefect.server.database.configurations import AioSqliteConfiguration

    assert both_write(tmp_path / "control") == ["database is locked", "written"]
    name = "begin_transaction"
    monkeypatch.setattr(AioSqliteConfiguration, name, getattr(AioSqliteConfiguration, name))
    write_in_turn()
    assert both_write(tmp_path / "db") == ["written", "written"]


FOLLOWS = """
import asyncio
from datetime import timedelta
from uuid import uuid4

from prefect.server.database import provide_database_interface
from prefect.server.events.ordering import EventArrivedEarly, memory
from prefect.server.events.schemas.events import ReceivedEvent

from flows.ordering import BEGAN, CausalOrdering


def event(number, follows=None):
    resource = {"prefect.resource.id": "prefect.flow-run.1"}
    return ReceivedEvent(id=number, event="e", occurred=BEGAN, resource=resource, follows=follows)


async def waits(ordering, leader):
    try:
        await ordering.wait_for_leader(event(uuid4(), leader))
    except EventArrivedEarly:
        return True
    return False


async def main():
    db = provide_database_interface()
    before, after, handled = uuid4(), uuid4(), uuid4()
    async with (await db.engine()).begin() as connection:
        await connection.run_sync(db.Event.__table__.create)
    async with db.session_context(begin_transaction=True) as session:
        for number, seconds in ((before, -1), (after, 1)):
            when = BEGAN + timedelta(seconds=seconds)
            given = {"resource_id": "r", "resource": {}, "related_resource_ids": [], "related": []}
            session.add(db.Event(id=number, event="e", occurred=when, received=when, recorded=when,
                                 payload={}, **given))
    for kind in (memory.CausalOrdering, CausalOrdering):
        ordering = kind(kind.__module__)
        await ordering.record_event_as_seen(event(handled))
        print([await waits(ordering, leader) for leader in (before, after, uuid4(), handled)])


asyncio.run(main())
"""


def test_what_an_earlier_server_saw_is_not_waited_for(tmp_path):
    """Prefect's own order, the control, waits for it."""
    done = subprocess.run(
        [sys.executable, "-c", FOLLOWS],
        env={**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "[True, True, True, False]",
        "[False, True, True, False]",
    ], done.stderr[-3000:]


def test_the_server_takes_events_in_this_order():
    from prefect.server.events.ordering import CausalOrderingModule

    module = import_module(SERVER["PREFECT_SERVER_EVENTS_CAUSAL_ORDERING"])
    assert isinstance(module, CausalOrderingModule)
