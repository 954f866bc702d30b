"""Runs: states and legal transitions, submission (spec → Ray Job), events and logs through the store, reconciliation.

`submission` is what a person does, `reconcile` what the world did, `repository` what the database remembers.
"""
