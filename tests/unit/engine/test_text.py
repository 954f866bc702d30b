"""Pieces of text are whole characters, add up to the text, and end before a stop text. About 2 seconds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from serving.engine.text import TextStream

BROKEN = "\ufffd"


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model("llama"))


def pieces(tokenizer, text, stop=()):
    stream = TextStream(tokenizer, stop)
    out = [stream.push(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return [*out, stream.end()], stream.stopped


@pytest.mark.parametrize("text", ["Ada Lovelace", "naïve – 東京 🙂🙃 ok", "\n\n  two  spaces ", "🙂"])
def test_pieces_add_up_and_no_character_is_torn(tokenizer, text):
    found, stopped = pieces(tokenizer, text)
    assert "".join(found) == text
    assert not any(BROKEN in piece for piece in found)
    assert not stopped
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 1


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30), stop=st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_the_first_stop_text_wherever_tokens_end(tokenizer, text, stop):
    text = text.replace(BROKEN, "")
    found, stopped = pieces(tokenizer, text, stop)
    places = [place for place in (text.find(s) for s in stop) if place >= 0]
    assert stopped == bool(places)
    said = "".join(found)
    # which of two stops comes first can depend on where a token ends when they overlap; never more than that is said
    assert text.startswith(said)
    assert not any(s in said for s in stop)
    if not places:
        assert said == text


def test_a_stop_text_across_tokens_is_never_sent_in_part(tokenizer):
    found, stopped = pieces(tokenizer, "London, New York and Colombo", ["York and"])
    assert stopped
    assert "".join(found) == "London, New "
    assert all("Y" not in piece for piece in found)


def test_what_only_looked_like_a_stop_text_is_sent_late(tokenizer):
    found, stopped = pieces(tokenizer, "New Yorker", ["York and"])
    assert not stopped
    assert "".join(found) == "New Yorker"


def test_an_unfinished_character_is_dropped_at_the_end(tokenizer):
    ids = tokenizer("ok 🙂", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    sent = [stream.push(token) for token in ids[:-1]]
    assert "".join([*sent, stream.end()]).strip() == "ok"


def test_bytes_that_never_become_a_character_do_not_hold_the_rest_back(tokenizer):
    broken = tokenizer("🙂", add_special_tokens=False)["input_ids"][1]  # a continuation byte
    stream = TextStream(tokenizer)
    sent = [stream.push(token) for token in [broken] * 20]
    assert "".join(sent).count(BROKEN) >= 12
