"""What the settings of a head may be: the refusals that heads share. Each raises ConfigError."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..data_manifests.errors import ConfigError


def require_at_least(least: float, config: Any, *names: str) -> None:
    """Refuse numbers below `least`; None, which stands for a number found later, passes."""
    for name in names:
        if (value := getattr(config, name)) is not None and not value >= least:  # as NaN is not
            raise ConfigError(f"impossible {name}", seen=value, wanted=f"at least {least}")


def require_share(config: Any, *names: str) -> None:
    """Refuse what is not a part of a whole, 0 to 1."""
    for name in names:
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise ConfigError(f"impossible {name}", seen=value, wanted="0 to 1")


def require_rate(config: Any, *names: str) -> None:
    """Refuse rates of dropout that are below 0, or leave nothing."""
    for name in names:
        if not 0 <= (value := getattr(config, name)) < 1:
            raise ConfigError(f"impossible {name}", seen=value, wanted="at least 0 and below 1")


def require_choice(config: Any, name: str, choices: Iterable[str]) -> None:
    """Refuse words that mean nothing."""
    if (value := getattr(config, name)) not in choices:
        raise ConfigError(f"no such {name}", seen=value, wanted=" or ".join(choices))


def require_heads(width: int, heads: int, of: str) -> None:
    """Refuse attention heads that cannot share a width."""
    if width % heads:
        raise ConfigError(
            f"{of} cannot share its width between its heads",
            seen=f"{width} over {heads}",
            fix=f"Set heads to a number that divides {width}.",
        )
