"""A training step of each method from its cache, against the same method from pixels: seconds and peak memory.

    python tests/benchmarks/bench_heads.py [--model ViT-B-16-quickgelu] [--frames 8] [--videos 2] [--device cpu]

Prints one JSON line a method. Every side runs in a process of its own, one after the other, so that its peak memory is its
own; each reports the median of its repeats. Random weights: a timing does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from coldframe.extract.batches import FeatureBatch
from coldframe.extract.specs import canonical_features, feature_shape
from coldframe.extract.text import TextFeatures
from coldframe.extract.towers import Tower, load_tower
from coldframe.train_heads.heads import find
from coldframe.train_heads.settings import settings
from coldframe.train_heads.specs import Episodes, HeadContext

N_CLASSES = 51
# Of each method: where its step starts, as settings; the first is the published one, from pixels.
SIDES: dict[str, dict[str, list[str]]] = {
    "evl_decoder": {"pixels": [], "tokens of 5 blocks": []},
    "continuous_prompts": {"pixels": ["layers=1"], "embedding": ["layers=1"]},
    "ez_clip": {
        "pixels": ["reach=0"],
        "tokens, 3 blocks": ["reach=-4"],
        "tokens, 1 block": ["reach=-2"],
        "summary, 1 block": ["reach=-2", "compact=true"],
    },
    "m2_clip": {
        "pixels": ["reach=0"],
        "tokens, 3 blocks": ["reach=-4"],
        "tokens, 1 block": ["reach=-2"],
        "cls": ["reach=-1"],
    },
    "ma_clip": {
        "pixels": ["reach=0"],
        "tokens, 3 blocks": ["reach=-4"],
        "tokens, 1 block": ["reach=-2"],
        "embedding": ["reach=-1"],
    },
}


def main() -> None:
    """Run every side of every method in its own process and print ratios to pixels."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--videos", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", default=",".join(SIDES))
    parser.add_argument("--side", help="Run this one side and print it.")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.heads, args.side, args)))
        return
    for head in args.heads.split(","):
        sides = {name: in_own_process(head, name) for name in SIDES[head]}
        slowest = sides["pixels"]
        for name, side in sides.items():
            side["times_faster"] = round(slowest["seconds"] / side["seconds"], 2)
            side["times_smaller"] = round(slowest["peak_gib"] / side["peak_gib"], 2)
            side["name"] = name
        line = {"benchmark": f"step of {head}", "sides": list(sides.values()), "machine": platform.machine()}
        print(json.dumps(line | {key: value for key, value in vars(args).items() if key not in ("heads", "side")}))


def in_own_process(head: str, side: str) -> dict[str, Any]:
    """`measure` in a new process, with the arguments of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--heads", head, "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(head: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step, and the peak memory of the process: of the accelerator where there is one."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    tower = load_tower(args.model, "random", device=args.device)
    spec = find(head)
    config = settings(head, None, SIDES[head][side]).head
    classes = tuple(f"class {number}" for number in range(N_CLASSES))
    module = spec.build(config, HeadContext(tower.shape, args.frames, classes, lambda: tower)).to(device).train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    names = canonical_features(spec.features(config), tower.shape.layers)
    is_encoded = side == "pixels" and "pixels" not in names
    batch = random_batch(("pixels",) if is_encoded else names, tower, args).to(device)
    text = TextFeatures(classes, ("{}",), tower.encode_text(list(classes)), tower.logit_scale, "random")

    def step() -> None:
        read = encoded(batch, names, tower) if is_encoded else batch
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            output = module(episodes(read) if "episodes" in spec.tasks else read, text)
            terms = list(output.losses.values())
            if output.logits is not None:
                labels = torch.zeros(output.logits.shape[:-1], dtype=torch.int64, device=device)
                terms.append(torch.nn.functional.cross_entropy(output.logits.flatten(0, -2), labels.flatten()))
            torch.stack(terms).sum().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    seconds = []
    for _ in range(args.repeats + 1):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": round(statistics.median(seconds[1:]), 4),
        "peak_gib": round(peak / 2**30, 3),
        "trained": sum(parameter.numel() for parameter in trained),
    }


def random_batch(names: tuple[str, ...], tower: Tower, args: argparse.Namespace) -> FeatureBatch:
    """Videos of random features; of few-shot heads every two are of one class."""
    features = {}
    for name in names:
        size = (args.videos, args.frames, *feature_shape(name, tower.shape, tower.spec.transform.size_px))
        features[name] = torch.randint(0, 256, size, dtype=torch.uint8) if name == "pixels" else torch.randn(size)
    mask = torch.ones(args.videos, args.frames, dtype=torch.bool)
    return FeatureBatch(features, mask, torch.arange(args.videos) // 2, tuple(map(str, range(args.videos))))


def encoded(batch: FeatureBatch, names: tuple[str, ...], tower: Tower) -> FeatureBatch:
    """The features of a batch of pixels, as a step without a cache computes them."""
    flat = tower.encode_frames(batch["pixels"].flatten(0, 1), names)
    features = {name: value.unflatten(0, batch.mask.shape) for name, value in flat.items()}
    return FeatureBatch(features, batch.mask, batch.labels, batch.video_ids)


def episodes(batch: FeatureBatch) -> Episodes:
    """One episode of one shot: the even videos support, the odd ones ask."""
    rows = torch.arange(len(batch), device=batch.mask.device)
    support, query = rows[0::2], rows[1::2]
    ways = torch.arange(len(support), device=rows.device)
    return Episodes(batch, support[None, :, None], query[None], ways[None], ways[None, : len(query)])


if __name__ == "__main__":
    main()
