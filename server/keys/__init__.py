"""Keys, and what a tenant may have."""
