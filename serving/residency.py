"""What the engines' replicas told last, for whoever in this process asks: metrics, `/status`, prefetching.

A module of its own, since Serve pickles a router with its whole module, by value: a dictionary of that module, or one that it
imports, is a copy which nobody else ever sees. A function of another module it takes by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REPLICAS: dict[str, Mapping[str, Mapping[str, Any]]] = {}
"""Deployment → replica → what it told, by their names; nothing of a deployment that this process has asked nothing yet."""


def remember(deployment: str, replicas: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Args:
        replicas: all that the deployment has now.
    """
    REPLICAS[deployment] = replicas
