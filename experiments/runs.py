"""Finished runs, read from their folders or from the .jsonl file of a study, and recorded in one.

A run is a folder with config.json and result.json or, once recorded, a line of a .jsonl file; it is known by its flags.
Needs neither torch nor the rooms.
"""

import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

SCRIPT = Path(sys.argv[0]).name  # who complains

# The flags of the published results. Those that name a run or change only how it is computed are APART; any other that
# is set (train_size, say) makes another setting.
COMMON = {"dataset": "cifar100", "epoch": 240, "batch_size": 64, "milestones": [150, 180, 210]}
COMMON |= {"momentum": 0.9, "weight_decay": 5e-4, "gamma": 0.1, "few_shot": 1.0, "label_noise": 0.0}
KD = {"ce_weight": 0.1, "kd_weight": 0.9, "kd_T": 4.0}
TF = {"tf_weight": 2.7, "tf_T": 4.0, "ratio_tf": 1.0}
SS = {"ss_weight": 10.0, "ss_T": 0.5, "ratio_ss": 0.75, "t_epoch": 60, "t_lr": 0.05, "t_milestones": [30, 45]}
COMPUTED = ("amp", "compile", "deterministic", "t_features")
OF_METHODS = {*KD, *TF, *SS, "weight", "first_epoch"}
APART = {"arch", "s_arch", "teacher", "method", "seed", "dataset", "save_interval", *COMPUTED, *OF_METHODS}
LOW_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")  # published with --lr 0.01, all others with 0.05

# Of baseline.py's methods: their rows, and the published --ce-weight, --kd-weight and --weight.
METHODS = {
    "kd": ("KD", 0.1, 0.9, 0.0),
    "fitnet": ("FitNet", 0.1, 0.9, 100.0),
    "at": ("AT", 0.1, 0.9, 1000.0),
    "sp": ("SP", 0.1, 0.9, 3000.0),
    "vid": ("VID", 0.1, 0.9, 1.0),
    "rkd": ("RKD", 0.1, 0.9, 1.0),
    "pkt": ("PKT", 0.1, 0.9, 30000.0),
    "ab": ("AB", 0.1, 0.9, 1.0),
    "ft": ("FT", 0.1, 0.9, 200.0),
    "crd": ("CRD", 0.1, 0.9, 0.8),
    "dkd": ("DKD", 1.0, 0.0, 1.0),
    "ls": ("KD + LS", 0.1, 0.0, 9.0),
}
ABLATION = ("KD, 4 views", "KD + tf", "KD + ss")  # of SSKD: student.py without tf and ss, without ss, without tf
# The flags of each row's own, as published: a term whose weight is 0 has none.
OWN = {"alone": {}, **dict(zip(ABLATION, (KD, KD | TF, KD | SS), strict=True)), "SSKD": KD | TF | SS}
OWN |= {row: KD | {"ce_weight": ce, "kd_weight": kd, "weight": weight} for row, ce, kd, weight in METHODS.values()}
for row in ("AB", "FT", "DKD"):
    OWN[row]["first_epoch"] = None  # the number that the method has

Flags = tuple[tuple[str, Any], ...]  # names and values, sorted; a list of milestones is a tuple


class Kind(NamedTuple):
    """What the seeds of one experiment have in common."""

    teacher: str  # its network; "" for a network trained alone
    network: str
    method: str  # a row of the tables: one of OWN
    setting: Flags = ()  # what is not as published of the flags that teachers have, too
    own: Flags = ()  # and of those that only this method has

    def value(self, name: str) -> Any:
        """Of a flag, as published where nothing else is said; None: not set, or the method has no such flag."""
        return dict(self.setting + self.own).get(name, published(self).get(name))

    def has(self, name: str) -> bool:
        """Whether a flag changes anything for the method."""
        return name not in OF_METHODS or name in OWN[self.method]


