"""Distils a teacher into a student with SSKD (Xu et al., ECCV 2020): steps 2 and 3 of the method.

    python student.py --t-path experiments/teacher_wrn_40_2_seed0 --s-arch wrn_16_2
    python student.py --t-path experiments/teacher_vgg13_seed0 --s-arch MobileNetV2 --lr 0.01
    python student.py --t-path resnet32x4_vanilla/ckpt_epoch_240.pth --t-arch resnet32x4 --s-arch resnet8x4
    python student.py --t-path … --s-arch wrn_16_2 --tf-weight 0 --ss-weight 0          # KD, on the same four views

Step 2 trains a self-supervision (SS) head on the frozen teacher, or reads the head that an earlier student with the
same teacher, flags and data has left. Step 3 trains the student. The same command continues a run that was stopped.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import cifar
import utils
from harness import checkpoint, flags, machine, processes
from harness.checkpoint import teacher_name
from harness.export import export
from harness.record import Run, entry
from losses import VIEWS, SSKDTerms, positives, similarity_matrix, split_views, ss_head_loss, sskd_terms
from models import build, folder_name
from teacher_store import Features, SSHeadFile, features, read_teacher, report_teacher
from wrapper import Output, Wrapper, frozen


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser("Distils a teacher into a student with SSKD.")
    rate, weight, ratio = flags.number(float, 0, above=True), flags.number(float, 0), flags.number(float, 0, 1)
    temperature, count = rate, flags.number(int, 1)

    add = flags.add_networks(parser)
    add("--s-path", help="export this student (a run folder or checkpoint) instead of training one")

    add = parser.add_argument_group("the teacher's SS head (the backbone stays frozen)").add_argument
    add("--t-epoch", type=count, default=60, help="epochs")
    add("--t-lr", type=rate, default=0.05, help="learning rate")
    milestones = {"type": count, "nargs": "+", "action": flags.Increasing, "default": [30, 45]}
    add("--t-milestones", **milestones, help="epochs after which the learning rate falls")

    terms = "the student's loss: weighted sum of four terms (a term of weight 0 is only logged)"
    add = parser.add_argument_group(terms).add_argument
    add("--ce-weight", type=weight, default=0.1, help="λ1, cross-entropy with the labels")
    add("--kd-weight", type=weight, default=0.9, help="λ2, the teacher's logits on normal images")
    add("--tf-weight", type=weight, default=2.7, help="λ4, the teacher's logits on rotated images (the paper's L_T)")
    add("--ss-weight", type=weight, default=10.0, help="λ3, the teacher's similarities between images")
    add("--kd-T", type=temperature, default=4.0, help="temperature of kd; higher shows more of the wrong classes")
    add("--tf-T", type=temperature, default=4.0, help="temperature of tf")
    add("--ss-T", type=temperature, default=0.5, help="temperature of ss; similarities lie in [-1, 1]")
    add("--ratio-tf", type=ratio, default=1.0, help="k: share of the teacher's wrong predictions that tf keeps")
    add("--ratio-ss", type=ratio, default=0.75, help="k: share of the teacher's wrong matches that ss keeps")

    args = parser.parse_args(argv)
    flags.check_export(parser, args)
    if args.s_path is None:
        flags.check_networks(parser, args)
    elif args.export is None:
        parser.error("--s-path is for --export: give the file to write, too")
    if args.batch_size == 1:
        parser.error("--batch-size 1: a view needs other images to be compared with; use at least 2")
    if not any(value for name, value in vars(args).items() if name.endswith("_weight")):
        parser.error("all weights are 0: there is nothing to learn")
    return args


@entry(several=True)
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    path = args.s_path if args.s_path is not None else train(args)
    if args.export is not None and processes.RANK == 0:
        export(checkpoint.read(path, args.s_arch), args)


def train(args: Namespace) -> Path:
    """Steps 2 and 3, or what a stopped run left of them; returns the run's folder."""
    found, source, network, identity = read_teacher(args)
    run = Run(run_folder(args, teacher_name(found.file)), flags.settings(args, identity))
    if run.finished():
        return run.folder
    flags.warn_of_schedule(args)
    device = machine.pick_device(args.gpu_id)
    data = cifar.load(source, args, device)
    machine.set_up(args, device)

    student = Wrapper(build(args.s_arch, len(source.classes), source.side))
    for module in (student, network):
        module.to(device, memory_format=cifar.LAYOUT)
    torch.manual_seed(args.seed)  # again, so that the SS head does not depend on the student
    teacher = Wrapper(frozen(network, maps=False)).to(device).eval()
    utils.cast_once(teacher.backbone, args.amp)

    reported = report_teacher(found, network, data, utils.precision(args.amp, device))
    run.start(device, teacher=reported, images=source.counts, **utils.sizes(source.side, student.backbone, network))
    table = features(args, found.file, identity, data.train, teacher.backbone)
    train_ss_head(args, run, teacher, data, table, SSHeadFile(args, found.file, identity, device))
    run.keep("teacher.pth", teacher.unfolded_state(network))
    distil(args, run, teacher, student, data, table)
    return run.folder


