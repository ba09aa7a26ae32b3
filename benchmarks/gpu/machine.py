"""The machine: what it is, and the ceilings that no code on it can pass."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.gpu.measure import seconds
from benchmarks.gpu.part import FORK, Check, Row, part

PACKAGES = (
    "numpy",
    "timm",
    "nvidia-dali-cuda130",
    "deepspeed",
    "mlflow",
    "webdataset",
    "fire",
    "safetensors",
    "psutil",
    "rich",
)


def describe() -> dict:
    """What a number has to be read with."""
    with ProcessPoolExecutor(1, FORK) as other:  # this process must not start CUDA: the parts' are forked from it
        gpu = other.submit(_gpu).result()
    return {
        "gpu": gpu,
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "python": platform.python_version(),
        # .git does not travel to a lent machine: GIT_COMMIT can name the commit there.
        "commit": os.environ.get("GIT_COMMIT")
        or _answer("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
    }


@part(limit_s=30, gpu=False)
def environment(check: Check) -> Iterator[Row]:
    """The GPU, its memory, and the packages of the project: absent ones are what later parts skip for."""
    if check.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(check.device)
        yield {"what": "GPU memory", "value": f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"}
        yield {"what": "capability", "value": f"{properties.major}.{properties.minor}, {properties.multi_processor_count} SMs"}
    yield {"what": "CPU", "value": f"{os.cpu_count()} x {platform.machine()}"}
    for name in PACKAGES:
        yield {"what": name, "value": version(name) or "absent"}


@part(limit_s=60)
def ceilings(check: Check) -> Iterator[Row]:
    """Ceilings: a large copy (bytes read and written) and large matrix products of random numbers."""
    source = torch.randn(2**20 if check.small else 2**29, device=check.device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / seconds(lambda: target.copy_(source), check.device)
    yield {"ceiling": "copy", "per_s": rate, "reads": f"{rate / 1e12:.2f} TB/s", "ok": bool(torch.equal(source, target))}
    n = 256 if check.small else 8192
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = torch.randn(2, n, n, device=check.device).to(dtype)
        rate = 2 * n**3 / seconds(lambda a=a, b=b: a @ b, check.device)
        yield {"ceiling": name, "per_s": rate, "reads": f"{rate / 1e12:.1f} TFLOP/s"}
    torch.backends.cuda.matmul.allow_tf32 = before


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _answer(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip().partition("\n")[0]
