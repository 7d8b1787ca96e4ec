"""How fast this repository is: against the published pipeline, in one run, on identical work.

    python bench.py                                    # four pairs, under 15 minutes on 2 CPU cores
    python bench.py --quick                            # the first pair alone, under 2 minutes
    python bench.py --amp bf16 --compile               # what half precision and torch.compile add
    python bench.py --pairs vgg13:vgg8 --json rows.json

The published pipeline is written anew here, as a plain baseline: four PIL views an image through a DataLoader, cosine
similarity of expanded tensors, selective transfer by sorting, a graph through the frozen teacher, contiguous layout,
float32, SGD without fusion, a meter that reads every figure back at every step. "Here" are the functions student.py
runs. Each side has a process of its own, set up as its scripts are, since some of it (the memory allocator) holds for
a whole process; both get the same weights, images, batch size and threads, and their losses must agree before anything
is timed. They take turns within each repetition, one idle while the other runs; a figure is the median.

    figure                    of a batch of 64 images (256 views), in seconds unless said
    views                     its four views, by one process and one thread
    loss                      the terms, forward and backward; pair D128 … D2048: at embeddings of that width
    teacher_forward           the frozen teacher
    student_forward_backward  the student's network alone
    student_step              all of it: views, both networks, loss, update, meter
    overhead                  share of the step outside the two networks, timed beside it; noise may take it below 0
    peak_share                share of the machine's matrix-product rate that the step reaches: more is better
    ss_epoch                  an epoch of the SS head, scaled down: some training batches and a fifth as many test
                              images. Here it includes a 60th of what is done once for 60 epochs, the test features
    peak_memory               bytes that a step needs beyond those held before it, in a fresh process: allocated on
                              the device (CUDA), else resident in memory (Linux' high-water mark)
    batch_scaling             student_step per image, as the batch grows; here only, ratio = to the smallest batch

`--json` writes rows {figure, pair, amp, published, here, ratio}: ratio = published ÷ here, null where here is below 0.
`--amp` concerns "here" alone; without it the first pair's step is timed in bf16 too, where the device has bf16
instructions. On a CPU the DataLoader has no workers, since the networks keep the cores busy; on a GPU it has the
published four, but for `views`. CUDA times with events, ten calls at a time.
"""

import argparse
import json
import multiprocessing
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from itertools import chain, count, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import cifar
import models
import student
import utils
from losses import VIEWS, SSKDTerms, own_image, sskd_terms
from wrapper import Wrapper, fold_batch_norms

PAIRS = ["wrn_40_2:wrn_16_2", "resnet32x4:resnet8x4", "vgg13:vgg8", "ResNet50:MobileNetV2"]
CLASSES, STATISTICS = 100, cifar.STATISTICS["cifar100"]
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TABLE = "{:25} {:27} {:4} {:>14} {:>14} {:>8}"

Side = dict[str, Callable[[], Any]]  # what one side does for each figure


class Plan(NamedTuple):
    """What is measured, and how often."""

    device: torch.device
    amp: str = "off"
    compile: bool = False
    batch: int = 64
    images: int = 50_000  # as many as CIFAR-100 trains on
    seconds: float = 40  # a figure is repeated for about so long …
    least: int = 2  # … but at least so often
    ss_batches: int = 2  # of an SS-head epoch
    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    batches: tuple[int, ...] = (64, 128, 256, 512)
    side: int = 2048  # of the matrices that tell the machine's rate; a GPU wants larger ones


QUICK = {"seconds": 4, "ss_batches": 1, "widths": (128, 2048), "batches": (64, 128)}

# ------------------------------------------------------------------------------------------- the published pipeline


class PublishedViews(Dataset):
    """Four views of each image, made one by one on the host: (4, 3, 32, 32) float32 and the label."""

    def __init__(self, images: cifar.Images, train: bool):
        self.pixels, self.labels, self.train = images.pixels.cpu().numpy(), images.labels.tolist(), train
        crop = [transforms.RandomCrop(cifar.SIDE, padding=cifar.PAD)] if train else []
        self.transform = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(*STATISTICS)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.pixels[i])
        if self.train and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        turned = [Image.fromarray(np.rot90(np.asarray(image), k)) for k in range(VIEWS)]
        return torch.stack([self.transform(view) for view in turned]), self.labels[i]


