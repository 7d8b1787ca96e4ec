"""Draws figures of a study with matplotlib (pip install -r requirements-experiments.txt).

    python experiments/plot.py accuracy experiments/cifar100.jsonl   # each method in the setting that has most of them
    python experiments/plot.py few-shot experiments/cifar100.jsonl   # accuracy by --few-shot; or label-noise, ratio-tf,
    python experiments/plot.py ratio-ss experiments/cifar100.jsonl   # ratio-ss
    python experiments/plot.py curves RUN_FOLDER …                   # epoch by epoch, from the log.jsonl of each

The background is white, so one figure is readable on light and dark pages.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever this is started from

from experiments.runs import ABLATION, OF_METHODS, flags_in, frame_of, own_flags, read_runs, shown
from experiments.table import NETWORKS, natural, sort_into_rows, split_flags, summary_of
from harness import flags

SHARES = {
    "few-shot": "images of each class that the student sees (%)",
    "label-noise": "labels that are wrong (%)",
    "ratio-ss": "wrong matches of the teacher that ss imitates, k (%)",
    "ratio-tf": "wrong predictions of the teacher that tf imitates, k (%)",
}
ACCURACY = "test accuracy (%)"

INK, GREY = "#334155", "#64748b"
HIGHLIGHTS = {"SSKD": "#c2410c", "KD": "#1d5fd1"}
# Text as outlines and fixed ids: drawing again on the same machine changes little in the file.
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "SSKD", "axes.spines.top": False, "axes.spines.right": False}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
STYLE |= {"font.size": 11, "axes.axisbelow": True, "grid.alpha": 0.3}
COLOURS = ["#7d838c", "#2f7fc1", "#a35cc4", "#2a9a63", "#d9541e", "#1f9bab", "#b38a12", "#cf4f80"]
MARKERS, DASHES = "o^v<sPDX>ph*d", ["-", "--", ":", "-."]


def look_of(method: str) -> dict[str, str]:
    """Each method looks the same in every figure. Marker and dashes tell it apart without colour."""
    i = list(own_flags()).index(method)
    return {"color": COLOURS[i % 8], "marker": MARKERS[i % 13], "linestyle": DASHES[(i + i // 8) % 4]}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = flags.Parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="FIGURE", dest="figure")
    texts = {"accuracy": "accuracy of each method, in the setting that has most of them"}
    texts |= {flag: f"accuracy by --{flag}" for flag in SHARES}
    texts |= {"curves": "accuracy after each epoch, from the folders of runs"}
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a .jsonl file, or a folder of runs")
        output = Path(__file__).with_name(f"{name.replace('-', '_')}.svg")
        command.add_argument("--output", type=Path, default=output, help="file to write; its suffix is the format")
        command.add_argument("--dataset", help="draw the runs on this data set (default: that of the runs)")
    return parser.parse_args(argv)


def panels(rows: pd.DataFrame, varied: str = "") -> list[pd.DataFrame]:
    """Splits rows into those that can be compared: one teacher, student, precision and setting, apart from a flag.

    A network trained alone is in the panel of every teacher.
    """
    setting = [name for name in flags_in(rows) if name not in {varied} | OF_METHODS]
    key = rows[["network", "amp", *setting]].map(shown).agg(" ".join, axis=1)
    found = pd.DataFrame({"teacher": rows["teacher"], "key": key})[rows["teacher"] != ""].drop_duplicates()
    return [rows[(key == panel.key) & rows["teacher"].isin(["", panel.teacher])] for panel in found.itertuples()]


def label(row: pd.Series, varying: list[str]) -> str:
    """The method with those of its own flags that vary in the panel and are not as published."""
    own = [f"{name} {shown(row[name])}" for name in row["unusual"] if name in varying and name in OF_METHODS]
    return " ".join([f"{row['network']} alone" if row["method"] == "alone" else row["method"], *own])


def accuracy(rows: pd.DataFrame) -> Figure:
    """The accuracy of each method, the best one first, in the setting that has most methods."""
    panel = max(panels(rows), key=lambda panel: panel["method"].nunique(), default=None)
    if panel is None:
        raise flags.UserError("there is no distilled student")
    panel = panel.drop_duplicates("kind").sort_values("best_mean")
    varying, same = split_flags(panel)
    labels = [label(row, varying) for _, row in panel.iterrows()]
    figure = Figure(figsize=(8, 1.5 + 0.27 * len(panel)), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(panel)), labels)
    ax.tick_params(axis="y", length=0)
    for tick, mean, deviation in zip(ax.get_yticklabels(), panel["best_mean"], panel["best_sd"].fillna(0), strict=True):
        (_, y), name = tick.get_position(), tick.get_text()
        look = {"color": HIGHLIGHTS.get(name, GREY), "weight": "bold" if name in HIGHLIGHTS else "normal"}
        ax.errorbar(mean, y, xerr=deviation, fmt="o", capsize=3, color=look["color"], markersize=7, linewidth=1.8)
        ax.annotate(f"{mean:.1f}", (mean + deviation, y), (6, -4), textcoords="offset points", **look)
        tick.set(**look, fontsize=9 if "--" in name else 11)
    ax.margins(x=0.08)
    ax.grid(axis="x")
    seeds = " to ".join(map(str, sorted({panel["n"].min(), panel["n"].max()})))
    ax.set_xlabel(f"{ACCURACY}, mean ± standard deviation of {seeds} seeds")
    student = panel[panel["teacher"] != ""].iloc[0]
    networks = f"{student['teacher']} → {student['network']}, {student['dataset']}"
    figure.suptitle(networks, x=0.01, ha="left", fontsize=12)
    figure.supxlabel(textwrap.fill(f"--amp {student['amp']} {same}", 110, break_on_hyphens=False), fontsize=9)
    return figure


def by_flag(rows: pd.DataFrame, flag: str) -> Figure:
    """A panel for each setting: accuracy by the value of a flag, a line for each method."""
    drawn = [(panel, lines) for panel in panels(rows, flag) if (lines := lines_of(panel, flag))]
    if not drawn:
        raise flags.UserError(f"no method has two values of {flag} in one setting")
    varying, _ = split_flags(pd.concat([panel for panel, _ in drawn]))
    names = [name for name in varying if name not in {flag} | OF_METHODS]
    figure = Figure(figsize=(2 + 3.5 * len(drawn), 3.8), layout="constrained")
    legend = {}
    for ax, (panel, lines) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        row = panel[panel["teacher"] != ""].iloc[0]
        setting = [f"{name} {shown(row[name])}" for name in names]
        ax.set_title("  ".join([f"{row['teacher']} → {row['network']}", *setting]), loc="left", fontsize=11)
        for method, points in lines.items():
            percent = [100 * value for value in points[flag]]
            ends = points["best_sd"].fillna(0)
            legend[method] = ax.errorbar(percent, points["best_mean"], ends, capsize=3, label=method, **look_of(method))
        ax.set_xticks(sorted({100 * value for points in lines.values() for value in points[flag]}))
        ax.grid()
    figure.supxlabel(SHARES[flag.removeprefix("--")], fontsize=11)
    figure.axes[0].set_ylabel(f"{ACCURACY}, mean ± sd")
    figure.legend(handles=[legend[method] for method in own_flags() if method in legend], loc="outside right upper")
    return figure


def lines_of(rows: pd.DataFrame, flag: str) -> dict[str, pd.DataFrame]:
    """The rows of each method that has two values of the flag; of several with one value, the nearest to the published.

    Beside a flag of the ss or tf term, SSKD without that term is a level line.
    """
    rows = rows.assign(departures=rows["unusual"].map(len)).sort_values("departures", kind="stable")
    used = rows[rows[flag].notna()].drop_duplicates(["method", flag]).sort_values(flag)
    lines = {method: points for method, points in used.groupby("method") if len(points) > 1}
    if lines:
        level = rows[rows[flag].isna() & rows["method"].isin(ABLATION)].drop_duplicates("method")
        for method, row in level.groupby("method"):
            lines[method] = pd.concat([row.assign(**{flag: end}) for end in (used[flag].min(), used[flag].max())])
    return lines


def curves(runs: pd.DataFrame) -> Figure:
    """The test accuracy of each run after each epoch; that of a teacher dotted. A run may be in progress."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    teachers, held_out = set(runs["teacher"]), runs["--val-fraction"].notna()
    logs = [log_of(Path(place)) for place in runs["place"]]
    if not any(logs):
        raise flags.UserError(f"{', '.join(runs['place'])}: there is no finished epoch")
    for (_, run), held, log in zip(runs.iterrows(), held_out, logs, strict=True):
        if not log:
            flags.warn(f"{run['place']} left out: there is no finished epoch")
            continue
        epochs, accuracies = zip(*log, strict=True)
        look = look_of(run["method"]) | ({"linestyle": ":"} if run["network"] in teachers else {})
        name = f"{run['network']}, {run['method']}" + ", held-out images" * held
        name += f", {run['dataset']}" if runs["dataset"].nunique() > 1 else ""
        ax.plot(epochs, accuracies, markevery=max(1, len(epochs) // 10), label=name, **look)
    ax.set(xlabel="epoch", ylabel="accuracy (%)" if held_out.any() else ACCURACY)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # one entry for runs of one name
    ax.legend(lines.values(), lines)
    ax.grid()
    return figure


def log_of(folder: Path) -> list[tuple[int, float]]:
    """The epochs of a run and the accuracy after each, from its log.jsonl."""
    file = folder / "log.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [(line["epoch"], line["val/cls_acc"]) for line in lines if "val/cls_acc" in line]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise flags.UserError(f"{file}: {type(error).__name__}: {error}") from error


def draw(args: argparse.Namespace) -> Figure:
    """The figure that the command line names."""
    found = [run for path in args.paths for run in read_runs(path, unfinished=args.figure == "curves")]
    if args.figure == "curves":
        return curves(frame_of(found, args.dataset).sort_values([*NETWORKS, "seed"], key=natural))
    there = {run["dataset"] for run in found}
    dataset = args.dataset or (there.pop() if len(there) == 1 else "cifar100")
    rows = summary_of(sort_into_rows(frame_of(found, dataset), ["amp"]))
    return accuracy(rows) if args.figure == "accuracy" else by_flag(rows, f"--{args.figure}")


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse_args(argv)
        with matplotlib.style.context(["default", STYLE]):
            undated = {"Date": None} if args.output.suffix == ".svg" else None
            draw(args).savefig(args.output, dpi=144, metadata=undated)
        print(f"{args.output} is written")
    except (flags.UserError, OSError, ValueError) as error:  # also no such folder, no such format
        flags.tell("plot.py", f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
