"""Figures, drawn with matplotlib (pip install -r requirements-experiments.txt).

python experiments/plot.py method                                # the method at a glance: figures/method.svg
python experiments/plot.py accuracy experiments/cifar100.jsonl   # of each method, beside what an epoch costs
python experiments/plot.py few-shot experiments/cifar100.jsonl   # accuracy by --few-shot; or label-noise, ratio-tf,
python experiments/plot.py ratio-ss experiments/cifar100.jsonl   # ratio-ss; --dark: for a dark page
python experiments/plot.py curves RUN_FOLDER …                   # epoch by epoch, from the log.jsonl of each
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever this is started from

from harness import flags
from experiments.runs import ABLATION, COMMON, OWN, Run, published, read_runs, refuse, shown
from experiments.table import Row, rows_of, spread, told_apart, typed

FIGURES = Path(__file__).with_name("figures")
SHARES = {
    "few_shot": "images of each class that the student sees (%)",
    "label_noise": "labels that are wrong (%)",
    "ratio_ss": "wrong matches of the teacher that ss imitates, k (%)",
    "ratio_tf": "wrong predictions of the teacher that tf imitates, k (%)",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = flags.Parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="FIGURE")

    def add(name: str, text: str) -> None:
        command = commands.add_parser(name, help=text, description=text)
        output = FIGURES / f"{name.replace('-', '_')}.svg"
        command.add_argument("--output", type=Path, default=output, help="its ending tells the format")
        command.set_defaults(figure=name.replace("-", "_"))
        if name != "method":
            where = "a .jsonl file, or a folder of runs"
            command.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=where)
            command.add_argument("--dataset", default=COMMON["dataset"], help="the runs on this data set")
            command.add_argument("--dark", action="store_true", help="for a dark page")

    add("method", "the method at a glance")
    add("accuracy", "accuracy of each method, beside what an epoch costs")
    for flag in SHARES:
        add(flag.replace("_", "-"), f"accuracy by {typed(flag)}")
    add("curves", "accuracy after each epoch, from the folders of runs")
    return parser.parse_args(argv)


import json
import random
import statistics
import textwrap
from collections import Counter, defaultdict

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D

INK, GREY = "#334155", "#94a3b8"
TEACHER, STUDENT = ("#dbe7f3", "#5b7fa6"), ("#fdeccb", "#c08a2e")  # fill and edge
CE, KD, SS, TF = "#c2410c", "#1d5fd1", "#0b7a55", "#9d2c93"
# The same figure has to give the same bytes: text as outlines, ids that repeat and (in `main`) no date.
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "SSKD", "mathtext.fontset": "cm", "font.size": 14, "text.color": INK}


def similarities(images: int = 5, ratio: float = 0.75) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Made-up similarities of teacher and student, (3B, B) in [-1, 1], and (3B,) the rows selective transfer keeps."""
    draw = random.Random(647)  # gives the same numbers in every version of Python
    own = np.arange(3 * images) // 3
    noise = np.array([[[draw.uniform(-1, 1) for _ in range(images)] for _ in own] for _ in range(2)])
    teacher = 0.45 * noise[0] + 0.55 * np.eye(images)[own]
    student = 0.7 * teacher + 0.3 * noise[1]
    rank = (teacher > teacher[np.arange(len(own)), own, None]).sum(1)
    wrong = (rank > 0).sum()
    kept = np.zeros(len(own), bool)
    kept[rank.argsort(kind="stable")[: len(own) - wrong + int(wrong * ratio)]] = True
    return teacher, student, kept


def write(ax: Axes, x: float, y: float, text: str, **kwargs):
    ax.text(x, y, text, **{"ha": "center", "va": "center_baseline"} | kwargs)


def box(ax: Axes, x: float, y: float, sides: tuple[float, float], fill: str, edge: str, text: str = "", **kwargs):
    """A rounded box of (width, height) around (x, y), with a text in it."""
    corner, shape = (x - sides[0] / 2, y - sides[1] / 2), "round,pad=0,rounding_size=8"
    ax.add_patch(FancyBboxPatch(corner, *sides, shape, facecolor=fill, edgecolor=edge, linewidth=1.4))
    write(ax, x, y, text, **kwargs)


