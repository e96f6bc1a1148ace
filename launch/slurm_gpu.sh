#!/usr/bin/env bash
# A run on GPU nodes by SLURM (docs/scale.md). It gives itself to sbatch:
#
#   launch/slurm_gpu.sh [--nodes 1] [--gpus 8] [--restarts 20] [--faults 3] [--dry-run] [OPTIONS OF SBATCH] \
#       -- run --config configs/NAME.py ...
#
# --gpus are of a node. There is one process for each GPU: that is how JAX finds the processes of a SLURM step, each with
# the GPU of its number on the node, and no Python waits for another's. Each sees all GPUs of its node, so nothing may bind
# them to tasks. Five minutes before the time limit the processes get SIGTERM and save; the job is then queued again, as
# after every exit status that training.md says is worth it.
#
# The checkout, .venv and the work folder are on a disk that all nodes see. Secrets go with the environment, as sbatch does.
set -euo pipefail

main() {
  case ${1:-} in
    in-job) shift; load launch; in_job "$@" ;; # a copy elsewhere, which sbatch made, with the checkout as its folder
    in-task) shift; in_task "$@" ;;
    *) load "$(dirname "${BASH_SOURCE[0]}")"; submit "$@" ;;
  esac
}

load() {
  # shellcheck source=launch/setup_venv.sh
  source "$1/setup_venv.sh"
  # shellcheck source=launch/steps.sh
  source "$1/steps.sh"
  # shellcheck source=launch/statuses.sh
  source "$1/statuses.sh"
}

submit() {
  local nodes=1 gpus=8 restarts=20 faults=3 word options=()
  while (($#)); do
    case $1 in
      --nodes | --gpus | --restarts | --faults)
        [[ ${2:-} =~ ^[0-9]+$ ]] || fail "$1 wants a number"
        printf -v "${1#--}" %s "$2"
        shift 2
        ;;
      --dry-run) dry_run=yes; shift ;;
      --) break ;;
      *) options+=("$1"); shift ;;
    esac
  done
  [[ ${1:-} == -- && $# -gt 1 ]] || usage "${BASH_SOURCE[0]}"
  shift
  for word in "${options[@]}"; do
    [[ $word != --gpus-per-task* && $word != --gpu-bind* ]] ||
      fail "$word: a process must see all GPUs of its node, JAX takes the one of its number"
  done
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  [[ $dry_run || -x .venv/bin/distil-jax ]] ||
    fail "distil-jax is not in $PWD/.venv: bash -c 'source launch/setup_venv.sh; setup_venv cuda', on a node with a network"
  step sbatch --job-name=distil-jax "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" \
    --signal=TERM@300 --requeue --open-mode=append --output=%x-%j.log "--chdir=$PWD" "${options[@]}" \
    launch/slurm_gpu.sh in-job "$restarts" "$faults" "$@"
  if [[ $dry_run ]]; then
    echo "# the job then runs:"
    start "$@"
    echo "# and, where the exit status is worth it, at most $restarts times:"
    step scontrol requeue "${SLURM_JOB_ID:-JOB}"
  fi
}

in_job() {
  local restarts=$1 faults=$2 given=0 status=0 cancelled="" had
  shift 2
  notes=$PWD/.slurm-$SLURM_JOB_ID # how each process ended; faults until now
  mkdir -p "$notes"
  rm -f "$notes"/[0-9]*
  trap 'cancelled=yes' TERM # by scancel, or for another job: not ours to queue again
  say "$(date -u +%FT%TZ) start ${SLURM_RESTART_COUNT:-0} on ${SLURM_JOB_NODELIST:-?}: distil-jax $*"
  start "$@" || given=$?
  status=$(ending "$given")
  say "$(date -u +%FT%TZ) exit status $status"
  [[ ! $cancelled || $(what_next "$status") == "done" ]] || { say "cancelled"; leave 143; }
  case $(what_next "$status") in
    few)
      had=$(cat "$notes/faults" 2>/dev/null || echo 0)
      echo $((had + 1)) >"$notes/faults"
      ((had < faults)) || leave "$status"
      ;;
    done | mend) leave "$status" ;;
  esac
  ((${SLURM_RESTART_COUNT:-0} < restarts)) || { say "no starts are left"; leave "$status"; }
  say "queued again"
  scontrol requeue "$SLURM_JOB_ID"
  exit "$status"
}

# Waits five minutes for the others when one has ended: they end by themselves, and say more than one that was killed.
start() {
  export DISTIL_JAX_HOSTS=auto
  step srun --kill-on-bad-exit=0 --wait=300 --gpu-bind=none bash launch/slurm_gpu.sh in-task "${notes:-NOTES}" "$@"
}

ending() {
  local given=$1 found=()
  mapfile -t found < <(cat "$notes"/[0-9]* 2>/dev/null)
  ((${#found[@]})) || { echo "$given"; return; }
  ((${#found[@]} == ${SLURM_NTASKS:-${#found[@]}})) || found+=(137) # killed before they could write it down
  run_status "${found[@]}"
}

leave() {
  rm -rf "$notes"
  exit "$1"
}

in_task() {
  local notes=$1 status=0
  shift
  trap : TERM # SLURM signals distil-jax too, which saves
  .venv/bin/distil-jax "$@" || status=$?
  echo "$status" >"$notes/$SLURM_PROCID"
  return "$status"
}

main "$@"
