"""A packed group on disk: the newest whole snapshot or none, whenever the process that writes it dies."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_FACTS = "group.json"
"""Names the file of tensors that belongs to it; replaced in one step, so that the two always fit."""


def write(directory: Path, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Replace the snapshot in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    file = f"{secrets.token_hex(8)}.safetensors"
    save_file(tensors, directory / file)
    draft = directory / f"{_FACTS}.draft"
    draft.write_text(json.dumps({**facts, "tensors": file}))
    draft.replace(directory / _FACTS)
    for other in directory.glob("*.safetensors"):
        if other.name != file:
            other.unlink()


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(facts, tensors), or None where there is no snapshot."""
    if not (directory / _FACTS).exists():
        return None
    facts = json.loads((directory / _FACTS).read_text())
    return facts, load_file(directory / facts.pop("tensors"))
