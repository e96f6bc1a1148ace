#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster with JobSet (docs/scale.md), by kubectl's present context.
#
#   launch/gke.sh COMMAND --image IMAGE --shared HOST:/EXPORT [OPTIONS] [ARGUMENTS]
#
#   run -- run --config configs/NAME.py ...    `distil-jax run --config ...` in a pod for each host
#   status | logs [follow]                     of the JobSet; of its first pod
#   put FILE... | fetch DIR [WHAT...]          files of yours to data/; results, by a pod that reads the shared folder
#   stop                                       removes the JobSet; the shared folder stays, `run` goes on from it
#   delete                                     that, and what the cluster knows of the shared folder; its files stay
#
#   --name distil-jax   --topology v5e:4x4   --slices 1   --spot   --restarts 50   --namespace default   --dry-run
#
# HF_TOKEN and WANDB_API_KEY of the environment become a Secret.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/setup_venv.sh"
source "$here/steps.sh"

main() {
  local command=${1:-}
  case $command in
    run | status | logs | put | fetch | stop | delete) shift ;;
    *) usage "${BASH_SOURCE[0]}" ;;
  esac
  name=distil-jax image="" shared="" topology=v5e:4x4 slices=1 spot="" restarts=50 namespace=default words=()
  while (($#)); do
    case $1 in
      --name | --image | --shared | --topology | --slices | --restarts | --namespace)
        (($# > 1)) || fail "$1 wants a value"
        printf -v "${1#--}" %s "$2"
        shift 2
        ;;
      --spot) spot=yes; shift ;;
      --dry-run) dry_run=yes; shift ;;
      --) shift; words+=("$@"); break ;;
      --*) fail "there is no option $1" ;;
      *) words+=("$1"); shift ;;
    esac
  done
  check
  keep_secrets
  kubectl=(kubectl "--namespace=$namespace")
  "jobset_$command" "${words[@]}"
}

