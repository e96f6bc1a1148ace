#!/usr/bin/env bash
# Brings a run on a slice of TPU VMs to its end: creates the slice, installs, runs, watches; a slice that was pre-empted or
# has failed is made anew, and the run goes on from its newest whole checkpoint (docs/scale.md).
#
#   launch/tpu_babysit.sh [--settings FILE] [--KEY VALUE ...] [--dry-run] [OF ITS OWN] -- run --config configs/NAME.py ...
#
#   --restarts 50     at most so many more starts, of run or slice
#   --faults 3        at most so many more starts after exit status 1 and others that training.md does not know
#   --every 60        seconds between two looks
#   --log FILE        what it did, appended (NAME.babysit.log)
#   --fetch DIR       the results, when the run is done
#   --delete          the slice, when this ends for good; without it, it stays and costs
#
# Ends with the run's exit status; 75 if the restarts are used up. It may be stopped at any time, and started again: the
# run goes on without it meanwhile. Settings are those of tpu_pod.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/setup_venv.sh"
source "$here/steps.sh"
source "$here/statuses.sh"
source "$here/tpu_settings.sh"

LOST_LOOKS=10 # looks in a row at a slice that is ready and does not answer, before it counts as failed
LAST_LOOKS=5  # looks that processes get to end after one of them has
CALM=3600     # seconds that a run must last for the pauses to begin small again

