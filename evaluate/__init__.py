"""Stage 3: head outputs → numbers with intervals.

    pipeline.py     the stage, top-down            protocols/   one procedure, one file
    predictors.py   what it asks of a head         metrics/     pure functions, one family a file
    results.py      a number and what made it      intervals.py 95 % intervals

Training is a stranger here: a head arrives as a predictor.
"""

from __future__ import annotations

# By way of "..": a bare `import evaluate` beside this folder is then an ImportError at once, and ours is never taken
# for Hugging Face's.
from ..evaluate.intervals import Estimate
from ..evaluate.pipeline import evaluate
from ..evaluate.predictors import Classifier, EpisodeScorer, Predictor
from ..evaluate.results import Result, append_result, read_results, table

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
