"""Makes MedSora checkpoints: reads clips, trains both networks, measures the result, exports it.

Only a checkpoint directory leaves this package; :mod:`server` neither imports it nor is imported by it.
Importing ``training`` loads no torch.
"""
