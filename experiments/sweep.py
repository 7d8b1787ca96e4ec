"""Runs many experiments on one machine or a cluster with Ray (pip install -r requirements-experiments.txt).

    python experiments/sweep.py                                            # the published tables: 24 runs
    python experiments/sweep.py similar --seeds 0 1 2 --methods kd sskd --per-gpu 2 -- --amp bf16
    python experiments/sweep.py --pairs resnet20:resnet8 --methods kd+tf sskd --grid ratio-ss 0 0.25 0.5 0.75 1
    python experiments/sweep.py cross --teachers downloads --seeds 0 1 2   # use teachers that are already trained
    python experiments/sweep.py --list                                     # print the commands, for another scheduler

A student starts when its teacher is finished. The same command skips finished runs and resumes stopped ones.
With --address auto the runs go to a running Ray cluster. All its machines must see this repository, the data and the
run folders under the same paths: Ray copies no files.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import re
import shlex
import signal
import sys
import textwrap
import time
import traceback
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import baseline
import student
import teacher
from harness.checkpoint import find_checkpoint, teacher_name
from harness.flags import LOW_RATE, Parser, UserError, data_name, number, settings
from harness.record import Run, Stopped, entry
from harness.sources import read_for
from methods import METHODS
from models import folder_name, is_own
from teacher_store import read_teacher

SCRIPTS = {"teacher.py": teacher.parse_args, "student.py": student.parse_args, "baseline.py": baseline.parse_args}
NO_TF = {"--tf-weight": ["0"], "--tf-T": None, "--ratio-tf": None}
NO_SS = {"--ss-weight": ["0"], "--ss-T": None, "--ratio-ss": None}
# flags that can't be the same for all runs
OF_ONE_RUN = {"--seed", "--method", "--experiments", "--arch", "--s-arch", "--t-path", "--gpu-id", "--export"}
OF_ONE_RUN |= {"--pretrained"}

# the flags that `read_for` and `read_teacher` read
OF_DATA = "dataset", "data_root", "data_url", "side", "train_size", "test_size", "t_path", "t_arch"

REPORT = 60  # seconds between two reports of progress
RETRIES = 20  # how often Ray restarts a run whose worker or node died


class Job(NamedTuple):
    command: list[str]  # the script and its flags
    log: Path
    teacher: str  # the run that must finish first, if the sweep has a run of this name


def known_methods() -> dict[str, tuple[str, dict[str, list[str] | None]]]:
    """Each method's script and own flags, which nothing else changes. None: a flag that the method does without."""
    known = {
        "teacher": ("teacher.py", {"--few-shot": None, "--label-noise": None}),  # sees all images, with true labels
        "alone": ("teacher.py", {}),
        "sskd": ("student.py", {}),
        "kd+tf": ("student.py", NO_SS),
        "kd+ss": ("student.py", NO_TF),
        "kd-4views": ("student.py", NO_TF | NO_SS),
    }
    for name, method in METHODS.items():
        stored = {"--t-features": None} if method.maps else {}  # only the last feature can be stored, not the maps
        known[name] = ("baseline.py", {"--method": [name]} | stored)
    return known


# -------------------------------------------------------------------------------------------------------- the commands


