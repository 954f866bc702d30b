"""Reaches Ray: starts a local one, connects to one that is there, submits jobs to it, and asks what it has."""
