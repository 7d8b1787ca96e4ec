#!/usr/bin/env bash
# The 24 published experiments, one after the other; set-up, demo and tests. From any folder.
#
#   bash command.sh              runs the list below. What is finished is skipped, what was stopped goes on: the same
#                                command continues. One that fails does not keep the next from running; the last lines
#                                tell what became of each, and the exit status is 1 if any failed. Ctrl-C stops all
#   bash command.sh --dry-run    prints the list
#   bash command.sh demo         a teacher, a small student alone and with SSKD, in minutes on a CPU and without data
#   bash command.sh setup        installs what requirements.txt names
#   bash command.sh test         lint and tests; test-slow: those that take minutes (both hand further words to pytest)
#
# An active virtual or conda environment is used as it is: only `setup` installs into it. Without one: .venv; or python3,
# if it has all that is needed; or else .venv is made here and filled.

set -u
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")" || exit 1

published() {
  # teachers
  python teacher.py --arch wrn_40_2 --lr 0.05
  python teacher.py --arch resnet56 --lr 0.05
  python teacher.py --arch resnet32x4 --lr 0.05
  python teacher.py --arch vgg13 --lr 0.05
  python teacher.py --arch ResNet50 --lr 0.05
  # the students' networks alone
  python teacher.py --arch wrn_16_2 --lr 0.05
  python teacher.py --arch wrn_40_1 --lr 0.05
  python teacher.py --arch resnet20 --lr 0.05
  python teacher.py --arch resnet8x4 --lr 0.05
  python teacher.py --arch vgg8 --lr 0.05
  python teacher.py --arch MobileNetV2 --lr 0.01
  python teacher.py --arch ShuffleV1 --lr 0.01
  python teacher.py --arch ShuffleV2 --lr 0.01
  # similar architectures
  python student.py --t-path experiments/teacher_wrn_40_2_seed0 --s-arch wrn_16_2 --lr 0.05
  python student.py --t-path experiments/teacher_wrn_40_2_seed0 --s-arch wrn_40_1 --lr 0.05
  python student.py --t-path experiments/teacher_resnet56_seed0 --s-arch resnet20 --lr 0.05
  python student.py --t-path experiments/teacher_resnet32x4_seed0 --s-arch resnet8x4 --lr 0.05
  python student.py --t-path experiments/teacher_vgg13_seed0 --s-arch vgg8 --lr 0.05
  # cross architectures
  python student.py --t-path experiments/teacher_vgg13_seed0 --s-arch MobileNetV2 --lr 0.01
  python student.py --t-path experiments/teacher_ResNet50_seed0 --s-arch MobileNetV2 --lr 0.01
  python student.py --t-path experiments/teacher_ResNet50_seed0 --s-arch vgg8 --lr 0.05
  python student.py --t-path experiments/teacher_resnet32x4_seed0 --s-arch ShuffleV1 --lr 0.01
  python student.py --t-path experiments/teacher_resnet32x4_seed0 --s-arch ShuffleV2 --lr 0.01
  python student.py --t-path experiments/teacher_wrn_40_2_seed0 --s-arch ShuffleV1 --lr 0.01
}

demo() { # a teacher that has seen 2,000 drawn images, and a student that has seen 200 of them, alone and with SSKD
  local images="--dataset synthetic --train-size 2000 --test-size 500 --batch-size 16 --experiments experiments/demo"
  local tenth="--few-shot 0.1 --epoch 40 --milestones 25 35"
  python teacher.py --arch resnet14 $images --epoch 14 --milestones 9 12
  python teacher.py --arch resnet8 $images $tenth
  python student.py --t-path experiments/demo/teacher_resnet14_seed0 --s-arch resnet8 $images $tenth --t-epoch 5 --t-milestones 4
}

die() { # MESSAGE
  echo "command.sh: $1" >&2
  exit 2
}

lacking() { # FILE …: prints what these requirements files name and $interpreter does not have, or has too old
  "$interpreter" - "$@" <<'END'
import re, sys
from importlib.metadata import version

def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)[:2]]

def has(name, oldest):
    try:
        return numbers(version(name)) >= numbers(oldest)
    except Exception:  # it is not there, or only a part of it
        return False

lines = "".join(open(name).read() for name in sys.argv[1:])
print(*(name for name, oldest in re.findall(r"^([\w-]+)\S*>=([\d.]+)", lines, re.M) if not has(name, oldest)))
END
}

