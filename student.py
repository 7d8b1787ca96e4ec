"""Distils a teacher into a student with SSKD (Xu et al., ECCV 2020): steps 2 and 3 of the method.

    python student.py --t-path experiments/teacher_wrn_40_2_seed0 --s-arch wrn_16_2
    python student.py --t-path experiments/teacher_vgg13_seed0 --s-arch MobileNetV2 --lr 0.01
    python student.py --t-path resnet32x4_vanilla/ckpt_epoch_240.pth --t-arch resnet32x4 --s-arch resnet8x4
    python student.py --t-path … --s-arch wrn_16_2 --tf-weight 0 --ss-weight 0          # KD, on the same four views

The teacher first gets a self-supervision (SS) head, trained while its backbone stays frozen; a head that was trained
before for the same teacher, flags and data is read instead. The same command continues a run that was stopped.
"""

from argparse import Namespace

from harness import flags


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
    add("--t-milestones", **milestones, help="epochs after which the rate falls")

    terms = "the student's loss: weighted sum of four terms (one of weight 0 is only logged)"
    add = parser.add_argument_group(terms).add_argument
    add("--ce-weight", type=weight, default=0.1, help="cross-entropy with the labels")
    add("--kd-weight", type=weight, default=0.9, help="the teacher's logits on normal images")
    add("--tf-weight", type=weight, default=2.7, help="the teacher's logits on rotated images")
    add("--ss-weight", type=weight, default=10.0, help="the teacher's similarities between images")
    add("--kd-T", type=temperature, default=4.0, help="temperature of kd: higher shows more of the wrong classes")
    add("--tf-T", type=temperature, default=4.0, help="temperature of tf")
    add("--ss-T", type=temperature, default=0.5, help="temperature of ss: similarities lie in [-1, 1]")
    add("--ratio-tf", type=ratio, default=1.0, help="share of the teacher's wrong predictions that tf imitates (k)")
    add("--ratio-ss", type=ratio, default=0.75, help="share of the teacher's wrong matches that ss imitates (k)")

    args = parser.parse_args(argv)
    flags.check_export(parser, args)
    if args.s_path is None:
        flags.check_networks(parser, args)
    elif args.export is None:
        parser.error("--s-path is for --export: give the file to write, too")
    if args.batch_size == 1:
        parser.error("--batch-size 1: a view needs other images to be told from; use at least 2")
    if not any(value for name, value in vars(args).items() if name.endswith("_weight")):
        parser.error("all weights are 0: there is nothing to learn")
    return args


from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import cifar
import models
import utils
from losses import VIEWS, SSKDTerms, positives, similarity_matrix, split_views, ss_head_loss, sskd_terms
from harness.record import Run, entry, export
from teacher_store import SSHeadFile, load_teacher, look_once, report_teacher, stored
from wrapper import Wrapper, fold_batch_norms


@entry(cifar.DataError, models.CheckpointError, models.ExportError)
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    path = args.s_path if args.s_path is not None else train(args)
    if args.export is not None:
        checkpoint = models.read(path, args.s_arch)
        cifar.use_dataset_of(args, checkpoint)
        export(args.export, checkpoint.exported(cifar.about_dataset(args, checkpoint.about), args.export))


def train(args: Namespace) -> Path:
    """Steps 2 and 3, or what a stopped run left of them; returns the run's folder."""
    checkpoint = load_teacher(args)
    more = {"teacher": checkpoint.fingerprint, "t_features": stored(args), **cifar.identity(args)}
    run = Run(run_folder(args, checkpoint.folder), args, **more)
    if run.finished(product="student_best.pth" if args.export else None):
        return run.folder
    device = utils.pick_device(args.gpu_id)
    data = cifar.load(args, device)
    utils.set_up(args.seed, device, args.deterministic)
    autocast = utils.precision(args.amp, device)
    teacher = Wrapper(checkpoint.network).to(device, memory_format=torch.channels_last)
    folded = fold_batch_norms(teacher)  # the teacher as both steps use it; the SS head is one and the same
    held_out = "test" if data.val is data.test else "val"
    look_once(args, checkpoint, folded.backbone, autocast, **{"train": data.train, held_out: data.val})

    # only now: whether there is space for the features is known
    run.start(device, teacher=report_teacher(args, checkpoint, teacher.backbone, data.test, autocast))
    run.tell_sizes(models.model_dict[args.s_arch](num_classes=data.train.about["classes"]), checkpoint.network)
    train_ss_head(args, run, folded, data, autocast, SSHeadFile(args, checkpoint, device))
    run.keep("teacher.pth", teacher.state_dict())  # written after an epoch, by when a continued run has the head again
    distil(args, run, folded, data, autocast)
    return run.folder


def run_folder(args: Namespace, teacher: str) -> Path:
    """experiments/sskd_student_…: named by the flags of the loss and by the teacher's folder."""
    return Path(args.experiments) / (
        f"sskd_student_{args.s_arch}"
        f"_weight{args.ce_weight}+{args.kd_weight}+{args.tf_weight}+{args.ss_weight}"
        f"_T{args.kd_T}+{args.tf_T}+{args.ss_T}_ratio{args.ratio_tf}+{args.ratio_ss}"
        f"{flags.data_name(args)}_seed{args.seed}_{teacher}"
    )


# ---------------------------------------------------------------------------------------- step 2: the teacher's SS head


