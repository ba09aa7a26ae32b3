#!/usr/bin/env bash
# Train on a Slurm cluster, one rank per GPU:
#
#   launch/slurm.sh --nodes 4 [--gpus 8] [--cpus 4] [--time HH:MM:SS] [--partition P] [--dry_run] [--recipe R --key value ...]
#
# --gpus and --cpus: GPUs per node (8), CPUs per GPU (4). --dry_run prints the sbatch command and submits nothing. All else goes
# to launch/train.py. Further options of sbatch come from its environment variables, such as SBATCH_ACCOUNT and SBATCH_QOS.
# Run it where the relative paths of the settings start; that folder and this one must be shared by the nodes.
#
# Two minutes before the time limit Slurm sends SIGUSR1 to all ranks: they save and exit with 75, and the job goes back to the
# queue to continue. `scancel JOB` ends it: the ranks have Slurm's KillWait (30 s) to save. `scancel --signal=USR1 JOB` saves
# and requeues now.
#
# Tests run it with stand-ins for Slurm's commands. It was tried by hand on Slurm 22.05, 2 nodes x 2 ranks without GPUs, with a
# small training script: arguments, time limit, requeue, scancel, a killed rank. Not tried: real GPUs, other versions.
#
# The same file is what the job runs (`job`) and what each rank runs (`rank`), so that no argument passes through a string.
set -euo pipefail

STOPPED=75 # trainer.errors.STOPPED: saved, the same command continues
GRACE=30   # seconds in which the other ranks may end by themselves, after one failed

fail() {
  echo "error: $1" >&2
  exit 2
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]] || fail "$2 is '$1'; expected a whole number from 1."; }

submit() {
  local root nodes="" gpus=8 cpus=4 dry_run="" options=() settings=()
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  while (($#)); do
    case $1 in
      --nodes=* | --gpus=* | --cpus=* | --time=* | --partition=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
      --nodes | --gpus | --cpus | --time | --partition) (($# > 1)) || fail "$1 has no value; expected one." ;;
    esac
    case $1 in
      --nodes) nodes=$2 && shift 2 ;;
      --gpus) gpus=$2 && shift 2 ;;
      --cpus) cpus=$2 && shift 2 ;;
      --time | --partition) options+=("$1=$2") && shift 2 ;;
      --dry_run) dry_run=yes && shift ;;
      *) settings+=("$1") && shift ;;
    esac
  done
  is_count "$nodes" --nodes
  is_count "$gpus" --gpus
  is_count "$cpus" --cpus
  local command=(
    sbatch --parsable --job-name=care_trainer --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus"
    --cpus-per-task="$cpus" --signal=USR1@120 --requeue --open-mode=append --output=slurm-%j.log "${options[@]}"
    "$root/launch/slurm.sh" job "$root" --nodes "$nodes" "${settings[@]}"
  )
  if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  command -v sbatch >/dev/null || fail "no sbatch on this machine; expected Slurm's login node."
  local id
  id=$("${command[@]}")
  id=${id%%;*} # ID;CLUSTER
  echo "job $id: tail -F slurm-$id.log · squeue -j $id · scancel $id"
}

job() { # once, on the first node, from Slurm's copy of this file
  local root=$1 code=0
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) CROSS_SIZE="$SLURM_NNODES"
  srun --distribution=block --cpus-per-task="$SLURM_CPUS_PER_TASK" "$root/launch/slurm.sh" rank "$@" || code=$?
  if ((code == STOPPED)); then
    echo "job $SLURM_JOB_ID: saved, back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}

rank() { # once per GPU
  local root=$1 code=0 python
  shift
  python=$root/.venv/bin/python
  [[ -x $python ]] || python=python3
  export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="$SLURM_NTASKS_PER_NODE"
  trap : USR1 TERM # Slurm signals this shell too; it must outlive its rank
  "$python" "$root/launch/train.py" "$@" || code=$?
  if ((code != 0 && code != STOPPED)); then # the others wait for a rank that is gone, up to engine.timeout_minutes
    sleep "$GRACE"
    scancel --signal=KILL "$SLURM_JOB_ID.$SLURM_STEP_ID" || true
  fi
  exit "$code"
}

case ${1-} in
  job | rank) "$@" ;;
  *) submit "$@" ;;
esac