class Run(NamedTuple):
    place: str  # its folder, or file and line
    record: dict  # what a line of a .jsonl file says of it
    identity: str  # its name and flags
    dataset: str
    kind: Kind
    seed: int
    teacher: str  # the fingerprint of its teacher's weights; "" for a network trained alone
    teacher_folder: str
    computed: dict[str, Any]  # the device (each, where the run went on on another) and the flags of COMPUTED
    accuracies: tuple[float, float | None]  # on the test set, of the best and of the last epoch


def leave_out(place: str, why: str) -> None:
    print(f"{SCRIPT}: {place} left out: {why}", file=sys.stderr)


def refuse(place: str | Path, why: str) -> NoReturn:
    print(f"{SCRIPT}: error: {place}: {why}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------- reading


def read_runs(path: Path, damaged: Callable[[str, str], None] = leave_out) -> Iterator[Run]:
    """The finished runs below a folder, the outer ones first, or in a .jsonl file; `damaged` is told of any other."""
    if path.is_dir():
        results = map(Path, glob.glob(f"{glob.escape(str(path))}/**/result.json", recursive=True))  # follows links
        folders = sorted((result.parent for result in results), key=lambda folder: (len(folder.parts), folder))
        sources = [(str(folder), partial(record_of, folder)) for folder in folders]
    elif path.suffix == ".jsonl" and path.is_file():
        lines = enumerate(path.read_bytes().splitlines(), 1)
        sources = [(f"{path}:{number}", partial(json.loads, line)) for number, line in lines if line.strip()]
    else:
        refuse(path, "neither a folder nor a .jsonl file")
    for place, read in sources:
        try:
            run = run_of(place, read())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            damaged(place, f"{type(error).__name__}: {error}")
        else:
            yield run


def record_of(folder: Path) -> dict:
    """The record of a run: its flags, what ran at its first start (at later ones, too, if it differs), its result."""
    config, result = (json.loads((folder / name).read_bytes()) for name in ("config.json", "result.json"))
    first, *later = config.get("starts", [config])  # config.json of older runs says it beside the flags, of one start
    what = ("commit", "torch", "device", "threads")
    others = [start_of(start) for start in later if any(start.get(name) != first.get(name) for name in what)]
    result.get("teacher", {}).pop("path", None)  # of somebody's machine
    record = {"run": os.path.basename(os.path.abspath(folder)), "flags": config["flags"], **start_of(first)}
    return record | ({"starts": others} if others else {}) | {"result": result}


def start_of(start: dict) -> dict:
    """What ran, where and when. Without the command: the flags say it, and it may hold paths of somebody's machine."""
    versions = {name: start.get(name) for name in ("python", "torch")}
    where = {name: start.get(name) for name in ("device", "threads", "started")}
    return {"commit": start.get("commit"), "versions": versions} | where


def run_of(place: str, record: dict) -> Run:
    """The run that a record tells of; raises an error if what the tables need is missing or not of its type."""
    json.dumps(record, allow_nan=False, ensure_ascii=False).encode()  # ValueError: NaN, Infinity, half a character
    flags, result = record["flags"], record["result"]
    best, last = (typed(result, name, int, float) for name in ("best_acc", "last_acc"))
    if flags.get("val_fraction"):  # both are of the images that were held out to choose the epoch
        best, last = typed(result, "test_acc", int, float), None
    if not all(0 <= accuracy <= 100 for accuracy in (best, last or 0)):
        raise ValueError(f"accuracies {best}, {last} are not in percent")
    kind = kind_of(flags, typed(record, "run", str), result.get("teacher", {}).get("arch"))
    devices = dict.fromkeys(str(start.get("device")) for start in (record, *record.get("starts", ())))
    computed = {"device": ", ".join(devices)} | {name: flags.get(name) for name in COMPUTED}
    hash((kind, *computed.values()))  # TypeError: a flag that is neither a number, a text nor a list of them
    named = (json.dumps([record["run"], flags], sort_keys=True), typed(flags, "dataset", str), kind)
    whose = (typed(flags, "seed", int), str(flags.get("teacher", "")), teacher_folder(record["run"]))
    return Run(place, record, *named, *whose, computed, (best, last))


def typed(content: dict, name: str, *types: type) -> Any:
    """content[name], if it is of one of the types; raises KeyError or TypeError."""
    if type(content[name]) not in types:  # not isinstance: True is no number
        raise TypeError(f"{name} is {content[name]!r}")
    return content[name]


def kind_of(flags: dict, folder: str, told: str | None = None) -> Kind:
    """Which experiment a run belongs to, by its flags; a student's teacher is as `told`, else by the folder's name."""
    flags = {"first_epoch": None} | flags  # those of runs from before it
    is_student = "s_arch" in flags
    teacher, method = teacher_folder(folder) if is_student else "", "alone"
    teacher = told or re.sub(r"^teacher_|(_vanilla)?(_seed\d+)?$", "", teacher) or "?" * is_student
    if "method" in flags:
        method = METHODS[typed(flags, "method", str)][0]
    elif is_student:
        tf, ss = (typed(flags, name, int, float) != 0 for name in ("tf_weight", "ss_weight"))
        method = "SSKD" if tf and ss else "KD" + " + tf" * tf + " + ss" * ss if tf or ss else ABLATION[0]
    kind = Kind(teacher, typed(flags, "s_arch" if is_student else "arch", str), method)
    setting = differing({name: flags[name] for name in flags if name not in APART}, published(kind))
    return kind._replace(setting=setting, own=differing({name: flags[name] for name in OWN[method]}, OWN[method]))


def teacher_folder(student_folder: str) -> str:
    """The name of the folder of the teacher, with which that of its student ends."""
    found = re.search(r"_seed\d+_(.+)$", student_folder)
    return found[1] if found else ""


def published(kind: Kind) -> dict[str, Any]:
    """The flags with which the published results of a kind of run were reached."""
    return COMMON | OWN[kind.method] | {"lr": 0.01 if kind.network in LOW_RATE else 0.05}


def differing(flags: dict, expected: dict) -> Flags:
    """Those of the flags that are not as expected. None, 0 and False are one: not set."""
    found = {name: value for name, value in flags.items() if (value or None) != (expected.get(name) or None)}
    return tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in found.items()))


