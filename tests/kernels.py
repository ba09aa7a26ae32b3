"""Triton kernels without a GPU: what they compute, in the interpreter, and what they cost, compiled for one."""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SHARED_LIMIT = 227 * 1024  # bytes of shared memory that a block may have on sm_90


class Report(NamedTuple):
    """What one program of a kernel takes: registers a thread, bytes a thread spilled to the stack, bytes of shared memory."""

    registers: int
    spills: int
    shared: int


def compile_report(
    kernel, signature: dict[str, str], constants: dict[str, object], num_warps: int, num_stages: int = 1
) -> Report:
    """Compile a kernel for sm_90 (H100, H200) as a launch with aligned pointers would, and print what it takes.

    Args:
        kernel: a function under `triton.jit`.
        signature: types of the run-time arguments by name, such as {"z": "*fp32", "n": "i32"}.
        constants: values of the constexpr arguments by name.
        num_warps, num_stages: as at the launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(kernel, types, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    report = Report(registers, stack, compiled.metadata.shared)
    print(f"{kernel.__name__} {constants} {num_warps} warps, {num_stages} stages: {report}")
    return report


def in_interpreter(cases: Callable[[], object]) -> object:
    """What a function without arguments, at the top of a test's file, returns where Triton interprets kernels on the CPU.

    The interpreter must be chosen before Triton is imported, so a new process runs the function; the answer travels as JSON.
    It ignores `input_precision` and is silently wrong in bf16: float32 only.
    """
    program = f"import json, runpy; print(json.dumps(runpy.run_path({inspect.getfile(cases)!r})[{cases.__name__!r}]()))"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
