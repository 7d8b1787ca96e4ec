"""A published row at full length, resnet56 → resnet20, from the authors' teacher: its tables and figures.

    python experiments/published_pair.py                              # the tables of README.md, from published_pair/
    python experiments/published_pair.py --figures                    # draws figures/published_pair_*.svg
    python experiments/published_pair.py --record SSKD RUN_FOLDER     # copies what a run logged to published_pair/
    python experiments/published_pair.py --release FILE RUN_FOLDER    # writes its best student, without SS head

published_code.csv is a log of the published code on this pair (github.com/FN8211/SSKD): selected epochs, tested every
fifth.
"""

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever this is started from

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure

from experiments.plot import ACCURACY, STYLE, look_of
from harness import checkpoint, flags
from harness.files import save, write_atomically
from harness.record import entry

RECORD = Path(__file__).with_name("published_pair")
RUNS = {"SSKD": "sskd", "KD": "kd", "KD, weights × 4": "kd_x4", "KD + tf": "kd_tf", "CRD": "crd"}  # their folders
CODE = "published code"
PAIR = ["resnet56", "resnet20"]
KD_RERUN = "70.91 ± 0.10"  # HSAKD's, from this teacher; that of SSKD is in published_results.json

EPOCHS = {"ss_head": (1, 10, 30, 60), "student": (1, 2, 3, 5, 10, 20, 50, 100, 150, 151, 180, 181, 210, 240)}
TERMS = ("ce", "kd", "tf", "ss")
COLUMNS = {  # head → column of a log, decimals
    "ss_head": {"loss": ("teacher_ssp_loss", 4), "accuracy": ("teacher_ssp_acc", 2)}
    | {"test loss": ("val_teacher_ssp_loss", 4), "test accuracy": ("val_teacher_ssp_acc", 2)},
    "student": {"ce": ("ce_loss", 3), "kd": ("kd_loss", 3), "tf": ("tf_loss", 3), "ss": ("ss_loss", 5)}
    | {"accuracy": ("cls_acc", 2), "ss accuracy": ("ss_acc", 2), "test accuracy": ("val_cls_acc", 2)},
}


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.Parser("Prints the tables of a published row at full length, as Markdown.")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--figures", type=Path, nargs="?", const=RECORD.with_name("figures"), metavar="DIR", help="draw the figures")
    record = f"copy log, flags and result of a run; NAME is one of {', '.join(RUNS)}"
    add("--record", nargs=2, metavar=("NAME", "RUN_FOLDER"), help=record)
    add("--release", nargs=2, metavar=("FILE", "RUN_FOLDER"), help="write the best student of a run to a file")
    args = parser.parse_args(argv)
    if args.record and args.record[0] not in RUNS:
        parser.error(f"--record {args.record[0]}: NAME is one of {', '.join(RUNS)}")
    return args


# ------------------------------------------------------------------------------------------------------------- reading


def logs() -> dict[str, pd.DataFrame]:
    """The log of the published code and of each run that is recorded: columns as in published_code.csv."""
    found = {CODE: pd.read_csv(RECORD / "published_code.csv", comment="#")}
    for name, folder in RUNS.items():
        if (file := RECORD / folder / "log.jsonl").exists():
            log = pd.DataFrame([json.loads(line) for line in file.read_text().splitlines()])
            found[name] = log.rename(columns=lambda column: column.replace("train/", "").replace("val/", "val_"))
    if len(found) == 1:
        raise flags.UserError(f"{RECORD} holds no run: add one with --record")
    return found


def tested(log: pd.DataFrame) -> pd.Series:
    """The student's test accuracy by epoch."""
    return log[log["phase"] == "student"].set_index("epoch")["val_cls_acc"].dropna()


# ------------------------------------------------------------------------------------------------------------- tables


def results(found: dict[str, pd.DataFrame]) -> Iterator[list[str]]:
    """What each method reached: published, others' re-runs, the published code's log, and here."""
    names = [name for name in RUNS if name in found]
    table = json.loads(RECORD.with_name("published_results.json").read_text())["similar"]
    place = table["pairs"].index(PAIR)
    yield ["", *names]
    yield ["paper", *(f"{table[name][place]:.2f}" if name in table else "–" for name in names)]
    reruns = {"KD": KD_RERUN, "SSKD": "{:.2f} ± {:.2f}".format(*table["SSKD, re-run"][place])}
    yield ["HSAKD's re-runs", *(reruns.get(name, "–") for name in names)]
    code = tested(found[CODE])
    for what, acc in (("best of every fifth epoch", code.max()), ("last epoch", code.iloc[-1])):
        yield [f"{CODE}, {what}", *(f"{acc:.2f}" if name == "SSKD" else "–" for name in names)]
    own = {name: tested(found[name]) for name in names}
    yield ["here, best epoch", *(f"{acc.max():.2f} ({acc.idxmax()})" for acc in own.values())]
    yield ["here, best of every fifth epoch", *(f"{acc[acc.index % 5 == 0].max():.2f}" for acc in own.values())]
    yield ["here, last epoch", *(f"{acc.iloc[-1]:.2f}" for acc in own.values())]
    records = [{part: read(name, part) for part in ("config", "result")} for name in names]
    yield ["hours of computing", *(f"{record['result']['seconds'] / 3600:.1f}" for record in records)]
    yield ["resumed", *(str(len(record["config"]["starts"]) - 1) for record in records)]


