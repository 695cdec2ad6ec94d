"""Figures of merit of a checkpoint, one concept a module; :mod:`training.evaluate` puts them together.

``networks``, ``clip_vision`` and ``torchscript`` load feature networks by path; ``bootstrap`` draws resamples;
``frechet``, ``inception_score``, ``consistency`` and ``warping`` are figures, ``memorisation`` and ``planted`` find
copies of training clips; ``sets``, ``tables`` and ``copies`` apply them to a checkpoint; ``showcase``, ``pictures`` and
``report`` make the page that people read.
"""
