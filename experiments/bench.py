"""How fast this repository is: against the published pipeline, in one run, on identical work.

    python experiments/bench.py                                    # four pairs, then all eleven: half an hour, 2 cores
    python experiments/bench.py --quick                            # the first pair alone, under 2 minutes
    python experiments/bench.py --amp bf16 --compile               # what half precision and torch.compile add
    python experiments/bench.py --pairs vgg13:vgg8 --json rows.json

The published pipeline is published.py; "here" are the functions that student.py trains with. Each side has a process of
its own, set up as its scripts are, since some of it (the memory allocator) holds for a whole process; both get the same
weights, images, batch size and threads, and their losses must agree before anything is timed. They take turns within
each repetition, one idle while the other runs; a figure is the median.

    figure                    of a batch of 64 images (256 views), in seconds unless said
    views                     its four views, by one process and one thread
    loss                      the terms, forward and backward; pair D128 … D2048: at embeddings of that width
    teacher_forward           the frozen teacher
    student_forward_backward  the student's network alone
    student_step              all of it: views, both networks, loss, update, meter
    student_step_stored       the same here with `--t-features`, every view being known; published computes them
    stored_share              student_step_stored ÷ student_step, both here
    overhead                  share of the step outside the two networks, timed beside it; noise may take it below 0
    peak_share                share of the machine's matrix-product rate that the step reaches: more is better
    ss_epoch                  an epoch of the SS head, scaled down: some training batches and a fifth as many test
                              images. Here it includes a 60th of what is done once for 60 epochs, the test features
    peak_memory               bytes that a step needs beyond those held before it, in a fresh process: allocated on
                              the device (CUDA), else resident in memory (Linux' high-water mark); pair memory, disk:
                              with an epoch's features looked at and read before it (of disk, the mapped file counts)
    features_read             reading an epoch's features, all of them known, from memory and from a warm file
    read_share                that of the file, in an epoch of student_step_stored
    ss_step, ss_step_stored   a training step of the SS head
    look                      a view that is new to the table, in a batch of them
    reproduction              the eleven published students after their five teachers: an estimate from these figures,
                              see `reproduction`; stored_share: to the same with computed features
    batch_scaling             student_step per image, as the batch grows; here only, ratio = to the smallest batch
    method_step               a step of each compared method, by baseline.py ("first": of its first phase); here only,
                              ratio = to SSKD's student_step, timed beside it
    crd_loss                  CRD's term with gradients, from pooled features and given negatives (16,384 of 50,000)
    crd_negatives             drawing them; published: by one process of the host
    crd_memory                peak_memory of both together

`--json` writes rows {figure, pair, amp, published, here, ratio}: ratio = published ÷ here, null where here is below 0.
`--amp` concerns "here" alone; without it steps are timed in bf16 too, where the device has bf16 instructions. On a CPU
the DataLoader has no workers, since the networks keep the cores busy; on a GPU it has the published four, but for
`views`. CUDA times with events, ten repetitions at a time.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the rooms lie there, wherever this is started from

from harness import flags

PAIRS = ["wrn_40_2:wrn_16_2", "resnet32x4:resnet8x4", "vgg13:vgg8", "ResNet50:MobileNetV2"]


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.Parser("Times this repository against the published pipeline.")
    add = parser.add_argument
    add("--pairs", nargs="+", default=PAIRS, metavar="TEACHER:STUDENT", help="the networks to measure")
    half = "half precision here; the published side stays float32"
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help=half)
    add("--compile", action="store_true", help="torch.compile here; the minutes it takes are not counted")
    add("--device", help="for example cpu or cuda:1; left out: the first GPU, else the CPU")
    add("--quick", action="store_true", help="the first pair alone, fewer repetitions, a narrower range")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    for pair in args.pairs:
        if pair.count(":") != 1 or not set(pair.split(":")) <= set(flags.NETWORKS):
            parser.error(f"--pairs {pair}: not TEACHER:STUDENT, two of {', '.join(flags.NETWORKS)}")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist")
    return args


import contextlib
import ctypes
import json
import math
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, cached_property, partial
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import baseline
import cifar
import models
import student
import utils
from experiments import published
from losses import VIEWS, sskd_terms
from methods import METHODS, MethodError, Outputs, set_phase
from methods.negatives import draw_negatives
from harness.record import entry, write_atomically
from teacher_store import TeacherCheckpoint, look_once
from wrapper import Wrapper, fold_batch_norms

CLASSES, STATISTICS = cifar.NUM_CLASSES["cifar100"], cifar.STATISTICS["cifar100"]
FLAGS = ["--t-path", "unused", "--s-arch", "resnet8", "--lr", "0.01"]  # of student.py
WINDOWS = len(cifar.windows()[1])  # the possible views of an image
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
THREADS = torch.get_num_threads()
TABLE = "{:25} {:27} {:4} {:>14} {:>14} {:>8}"

Side = dict[str, Callable[[int], Any]]  # figure → what one side does for it, so many times


class Plan(NamedTuple):
    """What is measured, and how often."""

    device: torch.device
    amp: str = "off"
    compile: bool = False
    batch: int = 64
    images: int = 50_000  # as many as CIFAR-100 trains on
    seconds: float = 40  # a figure is repeated for about so long …
    least: int = 2  # … but at least so often
    ss_batches: int = 2  # of an SS-head epoch …
    ss_test_images: int = 25  # … and a fifth as many, as in CIFAR-100
    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    batches: tuple[int, ...] = (64, 128, 256, 512)
    side: int = 2048  # of the matrices that tell the machine's rate; a GPU wants larger ones


QUICK = {"images": 5_000, "seconds": 4, "ss_batches": 1, "ss_test_images": 12}
QUICK |= {"widths": (128, 2048), "batches": (64, 128)}

# ------------------------------------------------------------------------------------------------------ the two sides


@cache
def published_side(plan: Plan, pair: str) -> Side:
    """The published pipeline."""
    torch.backends.cudnn.benchmark = True  # all that it sets up
    teacher, network = make_networks(pair, plan.device)
    sgd, head_sgd = published.sgd(network.parameters(), 0.01), published.sgd(teacher.proj_head.parameters())
    train_set, test_set = (published.Views(*noise(plan.images), STATISTICS, train) for train in (True, False))
    workers = 4 if plan.device.type == "cuda" else 0
    batches = published.batches(train_set, plan.batch, plan.device, workers)
    test_batches = published.batches(test_set, plan.ss_test_images, plan.device, workers)
    of_one_process = published.batches(train_set, plan.batch, plan.device)
    x, _ = next(of_one_process)

    def ss_epoch() -> None:
        for x, _ in islice(batches, plan.ss_batches):
            published.step(head_sgd, *published.ss_head_loss(teacher, x))
        with torch.no_grad():
            _, figures = published.ss_head_loss(teacher, next(test_batches)[0])
            published.read(figures)

    return {
        "views": times(lambda: next(of_one_process)),
        "ss_step": times(lambda: published.step(head_sgd, *published.ss_head_loss(teacher, next(batches)[0]))),
        "teacher_forward": times(lambda: teacher(x)),
        "student_forward_backward": times(lambda: backward(network, network(x))),
        "student_step": times(lambda: published.step(sgd, *published.loss(teacher, network, *next(batches)))),
        "ss_epoch": times(ss_epoch),
    } | computed(plan._replace(amp="off"), (teacher, network), published.terms, teacher_graph=True)


@cache
def here_side(plan: Plan, pair: str) -> Side:
    """This repository, set up as by student.py."""
    utils.set_up(0, plan.device, deterministic=False)
    args, autocast = student.parse_args([*FLAGS, "--amp", plan.amp]), utils.precision(plan.amp, plan.device)
    teacher, network = (net.to(memory_format=torch.channels_last) for net in make_networks(pair, plan.device))
    teacher, head = fold_batch_norms(teacher), teacher.proj_head
    compiled = partial(utils.compiled, wanted=plan.compile, device=plan.device)
    loss_of = compiled(student.make_loss(args, teacher, network, autocast))
    ss_loss_of = compiled(student.make_ss_loss(teacher, autocast))
    sgd = utils.SGD(network.parameters(), args.lr, args.milestones, args)
    head_sgd = utils.SGD(head.parameters(), args.t_lr, args.t_milestones, args)
    sizes = (plan.images, plan.ss_test_images)
    train_set, test_set = (cifar.Images(*noise(size), STATISTICS, plan.device, plan.batch) for size in sizes)

    def epochs(features: bool, cut: bool = True) -> Iterator[cifar.Batch]:
        return chain.from_iterable(train_set.batches("bench", epoch, VIEWS, features, cut) for epoch in count())

    batches, stored, uncut = epochs(features=False), epochs(features=True), epochs(features=True, cut=False)
    x = next(batches).x
    some = teacher(x).feature.half().unflatten(0, (-1, VIEWS))
    train_set.features = lambda rows, window: some[rows % len(some)]  # reading them has a figure of its own
    looks = Looks(plan, teacher, autocast)
    teacher_forward = torch.inference_mode()(autocast()(compiled(teacher.forward)))
    student_forward = autocast()(compiled(network.forward))
    test_features = partial(student.ss_test_features, teacher, test_set, autocast)
    once_for_all_epochs = cache(test_features)

    def train(module: nn.Module, loss_of: Callable, sgd: utils.SGD, steps: int, batches: Iterator = batches) -> None:
        """An epoch of so many steps."""
        utils.train_epoch(module, loss_of, islice(batches, steps), sgd, steps * plan.batch, "bench")

    def ss_epoch() -> None:
        train(head, ss_loss_of, head_sgd, plan.ss_batches)
        student.test_ss_head(head, once_for_all_epochs(), autocast, "bench")

    return {
        "views": times(lambda: next(batches)),
        "teacher_forward": times(lambda: teacher_forward(x)),
        "student_forward_backward": times(lambda: backward(network, student_forward(x))),
        "student_step": partial(train, network, loss_of, sgd),
        "student_step_stored": partial(train, network, loss_of, sgd, batches=stored),
        "ss_step": partial(train, head, ss_loss_of, head_sgd),
        "ss_step_stored": partial(train, head, ss_loss_of, head_sgd, batches=uncut),
        "look": times(looks.at_new_views),
        "features_read memory": times(partial(looks.read, "memory")),
        "features_read disk": times(partial(looks.read, "disk")),
        "ss_epoch": times(ss_epoch),
        "ss_features": times(test_features),
    } | computed(plan, (teacher, network), compiled(sskd_terms), teacher_graph=False)


@cache
def methods_side(plan: Plan, pair: str) -> Side:
    """Steps of SSKD and of the compared methods, set up as by student.py and baseline.py."""
    steps = {"sskd": here_side(plan, pair)["student_step"]}
    train_set = cifar.Images(*noise(plan.images), STATISTICS, plan.device, plan.batch)
    batches = chain.from_iterable(train_set.batches("bench", epoch, views=1) for epoch in count())

    def train(module: nn.Module, loss_of: Callable, sgd: utils.SGD, number: int) -> None:
        utils.train_epoch(module, loss_of, islice(batches, number), sgd, number * plan.batch, "bench")

    def add(name: str, first: bool) -> None:
        flags = ["--method", name, "--t-path", "unused", "--s-arch", pair.split(":")[1], "--lr", "0.01"]
        args = baseline.parse_args([*flags, "--amp", plan.amp])
        networks = baseline.make_networks(args, make_networks(pair, plan.device)[0].backbone, plan.device)
        x = next(batches).x
        method = METHODS[name](networks.of_student(x), networks.of_teacher(x), train_set.labels)
        method.to(plan.device, memory_format=torch.channels_last)
        loss = baseline.make_first_loss(networks, method) if first else baseline.make_loss(args, networks, method)
        trained = set_phase(method, networks.student, first)
        sgd = utils.SGD(trained.parameters(), args.lr, args.milestones, args)
        loss_of = utils.compiled(loss, plan.compile, plan.device)
        steps[f"{name} first" if first else name] = partial(train, trained, loss_of, sgd)

    for name, kind in METHODS.items():
        with contextlib.suppress(MethodError):  # it does not go with the pair
            add(name, first=False)
            if hasattr(kind, "first_loss"):
                add(name, first=True)
    return steps


@cache
def published_crd(plan: Plan, pair: str) -> Side:
    """CRD's term as published."""
    (s, t), rows, labels = crd_inputs(plan, pair)
    term = published.CRD(s.shape[1], t.shape[1], plan.images).to(plan.device)
    others = published.others_of(labels)

    def draw() -> Tensor:
        return published.negatives(others, labels[rows], METHODS["crd"].negatives).to(plan.device)

    def loss(negatives: Tensor) -> None:
        places = torch.cat([rows[:, None], negatives], 1)
        torch.autograd.grad(term(s, t, rows, places), [s, *term.parameters()])

    return crd_figures(draw, loss)


