"""The C++ of `kernels.cpp`, compiled when it is first needed, and called with torch's memory.

Plain C over pointers: nothing of torch is in it, so that it compiles in three seconds and outlives torch's versions. What
was compiled is kept for the next process, by its source, compiler and processor. Without a C++ compiler there are no
kernels, and the engine computes the same by torch's own operations, about half as fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_long, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp"]
# sums may be reordered, so that they use all lanes; NaN and infinity keep their meaning
_FLAGS += [
    f"-f{flag}"
    for flag in ("no-math-errno", "no-trapping-math", "associative-math", "no-signed-zeros", "reciprocal-math")
]
_COMPILE_SECONDS = 120.0


class Kernels:
    """The functions for one dtype. Tensors are contiguous and of that dtype, unless it says otherwise.

    Args:
        library: of `kernels.cpp`.
        name: of the dtype, as its functions have it.
    """

    def __init__(self, library: ctypes.CDLL, name: str):
        def function(stem: str, *arguments: type) -> ctypes._NamedFuncPointer:
            found = getattr(library, f"{stem}_{name}")
            found.argtypes, found.restype = arguments, None
            return found

        pointer, number, real = c_void_p, c_int, c_float
        self._add_norm = function("add_norm", *5 * [pointer], number, number, real, real)
        self._gate = function("gate", pointer, pointer, number, number, number)
        self._rotate_store = function("rotate_store", *7 * [pointer], *4 * [number], c_long, real, real)
        self._attend = function("attend", *6 * [pointer], *4 * [number], c_long, number, number, real, real)
        self._lora = function("lora", pointer, pointer, number, number, pointer, number, pointer, number, number)

    def add_norm(
        self, x: Tensor, add: Tensor | None, post: Tensor | None, out: Tensor, weight: Tensor, eps: float, offset: float
    ) -> None:
        """x += add, which is normalised with `post` first where that is given; out = norm(x). All [tokens, size]."""
        tokens, size = x.shape
        self._add_norm(
            x.data_ptr(), _at(add), _at(post), out.data_ptr(), weight.data_ptr(), tokens, size, eps, offset
        )  # fmt: skip

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """[tokens, 2·intermediate] → [tokens, intermediate]"""
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._gate(gate_up.data_ptr(), out.data_ptr(), len(out), out.shape[1], activation != "silu")
        return out

    def rotate_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        memory: Tensor,
        places: Tensor,
        heads: int,
        eps: float,
        offset: float,
    ) -> None:
        """Norm (if any) and rotate queries and keys in place; put keys and values where the cache has their tokens.

        Args:
            qkv: [tokens, heads + 2·kv_heads, head_dim].
            cos, sin: [tokens, head_dim / 2], fp32.
            norms: of queries and of keys: [head_dim].
            memory: [2·kv_heads, places, head_dim], of this layer.
            places: [tokens], int64.
        """
        kv_heads, dim = len(memory) // 2, memory.shape[2]
        q_norm, k_norm = norms or (None, None)
        self._rotate_store(
            qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), _at(q_norm), _at(k_norm), memory.data_ptr(), places.data_ptr(),
            len(qkv), heads, kv_heads, dim, memory.shape[1] * dim, eps, offset
        )  # fmt: skip

    def attend(
        self,
        qkv: Tensor,
        out: Tensor,
        memory: Tensor,
        blocks: Tensor,
        starts: Tensor,
        lengths: Tensor,
        heads: int,
        block_size: int,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Of the first rows of qkv, each the new token of a sequence, the context, into `out` [tokens, heads·head_dim].

        Args:
            blocks: of all sequences, one after the other; `starts` [sequences + 1] says where whose are. All int32.
            lengths: [sequences], the new token included; int32.
        """
        kv_heads, dim = len(memory) // 2, memory.shape[2]
        self._attend(
            qkv.data_ptr(), out.data_ptr(), memory.data_ptr(), blocks.data_ptr(), starts.data_ptr(), lengths.data_ptr(),
            len(lengths), heads, kv_heads, dim, memory.shape[1] * dim, block_size, window or 0, scale, softcap or 0.0
        )  # fmt: skip

    def lora(self, x: Tensor, y: Tensor, table: int, projections: int, segments: Tensor, most_rank: int) -> None:
        """y += (x Aᵀ) Bᵀ, each segment with its own adapter.

        Args:
            table: address of `projections` updates for each slot, as `kernels.cpp` has them.
            segments: [segments, 3]: slot, start, stop; int32.
        """
        self._lora(
            x.data_ptr(), y.data_ptr(), x.shape[1], y.shape[1], table, projections, segments.data_ptr(), len(segments), most_rank
        )  # fmt: skip


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@lru_cache
def kernels(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """None where there are none: another device or dtype, or no C++ compiler."""
    if device.type != "cpu" or dtype not in _NAMES or (library := _library()) is None:
        return None
    return Kernels(library, _NAMES[dtype])


@lru_cache
def _library() -> ctypes.CDLL | None:
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        log.warning(
            "There is no C++ compiler, so answers take about twice as long (Debian and Ubuntu: apt-get install g++)."
        )
        return None
    try:
        file = _kept() / f"{_key(compiler)}.so"
        if file.exists():
            with contextlib.suppress(OSError):  # cut short by a machine that went down
                return ctypes.CDLL(str(file))
        _compile(compiler, file)
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        log.warning(
            "The engine's kernels cannot be compiled, so answers take about twice as long: %s", str(told)[-500:]
        )
        return None


def _kept() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path("~/.cache").expanduser()) / "adaptory" / "kernels"


def _key(compiler: str) -> str:
    """Machine code is for one kind of processor, and a home may be on several machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_SECONDS).stdout
    parts = [_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), platform.machine().encode(), _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


def _compile(compiler: str, file: Path) -> None:
    """Two processes may do so at the same time: each writes a file of its own, and renames it when it is whole.

    It is linked without OpenMP's library: the symbols are those of torch's copy, so that both share one pool of threads.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".building-") as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        for command in (
            [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS)
        linked.replace(file)
