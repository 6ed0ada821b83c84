"""Frames a second of the towers alone, on an accelerator: one JSON line a tower and arithmetic.

python tests/benchmarks/bench_towers.py [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time

import torch

from coldframe.extract import Tower, load_tower

TOWERS = {"ViT-B-16": 512, "ViT-L-14": 256}  # frames to a pass
SECONDS = 10.0


def main() -> None:
    """Time both towers in bf16 and fp16, compiled and not."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda")
    given = options.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("no accelerator here: the towers were not measured", file=sys.stderr)
        return
    for model, batch in TOWERS.items():
        for precision in ("bf16", "fp16"):
            for is_compiled in (False, True):
                tower = load_tower(model, "random", precision=precision, device=given.device)
                if is_compiled:
                    tower.compile()
                facts = {"model": model, "precision": precision, "compiled": is_compiled, "batch": batch}
                name = torch.cuda.get_device_name() if given.device.startswith("cuda") else platform.processor()
                line = {"benchmark": "tower", "frames_per_s": round(rate(tower, batch)), **facts, "device": name}
                print(json.dumps(line), flush=True)


def rate(tower: Tower, batch: int) -> float:
    """Frames a second of crops that lie in page-locked memory, as the decoders leave them."""
    side = tower.spec.transform.size_px
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    pixels = pixels.pin_memory() if tower.device.type == "cuda" else pixels

    def run() -> None:
        with torch.inference_mode():
            tower.encode_frames(pixels, ["embedding"])["embedding"].to(torch.float16).cpu()

    for _ in range(3):
        run()
    n_frames, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < SECONDS:
        run()
        n_frames += batch
    return n_frames / seconds


if __name__ == "__main__":
    main()
