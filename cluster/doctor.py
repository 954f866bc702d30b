"""`adaptory doctor`: everything a run needs, tried out one by one, each with what to do when it is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path

import psutil
from pydantic import BaseModel

from orchestrator.errors import AdaptoryError
from orchestrator.settings import Settings

GIB = 1 << 30


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    """Runs that need it will fail or be slow; others work."""
    FAIL = "fail"
    """Nothing will run."""


class Check(BaseModel):
    name: str
    level: Level
    found: str
    advice: str = ""
    """What to do; empty when all is well."""


def examine(settings: Settings) -> Iterator[Check]:
    """Each check as soon as it is done; one that breaks is a failure of its own and stops no other."""
    checks: list[tuple[str, Callable[[Settings], Check]]] = [
        ("python", _python),
        (
            "ray",
            _required("ray", "Install the project again: `make demo`, or `pip install -c constraints.txt adaptory`."),
        ),
        ("transformers", _required("transformers", "Install the project again with its constraints.")),
        ("torch", _torch),
        ("bytecode", _bytecode),
        ("deepspeed", _optional("deepspeed", "several workers and full tuning on GPUs", "adaptory[deepspeed]")),
        ("bitsandbytes", _optional("bitsandbytes", "tuning.type qlora", "adaptory[qlora]")),
        ("compiler", _compiler),
        ("disk", _disk),
        ("memory", _memory),
        ("shared memory", _shared_memory),
        ("database", _database),
        ("store", _store),
        ("cluster", _cluster),
    ]
    for name, check in checks:
        try:
            yield check(settings)
        except AdaptoryError as error:
            yield Check(name=name, level=Level.FAIL, found=error.message, advice=error.hint or "")
        except Exception as error:  # a check must not hide the others
            yield Check(
                name=name,
                level=Level.FAIL,
                found=f"{type(error).__name__}: {error}",
                advice="The check itself broke; please report it.",
            )


# --- software -------------------------------------------------------------------------------------------------------


def _python(_: Settings) -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return Check(name="python", level=Level.OK, found=found)
    return Check(name="python", level=Level.FAIL, found=found, advice="Use Python 3.11, 3.12 or 3.13.")


def _required(package: str, advice: str) -> Callable[[Settings], Check]:
    def check(_: Settings) -> Check:
        version = _version(package)
        level = Level.OK if version else Level.FAIL
        return Check(name=package, level=level, found=version or "not installed", advice="" if version else advice)

    return check


def _optional(package: str, purpose: str, extra: str) -> Callable[[Settings], Check]:
    def check(_: Settings) -> Check:
        version = _version(package)
        if version:
            return Check(name=package, level=Level.OK, found=version)
        advice = f"Needed for {purpose}: `pip install -c constraints.txt '{extra}'`."
        return Check(name=package, level=Level.WARN, found="not installed", advice=advice)

    return check


def _torch(_: Settings) -> Check:
    """In a process of its own: importing torch takes seconds and a broken one may crash the interpreter."""
    code = (
        "import json, torch; c = torch.cuda; print(json.dumps({'version': torch.__version__, "
        "'threads': torch.get_num_threads(), 'gpus': [c.get_device_name(i) for i in range(c.device_count())]}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return Check(name="torch", level=Level.FAIL, found=last, advice="Install torch again with the constraints.")
    facts = json.loads(done.stdout)
    gpus = facts["gpus"]
    found = f"{facts['version']}, " + (", ".join(gpus) if gpus else f"no GPU, {facts['threads']} threads")
    if not gpus and shutil.which("nvidia-smi"):
        advice = "There is an NVIDIA driver, but this torch sees no GPU: install a CUDA build of torch."
        return Check(name="torch", level=Level.WARN, found=found, advice=advice)
    return Check(name="torch", level=Level.OK, found=found)


def _bytecode(_: Settings) -> Check:
    """Without it each of a job's processes compiles what it imports."""
    torch = importlib.util.find_spec("torch")
    if not sys.dont_write_bytecode or torch is None or torch.origin is None:
        return Check(name="bytecode", level=Level.OK, found="kept from the first import on")
    if Path(importlib.util.cache_from_source(torch.origin)).exists():
        return Check(name="bytecode", level=Level.OK, found="there")
    packages = Path(torch.origin).parents[1]
    advice = f"Each process of a job starts 10 to 20 seconds later than it could; once: `{sys.executable} -m compileall -q -j 0 {packages}`."
    return Check(name="bytecode", level=Level.WARN, found="none, and PYTHONDONTWRITEBYTECODE is set", advice=advice)


def _compiler(_: Settings) -> Check:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        return Check(name="compiler", level=Level.OK, found=compiler)
    advice = "DeepSpeed compiles its CPU parts when first used: install g++ (Debian: `apt-get install g++`)."
    return Check(name="compiler", level=Level.WARN, found="no C++ compiler", advice=advice)


# --- machine --------------------------------------------------------------------------------------------------------


def _disk(settings: Settings) -> Check:
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    free = shutil.disk_usage(settings.home).free
    level = Level.FAIL if free < GIB else Level.WARN if free < 5 * GIB else Level.OK
    advice = "Free some space, or set ADAPTORY_HOME to a larger disk." if level is not Level.OK else ""
    return Check(name="disk", level=level, found=f"{free / GIB:.1f} GiB free at {settings.home}", advice=advice)


def _memory(_: Settings) -> Check:
    memory = psutil.virtual_memory()
    level = Level.OK if memory.available > 3 * GIB else Level.WARN
    advice = "" if level is Level.OK else "A small model needs about 3 GiB to be tuned: end what you do not need."
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    return Check(name="memory", level=level, found=found, advice=advice)


def _shared_memory(_: Settings) -> Check:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check(name="shared memory", level=Level.OK, found="none on this system; Ray uses the disk")
    free = shutil.disk_usage(path).free
    level = Level.OK if free > GIB else Level.WARN
    advice = "" if level is Level.OK else "Ray will use the disk instead; in a container give it --shm-size=2g."
    return Check(name="shared memory", level=level, found=f"{free / GIB:.1f} GiB free", advice=advice)


# --- state ----------------------------------------------------------------------------------------------------------


def _database(settings: Settings) -> Check:
    from sqlalchemy.engine import make_url

    from orchestrator.db import open_database

    open_database(settings.database)
    shown = make_url(settings.database).render_as_string(hide_password=True)
    return Check(name="database", level=Level.OK, found=shown)


def _store(settings: Settings) -> Check:
    from orchestrator.store import Store

    Store(settings.store).probe()
    return Check(name="store", level=Level.OK, found=f"{settings.store}: written, read and removed an object")


def _cluster(settings: Settings) -> Check:
    from cluster import connect_if_running
    from cluster.probe import check, probe, resources_of

    client = connect_if_running(settings)
    if client is None:
        return Check(
            name="cluster", level=Level.OK, found="no local Ray runs; `adaptory run` or `adaptory up` starts it"
        )
    if client.local:
        version, has = client.describe()["ray"], resources_of(client).describe()
        found = f"local Ray {version} at {client.dashboard.address}: {has}"
        return Check(name="cluster", level=Level.OK, found=found)
    answer = probe(client, settings.store)
    check(answer, settings.store)
    found = f"{client.dashboard.address}: {answer.resources.describe()}; every node reaches the store"
    return Check(name="cluster", level=Level.OK, found=found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
