"""How much does the pipeline add to what it must do? End to end against decoding alone and encoding alone, one JSON line.

Where decoding and encoding share cores the sum of the two is the floor; where they do not, the slower of the two.

    python tests/benchmarks/bench_extract.py [--videos 16] [--model ViT-B-16] [--workers 2] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from coldframe.data_manifests import Manifest, VideoRecord
from coldframe.extract import FeatureSpec, FrameSpec, Tower, extract, load_tower
from coldframe.extract.frames import DecodedVideo, write_video
from coldframe.extract.workers import DecodePool

FEATURES = ("embedding", "cls.-1", "tokens.-1")


def main() -> None:
    """Write clips like Kinetics' (340 × 256, 10 s at 25 frames/s), time the three in turns, print the line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--videos", type=int, default=16)
    options.add_argument("--model", default="ViT-B-16")
    options.add_argument("--device", default="auto")
    options.add_argument("--precision", default="fp32")
    options.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--batch-frames", type=int, default=64)
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    tower = load_tower(given.model, "random", precision=given.precision, device=given.device)
    seconds: dict[str, list[float]] = {"decode": [], "encode": [], "end_to_end": []}
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_clips(Path(folder), given.videos)
        spec = FeatureSpec(FrameSpec(8), tower.spec)
        for repeat in range(given.repeats):
            seconds["decode"].append(decode_only(manifest, spec, given.workers))
            seconds["encode"].append(encode_only(tower, given.videos * 8, given.batch_frames))
            began = time.perf_counter()
            extract(manifest, Path(folder) / f"store{repeat}", tower=tower, spec=spec, features=FEATURES,
                    workers=given.workers, batch_frames=given.batch_frames, quiet=True)  # fmt: skip
            seconds["end_to_end"].append(time.perf_counter() - began)
    rows = list(zip(*seconds.values(), strict=True))
    print(
        json.dumps(
            {
                "benchmark": "extract",
                "seconds": {name: round(statistics.median(taken), 2) for name, taken in seconds.items()},
                "sum_over_end_to_end": round(statistics.median((d + e) / t for d, e, t in rows), 3),
                "slower_over_end_to_end": round(statistics.median(max(d, e) / t for d, e, t in rows), 3),
                "device": str(tower.device),
                **vars(given),
                "threads": torch.get_num_threads(),
                "cores": len(os.sched_getaffinity(0)),
                "machine": platform.platform(),
            }
        )
    )


def write_clips(folder: Path, n_videos: int) -> Manifest:
    """Clips whose content moves, so that they cost what real ones cost to decode."""
    rng = np.random.default_rng(0)
    names = [f"{n:03d}.mp4" for n in range(n_videos)]
    for name in names:
        texture = rng.integers(0, 256, (256 // 8, 680 // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        frames = [np.ascontiguousarray(texture[:, shift : shift + 340]) for shift in range(250)]
        write_video(folder / name, frames, fps=25)
    return Manifest("clips", str(folder), ("clip",), tuple(VideoRecord(name, name, 0) for name in names))


def decode_only(manifest: Manifest, spec: FeatureSpec, workers: int) -> float:
    """Seconds of the same pool with nobody encoding; starting the workers counts, as it does end to end."""
    began = time.perf_counter()
    with DecodePool(spec.frames, spec.tower.transform, workers=workers) as pool:
        jobs = ((r.video_id, manifest.path_of(r), r.start_s, r.end_s) for r in manifest.records)
        assert all(isinstance(video, DecodedVideo) for _, video in pool.decode(jobs))
    return time.perf_counter() - began


def encode_only(tower: Tower, n_frames: int, batch_frames: int) -> float:
    """Seconds of the tower over pixels that are there."""
    side = tower.spec.transform.size_px
    pixels = torch.randint(0, 256, (n_frames, 3, side, side), dtype=torch.uint8)
    began = time.perf_counter()
    for part in pixels.split(batch_frames):
        for feature in tower.encode_frames(
            part, ("embedding", f"cls.{tower.shape.layers}", f"tokens.{tower.shape.layers}")
        ).values():
            feature.to(torch.float16).cpu()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
