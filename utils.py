"""What both entries share: flags, the device, meters, files that are never half-written, and the record of a run."""

import argparse
import contextlib
import datetime
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor, nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------- errors and signals


class UserError(Exception):
    """Something the user can put right; the message says how. Ends in one line and exit status 2."""


class Fault(Exception):
    """The machine or the training failed, not the user. Ends in one line and exit status 1."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception: nothing on the way up may take it for an error of its own."""


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Around a call into a room whose errors of these kinds tell the user what to do."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


def entry(main: Callable) -> Callable:
    """Ends an entry script's `main(argv=None)` in one line and the right exit status, whatever happens to it."""

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> None:
        name = f"{main.__module__}.py" if main.__module__ != "__main__" else Path(sys.argv[0]).name
        handlers = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status, line = 0, ""
            main(argv)
        except UserError as error:
            status, line = 2, f"error: {error}"
        except torch.OutOfMemoryError:
            status, line = 1, "error: the device is out of memory; a smaller --batch-size needs less"
        except (Fault, OSError, MemoryError) as error:
            status, line = 1, f"error: {error or type(error).__name__}"
        except Stopped as stop:
            status = 128 + stop.args[0]
            line = f"stopped by {signal.Signals(stop.args[0]).name}; run the same command again to continue"
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if line:
            print(f"{name}: {' '.join(line.split())}", file=sys.stderr)
        if status:
            sys.exit(status)

    return guarded


# ----------------------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and whose help shows the defaults."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite `kind` in [low, high], or in (low, high] if `above`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and not (above and value == low)):
            what = "a whole number" if kind is int else "a number"
            bound = f"above {low}" if above else f"of at least {low}"
            most = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound}{most}")
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
    add("--gamma", type=positive, default=0.1, help="factor of the learning rate at each milestone")
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
    add("--compile", action="store_true", help="torch.compile the networks: a slow first epoch, then faster ones")
    add("--deterministic", action="store_true", help="only algorithms that repeat bit for bit; slower on CUDA")
    add("--save-interval", type=count, default=40, help="epochs between the teacher's numbered checkpoints")
    add("--experiments", default="experiments", metavar="DIR", help="folder of the run folders")
    add("--overwrite", action="store_true", help="delete what the run folder holds and start anew")


def check_arch(flag: str, arch: str | None, known: Iterable[str]) -> None:
    """Raises UserError unless `arch` is one of the known; lists them."""
    if arch not in known:
        what = f"{flag} is missing" if arch is None else f"{flag} {arch}: no such network"
        raise UserError(f"{what}; the known ones are {', '.join(known)}")


def check_milestones(flag: str, milestones: list[int]) -> None:
    """Raises UserError unless the milestones increase."""
    if any(a >= b for a, b in zip(milestones, milestones[1:], strict=False)):
        raise UserError(f"{flag} {' '.join(map(str, milestones))}: milestones must increase")


# ------------------------------------------------------------------------------------------------------ the device


def pick_device(gpu_id: int) -> torch.device:
    """CUDA `gpu_id`, else Apple's MPS, else the CPU; printed in one line."""
    if torch.cuda.is_available():
        if gpu_id >= torch.cuda.device_count():
            raise UserError(f"--gpu-id {gpu_id}: this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}")
        device = torch.device("cuda", gpu_id)
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"device: {device} ({name})", flush=True)
    return device


def set_up_torch(seed: int, device: torch.device, deterministic: bool) -> None:
    """Seeds everything and chooses between fast and repeatable algorithms."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic  # shapes are static: the search for the fastest pays at once
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat itself
    torch.use_deterministic_algorithms(deterministic)


class Precision:
    """The context in which the networks run, and the update that goes with it (`--amp`)."""

    def __init__(self, amp: str, device: torch.device):
        dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=amp != "off")
        # only float16 needs its gradients scaled away from zero; a disabled scaler passes everything through
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """One step down the gradient of `loss`. A fused optimizer skips an overflowed step without asking the host."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


