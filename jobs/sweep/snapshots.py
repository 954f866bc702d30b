"""A packed group on disk: the newest whole snapshot or none, whenever the process that writes it dies."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_FACTS = "group.json"
"""Names the file of tensors that belongs to it; replaced in one step, so that the two always fit."""


@dataclass(frozen=True)
class Snapshot:
    facts: dict[str, Any]
    """As JSON."""
    tensors: dict[str, Tensor]


def write(directory: Path, snapshot: Snapshot) -> None:
    """Replace the snapshot in `directory`.

    Raises:
        OSError: the disk is full, say; the snapshot before is still there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = f"{secrets.token_hex(8)}.safetensors"
    save_file(snapshot.tensors, directory / file)
    draft = directory / f"{_FACTS}.draft"
    draft.write_text(json.dumps({**snapshot.facts, "tensors": file}))
    draft.replace(directory / _FACTS)
    for other in directory.glob("*.safetensors"):
        if other.name != file:
            other.unlink()


def read(directory: Path) -> Snapshot | None:
    """None where there is none."""
    if not (directory / _FACTS).exists():
        return None
    facts = json.loads((directory / _FACTS).read_text())
    return Snapshot(facts, load_file(directory / facts.pop("tensors")))
