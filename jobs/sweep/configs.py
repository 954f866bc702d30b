"""How a configuration travels through Tune, whose searchers hold flat values only."""

from __future__ import annotations

import json
from typing import Any

from jobs.sweep.broker import Config

CONFIG = "config"
"""Its key among what Tune gives a trial."""


def encoded(value: Any) -> Any:
    """As a searcher can hold it: lists (of target modules) as JSON."""
    return json.dumps(value) if isinstance(value, list) else value


def config_of(tuned: dict[str, Any]) -> Config:
    """A trial's configuration out of what Tune made of it."""
    return {name: _decoded(value) for name, value in tuned[CONFIG].items()}


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value
