"""How a script ends, and what a run leaves: one folder with its flags, log, curves, checkpoints and result.

`ckpt/last.pth` says which epochs are finished and holds all that the rest depends on, a copy of the best checkpoint
included (but no state of a random generator: draws follow from seed, phase and epoch). The run's other checkpoints are
written after it, and again from it, so that a run killed at any moment goes on from what last.pth says. The files that
only grow (log.jsonl, events/) are cut back to the lengths that it notes.
"""

import argparse
import contextlib
import copy
import datetime
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from tensorboardX import summary, writer
from tensorboardX.event_file_writer import EventFileWriter, EventsWriter
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor, nn

from harness.flags import UserError, show_any_name, tell, warn
from utils import Fault, device_name, size_of

# flags that change no result (of --t-features all that does is whether features are stored, which `more` tells Run)
HARMLESS = {"gpu_id", "data_root", "data_url", "experiments", "overwrite", "evaluate", "per_class"}
HARMLESS |= {"t_path", "t_arch", "s_path", "export", "t_features"}
SUMMARY = "best_acc", "best_epoch", "last_acc"  # what every result.json holds
CONDITIONS = "commit", "python", "torch", "device", "threads"  # of which the last digits of a run may depend

# what last.pth holds, as it is before the first epoch
FRESH = {"run": "", "phase": "", "epoch": 0, "done": [], "acc": -1.0, "best": {"name": "", "acc": -1.0, "epoch": 0}}
FRESH |= {"seconds": 0.0, "sizes": {}, "files": {}, "parts": {}}

# ----------------------------------------------------------------------------------------------- how a script ends


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception: nothing on the way up may take it for an error of its own."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # an impatient second one must not disturb the ending
    raise Stopped(number)


def entry(*kinds: type[Exception]) -> Callable:
    """Decorates an entry's `main(argv=None)`: whatever happens, it ends in one line on stderr and the right status.

    0: done. 1: the machine or the training failed. 2: the user can put it right (UserError and the `kinds`).
    128 + n: signal n stopped it.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def guarded(argv: list[str] | None = None) -> None:
            show_any_name()
            handlers = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
            status, line = 0, ""
            try:
                main(argv)
            except (UserError, *kinds) as error:
                status, line = 2, f"error: {error}"
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                    raise
                status, line = 1, "error: the device is out of memory; a smaller --batch-size needs less"
            except (Fault, OSError, MemoryError) as error:
                status, line = 1, f"error: {str(error) or type(error).__name__}"
            except Stopped as stop:
                anew = " without --overwrite" if "--overwrite" in (sys.argv if argv is None else argv) else ""
                name = signal.Signals(stop.args[0]).name
                status, line = 128 + stop.args[0], f"stopped by {name}; the same command{anew} continues"
            if status < 128:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            if line:
                tell(f"{main.__module__}.py" if main.__module__ != "__main__" else Path(sys.argv[0]).name, line)
            if status:
                sys.exit(status)

        return guarded

    return decorate


# ------------------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path`, flushes to disk, then renames: a reader finds the old file or the new, never a part."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        _remove_parts(path.parent, f".{path.name}.")
        with open(part, "xb") as file:  # x: a new file, never one that a link points to
            fcntl.flock(file, fcntl.LOCK_EX)  # while it is written
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
    except OSError as error:
        raise Fault(f"{path} could not be written: {error.strerror}; what was there before is intact") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def export(file: str, content: bytes) -> None:
    """Writes what `Checkpoint.exported` gave to the file of `--export`, and says so."""
    write_atomically(Path(file), content)
    print(f"exported: {file}, read back and checked; it takes RGB pixels in [0, 1] and normalises them", flush=True)


def _remove_parts(folder: Path, prefix: str = "") -> None:
    """Removes what processes that were killed while they wrote have left in a folder; nobody holds its lock."""
    for part in folder.iterdir():
        if part.name.startswith(prefix) and re.fullmatch(r"\..+\.[0-9a-f]{8}\.part", part.name) and part.is_file():
            with contextlib.suppress(OSError), open(part, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


def append(path: Path, content: bytes) -> None:
    """Adds to a file in one write, and flushes it to disk."""
    try:
        with open(path, "ab", buffering=0) as file:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        raise Fault(f"{path} could not be written: {error.strerror}; the checkpoints are intact") from error


def save(path: Path, checkpoint: Mapping) -> None:
    """`torch.save`, atomically. In memory first: a full disk is then noticed in `write_atomically` and nowhere else."""
    buffer = io.BytesIO()
    torch.save(_plain(checkpoint), buffer)
    write_atomically(path, buffer.getbuffer())


def _plain(content: Any) -> Any:
    """The same in plain dicts and lists, which every reader of checkpoints accepts."""
    if isinstance(content, Mapping):
        return {name: _plain(part) for name, part in content.items()}
    return [_plain(part) for part in content] if isinstance(content, list | tuple) else content


def read(path: Path) -> dict:
    """A checkpoint that `save` wrote, on the CPU. Never runs code from the file.

    Raises:
        UserError: it is not one, or a bit of it has changed.
    """
    with restoring(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not compare the checksums
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError
    return checkpoint


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Around the use of a checkpoint that `save` wrote: whatever does not fit becomes a UserError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; put it back, or start anew with --overwrite") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # zipfile, pickle, torch and missing keys each raise their own
        raise UserError(f"{path} is damaged or not of this run; put a good copy back or --overwrite") from error


def digest(content: Any) -> str:
    """A short name for exactly this content of dicts, lists, strings and numbers: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(module: nn.Module) -> str:
    """A short name for exactly these weights, on the CPU."""
    return digest({k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in module.state_dict().items()})


