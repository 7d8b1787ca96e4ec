"""Times this repository against the published pipeline: the same work, in the same run.

    python experiments/bench.py                                   # four pairs and the estimate: half an hour on 2 cores
    python experiments/bench.py --quick                           # the first pair, few repetitions: two minutes
    python experiments/bench.py --amp bf16 --compile              # with half precision and torch.compile here
    python experiments/bench.py --pairs vgg13:vgg8 --json rows.json
    python experiments/bench.py --conditions --json rows.json     # the student step as flags change it; for a GPU

"Here" means the functions with which student.py and baseline.py train; the published pipeline is published.py. Both
get the same weights, images, batch size and threads, and their losses must agree before anything is timed. Each side
has a process of its own. The sides take turns, and a figure is the median of all turns.

    figure                of a batch of 64 images (256 views)
    views                 cut the four views of each image, in one process and one thread
    loss                  the four terms, forward and backward
    student_step          everything: views, networks, loss, update, logged values
    ss_epoch              an epoch of the SS head, scaled down: a few training batches and a fifth as many test images
    …_stored              the same with `--t-features memory`, if the table holds every view; published computes them
    new_view              the teacher's feature of one view that the table lacks; only here
    student_step_memory   peak memory beyond what the process held before: allocated (CUDA) or resident (Linux)
    crd                   CRD's term, forward and backward, from given features and negatives (16,384 of 50,000 images)
    runs, runs_stored     estimated: the eleven published students and the SS heads; with computed and stored features

`--json` writes rows {figure, pair, amp, published, here, ratio}: seconds or bytes; ratio = published ÷ here. The pair
of the SS head's rows is the teacher alone. The published DataLoader has its four workers on a GPU only.

`--conditions` measures the student step alone: with each of the flags --amp, --tf32, --compile and --t-features, and
for depthwise students in both memory layouts. Its rows hold milliseconds until the device has done a step, milliseconds
until the host has queued it, the peak memory in bytes and, on CUDA, the number of kernels.
"""

import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain, count, repeat
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this script runs from any folder

import numpy as np
import torch
from torch import Tensor, nn

import cifar
import student
import utils
from experiments import published
from harness import flags, machine, sources
from harness.flags import Fault, UserError
from harness.record import entry
from losses import VIEWS, sskd_terms
from methods import METHODS, Outputs
from models import model_dict
from teacher_store import Features
from wrapper import Wrapper, frozen

PAIRS = ["wrn_40_2:wrn_16_2", "resnet32x4:resnet8x4", "vgg13:vgg8", "ResNet50:MobileNetV2"]
CLASSES, STATISTICS = len(sources.CLASSES["cifar100"]), sources.STATISTICS["cifar100"]
DEPTHWISE = {"MobileNetV2", "ShuffleV1", "ShuffleV2"}
FLAGS = ["--t-path", "unused", "--s-arch", "resnet8", "--lr", "0.01"]  # of student.py
THREADS = torch.get_num_threads()

SHORT = ("views", "loss")
STEP = ("student_step", "student_step_stored")
SS_HEAD = ("ss_epoch", "ss_epoch_stored", "new_view")
# the published code stores no features, so its computed figure stands beside the stored one
COMPUTED = {"student_step_stored": "student_step", "ss_epoch_stored": "ss_epoch"}
UNITS = {"runs": (3600, "h"), "runs_stored": (3600, "h"), "student_step_memory": (2**20, "MiB")}  # others: seconds
CONDITIONS = "{:24} {:24} {:>13} {:>10} {:>10} {:>10} {:>8}"
TABLE = "{:20} {:22} {:4} {:>14} {:>14} {:>8}"

Side = dict[str, Callable[[], Any]]  # figure → a function that does its work once


