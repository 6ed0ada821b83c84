"""Run every benchmark of this folder and append their lines, with date and commit, to results.jsonl.

python tests/benchmarks/run.py [NAME …]        all of them, or those named: gather, extract, memory, towers, evl, episodes,
sweep
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(names: list[str]) -> int:
    """Run one after the other; a benchmark that fails is named and makes the exit code 1."""
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    failed = []
    for script in sorted(HERE.glob("bench_*.py")):
        name = script.stem.removeprefix("bench_")
        if names and name not in names:
            continue
        print(f"# {name}", file=sys.stderr, flush=True)
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # as cli.py sets it
        done = subprocess.run(
            [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=False, env=environment
        )
        if done.returncode:
            failed.append(name)
        stamp = {"date": datetime.now(UTC).date().isoformat(), "commit": commit.stdout.strip()}
        with (HERE / "results.jsonl").open("a") as results:
            for line in filter(None, done.stdout.splitlines()):
                print(line, flush=True)
                results.write(json.dumps(json.loads(line) | stamp) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
