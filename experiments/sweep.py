"""Many experiments on one machine or a cluster, on Ray (pip install -r requirements-experiments.txt).

    python experiments/sweep.py                                            # the published tables: 24 runs
    python experiments/sweep.py similar --seeds 0 1 2 --methods kd sskd --per-gpu 2 -- --amp bf16
    python experiments/sweep.py --pairs resnet20:resnet8 --methods kd+tf sskd --grid ratio-ss 0 0.25 0.5 0.75 1
    python experiments/sweep.py cross --teachers downloads --seeds 0 1 2   # trained ones, used as they are
    python experiments/sweep.py --list                                     # the commands, for another scheduler

A run is a command of teacher.py, student.py or baseline.py, and takes its share of a GPU (without GPUs: of the cores).
A student starts when its teacher is finished. A finished run is skipped, a stopped one goes on: the same command
continues everything. With --address auto the runs go to a running Ray cluster, whose machines must all see this
repository, the data and the run folders under the same paths: nothing is sent to them.
"""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the rooms lie there, wherever this is started from

from harness import flags
from experiments.table import PUBLISHED
from harness.flags import METHODS, NETWORKS, Parser, UserError, number

ROOT = Path(__file__).resolve().parents[1]
# of student.py: SSKD and what is left of it without tf, without ss, and without both
SSKD = {"sskd": [], "kd+tf": ["--ss-weight", "0"], "kd+ss": ["--tf-weight", "0"]}
SSKD |= {"kd-4views": ["--tf-weight", "0", "--ss-weight", "0"]}
KNOWN = ["alone", *METHODS, *SSKD]

STUDENTS_ONLY = {"--few-shot", "--label-noise"}  # a teacher sees all images and their true labels
# flags that can't be the same for all runs, and why
REFUSED = {"--seed": "--seeds sets it", "--experiments": "it stands in front of --", "--method": "--methods sets it"}
REFUSED |= dict.fromkeys(("--arch", "--s-arch"), "--pairs sets it")
REFUSED |= dict.fromkeys(("--t-path", "--t-arch"), "--pairs and --teachers set it")
REFUSED |= {"--gpu-id": "Ray chooses the GPU", "--overwrite": "delete their folders, or take another --experiments"}
REFUSED |= dict.fromkeys(("-h", "--help", "--evaluate", "--export", "--s-path"), "it is for one run")


def parse_args(argv: list[str] | None) -> Namespace:
    argv = sys.argv[1:] if argv is None else argv
    own, behind = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = Parser("Runs many experiments on Ray: python experiments/sweep.py PART OPTIONS -- FLAGS OF THE SCRIPTS")
    add = parser.add_argument
    parts = "teachers: networks trained alone; similar, cross: the pairs of a published table; all: everything"
    add("part", nargs="?", choices=["all", "teachers", "similar", "cross"], default="all", help=parts)
    add("--pairs", nargs="+", metavar="TEACHER:STUDENT", help="these instead of the published ones")
    add("--seeds", nargs="+", type=number(int, 0, 2**32 - 1), default=[0], metavar="SEED", help="each repeats all")
    which = f"of {' '.join(KNOWN)} (default: sskd; for all the published pairs alone and sskd)"
    add("--methods", nargs="+", choices=KNOWN, metavar="METHOD", help=which)
    grid = "a flag of the students without its dashes, and its values (quote one of several words); several multiply"
    add("--grid", nargs="+", action="append", default=[], metavar=("FLAG", "VALUE"), help=grid)
    add("--teachers", type=Path, metavar="DIR", help="take the teachers that lie there instead of training them")
    add("--teacher-seed", type=number(int, 0, 2**32 - 1), metavar="SEED", help="one teacher for all seeds")
    add("--per-gpu", type=number(int, 1, 1000), default=1, metavar="N", help="runs at once on a GPU (without: in all)")
    add("--address", help="a running Ray cluster; auto finds the one of this machine")
    add("--experiments", type=Path, default="experiments", metavar="DIR", help="folder of the run folders")
    add("--list", action="store_true", help="print the commands, teachers first, and run nothing")
    try:
        args = parser.parse_args(own)
    except UserError as error:
        strange = re.search("unrecognized arguments|argument part", str(error))
        raise UserError(f"{error}{'; flags of the scripts go behind --' if strange else ''}") from None
    if args.pairs and args.part in ("similar", "cross"):
        parser.error(f"{args.part} names its own pairs: leave out {args.part} or --pairs")
    if args.teachers and args.part == "teachers":
        parser.error("--teachers brings the teachers: there is nothing to train")
    if args.methods is None:
        args.methods = ["sskd"] if args.pairs or args.part in ("similar", "cross") else ["alone", "sskd"]
    args.pairs = [tuple(pair.split(":")) for pair in args.pairs] if args.pairs else published_pairs(args.part)
    for pair in args.pairs:
        if len(pair) != 2 or not all(arch in NETWORKS for arch in pair):
            parser.error(f"--pairs: {':'.join(pair)} is not TEACHER:STUDENT, two of {', '.join(NETWORKS)}")
    args.flags = group(behind)
    grids, args.grid = args.grid, {f"--{flag.lstrip('-')}": values for flag, *values in args.grid}
    if len(args.grid) < len(grids) or not all(args.grid.values()):
        parser.error("--grid: give each flag once, with its values")
    for name in (*(words[0].partition("=")[0] for words in args.flags), *args.grid):
        if name in REFUSED:
            parser.error(f"{name} can't be the same for all runs: {REFUSED[name]}")
    return args


