"""Adapters by digest: provenance, signatures, numbered versions and the aliases that name them."""
