"""What the finished runs reached, beside what was published.

    python experiments/table.py                                            # the run folders in experiments/
    python experiments/table.py --markdown                                 # the same for a README; or --csv, --json
    python experiments/table.py experiments/fashion_mnist.jsonl --dataset fashion_mnist
    python experiments/table.py experiments/cifar100 --against KD          # gains over KD, seed by seed
    python experiments/table.py --record experiments/mine.jsonl experiments/cifar100

Runs on CIFAR-100 with the published flags fill the published tables; all others are listed, a row for each combination
of networks, method and flags, a column for each flag that varies.
"""

import argparse
import csv
import json
import math
import signal
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever this is started from

from harness import flags
from experiments.runs import (
    ABLATION,
    COMMON,
    COMPUTED,
    SCRIPT,
    Kind,
    Run,
    leave_out,
    natural,
    order,
    read_runs,
    refuse,
    shown,
    unusual,
    write_record,
)

PUBLISHED = Path(__file__).with_name("published_results.json")
NONE = "–"
BY = ("device", *COMPUTED)
NORMAL = (-1.0, 0.1)  # where a faithful run lands, from the published figure

NOTES = """\
here: mean ± standard deviation over seeds (number of seeds), of the best epoch, as published, and of the last.
normal range: what to expect of a faithful run, going by what others got: 1.0 below to 0.1 above what was published.
KD, 4 views, KD + tf and KD + ss are SSKD without tf and ss, without ss, and without tf; the rows from KD to CRD see one
view of an image. DKD, KD + LS: published with the teachers of CRD's tables, which are other ones.
† one teacher for all of these seeds; elsewhere each seed has its own."""


class Row(NamedTuple):
    """Runs that are averaged, each with another seed; their teachers go with the seeds, or all have the same one."""

    kind: Kind
    one_teacher: str  # its fingerprint, or ""
    runs: dict[int, Run]  # by seed


# ------------------------------------------------------------------------------------------------- runs become rows


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """The runs by kind and teacher, sorted; one that is there twice counts once."""
    kinds: dict[Kind, dict[tuple[int, str], Run]] = defaultdict(dict)
    for run in runs:
        first = kinds[run.kind].setdefault((run.seed, run.teacher), run)
        if first.accuracies != run.accuracies:
            differing = " ".join(name for name in BY if first.computed[name] != run.computed[name])
            hint = f" (--by {differing} tells them apart)" if differing else ""
            leave_out(run.place, f"another run is of its setting and seed{hint}")
    rows = [Row(kind, *row) for kind, found in kinds.items() for row in by_teacher(list(found.values())).items()]
    flags = unusual(kinds)
    return sorted(rows, key=lambda row: (order(row.kind, flags), row.one_teacher))


def by_teacher(runs: list[Run]) -> dict[str, dict[int, Run]]:
    """Parts the runs of a kind such that no row mixes teachers: "" has those whose teachers go with the seeds.

    A teacher that several seeds have, and each of several that the same seed has, makes a row of its own, under its
    fingerprint. The run of seed 0 with the teacher of seed 0 may be in both sorts of rows.
    """
    shared = {teacher for teacher, n in Counter(run.teacher for run in runs if run.teacher).items() if n > 1}
    own = [run for run in runs if run.teacher not in shared or run.teacher_folder.endswith(f"_seed{run.seed}")]
    several = {seed for seed, n in Counter(run.seed for run in own).items() if n > 1}
    rows: dict[str, dict[int, Run]] = defaultdict(dict)
    if any(run.teacher not in shared and run.seed not in several for run in own):
        rows[""] = {run.seed: run for run in own if run.seed not in several}
    for run in runs:
        if run.teacher in shared or run.seed in several:
            rows[run.teacher][run.seed] = run
    return rows


