"""Figures, drawn with matplotlib (pip install -r requirements-experiments.txt).

python experiments/plot.py method                     # the method at a glance: experiments/figures/method.svg
python experiments/plot.py method --output a.png      # the same as another file; its ending tells the format
"""

import argparse
import random
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.transforms import Affine2D

FIGURES = Path(__file__).with_name("figures")
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


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="FIGURE")
    command = commands.add_parser("method", help="the method at a glance")
    command.add_argument("--output", type=Path, default=FIGURES / "method.svg", help="its ending tells the format")
    command.set_defaults(draw=method)
    args = parser.parse_args(argv)
    with matplotlib.style.context(["default", STYLE]):
        args.draw().savefig(args.output, dpi=144, metadata={"Date": None})


if __name__ == "__main__":
    main()
