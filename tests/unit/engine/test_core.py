"""A mixed batch gives each request the tokens that it gets alone, and stock PEFT's. fp32; about 30 seconds."""

from __future__ import annotations

import pytest
import torch

from orchestrator.errors import (
    AdapterInUse,
    AdapterNotLoaded,
    EngineError,
    EngineOverloaded,
    InvalidRequest,
    NoFreeSlot,
    StepFailed,
)
from serving.engine.core import answers
from serving.engine.grammar import GrammarState
from serving.engine.protocol import FinishReason, GenerateRequest, Sampling

ARCHITECTURES = ("llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
DIGESTS = ("sha256:a", "sha256:b", "sha256:c")


def load_all(core, directories):
    for digest, directory in zip(DIGESTS, directories, strict=True):
        core.load(digest, directory)


def logits_of(core, monkeypatch):
    """Collects the logits of every token that the engine chooses: {request id: [logits, …]}."""
    seen: dict[str, list[torch.Tensor]] = {}
    choose = core._choose

    def watched(hidden, chosen):
        rows = core.network.logits(hidden)
        for answer, row in zip(chosen, rows, strict=True):
            seen.setdefault(answer.request.id, []).append(row)
        return choose(hidden, chosen)

    monkeypatch.setattr(core, "_choose", watched)
    return seen


@torch.no_grad()
def stock_logits(model, prompt, answer):
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_batch_is_each_request_alone_is_stock_peft(
    architecture, make_engine, peft_adapters, prompts, greedy, run, stock, monkeypatch
):
    directories = peft_adapters(architecture)
    core = make_engine(architecture)
    load_all(core, directories)
    adapters = {None: None} | dict(zip(DIGESTS, directories, strict=True))
    requests = [greedy(prompt, digest) for prompt in prompts for digest in adapters]
    with monkeypatch.context() as patch:
        seen = logits_of(core, patch)
        mixed = run(core, requests)

    alone = [run(core, [greedy(r.prompt_ids, r.adapter)])[0] for r in requests]
    assert [d.tokens for d in mixed] == [d.tokens for d in alone]
    assert len({tuple(d.tokens) for d in mixed[:4]}) == 4, "every adapter must have an effect"
    for digest, directory in adapters.items():
        model = stock(architecture, directory)
        for request, done in zip(requests, mixed, strict=True):
            if request.adapter == digest:
                theirs = stock_logits(model, request.prompt_ids, done.tokens)
                assert theirs.argmax(-1).tolist() == done.tokens
                torch.testing.assert_close(torch.stack(seen[request.id]), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_bf16_logits_stay_within_a_bound(architecture, make_engine, peft_adapters, prompts, greedy, run, monkeypatch):
    """In bf16 the order of sums changes with the batch: at most 4% of the largest logit, at the first token."""
    exact, rounded = make_engine(architecture), make_engine(architecture, dtype=torch.bfloat16)
    found = []
    for core in (exact, rounded):
        load_all(core, peft_adapters(architecture))
        with monkeypatch.context() as patch:
            seen = logits_of(core, patch)
            run(core, [greedy(p, d, new=1) for p in prompts for d in (None, *DIGESTS)])
        found.append(torch.stack([rows[0] for rows in seen.values()]))
    difference = (found[0] - found[1]).abs().max() / found[0].abs().max()
    assert 0 < difference < 0.04


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_a_prompt_in_chunks_is_the_prompt_at_once(architecture, make_engine, prompts, greedy, run):
    requests = [greedy(p) for p in prompts]
    whole = run(make_engine(architecture, batch_tokens=512), requests)
    chunked = make_engine(architecture, batch_tokens=16)
    assert [d.tokens for d in run(chunked, requests)] == [d.tokens for d in whole]
    assert chunked.stats().steps > 12 + sum(len(p) for p in prompts) // 16


def test_a_prompt_that_is_read_by_the_clock_is_the_prompt_at_once(make_engine, prompts, greedy, run):
    requests = [greedy(p) for p in (*prompts, tuple(5 + n % 100 for n in range(400)))]
    whole = run(make_engine(batch_tokens=512), requests)
    paced = make_engine(batch_tokens=512, step_seconds=1e-9)
    assert [d.tokens for d in run(paced, requests)] == [d.tokens for d in whole]


def test_answers_go_on_while_a_long_prompt_is_read(make_engine, greedy):
    core = make_engine(batch_tokens=16)
    core.add(greedy([5, 6, 7], new=20))
    core.step()
    core.add(greedy(range(5, 105), new=1))
    for _ in range(6):  # 100 tokens, 15 beside each answer's next one
        (delivery,) = core.step()
        assert delivery.event.tokens


def test_shared_prefixes_change_no_answer_and_are_never_shared_across_adapters(make_engine, peft_adapters, greedy, run):
    common, tails = list(range(5, 45)), [[60], [61, 62], [63, 64, 65]]
    requests = [greedy(common + tail, digest) for digest in (None, *DIGESTS) for tail in tails]
    told = {}
    for share in (True, False):
        core = make_engine(share_prefixes=share)
        load_all(core, peft_adapters("llama"))
        told[share] = [run(core, [greedy(r.prompt_ids, r.adapter)])[0] for r in requests]
        again = run(core, [greedy(r.prompt_ids, r.adapter) for r in requests])
        assert [d.tokens for d in again] == [d.tokens for d in told[share]]
        cached = [d.usage.cached for d in told[share]]
        # two full blocks of 16; the first request of each adapter finds nothing, though the base had them
        assert cached == ([0, 32, 32] * 4 if share else [0] * 12)
    assert [d.tokens for d in told[True]] == [d.tokens for d in told[False]]


def test_a_new_version_of_an_adapter_shares_nothing_with_the_old_one(make_engine, peft_adapters, greedy, run):
    core, prompt = make_engine(), list(range(5, 45))
    first, second, _ = peft_adapters("llama")
    core.load("sha256:old", first)
    old = run(core, [greedy(prompt, "sha256:old")])[0]
    core.unload("sha256:old")
    core.load("sha256:new", second)
    new = run(core, [greedy(prompt, "sha256:new")])[0]
    assert new.usage.cached == 0
    assert new.tokens != old.tokens


def test_preempted_answers_are_the_same(make_engine, peft_adapters, prompts, greedy, run):
    requests = [greedy(p, d, new=40) for p in prompts for d in (None, DIGESTS[0])]
    roomy, tight = make_engine(cache_tokens=4096), make_engine(cache_tokens=208)
    for core in (roomy, tight):
        load_all(core, peft_adapters("llama"))
    assert [d.tokens for d in run(tight, requests)] == [d.tokens for d in run(roomy, requests)]
    assert tight.stats().preemptions > 0
    assert roomy.stats().preemptions == 0
    assert tight.stats().cache_tokens_used == 0


def test_an_answer_ends_at_the_end_of_the_cache(make_engine, greedy, run):
    (done,) = run(make_engine(cache_tokens=32), [greedy(range(5, 25), new=100)])
    assert (len(done.tokens), done.finish) == (12, FinishReason.LENGTH)


def test_an_end_token_ends_an_answer_and_is_not_part_of_it(make_engine, greedy, run):
    (free,) = run(make_engine(), [greedy([5, 6, 7])])
    end = free.tokens[4]
    (cut,) = run(make_engine(end=frozenset({end})), [greedy([5, 6, 7])])
    assert (cut.tokens, cut.finish) == (free.tokens[: free.tokens.index(end)], FinishReason.STOP)
    (ignored,) = run(make_engine(end=frozenset({end})), [greedy([5, 6, 7], ignore_end=True)])
    assert (ignored.tokens, ignored.finish) == (free.tokens, FinishReason.LENGTH)


def test_a_seed_gives_the_same_answer_in_any_batch_and_after_a_preemption(make_engine, prompts, greedy, run):
    ways = ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.5, "top_k": 5})
    requests = [greedy(p, new=30, seed=n, **ways[n % 3]) for n, p in enumerate(prompts)]
    others = [greedy([7, 8, 9], new=30, temperature=1.0) for _ in range(5)]
    core, tight = make_engine(), make_engine(cache_tokens=160)
    alone = [run(core, [GenerateRequest(r.prompt_ids, None, r.sampling)])[0].tokens for r in requests]
    assert [d.tokens for d in run(core, [*others, *requests])[5:]] == alone
    assert [d.tokens for d in run(tight, requests)] == alone
    assert tight.stats().preemptions > 0
    reseeded = GenerateRequest(prompts[0], None, Sampling(max_tokens=30, temperature=1.0, seed=99))
    assert run(core, [reseeded])[0].tokens != alone[0]


