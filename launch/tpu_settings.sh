# Sourced by tpu_pod.sh and tpu_babysit.sh: what a slice is, from flags and a file. Wants `fail` of setup_venv.sh.
# shellcheck shell=bash disable=SC2034 # what is set here is read there

declare -A setting=(
  [name]=distil-jax       # of the slice, and of the run's folder in the shared one
  [project]=""            # empty: gcloud's own
  [zone]=""               # of the slice
  [topology]=v5e:4x4      # as `distil-jax compile` takes it
  [version]=""            # of the VM's image; empty: the one for the chip
  [spot]=no               # yes: cheaper, and taken away at any time
  [queued]=no             # yes: a queued resource, which waits for its turn
  [reserved]=no           # yes: of a reservation
  [internal]=no           # yes: without external addresses; this machine must then be in the same network
  [network]=""            # empty: "default"
  [subnetwork]=""
  [service_account]=""    # of the workers; empty: Compute Engine's
  [shared]=""             # HOST:/EXPORT of an NFS server, or none for a slice of one worker
  [mount]=/mnt/distil_jax # where workers see it
  [wait_hours]=24         # for a slice to become ready
)

# read_settings ARGUMENTS...: fills `setting` from --KEY VALUE, --spot and the like, --settings FILE; `dry_run` from
# --dry-run; `words` with what is no flag and with all that stands behind `--`. Flags win over the file.
read_settings() {
  local key value line number=0 file=""
  local -A given=()
  words=()
  while (($#)); do
    case $1 in
      --) shift; words+=("$@"); break ;;
      --dry-run) dry_run=yes; shift; continue ;;
      --*) ;;
      *) words+=("$1"); shift; continue ;;
    esac
    key=${1#--} key=${key%%=*} key=${key//-/_} value=yes
    if [[ $1 == *=* ]]; then
      value=${1#*=}
    elif [[ ! $key =~ ^(spot|queued|reserved|internal)$ ]]; then
      (($# > 1)) || fail "$1 wants a value"
      value=$2
      shift
    fi
    if [[ $key == settings ]]; then
      file=$value
    else
      [[ -v setting[$key] ]] || fail "there is no setting $key; there are: ${!setting[*]}"
      given[$key]=$value
    fi
    shift
  done
  if [[ $file ]]; then
    [[ -r $file ]] || fail "$file: no such file"
    while IFS= read -r line || [[ $line ]]; do
      number=$((number + 1))
      line=${line%%#*}
      [[ $line =~ ^[[:space:]]*$ ]] && continue
      [[ $line =~ ^[[:space:]]*([a-z_]+)[[:space:]]*=[[:space:]]*(.*[^[:space:]])?[[:space:]]*$ ]] ||
        fail "$file, line $number: a line is KEY = VALUE"
      key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]:-}
      [[ -v setting[$key] ]] || fail "$file, line $number: there is no setting $key; there are: ${!setting[*]}"
      setting[$key]=$value
    done <"$file"
  fi
  for key in "${!given[@]}"; do
    setting[$key]=${given[$key]}
  done
  check_settings
}

check_settings() {
  local key
  [[ ${setting[name]} =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] ||
    fail "name=${setting[name]}: small letters, digits and hyphens, a letter first"
  [[ ${setting[zone]} ]] || fail "--zone, or zone in the settings file, is missing: for example us-west4-a"
  for key in spot queued reserved internal; do
    [[ ${setting[$key]} =~ ^(yes|no)$ ]] || fail "$key=${setting[$key]}: it is yes or no"
  done
  [[ ${setting[mount]} == /* ]] || fail "mount=${setting[mount]}: it is an absolute path"
  [[ ${setting[wait_hours]} =~ ^[0-9]+$ ]] || fail "wait_hours=${setting[wait_hours]}: it is a number"
  read_topology
  case ${setting[shared]} in
    none) ((hosts == 1)) || fail "shared=none, and ${setting[topology]} has $hosts workers: they need one folder" ;;
    gs://*)
      fail "shared=${setting[shared]}: a mounted bucket shows a file that grows when it is closed, and renames a folder" \
        "file by file; metrics and checkpoints need more: an NFS server, for instance Filestore (docs/scale.md)"
      ;;
    *:/*) ;;
    *) fail "shared=${setting[shared]}: HOST:/EXPORT of an NFS server in the slice's network (docs/scale.md)" ;;
  esac
}

# From the topology: accelerator_type as gcloud has it, hosts, and the image's version.
read_topology() {
  local chip shape size chips=1 per_host
  IFS=: read -r chip shape <<<"${setting[topology]}"
  [[ $shape =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || fail "topology=${setting[topology]}: for example v5e:4x4 or v4:2x2x2"
  for size in ${shape//x/ }; do
    chips=$((chips * size))
  done
  per_host=$((chips < 4 ? chips : 4))
  case $chip in # v4 and v5p are counted in cores
    v4) accelerator_type=v4-$((2 * chips)) ;;
    v5p) accelerator_type=v5p-$((2 * chips)) ;;
    v5e) accelerator_type=v5litepod-$chips ;;
    v6e) accelerator_type=v6e-$chips ;;
    *) fail "topology=${setting[topology]}: TPU VMs are v4, v5e, v5p and v6e; for later chips use launch/gke.sh" ;;
  esac
  [[ $chip == v[56]e && $chips == 8 ]] && per_host=8
  hosts=$((chips / per_host))
  local -A versions=([v4]=tpu-ubuntu2204-base [v5e]=v2-alpha-tpuv5-lite [v5p]=v2-alpha-tpuv5 [v6e]=v2-alpha-tpuv6e)
  : "${setting[version]:=${versions[$chip]}}"
}
