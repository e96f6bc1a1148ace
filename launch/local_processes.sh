#!/usr/bin/env bash
# Runs one command as several processes of one run, on this machine: to try a mesh of many hosts, or one process for each
# GPU. Every process has its own part of the data; the output of each is marked with its number.
#
#   launch/local_processes.sh COUNT [--devices N] distil-jax run --config configs/tiny.py [--config.KEY=VALUE ...]
#
# --devices N: give each process N fake CPU devices. The exit status is that of the process that ended first with one
# other than 0; the others are then given a minute to follow.
set -euo pipefail

count=${1:?how many processes}
shift
if [[ ${1:-} == --devices ]]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=${2:?how many devices}"
  shift 2
fi
[[ $count =~ ^[1-9][0-9]*$ && $# -gt 0 ]] || { sed -n 's/^#  \? \?//p' "$0" | sed -n 2,6p >&2; exit 2; }

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
processes=()
trap 'kill -TERM "${processes[@]}" 2>/dev/null' TERM INT
for ((index = 0; index < count; index++)); do
  DISTIL_JAX_HOSTS=127.0.0.1:$port,$count,$index "$@" > >(sed -u "s/^/[$index] /") 2>&1 &
  processes+=($!)
done

status=0
left=("${processes[@]}")
while ((${#left[@]})); do
  ended=0
  wait -n -p who "${left[@]}" || ended=$?
  still=()
  for process in "${left[@]}"; do
    [[ $process == "${who:-}" ]] || still+=("$process")
  done
  left=("${still[@]}")
  if ((ended && !status)); then
    status=$ended
    ( sleep 60; kill -KILL "${processes[@]}" ) >/dev/null 2>&1 &
    last=$!
  fi
done
[[ -z ${last:-} ]] || kill "$last" 2>/dev/null || true
exit "$status"
