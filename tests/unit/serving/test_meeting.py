"""Where processes meet: nobody else's directory, nobody's dead socket. Milliseconds."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from pathlib import Path

import pytest

from serving.meeting import forget, private, read_frame, sweep


def test_the_directory_is_ours_alone(tmp_path: Path):
    made = private(tmp_path / "a")
    assert made.stat().st_mode & 0o777 == 0o700
    assert private(made) == made
    made.chmod(0o755)
    with pytest.raises(PermissionError):
        private(made)


def test_a_link_that_somebody_laid_is_not_followed(tmp_path: Path):
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(PermissionError):
        private(tmp_path / "link")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away; run the tests as root")
def test_a_directory_of_somebody_else_is_not_taken(tmp_path: Path):
    made = private(tmp_path / "a")
    os.chown(made, 12345, -1)
    with pytest.raises(PermissionError):
        private(made)


def test_sockets_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path: Path):
    dead, living, other = tmp_path / "1.x", tmp_path / "2.x", tmp_path / "3.y"
    for path in (dead, other):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(living))
        listening.listen()
        sweep(tmp_path, ".x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.x", "3.y"]


def test_places_of_yesterday_are_forgotten_unless_they_are_used(tmp_path: Path):
    for name in ("old", "new", "used"):
        (tmp_path / name).mkdir()
    (tmp_path / "used" / "1.x").touch()
    for name in ("old", "used"):
        os.utime(tmp_path / name, (1.0, 1.0))
    forget(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "used"]


def test_a_frame_that_claims_gigabytes_is_not_waited_for():
    async def read() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(struct.pack("!cI", b"b", 2**31))
        await read_frame(reader)

    with pytest.raises(ConnectionError, match="2147483648 bytes"):
        asyncio.run(read())