def test_an_aborted_request_frees_its_blocks_and_the_others_go_on(make_engine, prompts, greedy, run):
    core = make_engine()
    expected = run(core, [greedy(prompts[2])])[0].tokens
    gone, stays = greedy(range(5, 60), new=100), greedy(prompts[2])
    core.add(gone)
    core.add(stays)
    core.step()
    before = core.stats().cache_tokens_used
    core.abort(gone.id)
    assert core.stats().cache_tokens_used < before
    told = list(answers(core))
    assert {d.request_id for d in told} == {stays.id}
    assert core.stats().cache_tokens_used == 0
    core.abort(gone.id)  # again, and once it is unknown: nothing happens
    assert expected[-1] == told[-1].event.tokens[-1]


def test_what_can_never_be_answered_is_refused_with_its_reason(make_engine, greedy):
    core = make_engine(max_length=64)
    for prompt, words in (([], "empty"), ([10_000], "vocabulary"), (range(5, 85), "80 tokens")):
        with pytest.raises(InvalidRequest, match=words):
            core.add(greedy(prompt))
    with pytest.raises(AdapterNotLoaded, match="sha256:x"):
        core.add(greedy([5], "sha256:x"))
    request = greedy([5])
    core.add(request)
    with pytest.raises(InvalidRequest, match="is being answered"):
        core.add(request)
    for wrong in ({"max_tokens": 0}, {"temperature": -1}, {"top_p": 0.0}, {"top_k": -1}, {"stop": ("",)}):
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            Sampling(**wrong)