main() {
  local all=("$@") word
  flags=() restarts=50 faults=3 every=60 log="" fetch="" delete=""
  while (($#)); do
    case $1 in
      --restarts | --faults | --every | --log | --fetch)
        (($# > 1)) || fail "$1 wants a value"
        printf -v "${1#--}" %s "$2"
        shift 2
        ;;
      --delete) delete=yes; shift ;;
      --) break ;;
      *) flags+=("$1"); shift ;;
    esac
  done
  [[ ${1:-} == -- && $# -gt 1 ]] || usage "${BASH_SOURCE[0]}"
  shift
  for word in restarts faults every; do
    [[ ${!word} =~ ^[0-9]+$ ]] || fail "--$word ${!word}: it is a number"
  done
  read_settings "${flags[@]}"
  ((${#words[@]} == 0)) || fail "unknown argument ${words[0]}"
  [[ ${setting[shared]} != none ]] || fail "shared=none: what a pre-empted slice has saved is lost with it"
  arguments=("$@") failed_starts=0 outcome=""
  if [[ $dry_run ]]; then
    plan
    return
  fi
  log=${log:-${setting[name]}.babysit.log}
  exec 9>>"$log"
  flock -n 9 || fail "$log: another tpu_babysit.sh writes there, and takes care of ${setting[name]}"
  scratch=$(mktemp -d)
  exec > >(exec tee -ai "$log" 9>&-) 2>&1 # what the steps print goes to the log too
  tee=$!
  trap 'rm -rf "$scratch"; exec >&- 2>&-; wait "$tee"' EXIT
  trap 'note "stopped; ${setting[name]} and its run go on and cost, until: launch/tpu_pod.sh delete"; exit 130' INT TERM
  note "tpu_babysit.sh ${all[*]}"
  babysit
}

note() { say "$(date -u +%FT%TZ) $*"; }

# A pause that a signal ends.
nap() {
  sleep "$1" 9>&- &
  wait "$!"
}

pod() {
  local command=$1
  shift
  "$here/tpu_pod.sh" "$command" "${flags[@]}" "$@" 9>&- </dev/null
}

plan() {
  local word
  echo "# once, and again after each loss of the slice:"
  for word in create wait install; do
    pod "$word"
  done
  pod run -- "${arguments[@]}"
  echo "# every $every s:"
  pod status
  echo "# when the slice was pre-empted or does not answer, before it is made anew; at most $restarts times:"
  pod delete
  [[ ! $fetch ]] || { echo "# when the run is done:"; pod fetch "$fetch"; }
  [[ ! $delete ]] || { echo "# at the end:"; pod delete; }
}

babysit() {
  local pause=30 began status
  while true; do
    began=$SECONDS
    status=0
    bring_up || status=$?
    case $status in
      0) watch ;;
      2) note "something to mend, above"; finish 2 ;;
      *) outcome="no run on it yet" ;;
    esac
    ((SECONDS - began < CALM)) || pause=30
    if [[ $outcome == ended* ]]; then
      after_end "${outcome#ended }"
    else
      note "the slice: $outcome"
    fi
    ((restarts > 0)) || { note "no starts are left"; finish "$TRY_AGAIN"; }
    restarts=$((restarts - 1))
    note "starting again in $pause s; $restarts starts are left after that"
    nap "$pause"
    pause=$((pause < 300 ? 2 * pause : 600))
  done
}

# Leaves a slice on which the run goes on. Returns 2 for something to mend, another status for what may go better later.
bring_up() {
  local pause=30 status until=$((SECONDS + 3600 * setting[wait_hours]))
  while true; do
    status=0
    pod create || status=$?
    ((status)) || pod wait || status=$?
    ((status == 0)) && break
    ((status == 2)) && return 2
    ((SECONDS < until)) || { note "no slice within ${setting[wait_hours]} h"; finish "$TRY_AGAIN"; }
    note "no slice yet (exit status $status); asking again in $pause s"
    nap "$pause"
    pause=$((pause < 300 ? 2 * pause : 600))
  done
  if look && ((running)); then
    note "the run goes on already"
    return
  fi
  { pod install && pod run -- "${arguments[@]}"; } || status=$?
  if ((status == 0)); then
    note "the run has started"
    failed_starts=0
  elif ((status != 2 && ++failed_starts == 3)); then
    note "three times the workers could not be set up: another slice"
    pod delete || true
    failed_starts=0
  fi
  return "$status"
}

# One look: sets `state`, `running`, and `ended` to the exit statuses of workers that have ended. Fails if not every
# worker has answered.
look() {
  local seen idle
  seen=$(pod status 2>"$scratch/look") || true
  state=$(sed -n 's/^slice //p' <<<"$seen")
  running=$(grep -cE '^worker [0-9]+ running$' <<<"$seen") || true
  idle=$(grep -cE '^worker [0-9]+ idle$' <<<"$seen") || true
  mapfile -t ended < <(sed -nE 's/^worker [0-9]+ ended ([0-9]+)$/\1/p' <<<"$seen")
  ((running + idle + ${#ended[@]} == hosts))
}

# Until the run has ended or its slice is lost: sets `outcome`, "ended STATUS" or what happened to the slice.
watch() {
  local lost=0 uneven=0 told="" answered
  while true; do
    nap "$every"
    answered=""
    ! look || answered=yes
    [[ $told == "$state" ]] || note "the slice is $state"
    told=$state
    case $state in
      gone* | none) outcome=$state; return ;;
      ready) ;;
      *) continue ;; # it is repaired; or this machine has no network, which says nothing about the slice
    esac
    if [[ ! $answered ]]; then
      lost=$((lost + 1))
      note "not every worker has answered ($lost of $LOST_LOOKS)"
      ((lost < LOST_LOOKS)) && continue
      cat "$scratch/look"
      outcome="does not answer"
      pod delete || true
      return
    fi
    lost=0
    if ((running == 0)); then
      outcome="ended $(run_status "${ended[@]}" "$((${#ended[@]} == hosts ? 0 : 137))")"
      return
    fi
    # One that fails ends the others within a minute; where one did not start, the others wait five for it.
    uneven=$((running == hosts ? 0 : uneven + 1))
    if ((uneven > LAST_LOOKS)); then
      note "$running of $hosts workers run, and the others have ended: stopping them"
      pod stop || true
    fi
  done
}

# What follows from the exit status of the run: returns if it is to be started again.
after_end() {
  local status=$1
  note "the run has ended with exit status $status: $(what_next "$status")"
  case $(what_next "$status") in
    done) finish 0 ;;
    again) return ;;
  esac
  pod logs 0 || true # of the first worker, to the log of this one
  [[ $(what_next "$status") == few ]] || finish "$status"
  ((faults > 0)) || { note "no starts are left for faults of the program"; finish "$status"; }
  faults=$((faults - 1))
}

finish() {
  local status=$1
  if [[ $fetch && $status == 0 ]] && ! pod fetch "$fetch"; then
    note "the results could not be fetched; ${setting[name]} stays, and costs"
    exit "$TRY_AGAIN"
  fi
  if [[ $delete ]]; then
    pod delete || note "${setting[name]} could not be deleted, and costs: launch/tpu_pod.sh delete"
  else
    note "${setting[name]} stays, and costs until: launch/tpu_pod.sh delete"
  fi
  note "the end, exit status $status"
  exit "$status"
}

main "$@"
