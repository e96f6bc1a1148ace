#!/usr/bin/env bash
# From a fresh clone to a distilled student: makes .venv, installs, runs configs/tiny.py. Repeat it as you like: what is
# done is skipped, and a run that was stopped goes on. Arguments go to `distil-jax run`, for example --config.seed=1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup_venv.sh

setup_venv demo
say "distil-jax run --config configs/tiny.py $*"
exec .venv/bin/distil-jax run --config configs/tiny.py "$@"
