"""Every error a user can cause, drawn once.

    ColdframeError                     caught by cli.py: one line, exit code 2
    ├── ConfigError(ValueError)        a setting that is unknown, of the wrong type or impossible   (here)
    ├── UnknownName(LookupError)       no such head, protocol, dataset, model, feature              (here)
    ├── ManifestError(ValueError)      a manifest that cannot be right; gives line numbers          (records.py)
    ├── SpecMismatch(ValueError)       store or checkpoint made otherwise than expected             (extract/specs.py)
    ├── LocationError(OSError)         a URL that cannot be read or written                         (locations.py)
    ├── StoreError(OSError)            missing, truncated or corrupt store                          (extract/arrays.py)
    ├── DecodeError(OSError)           one video; recorded with its reason, never ends a run    (extract/decoders/)
    ├── TowerError(ValueError)         weights that cannot be loaded or do not fit the model        (extract/weights.py)
    ├── CheckpointError(ValueError)    not a checkpoint of ours, or a broken one        (train_heads/checkpoint.py)
    └── DivergedError(ArithmeticError) the loss is not finite any more                         (train_heads/run.py)

Anything else that reaches the user is a bug and shows its traceback. Each class also inherits the built-in that a
stranger would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_LISTED = 40  # names in a message


class ColdframeError(Exception):
    """A mistake that the user can mend; its text is one line that says how."""

    def __init__(self, problem: str, *, seen: object = None, wanted: object = None, fix: str | None = None) -> None:
        """Compose the line: what is wrong, the value seen, the value wanted, what to do."""
        parts = [problem.rstrip(".")]
        if seen is not None:
            parts.append(f"found {seen}")
        if wanted is not None:
            parts.append(f"expected {wanted}")
        line = "; ".join(parts)
        super().__init__(" ".join(f"{line}. {fix}".split()) if fix else " ".join(line.split()))


class ConfigError(ColdframeError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class UnknownName(ColdframeError, LookupError):
    """A name that stands for nothing; lists the nearest names, or all of them."""

    def __init__(self, kind: str, name: str, choices: Iterable[str]) -> None:
        """Name the kind of thing, what was asked for, and what there is."""
        known = sorted(choices)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        more = f" and {len(known) - MOST_LISTED} more" if len(known) > MOST_LISTED else ""
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(known[:MOST_LISTED])}{more}."
        super().__init__(f"no {kind} is named {name!r}", fix=hint)
        self.near = near