class Plan(NamedTuple):
    """How the figures are measured."""

    device: torch.device
    amp: str = "off"  # this and `compile` hold for this repository's side only
    compile: bool = False
    batch: int = 64
    images: int = 50_000  # as many as CIFAR-100 has for training
    seconds: float = 40  # to repeat a group of figures, at least twice
    ss_batches: int = 2  # training batches of an SS-head epoch
    ss_test_images: int = 25  # a fifth of the images in them, as in CIFAR-100
    tf32: str = "on"
    features: str = "memory"  # where `…_stored` keeps them
    layout: torch.memory_format = cifar.LAYOUT


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.Parser("Times this repository against the published pipeline.")
    add = parser.add_argument
    add("--pairs", nargs="+", default=PAIRS, metavar="TEACHER:STUDENT", help="the networks to measure")
    add("--amp", choices=utils.DTYPES, default="off", help="half precision here; the published side stays float32")
    add("--compile", action="store_true", help="torch.compile here; the minutes it takes are not counted")
    add("--device", help="for example cpu or cuda:1; left out: the first GPU, else the CPU")
    add("--quick", action="store_true", help="the first pair only, fewer repetitions, no estimate of whole runs")
    add("--conditions", action="store_true", help="only the student step, with each of the flags that change its speed")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    for pair in args.pairs:
        if pair.count(":") != 1 or not set(pair.split(":")) <= set(model_dict):
            parser.error(f"--pairs {pair}: not TEACHER:STUDENT, two of {', '.join(model_dict)}")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist")
    return args


# ------------------------------------------------------------------------------------------------------ the two sides


@cache
def published_side(plan: Plan, pair: str) -> Side:
    """The published pipeline."""
    torch.backends.cudnn.benchmark = True  # the only setting of its scripts
    teacher, network = make_networks(pair, plan.device)
    sgd, head_sgd = published.sgd(network.parameters(), 0.01), published.sgd(teacher.proj_head.parameters())
    train_set, test_set = (published.Views(*noise(plan.images), STATISTICS, train) for train in (True, False))
    workers = 4 if plan.device.type == "cuda" else 0
    batches = published.batches(train_set, plan.batch, plan.device, workers)
    test_batches = published.batches(test_set, plan.ss_test_images, plan.device, workers)
    one_process = published.batches(train_set, plan.batch, plan.device)

    def ss_epoch() -> None:
        for _ in range(plan.ss_batches):
            published.step(head_sgd, *published.ss_head_loss(teacher, next(batches)[0]))
        with torch.no_grad():
            published.read(published.ss_head_loss(teacher, next(test_batches)[0])[1])

    inputs, target = loss_inputs(plan._replace(amp="off"), teacher, network)
    for each in inputs:
        each.requires_grad_()  # the teacher builds a graph, too
    (s, t), rows, places = crd_inputs(plan, teacher, network)
    crd = published.CRD(s.shape[1], t.shape[1], plan.images).to(plan.device)
    return {
        "views": lambda: next(one_process),
        "loss": lambda: torch.autograd.grad(published.total(*published.terms(*inputs, target)), inputs[::2]),
        "student_step": lambda: published.step(sgd, *published.loss(teacher, network, *next(batches))),
        "ss_epoch": ss_epoch,
        "crd": lambda: torch.autograd.grad(crd(s, t, rows, places), [s, *crd.parameters()]),
    }