def train_ss_head(
    args: Namespace, run: Run, teacher: Wrapper, data: cifar.Data, autocast: Callable, kept: SSHeadFile
) -> None:
    """Trains the SS head of the frozen `teacher` on the contrastive task, unless an earlier student has left one."""
    train_set, val_set = data.train, data.val
    head, device = teacher.proj_head, train_set.labels.device
    lines = [] if run.last else kept.read_into(head)  # a continued run has its head in last.pth
    if lines:
        run.replay("ss_head", lines)
    loss_of = utils.compiled(make_ss_loss(teacher, autocast), args.compile, device)
    sgd = utils.SGD(head.parameters(), args.t_lr, args.t_milestones, args)
    features = None
    for epoch in run.epochs("ss_head", args.t_epoch, head=head, optimisation=sgd):
        features = features or ss_test_features(teacher, val_set, autocast)
        batches = train_set.batches("ss_head", epoch, VIEWS, features=True, cut=False)
        trained = utils.train_epoch(head, loss_of, batches, sgd, len(train_set), f"SS head epoch {epoch}")
        tested = test_ss_head(head, features, autocast, f"test after SS head epoch {epoch}")
        run.log(epoch, len(train_set), train=trained | {"teacher_lr": sgd.lr}, val=tested)
        sgd.end_epoch()
        if epoch == args.t_epoch:
            kept.write(head, run.lines("ss_head"))


def make_ss_loss(teacher: Wrapper, autocast: Callable) -> Callable:
    """The head's contrastive loss: batch → loss, what to log. Its gradient stops at the frozen backbone."""

    def loss_of(batch: cifar.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast():
            embedding = teacher(batch.x, bb_grad=False, feature=batch.feature).embedding
        return ss_loss_and_log(embedding)

    return loss_of


def ss_loss_and_log(embedding: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss, similarity = ss_head_loss(embedding)
    accuracy = utils.accuracy(similarity, positives(similarity))
    return loss, {"teacher_ssp_loss": loss, "teacher_ssp_acc": accuracy}


@torch.no_grad()
def ss_test_features(teacher: Wrapper, images: cifar.Images, autocast: Callable) -> list[Tensor]:
    """(4B, D) of each batch of the test set. The backbone is frozen, so once serves all epochs of the head."""
    with autocast():
        batches = images.test_batches(VIEWS, features=True, cut=False)
        return [teacher(batch.x, feature=batch.feature).feature for batch in batches]


@torch.no_grad()
def test_ss_head(head: nn.Module, features: list[Tensor], autocast: Callable, label: str) -> dict[str, float]:
    meter = utils.Meter(label)
    for feature in features:
        with autocast():
            embedding = head(feature)
        meter.add(len(feature) // VIEWS, *ss_loss_and_log(embedding))
    return meter.means()


# ------------------------------------------------------------------------------------------------- step 3: the student


def distil(args: Namespace, run: Run, teacher: Wrapper, data: cifar.Data, autocast: Callable) -> None:
    """Trains the student (backbone and SS head) on the four views of each image."""
    train_set, val_set = data.train, data.val
    device = train_set.labels.device
    torch.manual_seed(args.seed)  # again: the student is the same whether the SS head was trained or read
    student = Wrapper(models.model_dict[args.s_arch](num_classes=train_set.about["classes"]))
    student.to(device, memory_format=torch.channels_last)
    loss_of = utils.compiled(make_loss(args, teacher, student, autocast), args.compile, device)
    sgd = utils.SGD(student.parameters(), args.lr, args.milestones, args)
    parts = {"student": student, "teacher_head": teacher.proj_head, "optimisation": sgd}
    about = {"arch": args.s_arch} | val_set.about
    for epoch in run.epochs("student", args.epoch, **parts):
        if epoch == 1:
            views = next(train_set.batches("student", epoch, VIEWS)).x[: 8 * VIEWS]
            run.show(epoch, "views", utils.views_image(train_set.brightness(views), VIEWS))
        batches = train_set.batches("student", epoch, VIEWS, features=True)
        trained = utils.train_epoch(student, loss_of, batches, sgd, len(train_set), f"student epoch {epoch}")
        ce_loss, acc, top5 = utils.evaluate(student.backbone, val_set, autocast, f"test after student epoch {epoch}")
        tested = {"ce_loss": ce_loss, "cls_acc": acc, "cls_acc_top5": top5}
        run.log(epoch, len(train_set), train=trained | {"lr": sgd.lr}, val=tested)
        sgd.end_epoch()
        best = {"epoch": epoch, "state_dict": student.state_dict(), "best_acc": acc, "about": about}
        run.keep_best("student_best.pth", acc, best)
        if epoch in (1, args.epoch):
            views = next(val_set.test_batches(VIEWS)).x
            run.show(epoch, "similarity/teacher_and_student", similarities(teacher, student, views, autocast))
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
        terms = sskd_terms(s.logits, t.logits, s.embedding, t.embedding, batch.target, **settings)
        loss = sum(weight * term for weight, term in zip(weights, terms, strict=True) if weight)
        with torch.no_grad():
            logged = {f"{name}_loss": term for name, term in terms._asdict().items()}
            similarity = similarity_matrix(s.embedding)
            logged["cls_acc"] = utils.accuracy(split_views(s.logits)[0], batch.target)
            logged["ss_acc"] = utils.accuracy(similarity, positives(similarity))
        return loss, logged

    return loss_of


@torch.inference_mode()
def similarities(teacher: Wrapper, student: Wrapper, views: Tensor, autocast: Callable) -> Tensor:
    """What TensorBoard shows of the similarities that the student is to learn, the teacher's on the left."""
    with autocast():
        embeddings = teacher(views).embedding, student(views).embedding
    return utils.similarity_image(*map(similarity_matrix, embeddings))


if __name__ == "__main__":
    main()