@cache
def here_crd(plan: Plan, pair: str) -> Side:
    """CRD's term of methods.py."""
    utils.set_up(0, plan.device, deterministic=False)
    (s, t), rows, labels = crd_inputs(plan, pair)
    student, teacher = (Outputs([x.to(DTYPES[plan.amp])], x) for x in (s, t))
    method = METHODS["crd"](student, teacher, labels).to(plan.device)
    term = utils.compiled(method.contrast, plan.compile, plan.device)
    steps = count()

    def draw() -> Tensor:
        method.when[2] = next(steps)
        return draw_negatives(labels, labels[rows], method.negatives, method.replace, method.when)

    def loss(negatives: Tensor) -> None:
        places = torch.cat([rows[:, None], negatives], 1)
        torch.autograd.grad(term(student, teacher, rows, places), [s, *method.parameters()])

    return crd_figures(draw, loss)


def crd_figures(draw: Callable[[], Tensor], loss: Callable[[Tensor], None]) -> Side:
    drawn = cache(draw)
    return {
        "crd_loss": times(lambda: loss(drawn())),
        "crd_negatives": times(draw),
        "crd_step": times(lambda: loss(draw())),
    }


@torch.no_grad()
def check_pair(pair: str) -> None:
    """Raises Fault unless both sides have the same losses. In float64: rounding could hide a part of the ss term."""
    device = torch.device("cpu")
    teacher, network = (net.double() for net in make_networks(pair, device))
    batch = next(cifar.Images(*noise(16), STATISTICS, device, batch_size=16).batches("check", 1, VIEWS))
    batch, autocast = batch._replace(x=batch.x.double()), utils.precision("off", device)
    _, theirs = published.loss(teacher, network, batch.x, batch.target)
    theirs |= published.ss_head_loss(teacher, batch.x)[1]
    _, ours = student.make_loss(student.parse_args(FLAGS), fold_batch_norms(teacher), network, autocast)(batch)
    ours |= student.make_ss_loss(fold_batch_norms(teacher), autocast)(batch)[1]
    for name, expected in published.read(theirs).items():
        if not math.isclose(ours[name], expected, rel_tol=1e-6):
            raise utils.Fault(f"{pair}: {name} is {ours[name]:.6g} here and {expected:.6g} published: unequal work")


