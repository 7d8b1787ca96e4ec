"""Distils a teacher into a student by one of the methods that SSKD (Xu et al., ECCV 2020) is compared with.

    python baseline.py --method crd --t-path experiments/teacher_wrn_40_2_seed0 --s-arch wrn_16_2
    python baseline.py --method kd --t-path experiments/teacher_vgg13_seed0 --s-arch MobileNetV2 --lr 0.01
    python baseline.py --method crd --t-path … --s-arch wrn_16_2 --ce-weight 1 --kd-weight 0     # as in CRD's tables

The loss is ce-weight · ce + kd-weight · kd + weight · method, as in SSKD's tables, on one view of each image: a random
crop, perhaps flipped. With AB and FT a first phase of 30 epochs comes before. The same command continues a run that
was stopped.
"""

from argparse import Namespace

from harness import flags


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser("Distils a teacher into a student by a compared method.")
    weight, temperature, known = flags.number(float, 0), flags.number(float, 0, above=True), ", ".join(flags.METHODS)
    flags.add_networks(parser)

    terms = "the student's loss: weighted sum of three terms (one of weight 0 is only logged)"
    add = parser.add_argument_group(terms).add_argument
    add("--method", choices=flags.METHODS, metavar="METHOD", help=f"one of {known}")
    add("--ce-weight", type=weight, help="cross-entropy with the labels (default: 0.1; dkd 1)")
    add("--kd-weight", type=weight, help="the teacher's logits (default: 0.9; dkd and ls, which replace kd, 0)")
    add("--kd-T", type=temperature, default=4.0, help="temperature of kd: higher shows more of the wrong classes")
    add("--weight", type=weight, help="the method's own term (default: as published, e.g. crd 0.8)")
    first = "epochs of ab's and ft's first phase (default: 30), or over which dkd's term grows (default: 20)"
    add("--first-epoch", type=flags.number(int, 1), help=first)

    args = parser.parse_args(argv)
    if args.method is None:
        parser.error(f"--method is missing; the known ones are {known}")
    flags.check_export(parser, args)
    flags.check_networks(parser, args)
    from methods import METHODS  # only now: it needs PyTorch

    for name, default in (("ce_weight", 0.1), ("kd_weight", 0.9), ("weight", None)):
        if getattr(args, name) is None:
            setattr(args, name, getattr(METHODS[args.method], name, default))
    if not hasattr(METHODS[args.method], "first_epochs"):
        args.first_epoch = None  # so that it can be given to all methods of a study
    if args.method == "kd" and args.weight:
        parser.error("--method kd has no term beside kd itself, whose weight is --kd-weight")
    if args.t_features != "compute" and getattr(METHODS[args.method], "maps", True):
        parser.error(f"--t-features {args.t_features}: {args.method} asks for maps, which are not stored; use compute")
    if not (args.ce_weight or args.kd_weight or (args.weight and args.method != "ab")):  # ab's term is 0
        parser.error("no term has a weight: there is nothing to learn")
    return args


from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cifar
import models
import utils
from methods import METHODS, MethodError, Outputs, kd_loss, set_phase
from harness.record import Run, entry, export
from teacher_store import TeacherCheckpoint, load_teacher, look_once, report_teacher, stored
from wrapper import classifier, frozen, of_feature


@entry(cifar.DataError, models.CheckpointError, models.ExportError, MethodError)
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder = train(args)
    if args.export is not None:
        checkpoint = models.read(folder, args.s_arch)
        export(args.export, checkpoint.exported(cifar.about_dataset(args, checkpoint.about), args.export))


def train(args: Namespace) -> Path:
    """Trains the student, or what a stopped run left of it; returns the run's folder."""
    checkpoint = load_teacher(args)
    more = {"teacher": checkpoint.fingerprint, "t_features": stored(args), **cifar.identity(args)}
    run = Run(run_folder(args, checkpoint.folder), args, **more)
    if run.finished(product="student_best.pth" if args.export else None):
        return run.folder
    device = utils.pick_device(args.gpu_id)
    data = cifar.load(args, device)
    utils.set_up(args.seed, device, args.deterministic)
    networks = make_networks(args, checkpoint.network, device)
    method = make_method(args, checkpoint, networks, data.train.labels)
    look_once(args, checkpoint, networks.teacher, networks.autocast, train=data.train)
    # only now: whether the method goes with the networks and the features have space is known
    run.start(device, teacher=report_teacher(args, checkpoint, checkpoint.network, data.test, networks.autocast))
    run.tell_sizes(networks.student, checkpoint.network)
    if hasattr(method, "first_loss"):
        prepare(args, run, networks, method, data.train)
    distil(args, run, networks, method, data)
    return run.folder


def run_folder(args: Namespace, teacher: str) -> Path:
    """experiments/{method}_student_…: named by the flags of the loss and by the teacher's folder."""
    return Path(args.experiments) / (
        f"{args.method}_student_{args.s_arch}_weight{args.ce_weight}+{args.kd_weight}+{args.weight}_T{args.kd_T}"
        f"{flags.data_name(args)}_seed{args.seed}_{teacher}"
    )


# ------------------------------------------------------------------------------------------------ networks and method