def make_sgd(
    parameters: Iterable[Tensor], args: argparse.Namespace, lr: float, milestones: list[int]
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.MultiStepLR]:
    """The published optimizer and schedule; fused: one kernel updates all parameters."""
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, args.gamma)


# ---------------------------------------------------------------------------------------------------------- meters


def wide(device: torch.device) -> torch.dtype:
    """The widest float of the device: Apple's MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """Share of the rows of `scores` (N, C) whose highest column is `target` (N,), in percent: a scalar."""
    return (scores.argmax(1) == target).to(wide(target.device)).mean() * 100


class Meter:
    """Means of scalars over an epoch, kept on the device so that adding never waits for it.

    It also remembers, there, the first step at which each scalar was not finite.
    """

    def __init__(self, device: torch.device, label: str):
        self.label = label  # which epoch of what
        self.names: list[str] = []
        self.rows = 0
        self.total = torch.zeros((), dtype=wide(device), device=device)
        self.steps = 0
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)  # before the first that was not

    def add(self, rows: int, **values: Tensor) -> None:
        """Adds scalars that are means over `rows` rows."""
        self.names = list(values)
        stacked = torch.stack([value.detach() for value in values.values()]).to(self.total.dtype)
        self.total = self.total + stacked * rows
        self.finite_steps = self.finite_steps + torch.isfinite(self.total)  # a total that went bad stays bad
        self.rows += rows
        self.steps += 1

    def means(self) -> dict[str, float]:
        """The means so far. This is a sync point: once an epoch, or for a progress line.

        Raises:
            Fault: a scalar was not finite; names it, the epoch and the step.
        """
        for name, finite in zip(self.names, self.finite_steps.tolist(), strict=True):
            if finite < self.steps:
                raise Fault(
                    f"{self.label}, step {finite + 1}: {name} is not finite; the checkpoint before it is intact. "
                    "A lower --lr (and for fp16: --amp bf16) helps"
                )
        return {name: total / self.rows for name, total in zip(self.names, self.total.tolist(), strict=True)}


@torch.inference_mode()
def evaluate(model: nn.Module, images: Any, batch_size: int, precision: Precision) -> tuple[float, float]:
    """Cross-entropy (nats) and accuracy (%) of `model` on the unrotated images of a split; leaves it in eval mode."""
    model.eval()
    meter = Meter(images.labels.device, "test")
    for x, target in images.test_batches(batch_size, views=1):
        with precision.autocast():
            logits = model(x)
        meter.add(len(target), loss=F.cross_entropy(logits.float(), target), accuracy=accuracy(logits, target))
    means = meter.means()
    return means["loss"], means["accuracy"]


def progress(batches: Iterator, total: int, meter: Meter) -> Iterator:
    """Passes the batches on; on a terminal a bar shows images per second, time left and the means every 20 steps."""
    if not sys.stderr.isatty():
        yield from batches
        return
    with tqdm(total=total, desc=meter.label, unit=" images", leave=False, dynamic_ncols=True) as bar:
        for step, (views, target) in enumerate(batches, 1):
            yield views, target
            if step % 20 == 0:
                bar.set_postfix({name: f"{mean:.3f}" for name, mean in meter.means().items()}, refresh=False)
            bar.update(len(target))


# ----------------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path`, flushes to disk, then renames: a reader finds the old file or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise Fault(f"{path} could not be written: {error.strerror}; what was there before is intact") from error
    finally:
        beside.unlink(missing_ok=True)


def save(path: Path, checkpoint: dict) -> None:
    """`torch.save`, atomically. Serialised in memory first, for a full disk then fails in one known place."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


def read(path: Path) -> dict:
    """A checkpoint that `save` wrote, on the CPU. Never runs code from the file.

    Raises:
        UserError: it is not one.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each raise their own
        raise UserError(f"{path} is damaged or no checkpoint of this script; delete it, or use --overwrite") from error


def digest(content: dict) -> str:
    """A short name for exactly this content: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(module: nn.Module) -> str:
    """A short name for exactly these weights."""
    tensors = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in module.state_dict().items()}
    return digest(tensors)


