"""Where processes of one application on one machine meet: Unix sockets that only this user sees, and frames through them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import struct
import tempfile
import time
from pathlib import Path

_FRAME = struct.Struct("!cI")
_LONGEST = 64 << 20
_DAY = 86_400.0


def meeting_place() -> Path:
    """A directory of this user, this machine and this Ray.

    Raises:
        OSError: somebody else has made it, or it is open to others.
    """
    import ray

    cluster = hashlib.sha256(ray.get_runtime_context().gcs_address.encode()).hexdigest()[:12]
    ours = private(Path(tempfile.gettempdir()) / f"adaptory-{os.getuid()}")
    forget(ours)
    return private(ours / cluster)


def private(directory: Path) -> Path:
    """Made if it is not there.

    Raises:
        OSError: somebody else has made it, or it is open to others.
    """
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or directory.is_symlink():
        raise PermissionError(f"{directory} is not ours alone.")
    return directory


def forget(directory: Path) -> None:
    """Remove what is empty and a day old in it: places of a Ray that is over. One that is not is made again by who needs it."""
    for old in directory.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _DAY:
                old.rmdir()


def sweep(directory: Path, suffix: str) -> None:
    """Remove the sockets of processes that were killed."""
    for path in directory.glob(f"*{suffix}"):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                pass  # gone meanwhile


async def read_frame(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Its kind, one byte, and what it holds.

    Raises:
        IncompleteReadError, ConnectionError: the other end is gone.
    """
    kind, length = _FRAME.unpack(await reader.readexactly(_FRAME.size))
    if length > _LONGEST:
        raise ConnectionError(f"A frame of {length} bytes.")
    return kind, await reader.readexactly(length) if length else b""


def frame(kind: bytes, data: bytes = b"") -> bytes:
    """Frames that are written together wake the other end once."""
    return _FRAME.pack(kind, len(data)) + data