def published_batches(images: cifar.Images, batch: int, workers: int = 0, train: bool = True) -> Iterator:
    """Epoch after epoch of views (4B, 3, 32, 32) and labels (B,) on the images' device."""
    loader = DataLoader(PublishedViews(images, train), batch, shuffle=train, num_workers=workers)
    for x, target in chain.from_iterable(loader for _ in count()):
        yield x.flatten(0, 1).to(images.labels.device), target.to(images.labels.device)


def published_similarity(embedding: Tensor) -> Tensor:
    """(4B, D) → (3B, B), through tensors of 3B × D × B."""
    turned = torch.arange(len(embedding), device=embedding.device) % VIEWS != 0
    plain, rotated = embedding[~turned], embedding[turned]
    shape = (len(rotated), embedding.shape[1], len(plain))
    return F.cosine_similarity(rotated.unsqueeze(2).expand(shape), plain.t().unsqueeze(0).expand(shape), dim=1)


def published_kept(scores: Tensor, target: Tensor, ratio: float) -> Tensor:
    """The indices of the rows that selective transfer keeps. Its sorts are stable, or ties would keep other rows."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = (order == target.unsqueeze(1)).long().argmax(1)
    wrong = torch.nonzero(rank).numel()  # a sync point
    return rank.argsort(stable=True)[: len(rank) - wrong + int(wrong * ratio)].sort()[0]


def published_kl(s_logits: Tensor, t_logits: Tensor, T: float) -> Tensor:
    return F.kl_div(F.log_softmax(s_logits / T, 1), F.softmax(t_logits / T, 1), reduction="batchmean") * T * T


def published_terms(s_logits: Tensor, t_logits: Tensor, s_embedding: Tensor, t_embedding: Tensor, target: Tensor):
    """The four terms; the teacher's side is detached when its graph is already built."""
    turned = torch.arange(len(s_logits), device=target.device) % VIEWS != 0
    s_plain, s_rotated = s_logits[~turned], s_logits[turned]
    t_plain, t_rotated = t_logits[~turned].detach(), t_logits[turned].detach()
    s_similarity, t_similarity = published_similarity(s_embedding), published_similarity(t_embedding).detach()
    tf_kept = published_kept(t_rotated, target.repeat_interleave(VIEWS - 1), 1.0)
    ss_kept = published_kept(t_similarity, own_image(len(t_similarity), target.device), 0.75)
    ce, kd = F.cross_entropy(s_plain, target), published_kl(s_plain, t_plain, 4.0)
    tf = published_kl(s_rotated[tf_kept], t_rotated[tf_kept], 4.0)
    ss = published_kl(s_similarity[ss_kept], t_similarity[ss_kept], 0.5)
    return SSKDTerms(ce, kd, tf, ss)


def total(terms: SSKDTerms) -> Tensor:
    return 0.1 * terms.ce + 0.9 * terms.kd + 2.7 * terms.tf + 10.0 * terms.ss


def published_loss(teacher: nn.Module, network: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, dict]:
    t_logits, t_embedding, _ = teacher(x)  # with a graph that nothing needs
    s_logits, s_embedding, _ = network(x)
    terms = published_terms(s_logits, t_logits, s_embedding, t_embedding, target)
    accuracy = utils.accuracy(s_logits[::VIEWS], target)
    return total(terms), {f"{name}_loss": term for name, term in terms._asdict().items()} | {"cls_acc": accuracy}


def published_ss_loss(embedding: Tensor) -> tuple[Tensor, dict]:
    similarity = published_similarity(embedding)
    own = own_image(len(similarity), similarity.device)
    loss = F.cross_entropy(similarity, own)
    return loss, {"ss_loss": loss, "ss_acc": utils.accuracy(similarity, own)}


