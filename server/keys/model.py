"""What a key may be good for."""

import enum

__all__ = ["ALL_SCOPES", "Scope"]


class Scope(enum.StrEnum):
    """A part of the API."""

    VIDEOS_READ = "videos:read"
    """See videos, how far they are, and download them."""
    VIDEOS_WRITE = "videos:write"
    """Ask for videos, cancel and delete them."""
    BATCHES = "batches"
    """Files and batches, whole."""
    DATASETS = "datasets"
    """Datasets, whole."""
    WEBHOOKS = "webhooks"
    """Where events are sent to."""
    METRICS = "metrics"
    """GET /metrics: figures of all tenants together."""


ALL_SCOPES = frozenset(Scope)
