"""The flags that the scripts share, their checks, and the lines in which a script speaks to its user."""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from models import NetworkError, check_name, model_dict

DATASETS = ("cifar100", "cifar10", "synthetic", "folder")
SIDES = tuple(range(32, 385, 32))
STORED = 64  # images up to this side are decoded once and kept on the device, larger ones stay in their files
OTHER_NETWORKS = "or timm.NAME, torchvision.NAME, or in a file of your own FILE.py:CLASS"
IMAGENET = "ImageNet: --dataset folder --side 224 --epoch 100 --milestones 30 60 90 --lr 0.1 --weight-decay 1e-4 "
IMAGENET += "--batch-size 256, and for a student --ce-weight 1; see docs/photographs.md"
LOW_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")  # published with --lr 0.01, all other networks with 0.05
# flags that don't affect the result; of --t-features only whether features are stored, which `settings` records
HARMLESS = set("gpu_id data_root data_url workers experiments evaluate t_path t_arch s_path export".split())


class UserError(Exception):
    """Something the user can put right; the message says how. A script ends with status 2."""


class Fault(Exception):
    """The machine or the training failed, not the user. A script ends with status 1."""


def tell(script: str, text: str) -> None:
    """Prints a script's last words as one line on stderr."""
    print(f"{script}: {' '.join(text.split())}", file=sys.stderr)


def warn(text: str) -> None:
    """Prints one line on stderr about something odd that does not stop the run."""
    print(f"warning: {' '.join(text.split())}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------------- parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help  # no "(default: None)"
        return super()._get_help_string(action)


_HINTS = {  # flags of other repositories, and what does the same here
    "unrecognized arguments: --resume": "a run that was stopped continues when its command is repeated",
    "unrecognized arguments: --method": "baseline.py trains by a compared method: python baseline.py --method …",
    "argument --method: invalid choice: 'sskd'": "SSKD itself is student.py",
}


def _expanded(value: Any) -> Any:
    """The same text, path or list with ~ expanded."""
    if isinstance(value, list):
        return [_expanded(x) for x in value]
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError on a wrong flag, shows defaults in its help and expands ~ in paths."""

    def __init__(self, description: str, **more: Any):
        super().__init__(description=description, **{"formatter_class": _Help, "allow_abbrev": False} | more)

    def parse_known_args(self, *given: Any) -> tuple[argparse.Namespace, list[str]]:
        args, rest = super().parse_known_args(*given)
        for name, value in vars(args).items():  # the shell leaves the ~ of --flag=~/path as it is
            setattr(args, name, _expanded(value))
        return args, rest

    def error(self, message: str) -> NoReturn:
        for words, hint in _HINTS.items():
            if words in message.lower():
                raise UserError(f"{message}: {hint}")
        if wrong := re.search(r"(?:unrecognized arguments: |invalid choice: ')([^\s'=]+)", message):
            known = [word for action in self._actions for word in (*action.option_strings, *(action.choices or ()))]
            by_lower = {str(word).lower(): word for word in known}
            like = [by_lower[word] for word in difflib.get_close_matches(wrong[1].lower(), by_lower, cutoff=0.7)]
            message += f"; did you mean {' or '.join(like)}?" if like else ""
        raise UserError(f"{message} (--help lists the flags)")


class Increasing(argparse.Action):
    """An argparse action for numbers that must increase."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if any(a >= b for a, b in zip(values, values[1:], strict=False)):
            raise argparse.ArgumentError(self, f"{' '.join(map(str, values))}: milestones must increase")
        setattr(namespace, self.dest, values)


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
            hint = "; separate numbers by spaces" if "," in text and kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound} and at most {high}{hint}")
        return value

    return parse


def network(name: str) -> str:
    """An argparse type: the name of a network that `models.build` knows."""
    try:
        check_name(name, model_dict)
    except NetworkError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


# --------------------------------------------------------------------------------------------------- the shared flags


