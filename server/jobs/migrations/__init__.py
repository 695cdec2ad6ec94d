"""Alembic scripts of the job database; run by :func:`server.jobs.schema.migrate`."""
