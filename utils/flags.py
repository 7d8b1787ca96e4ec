"""The flags that both entries share, checked where they are parsed."""

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from .errors import UserError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help  # no "(default: None)"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and whose help shows the defaults."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def number(kind: type, low: float, high: float = 10**9, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a `kind` in [low, high], or in (low, high] if `above`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            what = "a whole number" if kind is int else "a number"
            bound = f"above {low}" if above else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound} and at most {high}")
        return value

    return parse


def add_common_flags(parser: argparse.ArgumentParser, datasets: Iterable[str]) -> None:
    """The flags of both entries."""
    positive, count = number(float, 0, above=True), number(int, 1)

    group = parser.add_argument_group("optimisation (SGD; the learning rate falls at milestones)")
    add = group.add_argument
    add("--epoch", type=count, default=240, help="epochs; the published tables use 240")
    add("--batch-size", type=count, default=64, help="images a step; a student sees 4 views of each")
    add("--lr", type=positive, default=0.05, help="learning rate; 0.01 for MobileNetV2, ShuffleV1 and ShuffleV2")
    add("--momentum", type=number(float, 0), default=0.9, help="of SGD")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of SGD, on every parameter")
    add("--gamma", type=positive, default=0.1, help="what the rate is multiplied by at each milestone")
    add("--milestones", type=count, nargs="+", default=[150, 180, 210], help="epochs after which the rate falls")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--dataset",
        choices=list(datasets),
        default="cifar100",
        help="synthetic needs no files; it only shows that all runs",
    )
    add("--data-root", default="./data", metavar="DIR", help="where torchvision keeps the data sets")
    add("--data-url", metavar="URL", help="a mirror of the data set's archive (its md5 is still checked)")
    add("--train-size", type=count, metavar="N", help="train on the first N images only")
    add("--test-size", type=count, metavar="N", help="test on the first N images only")

    add(
        "--few-shot",
        type=number(float, 0, 1, above=True),
        default=1.0,
        metavar="FRACTION",
        help="train on this share of every class, drawn by the seed; the paper tries 0.25, 0.5, 0.75",
    )
    add(
        "--label-noise",
        type=number(float, 0, 1),
        default=0.0,
        metavar="FRACTION",
        help="give this share of the training images another label, drawn by the seed; the paper tries 0.1 to 0.5",
    )

    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the weights and of every draw")
    add("--gpu-id", type=number(int, 0), default=0, help="the CUDA device; without CUDA: Apple's MPS, else the CPU")
    add(
        "--amp",
        choices=["off", "bf16", "fp16"],
        default="off",
        help="half precision in the networks; losses stay float32",
    )
    add("--compile", action="store_true", help="torch.compile networks and loss: a slow first epoch, then faster ones")
    add("--deterministic", action="store_true", help="only algorithms that repeat bit for bit; slower on CUDA")
    add("--save-interval", type=count, default=40, help="epochs between the teacher's numbered checkpoints")
    add("--experiments", default="experiments", metavar="DIR", help="folder of the run folders")
    add("--overwrite", action="store_true", help="delete what the run folder holds and start anew")


def data_name(args: argparse.Namespace) -> str:
    """What a run folder's name says of few-shot and noisy data, e.g. `_few0.25_noise0.3`; nothing of all the data."""
    few = f"_few{args.few_shot}" if args.few_shot < 1 else ""
    return few + (f"_noise{args.label_noise}" if args.label_noise else "")


def check_arch(flag: str, arch: str | None, known: Iterable[str]) -> None:
    """Raises UserError unless `arch` is one of the known; lists them."""
    if arch not in known:
        what = f"{flag} is missing" if arch is None else f"{flag} {arch}: no such network"
        raise UserError(f"{what}; the known ones are {', '.join(known)}")


def check_milestones(flag: str, milestones: list[int]) -> None:
    """Raises UserError unless the milestones increase."""
    if any(a >= b for a, b in zip(milestones, milestones[1:], strict=False)):
        raise UserError(f"{flag} {' '.join(map(str, milestones))}: milestones must increase")