def published_pairs(part: str) -> list[tuple[str, str]]:
    tables = json.loads(PUBLISHED.read_text())
    chosen = (part,) if part in tables else ("similar", "cross")
    return [tuple(pair) for name in chosen for pair in tables[name]["pairs"]]


def group(words: list[str]) -> list[list[str]]:
    """Each flag with its values."""
    groups: list[list[str]] = []
    for word in words:
        if re.match(r"--?[a-zA-Z]", word):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise UserError(f"{word!r} behind -- is no flag of the scripts")
    return groups


import datetime
import functools
import importlib
import itertools
import math
import os
import platform
import shlex
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import baseline
import cifar
import models
import student
import teacher
from experiments.runs import LOW_RATE
from methods import METHODS
from harness.record import Stopped, entry, refuse_unfinished
from teacher_store import SSHeadFile, load_teacher

# a script's parser, and what it asks for before it looks at any other flag
NEEDED = ["--t-path", "-", "--s-arch", "resnet8"]
SCRIPTS = {
    "teacher.py": (teacher.parse_args, ["--arch", "resnet8"]),
    "student.py": (student.parse_args, NEEDED),
    "baseline.py": (baseline.parse_args, ["--method", "fitnet", *NEEDED]),
}

WAITS, RUNS = "not run", "running"  # a job at first and then,
FINISHED, STOPPED, FAILED, LEFT_OUT = "finished", "stopped", "failed", "left out"  # and what becomes of it
BEGINS, ENDS = "=== begins", "=== ends"  # lines of a run's log
HELD = re.compile("another process is running in|was finished by another process")  # the last line of such a run
PAUSE = 20  # seconds until it is tried again
INTERVAL = 60  # seconds between two looks at how far the runs are
RETRIES = 20  # of a run whose worker or node died


@dataclass(eq=False)
class Job:
    """A run: its command, and how far it is."""

    name: str  # of its log
    script: str
    flags: list[str]
    log: Path
    teacher: "Job | None" = None  # to be finished first
    outcome: str = WAITS
    rest: float = 0.0  # not before this time, since another process held it
    head: Path | None = None  # the SS head that it reads, or trains and leaves for others
    line: str = ""  # the last one of its log,
    read: int = 0  # which is known up to this byte
    shown: str = ""  # the last one that was on the screen


# ------------------------------------------------------------------------------------------------------- the commands


@functools.cache
def knows(script: str, flag: str) -> bool:
    """Whether a script has a flag, as `--amp` or `--amp=bf16`, going by its own parser."""
    parse, needed = SCRIPTS[script]
    try:
        parse([*needed, flag])
    except UserError as error:  # that a value is missing, for one; the whole command is checked later
        return not str(error).startswith(f"unrecognized arguments: {flag}")
    return True


