"""The GPU check's own logic, on a CPU: what it says of parts that fail, hang, die or cannot run, and what it finds wrong."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Run the script on made-up parts, {name: (generator of rows, options of Part)}: exit code, outcomes."""
    monkeypatch.syspath_prepend(ROOT)
    script, of = importlib.import_module("benchmarks.gpu_check"), importlib.import_module("benchmarks.gpu.part")

    def run(parts: dict, *flags: str) -> tuple[int, dict]:
        for name, (generator, options) in parts.items():
            part = of.Part(generator, **{"limit_s": 30, "needs": (), "gpu": False} | options)
            monkeypatch.setitem(of.PARTS, name, part)
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path), "--parts", ",".join(parts), *flags])
        code = script.main()
        [path] = tmp_path.glob("*.json")
        return code, json.loads(path.read_text())["parts"]

    return run


def works(_):
    """A part."""
    yield {"row": 1, "ok": True}


def breaks(_):
    """A part."""
    yield {"row": 1}
    raise RuntimeError("\n\nno such kernel\nmore of it")


def hangs(_):
    """A part."""
    yield {"row": 1}
    time.sleep(60)


def dies(_):
    """A part."""
    yield {"row": 1}
    os.kill(os.getpid(), signal.SIGKILL)


def is_wrong(_):
    """A part."""
    yield from ({"row": 1, "ok": True}, {"row": 2, "ok": False})


def test_a_part_that_fails_hangs_or_dies_is_recorded_and_the_next_runs(check, capfd):
    failing = {"breaks": (breaks, {}), "hangs": (hangs, {"limit_s": 1}), "dies": (dies, {}), "is_wrong": (is_wrong, {})}
    code, outcomes = check(failing | {"works": (works, {})})
    reasons = {name: outcome["reason"] for name, outcome in outcomes.items() if outcome["status"] == "FAILED"}
    assert reasons == {
        "breaks": "RuntimeError: no such kernel",
        "hangs": "not done after its 1 s",
        "dies": "its process died with exit code -9",
        "is_wrong": "1 of 2 rows are not ok",
    }
    assert (code, outcomes["works"]["status"]) == (1, "passed")
    assert all(outcome["rows"] for outcome in outcomes.values())  # what came before the end is kept
    assert "raise RuntimeError" in outcomes["breaks"]["traceback"]
    assert capfd.readouterr().out.splitlines()[-2].split() == ["works", "passed", f"{outcomes['works']['seconds']:.4g}"]


def test_a_second_call_runs_what_did_not_pass_and_only_that(check, tmp_path):
    ran = tmp_path / "ran"

    def noted(name, mended):
        def run(_):
            with ran.open("a") as file:
                file.write(f"{name} ")
            yield {"ok": mended()}

        return run, {}

    calls = {"good": noted("good", lambda: True), "bad": noted("bad", (tmp_path / "mended").exists)}
    assert check(calls)[0] == 1
    (tmp_path / "mended").touch()
    assert check(calls | {"new": noted("new", lambda: True)})[0] == 0
    assert ran.read_text() == "good bad new bad "  # what is missing comes before what failed
    assert check(calls, "--fresh")[0] == 0
    assert ran.read_text() == "good bad new bad good bad "


def test_what_passed_at_another_commit_runs_again(check, monkeypatch, capfd):
    part = {"works": (works, {})}
    for commit, kept in (("one", "nothing"), ("one", "works"), ("two", "nothing")):
        monkeypatch.setenv("GIT_COMMIT", commit)
        code, outcomes = check(part)
        assert (code, outcomes["works"]["commit"]) == (0, commit)
        assert f"at this commit: {kept}\n" in capfd.readouterr().out
    monkeypatch.setenv("GIT_COMMIT", "three")
    assert check(part, "--budget_s", "1")[0] == 75
    assert "passed at commit two" in capfd.readouterr().out


def test_no_part_begins_that_may_not_end_in_time(check):
    parts = {"long": (works, {"limit_s": 100}), "short": (works, {"limit_s": 10})}
    code, outcomes = check(parts, "--budget_s", "50")
    assert (code, list(outcomes)) == (75, ["short"])
    assert (check(parts, "--budget_s", "150"))[0] == 0


def test_what_cannot_run_is_skipped_by_name(check):
    code, outcomes = check({"dali": (works, {"needs": ("torch", "no_such.thing")}), "speed": (works, {"gpu": True})})
    assert code == 0
    assert [(o["status"], o["reason"]) for o in outcomes.values()] == [
        ("skipped", "no_such.thing not installed"),
        ("skipped", "no GPU (--small runs its logic on the CPU)"),
    ]


@pytest.mark.parametrize("fault", ["none", "value", "gradient", "unwritten", "race"])
def test_the_judge_of_ops_finds_wrong_values_and_gradients_unwritten_outputs_and_races(monkeypatch, fault):
    monkeypatch.syspath_prepend(ROOT)
    ops = importlib.import_module("benchmarks.gpu.ops")

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            out = torch.empty_like(a)
            rows = slice(1, None) if fault == "unwritten" else slice(None)
            out[rows] = (a * b)[rows] * (1.001 if fault == "value" else 1)
            return out + (1e-7 * torch.rand_like(out) if fault == "race" else 0)

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            return g * b, g * a * (1.001 if fault == "gradient" else 1)

    row = ops.judge(Product.apply, lambda a, b: a * b, *torch.randn(2, 50, 3), torch.device("cpu"))
    assert (row["value"] < 1e-5) == (fault not in ("value", "unwritten"))
    assert (row["gradient"] < 1e-5) == (fault != "gradient")
    assert (row["value"] == float("inf")) == (fault == "unwritten")
    assert row["repeats"] == (fault != "race") or fault == "unwritten"


def test_the_parts_pass_small_on_a_cpu(tmp_path):
    """The views that serve without DALI are DALI's, the ops are right, curves of training agree."""
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--small", "--out", tmp_path, "--parts"]
    run = subprocess.run([*command, "environment,losses,dali,training,cifar10_care"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads((tmp_path / f"cpu-torch-{torch.__version__}-small.json").read_text())
    assert record["machine"]["torch"] == torch.__version__
    assert record["parts"]["cifar10_care"]["reason"] == "no CIFAR-10: --data DIR was not given"