check() {
  [[ $name =~ ^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$ ]] || fail "--name $name: small letters, digits and hyphens, a letter first"
  [[ $slices =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ ]] || fail "--slices and --restarts are numbers"
  local chip shape size total=1
  IFS=: read -r chip shape <<<"$topology"
  local -A accelerators=([v4]=tpu-v4-podslice [v5e]=tpu-v5-lite-podslice [v5p]=tpu-v5p-slice [v6e]=tpu-v6e-slice [tpu7x]=tpu7x)
  [[ -v accelerators[$chip] && $shape =~ ^[0-9]+(x[0-9]+){1,2}$ ]] ||
    fail "--topology $topology: a chip of ${!accelerators[*]} and a shape, as v5e:4x4 or v4:2x2x2"
  for size in ${shape//x/ }; do
    total=$((total * size))
  done
  accelerator=${accelerators[$chip]} shape_of_slice=$shape
  chips=$((total < 4 ? total : 4)) # of a host
  [[ $chip == v[56]e && $total == 8 ]] && chips=8
  hosts=$((total / chips))
}

# The manifest of FILE with its ${...} filled in. ARGUMENTS are those of distil-jax.
filled() {
  local text key
  text=$(<"$here/$1")
  shift
  local -A value=(
    [NAME]=$name [IMAGE]=$image [RESTARTS]=$restarts [SLICES]=$slices [HOSTS]=$hosts [CHIPS]=$chips
    [ACCELERATOR]=$accelerator [TOPOLOGY]=$shape_of_slice [SERVER]=${shared%%:*} [EXPORT]=${shared#*:} [ARGS]=$(listed "$@")
  )
  for key in "${!value[@]}"; do
    text=${text//"\${$key}"/"${value[$key]}"}
  done
  [[ ! $spot ]] || text=${text//"#spot "/}
  printf '%s\n' "$text"
}

# The words as a list of YAML.
listed() {
  local word text=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    text+="${text:+, }\"${word//\"/\\\"}\""
  done
  echo "[$text]"
}

# Gives kubectl the manifest of its standard input.
applied() {
  if [[ $dry_run ]]; then
    shown "${kubectl[@]}" apply --server-side -f - "<<EOF" | sed "s/'<<EOF'/<<EOF/"
    cat
    echo EOF
  else
    "${kubectl[@]}" apply --server-side -f -
  fi
}

jobset_run() {
  local ended
  (($#)) || fail "run: with which arguments? gke.sh run ... -- run --config configs/NAME.py"
  [[ $image ]] || fail "--image is missing: launch/Dockerfile says how it is made"
  [[ $shared == *:/* ]] || fail "--shared HOST:/EXPORT is missing: an NFS server in the cluster's network (docs/scale.md)"
  [[ " $* " == *" --config.workdir"* ]] || set -- "$@" "--config.workdir=/mnt/distil_jax/$name"
  filled gke_volume.yaml | applied
  give_secrets
  # A JobSet that has ended would stay as it is, and nothing would run.
  if [[ $dry_run ]]; then
    step "${kubectl[@]}" get jobset "$name" --ignore-not-found '--output=jsonpath={.status.terminalState}'
  else
    ended=$("${kubectl[@]}" get jobset "$name" --ignore-not-found '--output=jsonpath={.status.terminalState}')
    [[ ! $ended ]] || { say "the last $name has ended: $ended"; jobset_stop; }
  fi
  filled gke_jobset.yaml "$@" | applied
}

give_secrets() {
  local file scratch=${TMPDIR:-/tmp}/scratch secret=$name-secrets
  if [[ $dry_run ]]; then
    write_secrets "$scratch" %s
    echo "$(shown "${kubectl[@]}" create secret generic "$secret" "--from-env-file=$scratch" --dry-run=client --output=yaml) |"
    echo "  $(shown "${kubectl[@]}" apply --server-side -f -)"
    return
  fi
  file=$(mktemp)
  # shellcheck disable=SC2064 # this file, by its name now
  trap "rm -f '$file'" EXIT
  write_secrets "$file" %s
  if [[ -s $file ]]; then
    "${kubectl[@]}" create secret generic "$secret" "--from-env-file=$file" --dry-run=client --output=yaml |
      "${kubectl[@]}" apply --server-side -f -
  else
    "${kubectl[@]}" delete secret "$secret" --ignore-not-found
  fi
}

jobset_status() {
  step "${kubectl[@]}" get jobset "$name" --ignore-not-found
  step "${kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output=wide
}

jobset_logs() {
  local follow=()
  [[ ${1:-} != follow ]] || follow=(--follow)
  local first=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
  step "${kubectl[@]}" logs "--selector=$first" --tail=200 "${follow[@]}"
}

jobset_stop() { step "${kubectl[@]}" delete jobset "$name" --ignore-not-found --cascade=foreground; }

jobset_delete() {
  jobset_stop
  step "${kubectl[@]}" delete secret "$name-secrets" --ignore-not-found
  step "${kubectl[@]}" delete persistentvolumeclaim "$name-shared" --ignore-not-found
  step "${kubectl[@]}" delete persistentvolume "$name-shared" --ignore-not-found
}

# Runs a function while the reader is there.
with_reader() {
  [[ $image ]] || fail "--image is missing"
  [[ ! $shared ]] || filled gke_volume.yaml | applied # before the first run it is not there yet
  filled gke_reader.yaml | applied
  trap 'step "${kubectl[@]}" delete pod "$name-reader" --ignore-not-found --wait=false' EXIT
  patiently "${kubectl[@]}" wait --for=condition=Ready "pod/$name-reader" --timeout=300s
  "$@"
}

jobset_put() {
  (($#)) || fail "put: which files?"
  with_reader put_all "$@"
}

put_all() {
  local file
  step "${kubectl[@]}" exec "$name-reader" -- mkdir -p "/mnt/distil_jax/$name/data"
  for file in "$@"; do
    step "${kubectl[@]}" cp "$file" "$name-reader:/mnt/distil_jax/$name/data/"
  done
  tell "in the pods they are in /mnt/distil_jax/$name/data/"
}

jobset_fetch() {
  local folder=${1:?fetch: into which folder?}
  shift
  (($#)) || set -- export report evaluate summary.json
  with_reader fetch_all "$folder" "$@"
}

fetch_all() {
  local folder=$1 part=$1/.results.tar
  shift
  step mkdir -p "$folder"
  # What is there of it; tar says what is not, and goes on.
  local inside=(tar -cf - -C "/mnt/distil_jax/$name" --ignore-failed-read "$@")
  if [[ $dry_run ]]; then
    echo "$(shown "${kubectl[@]}" exec "$name-reader" -- "${inside[@]}") >$part"
  else
    "${kubectl[@]}" exec "$name-reader" -- "${inside[@]}" >"$part"
    [[ $(tar -tf "$part") ]] || fail "none of $* is there yet"
  fi
  step tar -xf "$part" -C "$folder"
  step rm "$part"
  tell "the results are in $folder"
}

main "$@"
