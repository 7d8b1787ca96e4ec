"""Distils a teacher into a student with SSKD (Xu et al., ECCV 2020): steps 2 and 3 of the method.

    python student.py --t-path experiments/teacher_wrn_40_2_seed0 --s-arch wrn_16_2
    python student.py --t-path experiments/teacher_vgg13_seed0 --s-arch MobileNetV2 --lr 0.01
    python student.py --t-path resnet32x4_vanilla/ckpt_epoch_240.pth --t-arch resnet32x4 --s-arch resnet8x4
    python student.py --t-path … --s-arch wrn_16_2 --tf-weight 0 --ss-weight 0          # KD, on the same four views

The teacher first gets a self-supervision (SS) head, trained while its backbone stays frozen; a head that was trained
before for the same teacher, flags and data is read instead. The same command continues a run that was stopped.
"""

import copy
import io
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cifar
import models
import utils
from losses import VIEWS, own_image, similarity_matrix, split_views, ss_head_loss, sskd_terms
from wrapper import Wrapper, fold_batch_norms

Data = tuple[cifar.Images, cifar.Images]  # training, test


def parse_args(argv: list[str] | None) -> Namespace:
    parser = utils.Parser(description="Distils a teacher into a student with SSKD.")
    utils.add_common_flags(parser, cifar.STATISTICS)
    weight, temperature = utils.number(float, 0), utils.number(float, 0, above=True)
    ratio = utils.number(float, 0, 1)

    group = parser.add_argument_group("networks")
    add = group.add_argument
    add("--t-path", help="the teacher: a run folder of teacher.py, or a checkpoint file")
    add("--t-arch", help="the teacher's network, where neither its checkpoint nor its folder's name tells")
    add("--s-arch", help=f"the student's network: one of {', '.join(models.model_dict)}")
    add("--export", metavar="FILE", help="write the trained student's backbone there, by torch.export")
    add("--s-path", help="export this student (a run folder or checkpoint) instead of training one")

    group = parser.add_argument_group("the teacher's SS head (the backbone stays frozen)")
    add = group.add_argument
    add("--t-epoch", type=utils.number(int, 1), default=60, help="epochs")
    add("--t-lr", type=utils.number(float, 0, above=True), default=0.05, help="learning rate")
    add(
        "--t-milestones",
        type=utils.number(int, 1),
        nargs="+",
        default=[30, 45],
        help="epochs after which the rate falls",
    )

    group = parser.add_argument_group("the student's loss: weighted sum of four terms (one of weight 0 is only logged)")
    add = group.add_argument
    add("--ce-weight", type=weight, default=0.1, help="cross-entropy with the labels")
    add("--kd-weight", type=weight, default=0.9, help="the teacher's logits on normal images")
    add("--tf-weight", type=weight, default=2.7, help="the teacher's logits on rotated images")
    add("--ss-weight", type=weight, default=10.0, help="the teacher's similarities between images")
    add("--kd-T", type=temperature, default=4.0, help="temperature of kd: higher shows more of the wrong classes")
    add("--tf-T", type=temperature, default=4.0, help="temperature of tf")
    add("--ss-T", type=temperature, default=0.5, help="temperature of ss: similarities lie in [-1, 1]")
    add("--ratio-tf", type=ratio, default=1.0, help="share of the teacher's wrong predictions that tf imitates")
    add("--ratio-ss", type=ratio, default=0.75, help="share of the teacher's wrong matches that ss imitates")

    args = parser.parse_args(argv)
    if args.export is not None:
        file = Path(args.export)
        if file.is_dir() or not file.name or not file.parent.is_dir():
            raise utils.UserError(f"--export {args.export or repr('')}: give a file's name, in a folder that exists")
        if file.exists() and file.suffix != ".pt2":  # it might be a checkpoint
            raise utils.UserError(f"--export {file}: is there already; only a file that ends in .pt2 is replaced")
    if args.s_path is not None:
        if args.export is None:
            raise utils.UserError("--s-path is for --export: give the file to write, too")
        return args
    if args.t_path is None:
        raise utils.UserError("--t-path is missing: the folder of a trained teacher, or its checkpoint")
    utils.check_arch("--s-arch", args.s_arch, models.model_dict)
    utils.check_milestones("--milestones", args.milestones)
    utils.check_milestones("--t-milestones", args.t_milestones)
    if args.batch_size == 1:
        raise utils.UserError("--batch-size 1: a view needs other images to be told from; use at least 2")
    return args


