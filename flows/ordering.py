"""In which order Prefect's server takes events, when it was started again in between.

An event may follow another one and waits until that was there. Which were there, the server knows
only of those since it began: what follows an older one would wait for 15 minutes, and a pipeline
that crashed with the server would not be started again until then. All events are stored, though.
"""

from __future__ import annotations

from uuid import UUID

import sqlalchemy as sa
from prefect.server.database import provide_database_interface
from prefect.server.events.ordering import memory
from prefect.server.events.schemas.events import Event
from prefect.types._datetime import now

BEGAN = now("UTC")


class CausalOrdering(memory.CausalOrdering):
    """Prefect's own, which also knows the events that an earlier server received."""

    async def event_has_been_seen(self, event: UUID | Event) -> bool:
        """By this server, or by the one before it."""
        if await super().event_has_been_seen(event):
            return True
        db = provide_database_interface()
        number = event.id if isinstance(event, Event) else event
        async with db.session_context() as session:
            received = await session.scalar(
                sa.select(db.Event.received).where(db.Event.id == number)
            )
        return received is not None and received < BEGAN
