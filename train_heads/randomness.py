"""torch's global generators: initialisers and dropout know no others, so they are lent to one user at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Give torch's global generators back as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else []):
        yield


def reseed(device: torch.device, seed: int) -> None:
    """Seed the global generators that work on `device` draws from, and no others."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


class Randomness:
    """The state of the generators that one run draws from; in place inside a `with`, kept aside outside of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda: Tensor | None = None
        self._keep()

    def reseed(self, seed: int) -> None:
        """Begin anew; also inside a `with`."""
        reseed(self._device, seed)
        self._keep()

    def __enter__(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

    def __exit__(self, *_: object) -> None:
        self._keep()

    def _keep(self) -> None:
        self._cpu = torch.get_rng_state()
        if self._device.type == "cuda":
            self._cuda = torch.cuda.get_rng_state(self._device)
