"""Paired tiles on disk: the contract between data preparation and training. Imports no torch."""
