"""Clips on disk -> windows of frames on the training device -> cached latents."""