@cache
def here_side(plan: Plan, pair: str) -> Side:
    """This repository, set up as in its scripts."""
    flagged = [*FLAGS, "--amp", plan.amp, "--tf32", plan.tf32]
    args, autocast = student.parse_args(flagged), utils.precision(plan.amp, plan.device)
    machine.set_up(args, plan.device)
    cifar.LAYOUT = plan.layout
    teacher, network = (net.to(memory_format=cifar.LAYOUT) for net in make_networks(pair, plan.device))
    teacher, head = freeze(teacher), teacher.proj_head
    utils.cast_once(teacher.backbone, plan.amp)
    compiled = partial(utils.compiled, wanted=plan.compile, device=plan.device)

    def images(size: int) -> cifar.Images:
        return cifar.Images(noise(size), STATISTICS, plan.device, plan.batch)

    train_set = images(plan.images)
    batches = chain.from_iterable(train_set.batches("bench", epoch, VIEWS) for epoch in count(1))
    # an epoch of one batch, over and over: the table soon holds its views, and each step pays for reading them
    with tempfile.TemporaryDirectory() as folder:  # a file in it lives as long as the table has it open
        where = Path(folder) if plan.features == "disk" else None
        table = Features(images(plan.batch), teacher.backbone, autocast, "0" * 16, where)
    stored = chain.from_iterable(table.batches("bench", 1, VIEWS) for _ in repeat(None))
    stored_ss = chain.from_iterable(table.batches_without_views("bench", 1, VIEWS) for _ in repeat(None))
    # as in a run, whose test features are computed once
    test_features = student.ss_test_features(teacher, images(plan.ss_test_images), autocast)

    def stepping(loss_of: Callable, sgd: utils.SGD) -> Callable[[Iterator], None]:
        """A function that makes one step with the next batch, as the epoch loops of student.py do."""
        loss_of, meter = compiled(loss_of), utils.Meter("bench")

        def step(batches: Iterator) -> None:
            batch = next(batches)
            loss, terms = loss_of(batch)
            sgd.step(loss)
            meter.add(len(batch.target), loss, terms)

        return step

    sgd = utils.SGD(network, args.lr, args.milestones, args)
    student_step = stepping(student.make_loss(args, teacher, network, autocast), sgd)
    head_sgd = utils.SGD(head, args.t_lr, args.t_milestones, args)
    ss_step = stepping(student.make_ss_loss(teacher, autocast), head_sgd)

    def ss_epoch(batches: Iterator) -> None:
        for _ in range(plan.ss_batches):
            ss_step(batches)
        student.test_ss_head(head, test_features, autocast, "bench")

    terms_of = compiled(sskd_terms)
    inputs, target = loss_inputs(plan, teacher, network)
    s_inputs = [each.requires_grad_() for each in inputs[::2]]
    (s, t), rows, places = crd_inputs(plan, teacher, network)
    crd_outputs = [Outputs([each.to(utils.DTYPES[plan.amp])], each) for each in (s, t)]
    crd = METHODS["crd"](*crd_outputs, train_set.labels).to(plan.device)
    crd_of = compiled(crd.contrast)
    new = torch.arange(table.batch, device=plan.device) % plan.batch
    return {
        "views": lambda: next(batches),
        "loss": lambda: torch.autograd.grad(published.total(*terms_of(*inputs, target)), s_inputs),
        "student_step": lambda: student_step(batches),
        "student_step_stored": lambda: student_step(stored),
        "ss_epoch": lambda: ss_epoch(batches),
        "ss_epoch_stored": lambda: ss_epoch(stored_ss),
        "new_view": lambda: table.compute(new, new),  # a batch of them
        "crd": lambda: torch.autograd.grad(crd_of(*crd_outputs, rows, places), [s, *crd.parameters()]),
    }


SIDES = {"published": published_side, "here": here_side}


@torch.no_grad()
def check_pair(pair: str) -> None:
    """Raises Fault unless both sides compute the same losses. In float64: rounding could hide a small difference."""
    teacher, network = (net.double() for net in make_networks(pair, torch.device("cpu")))
    batch = next(cifar.Images(noise(8), STATISTICS, "cpu", batch_size=8).batches("check", 1, VIEWS))
    batch, autocast = batch._replace(x=batch.x.double()), utils.precision("off", torch.device("cpu"))
    theirs = published.loss(teacher, network, batch.x, batch.target)[1] | published.ss_head_loss(teacher, batch.x)[1]
    teacher = freeze(teacher)
    _, ours = student.make_loss(student.parse_args(FLAGS), teacher, network, autocast)(batch)
    ours |= student.make_ss_loss(teacher, autocast)(batch)[1]
    for name, expected in published.read(theirs).items():
        if not math.isclose(ours[name], expected, rel_tol=1e-6):
            raise Fault(f"{pair}: {name} is {ours[name]:.6g} here and {expected:.6g} published: unequal work")


# ------------------------------------------------------------------------------------------------ what both sides use


