"""Adapters by digest, with provenance."""
