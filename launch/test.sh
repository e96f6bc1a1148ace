#!/usr/bin/env bash
# Makes .venv, installs with the tests' requirements, checks the code and runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup_venv.sh

setup_venv demo,test
say "ruff check"
.venv/bin/ruff check .
say "pytest -q $*"
# A file stays with one process: its fixtures are made once. More than four processes want more memory than they save time.
exec .venv/bin/python -m pytest -q -n auto --maxprocesses=4 --dist loadfile "$@"
