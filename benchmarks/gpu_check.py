"""Does everything work on this GPU, and how fast? One table a part, one of all parts, and a JSON file.

    python benchmarks/gpu_check.py [--parts ops,training] [--budget_s 550] [--data DIR] [--out DIR] [--fresh] [--small]

The same command continues: what passed at this commit is kept and named; what passed at another, failed, was skipped or is
missing runs. No part begins that might not end within --budget_s. Parts that need a package which is not installed are
skipped by name; numpy, Pillow, PyYAML, torch 2.11 and torchvision suffice for the ops, timm and safetensors for training.
--small runs all of it on a CPU in a minute or two, to test the script. DIR of --data holds CIFAR-10: official binary files,
or tars of lossless WebP.

Exit code: 0 passed or skipped, 1 a part failed, 75 parts are left for another call.

On a machine without the project's packages or a network, carry them: `benchmarks/gpu/carry.sh` says how.
"""

# argparse and not fire, which every other command line here uses: fire is not everywhere that this script must run.
import argparse
import importlib
import re
import secrets
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project need not be installed

import torch

from benchmarks.gpu.machine import describe
from benchmarks.gpu.part import PARTS, Check, Record, table

MODULES = ("machine", "ops", "speed", "data_path", "training", "throughput", "cifar")  # in the order of their parts
LEFT = 75  # trainer.errors.STOPPED: the same command continues


def main() -> int:
    """Run what is missing, print, and say by the exit code what came of it."""
    options = arguments()
    start = time.perf_counter()
    described = describe() | {"small": options.small}
    record = Record.open(options.out / file_name(described), described, options.fresh)
    device, seed = torch.device("cuda", 0) if described["gpu"] else torch.device("cpu"), secrets.randbelow(2**31)
    check = Check(device, options.small, options.data, options.out, seed, record.outcomes)
    print(f"{', '.join(f'{key} {value}' for key, value in described.items())}\n{record.path}")
    kept = [name for name in options.parts if record.passed(name)]
    print(f"kept, passed at this commit: {', '.join(kept) or 'nothing'}")
    for name in sorted(options.parts, key=record.outcomes.__contains__):  # what is missing first
        part = PARTS[name]
        if name in kept or time.perf_counter() - start + part.limit_s > options.budget_s:
            continue
        print(f"\n{name}: {part.title}", flush=True)
        record.add(name, part.outcome(check) | {"commit": described["commit"]})
        outcome = record.outcomes[name]
        print(table(outcome["rows"]) if outcome["rows"] else "", outcome.get("traceback", ""), sep="\n", flush=True)
    return conclude(record, options)


def conclude(record: Record, options: argparse.Namespace) -> int:
    """The table of all parts asked for, and the exit code."""
    rows = []
    for name in options.parts:
        left = {"status": "left", "reason": f"may take {PARTS[name].limit_s:g} s: the same command continues"}
        outcome = record.outcomes.get(name, left)
        if outcome["status"] == "passed" and not record.passed(name):
            outcome = left | {"reason": f"passed at commit {outcome.get('commit')}; {left['reason']}"}
        rows.append({"part": name, "status": outcome["status"], "s": outcome.get("seconds"), "": outcome["reason"]})
    print(f"\n{table(rows)}\n{record.path}", flush=True)
    statuses = {row["status"] for row in rows}
    return 1 if "FAILED" in statuses else LEFT if "left" in statuses else 0


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    for module in MODULES:
        importlib.import_module(f"benchmarks.gpu.{module}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="names, separated by commas")
    parser.add_argument("--budget_s", type=float, default=float("inf"), help="seconds that this call may take")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder of the JSON and of what parts write")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return options


def file_name(described: dict) -> str:
    """One file a machine, so that no table mixes two."""
    words = [described["gpu"] or "cpu", "torch", described["torch"], *(["small"] if described["small"] else [])]
    return re.sub(r"[^a-z0-9.+]+", "-", " ".join(words).lower()) + ".json"


if __name__ == "__main__":
    sys.exit(main())