need() { # FILE …: chooses $interpreter and sees to it that it has what these requirements files name
  local active=${VIRTUAL_ENV:-${CONDA_PREFIX-}} maker missing own=""
  interpreter=python3
  if [ -n "$active" ]; then
    interpreter=$active/bin/python
  elif maker=$(cat .venv/unfinished 2>/dev/null); then # a call was stopped while it made .venv, or is at it now
    if [ "$maker" != $$ ] && kill -0 "$maker" 2>/dev/null; then
      die "process $maker seems to be making .venv: wait for it, or delete .venv"
    fi
  elif [ -x .venv/bin/python ]; then
    interpreter=.venv/bin/python
  fi
  command -v "$interpreter" >/dev/null || die "there is no $interpreter: install or activate Python 3.10 or newer"
  "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$interpreter is older than Python 3.10"
  missing=$(lacking "$@") || exit 1
  if [ -z "$missing" ]; then return; fi
  if [ -n "$active" ] && [ "$word" != setup ]; then
    die "$active lacks $missing: $interpreter -m pip install ${*/#/-r }"
  fi
  if [ "$interpreter" = python3 ]; then
    if [ -z "$(lacking requirements.txt)" ]; then own=--system-site-packages; fi # only the tests' own are missing
    mkdir -p .venv && echo $$ >.venv/unfinished || exit 1
    find .venv -mindepth 1 ! -path .venv/unfinished -delete # what is left of one that does not work
    python3 -m venv $own .venv || die "python3 -m venv failed (on Debian and Ubuntu: apt-get install python3-venv)"
    interpreter=.venv/bin/python
  fi
  echo "command.sh: installing into ${active:-.venv}: $missing" >&2
  "$interpreter" -m pip install --quiet --disable-pip-version-check "${@/#/-r}" || die "pip could not install $missing"
  rm -f .venv/unfinished
}

stopped="" failed="" report=""

python() { # SCRIPT --FLAG VALUE …: runs one command of a list and notes what became of it
  local outcome="not run" status=1
  if [[ -z "$stopped" && "$failed" = *" ${3##*/} "* ]]; then
    outcome="left out" # its teacher failed
  elif [ -z "$stopped" ]; then
    echo "python $*"
    "$interpreter" "$@"
    status=$?
    outcome="failed ($status)"
    if [ -n "$stopped" ]; then outcome=stopped; fi
    if [ "$status" = 0 ]; then outcome=finished; fi
  fi
  if [ "$status" != 0 ]; then failed+=" teacher_$3_seed0 "; fi
  report+=$(printf '\n%-12s python %s' "$outcome" "$*")
}

run() { # LIST: its commands, one after the other, and a summary
  need requirements.txt
  trap 'stopped=130' INT # after the command that runs, which Ctrl-C has reached, too
  "$1"
  echo "$report"
  if [ -n "$stopped$failed" ]; then exit "${stopped:-1}"; fi
}

word=${1-} words="--dry-run setup demo test test-slow (--help tells more)"
case "$*" in
  "") if [ $# = 0 ]; then run published; else die "an empty word is none of $words"; fi ;;
  --dry-run) python() { echo "python $*"; } && published ;;
  setup) need requirements.txt && echo "$interpreter has what requirements.txt names" ;;
  demo)
    run demo
    echo
    "$interpreter" experiments/table.py experiments/demo --dataset synthetic && cat <<'END'

What it shows: all three steps run here, and SSKD's student is above the same network, trained alone on the same 200
images (and below its teacher, which saw all 2,000). Seeds 0 to 4 gave 48.2 ± 3.2 against 34.7 ± 3.6, and a gain of 6
to 21 points in each.
What it does not show: how SSKD compares with other distillation, or anything about photographs; these are drawn shapes.
END
    ;;
  test | "test "*)
    need requirements*.txt
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a process a core, and none of them waits for another's threads
    "$interpreter" -m ruff check . && "$interpreter" -m ruff format --check . && "$interpreter" -m pytest -n auto --maxprocesses 8 "${@:2}"
    ;;
  test-slow | "test-slow "*) need requirements*.txt && "$interpreter" -m pytest -m slow "${@:2}" ;;
  -h | --help) sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]##*/}" ;;
  *) die "$* is none of $words" ;;
esac
