# shellcheck shell=bash
# What the launch scripts share: flags, dry runs, the meaning of exit codes. Sourced, not run.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# The user must fix something.
die() {
  say "$@"
  exit 2
}

# The comment at the head of the script is its help.
help() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# parse OPTIONS SWITCHES ARGUMENT...: --name VALUE or --name=VALUE sets the variable of that name, a switch sets it to 1.
# What follows -- is left in the array `command`: flags of spdf_jax.main, or another command.
parse() {
  local parse_options=" $1 " parse_switches=" $2 dry_run " parse_name
  shift 2
  dry_run=''
  while (($#)) && [[ $1 != -- ]]; do
    parse_name=${1#--} parse_name=${parse_name%%=*}
    if [[ $1 == --help ]]; then
      help
      exit 0
    elif [[ $1 == --* && $parse_switches == *" $parse_name "* && $1 != *=* ]]; then
      printf -v "$parse_name" 1
    elif [[ $1 == --* && $parse_options == *" $parse_name "* ]]; then
      if [[ $1 != *=* ]]; then
        (($# > 1)) || die "--$parse_name needs a value"
        shift
      fi
      [[ $1 != *[[:cntrl:]]* ]] || die "--$parse_name: a control character is in its value; leave it out"
      printf -v "$parse_name" %s "${1#"--$parse_name="}"
    else
      die "unknown argument $1: --help lists the flags, and what to run follows --"
    fi
    shift
  done
  command=("${@:2}")
  if ((${#command[@]} == 0)); then
    die "what to run is missing: -- and flags of spdf_jax.main, for example -- --config experiments/gpt2_mst.py"
  fi
  [[ ${command[0]} != --* ]] || command=(python -m spdf_jax.main --distributed "${command[@]}")
}

# need NAME EXAMPLE: the flag was given.
need() { [[ ${!1} ]] || die "--$1 is missing, for example --$1 $2"; }

# number LEAST NAME...: each flag is a whole number, LEAST or more.
number() {
  local least=$1 name
  for name in "${@:2}"; do
    if [[ ! ${!name} =~ ^(0|[1-9][0-9]{0,5})$ ]] || ((${!name} < least)); then
      die "--$name ${!name}: a whole number of at least $least is needed"
    fi
  done
}

# quote WORD...: one line that a shell reads back as these words.
quote() {
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# have COMMAND WHAT: the command is there, unless it is only to be printed.
have() { [[ $dry_run ]] || command -v "$1" >/dev/null || die "$1 is not there: $2"; }

# Runs a command, or with --dry_run prints it.
run() {
  if [[ $dry_run ]]; then quote "$@"; else "$@"; fi
}

# worst CODE...: 2 (fix something) before a crash before 75 (start again) before 0.
worst() {
  local code result=0
  for code; do
    case $result,$code in
      2,* | *,0) ;;
      *,2 | 0,* | 75,*) result=$code ;;
    esac
  done
  echo "$result"
}

# read_topology v5e:16x16 (or v5e-256): what that pod is called elsewhere. The same words as --plan_topology's.
# shellcheck disable=SC2034  # for the scripts that source this
read_topology() {
  local each=2 sizes=(2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16)
  if [[ $1 =~ ^(v4|v5e|v5litepod|v5p|v6e|tpu7x)-([1-9][0-9]{0,5})$ ]]; then # cores; of v5e and v6e, chips
    if [[ $1 == v5e-* || $1 == v5litepod-* || $1 == v6e-* ]]; then each=1 sizes=(2x2 2x4 4x4 4x8 8x8 8x16 16x16); fi
    for shape in "${sizes[@]}"; do
      if ((each * (${shape//x/*}) == BASH_REMATCH[2])); then set -- "${BASH_REMATCH[1]/v5litepod/v5e}:$shape"; fi
    done
  fi
  shape=${1#*:}
  case $1 in
    v4:*) gcloud_type=v4 gcloud_runtime=tpu-ubuntu2204-base gke_accelerator=tpu-v4-podslice ;;
    v5e:*) gcloud_type=v5litepod gcloud_runtime=v2-alpha-tpuv5-lite gke_accelerator=tpu-v5-lite-podslice ;;
    v5p:*) gcloud_type=v5p gcloud_runtime=v2-alpha-tpuv5 gke_accelerator=tpu-v5p-slice ;;
    v6e:*) gcloud_type=v6e gcloud_runtime=v2-alpha-tpuv6e gke_accelerator=tpu-v6e-slice ;;
    tpu7x:*) gcloud_type='' gcloud_runtime='' gke_accelerator=tpu7x ;;
    *) die "--topology $1: v4, v5e, v5p, v6e or tpu7x, a colon and a shape are needed, for example v5e:16x16" ;;
  esac
  [[ $shape =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] || die "--topology $1: $shape is no shape; 16x16 and 4x4x4 are"
}

# run_reported COMMAND...: runs what starts processes elsewhere under report.sh. Leaves the worst of their exit codes in `code`.
run_reported() {
  local log status=0
  log=$(mktemp)
  run "$@" 2>&1 | tee "$log" || status=$?
  # shellcheck disable=SC2046
  code=$(worst "$status" $(sed -n 's/.*process ended with exit code \([0-9]*\)$/\1/p' "$log"))
  rm "$log"
}
