"""Time of 10,000 5-way episodes from cached embeddings, drawing included: against one episode at a time.

`python tests/benchmarks/bench_episodes.py` prints a JSON line a metric and number of shots. One core. The reference is
what published few-shot code does with features that are already cached: each episode on its own, OTAM cell by cell.
"""

import json
import platform
import random
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from coldframe.data_manifests.episodes import EpisodeSpec, draw_episodes
from coldframe.extract.batches import FeatureBatch
from coldframe.extract.specs import TowerShape
from coldframe.extract.towers import load_tower
from coldframe.train_heads.heads import find
from coldframe.train_heads.specs import HeadContext

N_VIDEOS, N_CLASSES, N_FRAMES, WIDTH = 1292, 10, 8, 512  # the few-shot test split of HMDB51, ViT-B
SHAPE = TowerShape(12, 768, 12, WIDTH, (14, 14), 512, 12, 8, 77)
REPEATS = 3


def main() -> None:
    """Print a JSON line for each case."""
    torch.set_num_threads(1)
    frames = torch.randn(N_VIDEOS, N_FRAMES, WIDTH, generator=torch.Generator().manual_seed(0))
    ids = [f"{number:05}" for number in range(N_VIDEOS)]
    labels = np.arange(N_VIDEOS) % N_CLASSES
    mask = torch.ones(N_VIDEOS, N_FRAMES, dtype=torch.bool)
    bank = FeatureBatch({"embedding": frames}, mask, torch.from_numpy(labels), tuple(ids))
    for metric in ("otam", "bi_mhm", "mean_cosine"):
        for n_shot in (1, 5):
            ours = min(episodes_s(bank, ids, labels, metric, n_shot) for _ in range(REPEATS))
            line = {
                "benchmark": "episodes",
                "metric": metric,
                "n_shot": n_shot,
                "n_episodes": 10_000,
                "seconds": round(ours, 3),
                "episode_by_episode_s": None,
                "ratio": None,
                "torch": torch.__version__,
                "machine": platform.processor() or platform.machine(),
            }
            if n_shot == 1 and metric != "mean_cosine":
                alone = one_at_a_time_s(frames, labels, metric)
                line |= {"episode_by_episode_s": round(alone, 1), "ratio": round(alone / ours, 1)}
            print(json.dumps(line), flush=True)


def episodes_s(bank: FeatureBatch, ids: list[str], labels: np.ndarray, metric: str, n_shot: int) -> float:
    """Seconds to draw and score 10,000 episodes."""
    spec = find("prototypes")
    head: Any = spec.build(
        spec.config(metric=metric), HeadContext(SHAPE, N_FRAMES, (), lambda: load_tower("coldframe-tiny"))
    )
    started = time.perf_counter()
    episodes = draw_episodes(ids, labels, EpisodeSpec(n_shot=n_shot))
    support, query = torch.tensor(episodes.support), torch.tensor(episodes.query).flatten(1)
    with torch.inference_mode():
        head.episode_logits(bank, support, query)
    return time.perf_counter() - started


def one_at_a_time_s(frames: torch.Tensor, labels: np.ndarray, metric: str, n_timed: int = 300) -> float:
    """Seconds to draw and score 10,000 1-shot episodes one after the other, from the time of some."""
    score = {"otam": otam_by_cells, "bi_mhm": bi_mhm}[metric]
    members = [np.flatnonzero(labels == label).tolist() for label in range(N_CLASSES)]
    rng = random.Random(0)
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(n_timed):
            drawn = [rng.sample(members[label], 2) for label in rng.sample(range(N_CLASSES), 5)]
            support, query = torch.tensor(drawn).T
            ways = torch.arange(5)
            s, q = F.normalize(frames[support], dim=-1), F.normalize(frames[query], dim=-1)  # [W, T, E], [Q, T, E]
            logits = score(1 - torch.einsum("q t e, w u e -> q w t u", q, s))
            torch.stack([logits[:, torch.nonzero(ways == way)[:, 0]].mean(1) for way in ways.unique()], dim=1)
    return (time.perf_counter() - started) * 10_000 / n_timed


def otam_by_cells(distance: torch.Tensor, lam: float = 0.5) -> torch.Tensor:
    """OTAM as it is published: a loop over cells, once in each direction; [Q, W, T, U] -> [Q, W]."""

    def one_way(d: torch.Tensor) -> torch.Tensor:
        d = F.pad(d, (1, 1))
        total = torch.zeros_like(d)
        for m in range(1, d.shape[3]):
            total[:, :, 0, m] = d[:, :, 0, m] + total[:, :, 0, m - 1]
        for row in range(1, d.shape[2]):
            for m in range(1, d.shape[3]):
                ways = [total[:, :, row - 1, m - 1], total[:, :, row, m - 1]]
                ways += [total[:, :, row - 1, m]] if m in (1, d.shape[3] - 1) else []
                soft = -lam * torch.log(torch.stack(ways).div(-lam).exp().sum(0))
                total[:, :, row, m] = d[:, :, row, m] + soft
        return total[:, :, -1, -1]

    return -(one_way(distance) + one_way(distance.mT))


def bi_mhm(distance: torch.Tensor) -> torch.Tensor:
    """Bi-MHM of one episode; [Q, W, T, U] -> [Q, W]."""
    return -(distance.amin(3).sum(2) + distance.amin(2).sum(2))


if __name__ == "__main__":
    main()
