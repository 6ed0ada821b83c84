"""What the readers and writers of published checkpoints share: names that are told apart, tables that are stretched."""

from __future__ import annotations

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from ..extract.specs import SpecMismatch

_SHOWN = 6  # names in a message


def renamed(weights: Mapping[str, Tensor], names: Mapping[str, str], of: str) -> dict[str, Tensor]:
    """All of some weights under other names, in float32.

    Args:
        names: their name → ours, one for each tensor there has to be.
        of: what the weights should be, for the message.

    Raises:
        SpecMismatch: tensors are missing or unknown; names them.
    """
    groups = (("missing", names.keys() - weights.keys()), ("unknown", weights.keys() - names.keys()))
    if problems := [f"{kind} {_listed(group)}" for kind, group in groups if group]:
        raise SpecMismatch(f"not the weights of {of}: {'; '.join(problems)}")
    return {ours: weights[theirs].float() for theirs, ours in names.items()}


def back_to_theirs(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The inverse of `renamed`: tensors of ours under their names; what has no name there is left out."""
    return {theirs: state[ours] for theirs, ours in names.items()}


def stretched(position: Tensor, n_frames: int) -> Tensor:
    """A table of positions [T, D] of T segments as one of `n_frames` segments, interpolated between their centres."""
    if len(position) == n_frames:
        return position
    columns = interpolate(rearrange(position, "t d -> 1 d t"), size=n_frames, mode="linear")
    return rearrange(columns, "1 d t -> t d")


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
