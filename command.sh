#!/usr/bin/env bash
# Runs the 24 published experiments; also set-up, demo and tests.
#
#   bash command.sh              runs the list below and goes on after a failure; students of a failed teacher are left
#                                out. Ctrl-C stops everything; the same command skips or resumes what has been run
#   bash command.sh --dry-run    prints the list
#   bash command.sh demo         trains a teacher and a small student, alone and with SSKD: minutes on a CPU, no data
#   bash command.sh setup        installs requirements.txt
#   bash command.sh test         lint and tests; test-slow: the slow tests (further words go to pytest)
#
# Only `setup` installs into an active virtual or conda environment. Without an active one, .venv is used, or python3 if
# it has all that is needed; otherwise .venv is created and filled.

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

demo() { # a teacher trained on 2,000 generated images; a student trained on 200 of them, alone and with SSKD
  local images=(--dataset synthetic --train-size 2000 --test-size 500 --batch-size 16 --experiments experiments/demo)
  local tenth=(--few-shot 0.1 --epoch 40 --milestones 25 35)
  python teacher.py --arch resnet14 "${images[@]}" --epoch 14 --milestones 9 12
  python teacher.py --arch resnet8 "${images[@]}" "${tenth[@]}"
  python student.py --t-path experiments/demo/teacher_resnet14_seed0 --s-arch resnet8 "${images[@]}" "${tenth[@]}" \
    --t-epoch 5 --t-milestones 4
  grep best_acc experiments/demo/*/result.json 2>/dev/null # teacher, student alone, student with SSKD
  [ -n "$failed" ] || cat <<'END'

SSKD helps here: with seeds 0 to 4 the student reached 48.2 ± 3.2 with it and 34.7 ± 3.6 alone, and it gained 6 to 21
points with each seed. The demo does not compare other methods, and its images are generated: photographs may differ.
END
}

die() { # MESSAGE
  echo "command.sh: $1" >&2
  exit 2
}

satisfied() { # FILE ...: does $interpreter have what these requirements files name? Needs neither pip nor network
  "$interpreter" - "$@" <<'END' 2>/dev/null
import fileinput, importlib.metadata, packaging.requirements
for line in fileinput.input():
    if line[0].isalpha():
        requirement = packaging.requirements.Requirement(line.strip())
        assert importlib.metadata.version(requirement.name) in requirement.specifier
END
}

need() { # FILE ...: chooses $interpreter and, where that is allowed, installs what these requirements files name
  local active=${VIRTUAL_ENV:-${CONDA_PREFIX-}}
  interpreter=${active:-.venv}/bin/python
  if [ -z "$active" ] && [ ! -x .venv/bin/python ]; then interpreter=python3; fi
  "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    die "$interpreter is missing or older than Python 3.10: install it, or activate an environment that has it"
  if satisfied "$@"; then return; fi
  if [ -n "$active" ] && [ "$word" != setup ]; then
    die "$active lacks required packages: $interpreter -m pip install ${*/#/-r }"
  fi
  if [ -z "$active" ] && ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none yet, or it is incomplete
    python3 -m venv --clear .venv || die "python3 -m venv failed (on Debian and Ubuntu: apt-get install python3-venv)"
    interpreter=.venv/bin/python
  fi
  "$interpreter" -m pip install --disable-pip-version-check "${@/#/-r}" || die "pip failed, see above"
}

failed="" summary=""

python() { # SCRIPT --FLAG VALUE ...: runs one command of a list and adds what became of it to the summary
  local outcome=finished
  if [[ "$failed" = *" ${3##*/} "* ]]; then
    outcome="left out" # a student whose teacher failed
  else
    echo "python $*"
    "$interpreter" "$@" || outcome="failed ($?)"
  fi
  if [ "$outcome" != finished ]; then failed="$failed teacher_$3_seed0 "; fi
  summary="$summary$(printf '\n%-12s python %s' "$outcome" "$*")"
}

run() { # LIST: runs its commands and prints the summary
  need requirements.txt
  trap 'echo "$summary"; exit 130' INT # bash first waits for the running command, which Ctrl-C also reaches
  "$1"
  echo "$summary"
  if [ -n "$failed" ]; then exit 1; fi
}

word=${1-}
case "$*" in
  "") run published ;;
  --dry-run) python() { echo "python $*"; } && published ;;
  setup) need requirements.txt && echo "$interpreter has everything in requirements.txt" ;;
  demo) run demo ;;
  test | "test "*)
    need requirements*.txt
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one thread per process: pytest already uses every core
    "$interpreter" -m ruff check . && "$interpreter" -m ruff format --check . &&
      "$interpreter" -m pytest -n auto --maxprocesses 8 "${@:2}"
    ;;
  test-slow | "test-slow "*) need requirements*.txt && "$interpreter" -m pytest -m "${word#test-}" "${@:2}" ;;
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]##*/}" ;;
  *) die "unknown: $*. Known: --dry-run setup demo test test-slow --help" ;;
esac