def parse_args(argv: list[str] | None) -> Namespace:
    argv = sys.argv[1:] if argv is None else argv
    own_end = argv.index("--") if "--" in argv else len(argv)
    parser = Parser("Runs many experiments with Ray: python experiments/sweep.py PART OPTIONS -- FLAGS OF THE SCRIPTS")
    add, seed = parser.add_argument, number(int, 0, 2**32 - 1)
    parts = "teachers: networks trained alone; similar, cross: the pairs of a published table; all: everything"
    add("part", nargs="?", choices=["all", "teachers", "similar", "cross"], default="all", help=parts)
    add("--pairs", nargs="+", metavar="TEACHER:STUDENT", help="use these pairs instead of the published ones")
    add("--seeds", nargs="+", type=seed, default=[0], metavar="SEED", help="repeat everything with each seed")
    _, *known = known_methods()
    methods = f"any of {' '.join(known)} (default: sskd; for all published pairs: alone sskd)"
    add("--methods", nargs="+", choices=known, metavar="METHOD", help=methods)
    grid = "a flag of the students and its values (quote a value of several words); students run with every combination"
    add("--grid", nargs="+", action="append", default=[], metavar=("FLAG", "VALUE"), help=grid)
    add("--teachers", type=Path, metavar="DIR", help="use the trained teachers in this folder, train none")
    add("--teacher-seed", type=seed, metavar="SEED", help="use the teacher of this seed for students of all seeds")
    share = "how many runs share a GPU; without GPUs: the cores of a machine"
    add("--per-gpu", type=number(int, 1, 1000), default=1, metavar="N", help=share)
    add("--address", help="use this running Ray cluster; auto finds the one on this machine")
    add("--experiments", type=Path, default="experiments", metavar="DIR", help="folder of the run folders")
    add("--list", action="store_true", help="print the commands, teachers first, and run nothing")
    args = parser.parse_args(argv[:own_end])

    tables = json.loads((ROOT / "experiments" / "published_results.json").read_text())
    chosen = [args.part] if args.part in tables else ["similar", "cross"]
    args.methods = args.methods or (["sskd"] if args.pairs or args.part in tables else ["alone", "sskd"])
    if args.part == "teachers":
        args.methods = [method for method in args.methods if method == "alone"]
    published = [pair for name in chosen for pair in tables[name]["pairs"]]
    # split at the colon between the networks, not at that of FILE.py:CLASS; the student is "" if there is none
    args.pairs = [[*re.split(r"(?<!\.py):", pair, maxsplit=1), ""][:2] for pair in args.pairs or ()] or published
    # Here every value is a list of words; the scripts check them in `commands`.
    scripts = Parser("All flags of the scripts; their own --help explains them")
    for flag in sorted(set().union(*(flags_of(known_methods()[method][0]) for method in ("teacher", *args.methods)))):
        scripts.add_argument(flag, dest=flag, nargs="*", default=SUPPRESS, metavar="VALUE")
    args.flags = vars(scripts.parse_args(argv[own_end + 1 :]))
    words = [word for flag, *values in args.grid for word in (f"--{flag.lstrip('-')}", *values)]
    args.grid = vars(scripts.parse_args(words))
    if not all(args.grid.values()):
        parser.error("--grid: give a flag and its values")
    for flag in OF_ONE_RUN & {*args.flags, *args.grid}:
        parser.error(f"{flag} can't be the same for all runs; see the options before --")
    if "--val-fraction" in args.flags and args.teacher_seed is not None and set(args.seeds) != {args.teacher_seed}:
        parser.error("--val-fraction: students of other seeds hold out other images than --teacher-seed's teacher")
    return args


@functools.cache
def flags_of(script: str) -> set[str]:
    """All flags of a script: what its parser returns for a short command has them as attributes."""
    pair = ["--t-path", "-", "--s-arch", "vgg8"]
    short = {"teacher.py": ["--arch", "vgg8"], "student.py": pair, "baseline.py": ["--method", "kd", *pair]}
    return {f"--{name.replace('_', '-')}" for name in vars(SCRIPTS[script](short[script]))}


def make_jobs(args: Namespace) -> dict[str, Job]:
    """All runs by name: the teachers, then the networks alone, then the students, method by method.

    Raises UserError if a script refuses its flags or `--teachers` lacks a teacher.
    """
    jobs = {}  # pairs may share a teacher or a student
    methods = ([] if args.teachers else ["teacher"]) + sorted(args.methods, key=lambda method: method != "alone")
    for method, seed, (t_arch, s_arch) in itertools.product(methods, args.seeds, args.pairs):
        t_seed = seed if args.teacher_seed is None else args.teacher_seed
        path = teacher_folder(args, t_arch, t_seed)
        name, networks, needed = f"{method}_{folder_name(s_arch)}_seed{seed}", ["--arch", s_arch], ""
        if method == "teacher":
            name, networks, seed = path.name, ["--arch", t_arch], t_seed
        elif method != "alone":
            name, networks, needed = f"{name}_{path.name}", ["--t-path", str(path), "--s-arch", s_arch], path.name
            networks = ["--t-arch", t_arch, *networks] if is_own(t_arch) else networks
        for folder, command in commands(args, method, networks, seed):
            full = f"{folder}_{name}" if folder else name
            jobs[full] = Job(command, args.experiments / "logs" / f"{full}.log", needed)
    return jobs


