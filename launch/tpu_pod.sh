#!/usr/bin/env bash
# A slice of TPU VMs: from nothing to results, and away again (docs/scale.md).
#
#   launch/tpu_pod.sh COMMAND [--settings FILE] [--KEY VALUE ...] [--dry-run] [ARGUMENTS]
#
#   create                 the slice, or with --queued a request for it; removes one that was pre-empted first
#   wait                   until it is ready
#   install                the checkout's last commit, shared folder, packages and secrets on every worker
#   put FILE...            files of yours into data/ of the run's folder
#   run -- run --config configs/NAME.py ...       `distil-jax run --config ...` on every worker, detached
#   status                 of the slice and of the run on every worker
#   logs [WORKER|all] [follow]                    the last 200 lines; worker 0 if none is named
#   stop                   the run; it saves and can go on
#   fetch DIR [WHAT...]    export, report, evaluate and summary.json, or WHAT else, of the work folder
#   delete                 the slice; the shared folder stays
#
# Every command may be repeated. Settings stand in tpu_settings.sh; HF_TOKEN and WANDB_API_KEY come from the environment.
# Exit status: 0 done; 2 something to mend; 75 it may go better later (no capacity); others are gcloud's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/setup_venv.sh"
source "$here/steps.sh"
source "$here/tpu_settings.sh"

main() {
  local command=${1:-}
  case $command in
    create | wait | install | put | run | status | logs | stop | fetch | delete) shift ;;
    *) usage "${BASH_SOURCE[0]}" ;;
  esac
  read_settings "$@"
  keep_secrets
  exec 3>&1 # where a dry run shows what a substitution asks
  scratch=${TMPDIR:-/tmp}/scratch
  if [[ ! $dry_run ]]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
  fi
  name=${setting[name]}
  place=("--zone=${setting[zone]}")
  [[ -z ${setting[project]} ]] || place+=("--project=${setting[project]}")
  reach=("${place[@]}" --quiet) # a first key is made without a question
  [[ ${setting[internal]} == no ]] || reach+=(--internal-ip)
  "slice_$command" "${words[@]}"
}

# --- the slice ---------------------------------------------------------------------------------------------------------

slice_create() {
  local found options=()
  found=$(slice_state none)
  case $found in
    ready | waiting) say "$name is there already: $found"; return ;;
    gone*) say "removing what is left of $name ($found)"; slice_delete ;;
    unknown) say "gcloud does not say whether there is a $name" >&2; return "$TRY_AGAIN" ;;
  esac
  [[ ${setting[spot]} == no ]] || options+=(--spot)
  [[ ${setting[reserved]} == no ]] || options+=(--reserved)
  [[ ${setting[internal]} == no ]] || options+=(--internal-ips)
  [[ -z ${setting[network]} ]] || options+=("--network=${setting[network]}")
  [[ -z ${setting[subnetwork]} ]] || options+=("--subnetwork=${setting[subnetwork]}")
  [[ -z ${setting[service_account]} ]] || options+=("--service-account=${setting[service_account]}")
  say "creating $name: $accelerator_type in ${setting[zone]}"
  if [[ ${setting[queued]} == yes ]]; then
    asked gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${place[@]}" \
      "--accelerator-type=$accelerator_type" "--runtime-version=${setting[version]}" "${options[@]}"
  else
    asked gcloud compute tpus tpu-vm create "$name" "${place[@]}" \
      "--accelerator-type=$accelerator_type" "--version=${setting[version]}" "${options[@]}"
  fi
}

# Runs a request; a failure that a person has to mend ends with 2, another with 75.
asked() {
  local errors=$scratch/errors status=0
  noted "$errors" "$@" || status=$?
  ((status == 0)) && return
  if grep -qiE 'PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED|active account|has not been used in project|unrecognized arg|not found' \
    "$errors"; then
    fail "gcloud will not do this (above): mend it"
  fi
  say "gcloud could not do this now (above)" >&2
  return "$TRY_AGAIN"
}

# A step whose errors are shown, and kept in a file for what follows from them.
noted() {
  local errors=$1
  shift
  if [[ $dry_run ]]; then
    step "$@"
    return
  fi
  { "$@" 2>&1 1>&4 | tee "$errors" >&2; } 4>&1
}

# none, waiting, ready, "gone STATE" or unknown. ASSUMED is what a dry run goes on with.
slice_state() {
  local assumed=$1 request=""
  if [[ $dry_run ]]; then
    [[ ${setting[queued]} == no ]] || shown gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
      '--format=value(state.state)' >&3
    shown gcloud compute tpus tpu-vm describe "$name" "${place[@]}" '--format=value(state)' >&3
    echo "$assumed"
    return
  fi
  if [[ ${setting[queued]} == yes ]]; then
    request=$(described queued-resources 'state.state')
    case $request in
      ACTIVE) ;;
      none | unknown) echo "$request"; return ;;
      FAILED | SUSPEND* | DELETING) echo "gone $request"; return ;;
      *) echo waiting; return ;;
    esac
  fi
  local state
  state=$(described tpu-vm state)
  case $state in
    READY) echo ready ;;
    CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING) echo waiting ;;
    none) [[ $request ]] && echo "gone REQUEST_WITHOUT_SLICE" || echo none ;;
    unknown) echo unknown ;;
    *) echo "gone $state" ;;
  esac
}

