"""Alembic environment: runs on the connection that :func:`server.jobs.database.migrate` hands over."""

from alembic import context

from server.jobs.model import Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("run migrations through server.jobs.database.migrate")
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
