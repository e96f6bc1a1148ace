#!/usr/bin/env bash
# What tpu_pod.sh has each worker of a slice do; skypilot.yaml uses it too.
#
#   tpu_worker.sh unpack                            the checkout from ~/.distil_jax/source.tar.gz to ~/distil_jax
#   tpu_worker.sh install NAME MOUNT SHARED         the shared folder, Python, the packages
#   tpu_worker.sh start NAME MOUNT ARGUMENTS...     distil-jax ARGUMENTS, detached
#   tpu_worker.sh go NAME MOUNT ARGUMENTS...        distil-jax ARGUMENTS, attached
#   tpu_worker.sh status|stop NAME MOUNT
#   tpu_worker.sh logs NAME MOUNT LINES [follow]
#   tpu_worker.sh pack NAME MOUNT WHAT...           a tar of what is there of it, in ~/.distil_jax
#
# The run's folder, MOUNT/NAME, is on the shared disk and outlives the slice. It is the work folder of distil-jax, and holds
# xla/ with compiled programs, data/ for files of yours, launch/ with a log for each worker. What speaks of this machine is
# in ~/.distil_jax.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
own=$HOME/.distil_jax
# shellcheck source=launch/setup_venv.sh
source "$here/setup_venv.sh"

main() {
  local verb=${1:?what to do}
  shift
  mkdir -p "$own"
  if [[ $verb != unpack ]]; then
    name=${1:?the name of the run} mount=${2:?where the shared folder is}
    run=$mount/$name
    shift 2
  fi
  case $verb in
    unpack | install | start | go | status | stop | logs | pack) "$verb" "$@" ;;
    *) fail "tpu_worker.sh does not know $verb" ;;
  esac
}

# From the metadata server; 0 where there is none, as on a machine that is no worker of a slice.
worker_index() {
  curl -sf --max-time 10 -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo 0
}

is_running() {
  local process
  process=$(cat "$own/$name.pid" 2>/dev/null) || return 1
  # Another program may have got the number since.
  [[ -r /proc/$process/cmdline ]] && grep -qa tpu_worker.sh "/proc/$process/cmdline"
}

unpack() {
  local new=$HOME/distil_jax.new old=$HOME/distil_jax file
  for file in "$own"/*.pid; do
    name=$(basename "$file" .pid)
    [[ -e $file ]] && is_running && fail "the run $name goes on here, from this checkout: stop it before you install"
  done
  rm -rf "$new"
  mkdir -p "$new"
  tar -xzf "$own/source.tar.gz" -C "$new"
  [[ ! -d $old/.venv ]] || mv "$old/.venv" "$new/.venv"
  rm -rf "$old"
  mv "$new" "$old"
}

install() {
  local shared=${1:?HOST:/EXPORT, or none}
  attach "$shared"
  if [[ ! -w $run ]]; then
    sudo mkdir -p "$run"
    sudo chown "$(id -u)" "$run"
  fi
  mkdir -p "$run/launch" "$run/data" "$run/xla" ||
    fail "$run cannot be written by user $(id -u): it is of $(stat -c %u "$run"); the server must not squash root," \
      "or the folder be given to that number"
  find_newer_python
  cd "$here/.."
  setup_venv tpu
  say "worker $(worker_index) is ready"
}

# noac: each line of metrics.jsonl is on the server before the next step, and all workers see the same files at once.
attach() {
  local shared=$1
  if [[ $shared == none ]]; then
    [[ -d $mount ]] || { sudo mkdir -p "$mount" && sudo chown "$(id -u)" "$mount"; }
    return
  fi
  if ! mountpoint -q "$mount"; then
    if ! command -v mount.nfs >/dev/null; then
      # A machine that has just started installs updates of its own meanwhile.
      sudo DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=600 update
      sudo DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=600 install -y nfs-common
    fi
    say "mounting $shared at $mount"
    sudo mkdir -p "$mount"
    sudo mount -t nfs -o rw,hard,noac,noatime "$shared" "$mount"
  fi
}

# The images of TPU VMs have Python 3.10. uv brings a newer one into the home folder.
find_newer_python() {
  local candidate
  export PATH=$HOME/.local/bin:$PATH
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
      return
    fi
  done
  say "no Python 3.11 or newer: installing 3.12 with uv"
  python3 -m pip install --quiet --user uv
  uv python install 3.12
  ln -sf "$(uv python find 3.12)" "$HOME/.local/bin/python3.12"
  hash -r
}

start() {
  local process
  if is_running; then
    say "the run $name goes on already on worker $(worker_index)"
    return
  fi
  [[ -x $here/../.venv/bin/distil-jax ]] || fail "distil-jax is not installed on worker $(worker_index): tpu_pod.sh install"
  rm -f "$own/$name.status"
  # A session of its own: it stays when ssh goes, and `stop` reaches all of it by one number.
  setsid nohup bash "$here/tpu_worker.sh" go "$name" "$mount" "$@" </dev/null >>"$(log_file)" 2>&1 &
  process=$!
  echo "$process" >"$own/$name.pid"
  say "worker $(worker_index) has started"
}

log_file() { echo "$run/launch/worker-$(worker_index).log"; }

go() {
  local status=0
  cd "$here/.."
  if [[ -r $own/secrets ]]; then
    set -a
    # shellcheck source=/dev/null
    source "$own/secrets"
    set +a
  fi
  export DISTIL_JAX_HOSTS=${DISTIL_JAX_HOSTS-auto} JAX_COMPILATION_CACHE_DIR=$run/xla
  [[ " $* " == *" --config.workdir"* ]] || set -- "$@" "--config.workdir=$run"
  say "$(date -u +%FT%TZ) worker $(worker_index) on $(hostname): distil-jax $*"
  trap : TERM # for distil-jax, which saves; this shell writes down how it ended
  .venv/bin/distil-jax "$@" || status=$?
  say "$(date -u +%FT%TZ) worker $(worker_index): exit status $status"
  echo "$status" >"$own/$name.status.part"
  mv "$own/$name.status.part" "$own/$name.status"
  return "$status"
}

# A line that tpu_babysit.sh reads.
status() {
  local told=idle
  if is_running; then
    told=running
  elif [[ -e $own/$name.status ]]; then
    told="ended $(cat "$own/$name.status")"
  elif [[ -e $own/$name.pid ]]; then
    told="ended 137" # killed, or the machine started anew: nothing could be written down
  fi
  echo "worker $(worker_index) $told"
}

# As a scheduler does it: SIGTERM, two minutes to save, SIGKILL.
stop() {
  local process waited
  if is_running; then
    process=$(cat "$own/$name.pid")
    kill -TERM -- "-$process"
    for ((waited = 0; waited < 120; waited++)); do
      is_running || break
      sleep 1
    done
    ! is_running || kill -KILL -- "-$process"
  fi
  status
}

logs() {
  local lines=${1:-200} follow=()
  [[ ${2:-} != follow ]] || follow=(-F)
  exec tail -n "$lines" "${follow[@]}" "$(log_file)"
}

pack() {
  local wanted found=() there
  cd "$run" || fail "there is no $run"
  for wanted in "$@"; do
    [[ ! -e $wanted ]] || found+=("$wanted")
  done
  there=(*)
  ((${#found[@]})) || fail "none of $* is in $run yet; there are: ${there[*]}"
  tar -cf "$own/results.tar.part" "${found[@]}"
  mv "$own/results.tar.part" "$own/results.tar"
  say "packed ${found[*]}"
}

main "$@"
