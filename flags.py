"""The flags of the scripts, and what a script does before it imports PyTorch, which takes seconds.

Nothing here needs more than Python itself. The entries import this room before all others: from a Python that is too
old for them it gets no further than the next lines.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.stderr.write("error: this is Python %d.%d; 3.10 or newer is needed\n" % sys.version_info[:2])  # noqa: UP031
    sys.exit(2)

import argparse
import contextlib
import difflib
import importlib.util
import math
import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

# what the flags choose among, known here without a look into models, methods and cifar
NETWORKS = (
    *("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4"),
    *("resnet14x05", "resnet20x05", "resnet20x0375", "ResNet50", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"),
    *("vgg8", "vgg11", "vgg13", "vgg16", "vgg19", "MobileNetV2", "ShuffleV1", "ShuffleV2"),
)
METHODS = ("kd", "fitnet", "at", "sp", "vid", "rkd", "pkt", "ab", "ft", "crd", "dkd", "ls")
DATASETS = ("cifar100", "cifar10", "fashion_mnist", "synthetic", "folder")
SIDES = (32, 64)
PACKAGES = ("torch", "torchvision", "tensorboardX", "numpy", "tqdm")  # of requirements.txt

# ------------------------------------------------------------------------------------- before PyTorch is imported


class UserError(Exception):
    """Something the user can put right; the message says how."""


def first(
    parse_args: Callable[[None], Any], modules: Iterable[str] = PACKAGES, listed: str = "requirements.txt"
) -> None:
    """Ends the script, in one line, if packages are missing or flags are wrong, and answers `--help`.

    To be called before the rest of the script is imported. From here on Ctrl-C just ends the process, until
    `record.entry` takes over.

    Args:
        parse_args: the script's, which reads `sys.argv` if given None.
        modules: what it imports; `listed` is the file to install them from.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    show_any_name()
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise UserError(f"Python finds no {', '.join(missing)}; pip install -r {listed}")
        parse_args(None)
    except UserError as error:
        tell(Path(sys.argv[0]).name, f"error: {error}")
        sys.exit(2)


def show_any_name() -> None:
    """Lets the terminal show what it has no character for as an escape code, rather than end the script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def tell(script: str, text: str) -> None:
    """Prints what a script ends with, in one line on stderr, if that is open."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"{script}: {printable(text)}", file=sys.stderr)


def printable(text: str) -> str:
    """`text` in one line, with escape codes and whatever else is not to be seen written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def silent() -> bool | None:
    """tqdm's `disable`: True without stderr, else None, with which a bar is silent unless that is a terminal."""
    return True if sys.stderr is None else None