def state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict as a plain dict."""
    return dict(module.state_dict())


# ---------------------------------------------------------------------------------------------------- the run's record

HARMLESS = ("gpu_id", "data_root", "data_url", "experiments", "overwrite", "evaluate", "t_path")  # change no result


class Run:
    """One run in one folder: its flags, its log, its events, its checkpoints, and where to resume.

    `ckpt/last.pth` says what is finished. The files that only grow (log.jsonl, events/) may have run ahead of it when
    a run was killed; resuming cuts them back to the length that it noted, so that nothing is there twice.

    Args:
        folder: the run's folder; created by `start`.
        flags: everything that the result depends on; a run is resumed only under the same.

    Raises:
        UserError: the folder holds a run with other flags, or something that is no run at all.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, **more: Any):
        self.folder, self.ckpt = folder, folder / "ckpt"
        self.flags = {name: value for name, value in vars(args).items() if name not in HARMLESS} | more
        self.overwrite = args.overwrite
        self.last: dict | None = None
        self.seconds = 0.0  # of the processes before this one
        self._check()

    def _check(self) -> None:
        """Reads what the folder holds; writes nothing."""
        self.result = None
        if self.overwrite or not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder; move it away")
        config = self.folder / "config.json"
        if not config.exists():
            if self.ckpt.exists() and any(self.ckpt.iterdir()):
                raise UserError(
                    f"{self.folder} holds checkpoints but no config.json of a run; move them (--overwrite deletes them)"
                )
            return
        before = _read_json(config).get("flags")
        if not isinstance(before, dict):
            raise UserError(f"{config} is damaged; use --overwrite to start anew")
        now = json.loads(json.dumps(self.flags))
        differing = [name for name in now | before if now.get(name) != before.get(name)]
        if differing:
            listed = ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in differing)
            raise UserError(f"{self.folder} holds a run with other flags: {listed}; use --overwrite to start anew")
        if (self.folder / "result.json").exists():
            self.result = _read_json(self.folder / "result.json")
        elif (self.ckpt / "last.pth").exists():
            self.last = read(self.ckpt / "last.pth")
            self.seconds = self.last["seconds"]

    def finished(self) -> bool:
        """Whether the folder holds this very run, complete; says so."""
        if self.result is not None:
            print(f"{self.folder} is finished: {_summary(self.result)}")
        return self.result is not None

    def start(self, device: torch.device) -> None:
        """Takes the folder for this process and writes down what runs in it.

        Raises:
            UserError: another process is running there.
        """
        try:
            self.ckpt.mkdir(parents=True, exist_ok=True)
            (self.folder / "events").mkdir(exist_ok=True)
            self._lock = open(self.folder / ".lock", "a")  # noqa: SIM115  held until the process ends, however it ends
        except OSError as error:
            raise Fault(f"{self.folder} could not be made: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is running in {self.folder}; wait for it or stop it") from error
        self._check()  # again: the other may have ended between the first look and the lock
        if self.overwrite:
            self._clear()
        self._cut_back()
        config = self.folder / "config.json"
        if not config.exists():
            write_atomically(config, _json({"flags": self.flags, "command": sys.argv, **_environment(device)}))
        self.events = EventsWriter(str(self.folder / "events" / "events"), f".{os.getpid()}")
        self.began = self._mark = time.monotonic()
        print(f"run: {self.folder}", flush=True)
        if self.last:
            print(f"continuing after epoch {self.last['epoch']} of the {self.last['phase']}", flush=True)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
        self.ckpt.mkdir()
        (self.folder / "events").mkdir()

    def _growing(self) -> list[Path]:
        return [path for path in (self.folder / "log.jsonl", *(self.folder / "events").iterdir()) if path.exists()]

    def _cut_back(self) -> None:
        sizes = self.last["sizes"] if self.last else {}
        for path in self._growing():
            size = sizes.get(path.name, 0)
            if size:
                os.truncate(path, size)
            else:
                path.unlink()
        for path in (*self.folder.glob(".*.part"), *self.ckpt.glob(".*.part")):
            path.unlink()  # of a process that was killed while it wrote

    def log(self, phase: str, epoch: int, epochs: int, **scalars: float) -> None:
        """Records an epoch and prints its line."""
        self.record(phase, epoch, scalars)
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        left = datetime.timedelta(seconds=round(seconds * (epochs - epoch)))
        shown = "  ".join(f"{tag} {value:.{2 if tag.endswith('acc') else 4}f}" for tag, value in scalars.items())
        print(f"{phase} {epoch}/{epochs}  {shown}  {seconds:.1f} s, {left} left", flush=True)

    def record(self, phase: str, epoch: int, scalars: dict[str, float]) -> None:
        """Writes an epoch's line of log.jsonl and its points of the TensorBoard curves, named by their tags.

        The log holds no time of day and no speed, so that a resumed run leaves the same log as an uninterrupted one.
        """
        with open(self.folder / "log.jsonl", "ab", buffering=0) as file:
            file.write(json.dumps({"phase": phase, "epoch": epoch, **scalars}).encode() + b"\n")
        for tag, value in scalars.items():
            self.event(epoch, summary.scalar(tag, value))

    def event(self, epoch: int, content: Any) -> None:
        """Writes a summary of tensorboardX; in this thread, so that a full disk is noticed here."""
        self.events.write_event(Event(wall_time=time.time(), step=epoch, summary=content))

    def save_last(self, phase: str, epoch: int, **content: Any) -> None:
        """Writes down that `epoch` of `phase` is finished, with everything that the rest depends on."""
        self.events.flush()
        sizes = {path.name: path.stat().st_size for path in self._growing()}
        seconds = self.seconds + time.monotonic() - self.began
        save(self.ckpt / "last.pth", {"phase": phase, "epoch": epoch, "sizes": sizes, "seconds": seconds, **content})

    def finish(self, **result: Any) -> None:
        """Writes result.json: from now on the run is complete."""
        result["seconds"] = round(self.seconds + time.monotonic() - self.began, 1)
        self.events.close()
        write_atomically(self.folder / "result.json", _json(result))
        print(f"finished: {_summary(result)}", flush=True)


