"""How a script ends, and what a run leaves: one folder with its flags, log, curves, checkpoints and result.

The state of a run is one dict, `Run.state`, which is written to `ckpt/last.pth` after every epoch: the log, the best
checkpoint and the state dicts of whatever trains. It holds no random generator, because every draw follows from (seed,
phase, epoch). `log.jsonl` and the other checkpoints are written after it, and again from it when a run continues, so a
run that was killed at any moment goes on from its last finished epoch.
"""

import contextlib
import datetime
import functools
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from tensorboardX import summary, writer
from tensorboardX.event_file_writer import EventFileWriter, EventsWriter
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor

from harness import processes
from harness.files import digest, lock, plain, read_state, restoring, save, write_atomically
from harness.flags import Fault, UserError, tell, warn
from harness.machine import device_name
from models import NetworkError

# the last digits of a run may depend on them
CONDITIONS = ("commit", "python", "torch", "cuda", "cudnn", "device", "threads", "processes")

# ---------------------------------------------------------------------------------------------------- how a script ends


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. It is no Exception, so that no `except Exception` catches it."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # an impatient second Ctrl-C must not disturb the ending
    raise Stopped(number)


def entry(main: Callable | None = None, several: bool = False) -> Callable:
    """Decorates a script's `main(argv=None)`: an error ends it with one line on stderr and an exit status.

    0: done. 1: the machine or the training failed. 2: the user can put it right. 128 + n: signal n stopped it.
    `several`: the script may be started by torchrun.
    """
    if main is None:
        return functools.partial(entry, several=several)

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> None:
        signals = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():  # other threads get no signals
            signals = ()
        handlers = {number: signal.signal(number, _stop) for number in signals}
        for stream in filter(None, (sys.stdout, sys.stderr)):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # not every terminal has a λ, or the letters of a path
        try:
            with processes.joined():
                if processes.COUNT > 1 and not several:
                    raise UserError("torchrun is for teacher.py, student.py and baseline.py; start this with python")
                return main(argv)
        except (UserError, NetworkError) as error:
            status, line = 2, f"error: {error}"
        except RuntimeError as error:
            if type(error).__name__ in ("InductorError", "BackendCompilerFailed"):
                reason = str(error).partition("\n")[0]
                advice = "it needs a C++ compiler, and a TMPDIR without spaces; everything works without --compile"
                status, line = 1, f"error: --compile: {reason}; {advice}"
            elif isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                advice = "a smaller --batch-size needs less; if the images alone do not fit, use fewer of them"
                status, line = 1, f"error: the device is out of memory; {advice}"
            elif str(error).startswith("DataLoader worker"):
                advice = "fewer --workers need less memory; the same command continues"
                status, line = 1, f"error: {str(error).strip(' .')}; {advice}"
            elif processes.lost(error):
                status, line = 1, "error: another process of this run has ended; the same command continues"
            else:
                raise
        except (Fault, OSError, MemoryError) as error:
            status, line = 1, f"error: {str(error) or type(error).__name__}"
        except Stopped as stop:
            status = 128 + stop.args[0]
            line, handlers = f"stopped by {signal.Signals(stop.args[0]).name}; the same command continues", {}
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if processes.first_to_fail():
            tell(f"{main.__module__}.py" if main.__module__ != "__main__" else Path(sys.argv[0]).name, line)
        sys.exit(status)

    return guarded


# ------------------------------------------------------------------------------------------------------------- one run


def refuse_unfinished(path: Path) -> None:
    """Raises UserError if `path` is the folder, or the ckpt/ in the folder, of a run that is not finished."""
    folder = path.parent if path.name == "ckpt" else path
    if (folder / "config.json").exists() and not (folder / "result.json").exists():
        raise UserError(f"{folder}: this run is not finished; repeat its command, or give a checkpoint file instead")


