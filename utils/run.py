"""The record of a run: one folder with its flags, log, curves, checkpoints and result; and where to resume."""

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from .errors import Fault, UserError
from .files import append, read, restoring, save, write_atomically

HARMLESS = (
    "gpu_id data_root data_url experiments overwrite evaluate t_path t_arch s_path export".split()
)  # change no result
RECORD = {"config.json", "result.json"}  # what a run leaves that is worth keeping in git
SUMMARY = ("best_acc", "best_epoch", "last_acc")  # what every result.json holds


class Run:
    """One run in one folder: its flags, its log, its events, its checkpoints, and where to resume.

    `ckpt/last.pth` says what is finished. The files that only grow (log.jsonl, events/) may have run ahead of it when
    a run was killed; resuming cuts them back to the length that it noted, so that nothing is there twice.

    Args:
        folder: the run's folder; created by `start`.
        args, more: the flags and whatever else the result depends on; a run is resumed only under the same.

    Raises:
        UserError: the folder holds a run with other flags, or something that is no run at all.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, **more: Any):
        self.folder, self.ckpt = folder, folder / "ckpt"
        self.flags = {name: value for name, value in vars(args).items() if name not in HARMLESS} | more
        self.overwrite = args.overwrite
        self._check()

    def _check(self) -> None:
        """Reads what the folder holds; writes nothing."""
        self.result, self.last, self.seconds = None, None, 0.0
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
        result, last = self.folder / "result.json", self.ckpt / "last.pth"
        files = {path.name for path in self.folder.rglob("*") if path.is_file()}
        if differing == ["teacher"] and files - {".lock"} == RECORD:
            return  # the record of a run elsewhere, as in a clone, and its teacher was trained again here: made anew
        if differing:
            listed = ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in differing)
            raise UserError(f"{self.folder} holds a run with other flags: {listed}; use --overwrite to start anew")
        if result.exists():
            self.result = _read_json(result)
            if not all(isinstance(self.result.get(name), int | float) for name in SUMMARY):
                raise UserError(f"{result} is damaged; use --overwrite to start anew")
        elif last.exists():
            self.last = read(last)
            with restoring(last):
                self.seconds = float(self.last["seconds"])  # of the processes before this one
                phase, epoch, sizes = self.last["phase"], self.last["epoch"], self.last["sizes"]
                assert isinstance(phase, str) and isinstance(epoch, int) and isinstance(sizes, dict)
                needed = [self.ckpt / name for name in self.last.get("needs", [])]
            for path in needed:
                if not path.exists():
                    raise UserError(f"{path} is missing; put it back, or start anew with --overwrite")
                read(path)  # better now than after the last epoch

    def finished(self, product: str | None = None) -> bool:
        """Whether the folder holds this very run, complete and with `product` in its ckpt/; says so."""
        if self.result is not None and (product is None or (self.ckpt / product).exists()):
            print(f"{self.folder} is finished: {_summary(self.result)}")
            return True
        return False

    def start(self, device: torch.device) -> None:
        """Takes the folder for this process and writes down what runs in it.

        Raises:
            UserError: another process is running there.
        """
        try:
            self.ckpt.mkdir(parents=True, exist_ok=True)
            (self.folder / "events").mkdir(exist_ok=True)
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise Fault(f"{self.folder} could not be made: {error.strerror}") from error
        try:
            weakref.finalize(self, os.close, lock)  # held until the run or its process ends, however they end
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is running in {self.folder}; wait for it or stop it") from error
        known = self.result
        self._check()  # again: the other may have ended between the first look and the lock
        if self.result is not None and self.result != known:
            raise UserError(f"{self.folder} was finished by another process just now")
        if self.overwrite:
            self._clear()
        config, result = self.folder / "config.json", self.folder / "result.json"
        anew = result.exists()  # its checkpoint is gone
        if anew:
            print(f"{self.folder} was finished, but its checkpoint is not there: it is made anew", flush=True)
            (self.ckpt / "last.pth").unlink(missing_ok=True)
            if not any(self.ckpt.iterdir()):
                config.unlink(missing_ok=True)  # first: it may name another teacher, and would block a second start
            result.unlink()
        self._cut_back()
        if anew or not config.exists():
            write_atomically(config, _json({"flags": self.flags, "command": sys.argv, **_environment(device)}))
        events = self._event_files()
        self._events = events[0] if events else self._new_events()
        self.began = self._mark = time.monotonic()
        print(f"run: {self.folder}", flush=True)
        if self.last:
            print(f"continuing after epoch {self.last['epoch']} of the {self.last['phase']}", flush=True)

    def _new_events(self) -> Path:
        now = time.time()
        path = self.folder / "events" / f"events.out.tfevents.{now:.0f}.{platform.node()}"
        append(path, _event(Event(wall_time=now, file_version="brain.Event:2")))
        return path

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
        self.ckpt.mkdir()
        (self.folder / "events").mkdir()

    def _event_files(self) -> list[Path]:
        return sorted((self.folder / "events").glob("events.out.tfevents.*"))

    def _growing(self) -> list[Path]:
        return [path for path in (self.folder / "log.jsonl", *self._event_files()) if path.exists()]

    def _cut_back(self) -> None:
        sizes = self.last["sizes"] if self.last else {}
        for path in self._growing():
            size = sizes.get(path.name, 0)
            if size:
                os.truncate(path, min(size, path.stat().st_size))
            else:
                path.unlink()
        for path in (*self.folder.glob(".*.part"), *self.ckpt.glob(".*.part")):
            path.unlink()  # of a process that was killed while it wrote

    def log(self, phase: str, epoch: int, epochs: int, images: int, **scalars: float) -> None:
        """Records an epoch over `images` training images, and prints its line."""
        self.record(phase, epoch, scalars)
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        self.add_events(epoch, summary.scalar(f"speed/{phase}_images_per_second", images / seconds))
        left = datetime.timedelta(seconds=round(seconds * (epochs - epoch)))
        shown = "  ".join(f"{tag} {value:{'.2f' if tag.endswith('acc') else '.4g'}}" for tag, value in scalars.items())
        speed = f"{seconds:.1f} s, {images / seconds:.0f} images/s, {left} left"
        print(f"{phase} {epoch}/{epochs}  {shown}  {speed}", flush=True)

    def record(self, phase: str, epoch: int, scalars: dict[str, float]) -> None:
        """Writes an epoch's line of log.jsonl and its points of the TensorBoard curves, named by their tags.

        The log holds no time of day and no speed, so that a resumed run leaves the same log as an uninterrupted one.
        """
        append(self.folder / "log.jsonl", json.dumps({"phase": phase, "epoch": epoch, **scalars}).encode() + b"\n")
        self.add_events(epoch, *(summary.scalar(tag, value) for tag, value in scalars.items()))

    def add_events(self, epoch: int, *summaries: Any) -> None:
        """Adds summaries of tensorboardX to the events; here and now, so that a full disk is noticed where it hurts."""
        now = time.time()
        events = [Event(wall_time=now, step=epoch, summary=content) for content in summaries]
        append(self._events, b"".join(map(_event, events)))

    def save_last(self, phase: str, epoch: int, needs: Sequence[str] = (), **content: Any) -> None:
        """Writes down that `epoch` of `phase` is finished, with everything that the rest depends on.

        `needs` names the files in ckpt/ without which the run can't go on.
        """
        sizes = {path.name: path.stat().st_size for path in self._growing()}
        seconds = self.seconds + time.monotonic() - self.began
        note = {"phase": phase, "epoch": epoch, "sizes": sizes, "seconds": seconds, "needs": list(needs)}
        save(self.ckpt / "last.pth", note | content)

    def finish(self, **result: Any) -> None:
        """Writes result.json: from now on the run is complete."""
        flags = {name: " ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in self.flags.items()}
        accuracies = {f"final/{name}": result[name] for name in ("best_acc", "last_acc")}
        table = summary.hparams(flags, accuracies)  # a row of TensorBoard's table of runs
        self.add_events(result["epochs"], *table, *(summary.scalar(*item) for item in accuracies.items()))
        result["seconds"] = round(self.seconds + time.monotonic() - self.began, 1)
        write_atomically(self.folder / "result.json", _json(result))
        print(f"finished: {_summary(result)}", flush=True)


def _event(event: Event) -> bytes:
    """An event as a record of TensorBoard's files: length, its checksum, content, its checksum."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))


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
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/*.py"], capture_output=True).returncode
        return {"commit": commit.stdout.strip() + ("-dirty" if changed else "")} | _machine(device)
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
