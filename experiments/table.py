"""What the runs below a folder reached, beside what was published.

    python experiments/table.py                        # both published tables
    python experiments/table.py --markdown             # the same for a README
    python experiments/table.py experiments/demo_synthetic --dataset synthetic

A run is a folder with result.json and config.json, and is known by its flags, which stand in the latter. Runs on
CIFAR-100 with the published flags fill the published tables; all others are listed after them, setting by setting.
"""

import argparse
import glob
import json
import re
import signal
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

PUBLISHED = Path(__file__).with_name("published_results.json")
NONE = "–"

# The flags of the published results, as config.json has them. Those that name a run or change only how it is computed
# are APART; any other that is set (train_size, say) makes another setting.
COMMON = {"dataset": "cifar100", "epoch": 240, "batch_size": 64, "milestones": [150, 180, 210]}
COMMON |= {"momentum": 0.9, "weight_decay": 5e-4, "gamma": 0.1, "few_shot": 1.0, "label_noise": 0.0}
STUDENT = {"ce_weight": 0.1, "kd_weight": 0.9, "tf_weight": 2.7, "ss_weight": 10.0}
STUDENT |= {"kd_T": 4.0, "tf_T": 4.0, "ss_T": 0.5, "ratio_tf": 1.0, "ratio_ss": 0.75}
STUDENT |= {"t_epoch": 60, "t_lr": 0.05, "t_milestones": [30, 45]}
APART = {"arch", "s_arch", "teacher", "seed", "dataset", "amp", "compile", "deterministic", "save_interval"}
LOW_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")  # published with --lr 0.01, all others with 0.05

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
normal range: what to expect of a faithful run, going by what others got: 1.0 below to 0.1 above what was published."""


class Kind(NamedTuple):
    """What the seeds of one experiment have in common."""

    teacher: str  # its network; "" for a network trained alone
    network: str
    method: str  # alone, KD, KD + tf, SSKD
    setting: str = ""  # the flags that are not as published
    more: str = ""  # those that only a student has


Runs = dict[Kind, dict[int, dict[str, float]]]  # the accuracies of each seed


def read_runs(folder: Path, dataset: str) -> Runs:
    """The finished runs below `folder` on one data set. A seed that is there twice counts once, the outer one."""
    runs: Runs = defaultdict(dict)
    found = map(Path, glob.glob(f"{glob.escape(str(folder))}/**/result.json", recursive=True))  # follows links
    for path in sorted(found, key=lambda path: (len(path.parts), path)):
        try:
            flags = json.loads(path.with_name("config.json").read_text())["flags"]
            result = json.loads(path.read_text())
            accuracies = {name: float(result[name]) for name in ("best_acc", "last_acc")}
            kind, seed, on = kind_of(flags, path.parent.name), int(flags["seed"]), flags["dataset"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"table.py: {path.parent} left out: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if on != dataset:
            continue
        if runs[kind].setdefault(seed, accuracies) != accuracies:
            print(f"table.py: {path.parent} left out: another run is of its setting and seed", file=sys.stderr)
    return runs


def kind_of(flags: dict, folder: str) -> Kind:
    """Which experiment a run belongs to, by its flags; only a student's teacher is known by the folder's name."""
    network = str(flags["s_arch"] if "s_arch" in flags else flags["arch"])
    published = COMMON | {"lr": 0.01 if network in LOW_RATE else 0.05}
    setting = differing({name: value for name, value in flags.items() if name not in STUDENT}, published)
    if "s_arch" not in flags:
        return Kind("", network, "alone", setting)
    found = re.search(r"_seed\d+_(?:teacher_)?(.+?)(?:_vanilla)?(?:_seed\d+)?$", folder)
    teacher = found[1] if found else "?"
    used = [name for name in ("tf", "ss") if flags[f"{name}_weight"]]
    method = "SSKD" if len(used) == 2 else " + ".join(["KD", *used])
    unused = {"tf", "ss"}.difference(used)
    if "ss" in unused:
        unused.add("t")  # the SS head's flags
    own = {name: flags[name] for name in STUDENT if unused.isdisjoint(name.split("_"))}
    return Kind(teacher, network, method, setting, differing(own, STUDENT))


def differing(flags: dict, published: dict) -> str:
    """Those of the flags that are not as published, as one types them."""
    typed = []
    for name, value in flags.items():
        expected = published.get(name)
        if name not in APART and value != expected and (value or expected):  # None and 0 are both: not set
            values = value if isinstance(value, list) else [] if value is True else [value]
            typed.append(" ".join([f"--{name.replace('_', '-')}", *map(str, values)]))
    return " ".join(typed)


def cell(results: dict[int, dict[str, float]] | None, name: str) -> str:
    """Mean ± standard deviation (of a sample) over the seeds, and their number."""
    if not results:
        return NONE
    values = [accuracies[name] for accuracies in results.values()]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} ({len(values)})"


def published_table(runs: Runs, table: dict) -> tuple[list[list[str]], set[Kind]]:
    """The rows of a published table, a column for each pair, and which of the runs are in them."""
    pairs = [tuple(pair) for pair in table["pairs"]]
    rows = [["teacher", "", *(teacher for teacher, _ in pairs)], ["student", "", *(student for _, student in pairs)]]
    experiments = {
        "teacher": [Kind("", teacher, "alone") for teacher, _ in pairs],
        "student": [Kind("", student, "alone") for _, student in pairs],
        **{method: [Kind(*pair, method) for pair in pairs] for method in ("KD", "KD + tf", "SSKD")},
    }
    for title, kinds in experiments.items():
        figures = table.get(title)  # none for KD + tf, which is in the paper's ablation only
        first = len(rows)
        if figures:
            rows.append(["", "published", *(f"{x:.2f}" for x in figures)])
        if title == "SSKD":
            reruns = [RERUNS.get(pair) for pair in pairs]
            rows.append(["", "re-run, HSAKD", *(f"{x[0]:.2f} ± {x[1]:.2f}" if x else NONE for x in reruns)])
            rows.append(["", "normal range", *(" to ".join(f"{x + end:.2f}" for end in NORMAL) for x in figures)])
        for name, label in (("best_acc", "here, best"), ("last_acc", "here, last")):
            rows.append(["", label, *(cell(runs.get(kind), name) for kind in kinds)])
        rows[first][0] = title
    return rows, {kind for kinds in experiments.values() for kind in kinds}


def other_table(runs: Runs, kinds: list[Kind]) -> list[list[str]]:
    """The rows of a plain list, one for each of `kinds`."""
    rows = [["network", "teacher", "method", "best", "last", "other flags of the student"]]
    for kind in kinds:
        accuracies = (cell(runs[kind], name) for name in ("best_acc", "last_acc"))
        rows.append([kind.network, kind.teacher or NONE, kind.method, *accuracies, kind.more])
    return rows


def show(title: str, rows: list[list[str]], heads: int, markdown: bool) -> None:
    """Prints a table whose first `heads` rows are its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    if not markdown:
        print(title, *("  ".join(line).rstrip() for line in lines), sep="\n", end="\n\n")
        return
    if heads == 2:  # Markdown has one
        lines[:2] = [[f"{a.strip()} → {b.strip()}" if b.strip() else "" for a, b in zip(*lines[:2], strict=True)]]
        lines[0][0] = ""
    lines.insert(1, ["---"] * len(widths))
    print(f"**{title}**\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n", end="\n\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prints what the runs reached beside what was published.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent, help="where the runs are")
    parser.add_argument("--dataset", default="cifar100", help="the runs on this data set")
    parser.add_argument("--markdown", action="store_true", help="for a README")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder")

    runs = read_runs(args.folder, args.dataset)
    listed: set[Kind] = set()
    if args.dataset == COMMON["dataset"]:
        published = json.loads(PUBLISHED.read_text())
        for name, title in (("similar", "Similar networks"), ("cross", "Different networks")):
            rows, kinds = published_table(runs, published[name])
            show(f"{title}: top-1 accuracy (%) on CIFAR-100", rows, 2, args.markdown)
            listed |= kinds
        print(NOTES, end="\n\n")

    others = sorted(kind for kind in runs if kind not in listed)
    for setting in sorted({kind.setting for kind in others}):
        kinds = [kind for kind in others if kind.setting == setting]
        show(f"{args.dataset}, {setting or 'published flags'}", other_table(runs, kinds), 1, args.markdown)
    if not runs and args.dataset != COMMON["dataset"]:
        print(f"no finished run on {args.dataset} below {args.folder}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # table.py | head ends quietly
    main()