def make_jobs(args: Namespace) -> list[Job]:
    """All runs, each kind seed by seed: the teachers, the networks alone, then the students.

    Raises:
        UserError: a flag that no script has, or that a script refuses; a teacher that is not in `--teachers`.
    """
    scripts = {script_of(method)[0] for method in args.methods}
    for able, names in ((scripts | {"teacher.py"}, [words[0] for words in args.flags]), (scripts, args.grid)):
        for name in names:
            if not any(knows(script, name) for script in able):
                raise UserError(f"{name}: no such flag in {', '.join(sorted(able))}")
    jobs: dict[str, Job] = {}  # by command: a teacher that several pairs share is there once

    def add(name: str, script: str, flags: list[str], teacher: Job | None = None) -> Job:
        job = Job(name, script, flags, args.experiments / "logs" / f"{name}.log", teacher)
        return jobs.setdefault(command(job), job)

    held = held_out(args)
    if held and args.teacher_seed is not None and set(args.seeds) != {args.teacher_seed}:
        raise UserError("--val-fraction: students of other seeds hold out other images than --teacher-seed's teacher")
    teachers: dict[tuple[str, int], tuple[Path, Job | None]] = {}
    for seed, (arch, _) in itertools.product(args.seeds, args.pairs):
        t_seed = seed if args.teacher_seed is None else args.teacher_seed
        if args.teachers:
            teachers[arch, seed] = find_teacher(args.teachers, arch, t_seed, held), None
        else:
            name = f"teacher_{arch}{held}_seed{t_seed}"
            job = add(name, "teacher.py", flags_of(args, "teacher.py", ["--arch", arch], t_seed))
            teachers[arch, seed] = args.experiments / name, job
    alone = [method for method in args.methods if method == "alone"]
    others = [method for method in args.methods if method != "alone" and args.part != "teachers"]
    for methods in (alone, others):
        for seed, (t_arch, s_arch), method in itertools.product(args.seeds, args.pairs, methods):
            name, networks, job = f"{method}_{s_arch}_seed{seed}", ["--arch", s_arch], None
            if method != "alone":
                path, job = teachers[t_arch, seed]
                networks = ["--t-path", str(path), "--s-arch", s_arch]
                name += f"_{path.name}"
            script, own = script_of(method)
            for folder, varied in points(args, method):
                flags = flags_of(args, script, networks, seed, [*own, *varied], folder)
                add(f"{folder}_{name}" if folder else name, script, flags, job)
    if not jobs:
        raise UserError("there is nothing to run")
    return list(jobs.values())


def script_of(method: str) -> tuple[str, list[str]]:
    """The script of a method, and the flags that make it this method."""
    if method == "alone":
        return "teacher.py", []
    return ("student.py", SSKD[method]) if method in SSKD else ("baseline.py", ["--method", method])


def points(args: Namespace, method: str) -> Iterator[tuple[str, list[str]]]:
    """The grid's points, as the name of a folder and flags: every combination of the values of those flags which the
    method's script has and that change it, of tf and ss only where these have a weight; outside any folder if there is
    none."""
    script, own = script_of(method)
    without = {weight[2:4] for weight in own if weight.endswith("-weight")}
    fixed = {*own, *(flag for term in without for flag in (f"--{term}-T", f"--ratio-{term}"))}
    axes = [[(flag, value) for value in args.grid[flag]] for flag in args.grid if knows(script, flag)]
    axes = [axis for axis in axes if axis[0][0] not in fixed]
    for chosen in itertools.product(*axes):
        folder = "_".join(f"{flag[2:]}_{value}" for flag, value in chosen)
        yield re.sub(r"[^\w.+-]", "-", folder), [word for flag, value in chosen for word in (flag, *value.split())]


def flags_of(
    args: Namespace, script: str, networks: list[str], seed: int, own: list[str] | None = None, folder: str = ""
) -> list[str]:
    """The flags of one run: of a student with its `own`, in a folder of the grid, or else of a teacher.

    Raises:
        UserError: the script refuses them.
    """
    flags = [*networks, "--seed", str(seed), *(own or [])]
    if args.experiments / folder != Path("experiments"):
        flags += ["--experiments", str(args.experiments / folder)]
    for words in args.flags:
        name = words[0].partition("=")[0]
        if name in (own or []):
            raise UserError(f"{name} behind -- contradicts --grid or --methods, which set it")
        if name == "--t-features" and script == "baseline.py" and getattr(METHODS[own[1]], "maps", True):
            continue  # maps are computed: only what comes after them can be stored
        if knows(script, words[0]) and not (own is None and name in STUDENTS_ONLY):
            flags += words
    if not any(word.partition("=")[0] == "--lr" for word in flags):
        flags[len(networks) : len(networks)] = ["--lr", "0.01" if networks[-1] in LOW_RATE else "0.05"]
    if seed in (args.seeds[0], args.teacher_seed):  # the parser would say the same about every other seed
        try:
            SCRIPTS[script][0](flags)
        except UserError as error:
            raise UserError(f"{script} {shlex.join(flags)}: {error}") from None
    return flags


