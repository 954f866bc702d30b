"""Adapter files against PEFT itself, both ways, and each way in which one can be bad (6 s, most of it importing PEFT)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import AdapterError
from orchestrator.modeling.adapter_check import adapter_problems, base_modules, check_adapter
from orchestrator.modeling.adapter_files import (
    AdapterConfig,
    adapter_digest,
    raw_tensors,
    read_adapter,
    read_adapter_config,
    write_adapter,
)

TARGETS = ("q_proj", "v_proj", "down_proj")
Make = Callable[..., Path]


def random_tensors(base: Path, config: AdapterConfig, *, scale: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module, (out, width) in sorted(base_modules(base).items()):
        if any(module == t or module.endswith(f".{t}") for t in config.target_modules):
            rank = config.rank_of(module)
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * scale
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * scale
    return tensors


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Make:
    """Write an adapter of the tiny Llama; `change` edits its tensors before."""

    def make(
        change: Callable[[dict[str, torch.Tensor]], Any] = lambda _: None, name: str = "adapter", **config: Any
    ) -> Path:
        settings = AdapterConfig(**{"rank": 4, "alpha": 8.0, "target_modules": TARGETS, **config})
        tensors = random_tensors(tiny_model("llama"), settings)
        change(tensors)
        write_adapter(tmp_path / name, settings, tensors)
        return tmp_path / name

    return make


def test_peft_reads_our_configuration_as_its_own(adapter: Make) -> None:
    import peft

    directory = adapter(rslora=True, rank_pattern={"down_proj": 2}, alpha_pattern={"v_proj": 4.5}, dropout=0.25)
    ours = peft.LoraConfig.from_pretrained(directory)
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=set(TARGETS),
        lora_dropout=0.25,
        use_rslora=True,
        rank_pattern={"down_proj": 2},
        alpha_pattern={"v_proj": 4.5},
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    assert ours.to_dict() == theirs.to_dict()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "extra", [{}, {"rslora": True}, {"rank_pattern": {"q_proj|c_attn": 2}, "alpha_pattern": {"c_attn": 3}}]
)
def test_written_by_us_it_loads_in_peft_and_adds_exactly_its_update(
    architecture: str, extra: dict[str, Any], tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """Logits of PEFT's model equal those of a plain model whose weights are W + s·B·A."""
    import peft
    from transformers import AutoModelForCausalLM

    base = tiny_model(architecture)
    gpt2 = architecture == "gpt2"
    targets = ("c_attn", "mlp.c_proj") if gpt2 else TARGETS
    config = AdapterConfig(4, 8.0, targets, fan_in_fan_out=gpt2, **extra)
    tensors = random_tensors(base, config)
    write_adapter(tmp_path, config, tensors)
    ids = torch.arange(24)[None] + 5
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for module in {name.rpartition(".lora_")[0] for name in tensors}:
            update = config.scale_of(module) * (tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"])
            model.get_submodule(module).weight += update.T if gpt2 else update
        expected = model(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = plain(ids).logits
        found = peft.PeftModel.from_pretrained(plain, tmp_path)(ids).logits
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_written_by_peft_it_reads_back_the_same(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=list(TARGETS),
        rank_pattern={"q_proj": 3},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, settings)
    model.save_pretrained(tmp_path)
    config, tensors = read_adapter(tmp_path)
    assert (config.rank, config.alpha, config.target_modules) == (4, 7.0, tuple(sorted(TARGETS)))
    module = "model.layers.0.self_attn.q_proj"
    assert config.scale_of(module) == pytest.approx(
        model.get_submodule(f"base_model.model.{module}").scaling["default"]
    )
    theirs = peft.get_peft_model_state_dict(model)
    assert tensors.keys() == theirs.keys()
    assert all(torch.equal(tensors[name], theirs[name]) for name in theirs)
    check_adapter(tmp_path, tiny_model("llama"))


def test_views_of_one_stacked_matrix_are_written(adapter: Make) -> None:
    """q and v as rows of one matrix, as the fused layer holds them."""

    def stack(tensors: dict[str, torch.Tensor]) -> None:
        names = [f"model.layers.0.self_attn.{p}.lora_A.weight" for p in ("q_proj", "v_proj")]
        stacked = torch.cat([tensors[name] for name in names])
        tensors.update({names[0]: stacked[:4], names[1]: stacked[4:]})

    assert adapter_digest(adapter(stack), "sha256:b") == adapter_digest(adapter(name="plain"), "sha256:b")


# --- digest ---------------------------------------------------------------------------------------------------------


def test_digest_is_of_the_content_not_of_the_files_layout(adapter: Make) -> None:
    from safetensors.torch import load_file, save_file

    directory = adapter()
    before = adapter_digest(directory, "sha256:base")
    file = directory / "adapter_model.safetensors"
    old = file.read_bytes()
    save_file(dict(reversed(load_file(file).items())), file, metadata={"format": "pt", "note": "moved"})
    config = directory / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "elsewhere", "lora_dropout": 0.1})
    )
    assert file.read_bytes() != old
    assert adapter_digest(directory, "sha256:base") == before


