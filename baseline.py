"""Distils a teacher into a student by one of the methods that SSKD (Xu et al., ECCV 2020) is compared with.

    python baseline.py --method crd --t-path experiments/teacher_wrn_40_2_seed0 --s-arch wrn_16_2
    python baseline.py --method kd --t-path experiments/teacher_vgg13_seed0 --s-arch MobileNetV2 --lr 0.01
    python baseline.py --method crd --t-path … --s-arch wrn_16_2 --ce-weight 1 --kd-weight 0     # as in CRD's tables

The loss is ce-weight · ce + kd-weight · kd + weight · method, as in SSKD's tables, on one view of each image: a random
crop, perhaps flipped. With AB and FT a first phase of 30 epochs comes before. The same command continues a run that
was stopped.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cifar
import utils
from harness import checkpoint, flags, machine, processes
from harness.checkpoint import teacher_name
from harness.export import export
from harness.flags import UserError
from harness.record import Run, entry
from methods import METHODS, Method, Outputs, kd_loss, set_phase
from models import build, folder_name
from teacher_store import Features, features, read_teacher, report_teacher
from wrapper import classifier, frozen, of_feature


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser("Distils a teacher into a student by a compared method.")
    weight, temperature, known = flags.number(float, 0), flags.number(float, 0, above=True), ", ".join(METHODS)
    flags.add_networks(parser)

    terms = "the student's loss: weighted sum of three terms (a term of weight 0 is only logged)"
    add = parser.add_argument_group(terms).add_argument
    add("--method", choices=METHODS, metavar="METHOD", help=f"one of {known}")
    add("--ce-weight", type=weight, help="cross-entropy with the labels (default: 0.1; dkd 1)")
    add("--kd-weight", type=weight, help="the teacher's logits (default: 0.9; 0 with dkd and ls, which replace kd)")
    add("--kd-T", type=temperature, default=4.0, help="temperature of kd; higher shows more of the wrong classes")
    add("--weight", type=weight, help="the method's own term (default: as published, for example 0.8 with crd)")
    first = "epochs of ab's and ft's first phase (default: 30), or of dkd's warm-up (default: 20)"
    add("--first-epoch", type=flags.number(int, 1), help=first)

    args = parser.parse_args(argv)
    if args.method is None:
        parser.error(f"--method is missing; the known ones are {known}")
    flags.check_export(parser, args)
    flags.check_networks(parser, args)
    method = METHODS[args.method]
    for name in ("ce_weight", "kd_weight", "weight"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(method, name))
    if not method.first_epochs:
        args.first_epoch = None  # so that one command line serves all methods of a study
    if args.method == "kd" and args.weight:
        parser.error("--method kd has no term beside kd itself, whose weight is --kd-weight")
    if args.t_features != "compute" and method.maps:
        parser.error(f"--t-features {args.t_features}: {args.method} needs maps, which are not stored; use compute")
    if not (args.ce_weight or args.kd_weight or (args.weight and args.method != "ab")):  # ab's own term is 0
        parser.error("all weights are 0: there is nothing to learn")
    return args


@entry(several=True)
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder = train(args)
    if args.export is not None and processes.RANK == 0:
        export(checkpoint.read(folder, args.s_arch), args)


def train(args: Namespace) -> Path:
    """Trains the student, or what a stopped run left of it; returns the run's folder."""
    found, source, network, identity = read_teacher(args)
    run = Run(run_folder(args, teacher_name(found.file)), flags.settings(args, identity))
    if run.finished():
        return run.folder
    flags.warn_of_schedule(args)
    device = machine.pick_device(args.gpu_id)
    data = cifar.load(source, args, device)
    machine.set_up(args, device)

    student = build(args.s_arch, len(source.classes), source.side)
    for module in (student, network):
        module.to(device, memory_format=cifar.LAYOUT)
    preact, autocast = METHODS[args.method].preact, utils.precision(args.amp, device)
    teacher = frozen(network, maps=args.t_features == "compute", preact=preact)
    utils.cast_once(teacher, args.amp)
    networks = Networks(student, teacher, classifier(teacher), preact, autocast)
    method = make_method(args, networks, data.train, found.arch)

    reported = report_teacher(found, network, data, autocast)
    run.start(device, teacher=reported, images=source.counts, **utils.sizes(source.side, student, network))
    table = features(args, found.file, identity, data.train, teacher)
    if method.first_phase:
        prepare(args, run, networks, method, data.train)
    distil(args, run, networks, method, data, table)
    return run.folder


def run_folder(args: Namespace, teacher: str) -> Path:
    """experiments/{method}_student_…: named by the flags of the loss and by the teacher's folder."""
    return Path(args.experiments) / (
        f"{args.method}_student_{folder_name(args.s_arch)}"
        f"_weight{args.ce_weight}+{args.kd_weight}+{args.weight}_T{args.kd_T}"
        f"{flags.data_name(args)}_seed{args.seed}_{teacher}"
    )


# ------------------------------------------------------------------------------------------------ networks and method


class Networks(NamedTuple):
    """Both networks of a step, and how they run."""

    student: nn.Module
    teacher: nn.Module  # frozen
    classifier: nn.Linear  # the teacher's, which turns a stored feature into logits
    preact: bool  # whether the method reads features before their ReLU
    autocast: Callable

    def of_student(self, x: Tensor) -> Outputs:
        """The student's outputs for images (N, 3, 32, 32)."""
        with self.autocast():
            return Outputs(*self.student(x, is_feat=True, preact=self.preact))

    def of_teacher(self, x: Tensor, feature: Tensor | None = None) -> Outputs:
        """The teacher's outputs for the same images, from their stored `feature` (N, D) if there is one."""
        with self.autocast(), torch.no_grad():  # not inference_mode, because CRD trains an embedding of the feature
            if feature is None:
                return Outputs(*self.teacher(x))
            feature, logits = of_feature(self.classifier, feature)
            return Outputs([feature], logits)


