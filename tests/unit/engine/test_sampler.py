"""Chosen tokens follow the distribution that was asked for. About a second."""

from __future__ import annotations

import math

import pytest
import torch

from serving.engine.protocol import Sampling
from serving.engine.sampler import Choice, choose, uniform

LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]))
DRAWS = 4000


def drawn(**sampling):
    choices = [Choice(Sampling(**sampling), seed=3, number=n) for n in range(DRAWS)]
    tokens = choose(LOGITS.repeat(DRAWS, 1), choices)
    return [tokens.count(token) / DRAWS for token in range(5)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1, 0.0]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30, 0.0]),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7, 0.0, 0.0, 0.0]),
        ({"temperature": 1.0, "top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0.0, 0.0]),
        ({"temperature": 1.0, "top_p": 0.35}, [1.0, 0.0, 0.0, 0.0, 0.0]),
        ({"temperature": 1.0, "top_p": 0.75, "top_k": 10**30}, [4 / 9, 3 / 9, 2 / 9, 0.0, 0.0]),
        ({"temperature": 1.0, "top_p": 1e-300}, [1.0, 0.0, 0.0, 0.0, 0.0]),
        ({"temperature": 1e-300}, [1.0, 0.0, 0.0, 0.0, 0.0]),
        ({"temperature": 0.0}, [1.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_frequencies(sampling, expected):
    for frequency, probability in zip(drawn(**sampling), expected, strict=True):
        # five standard deviations, and nothing at all where nothing is allowed
        assert abs(frequency - probability) <= 5 * math.sqrt(probability * (1 - probability) / DRAWS)


def test_a_flat_distribution_needs_more_than_the_first_sorted_tokens():
    """top_p over a vocabulary in which the likeliest 256 tokens hold far less than it asks for."""
    choices = [Choice(Sampling(temperature=1.0, top_p=0.9), 1, n) for n in range(300)]
    tokens = choose(torch.zeros(300, 5000), choices)
    assert len(set(tokens)) > 256
    assert len(set(tokens)) <= 4500


def test_rows_do_not_depend_on_their_neighbours():
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0))
    ways = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"temperature": 2.0, "top_k": 7}] * 2
    choices = [Choice(Sampling(**way), seed=n, number=4) for n, way in enumerate(ways[:6])]
    together = choose(logits, choices)
    assert together == [choose(logits[n : n + 1], choices[n : n + 1])[0] for n in range(6)]


def test_logits_that_are_not_finite_choose_nothing():
    logits = torch.zeros(3, 4)
    logits[1, 2] = float("nan")
    logits[2] = float("-inf")
    assert choose(logits, [Choice(Sampling(), 0, 0)] * 3) == [0, None, None]


def test_the_numbers_behind_it_are_even_and_differ_by_seed_and_place():
    numbers = [uniform(seed, n) for seed in range(20) for n in range(100)]
    assert len(set(numbers)) == 2000
    assert abs(sum(numbers) / 2000 - 0.5) < 5 / math.sqrt(12 * 2000)
    assert min(numbers) >= 0
    assert max(numbers) < 1