def read(name: str, part: str) -> dict[str, Any]:
    """config.json or result.json of a recorded run."""
    return json.loads((RECORD / RUNS[name] / f"{part}.json").read_text())


def curve(found: dict[str, pd.DataFrame], phase: str) -> Iterator[list[str]]:
    """Losses and accuracies of SSKD here and in the published code's log, at some epochs of a phase."""
    columns = COLUMNS[phase]
    yield ["epoch", "", *columns]
    for epoch in EPOCHS[phase]:
        for whose, name in (("here", "SSKD"), (CODE, CODE)):
            log = found[name]
            line = log[(log["phase"] == phase) & (log["epoch"] == epoch)].iloc[0]
            yield [str(epoch), whose, *(shown(line[column], decimals) for column, decimals in columns.values())]


def shown(value: float, decimals: int) -> str:
    return "–" if pd.isna(value) else f"{value:.{decimals}f}"


# ------------------------------------------------------------------------------------------------------------- figures


def draw(found: dict[str, pd.DataFrame], folder: Path) -> None:
    """Test accuracies, and the four terms of SSKD's loss, epoch by epoch."""
    accuracy, terms = (Figure(figsize=(8, 4.5), layout="constrained") for _ in range(2))
    ax = accuracy.subplots()
    for name in (name for name in RUNS if name in found):
        method = name.partition(",")[0]
        look = look_of(method) | ({"marker": "x", "linestyle": ":"} if method != name else {})
        ax.plot(tested(found[name]), markevery=20, label=name, **look)
    ax.plot(tested(found[CODE]), "k+", label=f"SSKD, {CODE}")
    ax.set(xlabel="epoch", ylabel=ACCURACY)
    ax.grid()
    ax.legend()
    for ax, term in zip(terms.subplots(2, 2, sharex=True).flat, TERMS, strict=True):
        for name, look in (("SSKD", "-"), (CODE, "k+")):
            log = found[name][found[name]["phase"] == "student"]
            ax.plot(log["epoch"], log[f"{term}_loss"], look, label="here" if name == "SSKD" else name)
        ax.set(title=term, yscale="log")
        ax.grid(which="both")
    terms.supxlabel("epoch")
    ax.legend()
    for name, figure in (("accuracy", accuracy), ("terms", terms)):
        file = folder / f"published_pair_{name}.svg"
        figure.savefig(file, metadata={"Date": None})
        print(f"{file} is written")


# ---------------------------------------------------------------------------------------------------- records, releases


def record(name: str, run: Path) -> None:
    """Copies log, flags and result of a run, without the paths of the machine that it ran on."""
    folder = RECORD / RUNS[name]
    folder.mkdir(exist_ok=True)
    shutil.copy(run / "log.jsonl", folder)
    for part in ("config.json", "result.json"):
        content = json.loads((run / part).read_text())
        for place in (content, *content.get("starts", ())):
            place.get("teacher", {}).pop("path", None)
        write_atomically(folder / part, (json.dumps(content, indent=1) + "\n").encode())
    print(f"{folder} is written")


def release(file: Path, run: Path) -> None:
    """Writes the best student of a run as plain tensors, with what a user needs to know of it."""
    found, start = checkpoint.read(run), json.loads((run / "config.json").read_text())["starts"][-1]
    network = found.network()
    made = {"commit": start["commit"], "command": " ".join(["python", *start["command"]])}
    about = {"arch": found.arch} | found.about
    save(file, {"state_dict": network.state_dict(), "acc": found.acc, "about": about} | made)
    print(f"{file}: {found.arch}, {found.acc:.2f} %")


@entry
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.record:
        record(args.record[0], Path(args.record[1]))
    elif args.release:
        release(*map(Path, args.release))
    elif args.figures:
        with matplotlib.style.context(["default", STYLE]):
            draw(logs(), args.figures)
    else:
        found = logs()
        for table in (results(found), curve(found, "ss_head"), curve(found, "student")):
            head, *rows = table
            print(*(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