@pytest.mark.parametrize("what", ["base", "alpha", "rslora", "one value", "dtype"])
def test_digest_changes_with_each_part(what: str, adapter: Make) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(iter(tensors))
        if what == "one value":
            tensors[name][0, 0] += 1e-3
        if what == "dtype":
            tensors.update({key: value.double() for key, value in tensors.items()})

    other = adapter(change, "other", alpha=9.0 if what == "alpha" else 8.0, rslora=what == "rslora")
    same = adapter_digest(adapter(), "sha256:base")
    assert adapter_digest(other, "sha256:other" if what == "base" else "sha256:base") != same
    assert same.startswith("sha256:")
    assert len(same) == 7 + 64


# --- bad ones -------------------------------------------------------------------------------------------------------


def checks(directory: Path, base: Path | None = None) -> set[str]:
    return {problem.check for problem in adapter_problems(directory, base)}


def test_a_good_adapter_has_no_problem(adapter: Make, tiny_model: Callable[[str], Path]) -> None:
    assert adapter_problems(adapter(), tiny_model("llama")) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite(value: float, dtype: torch.dtype, adapter: Make) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors["model.layers.1.mlp.down_proj.lora_A.weight"][1, 2] = value

    directory = adapter(spoil)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj\.lora_A has 1 values") as caught:
        check_adapter(directory)
    assert caught.value.context["check"] == "finite"


@pytest.mark.parametrize(("value", "good"), [(1.0, True), (4e10, False)])
def test_an_update_that_dwarfs_any_trained_weights(value: float, good: bool, adapter: Make) -> None:
    """Its size is that of the whole product, scale and all: here 8/4 · 4 · value² in every place of the matrix."""

    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            tensors[f"model.layers.1.mlp.down_proj.lora_{side}.weight"].fill_(value)

    directory = adapter(blow_up)
    assert checks(directory) == (set() if good else {"magnitude"})
    if not good:
        with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj has a root mean square of 1\.28e\+22"):
            check_adapter(directory)


def test_zero_b_everywhere_has_no_effect(adapter: Make) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.mul_(-0.0)

    assert checks(adapter(zero)) == {"effect"}


def test_a_module_that_the_base_lacks_is_named_with_what_it_has(
    adapter: Make, tiny_model: Callable[[str], Path]
) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            tensors[f"model.layers.7.self_attn.q_proj.lora_{side}.weight"] = tensors.pop(
                f"model.layers.1.self_attn.q_proj.lora_{side}.weight"
            )

    directory = adapter(rename)
    with pytest.raises(AdapterError, match=r"no linear model\.layers\.7\.self_attn\.q_proj .*gate_proj, k_proj"):
        check_adapter(directory, tiny_model("llama"))


def test_the_wrong_base(adapter: Make, tiny_model: Callable[[str], Path]) -> None:
    assert checks(adapter(), tiny_model("gemma2")) == {"shape"}
    assert checks(adapter(), tiny_model("gpt2")) == {"names"}


def test_half_a_pair_a_stray_target_and_a_wrong_rank(adapter: Make) -> None:
    assert checks(adapter(lambda t: t.pop("model.layers.0.self_attn.q_proj.lora_B.weight"))) == {"names"}
    assert checks(adapter(target_modules=(*TARGETS, "x_proj"))) == {"names"}

    directory = adapter()
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 8}))
    assert checks(directory) == {"shape"}


def test_a_tensor_outside_the_targets_would_be_dropped_by_a_loader(adapter: Make) -> None:
    directory = adapter()
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj", "v_proj"]}))
    assert checks(directory) == {"names"}


def test_a_rank_above_the_width(adapter: Make) -> None:
    with pytest.raises(AdapterError, match=r"v_proj has rank 40, above its width of 32"):
        check_adapter(adapter(rank=40))


@pytest.mark.parametrize("tensor", [torch.zeros(0), torch.zeros(0, 8), torch.zeros(32)])
def test_one_workers_part_is_never_written(tensor: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="one worker's part, or empty"):
        write_adapter(
            tmp_path, AdapterConfig(4, 8.0, ("q_proj",)), {"model.layers.0.self_attn.q_proj.lora_A.weight": tensor}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa"),
        ({"peft_type": "LOHA"}, "is LOHA, not LORA"),
        ({"r": None}, "needs r, lora_alpha"),
    ],
)
def test_more_than_plain_lora_is_refused(change: dict[str, Any], words: str, adapter: Make) -> None:
    directory = adapter()
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=words):
        read_adapter_config(directory)


def test_files_that_are_missing_damaged_or_pickles(adapter: Make, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is no adapter"):
        read_adapter(tmp_path / "nowhere")

    directory = adapter()
    weights = directory / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    for read in (read_adapter, raw_tensors):
        with pytest.raises(AdapterError, match="is damaged"):
            read(directory)
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(AdapterError, match="is a pickle"):
        read_adapter(directory)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="is not JSON"):
        read_adapter(directory)
