#!/usr/bin/env bash
# Set-up, demo, tests and every published experiment, from any folder.
#
#   bash command.sh              all: the 13 teachers, then the 11 students of both published tables
#   bash command.sh teachers     the teachers, and the students' networks trained alone
#   bash command.sh similar      the students of the first table, from teachers that are there already
#   bash command.sh cross        those of the second
#   bash command.sh table        the accuracies so far beside the published ones (--markdown, a folder)
#
#   bash command.sh setup        makes .venv with what requirements.txt names, if Python lacks it
#   bash command.sh demo         a teacher, a small student alone and with SSKD, in minutes on a CPU
#   bash command.sh test         lint and tests (test-slow: those that take longer)
#   bash command.sh bench        how fast it is (experiments/bench.py and its flags)
#   bash command.sh study        the comparison of experiments/README.md: hours on 2 cores. GPUS="0 0" runs two at a time
#
# The first four, demo and study take --dry-run, which prints the commands, one a line. A run that is finished is
# skipped and one that was stopped goes on, so the same command continues everything; one that fails does not keep the
# next from running. The last lines tell what became of each; the exit status is 1 if any failed.
#
# Set in front, as in `SEEDS="0 1 2" GPUS="0 1" bash command.sh similar`:
#   SEEDS="0 1 2"                  repeats the experiments, teachers included, with these seeds
#   GPUS="0 0 1 1"                 slots, each running one command at a time on that GPU: here two on each of two.
#                                  All take from one queue, and write to <runs>/logs
#   FLAGS="--amp bf16 --compile"   for every command; STUDENT_FLAGS="--few-shot 0.25" for student.py only
#   DATASET=cifar10                with its runs in experiments/cifar10 (demo: in experiments/demo_cifar10)
#   METHODS="ce kd tf sskd"        for each pair: the student alone, KD, KD + tf (no ss), SSKD. Default: sskd
#   PAIRS="resnet20:resnet8 …"     teacher:student pairs instead of the published ones, with only their teachers
#   PYTHON=python3.12              the interpreter. Default: .venv's if there is one, else python3

