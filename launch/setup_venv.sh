# Sourced by quickstart.sh and test.sh. `setup_venv EXTRAS` makes .venv in the current folder, the project, and installs
# the project there; what is there already and still right is left as it is.
# shellcheck shell=bash

say() { printf '==> %s\n' "$*"; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && is_new_enough "$name"; then
      printf '%s\n' "$name"
      return
    fi
  done
  fail "no Python 3.11 or newer: install it (Debian, Ubuntu: sudo apt-get install python3 python3-venv)"
}

setup_venv() {
  local extras=$1 python fingerprint stamp

  if [[ -d .venv ]] && ! { is_new_enough .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    say ".venv is incomplete or of another Python: removing it"
    rm -rf .venv
  fi
  if [[ ! -d .venv ]]; then
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$python cannot make virtual environments (Debian, Ubuntu: sudo apt-get install python3-venv)"
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi

  # The path is part of it, since a virtual environment does not survive a move.
  fingerprint=$({ cat pyproject.toml setup.cfg && pwd; } | sha256sum | cut -d ' ' -f 1)
  for stamp in .venv/.installed-*; do
    if [[ ",${stamp#*installed-}," == *",$extras,"* && $(cat "$stamp" 2>/dev/null) == "$fingerprint" ]]; then
      say "distil-jax is installed in .venv already"
      return
    fi
  done
  say "installing distil-jax with its requirements ($extras) into .venv"
  .venv/bin/python -m pip install --disable-pip-version-check --editable ".[$extras]"
  printf '%s\n' "$fingerprint" >".venv/.installed-$extras"
}