def run_folder(args: Namespace, checkpoint: Path) -> Path:
    """experiments/sskd_student_…: named by the flags of the loss and by the teacher's folder."""
    teacher = Path(os.path.abspath(checkpoint)).parent
    teacher = teacher.parent if teacher.name == "ckpt" else teacher
    return Path(args.experiments) / (
        f"sskd_student_{args.s_arch}"
        f"_weight{args.ce_weight}+{args.kd_weight}+{args.tf_weight}+{args.ss_weight}"
        f"_T{args.kd_T}+{args.tf_T}+{args.ss_T}_ratio{args.ratio_tf}+{args.ratio_ss}{utils.data_name(args)}_seed{args.seed}_{teacher.name}"
    )


# ---------------------------------------------------------------------------------------- step 2: the teacher's SS head


def ss_head_key(args: Namespace, teacher: str, device: torch.device) -> str:
    """Names everything that a trained SS head depends on; `teacher` is the fingerprint of its weights."""
    names = "t_epoch t_lr t_milestones gamma momentum weight_decay batch_size seed amp compile deterministic"
    names += " dataset train_size test_size few_shot"  # no labels: --label-noise changes nothing
    flags = {name: getattr(args, name) for name in names.split()}
    return utils.digest(flags | {"teacher": teacher, "device": device.type})


