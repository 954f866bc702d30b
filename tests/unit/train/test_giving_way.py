"""Training leaves the cores to what answers. Two seconds: each test is a process of its own, as priorities cannot be taken back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import os, threading
from jobs.workers import give_way

def own():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

def train():
    give_way({"gpus": 0})
    found.append(own())
    helper = threading.Thread(target=lambda: found.append(own()))
    helper.start()
    helper.join()

found = []
trainer = threading.Thread(target=train)
trainer.start()
trainer.join()
print(*found, own())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have no priority of their own elsewhere")
def test_the_thread_that_trains_and_those_that_it_starts_give_way_and_the_process_does_not():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [int(word) for word in done.stdout.split()] == [19, 19, os.getpriority(os.PRIO_PROCESS, 0)]
