"""Routes: a tenant's public model name → weighted adapters, fallbacks and defaults. Changed in the database as immutable
revisions, and served from an immutable table that is replaced whole.
"""
