"""How deep must a method reach into the tower? Accuracy, seconds a step and bytes in the cache, for every layer k.

    coldframe demo --out demo
    pip install matplotlib
    python tests/studies/depth_of_reach.py demo --out docs/depth_of_reach

Trains EZ-CLIP and M2-CLIP on the demo's motion classes from pixels (k = 0, every block changed, as published), from
tokens.k, and from cls.L (no block changed), with several seeds. Writes OUT.jsonl, one line a training, and draws OUT.png;
lines that are there already are not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYERS, GRID, WIDTH, SIDE = 4, 64, 128, 64  # coldframe-tiny: blocks, patches, width, pixels
METHODS = {
    "ez_clip": ["lr=5e-3", "epochs=30", "batch_size=16", "drop_path=0", "prompt_dropout=0"],
    "m2_clip": ["lr=1e-3", "epochs=15", "batch_size=16", "width=64"],
}
LABELS = {"ez_clip": "EZ-CLIP", "m2_clip": "M2-CLIP"}


def main() -> None:
    """Extract once, train what is missing, draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("demo", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/depth_of_reach"))
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    store, lists = args.demo / "store-depth", args.demo / "motion.csv"
    features = ",".join(["pixels", "embedding", f"cls.{LAYERS}", *(f"tokens.{k}" for k in range(1, LAYERS))])
    coldframe("extract", lists, "--store", store, "--model", "coldframe-tiny", "--features", features, "--quiet")
    lines = args.out.with_suffix(".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    for seed in map(int, args.seeds.split(",")):
        for method in METHODS:
            for k in range(LAYERS + 1):
                if any((method, k, seed) == (line["method"], line["k"], line["seed"]) for line in done):
                    continue
                done.append(
                    {"method": method, "k": k, "seed": seed} | trained(method, k, seed, args.demo, store, lists)
                )
                print(json.dumps(done[-1]), flush=True)
                with lines.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    draw(done, args.out.with_suffix(".png"))


def trained(method: str, k: int, seed: int, demo: Path, store: Path, lists: Path) -> dict[str, Any]:
    """Train from layer k and score the test videos."""
    run = demo / "runs" / f"depth-{method}-{k}-{seed}"
    reach = -1 if k == LAYERS else k
    sets = [word for each in [*METHODS[method], f"reach={reach}", f"seed={seed}"] for word in ("--set", each)]
    coldframe("train-head", method, "--store", store, "--manifest", lists, "--out", run, "--quiet", *sets)
    scored = json.loads(
        coldframe("eval", "closed_set", "--store", store, "--manifest", lists, "--checkpoint", run, "--json",
                  "--results", demo / "depth.jsonl")
    )  # fmt: skip
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    steps = history[0]["step"]
    return {
        "top_1": scored["metrics"]["top_1"],
        "seconds_a_step": round(min(epoch["seconds"] for epoch in history) / steps, 4),
        "bytes_a_frame": bytes_a_frame(k),
    }


def bytes_a_frame(k: int) -> int:
    """What the cache holds for a frame, in float16: crops, tokens, or the class token."""
    return {0: 3 * SIDE * SIDE, LAYERS: 2 * WIDTH}.get(k, 2 * (1 + GRID) * WIDTH)


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Three panels over k: accuracy, seconds a step, bytes a frame; the mean of the seeds, and every one as a dot."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("top_1", "top-1, %", 100.0),
        ("seconds_a_step", "seconds a step", 1.0),
        ("bytes_a_frame", "kB a frame", 1e-3),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.2), constrained_layout=True)
    for axis, (field, label, scale) in zip(axes, panels, strict=True):
        for method in METHODS:
            of_method = [line for line in lines if line["method"] == method]
            means = [
                scale * statistics.mean(line[field] for line in of_method if line["k"] == k) for k in range(LAYERS + 1)
            ]
            (curve,) = axis.plot(range(LAYERS + 1), means, marker="o", label=LABELS[method])
            if field == "top_1":
                axis.plot(
                    [line["k"] for line in of_method], [scale * line[field] for line in of_method], ".",
                    color=curve.get_color(), alpha=0.5,
                )  # fmt: skip
        axis.set_xlabel("frozen blocks below, k")
        axis.set_xticks(range(LAYERS + 1), ["0\npixels", *map(str, range(1, LAYERS)), f"{LAYERS}\ncls"])
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)


def coldframe(*words: object) -> str:
    """Run a command; its output."""
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    command = [sys.executable, "-m", "coldframe.cli", *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout


if __name__ == "__main__":
    main()