# -------------------------------------------------------------------------------------------- sorting and recording


def unusual(kinds: Iterable[Kind]) -> dict[str, set]:
    """The flags that are not as published in some of the kinds, and the values that each has among all of them."""
    kinds = set(kinds)
    names = sorted({name for kind in kinds for name, _ in kind.setting + kind.own})
    return {name: {shown(kind.value(name)) for kind in kinds if kind.has(name)} for name in names}


def order(kind: Kind, names: Iterable[str]) -> list[list[str | float]]:
    """To sort by setting, teacher, network, method and its flags, of which the `names` are looked at."""
    flags = {name: shown(kind.value(name)) for name in names}
    setting = [flags.pop(name) for name in list(flags) if name not in OF_METHODS]
    return [natural(word) for word in (*setting, kind.teacher, kind.network, kind.method, *flags.values())]


def natural(word: str) -> list[str | float]:
    """To sort numbers within a text as numbers: resnet8 before resnet20, 9.0 before 10.0 and after 1e-05."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", word)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def shown(value: Any) -> str:
    """A flag's value as one types it; "" where it is not set."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None or value is False else str(value)


def write_record(file: Path, runs: list[Run]) -> None:
    """Writes a line for each run to a .jsonl file, in place of the one with its name and flags; other lines stay."""
    if file.suffix != ".jsonl":
        refuse(file, "not the name of a .jsonl file")
    if not runs:
        refuse(file, "no finished run to record")
    lines = {run.identity: run for run in read_runs(file, damaged=refuse)} if file.exists() else {}
    lines |= {run.identity: run for run in reversed(runs)}  # one that is there twice counts once, the first one
    names = unusual(run.kind for run in lines.values())
    ordered = sorted(lines.values(), key=lambda run: (run.dataset, order(run.kind, names), run.seed, run.identity))
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        beside.write_text("".join(json.dumps(run.record) + "\n" for run in ordered))
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    print(f"{file} has {len(ordered)} line(s), {len({run.identity for run in runs})} of them of runs found now")
