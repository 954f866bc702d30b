"""Runs: states and legal transitions, events, submission (spec → Ray Job), reconciliation."""
