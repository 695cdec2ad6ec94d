"""Webhooks: what happens, sent to addresses that clients name. Signed, retried, and never to a private address."""
