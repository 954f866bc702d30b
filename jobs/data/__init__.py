"""From a data file to tokens with a loss mask: `dataset file → normalise → render → mask → tokens`.

On the machine that submits: `check(spec)` reads every row and raises a `DataError` with file and line, `resolve(spec,
store=…)` copies local files to the store and names all data by its bytes, `try_rows` tokenises the first rows if the model
is here. On the cluster: `prepare(data, spec, …)` gives tokenised rows, memory-mapped from the node's cache; `validation_rows` and
`example_rows` read some of them again as words. To look at: `preview(spec, tokenizer=…)`.

Sources are files (JSONL, JSON, CSV, Parquet, plain lines), globs, directories, `s3://…`, `hf:NAME[:CONFIG][:SPLIT]` and
`example:NAME/SPLIT`; formats are chat, prompt_completion, alpaca, sharegpt, input_ideal and text.

Attributes load when they are first used: `check` and `resolve` need neither transformers nor pyarrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.data.checking import check, resolve
    from jobs.data.preparing import PreparedData, TestRow, prepare
    from jobs.data.previewing import PreviewRow, preview
    from jobs.data.report import DataReport, SplitReport
    from jobs.data.rereading import example_rows, validation_rows
    from jobs.data.rows import TokenizedRows, Tokens
    from jobs.data.sampling import try_rows

_HOME = {
    "check": "checking",
    "resolve": "checking",
    "PreparedData": "preparing",
    "TestRow": "preparing",
    "prepare": "preparing",
    "PreviewRow": "previewing",
    "preview": "previewing",
    "DataReport": "report",
    "SplitReport": "report",
    "example_rows": "rereading",
    "validation_rows": "rereading",
    "TokenizedRows": "rows",
    "Tokens": "rows",
    "try_rows": "sampling",
}

__all__ = [
    "DataReport",
    "PreparedData",
    "PreviewRow",
    "SplitReport",
    "TestRow",
    "TokenizedRows",
    "Tokens",
    "check",
    "example_rows",
    "prepare",
    "preview",
    "resolve",
    "try_rows",
    "validation_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
