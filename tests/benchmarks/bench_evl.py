"""EVL on ViT-B/16, 8 frames, 4 layers, float32: what the cache, and attention in token space, are worth.

    python tests/benchmarks/bench_evl.py [--videos 4] [--repeats 3] [--threads 2]

Prints one JSON line a comparison. The sides of a comparison take turns, and each reports the median of its repeats. Random
weights: a timing does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear, scaled_dot_product_attention

from coldframe.extract.batches import FeatureBatch
from coldframe.extract.towers import Tower, load_tower
from coldframe.train_heads.heads.evl_decoder import HEAD, Config, OneQueryAttention
from coldframe.train_heads.specs import HeadContext

N_FRAMES, N_CLASSES = 8, 400


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tower = load_tower("ViT-B-16-quickgelu", "random", device="cpu")
    for cross_frame in (False, True):
        sides = step_from_cache_and_step_with_tower(tower, args.videos, cross_frame)
        report(f"evl step, cross_frame={cross_frame}", sides, args)
    report("one-query attention, forward and backward", absorbed_and_textbook(tower, args.videos), args)


def step_from_cache_and_step_with_tower(
    tower: Tower, n_videos: int, cross_frame: bool
) -> dict[str, Callable[[], object]]:
    """One optimiser step fed with cached tokens, and the same step with the frozen tower in the loop."""
    config = Config(cross_frame=cross_frame)
    context = HeadContext(tower.shape, N_FRAMES, tuple(map(str, range(N_CLASSES))), lambda: tower)
    head: nn.Module = HEAD.build(config, context)
    optimiser = torch.optim.AdamW(head.parameters(), lr=4e-4, fused=True)
    side = tower.spec.transform.size_px
    images = torch.randn(n_videos, N_FRAMES, 3, side, side)
    labels = torch.arange(n_videos)

    def encode() -> FeatureBatch:
        videos = [
            tower.encode_images(video, HEAD.features(config)) for video in images
        ]  # a video at a time fits the cache
        tokens = {name: torch.stack([video[name] for video in videos]) for name in videos[0]}
        everything = torch.ones(n_videos, N_FRAMES, dtype=torch.bool)
        return FeatureBatch(tokens, everything, labels, tuple(map(str, range(n_videos))))

    def step(batch: FeatureBatch) -> None:
        cross_entropy(head(batch).logits, batch.labels).backward()
        optimiser.step()
        optimiser.zero_grad()

    cached = encode()
    return {"step with the tower": lambda: step(encode()), "step from the cache": lambda: step(cached)}


def absorbed_and_textbook(tower: Tower, n_videos: int) -> dict[str, Callable[[], object]]:
    """LayerNorm and cross-attention of one query to all tokens, with gradients to the tokens and to every weight."""
    width, heads = tower.shape.width, tower.shape.heads
    attention = OneQueryAttention(width, width, heads)
    query = torch.randn(n_videos, width, requires_grad=True)
    tokens = torch.randn(n_videos, N_FRAMES, 1 + tower.shape.n_patches, width, requires_grad=True)
    mask = torch.ones(n_videos, N_FRAMES, dtype=torch.bool)

    def textbook() -> Tensor:
        norm = attention.norm_tokens
        normed = layer_norm(tokens.flatten(1, 2), (width,), norm.weight, norm.bias)
        weight = torch.cat([attention.key.weight, attention.value.weight])
        bias = torch.cat([attention.key.bias, attention.value.bias])
        q = rearrange(attention.query(query), "b (h c) -> b h 1 c", h=heads)
        k, v = rearrange(linear(normed, weight, bias), "b s (two h c) -> two b h s c", two=2, h=heads)
        return attention.out(rearrange(scaled_dot_product_attention(q, k, v), "b h 1 c -> b (h c)"))

    def absorbed() -> Tensor:
        return attention(query, tokens, mask)[0]

    torch.testing.assert_close(absorbed(), textbook(), atol=1e-5, rtol=0)
    parameters = [query, tokens, *attention.parameters()]
    return {
        "textbook": lambda: torch.autograd.grad(textbook().sum(), parameters),
        "absorbed": lambda: torch.autograd.grad(absorbed().sum(), parameters),
    }


def report(name: str, sides: dict[str, Callable[[], object]], args: argparse.Namespace) -> None:
    """Time both sides in turns; print their medians and how many times faster the second is."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(args.repeats + 1):
        for side, run in sides.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first turn warms up
                seconds[side].append(time.perf_counter() - start)
    slow, fast = seconds.values()
    line = {
        "benchmark": name,
        "seconds": {side: round(statistics.median(taken), 4) for side, taken in seconds.items()},
        "times_faster": round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 1),
        **vars(args),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