def held_out(args: Namespace) -> str:
    """What the folders of teachers say of held-out images, e.g. `_val0.1`: their students hold the same ones out."""
    words = [word for words in args.flags if words[0].partition("=")[0] == "--val-fraction" for word in words]
    return flags.data_name(teacher.parse_args(["--arch", "resnet8", *words]))


def find_teacher(folder: Path, arch: str, seed: int, held: str) -> Path:
    """The folder of a trained network in `folder`, the one of this seed before any other.

    With images `held_out`, only the one that held out the same: others may have seen them.
    """
    names = [f"teacher_{arch}{held}_seed{seed}"]
    if not held:
        names += [f"{arch}_seed{seed}", f"teacher_{arch}", f"{arch}_vanilla", arch]
    for path in filter(Path.is_dir, (folder / name for name in names)):
        refuse_unfinished(path)
        return path
    raise UserError(f"--teachers {folder}: no {arch} of seed {seed} there; looked for the folders {', '.join(names)}")


def command(job: Job) -> str:
    """What one types in a shell."""
    return shlex.join(["python", os.path.relpath(ROOT / job.script), *job.flags])


# ------------------------------------------------------------------------------------------------------ running them


@entry(models.CheckpointError)
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    jobs = make_jobs(args)
    if args.list:
        print(*map(command, jobs), sep="\n")
        return
    (args.experiments / "logs").mkdir(parents=True, exist_ok=True)
    try:
        perform(jobs, args.per_gpu, args.address)
    finally:
        summary(jobs)
    if any(job.outcome != FINISHED for job in jobs):
        sys.exit(1)


