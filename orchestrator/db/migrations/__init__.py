"""Alembic migrations, run by `open_database`. To add one: change `models.py`, write `versions/<n>_<what>.py`, set `HEAD`."""
