"""What a base model's directory must hold, and the digest that names it; reads headers only, without torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from orchestrator.errors import ModelError
from orchestrator.store import sha256_file

WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")
"""File names copied from a hub or a bucket: safe weights, configuration, tokenizer, templates. Never a pickle, never code."""

_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_OLD_DECODERS = frozenset({"GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "XLNetLMHeadModel"})
_VOLATILE = ("transformers_version", "_name_or_path", "_model_name_or_path")  # who wrote the file, not what it says


def read_config(path: Path, reference: str) -> dict[str, Any]:
    """`config.json` of a model directory.

    Raises:
        ModelError: it is missing or no JSON object.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{path} is no model: it has no config.json (it holds {held}).",
            hint="Name the directory that transformers' save_pretrained wrote, or a .gguf file.",
            model=reference,
        ) from error
    except ValueError as error:
        raise ModelError(
            f"{file} is not JSON: {error}.", hint="Copy the model again; the file is damaged.", model=reference
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a JSON object.", hint="Copy the model again.", model=reference)
    return config


def check_config(config: dict[str, Any], reference: str) -> str:
    """The architecture's class name, if it is a decoder that transformers itself can run.

    Raises:
        ModelError: an encoder, an encoder-decoder, a multi-modal model, or one that brings its own code.
    """
    names = config.get("architectures") or []
    model_type = str(config.get("model_type", ""))
    decoders = [name for name in names if name.endswith("ForCausalLM") or name in _OLD_DECODERS]
    if config.get("is_encoder_decoder") or not decoders:
        raise ModelError(
            f"{reference} is {' / '.join(names) or model_type or 'of no named architecture'}, not a decoder "
            "(a …ForCausalLM).",
            hint="Choose a text-generating model, such as Llama, Mistral, Qwen or Gemma; of a multi-modal model, its text part.",
            model=reference,
        )
    if config.get("auto_map") and not _known_to_transformers(model_type):
        raise ModelError(
            f"{reference} needs code of its own ({', '.join(sorted(config['auto_map']))}), which is never run.",
            hint="Choose a model whose architecture is part of transformers; trust_remote_code stays off.",
            model=reference,
        )
    return decoders[0]


def _known_to_transformers(model_type: str) -> bool:
    """By its directory: importing the registry of models would cost a second."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return False
    folder = model_type.replace("-", "_").removesuffix("_text")
    return bool(folder) and (Path(found.origin).parent / "models" / folder).is_dir()


def weight_files(path: Path, reference: str) -> list[Path]:
    """The safetensors files of a model, complete and undamaged, by name.

    Raises:
        ModelError: only pickles, no weights, a missing shard, or a file cut short.
    """
    index = path / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read: {error}.", hint="Copy it again.", model=reference) from error
        files = [path / name for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelError(
                f"{path} lacks {len(missing)} of {len(files)} weight files ({', '.join(missing[:3])}).",
                hint="Finish the download or copy; the index names them.",
                model=reference,
            )
    else:
        files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if not files:
        _refuse_without_weights(path, reference)
    for file in files:
        tensor_shapes(file, reference)
    return files


def _refuse_without_weights(path: Path, reference: str) -> None:
    refuse_pickles((file.name for file in path.iterdir()), reference)
    raise ModelError(f"{path} holds no weights (*.safetensors).", hint="Finish the download or copy.", model=reference)


def refuse_pickles(names: Iterable[str], reference: str) -> None:
    """
    Raises:
        ModelError: among these file names, of a model without safetensors, are pickled weights.
    """
    pickles = sorted(name for name in names if Path(name).suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"{reference} ships its weights only as pickles ({', '.join(pickles[:3])}), which can run code when loaded.",
            hint="Convert it to safetensors once, on a machine that may trust it: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…).",
            model=reference,
        )


def tensor_shapes(file: Path, reference: str) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor name, from the header; safetensors itself refuses a file that is longer or shorter than it says.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} ({file.stat().st_size:,} bytes) is damaged: {error}.",
            hint="It was probably cut short: download or copy it again.",
            model=reference,
            file=str(file),
        ) from error


def check_directory(path: Path, reference: str) -> dict[str, Any]:
    """`config.json` of a directory that can be trained on and served: a decoder with safe weights and a tokenizer.

    Raises:
        ModelError: it is not.
    """
    config = read_config(path, reference)
    check_config(config, reference)
    weight_files(path, reference)
    require_tokenizer(path, reference)
    return config


def has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in _TOKENIZERS)


def require_tokenizer(path: Path, reference: str) -> None:
    """
    Raises:
        ModelError: the model's directory has none.
    """
    if not has_tokenizer(path):
        raise ModelError(
            f"{path} has no tokenizer ({', '.join(_TOKENIZERS[:2])}).",
            hint="Save the tokenizer beside the weights: AutoTokenizer.from_pretrained(…).save_pretrained(…).",
            model=reference,
        )


def has_chat_template(path: Path) -> bool:
    if any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(json.loads((path / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def require_chat_template(path: Path, reference: str | None = None) -> None:
    """
    Raises:
        ModelError: the model has no chat template, so there is no right way to write a conversation for it.
    """
    if not has_chat_template(path):
        name = reference or str(path)
        raise ModelError(
            f"{name} has no chat template, so it is not known how it writes a conversation.",
            hint="Choose the model's instruct or chat version, put a chat_template.jinja beside its tokenizer, or give plain "
            'rows ({"text": …}) with data.format: text.',
            model=name,
        )


def base_digest(path: Path, reference: str, cache: Path | None) -> str:
    """`sha256:…` over names and digests of the weight files and over what `config.json` says.

    Args:
        cache: remembers the digests of files that did not change; None: every byte is read.
    """
    config = {key: value for key, value in read_config(path, reference).items() if key not in _VOLATILE}
    canonical = {
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "weights": [
            [file.name, sha256_of(file, cache) if cache else sha256_file(file)]
            for file in weight_files(path, reference)
        ],
    }
    return "sha256:" + hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def sha256_of(file: Path, cache: Path) -> str:
    """Digest of a large file, computed again only when its path, size or time of change differs."""
    real = file.resolve()
    status = real.stat()
    key = hashlib.sha256(f"{real}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()
    note = cache / "digests" / key
    try:
        if len(known := note.read_text()) == 64:
            return known
    except OSError:
        pass
    digest = sha256_file(real)
    remember(note, digest)
    return digest


def remember(note: Path, text: str) -> None:
    """Write a small file atomically; a cache that cannot be written only costs the time again."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f".tmp-{uuid.uuid4().hex}")
        partial.write_text(text)
        partial.replace(note)
    except OSError:
        pass
