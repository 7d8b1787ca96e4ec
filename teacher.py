"""Trains a teacher, or any network of the zoo alone, with cross-entropy: step 1 of SSKD (Xu et al., ECCV 2020).

    python teacher.py --arch wrn_40_2
    python teacher.py --arch MobileNetV2 --lr 0.01
    python teacher.py --arch resnet8 --dataset synthetic --epoch 5 --milestones 3 4   # a try-out without any file
    python teacher.py --evaluate experiments/teacher_wrn_40_2_seed0                    # accuracy of a checkpoint

The same command continues a run that was stopped.
"""

from argparse import Namespace

from harness import flags


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser("Trains a teacher on CIFAR-100 with cross-entropy.")
    known = ", ".join(flags.NETWORKS)
    parser.add_argument("--arch", choices=flags.NETWORKS, metavar="NETWORK", help=f"one of {known}")
    accuracy_of = "print the test accuracy of a run folder or checkpoint, and exit"
    parser.add_argument("--evaluate", metavar="PATH", help=accuracy_of)
    parser.add_argument("--per-class", action="store_true", help="with --evaluate: the accuracy of each class, too")
    args = parser.parse_args(argv)
    if args.arch is None and args.evaluate is None:
        parser.error(f"--arch is missing; the known ones are {known}")
    if args.per_class and args.evaluate is None:
        parser.error("--per-class is for --evaluate: give the run folder or checkpoint, too")
    return args


from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cifar
import models
import utils
from harness.record import Run, entry
from wrapper import NetworkError, check_network


@entry(cifar.DataError, models.CheckpointError, NetworkError)
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.evaluate is not None:
        evaluate(args)
    else:
        train(args)


def train(args: Namespace) -> None:
    folder = Path(args.experiments) / f"teacher_{args.arch}{flags.data_name(args)}_seed{args.seed}"
    run = Run(folder, args, **cifar.identity(args))
    if run.finished(product="best.pth"):
        return
    device = utils.pick_device(args.gpu_id)
    data = cifar.load(args, device)
    train_set, about = data.train, {"arch": args.arch} | data.val.about
    utils.set_up(args.seed, device, args.deterministic)

    model = models.model_dict[args.arch](num_classes=about["classes"])
    check_network(model, args.arch, about["classes"], about["side"])
    run.start(device)
    run.tell_sizes(model)
    model.to(device, memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    autocast = utils.precision(args.amp, device)
    loss_of = utils.compiled(make_loss(model, autocast), args.compile, device)
    sgd = utils.SGD(model.parameters(), args.lr, args.milestones, args)
    for epoch in run.epochs("teacher", args.epoch, model=model, optimisation=sgd):
        batches = train_set.batches("teacher", epoch, views=1)
        trained = utils.train_epoch(model, loss_of, batches, sgd, len(train_set), f"teacher epoch {epoch}")
        loss, acc, top5 = utils.evaluate(model, data.val, autocast, f"test after teacher epoch {epoch}")
        tested = {"cls_loss": loss, "cls_acc": acc, "cls_acc_top5": top5}
        run.log(epoch, len(train_set), train=trained | {"lr": sgd.lr}, val=tested)
        sgd.end_epoch()
        checkpoint = {"epoch": epoch, "state_dict": model.state_dict(), "acc": acc, "about": about}
        run.keep_best("best.pth", acc, checkpoint)
        if epoch in args.milestones or epoch % args.save_interval == 0 or epoch == args.epoch:
            run.keep(f"{epoch:03d}.pth", checkpoint)
    run.finish(utils.test_of_best(model, run.best_checkpoint, data, autocast))


def make_loss(model: nn.Module, autocast: Callable) -> Callable:
    """Cross-entropy as a function that traces to one graph: batch → loss, what to log."""

    def loss_of(batch: cifar.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast():
            logits = model(batch.x)
        loss = F.cross_entropy(logits.float(), batch.target)
        return loss, {"cls_loss": loss, "cls_acc": utils.accuracy(logits, batch.target)}

    return loss_of


def evaluate(args: Namespace) -> None:
    """Prints the test accuracy of any checkpoint that `models.load` reads."""
    checkpoint = models.read(args.evaluate, args.arch)
    cifar.use_dataset_of(args, checkpoint)
    model = checkpoint.network(cifar.num_classes(args))
    device = utils.pick_device(args.gpu_id)
    test_set = cifar.load(args, device).test
    model.to(device, memory_format=torch.channels_last)
    autocast = utils.precision(args.amp, device)
    tested = utils.evaluate(model, test_set, autocast)
    top5 = "" if tested.acc_top5 is None else f", top-5 {tested.acc_top5:.2f} %,"
    print(f"test accuracy {tested.acc:.2f} %{top5} of {len(test_set)} images")
    if args.per_class:
        names = cifar.class_names(args)
        for label, count, acc in utils.class_accuracies(model, test_set, autocast):
            print(f"{label:>5}  {names[label] if names else '':16}{count:>6} images{acc:>8.2f} %")


if __name__ == "__main__":
    main()
