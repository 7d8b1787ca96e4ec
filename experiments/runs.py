"""Reads finished runs, from their folders or from the .jsonl record of a study, and writes such a record.

A run is a folder with config.json and result.json, or a line of a .jsonl file with the contents of both. `frame_of`
makes a pandas DataFrame with a row for each run. Flags are written as one types them, `--few-shot`.
"""

import glob
import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from harness.files import write_atomically
from harness.flags import LOW_RATE, UserError, warn
from methods import METHODS

# The published flags. Runs with other values are another setting.
COMMON = {"--epoch": 240, "--batch-size": 64, "--milestones": "150 180 210", "--momentum": 0.9}
COMMON |= {"--weight-decay": 5e-4, "--gamma": 0.1, "--side": 32, "--few-shot": 1.0, "--label-noise": 0.0}
COMMON |= dict.fromkeys(("--train-size", "--test-size", "--val-fraction"))
KD = {"--ce-weight": 0.1, "--kd-weight": 0.9, "--kd-T": 4.0}
TF = {"--tf-weight": 2.7, "--tf-T": 4.0, "--ratio-tf": 1.0}
SS = {"--ss-weight": 10.0, "--ss-T": 0.5, "--ratio-ss": 0.75}
SS |= {"--t-epoch": 60, "--t-lr": 0.05, "--t-milestones": "30 45"}

ABLATION = ("KD, 4 views", "KD + tf", "KD + ss")  # SSKD without tf and ss, without ss, without tf
OF_METHODS = {*KD, *TF, *SS, "--weight", "--first-epoch"}  # flags that some methods don't use
BY = ("device", "amp", "tf32", "compile", "deterministic", "t_features", "data")  # what --by of table.py tells apart
# flags that name a run or say how it was computed; they make no setting of their own
NO_SETTING = {"--arch", "--s-arch", "--teacher", "--method", "--seed", "--dataset", "--save-interval"}
NO_SETTING |= {f"--{name.replace('_', '-')}" for name in BY}
UNFINISHED = dict.fromkeys(("best_acc", "last_acc", "test_acc"), math.nan)


def labels() -> dict[str, str]:
    """The row of each compared method in the tables, by its name in METHODS: its label, or the name if that is taken.

    METHODS is read anew at each call, so it is the only place where a method is entered.
    """
    found: dict[str, str] = {}
    for name, method in METHODS.items():
        taken = {"", "alone", "SSKD", *ABLATION, *found.values()}  # "": it has no label
        found[name] = name if method.label in taken else method.label
    return found


def own_flags() -> dict[str, dict[str, Any]]:
    """The flags that the method of each row uses, as published. A term whose weight is 0 uses none."""
    own = {"alone": {}, "KD, 4 views": KD, "KD + tf": KD | TF, "KD + ss": KD | SS, "SSKD": KD | TF | SS}
    for name, label in labels().items():
        method = METHODS[name]
        own[label] = KD | {"--ce-weight": method.ce_weight, "--kd-weight": method.kd_weight, "--weight": method.weight}
        own[label] |= {"--first-epoch": None} if method.first_epochs else {}
    return own


# ---------------------------------------------------------------------------------------------------------- reading