def compiled(function: Callable, wanted: bool, device: torch.device) -> Callable:
    """`function` as one compiled graph if `wanted` (`--compile`).

    Shapes are static but for an epoch's last batch, which gets a graph of its own. On CUDA the graphs are replayed
    whole, since launching the kernels of small networks one by one takes longer than running them.
    """
    if not wanted:
        return function
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def optimizer_state(optimizer: torch.optim.Optimizer, scheduler: Any, precision: Precision) -> dict:
    """What continues an optimisation, as tensors, numbers, lists and dicts."""
    schedule = {name: value for name, value in scheduler.state_dict().items() if name != "milestones"}  # a Counter
    return {"optimizer": optimizer.state_dict(), "scheduler": schedule, "scaler": precision.scaler.state_dict()}


def restore_optimizer(saved: dict, optimizer: torch.optim.Optimizer, scheduler: Any, precision: Precision) -> None:
    """Undoes `optimizer_state`."""
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    if saved["scaler"]:
        precision.scaler.load_state_dict(saved["scaler"])


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged; use --overwrite to start anew")
    return content


def _summary(result: dict) -> str:
    return f"best accuracy {result['best_acc']:.2f} at epoch {result['best_epoch']}, last {result['last_acc']:.2f}"


def _environment(device: torch.device) -> dict:
    """Commit, versions and device, for whoever asks later how a figure came about."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).parent
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        return {"commit": commit} | _machine(device)
    return _machine(device)


def _machine(device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
    }
