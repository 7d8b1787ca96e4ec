"""What the finished runs reached, beside what was published.

    python experiments/table.py                                            # the run folders in experiments/
    python experiments/table.py --markdown                                 # the same for a README
    python experiments/table.py experiments/fashion_mnist.jsonl --dataset fashion_mnist
    python experiments/table.py --record experiments/mine.jsonl experiments/cifar100

A run is a folder with config.json and result.json or, once recorded, a line of a .jsonl file; it is known by its flags.
Runs on CIFAR-100 with the published flags fill the published tables; all others are listed setting by setting.
"""

import argparse
import glob
import json
import os
import re
import signal
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

PUBLISHED = Path(__file__).with_name("published_results.json")
NONE = "–"

# The flags of the published results. Those that name a run or change only how it is computed are APART; any other that
# is set (train_size, say) makes another setting.
COMMON = {"dataset": "cifar100", "epoch": 240, "batch_size": 64, "milestones": [150, 180, 210]}
COMMON |= {"momentum": 0.9, "weight_decay": 5e-4, "gamma": 0.1, "few_shot": 1.0, "label_noise": 0.0}
KD = {"ce_weight": 0.1, "kd_weight": 0.9, "kd_T": 4.0}
TF = {"tf_weight": 2.7, "tf_T": 4.0, "ratio_tf": 1.0}
SS = {"ss_weight": 10.0, "ss_T": 0.5, "ratio_ss": 0.75, "t_epoch": 60, "t_lr": 0.05, "t_milestones": [30, 45]}
APART = {"arch", "s_arch", "teacher", "seed", "dataset", "amp", "compile", "deterministic", "save_interval"}
APART |= {"method", "weight"}
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
ABLATION = ("KD, 4 views", "KD + tf")  # of SSKD: student.py without tf and ss, and without ss

# What the papers of the two later methods report for the same pairs, with CRD's teachers (KD + LS is logit
# standardisation, table of the authors' repository).
LATER = {
    ("wrn_40_2", "wrn_16_2"): {"DKD": 76.24, "KD + LS": 76.11},
    ("wrn_40_2", "wrn_40_1"): {"DKD": 74.81, "KD + LS": 74.37},
    ("resnet56", "resnet20"): {"DKD": 71.97, "KD + LS": 71.43},
    ("resnet32x4", "resnet8x4"): {"DKD": 76.32, "KD + LS": 76.62},
    ("vgg13", "vgg8"): {"DKD": 74.68, "KD + LS": 74.36},
    ("vgg13", "MobileNetV2"): {"DKD": 69.71, "KD + LS": 68.61},
    ("ResNet50", "MobileNetV2"): {"DKD": 70.35, "KD + LS": 69.02},
    ("resnet32x4", "ShuffleV1"): {"DKD": 76.45},
    ("resnet32x4", "ShuffleV2"): {"DKD": 77.07, "KD + LS": 75.56},
    ("wrn_40_2", "ShuffleV1"): {"DKD": 76.70},
}

# What others got from the published code: HSAKD (Yang et al., IJCAI 2021), mean and standard deviation. (Its
# MobileNetV2 has another stem and cannot be compared.)
RERUNS = {
    ("wrn_40_2", "wrn_16_2"): (76.16, 0.17),
    ("wrn_40_2", "wrn_40_1"): (75.84, 0.04),
    ("resnet56", "resnet20"): (70.80, 0.02),
    ("resnet32x4", "resnet8x4"): (75.83, 0.29),
    ("wrn_40_2", "ShuffleV1"): (76.71, 0.31),
    ("resnet32x4", "ShuffleV2"): (77.64, 0.24),
}
NORMAL = (-1.0, 0.1)  # where a faithful run lands, from the published figure

NOTES = """\
here: mean ± standard deviation over seeds (number of seeds), of the best epoch, as published, and of the last.
normal range: what to expect of a faithful run, going by what others got: 1.0 below to 0.1 above what was published.
KD, 4 views and KD + tf are SSKD without tf and ss, and without ss; the rows from KD to CRD see one view of an image.
DKD, KD + LS: published with the teachers of CRD's tables, which are other ones."""


class Kind(NamedTuple):
    """What the seeds of one experiment have in common."""

    teacher: str  # its network; "" for a network trained alone
    network: str
    method: str  # alone, SSKD, or a row of METHODS or ABLATION
    setting: str = ""  # the flags that are not as published
    more: str = ""  # those that only a student has


