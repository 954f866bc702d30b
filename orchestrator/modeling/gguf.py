"""GGUF → bf16 safetensors, once, by transformers; the file's digest names the result."""

from __future__ import annotations

import contextlib
import errno
import functools
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from orchestrator.errors import AdaptoryError, ModelError
from orchestrator.modeling.model_files import check_directory, sha256_of

_MAGIC = b"GGUF"
_HEADER = struct.Struct("<4sIQQ")
"""Magic, version, tensors, metadata entries: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
_VERSIONS = (2, 3)


def check_gguf(file: Path, reference: str) -> None:
    """
    Raises:
        ModelError: there is no such file, it is no GGUF, or one that is not read, by its first bytes.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEADER.size)
    except OSError as error:
        beside = sorted(p.name for p in file.parent.glob("*.gguf")) if file.parent.is_dir() else []
        raise ModelError(
            f"There is no readable file {file}: {error.strerror}.",
            hint=f"Beside it are {', '.join(beside[:5])}." if beside else "Check the path.",
            model=reference,
        ) from error
    if head[:4] != _MAGIC:
        raise ModelError(
            f"{file} is no GGUF file: it begins with {head[:4]!r}, not {_MAGIC!r}.",
            hint="Download it again; a small file may be a Git LFS pointer or an error page.",
            model=reference,
        )
    if len(head) < _HEADER.size:
        raise ModelError(
            f"{file} ends within its header, after {len(head)} bytes.", hint="Download it again.", model=reference
        )
    _, version, tensors, _ = _HEADER.unpack(head)
    if version not in _VERSIONS:
        raise ModelError(
            f"{file} is GGUF of version {version}; {' and '.join(map(str, _VERSIONS))} are read, in little-endian order.",
            hint="Convert it with a present llama.cpp, or download a newer file.",
            model=reference,
        )
    if not tensors:
        raise ModelError(
            f"{file} holds no tensors.", hint="It may be a vocabulary only: download the whole model.", model=reference
        )


def converted(file: Path, reference: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The directory with the converted model; the second call, from any process, finds it there.

    Raises:
        ModelError: the file is damaged, no decoder, of an architecture that transformers does not read, or the disk is full.
    """
    check_gguf(file, reference)
    root = cache / "bases"
    target = root / sha256_of(file, cache)
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{target.name}.lock"):
        if target.is_dir():
            return target
        say(f"converting {file.name} ({file.stat().st_size / 1e6:.0f} MB) to safetensors, once (about 15 s per 100 MB)")
        partial = root / f".tmp-{uuid.uuid4().hex}"
        try:
            partial.mkdir()
            _convert(file, partial)
            check_directory(partial, reference)
            partial.rename(target)
        except AdaptoryError:
            raise
        except Exception as error:  # transformers, gguf and numpy have no common base class
            raise _explained(error, file, reference) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def known_conversion(file: Path, cache: Path) -> Path | None:
    """The converted model, if it is there already."""
    target = cache / "bases" / sha256_of(file, cache)
    return target if target.is_dir() else None


def _convert(file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _parsed_once():
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    model.save_pretrained(directory)


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse the file's header once instead of four times, and map names once instead of per module.

    `load_gguf_checkpoint` (5.23) makes a new reader in each call and a new name map in each of the model's 400 modules:
    two thirds of the conversion of a 135M model.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    reader, name_map, bar = gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(reader)  # type: ignore[misc, assignment]
    gguf.get_tensor_name_map = functools.cache(name_map)
    loader.tqdm = lambda tensors, **_: tensors  # it writes to the terminal whatever the log level
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm = reader, name_map, bar  # type: ignore[misc]


def _explained(error: Exception, file: Path, reference: str) -> ModelError:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        hint = f"The disk is full: about {4 * file.stat().st_size / 1e9:.1f} GB are needed under ADAPTORY_HOME."
    elif "not supported" in text or "architecture" in text:
        hint = "transformers does not read this architecture from GGUF; use the model's safetensors instead."
    else:
        hint = "The file is probably damaged or cut short: download it again."
    return ModelError(f"{file} cannot be converted: {text}", hint=hint, model=reference)
