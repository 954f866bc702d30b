"""What is refused before submission, in the words of the job. 3 seconds, for a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ModelError
from orchestrator.modeling.base_model import inspect
from orchestrator.modeling.preflight import check_job
from orchestrator.spec.job import JobSpec

Check = Callable[..., None]


@pytest.fixture
def check(tiny_model: Callable[[str], Path], tmp_path: Path) -> Check:
    """Checks a spec with these fields of `tuning` against a tiny model."""

    def run(model: str | Path, format: str = "auto", **tuning: Any) -> None:
        directory = model if isinstance(model, Path) else tiny_model(model)
        spec = JobSpec.model_validate(
            {
                "name": "x",
                "base_model": str(directory),
                "data": {"train": "x.jsonl", "format": format},
                "tuning": {"type": "lora"} | tuning,
            }
        )
        check_job(spec, inspect(spec.base_model, cache=tmp_path))

    return run


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_the_words_are_the_jobs_own(check: Check, tiny_model: Callable[[str], Path], architecture: str) -> None:
    import torch

    from orchestrator.modeling.decoder import add_adapter
    from orchestrator.modeling.loading import load_model
    from orchestrator.modeling.lora import LoraShape

    for tuning in ({"targets": ["q_proj", "nope"]}, {"rank": 65}, {"rank": 4096, "targets": ["down_proj"]}):
        with pytest.raises(ModelError) as before:
            check(architecture, **tuning)
        network = load_model(tiny_model(architecture), dtype=torch.float32, device=torch.device("cpu"))
        targets = frozenset(tuning["targets"]) if "targets" in tuning else None
        with pytest.raises(ModelError) as within:
            add_adapter(network, "a", LoraShape(tuning.get("rank", 8), 16, targets=targets), seed=0)
        assert (
            before.value.message.split("(")[0].split(" of ")[0] == within.value.message.split("(")[0].split(" of ")[0]
        )


def test_what_fits_passes(check: Check) -> None:
    check("llama", rank=32)
    check("llama", rank=64, targets=["q_proj", "mlp.down_proj"])
    check("gpt2", rank=4096, targets=["anything"])  # the plain path: only the job can tell


def test_no_chat_template(check: Check, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    bare = Path(shutil.copytree(tiny_model("llama"), tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="no chat template"):
        check(bare)
    check(bare, format="text")


def test_no_tokenizer(check: Check, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    bare = Path(shutil.copytree(tiny_model("llama"), tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    for format in ("auto", "text"):
        with pytest.raises(ModelError, match="has no tokenizer"):
            check(bare, format=format)


def test_it_needs_no_torch() -> None:
    import subprocess

    code = "import sys, orchestrator.modeling.preflight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