def read_runs(path: Path, unfinished: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the finished runs below a folder (outer folders first) or in a .jsonl file, as rows for `frame_of`.

    With `unfinished` also the others below a folder; their accuracies are NaN. A run that can't be read is left out,
    with a line on stderr. Raises UserError if there is no such folder or file.
    """
    if path.is_dir():
        name = "config.json" if unfinished else "result.json"
        files = map(Path, glob.glob(f"{glob.escape(str(path))}/**/{name}", recursive=True))  # follows links
        folders = sorted((file.parent for file in files), key=lambda folder: (len(folder.parts), folder))
        sources = [(str(folder), partial(record_of, folder)) for folder in folders]
    elif path.suffix == ".jsonl" and path.is_file():
        lines = enumerate(path.read_bytes().splitlines(), 1)
        sources = [(f"{path}:{number}", partial(json.loads, line)) for number, line in lines if line.strip()]
    else:
        raise UserError(f"{path}: neither a folder nor a .jsonl file")
    for place, read in sources:
        try:
            yield run_of(place, read())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            warn(f"{place} left out: {type(error).__name__}: {error}")


def record_of(folder: Path) -> dict[str, Any]:
    """The record of a run folder: its flags, what ran at its first start, later starts that differ, its result."""
    config, file = json.loads((folder / "config.json").read_bytes()), folder / "result.json"
    result = {"teacher": config["starts"][-1].get("teacher", {})} | UNFINISHED  # in progress
    if file.exists():
        result = json.loads(file.read_bytes())
    first, *later = map(start_of, config["starts"])
    others = [start for start in later if start | {"started": ""} != first | {"started": ""}]
    result.get("teacher", {}).pop("path", None)  # a path on somebody's machine
    record = {"run": folder.resolve().name, "flags": config["flags"], **first}
    return record | ({"starts": others} if others else {}) | {"result": result}


def start_of(start: dict) -> dict[str, Any]:
    """What ran, where and when. The command is left out: the flags say the same without paths."""
    found = {name: start.get(name) for name in ("commit", "device", "threads", "started")}
    return found | {"versions": {name: start.get(name) for name in ("python", "torch")}}


def run_of(place: str, record: dict) -> dict[str, Any]:
    """A record as a row of the frame. Raises an error if something is missing or has the wrong type."""
    flags, result = {f"--{name.replace('_', '-')}": value for name, value in record["flags"].items()}, record["result"]
    best, last = result["best_acc"], result["last_acc"]
    if flags.get("--val-fraction"):  # these two are accuracies on the held-out images
        best, last = result["test_acc"], None

    network, teacher, method, folder = flags.get("--arch"), "", "alone", ""
    if "--s-arch" in flags:
        network, method = flags["--s-arch"], method_of(flags)
        folder = (re.search(r"_seed\d+_(.+)$", record["run"]) or ["", ""])[1]
        named = re.sub(r"^teacher_|(_vanilla)?(_seed\d+)?$", "", folder)
        teacher = result.get("teacher", {}).get("arch") or named or "?"
    published = COMMON | own_flags()[method] | {"--lr": 0.01 if network in LOW_RATE else 0.05}
    names = [name for name in published | flags if name in published or name not in NO_SETTING | OF_METHODS]
    values = {name: value_of(flags.get(name), published.get(name)) for name in names}
    devices = dict.fromkeys(str(start.get("device")) for start in (record, *record.get("starts", ())))
    row = {"dataset": flags["--dataset"], "network": network, "teacher": teacher, "method": method}
    row |= {"seed": flags["--seed"], "fingerprint": flags.get("--teacher") or "", "teacher_folder": folder}
    row |= {name: record["flags"].get(name) for name in BY} | {"device": ", ".join(devices)}
    row |= {"place": place} | values | {"unusual": tuple(name for name in names if values[name] != published.get(name))}
    return row | {"best": float(best), "last": None if last is None else float(last), "record": record}


def method_of(flags: dict) -> str:
    """The row of the tables that a student belongs to."""
    if "--method" in flags:
        if flags["--method"] not in METHODS:
            raise LookupError(f"--method {flags['--method']} is not in METHODS of methods/__init__.py")
        return labels()[flags["--method"]]
    tf, ss = flags["--tf-weight"] != 0, flags["--ss-weight"] != 0
    return "SSKD" if tf and ss else ABLATION[1 if tf else 2 if ss else 0]


def value_of(value: Any, default: Any) -> Any:
    """A flag's value, a list as text. None is the default: older runs lack newer flags. If that is None, so is 0."""
    if value is None or (not value and default is None):
        return default
    return " ".join(map(str, value)) if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------- the DataFrame


def frame_of(runs: list[dict[str, Any]], dataset: str | None) -> pd.DataFrame:
    """The runs on a data set (None: on any) as a DataFrame, with a column for each flag.

    A flag is None if it is not set, or not used by the method. `unusual` names the flags that are not as published.
    Raises UserError if there is no such run.
    """
    chosen = [run for run in runs if dataset in (None, run["dataset"])]
    if not chosen:
        others = ", ".join(sorted({run["dataset"] for run in runs}))
        what = f"finished run on {dataset}" if dataset else "run"
        raise UserError(f"no {what}" + (f"; --dataset has a choice of {others}" if others else ""))
    names = dict.fromkeys(name for run in chosen for name in run)
    return pd.DataFrame([names | run for run in chosen], dtype=object).astype({"best": float, "last": float})


def flags_in(frame: pd.DataFrame) -> list[str]:
    return sorted(name for name in frame if name.startswith("--"))


def shown(value: Any) -> str:
    """A flag's value as one types it; empty if it is not set."""
    return "" if value is None or value is False else str(value)


# -------------------------------------------------------------------------------------------------------- recording


def write_record(file: Path, runs: list[dict[str, Any]]) -> None:
    """Writes a line for each run to a .jsonl file. It replaces the line with the same name and flags; others stay.

    Raises UserError if the file's name does not end in .jsonl, and Fault if it can't be written.
    """
    if file.suffix != ".jsonl":
        raise UserError(f"{file}: the name does not end in .jsonl")
    before = file.read_text().splitlines() if file.exists() else []
    lines = {identity(record): record for record in map(json.loads, before)}
    found = {identity(run["record"]): run["record"] for run in reversed(runs)}  # the outermost of several copies
    lines |= reversed(found.items())
    write_atomically(file, "".join(json.dumps(record) + "\n" for record in lines.values()).encode())
    print(f"{file} has {len(lines)} line(s), {len(found)} of them of runs found now")


def identity(record: dict[str, Any]) -> str:
    return json.dumps([record["run"], record["flags"]], sort_keys=True)