set -u
case ${PYTHON-} in [!/]*/*) PYTHON=$PWD/$PYTHON ;; esac # it is about to be looked at from another folder
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")" || exit 1

TEACHERS="wrn_40_2 resnet56 resnet32x4 vgg13 ResNet50
  wrn_16_2 wrn_40_1 resnet20 resnet8x4 vgg8 MobileNetV2 ShuffleV1 ShuffleV2" # from wrn_16_2 on: students alone
SIMILAR="wrn_40_2:wrn_16_2 wrn_40_2:wrn_40_1 resnet56:resnet20 resnet32x4:resnet8x4 vgg13:vgg8"
CROSS="vgg13:MobileNetV2 ResNet50:MobileNetV2 ResNet50:vgg8 resnet32x4:ShuffleV1 resnet32x4:ShuffleV2 wrn_40_2:ShuffleV1"
PARTS="all teachers similar cross table setup demo study test test-slow bench"

python=${PYTHON:-python3}
if [ -z "${PYTHON-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
runs=experiments${DATASET:+/$DATASET}
if [ "${DATASET-}" = cifar100 ]; then runs=experiments; fi
FLAGS=${FLAGS-} STUDENT_FLAGS=${STUDENT_FLAGS-}
FLAGS=${FLAGS//$'\n'/ } STUDENT_FLAGS=${STUDENT_FLAGS//$'\n'/ }

die() { # MESSAGE
  echo "command.sh: $1" >&2
  exit 2
}

# ------------------------------------------------------------------------------------------------------------ set-up

has() { # PYTHON FILE: does PYTHON have everything that a requirements file names? 3: it is too old
  "$1" - "$2" <<'END'
import re, sys

if sys.version_info < (3, 10):
    sys.exit(3)
from importlib.metadata import PackageNotFoundError, version

def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)[:2]]

def complete(name):
    for line in open(name):
        wanted = re.match(r"([\w-]+)>=(\S+)", line)
        if wanted and numbers(version(wanted[1])) < numbers(wanted[2]):
            return False
        if line.startswith("-r ") and not complete(line[3:].strip()):
            return False
    return True

try:
    sys.exit(not complete(sys.argv[1]))
except PackageNotFoundError:
    sys.exit(1)
END
}

setup() { # FILE: sees to it that $python has what a requirements file names, in .venv if need be
  command -v "$python" >/dev/null || die "there is no $python; PYTHON=… names the interpreter"
  has "$python" "$1" && return
  if [ $? = 3 ]; then die "$python is too old, Python 3.10 or newer is needed; PYTHON=… names another"; fi
  if [ ! -x .venv/bin/python ]; then
    local packages=()
    if has "$python" requirements.txt; then packages=(--system-site-packages); fi # only the tests' own are missing
    echo "setup: making .venv" >&2
    "$python" -m venv ${packages[@]+"${packages[@]}"} .venv || {
      rm -rf .venv
      die "$python -m venv failed (on Debian and Ubuntu: apt-get install python3-venv)"
    }
  fi
  if [ -n "${PYTHON-}" ]; then echo "setup: $PYTHON lacks what $1 names, .venv is used" >&2; fi
  python=.venv/bin/python
  has "$python" "$1" && return
  echo "setup: installing what $1 names into .venv" >&2
  "$python" -m pip install --quiet --disable-pip-version-check -r "$1" || die "pip could not install $1 into .venv"
}

# ------------------------------------------------------------------------------------------------------- the commands

COMMANDS=() # without the interpreter
NAMES=()    # of their logs; a teacher's is its folder's
students="" # where the students begin: teachers come first

add() { # NAME COMMAND: unless it is there already, as a teacher that two pairs share
  local known
  for known in ${COMMANDS[@]+"${COMMANDS[@]}"}; do
    if [ "$known" = "$2" ]; then return; fi
  done
  NAMES+=("$1")
  COMMANDS+=("$2")
}

options() { # SEED: the flags of every command
  if [ "$runs" != experiments ]; then printf ' --dataset %s --experiments %s' "$DATASET" "$runs"; fi
  if [ -n "${SEEDS-}" ]; then printf ' --seed %s' "$1"; fi
  if [ -n "$FLAGS" ]; then printf ' %s' "$FLAGS"; fi
}

rate() { # NETWORK: its published learning rate
  case $1 in
    MobileNetV2 | ShuffleV1 | ShuffleV2) echo 0.01 ;;
    *) echo 0.05 ;;
  esac
}

teacher() { # NETWORK SEED
  add "teacher_$1_seed$2" "teacher.py --arch $1 --lr $(rate "$1")$(options "$2")"
}

student() { # TEACHER STUDENT METHOD SEED
  local weights="" name=student_$2_$3_seed$4_teacher_$1${STUDENT_FLAGS:+_$STUDENT_FLAGS}
  name=${name//[ \/]/_}
  case $3 in
    ce) return ;; # among the teachers
    kd) weights=" --tf-weight 0 --ss-weight 0" ;;
    tf) weights=" --ss-weight 0" ;;
  esac
  add "${name:0:200}" "student.py --t-path $runs/teacher_$1_seed$4 --s-arch $2 --lr $(rate "$2")$weights$(options "$4")${STUDENT_FLAGS:+ $STUDENT_FLAGS}"
}

check() { # METHODS PAIRS: dies if a variable holds what can't be, or a flag is not where it belongs
  local method pair seed flag
  for method in $1; do
    case $method in
      ce | kd | tf | sskd) ;;
      *) die "METHODS: $method is none of ce kd tf sskd" ;;
    esac
  done
  for pair in $2; do
    case $pair in *?:?*) ;; *) die "PAIRS: $pair is no teacher:student" ;; esac
  done
  for seed in ${SEEDS:-0} ${GPUS-}; do
    case $seed in *[!0-9]* | 0?*) die "SEEDS and GPUS hold whole numbers, not $seed" ;; esac
  done
  for flag in $FLAGS $STUDENT_FLAGS; do
    case ${flag%%=*} in
      --seed) die "--seed goes into SEEDS, for teachers and students alike" ;;
      --dataset | --experiments) die "${flag%%=*} cannot be in FLAGS: DATASET=… chooses the data set and its folder" ;;
      --t-path | --s-arch | --arch) die "${flag%%=*} cannot be in FLAGS: PAIRS=… names the networks" ;;
      --tf-weight | --ss-weight)
        case " $1 " in *" kd "* | *" tf "*) die "METHODS=kd and tf set --tf-weight and --ss-weight themselves" ;; esac
        ;;
    esac
  done
  for flag in $FLAGS; do
    case ${flag%%=*} in
      --few-shot | --label-noise) die "${flag%%=*} goes into STUDENT_FLAGS: the teachers see all data and true labels" ;;
    esac
  done
}

list() { # PART: fills COMMANDS and NAMES
  local seed pair method arch teachers="" pairs=${PAIRS:-$SIMILAR $CROSS} methods=${METHODS:-sskd}
  check "$methods" "$pairs"
  case $1 in
    similar | cross) if [ -n "${PAIRS-}" ]; then die "PAIRS does not go with $1, which names its own pairs"; fi ;;
  esac
  case $1 in
    similar) pairs=$SIMILAR ;;
    cross) pairs=$CROSS ;;
    *) # the teachers too
      if [ -n "${PAIRS-}" ]; then
        for pair in $pairs; do teachers+=" ${pair%:*}"; done
      else
        teachers=$TEACHERS
      fi
      ;;
  esac
  case " $methods " in *" ce "*) for pair in $pairs; do teachers+=" ${pair#*:}"; done ;; esac

  for seed in ${SEEDS:-0}; do
    for arch in $teachers; do teacher "$arch" "$seed"; done
  done
  students=${students:-${#COMMANDS[@]}}
  if [ "$1" = teachers ]; then return; fi
  for seed in ${SEEDS:-0}; do
    for pair in $pairs; do
      for method in $methods; do student "${pair%:*}" "${pair#*:}" "$method" "$seed"; done
    done
  done
}

# --------------------------------------------------------------------------------------------------------- their queue

# A slot takes the next command by making its folder, $work/N, which only one slot can do, and leaves its outcome there.
# Slots are process groups of their own (set -m): Ctrl-C reaches this script alone, which then tells them, once.

worker() { # SLOT GPU FIRST END: runs those of the commands FIRST to END - 1 that no other slot has taken
  local i status words place log="" child="" told=""
  tell() {
    if [ -n "$child" ] && [ -z "$told" ]; then
      told=1
      kill -TERM "$child" 2>/dev/null
    fi
  }
  trap tell TERM
  for ((i = $3; i < $4; i++)); do
    mkdir "$work/$i" 2>/dev/null || continue
    if [ -e "$work/stop" ] || ! kill -0 $$ 2>/dev/null; then return; fi # the second: this script was killed
    read -ra words <<<"${COMMANDS[i]}${2:+ --gpu-id $2}"
    place="[$((i + 1))/${#COMMANDS[@]}]"
    if [ "${words[0]}" = student.py ] && unfinished "${words[2]}"; then
      echo "$place left out, its teacher is not finished: ${NAMES[i]}"
      echo "left out, no teacher" >"$work/$i/outcome"
      continue
    fi
    if [ "$slots" -gt 1 ]; then
      log=$runs/logs/${NAMES[i]}.log
      echo "$place begins on slot $1, GPU $2: ${NAMES[i]}, log in $log"
    else
      echo "$place python ${words[*]}"
    fi
    (
      if [ -n "$log" ]; then exec >>"$log" 2>&1; fi
      exec "$python" "${words[@]}" </dev/null
    ) &
    child=$!
    if [ -e "$work/stop" ]; then tell; fi # the signal came before the child was known
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do # it was a signal that ended the wait
      wait "$child"
      status=$?
    done
    child=""
    if [ "$status" = 0 ]; then echo finished; else echo "failed ($status)"; fi >"$work/$i/outcome"
    if [ "$slots" -gt 1 ]; then echo "$place ends: ${NAMES[i]}, $(cat "$work/$i/outcome")"; fi
  done
}

unfinished() { # FOLDER: of a teacher; one that failed half-way has a best checkpoint all the same
  local i
  if [ -e "$1/config.json" ] && [ ! -e "$1/result.json" ]; then return 0; fi
  for ((i = 0; i < students; i++)); do # a finished one of other flags may lie there
    if [ "${NAMES[i]}" = "${1##*/}" ] && [ "$(cat "$work/$i/outcome")" != finished ]; then return 0; fi
  done
  return 1
}