def test_too_many_waiting_requests_are_turned_away(make_engine, greedy):
    core = make_engine(max_sequences=3, max_waiting=2)
    for _ in range(5):  # three at once find a place
        core.add(greedy([5]))
    with pytest.raises(EngineOverloaded, match="5 requests"):
        core.add(greedy([5]))
    core.step()
    with pytest.raises(EngineOverloaded, match="2 requests"):
        core.add(greedy([5]))


def test_slots_run_out_and_adapters_in_use_stay(make_engine, peft_adapters, greedy):
    core = make_engine(max_adapters=1)
    first, second, _ = peft_adapters("llama")
    core.load("sha256:a", first)
    core.load("sha256:a", first)  # there already
    with pytest.raises(NoFreeSlot):
        core.load("sha256:b", second)
    core.add(greedy([5], "sha256:a", new=3))
    with pytest.raises(AdapterInUse):
        core.unload("sha256:a")
    list(answers(core))
    core.unload("sha256:a")
    core.load("sha256:b", second)
    assert core.stats().adapters == ("sha256:b",)


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(make_engine, greedy, run, monkeypatch):
    core = make_engine()
    expected = run(core, [greedy([5, 6, 7])])[0].tokens
    core.add(greedy([5, 6, 7]))
    core.add(greedy([8, 9]))
    with monkeypatch.context() as patch:
        patch.setattr(core.network, "hidden", lambda *_: (_ for _ in ()).throw(RuntimeError("out of something")))
        told = core.step()
    assert [type(d.error) for d in told] == [StepFailed, StepFailed]
    assert "out of something" in told[0].error.context["cause"]
    assert (core.busy, core.stats().failed_steps, core.stats().cache_tokens_used) == (False, 1, 0)
    assert run(core, [greedy([5, 6, 7])])[0].tokens == expected


def test_a_poisoned_answer_ends_alone_and_leaves_nothing_behind(make_engine, greedy, run, monkeypatch):
    """Keys and values that are not finite: the blocks are used again by another request, which must not notice."""
    core = make_engine(cache_tokens=64)
    expected = run(core, [greedy([8, 9])])[0].tokens
    embedding = core.network._decoder.embedding
    poisoned, healthy = greedy([5] * 20), greedy([8, 9])
    core.add(poisoned)
    core.add(healthy)
    with monkeypatch.context() as patch:
        patch.setattr(
            type(embedding),
            "forward",
            lambda self, ids: torch.nn.functional.embedding(ids, self.weight).masked_fill(
                (ids == 5)[:, None], float("nan")
            ),
        )
        told = core.step()
    failed = {d.request_id: d.error for d in told if d.error}
    assert failed.keys() == {poisoned.id}
    assert isinstance(failed[poisoned.id], EngineError)
    rest = [t for d in told + list(answers(core)) if d.event for t in d.event.tokens]
    assert rest == expected
    assert [d.tokens for d in run(core, [greedy([8, 9]) for _ in range(3)])] == [expected] * 3


def test_a_grammar_that_fails_ends_its_own_request_alone(make_engine, greedy, run):
    class Broken:
        def fill_next_token_bitmask(self, bits):
            raise RuntimeError("no state")

    core = make_engine()
    expected = run(core, [greedy([8, 9])])[0].tokens
    bound, free = greedy([5, 6, 7]), greedy([8, 9])
    core.add(bound, GrammarState(Broken(), core.network.architecture.vocab_size))
    core.add(free)
    told = list(answers(core))
    assert [(d.request_id, type(d.error)) for d in told if d.error] == [(bound.id, EngineError)]
    assert [t for d in told if d.event for t in d.event.tokens] == expected