def arrow(ax: Axes, *points: tuple[float, float], color: str = INK):
    """A line through the points, with its head at the last."""
    head = {"arrowstyle": "-|>,head_length=0.45,head_width=0.22", "mutation_scale": 14}
    line = matplotlib.path.Path(points)
    ax.add_patch(FancyArrowPatch(path=line, color=color, linewidth=1.6, joinstyle="miter", capstyle="butt", **head))


def view(ax: Axes, x: float, y: float, side: float, turns: int):
    """A boat under the sun, turned by `turns` · 90 degrees, in the square around (x, y)."""
    sun = [(0.76 + 0.11 * np.cos(angle), 0.76 + 0.11 * np.sin(angle)) for angle in np.linspace(0, 2 * np.pi, 25)]
    shapes = {"#cfe8fb": [(0, 0), (1, 0), (1, 1), (0, 1)], "#3f8ecb": [(0, 0), (1, 0), (1, 0.25), (0, 0.25)]}
    shapes |= {"#f5b52e": sun, "#8a4b2a": [(0.12, 0.36), (0.26, 0.14), (0.74, 0.14), (0.88, 0.36)]}
    shapes |= {"#fdfdfd": [(0.5, 0.43), (0.5, 0.92), (0.14, 0.43)], "#e0523f": [(0.55, 0.43), (0.55, 0.8), (0.8, 0.43)]}
    place = Affine2D().translate(-0.5, -0.5).rotate_deg(90 * turns).scale(side).translate(x, y)
    for color, corners in shapes.items():
        ax.add_patch(Polygon(corners, facecolor=color, transform=place + ax.transData))
    ax.add_patch(Rectangle((x - side / 2, y - side / 2), side, side, fill=False, edgecolor=INK, linewidth=1.2))


def method() -> Figure:
    """The views of an image, what teacher and student make of them, and the four terms of the student's loss."""
    figure = Figure(figsize=(1000 / 72, 420 / 72))  # the coordinates below are its points
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 1000), ylim=(0, 420))
    ax.axis("off")
    middle = 238  # the teacher's half lies above it, the student's below

    for offset in (8, 4, 0):  # a batch of images
        box(ax, 68 + offset, middle + offset, (84, 316), "white", GREY)
    for turns, y in enumerate((338, 255, 188, 121)):
        view(ax, 68, y, 58, turns)
    write(ax, 68, 378, "normal")
    write(ax, 68, 295, "rotated")

    bars = random.Random(0)
    heights = [[bars.uniform(0.1, 1) for _ in range(6)] for _ in range(4)]
    for side, (fill, edge), name in ((1, TEACHER, "teacher\n(frozen)"), (-1, STUDENT, "student")):
        y = middle + side * 80
        box(ax, 209, y, (122, 64), fill, edge, name, weight="bold", size=15)
        box(ax, 209, y + side * 75, (122, 32), fill, edge, "SS head", size=15)
        box(ax, 503, y, (354, 64), "white", edge)
        arrow(ax, (118, y), (147, y))
        arrow(ax, (209, y + side * 32), (209, y + side * 58))
        arrow(ax, (271, y), (325, y))
        ax.plot([456, 456], [y - 32, y + 32], color=edge, linewidth=1.2, dashes=(3, 3))
        for x, values in zip((391, 503, 568, 633), heights, strict=True):
            drawn = values if side > 0 else [0.6 * value + 0.4 * bars.random() for value in values]
            ax.bar(x + 8 * np.arange(-2.5, 3), np.multiply(48, drawn), 6.4, y - 24, color=edge)
        write(ax, 391, y + side * 46, "logits, normal")
        write(ax, 568, y + side * 46, "logits, rotated")
        for x, color in ((422, KD), (568, TF)):
            arrow(ax, (x, middle + side * 48), (x, middle + side * 16), color=color)

    box(ax, 278, middle, (64, 30), "white", GREY, "labels")
    arrow(ax, (310, middle), (336, middle), color=CE)
    arrow(ax, (360, middle - 48), (360, middle - 16), color=CE)
    write(ax, 600, middle, "selective transfer\n(default: all rows)", ha="left", size=13, color=TF)

    teacher, student, kept = similarities()
    for side, x, similarity in ((1, 799, teacher), (-1, 939, student)):
        y = middle + side * 155
        arrow(ax, (270, y), (x, y), (x, middle + side * 84))
        write(ax, 503, y + side * 12, "embedding")
        write(ax, x - 10, middle + side * 119, "cosine\nsimilarity", ha="right")
        shade = (similarity + 0.4) / 1.4
        color = LinearSegmentedColormap.from_list("kept", ["#eef8f3", SS])(shade)
        color[~kept] = LinearSegmentedColormap.from_list("dropped", ["#f1f2f4", "#8d949e"])(shade)[~kept]
        columns, rows = x + np.linspace(-35, 35, 6), middle + np.linspace(82.5, -82.5, 16)
        ax.pcolormesh(columns, rows, color, edgecolors="white", linewidth=1)
    for y, keep in zip(middle + 11 * np.arange(7, -8, -1), kept, strict=True):
        if keep:
            ax.plot([837, 901], [y, y], color=SS, linewidth=1.2)
        else:
            write(ax, 842, y, "×", weight="bold")
    write(ax, 752, middle, "rotated (3B)", rotation=90, va="center", size=13)
    write(ax, 799, middle - 94, "normal (B)", size=13)
    write(ax, 892, middle + 119, "selective transfer:\nthe teacher's worst rows\nare dropped (×)", size=13, color=SS)

    write(ax, 60, 36, r"$\mathcal{L}\;=$", size=21)
    terms = [("ce", 0.1, "labels", CE, 360), ("kd", 0.9, "normal logits", KD, 422)]
    terms += [("ss", 10.0, "similarity", SS, 869), ("T", 2.7, "rotated logits", TF, 568)]
    for k, (name, weight, source, color, x) in enumerate(terms, 1):
        symbol = rf"\mathcal{{L}}_{{{name}}}"
        box(ax, x, middle, (46, 30), color, color, f"${symbol}$", color="white", size=19, gid=f"L_{name}")
        write(ax, 220 * k - 30, 36, rf"$\lambda_{k}\,{symbol}$", size=21, color=color)
        write(ax, 220 * k - 30, 12, rf"{source} ($\lambda_{k}$ = {weight})", color=color)
        if k > 1:
            write(ax, 220 * k - 140, 36, "$+$", size=21)
    return figure


