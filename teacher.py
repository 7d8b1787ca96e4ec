"""Trains a teacher on CIFAR-100 with cross-entropy: step 1 of SSKD (Xu et al., ECCV 2020).

    python teacher.py --arch wrn_40_2                       # experiments/teacher_wrn_40_2_seed0/
    python teacher.py --arch ShuffleV1 --lr 0.01            # as published for the Shuffle and MobileNet families
    python teacher.py --arch resnet20 --dataset synthetic --epoch 5 --milestones 3 4   # a try-out without any file
    python teacher.py --evaluate experiments/teacher_wrn_40_2_seed0                    # accuracy of a checkpoint

The same command continues a run that was stopped.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cifar
import models
import utils


def parse_args(argv: list[str] | None) -> Namespace:
    parser = utils.Parser(description="Trains a teacher on CIFAR-100 with cross-entropy.")
    parser.add_argument("--arch", help=f"one of {', '.join(models.model_dict)}")
    parser.add_argument(
        "--evaluate", metavar="PATH", help="print the test accuracy of a run folder or checkpoint, and exit"
    )
    utils.add_common_flags(parser, cifar.STATISTICS)
    args = parser.parse_args(argv)
    if args.evaluate is None:
        utils.check_arch("--arch", args.arch, models.model_dict)
    utils.check_milestones("--milestones", args.milestones)
    return args


def make_loss(model: nn.Module, precision: utils.Precision) -> Callable:
    """Cross-entropy of a batch, as a function that traces to one graph: images, target → loss, what to log."""

    def loss_of(x: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with precision.autocast():
            logits = model(x)
        loss = F.cross_entropy(logits.float(), target)
        return loss, {"cls_loss": loss.detach(), "cls_acc": utils.accuracy(logits, target)}

    return loss_of


def train(args: Namespace) -> None:
    run = utils.Run(Path(args.experiments) / f"teacher_{args.arch}{utils.data_name(args)}_seed{args.seed}", args)
    if run.finished("best.pth"):
        return
    device = utils.pick_device(args.gpu_id)
    with utils.user_errors(cifar.DataError):
        train_set, test_set = cifar.load(args, device)
    run.start(device)

    utils.set_up_torch(args.seed, device, args.deterministic)
    model = models.model_dict[args.arch](num_classes=cifar.NUM_CLASSES[args.dataset])
    model.to(device, memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    precision = utils.Precision(args.amp, device)
    loss_of = utils.compiled(make_loss(model, precision), args.compile, device)
    optimizer, scheduler = utils.make_sgd(model.parameters(), args, args.lr, args.milestones)
    first, best = 1, {"acc": -1.0, "epoch": 0}
    if run.last:
        with utils.restoring(run.ckpt / "last.pth"):
            model.load_state_dict(run.last["model"])
            utils.restore_optimizer(run.last["optimisation"], optimizer, scheduler, precision)
            first, best, acc = run.last["epoch"] + 1, run.last["best"], run.last["acc"]

    for epoch in range(first, args.epoch + 1):
        meter = utils.Meter(device, f"teacher epoch {epoch}")
        batches = train_set.train_batches(args.batch_size, 1, args.seed, "teacher", epoch)
        model.train()
        for x, target in utils.progress(batches, len(train_set), meter):
            loss, logged = loss_of(x, target)
            precision.update(optimizer, loss)
            meter.add(len(target), **logged)
        trained = {f"train/{name}": mean for name, mean in meter.means().items()}
        test_loss, acc = utils.evaluate(model, test_set, 4 * args.batch_size, precision)
        trained["train/lr"] = scheduler.get_last_lr()[0]
        scheduler.step()

        checkpoint = {"epoch": epoch, "state_dict": utils.state(model), "acc": acc}
        if acc > best["acc"]:
            best = {"acc": acc, "epoch": epoch}
            utils.save(run.ckpt / "best.pth", checkpoint)
        if epoch in args.milestones or epoch % args.save_interval == 0 or epoch == args.epoch:
            utils.save(run.ckpt / f"{epoch:03d}.pth", checkpoint)
        tested = {"val/cls_loss": test_loss, "val/cls_acc": acc}
        run.log("teacher", epoch, args.epoch, len(train_set), **trained, **tested)
        optimisation = utils.optimizer_state(optimizer, scheduler, precision)
        so_far = {"optimisation": optimisation, "best": best, "acc": acc}
        run.save_last("teacher", epoch, needs=["best.pth"], model=utils.state(model), **so_far)
    run.finish(best_acc=best["acc"], best_epoch=best["epoch"], last_acc=acc, epochs=args.epoch)


def evaluate(args: Namespace) -> None:
    """Prints the test accuracy of any checkpoint that `models.load` reads."""
    with utils.user_errors(ValueError, FileNotFoundError):
        model = models.load(args.evaluate, args.arch, cifar.NUM_CLASSES[args.dataset])
    device = utils.pick_device(args.gpu_id)
    with utils.user_errors(cifar.DataError):
        _, test_set = cifar.load(args, device)
    model.to(device, memory_format=torch.channels_last)
    _, acc = utils.evaluate(model, test_set, 4 * args.batch_size, utils.Precision(args.amp, device))
    print(f"test accuracy {acc:.2f} % of {len(test_set)} images")


@utils.entry
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.evaluate is None:
        train(args)
    else:
        evaluate(args)


if __name__ == "__main__":
    main()