class Pixels(nn.Module):
    """A teacher that takes no time: its features are an image's first numbers."""

    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> tuple[list[Tensor], None]:
        return [x.flatten(1)[:, : self.fc.in_features]], None


class Looks:
    """The teacher's table of features."""

    def __init__(self, plan: Plan, teacher: Wrapper, autocast: Callable):
        self.plan, self.teacher, self.autocast = plan, teacher, autocast
        self.windows = count()

    def opened(self, where: str, backbone: nn.Module, images: int) -> Callable:
        """The features of so many images, of which none is known. A file is open, but out of its folder again."""
        split = cifar.Images(*noise(images), STATISTICS, self.plan.device)
        args = student.parse_args([*FLAGS, "--amp", self.plan.amp, "--t-features", where])
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            checkpoint = TeacherCheckpoint(Path(folder, "best.pth"), "bench", backbone, "bench")
            look_once(args, checkpoint, backbone, self.autocast, train=split)
        return split.features

    @cached_property
    def new(self) -> Callable:
        return self.opened("memory", self.teacher.backbone, 1024)

    def at_new_views(self) -> None:
        """Looks at one batch of them."""
        rows = torch.arange(self.new.batch, device=self.plan.device)
        self.new(rows, torch.full_like(rows, next(self.windows) % WINDOWS).unsqueeze(1))

    @cached_property
    def epoch(self) -> cifar.Draws:
        draws = cifar.draw(self.plan.images, VIEWS, 0, "bench", 1)
        return cifar.Draws(*(x.to(self.plan.device) for x in draws))

    def read(self, where: str) -> None:
        """Reads an epoch's features; the first time, looks at them."""
        if where not in vars(self):
            width = self.teacher.proj_head[0].in_features
            setattr(self, where, self.opened(where, Pixels(width).to(self.plan.device), self.plan.images))
        getattr(self, where)(*self.epoch)


