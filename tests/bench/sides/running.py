"""What benchmarks share: each side is a process that ends with one line of JSON, some in environments of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SIDES = Path(__file__).parent
BUILD = ROOT / "build" / "bench"

Result = dict[str, Any]


def measure(python: str, script: str, options: Result, *, patience: float = 1200, **environment: str) -> Result:
    """Run one side to its end; its last line that is an object of JSON is the result (libraries say more at their exit).

    Args:
        python: interpreter of the side's environment.
        script: a file of this folder.
        options: as `--name value`; True stands for a flag.
        patience: seconds.

    Raises:
        RuntimeError: it failed or took longer; the message ends with its last lines.
    """
    command = [python, str(SIDES / script)]
    for key, value in options.items():
        command += [f"--{key}"] if value is True else [f"--{key}", value if isinstance(value, str) else _text(value)]
    everything = os.environ | {"PYTHONPATH": str(ROOT) if python == sys.executable else "", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=everything | environment, timeout=patience, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{script} took over {error.timeout:.0f} seconds") from error
    if done.returncode:
        raise RuntimeError((done.stderr or f"{script} ended with {done.returncode}")[-4000:])
    results = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not results:
        raise RuntimeError(f"{script} printed no result: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    return json.loads(results[-1])


class Conversation:
    """A side that stays: it is told and answers in lines of JSON. Leaving the block closes its input, which ends it.

    Args:
        case: the first line it is told.
    """

    def __init__(self, script: str, case: Result, *, patience: float = 60):
        self._script, self._patience = script, patience
        everything = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{SIDES}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "ADAPTORY_HOME": case["home"],
        }
        self._process = subprocess.Popen(
            [sys.executable, str(SIDES / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=everything,
        )
        self.say(case)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(self._patience)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def say(self, line: Result) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Result:
        """The next line that is an object of JSON: libraries say other things.

        Raises:
            RuntimeError: it ended instead; what it said is on standard error.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self._script} ended with {self._process.wait()}")


def environment(name: str, pins: Path, without: tuple[str, ...] = ()) -> str:
    """Python of an environment that holds a requirements file and nothing of ours; made once.

    Args:
        without: packages to remove again after the installation.
    """
    directory = BUILD / name
    python, stamp = directory / "bin" / "python", directory / "installed.txt"
    if not stamp.exists() or stamp.read_text() != pins.read_text():
        print(f"Installing {name} into {directory}.", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--no-compile", "--requirement", pins], check=True)
        if without:
            subprocess.run([*pip, "uninstall", "--yes", *without], check=True)
        stamp.write_text(pins.read_text())
    return str(python)


def compiled(python: str) -> None:
    """Compile all packages of an environment, as a first import of each would: what is measured only loads them."""
    print(f"Compiling the packages of {python}, if they are not.", flush=True)
    find = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    # some bring files that are no Python, which it minds
    subprocess.run([python, "-m", "compileall", "-q", "-j", "0", packages], capture_output=True, check=False)


def _text(value: Any) -> str:
    return str(value) if isinstance(value, Path) else json.dumps(value)