described() {
  local kind=$1 field=$2 answer
  if answer=$(gcloud compute tpus "$kind" describe "$name" "${place[@]}" "--format=value($field)" 2>"$scratch/described"); then
    echo "${answer:-unknown}"
  elif grep -qiE 'NOT_FOUND|not found' "$scratch/described"; then
    echo none
  else
    cat "$scratch/described" >&2
    echo unknown
  fi
}

slice_wait() {
  local found until=$((SECONDS + 3600 * setting[wait_hours])) told=""
  while true; do
    found=$(slice_state ready)
    case $found in
      ready) say "$name is ready"; return ;;
      none) fail "there is no $name in ${setting[zone]}: tpu_pod.sh create" ;;
      gone*) say "$name is $found" >&2; return "$TRY_AGAIN" ;;
    esac
    [[ $told == "$found" ]] || say "$name: $found"
    told=$found
    ((SECONDS < until)) || { say "$name is not ready after ${setting[wait_hours]} h" >&2; return "$TRY_AGAIN"; }
    sleep 30
  done
}

slice_delete() {
  if [[ ${setting[queued]} == yes ]]; then
    removed gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    removed gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

# A deletion of what is not there is done.
removed() {
  local status=0
  noted "$scratch/errors" "$@" || status=$?
  ((status == 0)) && tell "$name is deleted" && return
  if grep -qiE 'NOT_FOUND|not found' "$scratch/errors"; then
    say "there is no $name"
    return
  fi
  return "$TRY_AGAIN"
}

# --- its workers -------------------------------------------------------------------------------------------------------

# on WORKERS COMMAND: has their shell run it.
on() { patiently gcloud compute tpus tpu-vm ssh "$name" "${reach[@]}" "--worker=$1" "--command=$2"; }

# The command for tpu_worker.sh VERB ARGUMENTS... there.
worker() {
  local verb=$1
  shift
  shown bash distil_jax/launch/tpu_worker.sh "$verb" "$name" "${setting[mount]}" "$@"
}

copy() { patiently gcloud compute tpus tpu-vm scp "$@" "${reach[@]}"; }

slice_install() {
  local root=$here/.. archive=$scratch/source.tar.gz secrets=$scratch/secrets
  git -C "$root" rev-parse --verify --quiet HEAD >/dev/null || fail "$root is no git checkout with a commit: what runs is one"
  [[ -z $(git -C "$root" status --porcelain) ]] || say "what is not committed stays here"
  say "installing $(git -C "$root" rev-parse --short HEAD) on $hosts workers of $name"
  step git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  write_secrets "$secrets" %q
  on all "umask 077; mkdir -p .distil_jax"
  copy "$archive" "$secrets" "$name:.distil_jax/" --worker=all
  on all "set -e; chmod 600 .distil_jax/secrets; mkdir -p .distil_jax/first; \
tar -xzf .distil_jax/source.tar.gz -C .distil_jax/first launch; bash .distil_jax/first/launch/tpu_worker.sh unpack; \
$(worker install "${setting[shared]}")"
}

slice_put() {
  (($#)) || fail "put: which files?"
  copy "$@" "$name:${setting[mount]}/$name/data/" --worker=0 --recurse
  tell "on the workers they are in ${setting[mount]}/$name/data/"
}

slice_run() {
  (($#)) || fail "run: with which arguments? tpu_pod.sh run ... -- run --config configs/NAME.py"
  on all "$(worker start "$@")"
}

# Lines for a person, and for tpu_babysit.sh: "slice STATE", then "worker N idle|running|ended STATUS". One look: who
# looks again and again counts by himself.
slice_status() {
  local found
  found=$(slice_state ready)
  [[ $dry_run ]] || echo "slice $found"
  [[ $found == ready ]] || return 0
  tries=1 on all "if [ -e distil_jax ]; then $(worker status); else echo worker not installed; fi" ||
    echo "not every worker answers"
}

slice_logs() {
  local which=${1:-0}
  [[ $which =~ ^(all|[0-9]+)$ ]] || { which=0; set -- 0 "$@"; }
  step gcloud compute tpus tpu-vm ssh "$name" "${reach[@]}" "--worker=$which" "--command=$(worker logs 200 "${@:2}")"
}

slice_stop() { on all "$(worker stop)"; }

slice_fetch() {
  local folder=${1:?fetch: into which folder?}
  shift
  (($#)) || set -- export report evaluate summary.json
  on 0 "$(worker pack "$@")"
  copy "$name:.distil_jax/results.tar" "$scratch/results.tar" --worker=0
  step mkdir -p "$folder"
  step tar -xf "$scratch/results.tar" -C "$folder"
  tell "the results are in $folder"
}

main "$@"