def told_apart(run: Run, by: Iterable[str]) -> Run:
    """The run, as one of a setting that says how it was computed, too."""
    setting = dict(run.kind.setting) | {name: run.computed[name] for name in by}
    return run._replace(kind=run.kind._replace(setting=tuple(sorted(setting.items()))))


def warn_of_teachers(runs: Iterable[Run]) -> None:
    """Tells of teachers of one name and different weights, whose students would be compared with each other."""
    found = defaultdict(set)
    for run in runs:
        if run.teacher:
            found[run.kind.network, run.kind.setting, run.teacher_folder].add(run.teacher)
    names = sorted({name for (*_, name), weights in found.items() if len(weights) > 1}, key=natural)
    if names:
        which = ", ".join(names[:3]) + ", …" * (len(names) > 3)
        what = f"students in one setting have different teachers of one name: {which}"
        print(f"{SCRIPT}: {what}; name one of their folders to see it alone", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- statistics


def spread(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (of a sample); None where there are too few, or a run has no such figure."""
    values = list(values)
    if not values or None in values:
        return None, None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def interval(differences: list[float]) -> tuple[float | None, float | None, float | None]:
    """Mean of paired differences and the ends of its 95 % interval."""
    mean, deviation = spread(differences)
    if deviation is None:
        return mean, None, None
    half = student_t(len(differences) - 1) * deviation / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def student_t(freedom: int, share: float = 0.95) -> float:
    """The t such that a share of Student's distribution lies between −t and t; `freedom`: its degrees, at least 1."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if within(angle, freedom) < share:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(low)


def within(angle: float, freedom: int) -> float:
    """The share between ±√freedom · tan(angle): the finite series 26.7.3 and 26.7.4 of Abramowitz and Stegun."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):
        term *= (power - 1) / power * math.cos(angle) ** 2 if power > 1 else 1.0
        total += term
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


# --------------------------------------------------------------------------------------------------- rows become text


def figures(row: Row, flags: Iterable[str]) -> dict[str, Any]:
    """All that is to be said of a row."""
    found = {"network": row.kind.network, "teacher": row.kind.teacher, "one_teacher": row.one_teacher}
    found |= {"method": row.kind.method} | {name: row.kind.value(name) for name in flags}
    found |= {"epoch_chosen_on": "held-out images" if row.kind.value("val_fraction") else "test set"}
    found |= {"n": len(row.runs)}
    for i, name in enumerate(("best", "last")):
        found[f"{name}_mean"], found[f"{name}_sd"] = spread(run.accuracies[i] for run in row.runs.values())
    return found | {"seeds": sorted(row.runs)}


def against(row: Row, others: list[Row]) -> dict[str, Any]:
    """What the row has over those of a method, by pairs of runs with the same network, setting, seed and teacher.

    Of several that fit, the one whose own flags are nearest to the published counts; a network alone fits any teacher.
    """
    mine, fitting = row.kind, []
    for other in others:
        its = other.kind
        if (its.network, its.setting) == (mine.network, mine.setting) and its.teacher in ("", mine.teacher):
            both = [(run, other.runs[seed]) for seed, run in row.runs.items() if seed in other.runs]
            fitting.append((its, [(a, b) for a, b in both if b.teacher in ("", a.teacher)]))
    its, pairs = min(fitting, key=lambda fit: (not fit[1], len(fit[0].own), -len(fit[1])), default=(mine, []))
    if its == mine:
        pairs = []
    found = {"pairs": len(pairs)}
    for i, name in enumerate(("best", "last")):
        values = [(a.accuracies[i], b.accuracies[i]) for a, b in pairs]
        ends = interval([a - b for a, b in values if a is not None and b is not None])
        found |= dict(zip((f"{name}_difference", f"{name}_low", f"{name}_high"), ends, strict=True))
    return found


def cells(found: dict[str, Any]) -> list[str]:
    """Of the best and of the last epoch: mean ± standard deviation (number of seeds)."""
    texts = []
    for name in ("best", "last"):
        mean, deviation = found[f"{name}_mean"], found[f"{name}_sd"]
        more = "" if deviation is None else f" ± {deviation:.2f}"
        texts.append(NONE if mean is None else f"{mean:.2f}{more} ({found['n']})")
    return texts


def gains(found: dict[str, Any]) -> list[str]:
    """Of the best and of the last epoch: mean difference [95 % interval] (number of pairs)."""
    texts = []
    for name in ("best", "last"):
        mean, low, high = (found[f"{name}_{what}"] for what in ("difference", "low", "high"))
        ends = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
        texts.append(NONE if mean is None else f"{mean:+.2f}{ends} ({found['pairs']})")
    return texts


def show_published(title: str, table: dict, results: dict[Kind, Row], markdown: bool) -> set[Kind]:
    """Prints a published table, a column for each pair, beside the results; returns which kinds of runs it has."""
    pairs = [tuple(pair) for pair in table["pairs"]]
    teachers, students = zip(*pairs, strict=True)
    kinds = {
        "teacher": [Kind("", teacher, "alone") for teacher in teachers],
        "student": [Kind("", student, "alone") for student in students],
    }
    methods = [name for name in table if name not in ("pairs", "SSKD, re-run", *kinds)]
    kinds |= {method: [Kind(*pair, method) for pair in pairs] for method in (*methods, *ABLATION)}
    rows = []
    for name in kinds:
        block = []
        if name in table:  # not the ablation, of which the paper has bars only
            block.append(["published", *(f"{x:.2f}" if x else NONE for x in table[name])])
        if name == "SSKD":
            reruns = table["SSKD, re-run"]
            block.append(["re-run, HSAKD", *("{:.2f} ± {:.2f}".format(*x) if x else NONE for x in reruns)])
            block.append(["normal range", *(" to ".join(f"{x + end:.2f}" for end in NORMAL) for x in table[name])])
        found = [results.get(kind) for kind in kinds[name]]
        texts = [cells(figures(row, ())) if row else [NONE, NONE] for row in found]
        marks = [" †" if row and row.one_teacher else "" for row in found]
        for i, which in enumerate(("best", "last")):
            block.append([f"here, {which}", *(both[i] + mark for both, mark in zip(texts, marks, strict=True))])
        rows += [["" if i else name, *row] for i, row in enumerate(block)]
    show(title, [["teacher", "", *teachers], ["student", "", *students]], rows, markdown)
    return set().union(*kinds.values())


def show_all_published(rows: list[Row], markdown: bool) -> list[Row]:
    """Prints the published tables, and returns those of the rows that have no place in them."""
    results = {row.kind: row for row in reversed(rows)}  # where each seed has its own teacher comes first
    kinds = set()
    for name, title in (("similar", "Similar networks"), ("cross", "Different networks")):
        table = json.loads(PUBLISHED.read_text())[name]
        kinds |= show_published(f"{title}: top-1 accuracy (%) on CIFAR-100", table, results, markdown)
    print(NOTES, end="\n\n")
    return [row for row in rows if row.kind not in kinds or row is not results[row.kind]]


def show_list(args: argparse.Namespace, rows: list[Row], others: list[Row]) -> None:
    """Prints the rows, with a column for each flag that varies; what they share is in the title."""
    by, method = args.by, args.against
    values = unusual(row.kind for row in rows)
    columns = by + [name for name in values if name not in by and len(values[name]) > 1]
    same = [f"{typed(name)} {' '.join(values[name])}".strip() for name in values if name not in columns]
    head = ["network", "teacher", "method", *map(typed, columns), "best", "last"]
    head += [f"{which} − {method}" for which in ("best", "last") if method]
    lines = []
    for row in rows:
        one = f" ({row.one_teacher[:8]})" if row.one_teacher else ""
        flags = [shown(row.kind.value(name)) or NONE for name in columns]
        line = [row.kind.network, f"{row.kind.teacher}{one}" or NONE, row.kind.method, *flags]
        lines.append([*line, *cells(figures(row, ())), *(gains(against(row, others)) if method else ())])
    show(f"{args.dataset}, {' '.join(same) or 'published flags'}", [head], lines, args.markdown)
    if any(row.one_teacher for row in rows):
        print("teacher (fingerprint of its weights): one for all seeds of the row; elsewhere each seed has its own.")
    if "val_fraction" in values:
        print("--val-fraction: test accuracy at the epoch that is best on held-out images; else best on the test set.")
    if method:
        print(f"− {method}: mean difference [95 % interval, Student's t] (pairs with the same seed and teacher).")


def typed(name: str) -> str:
    """The name of a flag as one types it."""
    return name if name == "device" else f"--{name.replace('_', '-')}"


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


def write_rows(rows: list[dict[str, Any]], as_csv: bool) -> None:
    """Prints the rows as CSV, with lists as words, or as JSON."""
    if as_csv:
        writer = csv.DictWriter(sys.stdout, rows[0] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: shown(value) for name, value in row.items()} for row in rows)
    else:
        print("[", ",\n".join(map(json.dumps, rows)), "]", sep="\n")


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser(
        "Prints what the runs reached beside what was published.", formatter_class=argparse.HelpFormatter
    )
    where = "a folder, for all finished runs below it, or a .jsonl file; default: the folder of this script"
    parser.add_argument("paths", nargs="*", type=Path, default=[Path(__file__).parent], metavar="PATH", help=where)
    parser.add_argument("--dataset", default=COMMON["dataset"], help="the runs on this data set")
    over = "list all runs, with their gains over this row (KD, say), run by run: paired by seed and teacher"
    parser.add_argument("--against", metavar="METHOD", help=over)
    apart = f"list all runs, told apart by how they were computed, too: {', '.join(BY)}"
    parser.add_argument("--by", nargs="+", choices=BY, default=[], metavar="HOW", help=apart)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="for a README")
    form.add_argument("--csv", action="store_true", help="list all runs for another program")
    form.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add the runs to this .jsonl file; no table")
    try:
        args = parser.parse_args(argv)
        runs = [run for path in args.paths for run in read_runs(path)]
        if args.record:
            write_record(args.record, runs)
            return
    except flags.UserError as error:
        flags.tell(SCRIPT, f"error: {error}")
        sys.exit(2)
    except OSError as error:
        refuse(error.filename2 or error.filename, error.strerror)

    asked = [told_apart(run, args.by) for run in runs if run.dataset == args.dataset]
    warn_of_teachers(asked)
    rows = rows_of(asked)
    others = [row for row in rows if row.kind.method == args.against]
    if args.against and rows and not others:
        known = ", ".join(dict.fromkeys(row.kind.method for row in rows))
        refuse(f"--against {args.against}", f"no run is of this row of the tables; there are {known}")

    if args.csv or args.json:
        varying = unusual(row.kind for row in rows)
        gain = {"against": args.against} if args.against else {}
        found = [{"dataset": args.dataset} | figures(row, varying) | gain for row in rows]
        for line, row in zip(found, rows, strict=True):
            line |= against(row, others) if args.against else {}
        write_rows(found, args.csv)
    else:
        if args.dataset == COMMON["dataset"] and not (args.by or args.against):
            rows = show_all_published(rows, args.markdown)
        if rows:
            show_list(args, rows, others)
    if not asked:
        out = sys.stderr if args.csv or args.json else sys.stdout
        print(f"no finished run on {args.dataset} in {', '.join(map(str, args.paths))}", file=out)
        for dataset, count in sorted(Counter(run.dataset for run in runs).items()):
            print(f"{count} run{'s' if count > 1 else ''} on {dataset}: --dataset {dataset}", file=out)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # table.py | head ends quietly
    flags.show_any_name()  # such as ± and †
    main()