def refuse_unfinished(path: Path) -> None:
    """Raises UserError if `path` is the folder, or the ckpt/ in the folder, of a run that is not finished."""
    folder = path.parent if path.name == "ckpt" else path
    if (folder / "config.json").exists() and not (folder / "result.json").exists():
        raise UserError(
            f"{folder}: this run is not finished; type its command again, or give a checkpoint file as it is"
        )


# --------------------------------------------------------------------------------------------------------- one run


class Run:
    """One run in one folder, which one process at a time writes to.

    Args:
        folder: the run's folder; created by `start`.
        args, more: the flags and whatever else the result depends on; a run is continued only under the same.

    Raises:
        UserError: the folder holds a run with other flags, a damaged one, or something that is no run at all.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, **more: Any):
        self.folder, self.ckpt = folder, folder / "ckpt"
        flags = {name: value for name, value in vars(args).items() if name not in HARMLESS} | more
        self.flags = json.loads(json.dumps(flags))
        self.overwrite = args.overwrite
        self.result, self.last = self._look()

    def _look(self) -> tuple[dict | None, dict | None]:
        """What the folder holds: its result if it is finished, else its last checkpoint. Writes nothing."""
        if self.overwrite or not self.folder.exists():
            return None, None
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder; move it away")
        config, result, last = self.folder / "config.json", self.folder / "result.json", self.ckpt / "last.pth"
        if not config.exists():
            others = [path for path in self.folder.rglob("*") if not _of_a_start(path)]
            self._refuse(others, "no config.json of a run: move it away")
            return None, None
        before = _read_json(config).get("flags")
        if not isinstance(before, dict):
            raise UserError(f"{config} is damaged; use --overwrite to start anew")
        differing = [name for name in self.flags | before if self.flags.get(name) != before.get(name)]
        if differing:
            listed = ", ".join(f"{name} was {before.get(name)}, is {self.flags.get(name)}" for name in differing)
            raise UserError(
                f"{self.folder} holds a run with other flags: {listed}; use --overwrite to start anew, or another "
                "--experiments folder (a schedule that has begun can't be lengthened: its rate has already fallen)"
            )
        beside = [path for path in self.folder.glob("*best*") if path.is_file()]
        self._refuse(beside, "students would read it instead of the one in ckpt/: move it away")
        if result.exists():
            content = _read_json(result)
            if not all(isinstance(content.get(name), int | float) for name in SUMMARY):
                raise UserError(f"{result} is damaged; use --overwrite to start anew")
            return content, None
        if not last.exists():
            self._refuse(sorted(self.ckpt.glob("*.pth")), "no last.pth to continue from: put that back")
            return None, None
        return None, self._read_last(last)

    def _refuse(self, found: list[Path], but: str) -> None:
        if found:
            name = found[0].relative_to(self.folder)
            raise UserError(f"{self.folder} holds {name}, but {but}, or --overwrite deletes all")

    def _read_last(self, path: Path) -> dict:
        """last.pth, checked to be of this run and to hold what `start` and `epochs` read from it."""
        last = read(path)
        with restoring(path):
            fits = all(type(last[name]) is type(value) for name, value in FRESH.items())
            fits = fits and all(type(last["best"][name]) is type(value) for name, value in FRESH["best"].items())
            fits = fits and {type(size) for size in last["sizes"].values()} <= {int}
            if not fits or last["run"] != digest(self.flags):
                raise ValueError
        return last

    def finished(self, product: str | None = None) -> bool:
        """Whether the folder holds this very run, complete; says so.

        Raises:
            UserError: it is complete, but the checkpoint ckpt/`product`, which is what it was for, is gone or damaged.
        """
        if self.result is None:
            return False
        if product is not None:
            read(self.ckpt / product)
        print(f"{self.folder} is finished: {_summary(self.result)}")
        return True

    def start(self, device: torch.device, **more: Any) -> None:
        """Takes the folder for this process and notes down what runs in it; `more` in config.json and result.json.

        Raises:
            UserError: another process is running there, or a file is where a folder of its path should be.
        """
        try:
            self.ckpt.mkdir(parents=True, exist_ok=True)
            (self.folder / "events").mkdir(exist_ok=True)
            self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{self.folder} could not be made: {error.filename} is a file or lies below one") from error
        except OSError as error:
            raise Fault(f"{self.folder} could not be made: {error.strerror}") from error
        weakref.finalize(self, os.close, self._lock)  # held until the run or its process ends, however they end
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is running in {self.folder}; wait for it or stop it") from error
        self.result, self.last = self._look()  # again: another may have run between the first look and the lock
        if self.result is not None:
            raise UserError(f"{self.folder} was finished by another process just now")
        if self.overwrite:
            self._clear()
        last = self.last or copy.deepcopy(FRESH)
        self.done, self.acc, self.best, self.seconds = last["done"], last["acc"], last["best"], last["seconds"]
        self.files, self.unwritten = last["files"], list(last["files"])
        self.replayed: list[tuple[str, int, dict[str, float]]] = []
        if not self.last:
            self._warn()
        self._cut_back(last["sizes"])
        self._note_start(device, more)
        self.more = more
        self._write_files()
        events = self.folder / "events"
        if writer.EventFileWriter is not EventFileWriter:  # W&B's sync_tensorboard took its place: tell it the folder
            writer.EventFileWriter(str(events), filename_suffix=".0").close()
        self._events = EventsWriter(str(events / "events"), f".{len(list(events.iterdir())) + 1}")
        weakref.finalize(self, _close, self._events)
        self.began = self._mark = time.monotonic()
        print(f"run: {self.folder}", flush=True)
        if self.last:
            print(f"continuing after epoch {last['epoch']} of the {last['phase']}", flush=True)

    def _warn(self) -> None:
        """Tells what is odd about a run that begins."""
        for of_head in ("", "t_"):
            milestones, epochs = (self.flags.get(of_head + name) for name in ("milestones", "epoch"))
            if milestones and 1 < epochs <= milestones[0]:
                flag = f"--{of_head}milestones".replace("_", "-")
                warn(f"{flag} {' '.join(map(str, milestones))}: the learning rate never falls within {epochs} epochs")
        if any(path.stat().st_size for path in self.folder.glob("log.jsonl")):
            warn(f"{self.folder} was begun before, but its ckpt/last.pth is gone: it begins anew")

    def _clear(self) -> None:
        first = self.folder / "result.json", self.ckpt / "last.pth"  # a half-deleted run must not pass for a whole one
        for path in (*first, *sorted(self.folder.iterdir(), key=lambda path: path.name == "config.json")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink(missing_ok=True)
        self.ckpt.mkdir()
        (self.folder / "events").mkdir()

    def _growing(self) -> list[Path]:
        return [*self.folder.glob("log.jsonl"), *(self.folder / "events").glob("events.out.tfevents.*")]

    def _cut_back(self, sizes: dict[str, int]) -> None:
        for path in self._growing():
            if sizes.get(path.name):
                os.truncate(path, min(sizes[path.name], path.stat().st_size))
            else:
                path.unlink()
        for folder in (self.folder, self.ckpt):
            _remove_parts(folder)

    def _note_start(self, device: torch.device, more: dict) -> None:
        """Adds this start to config.json; tells if the run is continued under conditions that may change its digits."""
        path, now = self.folder / "config.json", _environment(device)
        starts = _read_json(path).get("starts", []) if self.last and path.exists() else []
        before = starts[-1] if starts else now
        changed = [
            f"{name} was {before.get(name)}, is {now[name]}" for name in CONDITIONS if before.get(name) != now[name]
        ]
        if changed:
            warn(f"continued under other conditions, so not bit for bit: {', '.join(changed)}")
        write_atomically(path, _json({"flags": self.flags, "starts": [*starts, now | more]}))

    def tell_sizes(self, network: nn.Module, teacher: nn.Module | None = None) -> None:
        """Prints how large the trained network and its teacher are; result.json will tell it, too."""
        told = []
        for whose, each in (("", network), ("teacher_", teacher)):
            if each is not None:
                params, multiply_adds = size_of(each, self.flags.get("side") or 32)
                self.more |= {f"{whose}params": params, f"{whose}multiply_adds": multiply_adds}
                told.append(f"{params / 1e6:.2f} M parameters, {multiply_adds / 1e6:.1f} M multiply-adds an image")
        print(f"network: {'; its teacher: '.join(told)}", flush=True)

    # ------------------------------------------------------------------------------------------ epoch by epoch

    def epochs(self, phase: str, epochs: int, **parts: Any) -> Iterator[int]:
        """The epochs of a phase that are still to do: 1 to `epochs`, or what a stopped run has left of them.

        Each of the `parts` (a model, an SGD: whatever has a state dict) is restored before the first epoch and saved
        after each. A phase of which nothing is left, because a later one has begun, restores nothing.
        """
        if phase in self.done:
            return
        self.phase, self.total, first = phase, epochs, 1
        if self.last and self.last["phase"] == phase:
            with restoring(self.ckpt / "last.pth"):
                for name, part in parts.items():
                    part.load_state_dict(self.last["parts"][name])
            first = self.last["epoch"] + 1
        self.last = None  # its tensors are not needed any more
        for epoch in range(first, epochs + 1):
            yield epoch
            self._save_last(epoch, parts)
        self.done.append(phase)

    def _save_last(self, epoch: int, parts: dict[str, Any]) -> None:
        """Notes down that `epoch` is finished, then writes its other checkpoints."""
        self._check_lock()
        note = {"run": digest(self.flags), "phase": self.phase, "epoch": epoch, "done": self.done, "acc": self.acc}
        note |= {"best": self.best, "seconds": self._seconds(), "files": self.files}
        note |= {"sizes": {path.name: path.stat().st_size for path in self._growing()}}
        save(self.ckpt / "last.pth", note | {"parts": {name: part.state_dict() for name, part in parts.items()}})
        self._write_files()

    def _write_files(self) -> None:
        for name in self.unwritten:
            save(self.ckpt / Path(name).name, self.files[name])
        self.files = {name: file for name, file in self.files.items() if name == self.best["name"]}
        self.unwritten = []

    def keep(self, name: str, checkpoint: Mapping) -> None:
        """Has `checkpoint` written to ckpt/`name` at the end of this epoch."""
        self.files[name] = checkpoint
        self.unwritten.append(name)

    def keep_best(self, name: str, acc: float, checkpoint: Mapping) -> None:
        """The same if `acc` is above the accuracy of every epoch before; notes it as the last one, too."""
        self.acc = acc
        if acc > self.best["acc"]:
            self.best = {"name": name, "acc": acc, "epoch": checkpoint["epoch"]}
            self.keep(name, copy.deepcopy(checkpoint))  # the weights themselves go on changing

    def log(self, epoch: int, images: int, **splits: dict[str, float | None]) -> None:
        """Records an epoch over `images` training images, by split (`train`, `val`), and prints its line.

        A value of None is left out.
        """
        self._check_lock()
        scalars = {f"{split}/{name}": value for split, values in splits.items() for name, value in values.items()}
        scalars = {tag: value for tag, value in scalars.items() if value is not None}
        for each in (*self.replayed, (self.phase, epoch, scalars)):
            self._record(*each)
        self.replayed = []
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        self._add_events(epoch, summary.scalar(f"speed/{self.phase}_images_per_second", images / seconds))
        left = datetime.timedelta(seconds=round(seconds * (self.total - epoch)))
        shown = "  ".join(f"{tag} {value:{'.2f' if '_acc' in tag else '.4g'}}" for tag, value in scalars.items())
        speed = f"{seconds:.1f} s, {images / seconds:.0f} images/s, {left} left"
        print(f"{self.phase} {epoch}/{self.total}  {shown}  {speed}", flush=True)

    def _record(self, phase: str, epoch: int, scalars: dict[str, float]) -> None:
        """An epoch's line of log.jsonl and its points of the TensorBoard curves.

        The log holds no time of day and no speed, so that a resumed run leaves the same log as an uninterrupted one.
        """
        finite = {tag: value if value is not None and math.isfinite(value) else None for tag, value in scalars.items()}
        append(self.folder / "log.jsonl", json.dumps({"phase": phase, "epoch": epoch, **finite}).encode() + b"\n")
        self._add_events(epoch, *(summary.scalar(tag, value) for tag, value in finite.items() if value is not None))

    def _add_events(self, epoch: int, *summaries: Any) -> None:
        """Adds summaries of tensorboardX to the events; here and now, so that a full disk is noticed where it hurts."""
        now = time.time()
        for content in summaries:
            self._events.write_event(Event(wall_time=now, step=epoch, summary=content))
        self._events.flush()

    def lines(self, phase: str) -> list[dict[str, float]]:
        """The scalars of each epoch of a phase so far, from the log."""
        lines = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
        return [
            {k: v for k, v in line.items() if k not in ("phase", "epoch")} for line in lines if line["phase"] == phase
        ]

    def replay(self, phase: str, lines: list[dict[str, float]]) -> None:
        """Counts a phase that another run went through before as done; the next epoch's record begins with it."""
        self.replayed = [(phase, epoch, scalars) for epoch, scalars in enumerate(lines, 1)]
        self.done.append(phase)

    def show(self, epoch: int, tag: str, image: Tensor) -> None:
        """Adds an image (3, H, W) or (1, H, W) in [0, 1] to what TensorBoard shows."""
        pixels = (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
        self._add_events(epoch, summary.image(tag, pixels, dataformats="CHW"))

    @property
    def best_checkpoint(self) -> Mapping:
        """What `keep_best` was given after the best epoch."""
        return self.files[self.best["name"]]

    def finish(self, test_acc: float | None = None) -> None:
        """Writes result.json: from now on the run is complete.

        `test_acc` is the test accuracy of the best epoch, where that was chosen by another.
        """
        self._check_lock()
        self._write_files()
        flags = {name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in self.flags.items()}
        result = {"best_acc": self.best["acc"], "best_epoch": self.best["epoch"], "last_acc": self.acc}
        result |= {} if test_acc is None else {"test_acc": test_acc}
        final = {f"final/{name}": value for name, value in result.items() if name.endswith("_acc")}
        table = summary.hparams(flags, final)  # a row of TensorBoard's table of runs
        self._add_events(self.total, *table, *(summary.scalar(*item) for item in final.items()))
        self._events.close()
        result |= {"epochs": self.total, "seconds": round(self._seconds(), 1)} | self.more
        write_atomically(self.folder / "result.json", _json(result))
        print(f"finished: {_summary(result)}", flush=True)

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.began

    def _check_lock(self) -> None:
        """Raises Fault if the folder was removed meanwhile: at its path there may be a run of another process."""
        try:
            own = os.path.samestat(os.fstat(self._lock), os.stat(self.folder / ".lock"))
        except OSError:
            own = False
        if not own:
            raise Fault(f"{self.folder} was removed or replaced while this run was going on; it ends here")


def _close(events: EventsWriter) -> None:
    """Closes the events of a run that ends early; what is wrong with the disk has been told by then."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: `finish` has closed them
        events.close()


def _of_a_start(path: Path) -> bool:
    """Whether a path in a run folder is what a start leaves that was killed before it had written config.json."""
    return path.name in (".lock", "ckpt", "events") or path.name.endswith(".part")


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged; use --overwrite to start anew")
    return content


def _summary(result: dict) -> str:
    best = f"accuracy {result['best_acc']:.2f} at epoch {result['best_epoch']}, last {result['last_acc']:.2f}"
    if "test_acc" not in result:
        return f"best {best}"
    return f"test accuracy {result['test_acc']:.2f}, of the epoch with the best validation {best}"


def _environment(device: torch.device) -> dict:
    """Command, commit, versions and device, for whoever asks later how a figure came about."""
    return {
        "command": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type} ({device_name(device)})",
        "threads": torch.get_num_threads(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of this repository, `-dirty` if its code differs from it; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/*.py"], capture_output=True).returncode
        return commit.stdout.strip() + ("-dirty" if changed else "")
    return None
