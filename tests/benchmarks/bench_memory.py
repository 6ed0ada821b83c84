"""Is the memory of `extract` flat in the number of videos? Peak resident memory over few and over many, one JSON line.

python tests/benchmarks/bench_memory.py [--few 500] [--many 5000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from coldframe.data_manifests import Manifest, VideoRecord
from coldframe.extract.frames import write_video

RUN = """
import sys
from pathlib import Path
from coldframe.data_manifests import Manifest
from coldframe.extract import ExtractOptions, FeatureSpec, FrameSpec, extract, load_tower
tower = load_tower("coldframe-tiny", device="cpu")
spec = FeatureSpec(FrameSpec(8), tower.spec)
options = ExtractOptions(workers=2, quiet=True, shard_videos=100)
report = extract(Manifest.read(sys.argv[1]), Path(sys.argv[2]), tower, spec, ["embedding", "tokens.-1"], options)
assert report.n_written == report.n_videos, report.describe()
"""


def main() -> None:
    """Write a few clips, name them many times, extract twice, print the line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--few", type=int, default=500)
    options.add_argument("--many", type=int, default=5000)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_clips(root / "clips")
        few, few_s = peak_mb(root, given.few)
        many, many_s = peak_mb(root, given.many)
    print(
        json.dumps(
            {
                "benchmark": "memory of extract",
                "peak_mb": {"few": few, "many": many},
                "many_over_few": {name: round(many[name] / few[name], 3) for name in few},
                "seconds": {"few": few_s, "many": many_s},
                **vars(given),
                "cores": len(os.sched_getaffinity(0)),
                "machine": platform.platform(),
            }
        )
    )


def write_clips(folder: Path) -> None:
    """Twenty clips of 64 × 64 pixels."""
    rng = np.random.default_rng(0)
    for number in range(20):
        coarse = rng.integers(0, 256, (16, 8, 8, 3), np.uint8)
        write_video(folder / f"{number}.mp4", np.kron(coarse, np.ones((1, 8, 8, 1), np.uint8)), fps=8)


def peak_mb(root: Path, n_videos: int) -> tuple[dict[str, float], float]:
    """Largest resident memory of the run's process and of its largest worker, in MB; and seconds."""
    videos = root / f"videos{n_videos}"
    videos.mkdir()
    for number in range(n_videos):
        (videos / f"{number:05d}.mp4").hardlink_to(root / "clips" / f"{number % 20}.mp4")
    records = tuple(VideoRecord(path.name, path.name, 0) for path in sorted(videos.iterdir()))
    manifest = root / f"{n_videos}.parquet"
    Manifest("clips", str(videos), ("clip",), records).write(manifest)
    began = time.perf_counter()
    run = subprocess.Popen([sys.executable, "-c", RUN, str(manifest), str(root / f"store{n_videos}")])
    peak = {"process": 0.0, "worker": 0.0}
    watcher = threading.Thread(target=watch, args=(run.pid, peak))
    watcher.start()
    assert run.wait() == 0
    seconds = time.perf_counter() - began
    watcher.join()
    return {name: round(n_bytes / 1e6, 1) for name, n_bytes in peak.items()}, round(seconds, 1)


def watch(pid: int, peak: dict[str, float]) -> None:
    """Look at the processes until the first has ended."""
    while True:
        try:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return
            peak["process"] = max(peak["process"], process.memory_info().rss)
            for child in process.children():
                peak["worker"] = max(peak["worker"], child.memory_info().rss)
        except psutil.Error:
            if not psutil.pid_exists(pid):
                return
        time.sleep(0.05)


if __name__ == "__main__":
    main()