def published_side(plan: Plan, pair: str, images: cifar.Images) -> Side:
    torch.backends.cudnn.benchmark = True  # all that it sets up
    teacher, network = make_networks(pair, plan.device)
    workers = 4 if plan.device.type == "cuda" else 0
    one_process, batches = published_batches(images, plan.batch), published_batches(images, plan.batch, workers)
    test_batches = published_batches(images, plan.ss_batches * plan.batch // 5, workers, train=False)
    flags = {"momentum": 0.9, "weight_decay": 5e-4, "foreach": False, "fused": False}
    optimizer, head_optimizer = (torch.optim.SGD(x.parameters(), 0.01, **flags) for x in (network, teacher.proj_head))
    fixed, _ = next(one_process)
    meter: Counter = Counter()

    def learn(optimizer: torch.optim.Optimizer, loss: Tensor, logged: dict) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        note(logged)

    def note(logged: dict) -> None:
        meter.update({name: value.item() for name, value in logged.items()})  # adds; a sync point each

    def ss_epoch() -> None:
        for x, _ in islice(batches, plan.ss_batches):
            features, _ = teacher.backbone(x, is_feat=True)  # with a graph, then detached
            learn(head_optimizer, *published_ss_loss(teacher.proj_head(features[-1].detach())))
        with torch.no_grad():
            x, _ = next(test_batches)
            note(published_ss_loss(teacher(x)[1])[1])

    return {
        "views": lambda: on_one_thread(one_process),
        "teacher_forward": lambda: teacher(fixed),
        "student_forward_backward": lambda: backward(network, network(fixed)),
        "student_step": lambda: learn(optimizer, *published_loss(teacher, network, *next(batches))),
        "ss_epoch": ss_epoch,
        "product": matrix_product(plan.side, "off", plan.device),
    } | loss_functions(published_terms, plan, teacher, network, "off", teacher_graph=True)


# -------------------------------------------------------------------------------------------------- this repository


def here_side(plan: Plan, pair: str, images: cifar.Images) -> Side:
    """The lines of student.py's loops, over its own functions."""
    utils.set_up_torch(0, plan.device, deterministic=False)
    args, precision = student_flags(), utils.Precision(plan.amp, plan.device)
    teacher, network = (net.to(memory_format=torch.channels_last) for net in make_networks(pair, plan.device))
    teacher = fold_batch_norms(teacher)
    compiled = partial(utils.compiled, wanted=plan.compile, device=plan.device)
    loss_of = compiled(student.make_loss(args, teacher, network, precision))
    ss_loss_of = compiled(student.make_ss_loss(teacher, precision))
    teacher_alone, student_alone = compiled(teacher.forward), compiled(network.forward)
    optimizer, _ = utils.make_sgd(network.parameters(), args, args.lr, args.milestones)
    head_optimizer, _ = utils.make_sgd(teacher.proj_head.parameters(), args, args.t_lr, args.t_milestones)
    meter = utils.Meter(plan.device, "bench")
    batches = chain.from_iterable(images.train_batches(plan.batch, VIEWS, 0, "bench", epoch) for epoch in count())
    test_set = make_images(plan.ss_batches * plan.batch // 5, plan.device)  # 5 to 1, as in CIFAR-100
    fixed, _ = next(batches)
    features: list[Tensor] = []

    def teacher_forward() -> None:
        with precision.autocast(), torch.inference_mode():
            teacher_alone(fixed)

    def student_forward_backward() -> None:
        with precision.autocast():
            output = student_alone(fixed)
        backward(network, output)

    def student_step() -> None:
        x, target = next(batches)
        loss, logged = loss_of(x, target)
        precision.update(optimizer, loss)
        meter.add(len(target), **logged)

    def ss_features() -> None:
        features[:] = student.ss_test_features(teacher, test_set, plan.batch, precision)

    def ss_epoch() -> None:
        epoch_meter, test_meter = (utils.Meter(plan.device, "bench") for _ in range(2))
        for x, target in islice(batches, plan.ss_batches):
            loss, logged = ss_loss_of(x)
            precision.update(head_optimizer, loss)
            epoch_meter.add(len(target), **logged)
        student.test_ss_head(teacher.proj_head, features, precision, test_meter)
        epoch_meter.means(), test_meter.means()

    return {
        "views": lambda: on_one_thread(batches),
        "teacher_forward": teacher_forward,
        "student_forward_backward": student_forward_backward,
        "student_step": student_step,
        "ss_features": ss_features,
        "ss_epoch": ss_epoch,
        "product": matrix_product(plan.side, plan.amp, plan.device),
    } | loss_functions(compiled(sskd_terms), plan, teacher, network, plan.amp, teacher_graph=False)


SIDES = {"published": published_side, "here": here_side}


def student_flags() -> argparse.Namespace:
    return student.parse_args(["--t-path", "unused", "--s-arch", "resnet8", "--lr", "0.01"])


def make_images(number: int, device: torch.device) -> cifar.Images:
    """Noise in the shape of CIFAR-100."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (number, cifar.SIDE, cifar.SIDE, 3), dtype=np.uint8))
    return cifar.Images(pixels, torch.from_numpy(rng.integers(0, CLASSES, number)), STATISTICS, device)


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


def backward(network: nn.Module, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """From gradients of one into a network's logits and embedding."""
    (output[0].sum() + output[1].sum()).backward()
    network.zero_grad()


def on_one_thread(batches: Iterator) -> None:
    """Takes the next batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    next(batches)
    torch.set_num_threads(threads)


def loss_functions(
    terms_of: Callable, plan: Plan, teacher: Wrapper, network: Wrapper, amp: str, teacher_graph: bool
) -> Side:
    """The terms with their gradients, at the pair's own embedding widths (`loss`) and at others (`D128` …)."""

    def function(s_width: int, t_width: int) -> Callable[[], Any]:
        torch.manual_seed(0)
        shapes = [(VIEWS * plan.batch, width) for width in (CLASSES, CLASSES, s_width, t_width)]
        inputs = [torch.randn(shape).to(plan.device, DTYPES[amp]) for shape in shapes]
        for x in inputs if teacher_graph else inputs[::2]:
            x.requires_grad_()
        target = torch.randint(CLASSES, (plan.batch,)).to(plan.device)
        return lambda: torch.autograd.grad(total(terms_of(*inputs, target)), inputs[::2])

    own = function(*(net.proj_head[0].in_features for net in (network, teacher)))
    return {"loss": own} | {f"D{width}": function(width, width) for width in plan.widths}


def matrix_product(side: int, amp: str, device: torch.device) -> Callable[[], Tensor]:
    """A product of 2 · side³ FLOP, large enough for the machine's peak.

    As a 1 × 1 convolution, so by the library of the others: in float32 `@` has half its rate on AMD, no TF32 on CUDA.
    """
    x = torch.randn(side // 16, side, 4, 4).to(device, DTYPES[amp], memory_format=torch.channels_last)
    weight = torch.randn(side, side, 1, 1).to(x)
    return lambda: F.conv2d(x, weight)


@torch.no_grad()
def check_pair(pair: str) -> None:
    """Raises Fault unless a step in float32 has the same loss on both sides. On the CPU: no TF32 blurs it."""
    device = torch.device("cpu")
    x, target = next(make_images(16, device).train_batches(16, VIEWS, 0, "check", 1))
    teacher, network = (net.to(memory_format=torch.channels_last) for net in make_networks(pair, device))
    loss_of = student.make_loss(student_flags(), fold_batch_norms(teacher), network, utils.Precision("off", device))
    _, here = loss_of(x, target)
    _, published = published_loss(*make_networks(pair, device), x.contiguous(), target)
    for name, expected in published.items():
        if not torch.isclose(here[name], expected, rtol=1e-4, atol=1e-4):
            raise utils.Fault(f"{pair}: {name} is {here[name]:.6f} here and {expected:.6f} published: unequal work")


# ---------------------------------------------------------------------------------------------------------- measuring


@lru_cache
def figures_of(side: str, plan: Plan, pair: str) -> Side:
    return SIDES[side](plan, pair, make_images(plan.images, plan.device))


def clock(side: str, plan: Plan, pair: str, figure: str) -> float:
    """Seconds of one call; of brief ones, the mean of ten.

    Runs in the side's own process, which keeps its networks and data from call to call.
    """
    function = figures_of(side, plan, pair)[figure]
    brief = figure in ("views", "loss") or figure.startswith("D")
    calls = 10 if brief or plan.device.type == "cuda" else 1
    if brief:
        function()  # what the other side left in the caches would cost more than the call
    if plan.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls
    began = time.perf_counter()
    for _ in range(calls):
        function()
    if plan.device.type == "mps":
        torch.mps.synchronize()
    return (time.perf_counter() - began) / calls


def new_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def call(process: ProcessPoolExecutor, function: Callable, *args: Any) -> Any:
    try:
        return process.submit(function, *args).result()
    except BrokenProcessPool as error:
        raise utils.Fault("a process of the measurement was killed; memory may have run out") from error


def time_all(plan: Plan, calls: dict[Any, Callable[[], float]], share: float = 1.0) -> dict[Any, np.ndarray]:
    """Seconds of each call and repetition, in turns so that a busy moment strikes all alike."""
    for run in calls.values():
        run()  # to warm up
    rounds: list[list[float]] = []
    began = time.monotonic()
    while len(rounds) < plan.least or (len(rounds) < 50 and time.monotonic() - began < plan.seconds * share):
        rounds.append([run() for run in calls.values()])
    return dict(zip(calls, np.array(rounds).T, strict=True))


def step_flops(plan: Plan, pair: str) -> float:
    """Of the convolutions and linear layers: teacher forward, student forward and backward."""
    teacher, network = make_networks(pair, torch.device("cpu"))
    x = torch.randn(VIEWS, 3, cifar.SIDE, cifar.SIDE)
    with FlopCounterMode(display=False) as counter:
        teacher(x)
        backward(network, network(x))
    return counter.get_total_flops() * plan.batch


def peak_memory(side: str, plan: Plan, pair: str) -> int:
    """Bytes that a student step needs beyond those held before it. Wants a process of its own."""
    images = make_images(2 * plan.batch, plan.device)
    small, full = (SIDES[side](plan._replace(batch=batch), pair, images)["student_step"] for batch in (2, plan.batch))
    small()  # loads the code of the kernels
    before = memory(plan.device, "VmRSS")
    full()
    return memory(plan.device, "VmHWM") - before


def memory(device: torch.device, key: str) -> int:
    """Bytes held now (VmRSS) or at most so far (VmHWM; unlike ru_maxrss, not inherited from the parent)."""
    if device.type == "cuda":
        return (torch.cuda.memory_allocated if key == "VmRSS" else torch.cuda.max_memory_allocated)(device)
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def row(figure: str, pair: str, amp: str, published: float | None, here: float, ratio: float | None = None) -> dict:
    """One row, printed as soon as it is measured."""
    ratio = published / here if ratio is None and here > 0 else ratio
    unit = {"overhead": "{:.1%}", "peak_share": "{:.1%}", "peak_memory": "{:,.0f} B"}.get(figure, "{:,.5f} s")
    numbers = {"published": published, "here": here, "ratio": ratio}
    numbers = {name: None if value is None else float(value) for name, value in numbers.items()}
    shown = ("" if x is None else f.format(x) for f, x in zip((unit, unit, "{:.2f}"), numbers.values(), strict=True))
    print(TABLE.format(figure, pair, amp, *shown), flush=True)
    return {"figure": figure, "pair": pair, "amp": amp} | numbers


def pair_rows(plan: Plan, pair: str, first: bool) -> Iterator[dict]:
    """All figures of one pair; of the first also the loss at other widths, and the step in bf16."""
    check_pair(pair)
    with new_process() as theirs, new_process() as ours:
        processes = {"published": theirs, "here": ours}

        def call_of(figure: str, side: str, amp: str = plan.amp) -> Callable[[], float]:
            return partial(call, processes[side], clock, side, plan._replace(amp=amp), pair, figure)

        def calls_of(*figures: str) -> dict:
            return {(figure, side): call_of(figure, side) for figure in figures for side in processes}

        for figure in ("views", "loss", *(f"D{width}" for width in plan.widths if first)):
            values = time_all(plan, calls_of(figure), 0.1).values()
            name = ("loss", figure) if figure[0] == "D" else (figure, pair)
            yield row(*name, plan.amp, *map(median, values))

        figures = ("teacher_forward", "student_forward_backward", "student_step")
        calls = calls_of(*figures, "product")  # the peak in the same rounds: what slows the machine slows both
        bf16_too = first and plan.amp == "off" and has_bf16(plan.device)
        if bf16_too:
            calls["bf16"] = call_of("student_step", "here", "bf16")
        seconds = time_all(plan, calls)
        for figure in figures:
            yield row(figure, pair, plan.amp, *(median(seconds[figure, side]) for side in processes))
        step = {side: median(seconds["student_step", side]) for side in processes}
        if bf16_too:
            yield row("student_step", pair, "bf16", step["published"], median(seconds["bf16"]))
        outside = (1 - sum(seconds[f, side] for f in figures[:2]) / seconds["student_step", side] for side in processes)
        yield row("overhead", pair, plan.amp, *map(median, outside))
        ideal = step_flops(plan, pair) / (2 * plan.side**3)  # in products
        yield row("peak_share", pair, plan.amp, *(ideal * median(seconds["product", s]) / step[s] for s in processes))

        calls = {"once": call_of("ss_features", "here")} | calls_of("ss_epoch")
        once, published, here = map(median, time_all(plan, calls, 0.5).values())
        yield row("ss_epoch", pair, plan.amp, published, here + once / student_flags().t_epoch)
    if plan.device.type == "cuda" or Path("/proc/self/status").exists():
        with new_process() as theirs, new_process() as ours:
            alone = plan._replace(compile=False)  # a compiler's own memory is not the step's
            peaks = (call(theirs, peak_memory, "published", alone, pair), call(ours, peak_memory, "here", alone, pair))
            yield row("peak_memory", pair, plan.amp, *peaks)


def batch_rows(plan: Plan, pair: str) -> Iterator[dict]:
    with new_process() as ours:
        plans = {size: plan._replace(batch=size) for size in plan.batches}
        calls = {size: partial(call, ours, clock, "here", plans[size], pair, "student_step") for size in plans}
        each = {size: median(values) / size for size, values in time_all(plan, calls).items()}
    for size, seconds in each.items():
        yield row("batch_scaling", f"{pair} B{size}", plan.amp, None, seconds, seconds / each[plan.batches[0]])


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 by its own instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


@utils.entry
def main(argv: list[str] | None = None) -> None:
    parser = utils.Parser(description="Times this repository against the published pipeline.")
    add = parser.add_argument
    add("--pairs", nargs="+", default=PAIRS, metavar="TEACHER:STUDENT", help="the networks to measure")
    add("--amp", choices=list(DTYPES), default="off", help="half precision here; the published side stays float32")
    add("--compile", action="store_true", help="torch.compile here; the minutes it takes are not counted")
    add("--device", help="for example cpu or cuda:1; left out: the first GPU, else the CPU")
    add("--quick", action="store_true", help="the first pair alone, fewer repetitions, a narrower range")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    for teacher, _, network in (pair.partition(":") for pair in args.pairs):
        utils.check_arch("--pairs TEACHER:STUDENT: teacher", teacher, models.model_dict)
        utils.check_arch("--pairs TEACHER:STUDENT: student", network, models.model_dict)
    if args.json and not args.json.absolute().parent.is_dir():
        raise utils.UserError(f"--json {args.json}: its folder does not exist")
    with utils.user_errors(RuntimeError, AssertionError):  # no such device in this build, or on this machine
        device = torch.zeros(1, device=args.device).device if args.device else utils.pick_device(0)
    plan, pairs = Plan(device, args.amp, args.compile, side=8192 if device.type == "cuda" else 2048), args.pairs
    if args.quick:
        plan, pairs = plan._replace(**QUICK), pairs[:1]
    print(f"machine: {device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print(TABLE.format("figure", "pair", "amp", "published", "here", "ratio"))
    rows = [row for pair in pairs for row in pair_rows(plan, pair, pair == pairs[0])]
    rows += batch_rows(plan, pairs[0])
    if args.json:
        utils.write_atomically(args.json, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
