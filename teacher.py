"""Trains a teacher, or any network of the zoo alone, with cross-entropy: step 1 of SSKD (Xu et al., ECCV 2020).

    python teacher.py --arch wrn_40_2
    python teacher.py --arch MobileNetV2 --lr 0.01
    python teacher.py --arch resnet8 --dataset synthetic --epoch 5 --milestones 3 4   # needs no data
    python teacher.py --evaluate experiments/teacher_wrn_40_2_seed0                    # accuracy of a checkpoint

The same command continues a run that was stopped.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

import cifar
import utils
from harness import checkpoint, flags, machine, processes, sources
from harness.record import Run, entry
from models import LIBRARIES, build, folder_name, model_dict, weights_of
from wrapper import check_network


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.make_parser("Trains a teacher on CIFAR-100 with cross-entropy.")
    known = ", ".join(model_dict)
    parser.add_argument("--arch", type=flags.network, metavar="NETWORK", help=f"one of {known}; {flags.OTHER_NETWORKS}")
    start = "start from the weights that timm or torchvision have for the network, with images normalised as for these "
    start += "weights; a lower --lr than the default, such as 0.01, is usual"
    parser.add_argument("--pretrained", action="store_const", const=True, help=start)
    accuracy_of = "print the test accuracy of a run folder or checkpoint, and exit"
    parser.add_argument("--evaluate", metavar="PATH", help=accuracy_of)
    args = parser.parse_args(argv)
    if args.arch is None and args.evaluate is None:
        parser.error(f"--arch is missing; the known ones are {known}")
    if args.pretrained and not (args.arch and args.arch.startswith(LIBRARIES)):
        parser.error(f"--pretrained is for --arch timm.NAME or torchvision.NAME, not for {args.arch}")
    return args


@entry(several=True)
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.evaluate is not None:
        evaluate(args)
    else:
        train(args)


def train(args: Namespace) -> None:
    trained_on = weights_of(args.arch) if args.pretrained else {}
    source = sources.read_for(args, {name: trained_on[name] for name in ("mean", "std") if name in trained_on})
    run = Run(run_folder(args), flags.settings(args, source.identity))
    if run.finished():
        return
    flags.warn_of_schedule(args)
    device = machine.pick_device(args.gpu_id)
    data = cifar.load(source, args, device)
    machine.set_up(args, device)

    model = build(args.arch, len(source.classes), source.side, bool(args.pretrained))
    check_network(model, args.arch, len(source.classes), source.side)
    run.start(device, images=source.counts, **utils.sizes(source.side, model))
    model.to(device, memory_format=cifar.LAYOUT)
    autocast = utils.precision(args.amp, device)
    loss_of = utils.compiled_loss(make_loss(model, autocast), args.compile, data.train)
    sgd = utils.SGD(model, args.lr, args.milestones, args)
    about = {"arch": args.arch} | data.about
    for epoch in run.epochs("teacher", args.epoch, model=model, optimisation=sgd):
        model.train()
        meter = utils.Meter(f"teacher epoch {epoch}", len(data.train), args.amp)
        for batch in data.train.batches("teacher", epoch, views=1):
            loss, terms = loss_of(batch)
            sgd.step(loss)
            meter.add(len(batch.target), loss, terms)
        trained = meter.means()
        test = utils.evaluate(model, data.val, autocast, f"test after teacher epoch {epoch}")
        tested = {"cls_loss": test.loss, "cls_acc": test.acc, "cls_acc_top5": test.acc_top5}
        run.log(epoch, len(data.train), train=trained | {"lr": sgd.lr}, val=tested)
        sgd.end_epoch()
        best = {"epoch": epoch, "state_dict": model.state_dict(), "acc": test.acc, "about": about}
        run.keep_best("best.pth", test.acc, best)
        if epoch in args.milestones or epoch % args.save_interval == 0 or epoch == args.epoch:
            run.keep(f"{epoch:03d}.pth", best)
    run.finish(utils.test_of_best(model, run.best_checkpoint, data, autocast))


def run_folder(args: Namespace) -> Path:
    """experiments/teacher_…"""
    start = "_pretrained" if args.pretrained else ""
    return Path(args.experiments) / f"teacher_{folder_name(args.arch)}{start}{flags.data_name(args)}_seed{args.seed}"


def make_loss(model: nn.Module, autocast: Callable) -> Callable:
    """Cross-entropy as a function that traces to one graph: batch → loss, what to log."""

    def loss_of(batch: cifar.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast():
            logits = processes.gathered(model(batch.x), len(batch.target))
        loss = F.cross_entropy(logits.float(), batch.target)
        return loss, {"cls_loss": loss, "cls_acc": utils.accuracy(logits, batch.target)}

    return loss_of


def evaluate(args: Namespace) -> None:
    """Prints the test accuracy of any checkpoint that `models.load` reads."""
    found = checkpoint.read(args.evaluate, args.arch)
    source = sources.read_for(args, found.about, found.file, train=False)
    model = found.network(len(source.classes), source.side)
    device = machine.pick_device(args.gpu_id)
    images = cifar.test_images(source, args, device)
    model.to(device, memory_format=cifar.LAYOUT)
    test = utils.evaluate(model, images, utils.precision(args.amp, device))
    top5 = "" if test.acc_top5 is None else f", top-5 {test.acc_top5:.2f} %,"
    print(f"test accuracy {test.acc:.2f} %{top5} of {len(images)} images")


if __name__ == "__main__":
    main()