# ------------------------------------------------------------------------------------------------ figures of a study

# Of a method, the same in every figure: colour, marker and dashes, which are told apart without the colour, too.
COLOURS = ["#7d838c", "#2f7fc1", "#a35cc4", "#2a9a63", "#d9541e", "#1f9bab", "#b38a12", "#cf4f80"]
MARKERS, DASHES = "o^v<sPDX>ph*d", ["-", "--", ":", "-."]
LOOKS = {
    method: {"color": COLOURS[i % 8], "marker": MARKERS[i % 13], "linestyle": DASHES[(i + i // 8) % 4]}
    for i, method in enumerate(OWN)
}
INKS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STUDY = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False} | dict.fromkeys(INKS, INK)
DARK = dict.fromkeys(INKS, "#d1d7e0")
DARK |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), "#0d1117")
ACCURACY = "test accuracy (%)"

Panel = tuple[str, str, tuple]  # teacher, network, setting


def found_runs(args: argparse.Namespace) -> list[Run]:
    """The finished runs on the data set; those of different precision are of different settings."""
    runs = [run for path in args.paths for run in read_runs(path) if run.dataset == args.dataset]
    return [told_apart(run, ["amp"]) for run in runs] or refuse(args.paths[0], f"no finished run on {args.dataset}")


def panels(rows: list[Row]) -> dict[Panel, list[Row]]:
    """The rows that can be compared; a network alone stands beside every student of that network and setting."""
    found: dict[Panel, list[Row]] = defaultdict(list)
    for row in rows:
        if row.kind.teacher:
            found[row.kind.teacher, row.kind.network, row.kind.setting].append(row)
    for row in rows:
        for panel in [panel for panel in found if panel[1:] == (row.kind.network, row.kind.setting)]:
            found[panel] += [row] if not row.kind.teacher else []
    return found


def title(panel: Panel, among: dict[Panel, list[Row]]) -> str:
    """The networks, and the flags that are not as published, but for those that are the same in all panels."""
    teacher, network, setting = panel
    own = [flag for flag in setting if any(flag not in other for _, _, other in among)]
    return "  ".join([f"{teacher} → {network}", *(f"{typed(name)} {shown(value)}" for name, value in own)])


