"""Which floating-point type `auto` means, by the hardware."""

from __future__ import annotations

import pytest
import torch

from orchestrator.modeling.dtypes import chosen_dtype


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    """`cpu("avx2", …)`: a CPU that can do these."""

    def is_capable_of(*names: str) -> None:
        found = dict.fromkeys(names, True) | {"avx512_bf16": "avx512_bf16" in names, "architecture": "x86_64"}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    return is_capable_of


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        (["avx2", "fma3"], "float32"),
        (["avx2", "avx512_f", "avx512_bw", "avx512_vnni"], "float32"),
        (["avx2", "avx512_f", "avx512_bf16"], "bfloat16"),
        (["amx_tile", "amx_bf16"], "bfloat16"),
        (["neon", "fp16_arith"], "float32"),
        (["neon", "bf16"], "bfloat16"),
    ],
    ids=" ".join,
)
def test_a_cpu_gets_what_it_multiplies(cpu, capabilities: list[str], dtype: str):
    cpu(*capabilities)
    assert chosen_dtype("auto", "cpu") == dtype


def test_a_cpu_without_a_library_for_it_gets_float32(cpu, monkeypatch: pytest.MonkeyPatch):
    cpu("bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert chosen_dtype("auto", "cpu") == "float32"


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_gpu_gets_what_it_multiplies(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert chosen_dtype("auto", torch.device("cuda", 0)) == dtype


def test_who_asks_for_one_gets_it(cpu):
    cpu("avx2")
    assert chosen_dtype("bfloat16", "cpu") == "bfloat16"
    cpu("amx_bf16")
    assert chosen_dtype("float32", "cpu") == "float32"