def make_parser(description: str) -> Parser:
    """A parser of the flags that teacher.py, student.py and baseline.py share."""
    parser = Parser(description, epilog=IMAGENET)
    positive, count = number(float, 0, above=True), number(int, 1)

    add = parser.add_argument_group("optimisation (SGD; the learning rate falls at milestones)").add_argument
    add("--epoch", type=count, default=240, help="epochs; the published tables use 240")
    add("--batch-size", type=count, default=64, help="images per step of all processes; SSKD's student sees 4 views")
    add("--lr", type=positive, default=0.05, help="learning rate; use 0.01 for MobileNetV2, ShuffleV1 and ShuffleV2")
    add("--momentum", type=number(float, 0), default=0.9, help="momentum of SGD")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="weight decay of SGD, on every parameter")
    add("--gamma", type=positive, default=0.1, help="factor on the learning rate at each milestone")
    milestones = {"type": count, "nargs": "+", "action": Increasing, "default": [150, 180, 210]}
    add("--milestones", **milestones, help="epochs after which the learning rate falls")

    add = parser.add_argument_group("data").add_argument
    add_source(add)
    add("--train-size", type=count, metavar="N", help="train on N images only, the first of every class")
    add("--test-size", type=count, metavar="N", help="test on N images only, the first of every class")
    held = "hold out this share of every class, choose the best epoch on it, and test that epoch once at the end; "
    held += "0.1 is usual; give teacher and student the same share and seed"
    add("--val-fraction", type=number(float, 0, 0.9, above=True), metavar="FRACTION", help=held)
    few = "train on this share of every class, drawn by the seed; the paper tries 0.25, 0.5, 0.75"
    add("--few-shot", type=number(float, 0, 1, above=True), default=1.0, metavar="FRACTION", help=few)
    noise = "give this share of the training images a wrong label, drawn by the seed; the paper tries 0.1 to 0.5"
    add("--label-noise", type=number(float, 0, 1), default=0.0, metavar="FRACTION", help=noise)

    add = parser.add_argument_group("running").add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the weights and of every draw")
    add_device(add)
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="half precision in the networks, not in losses")
    exact = "off: strict float32 in convolutions and products, two to four times slower on Ampere and later GPUs"
    add("--tf32", choices=["on", "off"], default="on", help=exact)
    add("--compile", action="store_true", help="torch.compile the step: a slow first epoch, then faster ones")
    add("--deterministic", action="store_true", help="use only algorithms that repeat bit for bit; slower on CUDA")
    numbered = "epochs between the teacher's numbered checkpoints, which milestones and the last epoch have, too"
    add("--save-interval", type=count, default=40, help=numbered)
    add("--experiments", default="experiments", metavar="DIR", help="folder of the run folders")
    return parser


def add_device(add: Callable) -> None:
    """Adds the flag that chooses the device."""
    add("--gpu-id", type=number(int, 0), default=0, help="the CUDA device; without CUDA: Apple's MPS, else the CPU")


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_source(add: Callable) -> None:
    """Adds the flags that say which data set is read, and from where."""
    which = "folder: your own class folders; synthetic: generated images, for trying things out "
    which += "(default: the data set of the given checkpoint, else cifar100)"
    add("--dataset", choices=DATASETS, help=which)
    add("--data-root", default="./data", metavar="DIR", help="the folder of the data sets")
    add("--data-url", metavar="URL", help="download the archive from here (https or file://); its md5 is checked")
    side = "with --dataset folder: side of the images in pixels, a multiple of 32 up to 384; above 64 they are read "
    side += "from their files while training, in random crops (default: the checkpoint's, else 32)"
    add("--side", type=int, choices=SIDES, metavar="PIXELS", help=side)
    read = "processes that read images above 64 pixels; 0 reads them in the script's own process"
    add("--workers", type=number(int, 0, 256), default=min(8, cores()), metavar="N", help=read)