@cache
def noise(size: int) -> sources.Split:
    """Random images and labels in the shape of CIFAR-100's; always the same."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size, sources.SIDE, sources.SIDE, 3), dtype=np.uint8)
    return sources.Split(torch.from_numpy(pixels), torch.from_numpy(rng.integers(0, CLASSES, size)))


def make_networks(pair: str, device: torch.device) -> tuple[Wrapper, Wrapper]:
    """Teacher (eval mode) and student (train mode) with SS heads; always with the same weights."""
    torch.manual_seed(0)
    teacher, network = (Wrapper(model_dict[arch](num_classes=CLASSES)) for arch in pair.split(":"))
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # so one pass sets the statistics, and activations are as large as after training
    with torch.no_grad():
        teacher.train()(torch.randn(32, 3, sources.SIDE, sources.SIDE))
    return teacher.eval().to(device), network.to(device)


def freeze(teacher: Wrapper) -> Wrapper:
    """The teacher as in student.py, with the same SS head."""
    folded = Wrapper(frozen(teacher.backbone, maps=False))
    folded.proj_head = teacher.proj_head
    return folded.eval()


def loss_inputs(plan: Plan, teacher: Wrapper, network: Wrapper) -> tuple[list[Tensor], Tensor]:
    """Logits of student and teacher, embeddings of student and teacher, (4B, …) each, and labels (B,)."""
    torch.manual_seed(0)
    widths = CLASSES, CLASSES, *(net.proj_head[0].in_features for net in (network, teacher))
    tensors = [torch.randn(VIEWS * plan.batch, width).to(plan.device, utils.DTYPES[plan.amp]) for width in widths]
    return tensors, torch.randint(CLASSES, (plan.batch,)).to(plan.device)


def crd_inputs(plan: Plan, teacher: Wrapper, network: Wrapper) -> tuple[list[Tensor], Tensor, Tensor]:
    """Last features of student and teacher, the batch's rows (B,) of the training set, the places (B, 1 + K)."""
    torch.manual_seed(0)
    widths = [net.proj_head[0].in_features for net in (network, teacher)]
    features = [torch.rand(plan.batch, width).to(plan.device).requires_grad_() for width in widths]
    places = torch.randint(plan.images, (plan.batch, 1 + METHODS["crd"].negatives))
    places[:, 0] = rows = torch.arange(plan.batch)
    return features, rows.to(plan.device), places.to(plan.device)


# ---------------------------------------------------------------------------------------------------------- measuring


@contextlib.contextmanager
def processes(plan: Plan, pair: str) -> Iterator[Callable]:
    """A process for each side: `call(side, function, *args)` calls `function(make_side, plan, pair, *args)` there."""
    with contextlib.ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = {side: stack.enter_context(ProcessPoolExecutor(1, spawn, prepare, (plan.device,))) for side in SIDES}
        yield lambda side, function, *args: pools[side].submit(function, SIDES[side], plan, pair, *args).result()


def prepare(device: torch.device) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (what the sides print must not disturb the table)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def clock(make_side: Callable, plan: Plan, pair: str, figure: str) -> float:
    """Seconds of one repetition, or the mean of ten short ones."""
    function, wait = make_side(plan, pair)[figure], getattr(torch, plan.device.type).synchronize
    torch.set_num_threads(1 if figure == "views" else THREADS)
    number = 10 if figure in SHORT or plan.device.type == "cuda" else 1
    if figure in SHORT:
        function()  # because the other side has just filled the processor's caches with its own data
    wait()
    began = time.perf_counter()
    for _ in range(number):
        function()
    wait()
    return (time.perf_counter() - began) / number


def step_cost(make_side: Callable, plan: Plan, pair: str) -> dict[str, float]:
    """What a student step takes: `device` and `host` in seconds, `memory` in bytes, on CUDA also its `kernels`.

    `host` is the time until all is queued. On a CPU it equals `device`.
    """
    side, cuda = make_side(plan, pair), plan.device.type == "cuda"
    name = "student_step_stored" if plan.features != "compute" else "student_step"
    step, number = side.get(name, side["student_step"]), 20 if cuda else 1
    wait = getattr(torch, plan.device.type).synchronize
    for _ in range(5 if cuda else 1):  # the algorithms are chosen, and graphs recorded
        step()
    wait()
    began = time.perf_counter()
    for _ in range(number):
        step()
    host = time.perf_counter() - began
    wait()
    found = {"device": (time.perf_counter() - began) / number, "host": host / number}
    if cuda:
        torch.cuda.reset_peak_memory_stats(plan.device)
        before = torch.cuda.memory_allocated(plan.device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            step()
            wait()
        found["kernels"] = sum(each.count for each in trace.key_averages() if each.device_type.name == "CUDA")
        found["memory"] = torch.cuda.max_memory_allocated(plan.device) - before
    return found


def peak_memory(make_side: Callable, plan: Plan, pair: str) -> float:
    """Bytes that a student step needs beyond those that its process holds before."""
    step = make_side(plan._replace(compile=False), pair)["student_step"]  # the compiler's own memory is not the step's
    step()  # loads the code of the kernels
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
        before = torch.cuda.memory_allocated(plan.device)
        step()
        return float(torch.cuda.max_memory_allocated(plan.device) - before)
    with contextlib.suppress(OSError, AttributeError):  # not glibc, or no right to write there
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # returns freed memory, which the step would use unnoticed
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    status = Path("/proc/self/status")
    before = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
    step()
    after = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())  # unlike ru_maxrss not inherited from the parent
    return (int(after[1]) - int(before[1])) * 1024.0