def nearest(rows: list[Row]) -> dict[str, Row]:
    """Of each method the row whose own flags are nearest to the published."""
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: len(row.kind.own)):
        found.setdefault(row.kind.method, row)
    return found


def label(row: Row, rows: list[Row]) -> str:
    """The method, with the flags in which the row departs from most of the panel, and the number of its seeds.

    A flag is compared among the methods for which the same value of it was published.
    """
    names = dict.fromkeys(name for each in rows for name, _ in each.kind.own if row.kind.has(name))
    flags = []
    for name in names:
        of_row = published(row.kind)[name]
        kinds = [each.kind for each in rows if each.kind.has(name) and published(each.kind)[name] == of_row]
        kinds.sort(key=lambda kind: len(kind.own))
        usual = Counter(kind.value(name) for kind in kinds).most_common(1)[0][0]  # of a tie, as published
        if row.kind.value(name) != usual:
            flags.append(f"{typed(name)} {shown(row.kind.value(name))}")
    return textwrap.fill(" ".join([row.kind.method, *flags, f"({len(row.runs)})"]), 44, break_on_hyphens=False)


def best(row: Row) -> tuple[float, float | None]:
    """Mean and standard deviation of the best epoch's accuracy."""
    return spread(run.accuracies[0] for run in row.runs.values())


def seconds(row: Row) -> float:
    """Of a run for each epoch of the student, with what came before (the SS head, a first phase); the median."""
    found = []
    for run in row.runs.values():
        result = run.record["result"]
        if not result.get("seconds") or not result.get("epochs"):
            refuse(run.place, "its result has no seconds or epochs")
        found.append(result["seconds"] / result["epochs"])
    return statistics.median(found)