def run_folder(args: Namespace, teacher: str) -> Path:
    """experiments/sskd_student_…: named by the flags of the loss and by the teacher's folder."""
    return Path(args.experiments) / (
        f"sskd_student_{folder_name(args.s_arch)}"
        f"_weight{args.ce_weight}+{args.kd_weight}+{args.tf_weight}+{args.ss_weight}"
        f"_T{args.kd_T}+{args.tf_T}+{args.ss_T}_ratio{args.ratio_tf}+{args.ratio_ss}"
        f"{flags.data_name(args)}_seed{args.seed}_{teacher}"
    )


# ---------------------------------------------------------------------------------------- step 2: the teacher's SS head


def train_ss_head(
    args: Namespace, run: Run, teacher: Wrapper, data: cifar.Data, table: Features | None, head_file: SSHeadFile
) -> None:
    """Trains the SS head of the frozen `teacher` on the contrastive task, or reads the head of an earlier student."""
    head, device = teacher.proj_head, data.train.device
    autocast = utils.precision(args.amp, device)
    loss_of = utils.compiled_loss(make_ss_loss(teacher, autocast), args.compile, data.train)
    sgd = utils.SGD(head, args.t_lr, args.t_milestones, args)
    test_features = None
    with head_file.alone():
        if not run.resumed and (lines := head_file.read_into(head)):
            run.replay(lines)
        for epoch in run.epochs("ss_head", args.t_epoch, teacher_head=head, head_optimisation=sgd):
            test_features = test_features or ss_test_features(teacher, data.val, autocast)
            seen = table.batches_without_views if table else data.train.batches
            meter = utils.Meter(f"SS head epoch {epoch}", len(data.train), args.amp)
            for batch in seen("ss_head", epoch, VIEWS):
                loss, terms = loss_of(batch)
                sgd.step(loss)
                meter.add(len(batch.target), loss, terms)
            trained = meter.means()
            tested = test_ss_head(head, test_features, autocast, f"test after SS head epoch {epoch}")
            then = f"{args.epoch} epochs of the student"
            run.log(epoch, len(data.train), then, train=trained | {"teacher_lr": sgd.lr}, val=tested)
            sgd.end_epoch()
            if epoch == args.t_epoch:
                head_file.write(head, run.lines("ss_head"))