run() { # FIRST END: runs these commands on all slots and waits for the last
  local slot=0 gpu
  set -m
  for gpu in ${GPUS:-""}; do
    slot=$((slot + 1))
    worker "$slot" "$gpu" "$1" "$2" &
  done
  set +m
  wait
}

stop() { # SIGNAL
  local pid
  trap '' INT TERM HUP
  touch "$work/stop"
  for pid in $(jobs -pr); do kill -TERM "$pid" 2>/dev/null; done
  wait
  summary
  exit $((128 + $1))
}

summary() { # what became of each command; fails if any did not finish
  local i outcome failed=0
  echo
  for i in "${!COMMANDS[@]}"; do
    outcome="not run"
    if [ -e "$work/$i/outcome" ]; then outcome=$(cat "$work/$i/outcome"); fi
    if [ "$outcome" != finished ]; then failed=1; fi
    printf '%-20s  python %s\n' "$outcome" "${COMMANDS[i]}"
  done
  return $failed
}

perform() { # PART [--dry-run]: runs COMMANDS
  case "$*" in "$1" | "$1 --dry-run") ;; *) die "$1 takes --dry-run, not ${*:2}" ;; esac
  if [ ${#COMMANDS[@]} = 0 ]; then die "SEEDS or PAIRS name nothing to run"; fi
  if [ -n "${2-}" ]; then
    printf 'python %s\n' "${COMMANDS[@]}"
    return
  fi
  setup requirements.txt
  slots=$(wc -w <<<"${GPUS:-0}")
  work=$(mktemp -d) || exit 1
  trap 'rm -rf "$work"' EXIT
  trap 'stop 2' INT
  trap 'stop 15' TERM
  trap 'stop 1' HUP
  if [ "$slots" -gt 1 ]; then mkdir -p "$runs/logs" || exit 1; fi
  run 0 "$students"
  run "$students" ${#COMMANDS[@]}
  summary
}

# ------------------------------------------------------------------------------------------------------------ the demo

own() { # PART VARIABLES: dies if one of these, which the part sets itself, is set
  local name
  for name in "${@:2}"; do
    if [ -n "${!name-}" ]; then die "$1 sets $name itself"; fi
  done
}

demo() { # small enough for 2 CPU cores: about 3 minutes
  own demo PAIRS METHODS
  DATASET=${DATASET:-synthetic}
  runs=experiments/demo_$DATASET
  PAIRS=resnet20:resnet8 METHODS="ce sskd"
  FLAGS="--train-size 2000 --test-size 1000 --epoch 12 --milestones 8 10${FLAGS:+ $FLAGS}"
  STUDENT_FLAGS="--t-epoch 4 --t-milestones 2 3${STUDENT_FLAGS:+ $STUDENT_FLAGS}"
  list all
  perform demo "$@" || return
  if [ $# = 0 ]; then echo && "$python" experiments/table.py "$runs" --dataset "$DATASET"; fi
}

# ----------------------------------------------------------------------------------------------------------- the study

study() { # alone, KD, KD + tf and SSKD on Fashion-MNIST, then KD and SSKD with few or noisy labels; same teachers in all
  own study DATASET PAIRS METHODS
  case " $STUDENT_FLAGS " in *" --few-shot"* | *" --label-noise"*) die "study sets --few-shot and --label-noise itself" ;; esac
  local failed=0 more=$STUDENT_FLAGS setting
  DATASET=fashion_mnist runs=experiments/fashion_mnist PAIRS=resnet20:resnet8 SEEDS=${SEEDS:-0 1 2 3 4}
  FLAGS="--train-size 5000 --epoch 24 --milestones 15 18 21 --amp bf16${FLAGS:+ $FLAGS}"
  METHODS="ce kd tf sskd"
  for setting in "" " --few-shot 0.25" " --label-noise 0.3"; do
    STUDENT_FLAGS="--t-epoch 6 --t-milestones 3 5$setting${more:+ $more}"
    list all
    METHODS="kd sskd"
  done
  perform study "$@" || failed=$?
  if [ $# = 0 ]; then echo && "$python" experiments/table.py "$runs" --dataset "$DATASET"; fi
  return "$failed"
}

if [ "${1-}" = --dry-run ]; then set -- "${2-all}" --dry-run "${@:3}"; fi
part=${1-all}
if [ $# -gt 0 ]; then shift; fi
case $part in
  all | teachers | similar | cross) list "$part" && perform "$part" "$@" ;;
  table) "$python" experiments/table.py ${DATASET:+--dataset "$DATASET"} "$@" ;;
  setup) setup requirements.txt ;;
  demo | study) "$part" "$@" ;;
  test)
    setup requirements-test.txt
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a process a core, and none of them waits for another's threads
    "$python" -m ruff check . && "$python" -m ruff format --check . && "$python" -m pytest -n auto --maxprocesses 8 "$@"
    ;;
  test-slow) setup requirements-test.txt && "$python" -m pytest -m slow "$@" ;;
  bench) setup requirements.txt && "$python" experiments/bench.py "$@" ;;
  -h | --help) sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]##*/}" ;;
  *) die "$part is none of $PARTS" ;;
esac
