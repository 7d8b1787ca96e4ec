"""Prints what the finished runs reached, beside what was published.

    python experiments/table.py                                            # the run folders in experiments/
    python experiments/table.py --markdown                                 # the same for a README; or --csv, --json
    python experiments/table.py experiments/cifar100.jsonl --against KD    # gains over KD, seed by seed
    python experiments/table.py --against "SSKD --ratio-ss 0.5"            # of a grid, gains over this one
    python experiments/table.py --record experiments/mine.jsonl experiments/cifar100

Runs on CIFAR-100 with the published flags fill the published tables. All others are listed: a row for each combination
of networks, method and flags, a column for each flag that varies.
"""

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy.stats import t as student_t

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever this is started from

from experiments.runs import ABLATION, BY, OF_METHODS, flags_in, frame_of, own_flags, read_runs, shown, write_record
from harness.flags import Parser, UserError, warn
from harness.record import entry

PUBLISHED = Path(__file__).with_name("published_results.json")
NETWORKS = ["teacher", "network", "method"]
NONE = "–"
NORMAL = (-1.0, 0.1)  # where a faithful run lands, relative to the published figure
NOTES = """\
here: mean ± standard deviation over seeds (number of seeds), of the best epoch, as published, and of the last.
normal range: what to expect of a faithful run, from what others got: 1.0 below to 0.1 above the published figure.
KD, 4 views, KD + tf and KD + ss are SSKD without tf and ss, without ss, and without tf. The methods from KD to CRD see
one view of an image. DKD, KD + LS: published with the teachers of CRD's tables, which are other ones.
† one teacher for all of these seeds; elsewhere each seed has its own.
"""


# --------------------------------------------------------------------------------------------------- runs become rows