def teacher_folder(args: Namespace, arch: str, seed: int) -> Path:
    """The folder of a teacher: the one that its run makes or, in `--teachers`, one with another usual name."""
    fraction = args.flags.get("--val-fraction")
    held_out = data_name(teacher.parse_args(["--arch", arch, "--val-fraction", *fraction])) if fraction else ""
    arch = folder_name(arch)
    names = [f"teacher_{arch}{held_out}_seed{seed}"]
    if not args.teachers:
        return args.experiments / names[0]
    names += [] if held_out else [f"{arch}_seed{seed}", f"teacher_{arch}", f"{arch}_vanilla", arch]
    if found := [args.teachers / name for name in names if (args.teachers / name).is_dir()]:
        return found[0]
    raise UserError(f"--teachers {args.teachers}: none of the folders {', '.join(names)} is there")


def commands(args: Namespace, method: str, networks: list[str], seed: int) -> Iterator[tuple[str, list[str]]]:
    """The commands for all combinations of the grid's values that matter to a method, each with its folder's name.

    `networks` are flags that end with the network to train.
    """
    script, own = known_methods()[method]
    known = flags_of(script) - own.keys()
    flags = {"--lr": ["0.01" if networks[-1] in LOW_RATE else "0.05"], "--seed": [str(seed)]}
    flags |= {flag: values for flag, values in args.flags.items() if flag in known} | own
    grid = {flag: values for flag, values in args.grid.items() if flag in known and method != "teacher"}
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        folder = "_".join(f"{flag[2:]}_{value}" for flag, value in varied.items()).replace(" ", "-").replace("/", "-")
        chosen = flags | {flag: value.split() for flag, value in varied.items()}
        chosen["--experiments"] = [str(args.experiments / folder)]
        words = networks + [word for flag, values in chosen.items() if values is not None for word in (flag, *values)]
        SCRIPTS[script](words)  # so wrong flags are found before anything starts
        yield folder, [script, *words]


# ------------------------------------------------------------------------------------------------------ finished runs


def results_of(jobs: dict[str, Job]) -> dict[str, str]:
    """The finished runs, with their results in words: those for which their scripts would find nothing to do.

    A student is not finished before its teacher. Each data set and each teacher is read once for all runs.
    """
    identity_of.cache_clear()
    found: dict[str, str] = {}
    for name, job in jobs.items():
        if job.teacher not in jobs or job.teacher in found:
            with contextlib.suppress(UserError, OSError):  # such as other flags in the folder: the script reports it
                if result := result_of(*job.command):
                    found[name] = result
    return found


def result_of(script: str, *words: str) -> str | None:
    """The result of a command's run in words, if it is finished. Raises UserError if its folder can't be used."""
    args = SCRIPTS[script](words)
    if script == "teacher.py":
        folder = teacher.run_folder(args)
    else:
        module = {"student.py": student, "baseline.py": baseline}[script]
        folder = module.run_folder(args, teacher_name(find_checkpoint(args.t_path)))
    if not (folder / "result.json").exists():
        return None
    identity = identity_of(tuple((name, getattr(args, name, None)) for name in OF_DATA))
    return Run(folder, settings(args, identity)).result


