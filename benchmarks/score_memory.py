"""Memory of `lance score` while it works through a long table, by the number of prompts.

usage: .venv/bin/python benchmarks/score_memory.py [--prompts 5000 200000] [--ending jsonl]

The prompts are short ones of the corpus, over and over, so that many are scored in little time; each run is a process of its own, whose resident memory is
read from /proc (Linux) ten times a second. One line of JSON per run: the peak, and the peak of the first half of the time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lance import load_corpus


def resident(pid: int) -> float:
    """Megabytes of resident memory of a process, 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[5000, 200_000])
    parser.add_argument("--ending", choices=("jsonl", "csv", "parquet"), default="jsonl", help="of the table written")
    args = parser.parse_args()
    short = sorted((p.text for p in load_corpus()), key=len)[:2000]
    for count in args.prompts:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "in.jsonl", Path(folder) / f"out.{args.ending}"
            with source.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"prompt": short[i % len(short)], "row": i}) + "\n" for i in range(count))
            start = time.perf_counter()
            run = subprocess.Popen([str(Path(sys.executable).with_name("lance")), "score", str(source), "-o", str(target)])
            seen: list[tuple[float, float]] = []
            while run.poll() is None:
                seen.append((time.perf_counter() - start, resident(run.pid)))
                time.sleep(0.1)
            if run.returncode:
                raise SystemExit(run.returncode)
            seconds = time.perf_counter() - start
            half = max(m for t, m in seen if t <= max(seconds / 2, seen[0][0]))
            print(
                json.dumps(
                    {
                        "prompts": count,
                        "ending": args.ending,
                        "seconds": round(seconds, 1),
                        "peak_mb": round(max(m for _, m in seen)),
                        "peak_mb_first_half": round(half),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