def sort_into_rows(runs: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Adds the columns kind (networks, method, flags, `by`), one_teacher and row (one run for each seed), and sorts.

    A run that is there twice counts once; if its accuracies differ, stderr says which one is left out.
    """
    runs = runs.assign(kind=runs.groupby([*NETWORKS, *by, *flags_in(runs)], dropna=False, sort=False).ngroup())
    same = ["kind", "seed", "fingerprint"]
    again = runs.duplicated(same)
    for place in runs["place"][again & ~runs.duplicated([*same, "best", "last"])]:
        warn(f"{place} left out: another run has the same flags and seed (--by may tell them apart)")
    runs = pd.concat([split_by_teacher(kind) for _, kind in runs[~again].groupby("kind")])
    own = [name for name in unusual_flags(runs) if name in OF_METHODS]
    order = [*by, *(name for name in unusual_flags(runs) if name not in own), *NETWORKS, *own]
    runs = runs.sort_values([*order, "kind", "one_teacher", "seed"], key=natural)
    return runs.assign(row=runs.groupby(["kind", "one_teacher"], sort=False).ngroup())


def natural(column: pd.Series) -> pd.Series:
    """To sort numbers within texts as numbers: resnet8 before resnet20, 9.0 before 10.0 and after 1e-05."""
    number = r"\d+(?:\.\d+)?(?:e-?\d+)?"
    return column.map(lambda value: re.sub(number, lambda found: f"{float(found[0]):030.12f}", shown(value)))


def split_by_teacher(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds the column one_teacher to the runs of a kind, so that no row mixes teachers: "" if each seed has its own.

    A teacher that several seeds share has a row, under its fingerprint; so has each of several teachers of one seed.
    The run of seed 0 with the teacher of seed 0 may be in rows of both sorts.
    """
    shared = runs["fingerprint"].ne("") & runs.duplicated("fingerprint", keep=False)
    of_seed = runs.apply(lambda run: run["teacher_folder"].endswith(f"_seed{run['seed']}"), axis=1)
    own = runs[~shared | of_seed].drop_duplicates("seed", keep=False)
    own = own[:0] if shared[own.index].all() else own
    rest = runs[shared | ~runs.index.isin(own.index)]
    return pd.concat([own.assign(one_teacher=""), rest.assign(one_teacher=rest["fingerprint"])])


def summary_of(runs: pd.DataFrame) -> pd.DataFrame:
    """A line for each row: what its runs share, n, their seeds, mean and standard deviation (of a sample)."""
    rows = runs.groupby("row")
    table = runs.drop_duplicates("row").set_index("row").assign(n=rows.size(), seeds=rows["seed"].apply(list))
    for which in ("best", "last"):
        table[f"{which}_mean"], table[f"{which}_sd"] = rows[which].mean(), rows[which].std()
    return table


def find_others(words: str, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of a method or, as in "SSKD --ratio-ss 0.5", those with some values of its flags.

    Adds the column against: the method with those of its own flags that vary. Raises UserError if there is no such run.
    """
    method, *flags = words.strip().split(" --")
    others = runs[runs["method"] == method]
    if others.empty:
        raise UserError(f"--against {words}: no run of this method; there are {', '.join(runs['method'].unique())}")
    varying = [name for name in flags_in(others) if name in OF_METHODS and others[name].map(shown).nunique() > 1]
    names = [" ".join([method, *(f"{x} {shown(run[x])}".strip() for x in varying)]) for _, run in others.iterrows()]
    others = chosen = others.assign(against=names)
    for flag in flags:
        name, _, value = flag.replace("=", " ", 1).partition(" ")
        if f"--{name}" in chosen:
            chosen = chosen[natural(chosen[f"--{name}"]) == natural(pd.Series([value.strip()]))[0]]
        if f"--{name}" not in chosen or chosen.empty:
            raise UserError(f"--against {words}: no such run; there are {', '.join(others['against'].unique())}")
    return chosen


def gains_over(others: pd.DataFrame, runs: pd.DataFrame, setting: list[str]) -> pd.DataFrame:
    """What each row gains over other runs: mean of the paired differences and its 95 % interval (Student's t).

    A pair has the same network, setting, seed and teacher; a network trained alone fits any teacher. If several rows of
    the others fit, the one whose flags are nearest to the published ones counts, which the column against names.
    """
    pairs = runs.merge(others, on=["network", "seed", *setting], suffixes=("", "_other"))
    pairs = pairs[(pairs["fingerprint_other"] == pairs["fingerprint"]) | (pairs["teacher_other"] == "")]
    pairs = pairs.assign(departures=pairs["unusual_other"].map(len))
    fitting = pairs.groupby(["row", "departures", "row_other"], as_index=False).size()
    fitting = fitting.sort_values(["row", "departures", "size"], ascending=[True, True, False], kind="stable")
    pairs = pairs.merge(fitting.drop_duplicates("row")[["row", "row_other"]])
    pairs = pairs[pairs["kind"] != pairs["kind_other"]]
    gains = {"against": pairs.groupby("row")["against"].first(), "pairs": pairs.groupby("row").size()}
    for which in ("best", "last"):
        differences = (pairs[which] - pairs[f"{which}_other"]).groupby(pairs["row"])
        mean, half = differences.mean(), student_t.ppf(0.975, differences.count() - 1) * differences.sem()
        gains |= {f"{which}_difference": mean, f"{which}_low": mean - half, f"{which}_high": mean + half}
    table = pd.DataFrame(gains, index=pd.Index(runs["row"].unique(), name="row"))
    return table.assign(pairs=table["pairs"].fillna(0).astype(int))


def unusual_flags(table: pd.DataFrame) -> list[str]:
    """The flags that are not as published in some of the rows."""
    return sorted({name for names in table["unusual"] for name in names})


def split_flags(table: pd.DataFrame) -> tuple[list[str], str]:
    """The unusual flags that vary among the methods that use them, and all others as one types them."""
    varying, same, own = [], [], own_flags()
    for name in unusual_flags(table):
        uses = [name not in OF_METHODS or name in own[method] for method in table["method"]]
        values = table.loc[uses, name].map(shown).unique()
        if len(values) > 1:
            varying.append(name)
        else:
            same.append(f"{name} {values[0]}".strip())
    return varying, " ".join(same)


# ------------------------------------------------------------------------------------------------------------ printing


def accuracy(row: pd.Series, which: str) -> str:
    """Mean ± standard deviation (number of seeds)."""
    mean, deviation = row[f"{which}_mean"], row[f"{which}_sd"]
    spread = "" if pd.isna(deviation) else f" ± {deviation:.2f}"
    return NONE if pd.isna(mean) else f"{mean:.2f}{spread} ({row['n']})"


def gain(row: pd.Series, which: str) -> str:
    """Mean difference [95 % interval] (number of pairs)."""
    mean, low, high = (row[f"{which}_{what}"] for what in ("difference", "low", "high"))
    ends = "" if pd.isna(low) else f" [{low:+.2f}, {high:+.2f}]"
    return NONE if pd.isna(mean) else f"{mean:+.2f}{ends} ({row['pairs']})"


def show_published(rows: pd.DataFrame, markdown: bool) -> pd.DataFrame:
    """Prints the published tables beside the rows that have the published flags, and returns the other rows.

    A table without such a row is not printed.
    """
    usual = rows[rows["unusual"].map(len) == 0].drop_duplicates(NETWORKS)  # "" comes first: a teacher for each seed
    here = {tuple(row[NETWORKS]): row for _, row in usual.iterrows()}
    used = set()
    for name, title in (("similar", "Similar networks"), ("cross", "Different networks")):
        table = json.loads(PUBLISHED.read_text())[name]
        pairs, reruns = table.pop("pairs"), table.pop("SSKD, re-run")
        lines = []
        for method in (*table, *ABLATION):
            kinds = [(*pair, method) for pair in pairs]
            if method in ("teacher", "student"):
                kinds = [("", pair[method == "student"], "alone") for pair in pairs]
            found = [here.get(kind) for kind in kinds]
            used |= {row.name for row in found if row is not None}
            if method in table:
                lines.append([method, "published", *(f"{x:.2f}" if x else NONE for x in table[method])])
            if method == "SSKD":
                lines.append([method, "re-run, HSAKD", *("{:.2f} ± {:.2f}".format(*x) if x else NONE for x in reruns)])
                normal = (" to ".join(f"{x + end:.2f}" for end in NORMAL) for x in table[method])
                lines.append([method, "normal range", *normal])
            for which in ("best", "last"):
                cells = (NONE if row is None else accuracy(row, which) + " †" * bool(row.one_teacher) for row in found)
                lines.append([method, f"here, {which}", *cells])
        heads = pd.MultiIndex.from_tuples([("teacher", "student"), ("", ""), *map(tuple, pairs)])
        if any("(" in text for line in lines for text in line[2:]):
            show(f"{title}: top-1 accuracy (%) on CIFAR-100", pd.DataFrame(lines, columns=heads), markdown)
    if used:
        print(NOTES)
    return rows.drop(index=list(used))


def show_list(rows: pd.DataFrame, args: argparse.Namespace) -> None:
    """Prints the rows with a column for each flag that varies. The title has the flags that they share."""
    varying, same = split_flags(rows)
    one = [f" ({fingerprint[:8]})" if fingerprint else "" for fingerprint in rows["one_teacher"]]
    table = pd.DataFrame({"network": rows["network"], "teacher": rows["teacher"] + one, "method": rows["method"]})
    for name in (*args.by, *varying):
        table[name] = rows[name].map(shown)
    for which in ("best", "last"):
        table[which] = rows.apply(accuracy, axis=1, which=which)
        if args.against:
            table[f"{which} − {args.against}"] = rows.apply(gain, axis=1, which=which)
    several = args.against and set(rows["against"].dropna()) - {args.against}
    if several:
        table["against"] = rows["against"].fillna("")
    show(f"{args.dataset}, {same or 'published flags'}", table.replace("", NONE), args.markdown)
    if any(one):
        print("teacher (fingerprint of its weights): one for all seeds of the row; elsewhere each seed has its own.")
    if rows["--val-fraction"].notna().any():
        print("--val-fraction: test accuracy at the epoch that is best on held-out images; else best on the test set.")
    if args.against:
        print(f"− {args.against}: mean difference [95 % interval, Student's t] (pairs with the same seed and teacher).")
    if several:
        print(f'against: the row nearest to the published flags; another, for example: --against "{min(several)}"')


def show(title: str, table: pd.DataFrame, markdown: bool) -> None:
    """Prints a table of texts."""
    if markdown:
        heads = [" → ".join(filter(None, [head] if isinstance(head, str) else head)) for head in table]
        lines = [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *table.to_numpy())]
        print(f"**{title}**\n", *lines, sep="\n", end="\n\n")
    else:
        print(title, table.to_string(index=False, sparsify=False), sep="\n", end="\n\n")


# ------------------------------------------------------------------------------------------------------------- command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Prints what the runs reached, beside what was published.")
    add = parser.add_argument
    where = "a folder (all finished runs below it) or a .jsonl file; default: the folder of this script"
    add("paths", nargs="*", type=Path, default=[Path(__file__).parent], metavar="PATH", help=where)
    add("--dataset", default="cifar100", help="show the runs on this data set")
    over = "list all runs with their gains over this method (KD, for example), paired by seed and teacher; "
    over += 'of a grid, name the one as in "SSKD --ratio-ss 0.5" (default: the one nearest to the published flags)'
    add("--against", metavar="METHOD", help=over)
    add("--by", nargs="+", choices=BY, default=[], help="list all runs and tell apart how they were computed")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--markdown", action="store_true", help="print Markdown")
    add("--csv", action="store_true", help="list all runs as CSV")
    add("--json", action="store_true", help="list all runs as JSON")
    add("--record", type=Path, metavar="FILE", help="add the runs to this .jsonl file; print no table")
    return parser.parse_args(argv)


@entry
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    found = [run for path in args.paths for run in read_runs(path)]
    if args.record:
        write_record(args.record, found)
        return
    runs = sort_into_rows(frame_of(found, args.dataset), args.by)
    setting = [*args.by, *(name for name in flags_in(runs) if name not in OF_METHODS)]
    rows = summary_of(runs)
    columns = ["dataset", "network", "teacher", "one_teacher", "method", *args.by, *unusual_flags(rows)]
    columns += ["n", "best_mean", "best_sd", "last_mean", "last_sd", "seeds"]
    if args.against:
        gains = gains_over(find_others(args.against, runs), runs, setting)
        rows, columns = rows.join(gains), [*columns, *gains]
    data = rows[columns].rename(columns=lambda name: name.lstrip("-").replace("-", "_"))
    if args.json:
        print(data.to_json(orient="records", double_precision=15, force_ascii=False))
    elif args.csv:
        print(data.to_csv(index=False), end="")
    else:
        if args.dataset == "cifar100" and not (args.by or args.against):
            rows = show_published(rows, args.markdown)
        if len(rows):
            show_list(rows, args)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # table.py | head ends quietly
    main()
