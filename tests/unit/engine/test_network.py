"""Linears with many adapters at once, packed or not, and which adapters are refused. fp32; about 15 seconds."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import AdapterError
from orchestrator.modeling.lora import Segment
from serving.engine.linears import Mixture

CPU = torch.device("cpu")
DIGESTS = ("sha256:a", "sha256:b", "sha256:c")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_plain_weights_answer_as_packed_ones_do(architecture, make_engine, peft_adapters, prompts, greedy, run):
    """On a GPU no weight is packed and nothing is fused; here both ways can be compared."""
    found = []
    for pack in (True, False):
        core = make_engine(architecture, pack=pack, fuse=False)
        for digest, directory in zip(DIGESTS, peft_adapters(architecture), strict=True):
            core.load(digest, directory)
        found.append([d.tokens for d in run(core, [greedy(p, d) for p in prompts[:3] for d in (None, *DIGESTS)])])
    assert found[0] == found[1]


def test_few_tokens_share_a_patch_and_many_have_one_of_their_own():
    segments = [
        Segment(None, 0, 2),
        Segment("a", 2, 4),
        Segment("b", 4, 5),
        Segment("c", 5, 6),
        Segment("a", 6, 306),
        Segment("b", 306, 307),
    ]
    patches = Mixture(segments, {"a": 8, "b": 16, "c": 4}, CPU).patches
    assert [(p.start, p.stop, p.slots) for p in patches] == [
        (2, 6, ("a", "b", "c")),
        (6, 306, ("a",)),
        (306, 307, ("b",)),
    ]
    mask = patches[0].mask((0, 0, 1, 2), torch.float32)
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_adapters_that_come_and_go_leave_no_trace(make_engine, peft_adapters, greedy, run):
    """The same digest's place is taken by others in between, in batches of changing make-up."""
    core = make_engine()
    directories = dict(zip(DIGESTS, peft_adapters("llama"), strict=True))
    alone = {}
    for digest, directory in directories.items():
        core.load(digest, directory)
        alone[digest] = run(core, [greedy([5, 6, 7], digest)])[0].tokens
        core.unload(digest)
    for order in (DIGESTS, DIGESTS[::-1], DIGESTS[1:], DIGESTS[:2], (DIGESTS[2], DIGESTS[0])):
        for digest in order:
            core.load(digest, directories[digest])
        done = run(core, [greedy([5, 6, 7], digest) for digest in order])
        assert [d.tokens for d in done] == [alone[digest] for digest in order]
        for digest in order:
            core.unload(digest)


@pytest.mark.parametrize(
    ("change", "words", "check"),
    [
        (lambda t: t | {first(t, "A"): t[first(t, "A")] * float("nan")}, "not finite", "finite"),
        (lambda t: {k: v for k, v in t.items() if k != first(t, "B")}, "lora_A alone", "names"),
        (lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}, "no linear of the base", "names"),
        (lambda t: t | {first(t, "A"): t[first(t, "A")][:, :32].contiguous()}, "has A", "shape"),
        (
            lambda t: t | {first(t, "A"): t[first(t, "A")][:2], first(t, "B"): t[first(t, "B")][:, :2].contiguous()},
            "has A",
            "shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(make_engine, peft_adapters, tmp_path, change, words, check):
    directory = peft_adapters("llama")[0]
    (tmp_path / "adapter_config.json").write_bytes((directory / "adapter_config.json").read_bytes())
    save_file(change(load_file(directory / "adapter_model.safetensors")), tmp_path / "adapter_model.safetensors")
    core = make_engine()
    with pytest.raises(AdapterError, match=words) as caught:
        core.load("sha256:x", tmp_path)
    assert caught.value.context["check"] == check
    assert core.stats().adapters == ()


def first(tensors, side):
    return min(name for name in tensors if f"lora_{side}" in name)