def warn(text: str) -> None:
    """One line on stderr about something odd, with which the run goes on."""
    print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- flags


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help  # no "(default: None)"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a UserError and whose help shows the defaults, unless `more` says otherwise."""

    def __init__(self, description: str, **more: Any):
        super().__init__(description=description, **{"formatter_class": _Help, "allow_abbrev": False} | more)

    def error(self, message: str) -> NoReturn:
        flag = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        if flag:
            message += did_you_mean(flag[1], re.findall(r"--[\w-]+", self.format_help()))
        elif choice:
            message += did_you_mean(choice[1], re.findall(r"[\w.-]+", choice[2]))
        raise UserError(f"{message} (--help lists the flags)")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What an error message goes on with, if some of the known words are like this one."""
    by_lower = {name.lower(): name for name in known}
    like = [by_lower[name] for name in difflib.get_close_matches(word.lower(), by_lower, cutoff=0.7)]
    return f"; did you mean {' or '.join(like)}?" if like else ""


class Default(str):
    """The value of a flag that was not given."""


class Increasing(argparse.Action):
    """An argparse action for numbers of which each must be above the one before."""

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
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound} and at most {high}")
        return value

    return parse


def make_parser(description: str) -> Parser:
    """A parser of the flags that all entries share."""
    parser = Parser(description)
    positive, count = number(float, 0, above=True), number(int, 1)

    add = parser.add_argument_group("optimisation (SGD; the learning rate falls at milestones)").add_argument
    add("--epoch", type=count, default=240, help="epochs; the published tables use 240")
    add("--batch-size", type=count, default=64, help="images a step; SSKD's student sees 4 views of each")
    add("--lr", type=positive, default=0.05, help="learning rate; 0.01 for MobileNetV2, ShuffleV1 and ShuffleV2")
    add("--momentum", type=number(float, 0), default=0.9, help="of SGD")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of SGD, on every parameter")
    add("--gamma", type=positive, default=0.1, help="what the rate is multiplied by at each milestone")
    milestones = {"type": count, "nargs": "+", "action": Increasing, "default": [150, 180, 210]}
    add("--milestones", **milestones, help="epochs after which the rate falls")

    add = parser.add_argument_group("data").add_argument
    add_source(add)
    add("--train-size", type=count, metavar="N", help="train on N images only, the first of every class")
    add("--test-size", type=count, metavar="N", help="test on N images only, the first of every class")
    held = "hold this share of every class out of training, drawn by the seed, and choose the best epoch on it; test "
    held += "that epoch once, at the end. 0.1 is usual; teacher and student need the same seed to hold out the same"
    add("--val-fraction", type=number(float, 0, 0.9, above=True), metavar="FRACTION", help=held)
    few = "train on this share of every class, drawn by the seed; the paper tries 0.25, 0.5, 0.75"
    add("--few-shot", type=number(float, 0, 1, above=True), default=1.0, metavar="FRACTION", help=few)
    noise = "give this share of the training images another label, drawn by the seed; the paper tries 0.1 to 0.5"
    add("--label-noise", type=number(float, 0, 1), default=0.0, metavar="FRACTION", help=noise)

    add = parser.add_argument_group("running").add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the weights and of every draw")
    device = "the CUDA device; without CUDA: Apple's MPS, else the CPU"
    add("--gpu-id", type=number(int, 0), default=0, help=device)
    half = "half precision in the networks; losses stay float32"
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help=half)
    add("--compile", action="store_true", help="torch.compile networks and loss: a slow first epoch, then faster ones")
    add("--deterministic", action="store_true", help="only algorithms that repeat bit for bit; slower on CUDA")
    numbered = "epochs between the teacher's numbered checkpoints, which milestones and the last epoch have, too"
    add("--save-interval", type=count, default=40, help=numbered)
    add("--experiments", default="experiments", metavar="DIR", help="folder of the run folders")
    add("--overwrite", action="store_true", help="delete what the run folder holds and start anew")
    return parser


def add_source(add: Callable) -> None:
    """Adds the flags that say which data set is read, and from where."""
    drawn = "folder: your own class folders; synthetic needs no files, it only shows that all runs; a checkpoint that "
    drawn += "names its data set needs no flag"
    add("--dataset", choices=DATASETS, default=Default("cifar100"), help=drawn)
    add("--data-root", default="./data", metavar="DIR", help="the folder of the data sets")
    url = "a mirror of the data set's archive, file:// included (its md5 is still checked)"
    add("--data-url", metavar="URL", help=url)
    side = "with --dataset folder: the images' sides in pixels; shorter side resized, then the centre (default: 32)"
    add("--side", type=int, choices=SIDES, help=side)


def add_networks(parser: Parser) -> Callable:
    """Adds the flags of the networks that a distillation reads and writes; returns what adds further ones to them."""
    add = parser.add_argument_group("networks").add_argument
    add("--t-path", help="the teacher: a run folder of teacher.py, or a checkpoint file")
    told = "the teacher's network, where its checkpoint does not say and its name does not tell"
    add("--t-arch", choices=NETWORKS, metavar="NETWORK", help=told)
    looked = "compute what it sees in each step, or each view once: in memory, or on disk beside it, shared by all its "
    looked += "students (50,000 images: 4 GB for a last layer of 64 features, 133 GB for ResNet50's 2048)"
    add("--t-features", choices=["compute", "memory", "disk"], default="compute", help=looked)
    student = f"the student's network: one of {', '.join(NETWORKS)}"
    add("--s-arch", choices=NETWORKS, metavar="NETWORK", help=student)
    pixels = "write the trained student there (.pt2: torch.export, .onnx); it takes pixels in [0, 1], normalises them"
    add("--export", metavar="FILE", help=pixels)
    return add


def check_networks(parser: Parser, args: argparse.Namespace) -> None:
    """Ends with an error if teacher or student is missing."""
    if args.t_path is None:
        parser.error("--t-path is missing: the folder of a trained teacher, or its checkpoint")
    if args.s_arch is None:
        parser.error(f"--s-arch is missing; the known ones are {', '.join(NETWORKS)}")


def check_export(parser: Parser, args: argparse.Namespace) -> None:
    """Ends with an error if `--export` can't be written, or would replace what may be a checkpoint."""
    if args.export is None:
        return
    file = Path(args.export)
    if file.is_dir() or not file.name or not file.parent.is_dir():
        parser.error(f"--export {args.export or repr('')}: give a file's name, in a folder that exists")
    if file.suffix not in (".pt2", ".onnx"):
        there = "is there already, and " if file.exists() else ""
        parser.error(f"--export {file}: {there}ends in neither .pt2 (torch.export) nor .onnx: name it so")
    needed = ("onnx", "onnxscript") if file.suffix == ".onnx" else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        parser.error(f"--export {file}: for ONNX PyTorch needs `pip install {names}`; a .pt2 file needs nothing")


def data_name(args: argparse.Namespace) -> str:
    """What a run folder's name says of held-out, few-shot and noisy data, e.g. `_val0.1_few0.25`; nothing of all."""
    few = f"_val{args.val_fraction}" if args.val_fraction is not None else ""
    few += f"_few{args.few_shot}" if args.few_shot < 1 else ""
    return few + (f"_noise{args.label_noise}" if args.label_noise else "")