class Run(NamedTuple):
    place: str  # its folder, or file and line
    record: dict  # what a line of a .jsonl file says of it
    identity: str  # its name and flags
    dataset: str
    kind: Kind
    seed: int
    accuracies: tuple[float, float]  # of the best and of the last epoch


Seeds = dict[int, tuple[float, float]]  # the accuracies of each


def leave_out(place: str, why: str) -> None:
    print(f"table.py: {place} left out: {why}", file=sys.stderr)


def refuse(place: str | Path, why: str) -> NoReturn:
    print(f"table.py: error: {place}: {why}", file=sys.stderr)
    sys.exit(2)


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
    accuracies = tuple(typed(result, name, int, float) for name in ("best_acc", "last_acc"))
    if not all(0 <= accuracy <= 100 for accuracy in accuracies):
        raise ValueError(f"accuracies {accuracies} are not in percent")
    kind = kind_of(flags, typed(record, "run", str))
    identity = json.dumps([record["run"], flags], sort_keys=True)
    return Run(place, record, identity, typed(flags, "dataset", str), kind, typed(flags, "seed", int), accuracies)


def typed(content: dict, name: str, *types: type) -> Any:
    """content[name], if it is of one of the types; raises KeyError or TypeError."""
    if type(content[name]) not in types:  # not isinstance: True is no number
        raise TypeError(f"{name} is {content[name]!r}")
    return content[name]


def kind_of(flags: dict, folder: str) -> Kind:
    """Which experiment a run belongs to, by its flags; only a student's teacher is known by the folder's name."""
    is_student = "s_arch" in flags
    network = typed(flags, "s_arch" if is_student else "arch", str)
    published = COMMON | {"lr": 0.01 if network in LOW_RATE else 0.05}
    setting = differing({name: flags[name] for name in flags if name not in KD | TF | SS}, published)
    if not is_student:
        return Kind("", network, "alone", setting)
    found = re.search(r"_seed\d+_(?:teacher_)?(.+?)(?:_vanilla)?(?:_seed\d+)?$", folder)
    teacher = found[1] if found else "?"
    if "method" in flags:
        method, ce, kd, weight = METHODS[typed(flags, "method", str)]
        used = {"ce_weight": ce, "kd_weight": kd, "weight": weight, "kd_T": KD["kd_T"]}
        own = {f"--{name.replace('_', '-')} {flags[name]}" for name in used if flags[name] != used[name]}
        return Kind(teacher, network, method, setting, " ".join(sorted(own)))
    tf, ss = (typed(flags, name, int, float) != 0 for name in ("tf_weight", "ss_weight"))
    method = "SSKD" if tf and ss else "KD" + " + tf" * tf + " + ss" * ss if tf or ss else ABLATION[0]
    used = KD | (TF if tf else {}) | (SS if ss else {})  # a term whose weight is 0 has no other flags
    return Kind(teacher, network, method, setting, differing({n: flags[n] for n in used}, used))


