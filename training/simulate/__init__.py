"""Simulated tissue: one map of tissue and cells, rendered as H&E and as the IHC that belongs to it.

It exists to test methods where the truth is known, and to train a demonstration model that means nothing medically.
NumPy and SciPy only. :func:`simulate_tile` gives paired tiles, :class:`SimulatedSlide` slides of any size.
"""