def medians(plan: Plan, call: Callable, figures: tuple[str, ...]) -> dict[tuple[str, str], float]:
    """(side, figure) → seconds. All are timed in turns, so that a busy moment of the machine affects all of them."""
    ours = {*COMPUTED, "new_view"}
    clocks = [(side, figure) for figure in figures for side in SIDES if side == "here" or figure not in ours]
    for side, figure in clocks:
        call(side, clock, figure)  # to warm up
    rounds, began, seconds = [], time.monotonic(), plan.seconds / 10 if figures == SHORT else plan.seconds
    while len(rounds) < 2 or (len(rounds) < 50 and time.monotonic() - began < seconds):
        rounds.append([call(side, clock, figure) for side, figure in clocks])
    return dict(zip(clocks, np.median(rounds, axis=0).tolist(), strict=True))


# --------------------------------------------------------------------------------------------------------------- rows


def row(figure: str, pair: str, amp: str, theirs: float | None, ours: float) -> dict[str, Any]:
    """One row, printed as soon as it is measured."""
    size, unit = UNITS.get(figure, (1, "s"))
    shown = ["" if value is None else f"{value / size:,.4g} {unit}" for value in (theirs, ours)]
    ratio = theirs / ours if theirs is not None and min(theirs, ours) > 0 else None
    print(TABLE.format(figure, pair, amp, *shown, "" if ratio is None else f"{ratio:.2f}"), flush=True)
    return {"figure": figure, "pair": pair, "amp": amp, "published": theirs, "here": ours, "ratio": ratio}


def timed_rows(plan: Plan, pair: str, *groups: tuple[str, ...]) -> Iterator[dict]:
    """A row for each figure of the groups; the figures of a group are timed in turns."""
    with processes(plan, pair) as call:
        for figures in groups:
            found = medians(plan, call, figures)
            if "new_view" in figures:
                found["here", "new_view"] /= 1024 if plan.device.type == "cuda" else 64  # `Features.batch`
            for figure in figures:
                theirs = found.get(("published", COMPUTED.get(figure, figure)))
                name = pair.split(":")[0] if figure in SS_HEAD else pair
                yield row(figure, name, plan.amp, theirs, found["here", figure])


def pair_rows(plan: Plan, pair: str, crd: bool) -> Iterator[dict]:
    """All figures of one pair; those of CRD's term only with `crd`."""
    check_pair(pair)
    yield from timed_rows(plan, pair, SHORT, STEP, SS_HEAD, *[("crd",)] * crd)
    if plan.device.type == "cuda" or sys.platform == "linux":
        with processes(plan, pair) as call:  # new ones, which hold nothing of other figures
            both = [call(side, peak_memory) for side in SIDES]
        yield row("student_step_memory", pair, plan.amp, *both)


def run_rows(plan: Plan, rows: list[dict]) -> Iterator[dict]:
    """The estimate of whole runs, after those of its figures that `rows` lacks."""
    known, pairs = {(each["figure"], each["pair"]): each for each in rows}, published_pairs()
    for pair in pairs:
        needed = {STEP: pair, SS_HEAD: pair.split(":")[0]}
        missing = [figures for figures, name in needed.items() if (figures[0], name) not in known]
        for each in timed_rows(plan._replace(seconds=plan.seconds / 4), pair, *missing) if missing else ():
            known[each["figure"], each["pair"]] = each
            yield each
    theirs, *ours = whole_runs(plan, pairs, known)
    for figure, seconds in zip(("runs", "runs_stored"), ours, strict=True):
        yield row(figure, f"{len(pairs)} students", plan.amp, theirs, seconds)


