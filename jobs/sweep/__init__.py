"""Sweeps: many trials of one fine-tune, packed on one copy of the base where they can share it."""