class Run:
    """One run in one folder, which one process at a time writes to: of several of this run the first.

    Args:
        folder: the run's folder; `start` creates it.
        settings: whatever the result depends on, in JSON's types; a run continues only with the same settings.

    Raises:
        UserError: the folder holds a run with other settings, a damaged one, or checkpoints that are no run's.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.ckpt = folder, folder / "ckpt"
        self.settings = json.loads(json.dumps(settings))
        self.starts: list[dict] = []  # what ran here before, see `_environment`
        self.result, self.state = self._look()

    def _look(self) -> tuple[str | None, dict | None]:
        """The result in words if the run is finished, else the state after its last epoch, if there is one."""
        config, result, last = self.folder / "config.json", self.folder / "result.json", self.ckpt / "last.pth"
        if config.exists() and (result.exists() or last.exists()):
            with restoring(config):
                content = json.loads(config.read_text())
                before, self.starts = dict(content["flags"]), list(content["starts"])
            differing = [name for name in self.settings | before if self.settings.get(name) != before.get(name)]
            if differing:
                listed = (f"{name} was {before.get(name)}, is {self.settings.get(name)}" for name in differing)
                raise UserError(
                    f"{self.folder} holds a run with other flags: {', '.join(listed)}; delete the folder to start "
                    "anew, or give another --experiments folder"
                )
            if result.exists():
                with restoring(result):
                    return _summary(json.loads(result.read_text())), None
            return None, read_state(last)
        if found := [*self.folder.glob("*.pth"), *self.ckpt.glob("*.pth")]:
            raise UserError(
                f"{self.folder} holds {found[0].relative_to(self.folder)}, but not both config.json and ckpt/last.pth, "
                "from which a run continues: put them back, or move the folder away"
            )
        return None, None

    def finished(self) -> bool:
        """Whether the folder holds this very run, complete; prints its result."""
        if self.result:
            print(f"{self.folder} is finished: {self.result}")
        return bool(self.result)

    def start(self, device: torch.device, **about: Any) -> None:
        """Locks the folder for this process and records what runs in it; `about` goes to config.json and result.json.

        Raises:
            UserError: another process is running there.
            Fault: the folder can't be made.
        """
        events = self.folder / "events"
        try:
            if not processes.RANK:
                self.ckpt.mkdir(parents=True, exist_ok=True)
                events.mkdir(exist_ok=True)
                self._lock = lock(self.folder / ".lock")
                weakref.finalize(self, os.close, self._lock)  # held until the run or its process ends
        except BlockingIOError as error:
            raise UserError(f"another process is running in {self.folder}; wait for it or stop it") from error
        except OSError as error:
            raise Fault(f"{self.folder} could not be made: {error.strerror}") from error
        processes.wait()  # the others look once the first has the lock
        self.result, self.state = self._look()  # again: another process may have run here before we had the lock
        if self.result:
            raise UserError(f"{self.folder} was finished by another process just now")
        if not self.state:
            best = {"name": "", "acc": -1.0, "epoch": 0}
            self.state = {"phase": "", "epoch": 0, "done": [], "acc": -1.0, "best": best, "seconds": 0.0}
            self.state |= {"log": [], "files": {}, "parts": {}}
        self.resumed = self.state["epoch"] > 0
        self.unwritten = list(self.state["files"])
        self.about = about
        self._record_start(device)
        self._write_files()
        if not processes.RANK:
            if writer.EventFileWriter is not EventFileWriter:  # W&B's sync_tensorboard replaced it: tell it the folder
                writer.EventFileWriter(str(events), filename_suffix=".0").close()
            self._events = EventsWriter(str(events / "events"), f".{len(list(events.iterdir())) + 1}")
            weakref.finalize(self, _close, self._events)
        self._mark = time.monotonic()
        self._began = self._mark - self.state["seconds"]
        print(f"run: {self.folder}", flush=True)
        if self.resumed:
            print(f"continuing after epoch {self.state['epoch']} of the {self.state['phase']}", flush=True)

    def _record_start(self, device: torch.device) -> None:
        """Adds this start to config.json; warns if the run continues under conditions that may change its digits."""
        now = _environment(device)
        before = {"processes": 1} | self.starts[-1] if self.starts else now
        changed = [f"{x} was {before.get(x)}, is {now[x]}" for x in CONDITIONS if before.get(x) != now[x]]
        if changed:
            warn(f"continued under other conditions, so not bit for bit: {', '.join(changed)}")
        config = {"flags": self.settings, "starts": [*self.starts, now | self.about]}
        write_atomically(self.folder / "config.json", _json(config))

    # ----------------------------------------------------------------------------------------------- epoch by epoch

    def epochs(self, phase: str, epochs: int, **parts: Any) -> Iterator[int]:
        """The epochs of a phase that are still to do: 1 to `epochs`, or what a stopped run has left of them.

        Each of the `parts` (a model, an SGD: whatever has a state dict) is restored before the first of these epochs
        and saved after each. A complete phase yields nothing; of its parts those are restored that the running phase
        saves, too (for example the teacher's SS head).

        Before each epoch all random generators are seeded by (seed, phase, epoch), for networks with dropout.
        """
        saved = self.state["parts"]
        with restoring(self.ckpt / "last.pth"):
            for name in parts if self.state["phase"] == phase else parts.keys() & saved.keys():
                parts[name].load_state_dict(saved[name])
        if phase in self.state["done"]:
            return
        self.phase, self.total = phase, epochs
        first = self.state["epoch"] + 1 if self.state["phase"] == phase else 1
        for epoch in range(first, epochs + 1):
            seed = int(digest([self.settings.get("seed"), phase, epoch])[:8], 16)
            for generator in (random.seed, np.random.seed, torch.manual_seed):
                generator((seed + processes.RANK) % 2**32)  # each process draws its own dropout
            yield epoch
            self._check_folder()
            self.state |= {"phase": phase, "epoch": epoch, "seconds": time.monotonic() - self._began}
            self.state["parts"] = {name: plain(part.state_dict()) for name, part in parts.items()}
            save(self.ckpt / "last.pth", self.state)
            self._write_files()
        self.state["done"].append(phase)

    def _write_files(self) -> None:
        """Writes what follows from the state: log.jsonl, and the checkpoints that are not yet written."""
        write_atomically(self.folder / "log.jsonl", "".join(json.dumps(x) + "\n" for x in self.state["log"]).encode())
        for name in self.unwritten:
            save(self.ckpt / name, self.state["files"][name])
        best = self.state["best"]["name"]
        self.state["files"] = {name: file for name, file in self.state["files"].items() if name == best}
        self.unwritten = []

    def keep(self, name: str, checkpoint: Mapping) -> None:
        """Queues `checkpoint`: it is written to ckpt/`name` at the end of the next epoch to finish."""
        self.state["files"][name] = plain(checkpoint, torch.contiguous_format)
        self.unwritten.append(name)

    def keep_best(self, name: str, acc: float, checkpoint: Mapping) -> None:
        """The same if `acc` exceeds the accuracy of every epoch before; records it as the last accuracy, too."""
        self.state["acc"] = acc
        if acc > self.state["best"]["acc"]:
            self.state["best"] = {"name": name, "acc": acc, "epoch": checkpoint["epoch"]}
            self.keep(name, checkpoint)

    def log(self, epoch: int, images: int, then: str = "", **splits: Mapping[str, float | None]) -> None:
        """Logs an epoch over `images` training images, by split (`train`, `val`), and prints a line.

        A value of None is left out. `then` says in words what comes after this phase. A resumed run leaves the same log
        but for the seconds.
        """
        scalars = {f"{split}/{name}": value for split, values in splits.items() for name, value in values.items()}
        scalars = {tag: value for tag, value in scalars.items() if value is not None}
        finite = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        self._add_line({"phase": self.phase, "epoch": epoch, "seconds": round(seconds, 1), **finite})
        self._add_events(epoch, summary.scalar(f"speed/{self.phase}_images_per_second", images / seconds))
        left = datetime.timedelta(seconds=round(seconds * (self.total - epoch)))
        shown = "  ".join(f"{tag} {value:{'.2f' if '_acc' in tag else '.4g'}}" for tag, value in scalars.items())
        speed = f"{seconds:.1f} s, {images / seconds:.0f} images/s, {left} left{then and f', then {then}'}"
        print(f"{self.phase} {epoch}/{self.total}  {shown}  {speed}", flush=True)

    def _add_line(self, line: dict[str, Any]) -> None:
        self.state["log"].append(line)
        scalars = ((tag, x) for tag, x in line.items() if "/" in tag and x is not None)
        self._add_events(line["epoch"], *(summary.scalar(tag, x) for tag, x in scalars))

    def _add_events(self, epoch: int, *summaries: Any) -> None:
        """Adds summaries to the TensorBoard events and flushes them, so that a full disk is noticed here."""
        if processes.RANK:
            return
        for content in summaries:
            self._events.write_event(Event(wall_time=time.time(), step=epoch, summary=content))
        self._events.flush()

    def lines(self, phase: str) -> list[dict[str, Any]]:
        """The log's lines of a phase: phase, epoch and scalars."""
        return [line for line in self.state["log"] if line["phase"] == phase]

    def replay(self, lines: list[dict[str, Any]]) -> None:
        """Logs a phase that another run went through, as `lines` gave it there, and counts the phase as done."""
        for line in lines:
            self._add_line(line)
        self.state["done"].append(lines[0]["phase"])

    def show(self, epoch: int, tag: str, image: Tensor) -> None:
        """Adds an image (3, H, W) or (1, H, W) in [0, 1] to the TensorBoard events."""
        pixels = (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
        self._add_events(epoch, summary.image(tag, pixels, dataformats="CHW"))

    @property
    def best_checkpoint(self) -> Mapping:
        """What `keep_best` was given after the best epoch."""
        return self.state["files"][self.state["best"]["name"]]

    def finish(self, test_acc: float | None = None) -> None:
        """Writes result.json: from now on the run is complete.

        `test_acc` is the test accuracy of the best epoch, if that was chosen on held-out images.
        """
        self._check_folder()
        best, acc = self.state["best"], self.state["acc"]
        result = {"best_acc": best["acc"], "best_epoch": best["epoch"], "last_acc": acc}
        result |= {} if test_acc is None else {"test_acc": test_acc}
        final = {f"final/{name}": value for name, value in result.items() if name.endswith("_acc")}
        flags = {name: " ".join(map(str, x)) if isinstance(x, list) else x for name, x in self.settings.items()}
        self._add_events(self.total, *summary.hparams(flags, final), *(summary.scalar(*x) for x in final.items()))
        if not processes.RANK:
            self._events.close()
        result |= {"epochs": self.total, "seconds": round(time.monotonic() - self._began, 1)} | self.about
        write_atomically(self.folder / "result.json", _json(result))
        print(f"finished: {_summary(result)}", flush=True)

    def _check_folder(self) -> None:
        """Raises Fault if the folder was deleted or replaced meanwhile: another process may be running at its path."""
        lock = self.folder / ".lock"
        if not processes.RANK and not (lock.exists() and os.path.samestat(lock.stat(), os.fstat(self._lock))):
            raise Fault(f"{self.folder} was removed or replaced while this run was going on; it ends here")


def _close(events: EventsWriter) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk was reported before; `finish` has closed them
        events.close()


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _summary(result: dict) -> str:
    best = f"accuracy {result['best_acc']:.2f} at epoch {result['best_epoch']}, last {result['last_acc']:.2f}"
    if "test_acc" not in result:
        return f"best {best}"
    return f"test accuracy {result['test_acc']:.2f}; best validation {best}"


def _environment(device: torch.device) -> dict:
    """Command, commit, versions and device of this start."""
    return {
        "command": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "device": f"{device.type} ({device_name(device)})",
        "threads": torch.get_num_threads(),
        "processes": processes.COUNT,
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
