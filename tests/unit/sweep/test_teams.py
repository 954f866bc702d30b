"""Passes beside each other, each with its share of the cores. Importing torch in a process of its own takes 4 seconds."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, torch
from jobs.sweep.teams import Teams

torch.set_num_threads(4)
teams, x = Teams(4), torch.randn(512, 512)
seen = []

def work():
    for _ in range(3):
        torch.relu(x @ x).sum()
    seen.append(torch.get_num_threads())

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
teams.run([work] * 8, beside=4)
teams.run([work] * 8, beside=4)
print(threads() - before, *seen, torch.get_num_threads())
"""


def test_a_team_has_its_share_of_the_threads_and_no_more() -> None:
    """Not by what it is told (torch says what it is to be), but by how many threads there are: a matmul's and a loop's are different libraries'."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", *["1"] * 16, "4"]
