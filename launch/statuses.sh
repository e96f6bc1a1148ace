# Sourced. What the exit statuses of a run tell a scheduler (docs/training.md, "When it stops").
# shellcheck shell=bash

# After a run that ended with STATUS: `done`, `mend` (a person has to, first), `again`, or `few`: again, a few times.
what_next() {
  case $1 in
    0) echo "done" ;;
    2 | 70 | 71 | 130) echo "mend" ;;
    72 | 73 | 134 | 137 | 143) echo "again" ;;
    *) echo "few" ;;
  esac
}

# The exit status of a run from those of its processes. One that fails takes the others with it, so what it says comes
# before what those say that have only lost another (73, 134) or were killed then.
run_status() {
  local wanted status others=()
  for wanted in 2 70 71 130; do
    for status in "$@"; do
      [[ $status == "$wanted" ]] && { echo "$status"; return; }
    done
  done
  for status in "$@"; do
    [[ $(what_next "$status") == few ]] && others+=("$status")
  done
  ((${#others[@]})) && { echo "${others[0]}"; return; }
  for wanted in 72 143 137 134 73 0; do
    for status in "$@"; do
      [[ $status == "$wanted" ]] && { echo "$status"; return; }
    done
  done
}