def make_ss_loss(teacher: Wrapper, precision: utils.Precision) -> Callable:
    """The head's contrastive loss on a batch of views, and what to log; no graph is built for the backbone."""

    def loss_of(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with precision.autocast():
            _, embedding, _ = teacher(x, bb_grad=False)
        return ss_loss_and_log(embedding)

    return loss_of


def ss_loss_and_log(embedding: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss, similarity = ss_head_loss(embedding)
    accuracy = utils.accuracy(similarity, own_image(len(similarity), similarity.device))
    return loss, {"teacher_ssp_loss": loss.detach(), "teacher_ssp_acc": accuracy}


@torch.no_grad()
def ss_test_features(
    teacher: Wrapper, images: cifar.Images, batch_size: int, precision: utils.Precision
) -> list[Tensor]:
    """(4B, D) of each batch of the test set. The backbone is frozen, so once serves all epochs of the head."""
    features = []
    for x, _ in images.test_batches(batch_size, VIEWS):
        with precision.autocast():
            features.append(teacher(x)[2])
    return features


@torch.no_grad()
def test_ss_head(head: nn.Module, features: list[Tensor], precision: utils.Precision, meter: utils.Meter) -> None:
    for feature in features:
        with precision.autocast():
            embedding = head(feature)
        meter.add(len(feature) // VIEWS, **ss_loss_and_log(embedding)[1])


def read_ss_head(head: nn.Module, kept: Path) -> list[dict[str, float]]:
    """Reads a kept head into `head`; returns its log's lines, none if there is no such head or it is damaged."""
    if not kept.exists():
        return []
    try:
        saved = utils.read(kept)
        with utils.restoring(kept):
            lines = [{str(tag): float(value) for tag, value in line.items()} for line in saved["lines"]]
            trial = copy.deepcopy(head)  # a part of a damaged one must not stay in `head`
            trial.load_state_dict(saved["state_dict"])
            if not lines or not all(value.isfinite().all() for value in trial.state_dict().values()):
                raise ValueError("no lines, or not finite")
    except utils.UserError:
        print(f"SS head: {kept} is damaged and not used", flush=True)
        return []
    head.load_state_dict(trial.state_dict())
    return lines


def train_ss_head(
    args: Namespace, run: utils.Run, teacher: Wrapper, data: Data, precision: utils.Precision, kept: Path
) -> None:
    """Trains the SS head of the frozen `teacher` on the contrastive task, or reads the one that was `kept`."""
    train_set, test_set = data
    head, device = teacher.proj_head, train_set.labels.device
    optimizer, scheduler = utils.make_sgd(head.parameters(), args, args.t_lr, args.t_milestones)
    first, lines = 1, []
    if run.last:
        with utils.restoring(run.ckpt / "last.pth"):
            head.load_state_dict(run.last["head"])
            utils.restore_optimizer(run.last["optimisation"], optimizer, scheduler, precision)
            first, lines = run.last["epoch"] + 1, run.last["lines"]
    elif lines := read_ss_head(head, kept):
        for epoch, line in enumerate(lines, 1):
            run.record("ss_head", epoch, line)
        print(f"SS head: read from {kept}, trained before on the same teacher, data and flags", flush=True)
        return

    loss_of = utils.compiled(make_ss_loss(teacher, precision), args.compile, device)
    features = ss_test_features(teacher, test_set, args.batch_size, precision) if first <= args.t_epoch else []
    for epoch in range(first, args.t_epoch + 1):
        meter, test_meter = (utils.Meter(device, f"SS head {what}epoch {epoch}") for what in ("", "test "))
        batches = train_set.train_batches(args.batch_size, VIEWS, args.seed, "ss_head", epoch)
        for x, target in utils.progress(batches, len(train_set), meter):
            loss, logged = loss_of(x)
            precision.update(optimizer, loss)
            meter.add(len(target), **logged)
        test_ss_head(head, features, precision, test_meter)

        line = {f"train/{name}": mean for name, mean in meter.means().items()}
        line["train/teacher_lr"] = scheduler.get_last_lr()[0]
        scheduler.step()
        line |= {f"val/{name}": mean for name, mean in test_meter.means().items()}
        lines.append(line)
        run.log("ss_head", epoch, args.t_epoch, len(train_set), **line)
        optimisation = utils.optimizer_state(optimizer, scheduler, precision)
        run.save_last("ss_head", epoch, head=utils.state(head), optimisation=optimisation, lines=lines)
    try:
        utils.save(kept, {"state_dict": utils.state(head), "lines": lines})
    except utils.Fault as error:  # a teacher's folder may be read-only; this student needs no copy there
        print(f"SS head: not kept for later students: {error}", flush=True)


# ------------------------------------------------------------------------------------------------- step 3: the student


def make_loss(args: Namespace, teacher: Wrapper, student: Wrapper, precision: utils.Precision) -> Callable:
    """The student's loss on a batch, as a function that traces to one graph: views, target → loss, what to log."""

    def loss_of(x: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with precision.autocast():
            with torch.inference_mode():
                t_logits, t_embedding, _ = teacher(x)
            s_logits, s_embedding, _ = student(x)
        terms = sskd_terms(
            s_logits,
            t_logits,
            s_embedding,
            t_embedding,
            target,
            kd_T=args.kd_T,
            tf_T=args.tf_T,
            ss_T=args.ss_T,
            ratio_tf=args.ratio_tf,
            ratio_ss=args.ratio_ss,
        )
        weights = (args.ce_weight, args.kd_weight, args.tf_weight, args.ss_weight)
        loss = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        with torch.no_grad():
            logged = {f"{name}_loss": term for name, term in terms._asdict().items()}
            similarity = similarity_matrix(s_embedding)
            logged["cls_acc"] = utils.accuracy(split_views(s_logits)[0], target)
            logged["ss_acc"] = utils.accuracy(similarity, own_image(len(similarity), target.device))
        return loss, logged

    return loss_of


@torch.inference_mode()
def similarity_picture(teacher: Wrapper, student: Wrapper, views: Tensor, precision: utils.Precision) -> Any:
    """What TensorBoard shows of the similarities that the student is to learn, the teacher's on the left."""
    with precision.autocast():
        embeddings = [network(views)[1] for network in (teacher, student)]
    return utils.similarity_pair("similarity/teacher_and_student", *map(similarity_matrix, embeddings))


def distil(args: Namespace, run: utils.Run, teacher: Wrapper, data: Data, precision: utils.Precision) -> None:
    """Trains the student (backbone and SS head) on the four views of each image."""
    train_set, test_set = data
    device = train_set.labels.device
    torch.manual_seed(args.seed)  # again: the student is the same whether the SS head was trained or read
    student = Wrapper(models.model_dict[args.s_arch](num_classes=cifar.NUM_CLASSES[args.dataset]))
    student.to(device, memory_format=torch.channels_last)
    loss_of = utils.compiled(make_loss(args, teacher, student, precision), args.compile, device)
    optimizer, scheduler = utils.make_sgd(student.parameters(), args, args.lr, args.milestones)
    first, best = 1, {"acc": -1.0, "epoch": 0}
    if run.last and run.last["phase"] == "student":
        with utils.restoring(run.ckpt / "last.pth"):
            student.load_state_dict(run.last["student"])
            utils.restore_optimizer(run.last["optimisation"], optimizer, scheduler, precision)
            first, best, acc = run.last["epoch"] + 1, run.last["best"], run.last["acc"]

    if first == 1:
        views, _ = next(train_set.train_batches(args.batch_size, VIEWS, args.seed, "student", 1))
        run.add_events(1, utils.views_grid("views", train_set.brightness(views[: 8 * VIEWS]), VIEWS))
    for epoch in range(first, args.epoch + 1):
        student.train()
        meter = utils.Meter(device, f"student epoch {epoch}")
        batches = train_set.train_batches(args.batch_size, VIEWS, args.seed, "student", epoch)
        for x, target in utils.progress(batches, len(train_set), meter):
            loss, logged = loss_of(x, target)
            precision.update(optimizer, loss)
            meter.add(len(target), **logged)
        trained = {f"train/{name}": mean for name, mean in meter.means().items()}
        ce_loss, acc = utils.evaluate(student.backbone, test_set, VIEWS * args.batch_size, precision)
        trained["train/lr"] = scheduler.get_last_lr()[0]
        scheduler.step()
        if epoch in (1, args.epoch):
            views, _ = next(test_set.test_batches(args.batch_size, VIEWS))
            run.add_events(epoch, similarity_picture(teacher, student, views, precision))

        if acc > best["acc"]:
            best = {"acc": acc, "epoch": epoch}
            checkpoint = {"epoch": epoch, "state_dict": utils.state(student), "best_acc": acc}
            utils.save(run.ckpt / "student_best.pth", checkpoint)
        run.log("student", epoch, args.epoch, len(train_set), **trained, **{"val/ce_loss": ce_loss, "val/cls_acc": acc})
        optimisation = utils.optimizer_state(optimizer, scheduler, precision)
        so_far = {"optimisation": optimisation, "best": best, "acc": acc}
        needs = ["teacher.pth", "student_best.pth"]
        run.save_last("student", epoch, needs=needs, student=utils.state(student), **so_far)
    run.finish(best_acc=best["acc"], best_epoch=best["epoch"], last_acc=acc, epochs=args.epoch)


def train(args: Namespace) -> utils.Run:
    """Steps 2 and 3, or what an interrupted run left of them."""
    folder = Path(args.t_path)
    if (folder / "config.json").exists() and not (folder / "result.json").exists():
        raise utils.UserError(
            f"{folder}: this teacher is not finished; type its command again, or give a checkpoint file as it is"
        )
    with utils.user_errors(ValueError, FileNotFoundError):
        checkpoint = models.find_checkpoint(args.t_path)
        backbone = models.load(checkpoint, args.t_arch, cifar.NUM_CLASSES[args.dataset])
    fingerprint = utils.fingerprint(backbone)
    run = utils.Run(run_folder(args, checkpoint), args, teacher=fingerprint)
    if run.finished():
        return run
    device = utils.pick_device(args.gpu_id)
    with utils.user_errors(cifar.DataError):
        data = cifar.load(args, device)
    run.start(device)
    utils.set_up_torch(args.seed, device, args.deterministic)
    precision = utils.Precision(args.amp, device)

    teacher = Wrapper(backbone).to(device, memory_format=torch.channels_last)
    _, acc = utils.evaluate(teacher.backbone, data[1], VIEWS * args.batch_size, precision)
    print(f"teacher: {checkpoint}, test accuracy {acc:.2f}", flush=True)
    frozen = fold_batch_norms(teacher)  # the SS head is the same one in both
    if run.last and run.last["phase"] == "student":
        saved = utils.read(run.ckpt / "teacher.pth")
        with utils.restoring(run.ckpt / "teacher.pth"):
            teacher.load_state_dict(saved)
    else:
        kept = checkpoint.parent / f"ss_head_{ss_head_key(args, fingerprint, device)}.pth"
        train_ss_head(args, run, frozen, data, precision, kept)
        utils.save(run.ckpt / "teacher.pth", utils.state(teacher))
    distil(args, run, frozen, data, precision)
    return run


def export(args: Namespace, path: str | Path) -> None:
    """Writes the student's backbone at `path` to `--export`: normalised images (N, 3, 32, 32) → logits, any N ≥ 1."""
    with utils.user_errors(ValueError, FileNotFoundError):
        backbone = models.load(path, args.s_arch, cifar.NUM_CLASSES[args.dataset]).eval()
    images = torch.randn(2, 3, cifar.SIDE, cifar.SIDE)
    program = torch.export.export(backbone, (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(buffer).module()(images), backbone(images), rtol=1e-4, atol=1e-4)
    utils.write_atomically(Path(args.export), buffer.getbuffer())
    print(f"exported: {args.export}, read back with torch.export.load and checked", flush=True)


@utils.entry
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.s_path is not None:
        export(args, args.s_path)
        return
    run = train(args)
    if args.export is not None:
        if not (run.ckpt / "student_best.pth").exists():
            raise utils.UserError(f"{run.folder} is finished, but its checkpoint is gone; --overwrite trains it anew")
        export(args, run.folder)


if __name__ == "__main__":
    main()