def start_ray(address: str | None) -> Any:
    """The module `ray`, joined to a cluster: the one at `address`, else one of this process on this machine."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # 0: a run is as fast as by hand
    settings["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # else Ray warns of a change to come
    os.environ.update(settings | os.environ)
    try:
        import ray
    except ImportError:
        raise UserError("Ray is missing: pip install -r requirements-experiments.txt (--list does without)") from None
    # nothing is kept in Ray's store, which else takes a third of the memory
    own = {} if address else {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
    return ray


def share_of_device(ray: Any, per_gpu: int) -> tuple[dict[str, float], torch.device]:
    """What Ray reserves for a run, and the kind of device that it will run on."""

    def share(whole: float) -> float:
        return math.floor(whole / per_gpu * 10_000) / 10_000  # Ray counts so; three times 0.33334 would not fit

    if ray.cluster_resources().get("GPU"):
        return {"num_gpus": share(1), "num_cpus": 0}, torch.device("cuda")
    cores = [node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not cores:
        raise UserError("the Ray cluster has neither GPUs nor CPU cores")
    return {"num_cpus": share(min(cores))}, torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def perform(jobs: list[Job], per_gpu: int, address: str | None) -> None:
    """Runs all jobs; what became of each is its `outcome`.

    Raises:
        Stopped: SIGINT or SIGTERM arrived. All runs have ended by then.
    """
    ray = start_ray(address)
    signals: list[int] = []
    for each in (signal.SIGINT, signal.SIGTERM):  # only noted: what a handler raises gets lost in Ray's functions
        signal.signal(each, lambda caught, frame: signals.append(caught))
    share, device = share_of_device(ray, per_gpu)
    remote = ray.remote(max_calls=1, max_retries=RETRIES, **share)(work)  # max_calls: a process for each run
    running: dict[Any, Job] = {}
    trainers: dict[Path, Job] = {}
    moment = time.monotonic()
    while not signals and any(job.outcome in (WAITS, RUNS) for job in jobs):
        for job in jobs:
            if job.outcome == WAITS and may_start(job, trainers, device):
                job.outcome, job.read = RUNS, job.log.stat().st_size if job.log.exists() else 0
                running[remote.remote(job.script, job.flags, job.log, os.getcwd())] = job
        if running:
            ended, _ = ray.wait(list(running), timeout=1)
        else:
            ended, _ = [], time.sleep(1)  # until another process lets go of a run
        for job in running.values():
            follow(job)
        for reference in ended:
            end(running.pop(reference), *result(ray, reference), jobs)
        if time.monotonic() > moment + INTERVAL:
            moment = time.monotonic()
            for job in running.values():
                if job.line != job.shown:
                    job.shown = job.line
                    print(f"{job.name}: {job.line}", flush=True)
    if signals:
        print("stopping; every run ends at its next step", flush=True)
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=60)
        for job in running.values():
            job.outcome = STOPPED
    ray.shutdown()
    if signals:
        raise Stopped(signals[0])


def may_start(job: Job, trainers: dict[Path, Job], device: torch.device) -> bool:
    """Whether a waiting job's teacher is finished, and its teacher's SS head trained or this job's to train.

    `trainers` has the job that trains each SS head. A job of a teacher that did not finish is left out.
    """
    if job.teacher is not None and job.teacher.outcome != FINISHED:
        if job.teacher.outcome not in (WAITS, RUNS):
            job.outcome, job.line = LEFT_OUT, f"its teacher is not finished: {job.teacher.name}"
        return False
    if time.monotonic() < job.rest:
        return False
    if job.script != "student.py":
        return True
    job.head = job.head or ss_head(job.flags, device)
    trainer = trainers.setdefault(job.head, job)
    if trainer.outcome in (FAILED, STOPPED) or trainer.rest:
        trainer = trainers[job.head] = job
    return trainer is job or trainer.outcome == FINISHED or job.head.exists()


def ss_head(flags: list[str], device: torch.device) -> Path:
    """The file of the SS head that a command of student.py reads, or trains and leaves for others."""
    args = student.parse_args(flags)
    try:
        return SSHeadFile(args, load_teacher(args), device).path
    except (UserError, models.CheckpointError, cifar.DataError):
        return Path(os.devnull)  # exists: the run may start, and will say what is wrong


def work(script: str, flags: list[str], log: Path, folder: str) -> tuple[int, str]:
    """One run, in a Ray worker: its exit status and the last line of its log.

    The script runs in the worker's own process. So the run is dead exactly when Ray sees the worker die, and
    `ray.cancel` is its Ctrl-C.
    """
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.argv = [script, *flags]  # for config.json
    where = f"{platform.node()}, process {os.getpid()}, CUDA_VISIBLE_DEVICES {os.environ.get('CUDA_VISIBLE_DEVICES')}"
    print(f"{BEGINS} {now()} on {where}: {script} {shlex.join(flags)}")
    status = 0
    try:
        importlib.import_module(script.removesuffix(".py")).main(flags)
    except SystemExit as end:
        status = end.code
    except Exception:
        traceback.print_exc()
        status = 1
    line = log.read_bytes()[-2000:].decode(errors="replace").strip().rpartition("\n")[2]
    print(f"{ENDS} {now()}, status {status}")
    if status == 128 + signal.SIGTERM:  # not from this sweep: a machine that is going down; Ray starts the run again
        os._exit(status)
    return status, line


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")


def result(ray: Any, reference: Any) -> tuple[int, str]:
    """What `work` returned, or a status and a line for what kept it from returning."""
    try:
        return ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        return 128 + signal.SIGINT, "stopped"
    except ray.exceptions.RayError as error:
        return 1, str(error).strip().splitlines()[-1]


def follow(job: Job) -> None:
    """Reads what is new in the log of a run; tells of each start, of which a run whose machine died has several."""
    if not job.log.exists():
        return
    with open(job.log, "rb") as file:
        file.seek(job.read)
        whole, newline, _ = file.read().rpartition(b"\n")
    job.read += len(whole + newline)
    for line in whole.decode(errors="replace").splitlines():
        if line.startswith(BEGINS):
            print(
                f"begins: {job.name} ({line.removeprefix(BEGINS).partition(': ')[0].strip()}), log in {job.log}",
                flush=True,
            )
        elif line.strip() and not line.startswith(ENDS):
            job.line = line


def end(job: Job, status: int, line: str, jobs: list[Job]) -> None:
    """Notes down what became of a run, and says so."""
    if status == 2 and HELD.search(line):
        job.outcome, job.rest = WAITS, time.monotonic() + PAUSE
        print(f"waits: {job.name}: {line}", flush=True)
        return
    job.outcome, job.line = FINISHED if status == 0 else STOPPED if status > 128 else FAILED, line
    known = sum(job.outcome not in (WAITS, RUNS) for job in jobs)
    print(f"[{known}/{len(jobs)}] {job.outcome}: {job.name}: {line}", flush=True)


def summary(jobs: list[Job]) -> None:
    for job in jobs:
        if job.outcome != FINISHED:
            print(f"{job.outcome}: {job.name}" + (f": {job.line}" if job.outcome in (FAILED, LEFT_OUT) else ""))
    counts = Counter(job.outcome for job in jobs)
    print(f"{len(jobs)} runs: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}", flush=True)


if __name__ == "__main__":
    if "--list" in sys.argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # sweep.py --list | head ends quietly
    main()
