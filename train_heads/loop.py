"""One plain training loop: read it from the top.

Any number of runs go over the same batches side by side: each batch is read once and given to every run. A run keeps its
own random numbers, so it ends with the same bits as if it were alone. Whatever is random is a function of (seed, epoch), so
a run that was interrupted and resumed ends with the same bits as one that was not. Its state is written whole between
epochs, so Ctrl-C may fall anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..extract.batches import FeatureBatch
from ..extract.progress import Progress
from .randomness import own_randomness
from .run import DivergedError, Run
from .specs import Episodes

SAVING_SHARE = 10  # states that took a second are not written again for ten
CHECK_EVERY = 20  # steps between two looks at the loss; each look waits for the GPU


class Batches(Protocol):
    """What the loop asks of data: of a `FeatureDataset`, or an `EpisodeDataset`."""

    def __len__(self) -> int:
        """Videos, or episodes, of an epoch."""
        ...

    def batches(
        self, batch_size: int, shuffle_seed: int | None = None, *, pin: bool = False
    ) -> Iterator[FeatureBatch] | Iterator[Episodes]:
        """All of an epoch once, in the order that the seed draws; `pin` them where an accelerator takes them."""
        ...


@dataclass(frozen=True, slots=True)
class Data:
    """What runs go over together."""

    train: Batches  # every video with a label in [0, C), or episodes of them
    val: Batches  # of videos that nothing is trained on
    batch_size: int
    seed: int = 0

    @property
    def n_batches(self) -> int:
        """Of an epoch of training."""
        return -(-len(self.train) // self.batch_size)


def fit(
    runs: Sequence[Run], data: Data, *, ended: Callable[[Run], None] = lambda run: None, quiet: bool = False
) -> None:
    """Train runs side by side until each has had its epochs; what one run does changes no bit of another.

    A run whose loss, of training or validation, or gradient is not finite gets it as its `error`, and the others go on.
    The runs share a device.

    Args:
        ended: told of each run as soon as it has ended, or diverged.
        quiet: show no progress.
    """
    device = runs[0].device
    n_steps = data.n_batches * (max(run.spec.epochs for run in runs) - min(run.epoch for run in runs))
    saved_at = saving_s = 0.0
    with own_randomness(device), Progress(n_steps, "steps", quiet=quiet) as progress:
        while going := [run for run in runs if run.is_going]:
            epoch = min(run.epoch for run in going)  # those whose last state is of a later epoch wait
            together = [run for run in going if run.epoch == epoch]
            _train(together, data, epoch_seed(data.seed, epoch), progress)
            _validate([run for run in together if run.error is None], data)
            _part_with([run for run in together if not run.is_going], ended)
            if (began := time.monotonic()) - saved_at >= SAVING_SHARE * saving_s:
                for run in together:
                    if run.is_going:
                        run.save()
                saved_at, saving_s = began, time.monotonic() - began


def _train(runs: Sequence[Run], data: Data, seed: int, progress: Progress) -> None:
    """An epoch of runs that are equally far."""
    device = runs[0].device
    for run in runs:
        run.begin_epoch(seed)
    n_shown = 0
    batches = data.train.batches(data.batch_size, seed, pin=device.type == "cuda")
    for n_done, batch in enumerate(batches, start=1):
        shared = batch.to(device, torch.float32)
        for run in runs:
            run.step(shared)
        if n_done % CHECK_EVERY == 0 or n_done == data.n_batches:
            runs = _without_diverged(runs)
            if not runs:
                return
            progress.update(n_done - n_shown, **_words(runs))
            n_shown = n_done


def _validate(runs: Sequence[Run], data: Data) -> None:
    """Score the runs, and end their epoch."""
    if not runs:
        return
    device = runs[0].device
    for run in runs:
        run.head.eval()
    for batch in data.val.batches(data.batch_size, pin=device.type == "cuda"):
        shared = batch.to(device, torch.float32)
        for run in runs:
            run.answer(shared)
    _without_diverged(runs, Run.end_epoch)


def _without_diverged(runs: Sequence[Run], look: Callable[[Run], None] = Run.check) -> list[Run]:
    for run in runs:
        try:
            look(run)
        except DivergedError as error:
            run.error = error
    return [run for run in runs if run.error is None]


def _part_with(runs: Sequence[Run], ended: Callable[[Run], None]) -> None:
    for run in runs:
        if run.error is None:
            run.finish()
        ended(run)


def _words(runs: Sequence[Run]) -> dict[str, object]:
    """What progress says."""
    best = max((run.best.scores["top_1"] for run in runs if run.best), default=None)
    words: dict[str, object] = {"runs": len(runs)} if len(runs) > 1 else {"loss": f"{runs[0].last_loss:.3f}"}
    return {"epoch": runs[0].epoch + 1, **words, "best_top_1": "none" if best is None else f"{best:.3f}"}


def epoch_seed(seed: int, epoch: int) -> int:
    """What an epoch draws from."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
