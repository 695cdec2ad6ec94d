"""One reader for each published layout: from a path to the items it holds. Nothing is decoded here. Torch-free."""

from training.prepare.layouts.detect import detect_layout, list_source

__all__ = ["detect_layout", "list_source"]
