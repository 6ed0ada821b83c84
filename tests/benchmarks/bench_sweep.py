"""A sweep of eight heads on one pass over the cache against eight passes, from a store on disk.

    python tests/benchmarks/bench_sweep.py [--videos 192] [--batch 16] [--repeats 3] [--threads 2]

Prints one JSON line a case. The sides take turns, each in new folders, and the ratio is the median of the turns. Tokens of
ViT-B/16 are large and a probe of them is small, so that reading is most of the work; embeddings are small, so that reading
is next to nothing. Every run of the sweep is checked to have the bits of its run alone. Random features: a timing does not
depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from coldframe.data_manifests import Manifest, VideoRecord
from coldframe.extract.frames import DecodedVideo
from coldframe.extract.specs import FeatureSpec, FrameSpec, TowerShape, TowerSpec, TransformSpec, feature_shape
from coldframe.extract.store import FeatureStore, FeatureWriter
from coldframe.train_heads import Settings, sweep, train, variants

VITB16 = TowerShape(12, 768, 12, 512, (14, 14), 512, 12, 8, 77)
FEATURES = ("embedding", "cls.12", "tokens.12")
N_FRAMES, N_CLASSES, EPOCHS = 8, 16, 2
RATES = "lr=3e-4,2e-4,1e-4,7e-5,5e-5,3e-5,2e-5,1e-5"
CASES = {  # what is read, and the eight runs of it
    "tokens.12, attentive_pool": ["attentive_pool"],
    "cls.12, linear_probe": ["linear_probe"],
    "embedding, temporal_transformer": ["temporal_transformer"],
}


def main() -> None:
    """Write the store, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", args.videos)
        for name, heads in CASES.items():
            asked = variants(heads, None, [RATES, f"epochs={EPOCHS}", f"batch_size={args.batch}"])
            seconds = turns(store, asked, Path(folder) / heads[0], args.repeats)
            line = {
                "benchmark": f"sweep of {len(asked)}: {name}",
                "seconds": {side: round(statistics.median(taken), 2) for side, taken in seconds.items()},
                "times_faster": round(statistics.median(np.divide(seconds["one by one"], seconds["sweep"])), 2),
                **vars(args),
                "epochs": EPOCHS,
                "machine": platform.platform(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
            }
            print(json.dumps(line), flush=True)


def write_store(path: Path, n_videos: int) -> FeatureStore:
    """Random features of a ViT-B/16 of eight frames a video, float16."""
    transform = TransformSpec(224, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    tower = TowerSpec("ViT-B-16", "random", "0" * 64, quick_gelu=False, precision="fp32", transform=transform)
    records = [
        VideoRecord(f"{i:05}", f"{i:05}", i % N_CLASSES, split="val" if i < 32 else "train") for i in range(n_videos)
    ]
    manifest = Manifest("bench", "/videos", tuple(map(str, range(N_CLASSES))), tuple(records))
    rng, video = np.random.default_rng(0), DecodedVideo.of_one_view(np.arange(N_FRAMES) / 4, "none")
    with FeatureWriter.open(path, FeatureSpec(FrameSpec(N_FRAMES), tower), VITB16, FEATURES, manifest) as writer:
        for ids in writer.plan(writer.remaining()):
            shard = writer.begin_shard(ids)
            for video_id in ids:
                sizes = {name: (N_FRAMES, *feature_shape(name, VITB16, 224)) for name in FEATURES}
                made = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
                shard.add(video_id, {name: feature.astype(np.float16) for name, feature in made.items()}, video)
            shard.commit()
    return FeatureStore.open(path)


def turns(store: FeatureStore, asked: list[tuple[str, Settings]], folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of both sides in every turn after the first, which warms up."""

    def one_by_one(out: Path) -> set[str]:
        made = (
            train(store, store.manifest, head, one.head, one.train, out / str(number), device="cpu", quiet=True)
            for number, (head, one) in enumerate(asked)
        )
        return {checkpoint.fingerprint for checkpoint in made}

    def side_by_side(out: Path) -> set[str]:
        report = sweep(store, store.manifest, asked, out, device="cpu", quiet=True)
        return {row.checkpoint.fingerprint for row in report.rows if row.checkpoint}

    sides: dict[str, Callable[[Path], set[str]]] = {"one by one": one_by_one, "sweep": side_by_side}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        ended = {}
        for side, run in sides.items():
            began = time.perf_counter()
            ended[side] = run(folder / f"{side} {turn}")
            if turn:
                seconds[side].append(time.perf_counter() - began)
        assert ended["sweep"] == ended["one by one"], "a sweep changed the bits of a run"
    return seconds


if __name__ == "__main__":
    main()