def make_method(args: Namespace, networks: Networks, images: cifar.Images, t_arch: str) -> Method:
    """The method, with adapters that fit the networks' features.

    Raises:
        UserError: it does not work with these networks or training images.
    """
    networks.student.eval()  # keeps its running statistics as they are
    x = torch.zeros(2, 3, images.side, images.side, device=images.device)
    method = METHODS[args.method](networks.of_student(x), networks.of_teacher(x), images.labels)
    method.choose_pair(t_arch, args.s_arch)
    if method.first_phase:
        method.first_modules(networks.student)  # an error should come before the run begins
    if processes.COUNT > 1 and (method.first_phase or [*method.parameters()]):
        raise UserError(
            f"{args.method} trains layers of its own, which torchrun can't do; start one process with python"
        )
    if args.first_epoch is not None:
        method.first_epochs = args.first_epoch
    return method.to(images.device, memory_format=cifar.LAYOUT)


# ---------------------------------------------------------------------------------------------------------- the phases


def prepare(args: Namespace, run: Run, networks: Networks, method: Method, images: cifar.Images) -> None:
    """The first phase: AB trains the student up to its last stage, FT its paraphraser of the teacher's map."""
    trained = set_phase(method, networks.student, first=True)
    loss_of = utils.compiled_loss(make_first_loss(networks, method), args.compile, images)
    sgd = utils.SGD(trained, method.first_rate(args.s_arch, args.lr), [], args)
    parts = {"student": networks.student, "method": method, "first_optimisation": sgd}
    for epoch in run.epochs("first", method.first_epochs, **parts):
        trained.train()
        meter = utils.Meter(f"first epoch {epoch}", len(images), args.amp)
        for batch in images.batches("first", epoch, views=1):
            loss, terms = loss_of(batch)
            sgd.step(loss)
            meter.add(len(batch.target), loss, terms)
        then = f"{args.epoch} epochs of the student"
        run.log(epoch, len(images), then, train=meter.means() | {"first_lr": sgd.lr})


def make_first_loss(networks: Networks, method: Method) -> Callable:
    """The first phase's loss as a function that traces to one graph: batch → loss, what to log."""

    def loss_of(batch: cifar.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        student = networks.of_student(batch.x) if method.first_student else None
        loss = method.first_loss(student, networks.of_teacher(batch.x))
        return loss, {"first_loss": loss}

    return loss_of


def distil(
    args: Namespace, run: Run, networks: Networks, method: Method, data: cifar.Data, table: Features | None
) -> None:
    """Trains the student, and the method's adapters with it."""
    student, autocast = networks.student, networks.autocast
    trained = set_phase(method, student)
    loss_of = utils.compiled_loss(make_loss(args, networks, method), args.compile, data.train)
    sgd = utils.SGD(trained, args.lr, args.milestones, args)
    for epoch in run.epochs("student", args.epoch, student=student, method=method, optimisation=sgd):
        method.start_epoch(args.seed, epoch)
        trained.train()
        meter = utils.Meter(f"student epoch {epoch}", len(data.train), args.amp)
        for batch in (table or data.train).batches("baseline", epoch, views=1):
            loss, terms = loss_of(batch)
            sgd.step(loss)
            meter.add(len(batch.target), loss, terms)
        means = meter.means()
        test = utils.evaluate(student, data.val, autocast, f"test after student epoch {epoch}")
        tested = {"ce_loss": test.loss, "cls_acc": test.acc, "cls_acc_top5": test.acc_top5}
        run.log(epoch, len(data.train), train=means | {"lr": sgd.lr}, val=tested)
        sgd.end_epoch()
        best = {"epoch": epoch, "state_dict": student.state_dict(), "best_acc": test.acc}
        run.keep_best("student_best.pth", test.acc, best | {"about": {"arch": args.s_arch} | data.about})
    run.finish(utils.test_of_best(student, run.best_checkpoint, data, autocast))


def make_loss(args: Namespace, networks: Networks, method: Method) -> Callable:
    """The student's loss as a function that traces to one graph: batch → loss, what to log."""
    # with method kd, which has no term of its own, the later entry counts
    weights = {"ce": args.ce_weight, args.method: args.weight, "kd": args.kd_weight}

    def loss_of(batch: cifar.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = networks.of_student(batch.x), networks.of_teacher(batch.x, batch.feature)
        student, teacher = (whole(each, len(batch.target), method.maps) for each in outputs)
        terms = {
            "ce": F.cross_entropy(student.logits.float(), batch.target),
            args.method: method(student, teacher, batch.target, batch.rows),
            "kd": kd_loss(student.logits, teacher.logits, args.kd_T),
        }
        loss = sum(weights[name] * term for name, term in terms.items() if weights[name])
        logged = {f"{name}_loss": term.detach() for name, term in terms.items()}
        return loss, logged | {"cls_acc": utils.accuracy(student.logits, batch.target)}

    return loss_of


def whole(outputs: Outputs, images: int, maps: bool) -> Outputs:
    """The outputs for all `images` of a batch, of which this process has its share; without `maps` one feature."""
    features = [processes.gathered(x, images) for x in outputs.features[0 if maps else -1 :]]
    return Outputs(features, processes.gathered(outputs.logits, images))


if __name__ == "__main__":
    main()