def accuracy(args: argparse.Namespace) -> Figure:
    """A panel for each setting: the accuracy of each row, the best first, and beside it what an epoch costs."""
    found = panels(rows_of(found_runs(args))) or refuse(args.paths[0], "no distilled student")
    chosen = [sorted(rows, key=lambda row: -best(row)[0]) for rows in found.values()]
    heights = [len(rows) for rows in chosen]
    figure = Figure(figsize=(8, 0.6 * len(found) + 0.2 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(found), 2, sharex="col", squeeze=False, height_ratios=heights, width_ratios=(3, 2))
    for (left, right), panel, rows in zip(axes, found, chosen, strict=True):
        left.set_title(title(panel, found), loc="left", fontsize=9)
        for y, row in enumerate(rows):
            (mean, deviation), cost = best(row), seconds(row)
            color, marker = (LOOKS[row.kind.method][name] for name in ("color", "marker"))
            left.errorbar(mean, y, xerr=deviation, capsize=3, color=color, marker=marker, markersize=5)
            right.barh(y, cost, 0.6, color=color)
            for ax, end, text in ((left, mean + (deviation or 0), f"{mean:.2f}"), (right, cost, f"{cost:.3g}")):
                ax.annotate(text, (end, y), (5, 0), textcoords="offset points", va="center", fontsize=8)
        left.set_yticks(range(len(rows)), [label(row, rows) for row in rows], fontsize=8)
        right.set_yticks([])
        for ax in (left, right):
            ax.set_ylim(len(rows) - 0.4, -0.6)
        left.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel(f"{ACCURACY}, mean ± standard deviation (seeds)", fontsize=9)
    axes[-1, 1].set_xlabel("time of the run / epochs (s)", fontsize=9)
    return figure


def by_flag(args: argparse.Namespace) -> Figure:
    """A panel for each setting: accuracy by the value of a flag, a line for each method."""
    rows = [without(row, args.figure) for row in rows_of(found_runs(args))]
    drawn = {panel: lines_of(each, args.figure) for panel, each in panels(rows).items()}
    drawn = {panel: lines for panel, lines in drawn.items() if lines}
    if not drawn:
        refuse(args.paths[0], f"no method has two values of {typed(args.figure)} in one setting")
    figure = Figure(figsize=(2 + 3.5 * len(drawn), 3.8), layout="constrained")
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    legend = {}
    for ax, (panel, lines) in zip(axes, drawn.items(), strict=True):
        ax.set_title(title(panel, drawn), loc="left", fontsize=10)
        for method, points in lines.items():
            means, deviations = zip(*map(best, points.values()), strict=True)
            ends = [deviation or 0 for deviation in deviations]
            percent = [100 * value for value in points]
            legend[method] = ax.errorbar(percent, means, ends, capsize=3, label=method, **LOOKS[method])
        ax.grid(alpha=0.3)
    figure.supxlabel(SHARES[args.figure], fontsize=10)
    axes[0].set_ylabel(f"{ACCURACY}, mean ± standard deviation")
    figure.legend(handles=[legend[method] for method in OWN if method in legend], loc="outside right upper")
    return figure


def without(row: Row, flag: str) -> Row:
    """The row, as if the flag were no part of its kind; its runs know the value."""
    setting, own = ([pair for pair in flags if pair[0] != flag] for flags in (row.kind.setting, row.kind.own))
    return row._replace(kind=row.kind._replace(setting=tuple(setting), own=tuple(own)))


def lines_of(rows: list[Row], flag: str) -> dict[str, dict[float, Row]]:
    """{method: {value of the flag: row}}, sorted, of the methods with at least two values.

    Beside a flag of the ss or tf term stand the rows of the ablation that lack it, level.
    """
    values: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        if row.kind.has(flag):
            values[next(iter(row.runs.values())).kind.value(flag)].append(row)
    lines: dict[str, dict[float, Row]] = defaultdict(dict)
    for value in sorted(values):
        for method, row in nearest(values[value]).items():
            lines[method][value] = row
    lines = {method: points for method, points in lines.items() if len(points) > 1}
    if lines:
        level = {method: row for method, row in nearest(rows).items() if method in ABLATION and not row.kind.has(flag)}
        lines |= {method: dict.fromkeys((min(values), max(values)), row) for method, row in level.items()}
    return lines


def curves(args: argparse.Namespace) -> Figure:
    """The test accuracy of each run after each epoch; that of a teacher dotted."""
    runs = sorted(found_runs(args), key=lambda run: list(OWN).index(run.kind.method))
    teachers = {run.kind.teacher for run in runs}
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    lines = {}
    for run in runs:
        epochs, accuracies = zip(*log_of(run), strict=True)
        look = LOOKS[run.kind.method] | ({"linestyle": ":"} if run.kind.network in teachers else {})
        (line,) = ax.plot(epochs, accuracies, markevery=max(1, len(epochs) // 10), **look)
        label = f"{run.kind.network}, {run.kind.method}"
        lines[label + ", held-out images" * bool(run.kind.value("val_fraction"))] = line
    ax.set_xlabel("epoch")
    ax.set_ylabel("accuracy (%)" if any(run.kind.value("val_fraction") for run in runs) else ACCURACY)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(lines.values(), lines)
    ax.grid(alpha=0.3)
    return figure


def log_of(run: Run) -> list[tuple[int, float]]:
    """The epochs of a run, and the accuracy after each, from its log.jsonl."""
    if not Path(run.place).is_dir():
        refuse(run.place, "no folder of a run: the epochs are in its log.jsonl only")
    file = Path(run.place) / "log.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [(line["epoch"], line["val/cls_acc"]) for line in lines if "val/cls_acc" in line] or refuse(
            file, "empty"
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        refuse(file, f"{type(error).__name__}: {error}")


def draw(args: argparse.Namespace) -> Figure:
    """The figure that the command line asks for."""
    if args.figure == "method":
        return method()
    figure = {"accuracy": accuracy, "curves": curves}.get(args.figure, by_flag)(args)
    # the layout's last bits differ from call to call, and by them the ids in an SVG: six digits are the same
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax in figure.axes:
        ax.set_position(np.round(ax.get_position().bounds, 6))
    return figure


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    style = ["default", STYLE]
    if args.figure != "method":
        style.append(STUDY | (DARK if args.dark else {}))
    undated = {"Date": None} if args.output.suffix == ".svg" else None
    with matplotlib.style.context(style):
        figure = draw(args)
        try:
            figure.savefig(args.output, dpi=144, metadata=undated)
        except (OSError, ValueError) as error:  # no such folder, no such format
            refuse(args.output, getattr(error, "strerror", error))


if __name__ == "__main__":
    main()
