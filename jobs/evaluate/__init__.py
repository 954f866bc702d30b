"""Measures a model on rows it never saw."""
