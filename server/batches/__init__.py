"""Batches: many requests from one file, worked off while the server has time. Knows no HTTP and no model code."""
