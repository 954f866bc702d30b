"""A hook that `ray start` runs before it starts the head (RAY_START_HOOK); it imports nothing of ours, to be quick."""

from __future__ import annotations

import os
from typing import Any


def trim(params: Any, head: bool) -> None:
    """Leave out the Ray Client server: nobody uses it here, its port 10001 is fixed, and no option turns it off."""
    params.ray_client_server_port = None
    # Daemons inherit the environment and the directory: neither should lead back to where the command was typed.
    os.environ.pop("RAY_START_HOOK", None)
    os.chdir(os.environ["ADAPTORY_HOME"])
