"""From a folder of medical videos to a sharded cache that training reads: ``medsora-train prepare``.

:mod:`.layouts` list what a source holds, :mod:`.analysis` looks at every frame once, :mod:`.splits` and
:mod:`.duplicates` decide where each clip goes, :mod:`.cache` writes it. Torch-free.
"""
