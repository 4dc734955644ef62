"""What it costs to prove a jail: every probe, as the service's user and as root, in each kind of network.

    PYTHONPATH=src python3 benchmarks/prove.py NAME [--runs N] [--json]

NAME is a jail that was built. Medians of N runs after one that is not counted; the target is 5 seconds for everything:
the probes' tree, the canaries, the control without walls, and all launches. Exit status 1 when it is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from stockade.assure.prove import prove

TARGET_S = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description="What it costs to prove a jail.")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prove(arguments.name)
    whole, launches, probes, escapes = [], [], 0, 0
    for _ in range(arguments.runs):
        began = time.perf_counter()
        proof = prove(arguments.name)
        whole.append(time.perf_counter() - began)
        launches.append(statistics.median(run.seconds for run in proof.runs))
        probes = sum(len(run.results) for run in proof.runs)
        escapes = proof.escapes
    median = statistics.median(whole)
    if arguments.json:
        print(json.dumps({"seconds": median, "launch_seconds": statistics.median(launches), "probes": probes,
                          "runs": len(whole), "target_seconds": TARGET_S, "escapes": escapes}))  # fmt: skip
    else:
        print(f"{probes} probes in {median:.2f} s (target {TARGET_S} s), a launch with all of them "
              f"{statistics.median(launches):.2f} s, {escapes} escapes")  # fmt: skip
    return 0 if median <= TARGET_S else 1


if __name__ == "__main__":
    raise SystemExit(main())