def conditions(device: torch.device, pair: str) -> list[dict[str, Any]]:
    """What differs from the published flags, for each student step that `--conditions` measures."""
    flagged: list[dict[str, Any]] = [{}, {"amp": "bf16"}, {"compile": True}, {"amp": "bf16", "compile": True}]
    flagged += [{"features": "memory"}, {"features": "disk"}, {"features": "memory", "amp": "bf16", "compile": True}]
    if device.type == "cuda":
        flagged.append({"tf32": "off"})
    if pair.split(":")[1] in DEPTHWISE:
        plain = {"layout": torch.contiguous_format}
        flagged += [{"features": "memory"} | plain, {"features": "memory", "amp": "bf16"} | plain]
    return flagged


def condition_rows(plan: Plan, pair: str) -> Iterator[dict]:
    """A row for each condition; the published step takes turns with it."""
    for changed in conditions(plan.device, pair):
        each = plan._replace(features="compute")._replace(**changed)
        with processes(each, pair) as call:
            rounds = [{side: call(side, step_cost) for side in SIDES} for _ in range(4)][1:]  # the first one warms up
        found = {
            side: {name: median(turn[side][name] for turn in rounds) for name in rounds[0][side]} for side in SIDES
        }
        here = found["here"]
        said = " ".join(str(value).removeprefix("torch.") for value in changed.values()) or "published flags"
        shown = [f"{x * 1000:.2f}" for x in (found["published"]["device"], here["device"], here["host"])]
        shown += [f"{here['memory'] / 2**20:.0f}", f"{here['kernels']:.0f}"] if "kernels" in here else ["", ""]
        print(CONDITIONS.format(pair, said, *shown), flush=True)
        yield {"figure": "student_step", "pair": pair, "condition": said} | found


def whole_runs(plan: Plan, pairs: list[str], rows: dict[tuple[str, str], dict]) -> tuple[float, float, float]:
    """Seconds to train the students of `pairs` and the SS heads: published, here, and here with stored features.

    Training the teachers and testing the students is left out. The published code trains an SS head for each student,
    this repository one for each teacher. A stored view is computed once: all students of one seed see the same views.
    """
    args, steps = student.parse_args(FLAGS), math.ceil(50_000 / plan.batch)
    student_steps, ss_epochs = args.epoch * steps, args.t_epoch * steps / plan.ss_batches
    windows = len(cifar.windows()[1])  # of an image; each of the four views is drawn from a fourth of them
    new_views = 50_000 * windows * (1 - (1 - VIEWS / windows) ** (args.t_epoch + args.epoch))
    theirs = computed = stored = 0.0
    for pair in pairs:
        step, head = rows["student_step", pair], rows["ss_epoch", pair.split(":")[0]]
        theirs += student_steps * step["published"] + ss_epochs * head["published"]
        computed += student_steps * step["here"]
        stored += student_steps * rows["student_step_stored", pair]["here"]
    for teacher in {pair.split(":")[0] for pair in pairs}:
        computed += ss_epochs * rows["ss_epoch", teacher]["here"]
        stored += ss_epochs * rows["ss_epoch_stored", teacher]["here"] + new_views * rows["new_view", teacher]["here"]
    return theirs, computed, stored


def published_pairs() -> list[str]:
    """The eleven pairs of the published tables."""
    tables = json.loads(Path(__file__).with_name("published_results.json").read_text())
    return [":".join(pair) for name in ("similar", "cross") for pair in tables[name]["pairs"]]


@entry
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        device = torch.zeros(1, device=args.device).device if args.device else machine.pick_device(0)
    except (RuntimeError, AssertionError) as error:  # this build or machine has no such device
        raise UserError(f"--device {args.device}: {error}") from error
    plan, pairs = Plan(device, args.amp, args.compile), args.pairs
    if args.quick:
        plan, pairs = plan._replace(seconds=4, ss_batches=1, ss_test_images=12), pairs[:1]
    print(f"machine: {device}, {THREADS} threads, PyTorch {torch.__version__}")
    if args.conditions:
        print(CONDITIONS.format("pair", "condition", "published ms", "here ms", "host ms", "peak MiB", "kernels"))
        rows = [each for pair in pairs for each in condition_rows(plan, pair)]
    else:
        print(TABLE.format("figure", "pair", "amp", "published", "here", "ratio"))
        rows = [each for pair in pairs for each in pair_rows(plan, pair, crd=pair == pairs[0])]
    if not (args.quick or args.conditions):
        rows += run_rows(plan, rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
