"""Modules that are copied beside the ``model.py`` of several Triton models."""
