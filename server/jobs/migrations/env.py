"""Alembic environment: runs on the connection that :func:`server.jobs.schema.migrate` hands over."""

from alembic import context

import server.batches.model
import server.datasets.model
import server.events.model
import server.files.model
import server.idempotency
import server.keys.limits
import server.keys.model
import server.measures
import server.sources.model
import server.webhooks.model  # noqa: F401 - their tables belong to the same schema
from server.jobs.model import Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("run migrations through server.jobs.schema.migrate")
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
