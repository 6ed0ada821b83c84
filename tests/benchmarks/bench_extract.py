"""How much does the pipeline add to what it must do, and what does it save? One JSON line.

End to end against decoding alone and encoding alone: where the two share cores their sum is the floor; where they do not,
the slower. And against a plain loop (decord, open_clip's transform and tower, one .npy a video) and against this pipeline
with one decode process and a pass of the tower for each video.

    python tests/benchmarks/bench_extract.py [--videos 16] [--model ViT-B-16] [--device cuda --precision bf16 --compile]
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

import decord
import numpy as np
import torch
from PIL import Image

from coldframe.data_manifests import Manifest, VideoRecord
from coldframe.extract import ExtractOptions, FeatureSpec, FrameSpec, Tower, extract, load_tower
from coldframe.extract.frames import write_video
from coldframe.extract.pretrained import reference_transform
from coldframe.extract.sampling import segment_centres
from coldframe.extract.workers import DecodePool, Failure, Job, cores

N_FRAMES = 8


def main() -> None:
    """Write clips like Kinetics' (340 × 256, 10 s at 25 frames/s), time everything in turns, print the line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--videos", type=int, default=16)
    options.add_argument("--model", default="ViT-B-16")
    options.add_argument("--device", default="auto")
    options.add_argument("--precision", default="fp32")
    options.add_argument("--workers", type=int, default=cores())
    options.add_argument("--batch-frames", type=int, default=0, help="0 is the tower's usual")
    options.add_argument("--features", default="embedding")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--compile", action="store_true")
    given = options.parse_args()
    tower = load_tower(given.model, "random", precision=given.precision, device=given.device)
    if given.compile:
        tower.compile()
    features = given.features.split(",")
    given.batch_frames = given.batch_frames or tower.usual_batch
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        seconds.setdefault(name, []).append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        manifest = write_clips(root, given.videos)
        spec = FeatureSpec(FrameSpec(N_FRAMES), tower.spec)
        best = ExtractOptions(workers=given.workers, batch_frames=given.batch_frames, quiet=True)
        naive = ExtractOptions(workers=1, batch_frames=N_FRAMES, quiet=True)
        encode_only(tower, given.videos, given.batch_frames, features)  # warm
        for turn in range(given.repeats):
            timed("decode", lambda: decode_only(manifest, spec, given.workers))
            timed("encode", lambda: encode_only(tower, given.videos * N_FRAMES, given.batch_frames, features))
            timed("end_to_end", lambda turn=turn: extract(manifest, root / f"s{turn}", tower, spec, features, best))
            timed("naive", lambda turn=turn: extract(manifest, root / f"n{turn}", tower, spec, features, naive))
            timed("plain_loop", lambda turn=turn: plain_loop(manifest, tower, root / f"npy{turn}"))
    rows = list(zip(seconds["decode"], seconds["encode"], seconds["end_to_end"], strict=True))
    middle = {name: round(statistics.median(taken), 2) for name, taken in seconds.items()}
    print(
        json.dumps(
            {
                "benchmark": "extract",
                "seconds": middle,
                "sum_over_end_to_end": round(statistics.median((d + e) / t for d, e, t in rows), 3),
                "slower_over_end_to_end": round(statistics.median(max(d, e) / t for d, e, t in rows), 3),
                "times_faster_than_plain_loop": round(middle["plain_loop"] / middle["end_to_end"], 2),
                "times_faster_than_naive": round(middle["naive"] / middle["end_to_end"], 2),
                "frames_per_s": round(given.videos * N_FRAMES / middle["end_to_end"], 1),
                **vars(given) | {"device": str(tower.device)},
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


def decode_only(manifest: Manifest, spec: FeatureSpec, workers: int) -> None:
    """The same pool with nobody encoding; starting the workers counts, as it does end to end."""
    with DecodePool(spec.frames, spec.tower.transform, workers=workers) as pool:
        jobs = (Job(r.video_id, manifest.path_of(r)) for r in manifest.records)
        assert not any(isinstance(answer, Failure) for _, answer in pool.decode(jobs))


def encode_only(tower: Tower, n_frames: int, batch_frames: int, features: list[str]) -> None:
    """The tower over pixels that are there."""
    side = tower.spec.transform.size_px
    pixels = torch.randint(0, 256, (n_frames, 3, side, side), dtype=torch.uint8)
    for part in pixels.split(batch_frames):
        for frames in tower.encode_frames(part, features).values():
            frames.to(torch.float16).cpu()


def plain_loop(manifest: Manifest, tower: Tower, folder: Path) -> None:
    """What a student writes in an afternoon: a video at a time, one file each; the embedding alone."""
    folder.mkdir()
    transform = reference_transform(tower.model)
    for record in manifest.records:
        reader = decord.VideoReader(manifest.path_of(record))
        pictures = reader.get_batch(segment_centres(len(reader), N_FRAMES)).asnumpy()
        images = torch.stack([transform(Image.fromarray(rgb)) for rgb in pictures]).to(tower.device)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(tower.spec.precision, torch.float32)
        enabled = tower.spec.precision != "fp32"
        with torch.no_grad(), torch.autocast(tower.device.type, dtype, enabled=enabled):
            embedding = tower.model.encode_image(images)
        np.save(folder / f"{record.video_id}.npy", embedding.float().cpu().numpy())


if __name__ == "__main__":
    main()