def check_crd() -> None:
    """Raises Fault unless CRD's term and its gradients are the same on both sides."""
    torch.manual_seed(0)
    s, t = (torch.randn(8, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    student, teacher = Outputs([s], s), Outputs([t], t)
    theirs, ours = published.CRD(16, 16, 50).double(), METHODS["crd"](student, teacher, torch.arange(50)).double()
    state = theirs.state_dict()
    banks = {f"bank_{side}.memory": state.pop(f"memory_{side}") for side in "st"}
    ours.load_state_dict(state | banks, strict=False)  # Z is 0 in both
    rows, places = torch.arange(8), torch.randint(50, (8, 20))
    losses = theirs(s, t, rows, places), ours.contrast(student, teacher, rows, places)
    gradients = [
        torch.autograd.grad(loss, [s, *side.parameters()]) for loss, side in zip(losses, (theirs, ours), strict=True)
    ]
    pairs = zip((losses[0], *gradients[0]), (losses[1], *gradients[1]), strict=True)
    if not all(torch.allclose(*each, rtol=1e-6) for each in pairs):
        raise utils.Fault(f"crd is {losses[1]:.6g} here and {losses[0]:.6g} published: unequal work")


# ------------------------------------------------------------------------------------------------------ what both need


def noise(size: int) -> tuple[Tensor, Tensor]:
    """Images and labels in the shape of CIFAR-100's, the same at every call."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size, cifar.SIDE, cifar.SIDE, 3), dtype=np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(rng.integers(0, CLASSES, size))


def make_networks(pair: str, device: torch.device) -> tuple[Wrapper, Wrapper]:
    """Teacher (eval mode) and student (train mode) with heads; the same weights at every call."""
    torch.manual_seed(0)
    teacher, network = (Wrapper(models.model_dict[arch](num_classes=CLASSES)) for arch in pair.split(":"))
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # one pass sets the statistics: activations keep the range of a trained network's
    with torch.no_grad():
        teacher.train()(torch.randn(32, 3, cifar.SIDE, cifar.SIDE))
    return teacher.eval().to(device), network.to(device)


def crd_inputs(plan: Plan, pair: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Pooled features of student and teacher, the batch's rows of the training set, and its labels."""
    torch.manual_seed(0)
    teacher, network = make_networks(pair, torch.device("cpu"))
    widths = [net.proj_head[0].in_features for net in (network, teacher)]
    features = [torch.rand(plan.batch, width, device=plan.device).requires_grad_() for width in widths]
    images = torch.arange(plan.images, device=plan.device)
    return features, images[: plan.batch], images % CLASSES


def times(function: Callable[[], Any]) -> Callable[[int], None]:
    """`function` as one that does the same so many times."""

    def repeated(number: int) -> None:
        for _ in range(number):
            function()

    return repeated


def backward(network: nn.Module, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """From gradients of one into a network's logits and embedding."""
    (output[0].sum() + output[1].sum()).backward()
    network.zero_grad()


def computed(plan: Plan, networks: tuple[Wrapper, Wrapper], terms_of: Callable, teacher_graph: bool) -> Side:
    """The figures of tensors alone: the loss at the pair's embedding widths and at others, the machine's peak."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape).to(plan.device, DTYPES[plan.amp])

    def loss(t_width: int, s_width: int) -> Callable[[int], None]:
        inputs = [tensor(VIEWS * plan.batch, width) for width in (CLASSES, CLASSES, s_width, t_width)]
        for x in inputs if teacher_graph else inputs[::2]:
            x.requires_grad_()
        target = torch.randint(CLASSES, (plan.batch,)).to(plan.device)
        return times(lambda: torch.autograd.grad(published.total(*terms_of(*inputs, target)[:4]), inputs[::2]))

    torch.manual_seed(0)
    # a product of 2 · side³ FLOP, as a 1 × 1 convolution, so by the library of the others: in float32 `@` has half its
    # rate on AMD, no TF32 on CUDA
    x = tensor(plan.side // 16, plan.side, 4, 4).to(memory_format=torch.channels_last)
    weight = tensor(plan.side, plan.side, 1, 1)
    own = (network.proj_head[0].in_features for network in networks)
    figures = {"product": times(lambda: F.conv2d(x, weight)), "loss": loss(*own)}
    return figures | {f"loss D{width}": loss(width, width) for width in plan.widths}


# ---------------------------------------------------------------------------------------------------------- measuring


def clock(side: Callable, plan: Plan, pair: str, figure: str) -> float:
    """Seconds of one repetition; of brief ones, the mean of ten.

    Runs in the side's own process, where its cache keeps networks and data from call to call.
    """
    function = side(plan, pair)[figure]
    torch.set_num_threads(1 if figure == "views" else THREADS)
    brief = figure.startswith(("views", "loss"))
    number = 10 if brief or plan.device.type == "cuda" else 1
    if brief:
        function(1)  # what the other side left in the caches would cost more than the repetition
    if plan.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(number)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / number
    began = time.perf_counter()
    function(number)
    if plan.device.type == "mps":
        torch.mps.synchronize()
    return (time.perf_counter() - began) / number


def peak_memory(side: Callable, plan: Plan, pair: str, *figures: str) -> float:
    """Bytes that `figures` need one after the other beyond those held before. Wants a process of its own."""
    plan = plan._replace(compile=False)  # a compiler's own memory is not the step's
    small, full = (side(plan._replace(batch=batch), pair) for batch in (2, plan.batch))
    small[figures[-1]](1)  # loads the code of the kernels
    forget_freed(plan.device)
    before = memory(plan.device, "VmRSS")
    for figure in figures:
        full[figure](1)
    return memory(plan.device, "VmHWM") - before


def forget_freed(device: torch.device) -> None:
    """Gives back what was freed, which the step would use without asking for more; the high-water mark begins anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):  # no glibc; no right to write there
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def memory(device: torch.device, key: str) -> float:
    """Bytes held now (VmRSS) or at most so far (VmHWM; unlike ru_maxrss, not inherited from the parent)."""
    if device.type == "cuda":
        return float((torch.cuda.memory_allocated if key == "VmRSS" else torch.cuda.max_memory_allocated)(device))
    return float(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def step_flops(plan: Plan, pair: str) -> float:
    """Of the convolutions and linear layers: teacher forward, student forward and backward."""
    teacher, network = make_networks(pair, torch.device("cpu"))
    x = torch.randn(VIEWS, 3, cifar.SIDE, cifar.SIDE)
    with FlopCounterMode(display=False) as counter:
        teacher(x)
        backward(network, network(x))
    return counter.get_total_flops() * plan.batch


@contextlib.contextmanager
def process(device: torch.device) -> Iterator[Callable]:
    """A process of its own, as a function that calls others in it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare, (device,)) as pool:
        try:
            yield lambda function, *args: pool.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise utils.Fault("a process of the measurement was killed; memory may have run out") from error


def prepare(device: torch.device) -> None:
    sys.stderr = None  # or train_epoch would draw its bar into the table
    if device.type == "cuda":
        torch.cuda.set_device(device)


def time_all(plan: Plan, clocks: list[Callable[[], float]], share: float = 1.0) -> np.ndarray:
    """(clocks, repetitions): seconds, taken in turns so that a busy moment strikes all alike."""
    rounds: list[list[float]] = []
    for run in clocks:
        run()  # to warm up
    began = time.monotonic()
    while len(rounds) < plan.least or (len(rounds) < 50 and time.monotonic() - began < plan.seconds * share):
        rounds.append([run() for run in clocks])
    return np.array(rounds).T


# ---------------------------------------------------------------------------------------------------------------- rows

median = partial(np.median, axis=-1)  # over the repetitions


def row(figure: str, pair: str, amp: str, theirs: float | None, ours: float, ratio: float | None = None) -> dict:
    """One row, printed as soon as it is measured."""
    ratio = theirs / ours if ratio is None and theirs is not None and ours > 0 else ratio
    share, size = figure == "overhead" or figure.endswith("share"), figure.endswith("memory")
    unit = "{:.1%}" if share else "{:,.0f} B" if size else "{:,.5f} s"
    shown = ("" if x is None else form.format(x) for form, x in ((unit, theirs), (unit, ours), ("{:.2f}", ratio)))
    print(TABLE.format(figure, pair, amp, *shown), flush=True)
    return {"figure": figure, "pair": pair, "amp": amp, "published": theirs, "here": ours, "ratio": ratio}


def pair_rows(plan: Plan, pair: str, first: bool) -> Iterator[dict]:
    """All figures of one pair; of the first also the loss at other widths, and what reads the table of features."""
    check_pair(pair)
    amp = plan.amp
    with process(plan.device) as theirs, process(plan.device) as ours:

        def clocks(*figures: str) -> list[Callable[[], float]]:
            sides = (theirs, published_side), (ours, here_side)
            return [partial(call, clock, side, plan, pair, figure) for figure in figures for call, side in sides]

        for figure in ("views", "loss", *(f"loss D{width}" for width in plan.widths if first)):
            name, _, width = figure.partition(" ")
            yield row(name, width or pair, amp, *median(time_all(plan, clocks(figure), 0.1)))

        # the product in the same rounds: what slows the machine slows both
        calls = clocks("teacher_forward", "student_forward_backward", "product")
        seconds = time_all(plan, [*calls, *step_clocks(plan, pair, theirs, ours)])
        teacher, network, product = seconds[:6].reshape(3, 2, -1)  # each 2 sides × repetitions
        step = seconds[6:8]
        yield row("teacher_forward", pair, amp, *median(teacher))
        yield row("student_forward_backward", pair, amp, *median(network))
        steps = list(step_rows(plan, pair, seconds[6:]))
        yield from steps
        yield row("overhead", pair, amp, *median(1 - (teacher + network) / step))
        products = step_flops(plan, pair) / (2 * plan.side**3)
        yield row("peak_share", pair, amp, *products * median(product) / median(step))

        calls = [*clocks("ss_epoch"), partial(ours, clock, here_side, plan, pair, "ss_features")]
        their_epoch, our_epoch, once = median(time_all(plan, calls, 0.5))
        yield row("ss_epoch", pair, amp, their_epoch, our_epoch + once / student.parse_args(FLAGS).t_epoch)
    sides = (published_side, here_side)
    yield from memory_rows(plan._replace(images=2 * plan.batch), pair, "peak_memory", "student_step", sides)
    if first:
        yield from table_rows(plan, pair, steps)


def memory_rows(plan: Plan, pair: str, name: str, figure: str, sides: tuple[Callable, Callable]) -> Iterator[dict]:
    """What a figure takes of memory on both sides, if the machine tells."""
    if tells_memory(plan):
        with process(plan.device) as theirs, process(plan.device) as ours:
            calls = zip((theirs, ours), sides, strict=True)
            yield row(name, pair, plan.amp, *(call(peak_memory, side, plan, pair, figure) for call, side in calls))


def tells_memory(plan: Plan) -> bool:
    """Whether device or system say how much memory was in use at most."""
    return plan.device.type == "cuda" or Path("/proc/self/status").exists()


def step_clocks(plan: Plan, pair: str, theirs: Callable, ours: Callable) -> list[Callable[[], float]]:
    """Of the published student step, and of those here with features computed and stored, in each precision."""
    here = [
        (plan._replace(amp=amp), figure) for amp in amps(plan) for figure in ("student_step", "student_step_stored")
    ]
    published_step = partial(theirs, clock, published_side, plan, pair, "student_step")
    return [published_step, *(partial(ours, clock, here_side, each, pair, figure) for each, figure in here)]


def step_rows(plan: Plan, pair: str, seconds: np.ndarray) -> Iterator[dict]:
    """What the `step_clocks` gave."""
    theirs, *here = median(seconds)
    for amp, computed, stored in zip(amps(plan), here[::2], here[1::2], strict=True):
        yield row("student_step", pair, amp, theirs, computed)
        yield row("student_step_stored", pair, amp, theirs, stored)
        yield row("stored_share", pair, amp, None, stored / computed)


def table_rows(plan: Plan, pair: str, steps: list[dict]) -> Iterator[dict]:
    """Reading an epoch's features, beside the epoch's steps; the memory that it takes."""
    stored = next(each["here"] for each in steps if each["figure"] == "student_step_stored")
    with process(plan.device) as ours:
        figures = "features_read memory", "features_read disk"
        memory, disk = median(time_all(plan, [partial(ours, clock, here_side, plan, pair, each) for each in figures]))
    yield row("features_read", f"{pair} memory", plan.amp, None, memory)
    yield row("features_read", f"{pair} disk", plan.amp, None, disk)
    yield row("read_share", pair, plan.amp, None, disk / (stored * plan.images / plan.batch))
    for where in ("memory", "disk"):
        if tells_memory(plan):
            with process(plan.device) as ours:
                asked = f"features_read {where}", "student_step_stored"
                peak = ours(peak_memory, here_side, plan, pair, *asked)
            yield row("peak_memory", f"{pair} {where}", plan.amp, None, peak)


def reproduction_rows(plan: Plan, measured: list[dict]) -> Iterator[dict]:
    """The estimate, and those of its parts that are not among the rows `measured`."""
    parts = {(each["figure"], each["pair"], each["amp"]): each for each in measured}
    pairs = published_pairs()
    for pair in pairs:
        rows = []
        with process(plan.device) as theirs, process(plan.device) as ours:
            if ("student_step_stored", pair, plan.amp) not in parts:
                rows += step_rows(plan, pair, time_all(plan, step_clocks(plan, pair, theirs, ours), 0.25))
            if pair in of_teachers(pairs).values():
                rows += teacher_rows(plan, pair, theirs, ours)
        parts |= {(each["figure"], each["pair"], each["amp"]): each for each in rows}
        yield from rows
    for amp in amps(plan):
        figures = {(figure, pair): each for (figure, pair, in_amp), each in parts.items() if in_amp == amp}
        theirs, computed, stored = reproduction(plan, pairs, figures)
        yield row("reproduction", f"{len(pairs)} students", amp, theirs, stored)
        yield row("stored_share", "reproduction", amp, None, stored / computed)


def teacher_rows(plan: Plan, pair: str, theirs: Callable, ours: Callable) -> Iterator[dict]:
    """A step of the SS head, and looking at a view."""
    calls = [partial(theirs, clock, published_side, plan, pair, "ss_step")]
    for amp in amps(plan):
        here = partial(ours, clock, here_side, plan._replace(amp=amp), pair)
        calls += [partial(here, figure) for figure in ("ss_step", "ss_step_stored", "look")]
    published_step, *here = median(time_all(plan, calls, 0.25))
    views = 1024 if plan.device.type == "cuda" else 64
    for amp, computed, stored, look in zip(amps(plan), here[::3], here[1::3], here[2::3], strict=True):
        yield row("ss_step", pair, amp, published_step, computed)
        yield row("ss_step_stored", pair, amp, published_step, stored)
        yield row("look", pair, amp, None, look / views)


def reproduction(plan: Plan, pairs: list[str], rows: dict[tuple[str, str], dict]) -> tuple[float, float, float]:
    """Seconds of the published students after their teachers, tests left out: published, here computed, here stored.

    The published code trains an SS head for each student, this one for each teacher. The table of a teacher is asked
    for the views of its SS head's epochs and of a student's, which are the same for all students of one seed.
    """
    args = student.parse_args(FLAGS)
    steps = math.ceil(50_000 / plan.batch)
    windows = WINDOWS / VIEWS  # of a view of given rotation, each as likely as any other
    views = WINDOWS * (1 - (1 - 1 / windows) ** (args.t_epoch + args.epoch))  # that are asked for, of an image
    theirs = computed = stored = 0.0
    teachers = of_teachers(pairs)
    for pair in pairs:
        head, step = rows["ss_step", teachers[pair.split(":")[0]]], rows["student_step", pair]
        theirs += steps * (args.t_epoch * head["published"] + args.epoch * step["published"])
        computed += steps * args.epoch * step["here"]
        stored += steps * args.epoch * rows["student_step_stored", pair]["here"]
    for pair in teachers.values():
        computed += steps * args.t_epoch * rows["ss_step", pair]["here"]
        stored += (
            steps * args.t_epoch * rows["ss_step_stored", pair]["here"] + 50_000 * views * rows["look", pair]["here"]
        )
    return theirs, computed, stored


def of_teachers(pairs: list[str]) -> dict[str, str]:
    """Each teacher with the first pair of its own."""
    return {pair.split(":")[0]: pair for pair in reversed(pairs)}


def published_pairs() -> list[str]:
    """The eleven of the published tables."""
    tables = json.loads(Path(__file__).with_name("published_results.json").read_text())
    return [":".join(pair) for name in ("similar", "cross") for pair in tables[name]["pairs"]]


def batch_rows(plan: Plan, pair: str) -> Iterator[dict]:
    with process(plan.device) as ours:
        plans = (plan._replace(batch=batch) for batch in plan.batches)
        seconds = time_all(plan, [partial(ours, clock, here_side, each, pair, "student_step") for each in plans])
    per_image = median(seconds) / plan.batches
    for batch, each in zip(plan.batches, per_image, strict=True):
        yield row("batch_scaling", f"{pair} B{batch}", plan.amp, None, each, each / per_image[0])


def amps(plan: Plan) -> list[str]:
    """The precisions in which steps are timed here."""
    return ["off", "bf16"] if plan.amp == "off" and has_bf16(plan.device) else [plan.amp]


def method_rows(plan: Plan, pair: str) -> Iterator[dict]:
    with process(plan.device) as ours:
        names = ours(names_of, methods_side, plan, pair)
        seconds = median(time_all(plan, [partial(ours, clock, methods_side, plan, pair, name) for name in names]))
    for name, each in zip(names[1:], seconds[1:], strict=True):
        yield row("method_step", f"{pair} {name}", plan.amp, None, each, each / seconds[0])


def names_of(side: Callable, plan: Plan, pair: str) -> list[str]:
    return list(side(plan, pair))


def crd_rows(plan: Plan, pair: str) -> Iterator[dict]:
    check_crd()
    sides = (published_crd, here_crd)
    with process(plan.device) as theirs, process(plan.device) as ours:
        for figure in ("crd_loss", "crd_negatives"):
            calls = zip((theirs, ours), sides, strict=True)
            clocks = [partial(call, clock, side, plan, pair, figure) for call, side in calls]
            yield row(figure, pair, plan.amp, *median(time_all(plan, clocks, 0.5)))
    yield from memory_rows(plan, pair, "crd_memory", "crd_step", sides)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 by its own instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


@entry()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        device = torch.zeros(1, device=args.device).device if args.device else utils.pick_device(0)
    except (RuntimeError, AssertionError) as error:  # no such device in this build, or on this machine
        raise flags.UserError(f"--device {args.device}: {error}") from error
    plan, pairs = Plan(device, args.amp, args.compile, side=8192 if device.type == "cuda" else 2048), args.pairs
    if args.quick:
        plan, pairs = plan._replace(**QUICK), pairs[:1]
    print(f"machine: {device}, {THREADS} threads, PyTorch {torch.__version__}")
    print(TABLE.format("figure", "pair", "amp", "published", "here", "ratio"))
    rows = [each for pair in pairs for each in pair_rows(plan, pair, first=pair == pairs[0])]
    for of_first_pair in (batch_rows, method_rows, crd_rows):
        rows += of_first_pair(plan, pairs[0])
    if not args.quick:
        rows += reproduction_rows(plan, rows)
    if args.json:
        write_atomically(args.json, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
