"""JSON answers of an engine on a GPU obey their schema, and leave the others in their batch alone."""

from __future__ import annotations

from tests.unit.engine.test_grammar import (
    core,
    test_a_bound_answer_is_the_same_after_a_preemption,
    test_a_json_object_is_one_as_far_as_it_goes,
    test_a_schema_is_obeyed_in_a_mixed_batch,
)

__all__ = [
    "core",
    "test_a_bound_answer_is_the_same_after_a_preemption",
    "test_a_json_object_is_one_as_far_as_it_goes",
    "test_a_schema_is_obeyed_in_a_mixed_batch",
]
