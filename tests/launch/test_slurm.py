"""launch/slurm.sh with stand-ins for Slurm's commands: what is submitted, what each rank runs, what follows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sh"
NASTY = [
    "--recipe",
    "my recipe.yaml",
    "--out",
    'it\'s "here" $HOME; `id` \\ *',
    "--model.args",
    "{a: 1,\n b: é}",
    "--empty",
    "",
]

# Each stand-in is Python behind a shebang. srun starts the tasks as Slurm numbers them and returns their highest code.
SBATCH = """
json.dump(sys.argv[1:], open("sbatch.json", "w"))
print("4711;cluster")
"""
SRUN = """
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
def start(task):
    numbers = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % per_node), "SLURM_STEP_ID": "0"}
    return subprocess.Popen(command, env=os.environ | numbers)
tasks = [start(task) for task in range(int(os.environ["SLURM_NTASKS"]))]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
print(*sys.argv[1:], file=open("scontrol.log", "a"))
if sys.argv[1] == "show":
    print("node7", "node8", sep="\\n")
"""
SCANCEL = """
print(*sys.argv[1:], file=open("scancel.log", "a"))
"""
TRAIN = """
import json, os, signal, sys
keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT")
json.dump([sys.argv[1:], {key: os.environ[key] for key in keys}], open(f"rank{os.environ['RANK']}.json", "w"))
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))  # saved
if "wait" in sys.argv:
    os.kill(os.getppid(), signal.SIGUSR1)  # Slurm signals every process of the step, this rank's shell too
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.pause()
sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A copy of the launcher beside a small training script, in a path with a space, with Slurm's stand-ins on PATH."""
    bin_folder, launch = tmp_path / "bin", tmp_path / "a copy" / "launch"
    bin_folder.mkdir()
    launch.mkdir(parents=True)
    for name, body in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (bin_folder / name).write_text(f"#!{sys.executable}\nimport json, os, subprocess, sys\n{body}")
        (bin_folder / name).chmod(0o755)
    (bin_folder / "python3").symlink_to(sys.executable)
    shutil.copy(SCRIPT, launch)
    (launch / "train.py").write_text(TRAIN)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return launch / "slurm.sh"


def call(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)


def submitted_script() -> list[str]:
    """The script and its arguments, without sbatch's own options."""
    arguments = json.loads(Path("sbatch.json").read_text())
    return arguments[next(i for i, argument in enumerate(arguments) if not argument.startswith("--")) :]


def run_job(nodes: int, gpus: int) -> subprocess.CompletedProcess:
    """What Slurm does on the first node: run its own copy of the script."""
    script, *arguments = submitted_script()
    shutil.copy(script, "slurm_script")
    slurm = {"JOB_ID": 4711, "JOB_NODELIST": "node[7-8]", "NNODES": nodes, "NTASKS": nodes * gpus, "NTASKS_PER_NODE": gpus}
    slurm |= {"CPUS_PER_TASK": 4}
    environment = os.environ | {f"SLURM_{key}": str(value) for key, value in slurm.items()}
    return subprocess.run(["bash", "slurm_script", *arguments], env=environment, capture_output=True, text=True, timeout=60)


def test_a_job_asks_for_its_nodes_and_ranks_get_every_argument_as_typed(cluster):
    said = call(cluster, "--nodes", 2, "--gpus=3", "--time", "01:00:00", "--partition=big", *NASTY, "--code", "0")
    assert said.stderr == ""
    assert said.stdout.startswith("job 4711: tail -F slurm-4711.log")
    options = json.loads(Path("sbatch.json").read_text())
    for option in (
        "--nodes=2",
        "--ntasks-per-node=3",
        "--gpus-per-node=3",
        "--time=01:00:00",
        "--partition=big",
        "--signal=USR1@120",
    ):
        assert option in options

    ended = run_job(nodes=2, gpus=3)
    assert (ended.returncode, ended.stderr) == (0, "")
    for rank in range(6):
        arguments, world = json.loads(Path(f"rank{rank}.json").read_text())
        assert arguments == ["--nodes", "2", *NASTY, "--code", "0"]
        expected = {"RANK": rank, "WORLD_SIZE": 6, "LOCAL_RANK": rank % 3, "LOCAL_WORLD_SIZE": 3, "CROSS_SIZE": 2}
        assert world == {key: str(value) for key, value in expected.items()} | {"MASTER_ADDR": "node7", "MASTER_PORT": "24711"}
    assert "requeue" not in Path("scontrol.log").read_text()


def test_ranks_that_saved_on_the_signal_send_the_job_back_to_the_queue(cluster):
    call(cluster, "--nodes", 2, "--gpus", 2, "wait")
    ended = run_job(nodes=2, gpus=2)
    assert ended.returncode == 75
    assert Path("scontrol.log").read_text().endswith("requeue 4711\n")
    assert not Path("scancel.log").exists()


def test_a_rank_that_fails_takes_the_others_along_and_nothing_is_requeued(cluster):
    cluster.write_text(cluster.read_text().replace("GRACE=30", "GRACE=0"))
    call(cluster, "--nodes", 2, "--gpus", 1, "--code", "76")
    assert run_job(nodes=2, gpus=1).returncode == 76
    assert set(Path("scancel.log").read_text().splitlines()) == {"--signal=KILL 4711.0"}
    assert "requeue" not in Path("scontrol.log").read_text()


def test_a_dry_run_prints_the_submission_and_submits_nothing(cluster):
    said = call(cluster, "--nodes", 1, "--dry_run", *NASTY)
    assert not Path("sbatch.json").exists()
    call("bash", "-c", said.stdout)  # the printed line is the submission
    assert submitted_script() == [str(cluster), "job", str(cluster.parents[1]), "--nodes", "1", *NASTY]


@pytest.mark.parametrize(
    "wrong", [[], ["--nodes"], ["--nodes", "0"], ["--nodes", "2", "--gpus", "x"], ["--nodes=2", "--cpus="]]
)
def test_a_wrong_number_ends_with_one_line_and_submits_nothing(cluster, wrong):
    said = call(cluster, *wrong)
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    assert said.stderr.startswith("error: --")
    assert not Path("sbatch.json").exists()