class Networks(NamedTuple):
    """What a step runs, and how."""

    student: nn.Module
    teacher: nn.Module  # frozen
    preact: bool  # whether the method wants features before their ReLU
    autocast: Callable
    classifier: nn.Linear | None = None  # the teacher's, for features that are stored

    def of_student(self, x: Tensor) -> Outputs:
        """What the student gives for images (N, 3, 32, 32)."""
        with self.autocast():
            return Outputs(*self.student(x, is_feat=True, preact=self.preact))

    def of_teacher(self, x: Tensor, feature: Tensor | None = None) -> Outputs:
        """What the teacher gives for them, going by its `feature` (N, D) where that is stored."""
        with self.autocast(), torch.no_grad():  # not inference_mode: CRD trains an embedding of the teacher's feature
            if feature is None:
                return Outputs(*self.teacher(x))
            feature, logits = of_feature(self.classifier, feature)
            return Outputs([feature], logits)


def make_networks(args: Namespace, teacher: nn.Module, device: torch.device) -> Networks:
    preact = getattr(METHODS[args.method], "preact", False)
    student = models.model_dict[args.s_arch](num_classes=cifar.num_classes(args))
    for network in (student, teacher):
        network.to(device, memory_format=torch.channels_last)
    asked = slice(-1, None) if stored(args) else slice(None)  # of the teacher's features
    teacher = frozen(teacher, asked, preact)
    return Networks(student, teacher, preact, utils.precision(args.amp, device), classifier(teacher))


def make_method(args: Namespace, checkpoint: TeacherCheckpoint, networks: Networks, labels: Tensor) -> nn.Module:
    """The method with adapters that fit the networks' features.

    Raises:
        MethodError: it does not go with these networks, or with the `labels` (N,) of the training set.
    """
    networks.student.eval()  # its running statistics stay as they are
    side = args.side or cifar.SIDE
    x = torch.zeros(2, 3, side, side, device=labels.device)
    method = METHODS[args.method](networks.of_student(x), networks.of_teacher(x), labels)
    if hasattr(method, "choose_pair"):
        method.choose_pair(checkpoint.arch, args.s_arch)
    if args.first_epoch is not None:
        method.first_epochs = args.first_epoch
    return method.to(labels.device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------- the phases


def prepare(args: Namespace, run: Run, networks: Networks, method: nn.Module, train_set: cifar.Images) -> None:
    """The first phase: AB trains the student up to its last stage, FT its paraphraser of the teacher's map."""
    trained = set_phase(method, networks.student, first=True)
    loss_of = utils.compiled(make_first_loss(networks, method), args.compile, train_set.labels.device)
    sgd = utils.SGD(trained.parameters(), method.first_rate(args.s_arch, args.lr), [], args)
    parts = {"student": networks.student, "method": method, "optimisation": sgd}
    for epoch in run.epochs("first", method.first_epochs, **parts):
        batches = train_set.batches("first", epoch, views=1)
        means = utils.train_epoch(trained, loss_of, batches, sgd, len(train_set), f"first epoch {epoch}")
        run.log(epoch, len(train_set), train=means | {"first_lr": sgd.lr})


def make_first_loss(networks: Networks, method: nn.Module) -> Callable:
    """The first phase's loss as a function that traces to one graph: batch → loss, what to log."""

    def loss_of(batch: cifar.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        student = networks.of_student(batch.x) if getattr(method, "first_student", True) else None
        loss = method.first_loss(student, networks.of_teacher(batch.x))
        return loss, {"first_loss": loss}

    return loss_of


def distil(args: Namespace, run: Run, networks: Networks, method: nn.Module, data: cifar.Data) -> None:
    """Trains the student, and the method's adapters with it."""
    train_set = data.train
    student = networks.student
    trained = set_phase(method, student)
    loss_of = utils.compiled(make_loss(args, networks, method), args.compile, train_set.labels.device)
    sgd = utils.SGD(trained.parameters(), args.lr, args.milestones, args)
    about = {"arch": args.s_arch} | data.val.about
    for epoch in run.epochs("student", args.epoch, student=student, method=method, optimisation=sgd):
        if hasattr(method, "start_epoch"):
            method.start_epoch(args.seed, epoch)
        batches = train_set.batches("baseline", epoch, views=1, features=True)
        means = utils.train_epoch(trained, loss_of, batches, sgd, len(train_set), f"student epoch {epoch}")
        ce_loss, acc, top5 = utils.evaluate(student, data.val, networks.autocast, f"test after student epoch {epoch}")
        tested = {"ce_loss": ce_loss, "cls_acc": acc, "cls_acc_top5": top5}
        run.log(epoch, len(train_set), train=means | {"lr": sgd.lr}, val=tested)
        sgd.end_epoch()
        best = {"epoch": epoch, "state_dict": student.state_dict(), "best_acc": acc, "about": about}
        run.keep_best("student_best.pth", acc, best)
    run.finish(utils.test_of_best(student, run.best_checkpoint, data, networks.autocast))


def make_loss(args: Namespace, networks: Networks, method: nn.Module) -> Callable:
    """The student's loss as a function that traces to one graph: batch → loss, what to log."""
    # two terms with method kd, which has none of its own: the later entry stands
    weights = {"ce": args.ce_weight, args.method: args.weight, "kd": args.kd_weight}

    def loss_of(batch: cifar.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher = networks.of_student(batch.x), networks.of_teacher(batch.x, batch.feature)
        terms = {
            "ce": F.cross_entropy(student.logits.float(), batch.target),
            args.method: method(student, teacher, batch.target, batch.rows),
            "kd": kd_loss(student.logits, teacher.logits, args.kd_T),
        }
        loss = sum(weights[name] * term for name, term in terms.items() if weights[name])
        logged = {f"{name}_loss": term for name, term in terms.items()}
        return loss, logged | {"cls_acc": utils.accuracy(student.logits, batch.target)}

    return loss_of


if __name__ == "__main__":
    main()