@functools.cache
def identity_of(of_data: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """What a run records of its data and its teacher; nothing if they can't be read here."""
    args = Namespace(**dict(of_data))
    with (
        contextlib.suppress(UserError, OSError),
        contextlib.redirect_stdout(None),  # what a run says of its data
        contextlib.redirect_stderr(None),
    ):
        return read_for(args, about={}).identity if args.t_path is None else read_teacher(args)[-1]
    return {}


# ------------------------------------------------------------------------------------------------------------- on Ray


@entry
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    jobs = make_jobs(args)
    if args.list:
        for script, *flags in (job.command for job in jobs.values()):
            print(shlex.join(["python", os.path.relpath(ROOT / script), *flags]))
        return
    done = results_of(jobs)
    left = {name: job for name, job in jobs.items() if name not in done}
    ray, share = start_ray(args.address, args.per_gpu) if left else (None, {})
    logs = args.experiments / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    print(f"{len(jobs)} runs, logs in {logs}", flush=True)
    for count, (name, result) in enumerate(done.items(), 1):
        print(f"[{count}/{len(jobs)}] finished: {name}: {result}", flush=True)
    if not left:
        print(f"{len(jobs)} runs: {len(jobs)} finished")
    elif not perform(ray, share, left, len(done)):
        sys.exit(1)


def start_ray(address: str | None, per_gpu: int) -> tuple[Any, dict[str, float]]:
    """Connects to the cluster at `address` or makes one; returns the module `ray` and what to reserve for each run."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # 0: a run is as fast as without Ray
    settings["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # avoids a warning
    os.environ.update(settings | os.environ)
    try:
        import ray
    except ImportError:
        raise UserError("Ray is missing: pip install -r requirements-experiments.txt (--list does without)") from None
    # Ray's object store, which the runs don't use, would take a third of the memory
    own = {} if address else {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # OSError, ValueError, RuntimeError, Ray's own
        advice = f"is a cluster running at --address {address}?" if address else "--list does without Ray"
        if "AF_UNIX" in str(error):
            advice = "set RAY_TMPDIR to a folder with a short path: RAY_TMPDIR=/tmp python experiments/sweep.py …"
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" …")
        raise UserError(f"Ray did not start ({reason}); {advice}") from error
    gpus = ray.cluster_resources().get("GPU")
    cores = [node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    share = int((1 if gpus else min(cores, default=1)) / per_gpu * 10_000) / 10_000  # rounded down: 3 thirds must fit
    return ray, {"num_gpus": share, "num_cpus": 0} if gpus else {"num_cpus": share}


def perform(ray: Any, share: dict[str, float], jobs: dict[str, Job], done: int) -> bool:
    """Runs all jobs; returns whether all of them finished. Raises Stopped when a signal has ended them.

    `done` is how many others were finished before.
    """
    total = done + len(jobs)
    signals: list[int] = []
    for each in (signal.SIGINT, signal.SIGTERM):  # an exception from a handler can get lost inside Ray
        signal.signal(each, lambda number, frame: signals.append(number))
    remote = ray.remote(max_calls=1, max_retries=RETRIES, **share)(work)  # max_calls: each run has its own process
    tasks: dict[str, Any] = {}
    for name, job in jobs.items():
        needed = [tasks[job.teacher]] if job.teacher in tasks else []  # Ray starts the run when this task has finished
        tasks[name] = remote.remote(job.command, job.log, os.getcwd(), *needed)
    left, failed, reported = {task: name for name, task in tasks.items()}, {}, time.time()
    while left and not signals:
        for task in ray.wait(list(left), timeout=1)[0]:
            name = left.pop(task)
            try:
                outcome = f"finished: {name}: {ray.get(task)}"
            except ray.exceptions.RayError as error:  # the run's own, or that of its teacher
                outcome = failed[name] = f"failed: {name}: {str(error).strip().splitlines()[-1]}"
            print(f"[{total - len(left)}/{total}] {outcome}", flush=True)
        if time.time() > reported + REPORT:
            for log in (jobs[name].log for name in left.values()):
                if log.exists() and log.stat().st_mtime > reported:
                    print(f"{log.stem}: {last_line(log)}", flush=True)
            reported = time.time()
    if left:
        print("stopping; every run ends at its next step", flush=True)
        for task in reversed(left):  # students first, else they would start when their teacher ends
            ray.cancel(task)
        ray.wait(list(left), num_returns=len(left), timeout=60)
    print(*failed.values(), sep="\n", end="\n" if failed else "")
    counts = {"finished": total - len(failed) - len(left), "failed": len(failed), "not finished": len(left)}
    print(f"{total} runs: {', '.join(f'{count} {what}' for what, count in counts.items() if count)}", flush=True)
    ray.shutdown()
    if left:
        raise Stopped(signals[0])
    return not failed


def work(command: list[str], log: Path, folder: str, *needed: str) -> str:
    """One run, in a Ray worker; returns the last line of its log. `needed` is that of the teacher's run.

    The script runs in the worker's own process: if the run dies, Ray notices, and `ray.cancel` acts like Ctrl-C.
    Raises RuntimeError with the last line if the run fails; Ray then starts no run that needs it.
    """
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    sys.argv = command  # config.json records it
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    where = f"{os.uname().nodename}, process {os.getpid()}, GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}"
    print(f"=== {time.strftime('%F %T')} on {where}: {shlex.join(command)}")
    try:
        importlib.import_module(command[0].removesuffix(".py")).main(command[1:])
    except SystemExit as end:
        if end.code == 128 + signal.SIGTERM:  # not from this sweep: the machine shuts down, and Ray restarts the run
            os._exit(end.code)
        raise RuntimeError(last_line(log)) from None
    except Exception:
        traceback.print_exc()
        raise RuntimeError(last_line(log)) from None
    return last_line(log)


def last_line(log: Path) -> str:
    return log.read_bytes()[-2000:].decode(errors="replace").strip().rpartition("\n")[2]


if __name__ == "__main__":
    main()
