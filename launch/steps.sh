# Sourced. A step is a command that --dry-run shows in place of running it. Wants `say` and `fail` of setup_venv.sh.
# shellcheck shell=bash disable=SC2034 # what is set here is read there

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  fail "bash 4.4 or newer is needed, and this is $BASH_VERSION (macOS: brew install bash)"

dry_run=${dry_run:-}
TRY_AGAIN=75 # exit status of what may go better later: no capacity, a network that failed
SECRETS=(HF_TOKEN WANDB_API_KEY)

# What stands at the top of a script, and the end.
usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$1" >&2
  exit 2
}

# Secrets are read from the environment, and go on in files that only their owner reads. No command gets them in its
# arguments, which every user of a machine can list; commands need them in no environment either.
keep_secrets() { export -n "${SECRETS[@]}"; }

# Writes NAME=value for each secret that is set, values as `quote` prints them (%q for a shell, %s as they are).
write_secrets() {
  local file=$1 quote=$2 name
  if [[ $dry_run ]]; then
    echo "# ${SECRETS[*]} of the environment, those that are set, into $file, mode 600"
    return
  fi
  : >"$file"
  chmod 600 "$file"
  for name in "${SECRETS[@]}"; do
    # The format is one of the two that callers give, not text of others.
    # shellcheck disable=SC2059
    [[ -z ${!name:-} ]] || printf "%s=$quote\n" "$name" "${!name}" >>"$file"
  done
}

# What a step has done, which in a dry run it has not.
tell() { [[ $dry_run ]] || say "$@"; }

# The arguments as one would type them.
shown() {
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  printf '%s\n' "${words[*]}"
}

# Runs a command, or shows it.
step() {
  if [[ $dry_run ]]; then
    shown "$@"
  else
    "$@"
  fi
}

# A step that may be repeated: three times, or `tries`, as networks and machines that have just started fail now and then.
# Exit status 2 is something to mend and is not repeated.
patiently() {
  local try status
  for ((try = 1; try <= ${tries:-3}; try++)); do
    status=0
    step "$@" || status=$?
    ((status == 0 || status == 2)) && return "$status"
    ((try == ${tries:-3})) || { say "exit status $status; once more in 15 s: $(shown "${@:1:6}") ..." >&2; sleep 15; }
  done
  return "$status"
}