def make_ss_loss(teacher: Wrapper, autocast: Callable) -> Callable:
    """The head's contrastive loss: batch → loss, what to log. Its gradient stops at the frozen backbone."""

    def loss_of(batch: cifar.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast():
            embedding = teacher(batch.x, bb_grad=False, feature=batch.feature).embedding
        return ss_loss_and_log(processes.gathered(embedding, len(batch.target), VIEWS))

    return loss_of


def ss_loss_and_log(embedding: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss, similarity = ss_head_loss(embedding)
    accuracy = utils.accuracy(similarity, positives(similarity))
    return loss, {"teacher_ssp_loss": loss, "teacher_ssp_acc": accuracy}


@torch.no_grad()
def ss_test_features(teacher: Wrapper, images: cifar.Images, autocast: Callable) -> list[tuple[int, Tensor]]:
    """B and the features (4B, D) of each test batch. The backbone is frozen, so they serve all epochs of the head."""
    with autocast():
        return [(len(batch.target), teacher(batch.x).feature) for batch in images.test_batches(VIEWS)]


@torch.no_grad()
def test_ss_head(
    head: nn.Module, features: list[tuple[int, Tensor]], autocast: Callable, label: str
) -> dict[str, float]:
    meter = utils.Meter(label)
    for images, feature in features:
        with autocast():
            embedding = processes.gathered(head(feature), images, VIEWS)
        meter.add(images, *ss_loss_and_log(embedding))
    return meter.means()


# ------------------------------------------------------------------------------------------------- step 3: the student


def distil(
    args: Namespace, run: Run, teacher: Wrapper, student: Wrapper, data: cifar.Data, table: Features | None
) -> None:
    """Trains the student (backbone and SS head) on the four views of each image."""
    autocast = utils.precision(args.amp, data.train.device)
    loss_of = utils.compiled_loss(make_loss(args, teacher, student, autocast), args.compile, data.train)
    sgd = utils.SGD(student, args.lr, args.milestones, args)
    parts = {"student": student, "teacher_head": teacher.proj_head, "optimisation": sgd}
    for epoch in run.epochs("student", args.epoch, **parts):
        student.train()
        meter = utils.Meter(f"student epoch {epoch}", len(data.train), args.amp)
        for batch in (table or data.train).batches("student", epoch, VIEWS):
            loss, terms = loss_of(batch)
            sgd.step(loss)
            meter.add(len(batch.target), loss, terms)
        trained = meter.means()
        test = utils.evaluate(student.backbone, data.val, autocast, f"test after student epoch {epoch}")
        tested = {"ce_loss": test.loss, "cls_acc": test.acc, "cls_acc_top5": test.acc_top5}
        run.log(epoch, len(data.train), train=trained | {"lr": sgd.lr}, val=tested)
        sgd.end_epoch()
        best = {"epoch": epoch, "state_dict": student.state_dict(), "best_acc": test.acc}
        run.keep_best("student_best.pth", test.acc, best | {"about": {"arch": args.s_arch} | data.about})
        if epoch in (1, args.epoch):
            utils.show(run, epoch, teacher, student, data, autocast)
    run.finish(utils.test_of_best(student, run.best_checkpoint, data, autocast, student.backbone))


def make_loss(args: Namespace, teacher: Wrapper, student: Wrapper, autocast: Callable) -> Callable:
    """The student's loss as a function that traces to one graph: batch → loss, what to log.

    loss = λ1 · ce + λ2 · kd + λ3 · ss + λ4 · tf, equation 8 of the paper.
    """
    weights = SSKDTerms(ce=args.ce_weight, kd=args.kd_weight, tf=args.tf_weight, ss=args.ss_weight)
    settings = {name: getattr(args, name) for name in ("kd_T", "tf_T", "ss_T", "ratio_tf", "ratio_ss")}

    def loss_of(batch: cifar.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast():
            with torch.no_grad():
                t = teacher(batch.x, feature=batch.feature)
            s = student(batch.x)
        images = len(batch.target)  # of all processes
        s, t = (Output(*(processes.gathered(x, images, VIEWS) for x in output)) for output in (s, t))
        terms = sskd_terms(s.logits, t.logits, s.embedding, t.embedding, batch.target, **settings)
        loss = sum(weight * term for weight, term in zip(weights, terms, strict=True) if weight)
        with torch.no_grad():
            logged = {f"{name}_loss": term.detach() for name, term in terms._asdict().items()}
            similarity = similarity_matrix(s.embedding)
            logged["cls_acc"] = utils.accuracy(split_views(s.logits)[0], batch.target)
            logged["ss_acc"] = utils.accuracy(similarity, positives(similarity))
        return loss, logged

    return loss_of


if __name__ == "__main__":
    main()
