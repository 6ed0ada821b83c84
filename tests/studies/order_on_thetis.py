"""Does a head feel the order of frames? Real features of tennis strokes, unseen players, clips as they are and reversed.

    coldframe import thetis_inceptionv3_16x512.npz --store STORE --group player --test-fraction 0.2
    python tests/studies/order_on_thetis.py STORE [--seeds 5]

Prints a Markdown table: mean ± standard deviation over the seeds of training. The validation players are carved from the
training players anew with each seed; the test players, number divisible by five, are the same in all.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coldframe.data_manifests.records import Manifest
from coldframe.extract.batches import FeatureBatch, FeatureDataset, labelled
from coldframe.extract.store import FeatureStore
from coldframe.train_heads import Predictor, settings, train

HEADS = {
    "mean of frames, linear": ("linear_probe", ["feature=embedding", "epochs=30"]),
    "attention over frames": ("attentive_pool", ["feature=embedding", "epochs=30"]),
    "temporal transformer": ("temporal_transformer", ["epochs=20"]),
    "temporal transformer, two layers": ("temporal_transformer", ["layers=2", "epochs=20"]),
    "temporal transformer, positions as published": ("temporal_transformer", ["positions=published", "epochs=20"]),
}


def main() -> None:
    """Train every head with every seed and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="Rows whose name holds this.")
    args = parser.parse_args()
    store = FeatureStore.open(args.store)
    manifest = by_player(store.manifest)
    print("| head | top-1 | clips reversed |\n|---|---|---|")
    for name, (head, sets) in HEADS.items():
        if args.only not in name:
            continue
        scores = []
        for seed in range(args.seeds):
            asked = settings(head, None, [*sets, f"seed={seed}"])
            with tempfile.TemporaryDirectory() as folder:
                run = train(
                    store, manifest, head, asked.head, asked.train, Path(folder) / "run", device="cpu", quiet=True
                )
            scores.append(both_ways(run.predictor(store, device="cpu"), store, manifest))
            print(f"  {name}, seed {seed}: {scores[-1]}", file=sys.stderr, flush=True)
        forward, backward = zip(*scores, strict=True)
        print(f"| {name} | {spread(forward)} | {spread(backward)} |", flush=True)


def by_player(manifest: Manifest) -> Manifest:
    """Players whose number is divisible by five are the test."""
    records = tuple(
        dataclasses.replace(record, split="test" if int(float(record.group)) % 5 == 0 else "train")
        for record in manifest.records
    )
    return dataclasses.replace(manifest, records=records)


def both_ways(predictor: Predictor, store: FeatureStore, manifest: Manifest) -> tuple[float, float]:
    """Top-1 on the test players, with frames in their order and in reverse."""
    ids, labels, _ = labelled(store, manifest, "test")
    batch = FeatureDataset(store, ids, labels, predictor.needs).all()
    return accuracy(predictor, batch), accuracy(predictor, reversed_in_time(batch))


def reversed_in_time(batch: FeatureBatch) -> FeatureBatch:
    """The same clips backwards; every clip has all its frames here."""
    assert batch.mask.all()
    flipped: dict[str, Any] = {name: feature.flip(1) for name, feature in batch.features.items()}
    return dataclasses.replace(batch, features=flipped)


def accuracy(predictor: Predictor, batch: FeatureBatch) -> float:
    """Share of right answers."""
    return float(np.mean(predictor.logits(batch).argmax(axis=1) == batch.labels.numpy()))


def spread(values: tuple[float, ...]) -> str:
    """Mean ± standard deviation, in per cent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
