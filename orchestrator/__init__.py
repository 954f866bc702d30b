"""The control plane: what people write (spec), what happened (runs), and what came out of it (registry)."""

__version__ = "0.1.0"
