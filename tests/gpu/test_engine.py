"""The engine on a GPU, by torch's own operations: each request's answer is its own and stock PEFT's, in any company."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from serving.engine.attention import KeyValueCache
from tests.unit.engine.test_core import (
    test_a_failed_step_ends_its_requests_and_the_engine_goes_on,
    test_a_mixed_batch_is_each_request_alone_is_stock_peft,
    test_a_poisoned_answer_ends_alone_and_leaves_nothing_behind,
    test_a_prompt_in_chunks_is_the_prompt_at_once,
    test_a_seed_gives_the_same_answer_in_any_batch_and_after_a_preemption,
    test_an_end_token_ends_an_answer_and_is_not_part_of_it,
    test_bf16_logits_stay_within_a_bound,
    test_preempted_answers_are_the_same,
    test_shared_prefixes_change_no_answer_and_are_never_shared_across_adapters,
)
from tests.unit.engine.test_local import (
    test_a_client_that_goes_away_frees_its_place,
    test_adapters_change_places_all_of_them_or_none,
    test_adapters_come_and_go_while_others_are_answered,
    test_closing_ends_streams_and_refuses_new_ones,
    test_streams_that_run_together_are_the_answers_of_the_core,
)

__all__ = [
    "test_a_client_that_goes_away_frees_its_place",
    "test_a_failed_step_ends_its_requests_and_the_engine_goes_on",
    "test_a_mixed_batch_is_each_request_alone_is_stock_peft",
    "test_a_poisoned_answer_ends_alone_and_leaves_nothing_behind",
    "test_a_prompt_in_chunks_is_the_prompt_at_once",
    "test_a_seed_gives_the_same_answer_in_any_batch_and_after_a_preemption",
    "test_adapters_change_places_all_of_them_or_none",
    "test_adapters_come_and_go_while_others_are_answered",
    "test_an_end_token_ends_an_answer_and_is_not_part_of_it",
    "test_bf16_logits_stay_within_a_bound",
    "test_closing_ends_streams_and_refuses_new_ones",
    "test_preempted_answers_are_the_same",
    "test_shared_prefixes_change_no_answer_and_are_never_shared_across_adapters",
    "test_streams_that_run_together_are_the_answers_of_the_core",
]


@pytest.mark.parametrize("stop", [True, False])
def test_a_stop_text_ends_an_answer_where_it_does_on_a_cpu(
    tiny_model: Any, make_engine: Any, greedy: Any, run: Any, stop: bool
) -> None:
    core = make_engine()
    (whole,) = run(core, [greedy([5, 6, 7], new=30)])
    text = whole.text[8:11] if stop else "\0"
    (cut,) = run(core, [greedy([5, 6, 7], new=30, stop=(text,))])
    assert cut.text == (whole.text[: whole.text.index(text)] if stop else whole.text)


def test_a_cache_has_the_size_that_was_asked_for(make_engine: Any, cuda: torch.device) -> None:
    """A quarter of what is free now, to the last token."""
    network = make_engine().network
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    cache = KeyValueCache(network.architecture, network.cache_tokens(0.25) // 32, 32, network.dtype, network.device)
    taken = free - torch.cuda.mem_get_info()[0]
    assert 0.24 * free < cache.memory.nbytes <= 0.25 * free
    assert abs(taken - cache.memory.nbytes) < 64 * 2**20
