"""What settings are refused for."""

from types import SimpleNamespace

import pytest

from coldframe.data_manifests.errors import ConfigError
from coldframe.train_heads.limits import (
    require_at_least,
    require_choice,
    require_heads,
    require_rate,
    require_share,
)

FINE = SimpleNamespace(heads=1, share=1.0, rate=0.0, later=None, form="free")


def test_the_ends_of_a_range_are_in_it():
    require_at_least(1, FINE, "heads", "later")
    require_share(FINE, "share", "rate")
    require_rate(FINE, "rate")
    require_choice(FINE, "form", ("free", "table"))
    require_heads(12, 4, "the head")


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (lambda: require_at_least(2, FINE, "share", "heads"), "impossible share; found 1.0; expected at least 2"),
        (lambda: require_share(SimpleNamespace(a=0.5, b=1.01), "a", "b"), "impossible b; found 1.01; expected 0 to 1"),
        (lambda: require_share(SimpleNamespace(a=float("nan")), "a"), "impossible a; found nan"),
        (lambda: require_at_least(0, SimpleNamespace(a=float("nan")), "a"), "impossible a; found nan"),
        (lambda: require_rate(FINE, "rate", "share"), "impossible share; found 1.0; expected at least 0 and below 1"),
        (lambda: require_choice(FINE, "form", ("a", "b")), "no such form; found free; expected a or b"),
        (lambda: require_heads(12, 5, "it"), "it cannot share its width.*12 over 5.*number that divides 12"),
    ],
)
def test_what_lies_outside_is_named(refuse, message):
    with pytest.raises(ConfigError, match=message):
        refuse()
