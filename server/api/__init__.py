"""HTTP endpoints: they translate between HTTP and :mod:`server.jobs` and decide nothing."""