def add_networks(parser: Parser) -> Callable:
    """Adds the flags of teacher and student; returns the function that adds more flags to their group."""
    add = parser.add_argument_group("networks").add_argument
    where = "the teacher: a run folder of teacher.py, or a checkpoint's file or address (https://…), or timm.NAME or "
    add("--t-path", help=f"{where}torchvision.NAME for the weights that the library has")
    add("--t-arch", type=network, metavar="NETWORK", help="the teacher's network, if its checkpoint has no name")
    stored = "compute the teacher's features in every step, or compute each view once and keep it: in memory, or on "
    stored += "disk beside the teacher, shared by all its students (50,000 images: 4 GB for 64 features)"
    add("--t-features", choices=["compute", "memory", "disk"], default="compute", help=stored)
    known = f"{', '.join(model_dict)}; {OTHER_NETWORKS}"
    add("--s-arch", type=network, metavar="NETWORK", help=f"the student's network: {known}")
    add("--export", metavar="FILE", help="export the student, for pixels in [0, 1]: .pt2 (torch.export) or .onnx")
    return add


def check_networks(parser: Parser, args: argparse.Namespace) -> None:
    """Ends with an error if teacher or student is missing."""
    if args.t_path is None:
        parser.error("--t-path is missing: the folder of a trained teacher, or its checkpoint")
    if args.s_arch is None:
        parser.error(f"--s-arch is missing; the known ones are {', '.join(model_dict)}")


def check_export(parser: Parser, args: argparse.Namespace) -> None:
    """Ends with an error if `--export` can't be written, or would replace what may be a checkpoint."""
    if args.export is None:
        return
    file = Path(args.export)
    if file.suffix not in (".pt2", ".onnx") or file.is_dir() or not file.parent.is_dir():
        end = "that ends in .pt2 (torch.export) or .onnx, in a folder that exists"
        parser.error(f"--export {args.export}: give the name of a file {end}")
    if file.suffix == ".onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        parser.error(f"--export {file}: ONNX needs `pip install onnx onnxscript`; a .pt2 file needs nothing")


def data_name(args: argparse.Namespace) -> str:
    """The part of a run folder's name about held-out, few-shot and noisy data, for example `_val0.1_few0.25`."""
    name = f"_val{args.val_fraction}" if args.val_fraction is not None else ""
    name += f"_few{args.few_shot}" if args.few_shot < 1 else ""
    return name + (f"_noise{args.label_noise}" if args.label_noise else "")


def settings(args: argparse.Namespace, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What the result of a run depends on: its flags, and the `identity` of its data and teacher.

    Raises:
        UserError: features are to be stored, but these images have none that come again.
    """
    found = {name: value for name, value in vars(args).items() if name not in HARMLESS}
    if "t_features" in found:  # memory and disk give the same bits, compute gives others
        found["t_features"] = None if args.t_features == "compute" else "stored"
        if found["t_features"] and identity.get("side", 0) > STORED:
            why = f"with --side {identity['side']} no image is cropped the same way twice, so there is nothing to store"
            raise UserError(f"--t-features {args.t_features}: {why}; use compute")
    return found | identity


def warn_of_schedule(args: argparse.Namespace) -> None:
    """Warns if a learning rate never falls, or is not the one that a network was published with."""
    network = getattr(args, "arch", None) or getattr(args, "s_arch", None)
    if network in LOW_RATE and args.lr == 0.05:
        warn(f"--lr 0.05: {network} was published with --lr 0.01")
    for prefix in ("", "t_"):
        epochs, milestones = getattr(args, f"{prefix}epoch", 1), getattr(args, f"{prefix}milestones", [])
        if milestones and 1 < epochs <= milestones[0]:
            flag = f"--{prefix}milestones".replace("_", "-")
            warn(f"{flag} {' '.join(map(str, milestones))}: the learning rate never falls within {epochs} epochs")
