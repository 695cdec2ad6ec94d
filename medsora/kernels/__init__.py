"""Triton kernels of our own. Each has a twin in torch, in :mod:`medsora.ops`, which says what it computes."""
