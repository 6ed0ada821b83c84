"""Stage 3: head outputs → numbers with intervals.

    pipeline.py     the stage, top-down            protocols/   one procedure, one file
    predictors.py   what it asks of a head         metrics/     pure functions, one family a file
    results.py      a number and what made it      intervals.py 95 % intervals

Training is a stranger here: a head arrives as a predictor. Results are read without torch: what needs it is loaded when
first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# By way of "..": a bare `import evaluate` beside this folder is then an ImportError at once, and ours is never taken
# for Hugging Face's.
from ..evaluate.results import Result, append_result, read_results, table

if TYPE_CHECKING:
    from .intervals import Estimate
    from .pipeline import evaluate
    from .predictors import Classifier, EpisodeScorer, Predictor

_WHERE = {
    "Classifier": "predictors",
    "EpisodeScorer": "predictors",
    "Estimate": "intervals",
    "Predictor": "predictors",
    "evaluate": "pipeline",
}

__all__ = [
    "Classifier",
    "EpisodeScorer",
    "Estimate",
    "Predictor",
    "Result",
    "append_result",
    "evaluate",
    "read_results",
    "table",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its file on first use."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