def differing(flags: dict, published: dict) -> str:
    """Those of the flags that are not as published, as one types them."""
    words = []
    for name, value in flags.items():
        expected = published.get(name)
        if name not in APART and value != expected and (value or expected):  # None and 0 are both: not set
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def order(kind: Kind) -> list[list[str | float]]:
    """To sort by setting, teacher, network, method; numbers within a text as numbers: resnet8 before resnet20."""
    texts = [re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", text) for text in (kind.setting, *kind)]
    return [[float(part) if i % 2 else part for i, part in enumerate(parts)] for parts in texts]


def write_record(file: Path, runs: list[Run]) -> None:
    """Writes a line for each run to a .jsonl file, in place of the one with its name and flags; other lines stay."""
    if file.suffix != ".jsonl":
        refuse(file, "not the name of a .jsonl file")
    if not runs:
        refuse(file, "no finished run to record")
    lines = {run.identity: run for run in read_runs(file, damaged=refuse)} if file.exists() else {}
    lines |= {run.identity: run for run in reversed(runs)}  # one that is there twice counts once, the first one
    ordered = sorted(lines.values(), key=lambda run: (run.dataset, order(run.kind), run.seed, run.identity))
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        beside.write_text("".join(json.dumps(run.record) + "\n" for run in ordered))
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    print(f"{file} has {len(ordered)} line(s), {len({run.identity for run in runs})} of them of runs found now")


def best_and_last(seeds: Seeds | None) -> list[str]:
    """Mean ± standard deviation (of a sample) over the seeds, and their number, of both accuracies."""
    texts = []
    for values in zip(*seeds.values(), strict=True) if seeds else ():
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        texts.append(f"{statistics.mean(values):.2f}{deviation} ({len(values)})")
    return texts or [NONE, NONE]


def show_published(title: str, table: dict, results: dict[Kind, Seeds], markdown: bool) -> set[Kind]:
    """Prints a published table, a column for each pair, beside the results; returns which kinds of runs it has."""
    pairs = [tuple(pair) for pair in table["pairs"]]
    teachers, students = zip(*pairs, strict=True)
    kinds = {
        "teacher": [Kind("", teacher, "alone") for teacher in teachers],
        "student": [Kind("", student, "alone") for student in students],
    }
    later = [row for row, *_ in METHODS.values() if row not in table]
    for method in (*(name for name in table if name not in ("pairs", *kinds)), *ABLATION, *later):
        kinds[method] = [Kind(*pair, method) for pair in pairs]
    rows = []
    for name in kinds:
        block = []
        figures = [LATER.get(pair, {}).get(name) for pair in pairs] if name in later else table.get(name)
        if figures:  # none for the ablation, of which the paper has bars only
            block.append(["published", *(f"{x:.2f}" if x else NONE for x in figures)])
        if name == "SSKD":
            reruns = [RERUNS.get(pair) for pair in pairs]
            block.append(["re-run, HSAKD", *(f"{x[0]:.2f} ± {x[1]:.2f}" if x else NONE for x in reruns)])
            block.append(["normal range", *(" to ".join(f"{x + end:.2f}" for end in NORMAL) for x in table[name])])
        best, last = zip(*(best_and_last(results.get(kind)) for kind in kinds[name]), strict=True)
        block += [["here, best", *best], ["here, last", *last]]
        rows += [["" if i else name, *row] for i, row in enumerate(block)]
    show(title, [["teacher", "", *teachers], ["student", "", *students]], rows, markdown)
    return set().union(*kinds.values())


def show(title: str, heads: list[list[str]], rows: list[list[str]], markdown: bool) -> None:
    """Prints a table whose head may have several lines."""
    if markdown:  # has one
        heads = [[" → ".join(filter(None, column)) for column in zip(*heads, strict=True)]]
    widths = [max(map(len, column)) for column in zip(*heads, *rows, strict=True)]
    lines = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in (*heads, *rows)]
    if markdown:
        lines.insert(1, ["---"] * len(widths))
        print(f"**{title}**\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n", end="\n\n")
    else:
        print(title, *("  ".join(line).rstrip() for line in lines), sep="\n", end="\n\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prints what the runs reached beside what was published.")
    where = "a folder, for all finished runs below it, or a .jsonl file; default: the folder of this script"
    parser.add_argument("paths", nargs="*", type=Path, default=[Path(__file__).parent], metavar="PATH", help=where)
    parser.add_argument("--dataset", default=COMMON["dataset"], help="the runs on this data set")
    parser.add_argument("--markdown", action="store_true", help="for a README")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add the runs to this .jsonl file; no table")
    args = parser.parse_args(argv)
    try:
        runs = [run for path in args.paths for run in read_runs(path)]
        if args.record:
            write_record(args.record, runs)
            return
    except OSError as error:
        refuse(error.filename2 or error.filename, error.strerror)

    results: dict[Kind, Seeds] = defaultdict(dict)
    for run in [run for run in runs if run.dataset == args.dataset]:
        if results[run.kind].setdefault(run.seed, run.accuracies) != run.accuracies:
            leave_out(run.place, "another run is of its setting and seed")
    listed: set[Kind] = set()
    if args.dataset == COMMON["dataset"]:
        published = json.loads(PUBLISHED.read_text())
        for name, title in (("similar", "Similar networks"), ("cross", "Different networks")):
            title += ": top-1 accuracy (%) on CIFAR-100"
            listed |= show_published(title, published[name], results, args.markdown)
        print(NOTES, end="\n\n")

    settings = defaultdict(list)
    for kind in sorted([kind for kind in results if kind not in listed], key=order):
        row = [kind.network, kind.teacher or NONE, kind.method, *best_and_last(results[kind]), kind.more]
        settings[kind.setting].append(row)
    for setting, rows in settings.items():
        head = ["network", "teacher", "method", "best", "last", "other flags of the student"]
        show(f"{args.dataset}, {setting or 'published flags'}", [head], rows, args.markdown)

    if not results:
        print(f"no finished run on {args.dataset} in {', '.join(map(str, args.paths))}")
        for dataset, count in sorted(Counter(run.dataset for run in runs).items()):
            print(f"{count} run{'s' if count > 1 else ''} on {dataset}: --dataset {dataset}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # table.py | head ends quietly
    main()
