"""The tables of experiments/README.md and published.md, recomputed from the records beside them.

Nothing of experiments/table.py is used, so that a mistake there can't hide itself.
"""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

# The page's name of a method, by its script or --method and the weights of its loss terms, as in a run's name
METHODS = {"kd 0.1+0.9+0.0": "KD", "kd 0.4+3.6+0.0": "KD, weights × 4", "fitnet 0.1+0.9+100.0": "FitNet"}
METHODS |= {"at 0.1+0.9+1000.0": "AT", "sp 0.1+0.9+3000.0": "SP", "vid 0.1+0.9+1.0": "VID", "rkd 0.1+0.9+1.0": "RKD"}
METHODS |= {"pkt 0.1+0.9+30000.0": "PKT", "ab 0.1+0.9+1.0": "AB", "ft 0.1+0.9+200.0": "FT", "crd 0.1+0.9+0.8": "CRD"}
METHODS |= {"dkd 1.0+0.0+1.0": "DKD", "ls 0.1+0.0+9.0": "KD + LS", "sskd 0.1+0.9+0.0+0.0": "KD, 4 views"}
METHODS |= {"sskd 0.1+0.9+2.7+0.0": "KD + tf", "sskd 0.1+0.9+0.0+10.0": "KD + ss", "sskd 0.1+0.9+2.7+10.0": "SSKD"}
NINE = ["FitNet", "AT", "SP", "VID", "RKD", "PKT", "AB", "FT", "CRD"]

# A run's setting, and the page's words for what is unusual in it. ss_head: its epochs for each epoch of the student.
USUAL = {"images": 1.0, "epochs": 8, "noise": 0.0, "amp": "bf16", "ss_head": 0.25, "k": 0.75}
WORDS = {"all images": {}, "a quarter": {"images": 0.25}, "wrong labels": {"noise": 0.3}, "float32": {"amp": "off"}}
WORDS |= {"8 epochs": {}, "32 epochs": {"epochs": 32}, "teachers": {"epochs": 10}, "SS head 8 epochs": {"ss_head": 1.0}}
WORDS |= {f"k = {k:g}": {"k": k} for k in (0.0, 0.25, 0.5, 1.0)} | {"last epoch": {"which": "last"}}

RESULTS = {"All images": "all images", "A quarter of the images": "a quarter", "30 % wrong labels": "wrong labels"}
RESULTS |= {"One setting changed": "a quarter"}  # the setting that all rows of a table of results share


def setting(words):
    return {name: value for word in words.split(", ") for name, value in WORDS[word].items()}


@cache
def tables(page):
    """{heading: the table under it}, without the line of dashes; a table is a list of rows of texts."""
    found, heading = {}, None
    for line in (EXPERIMENTS / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and not line.startswith("|---"):
            found.setdefault(heading, []).append([cell.strip(" *") for cell in line.strip("|").split("|")])
    return found


def rows_under(heading):
    """The rows of a table of the study, each as {head of the column: text}."""
    head, *rows = tables("README.md")[heading]
    return [dict(zip(head, row, strict=True)) for row in rows]


def rows_of_results(heading):
    """(row, what is unusual in its setting) of a table of results."""
    for row in rows_under(heading):
        own = row.get("changed", "teachers" if row["method"] == "teacher" else f"{row.get('epochs', 8)} epochs")
        yield row, setting(RESULTS[heading]) | setting(own)


def records(name):
    return [json.loads(line) for line in (EXPERIMENTS / name).read_text().splitlines()]


def method_of(run):
    """The method of a run, by the name of its folder."""
    method, _, rest = run.partition("_student_resnet8_weight")
    return METHODS[f"{method} {rest.partition('_')[0]}"] if rest else "resnet8 alone" if "resnet8" in run else "teacher"


@cache
def runs():
    """The best and last accuracy of each run, by method, setting and seed."""
    rows = []
    for record in records("cifar100.jsonl"):
        flags, result = record["flags"], record["result"]
        its = [flags[name] for name in ("few_shot", "epoch", "label_noise", "amp")]
        its += [flags.get("t_epoch", flags["epoch"] / 4) / flags["epoch"], flags.get("ratio_ss", 0.75), flags["seed"]]
        rows.append([method_of(record["run"]), *its, result["best_acc"], result["last_acc"]])
    index = ["method", *USUAL, "seed"]
    return pd.DataFrame(rows, columns=[*index, "best", "last"]).set_index(index).sort_index()


def accuracy(method, which="best", **unusual):
    """Of seeds 0, 1 and 2."""
    found = runs().loc[(method, *(USUAL | unusual).values())]
    assert list(found.index) == [0, 1, 2]
    return found[which].to_numpy()


def spread(values, digits=2):
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def difference(a, b, digits=2):
    """Mean of the paired differences and its 95 % interval, as the page writes them."""
    ends = stats.ttest_rel(a, b).confidence_interval(0.95)
    mean, low, high = (f"{x:+.{digits}f}" for x in ((a - b).mean(), *ends))
    return f"{mean} [{low}, {high}]"


@pytest.mark.parametrize("heading", RESULTS)
def test_a_table_of_results_equals_the_record(heading):
    for row, its in rows_of_results(heading):
        method = row["method"]
        unchanged = setting(RESULTS[heading]) if "changed" in row else {}
        sides = {"method": (method, its), "unchanged": (method, unchanged), "true labels": (method, {})}
        expected = {name: row[name] for name in ("method", "epochs", "changed") if name in row}
        expected |= {which: spread(accuracy(method, which, **its)) for which in ("best", "last")}
        for head in row.keys() - expected.keys():
            if method == "teacher" or method in head.split(" − "):
                expected[head] = "–"
            elif head == "change of SSKD's lead":
                leads = [accuracy("SSKD", **where) - accuracy(method, **where) for where in (its, {})]
                expected[head] = difference(*leads) if method != "SSKD" else "–"
            else:
                pair = [sides.get(side, (side, its)) for side in head.split(" − ")]
                expected[head] = difference(*(accuracy(name, **where) for name, where in pair))
        assert row == expected


def test_every_run_of_the_record_is_in_one_table_of_results():
    shown = [(row["method"], *(USUAL | its).values()) for heading in RESULTS for row, its in rows_of_results(heading)]
    assert sorted(shown) == sorted(runs().index.droplevel("seed").unique())


def test_a_difference_equals_the_record():
    for row in rows_under("Differences, here and in the paper"):
        sides = [side.rstrip(")").split(" (") for side in row["difference"].split(" − ")]
        shared = setting(row["setting"])
        a, b = (accuracy(method, **shared | setting(*own or ["8 epochs"])) for method, *own in sides)
        assert row["here"] == difference(a, b), row


def test_the_pooled_precision_equals_the_record():
    ablation = ["KD, 4 views", "KD + tf", "KD + ss", "SSKD"]
    pools = {
        "a quarter, 8 epochs": [accuracy(method, images=0.25) for method in ["KD", "AT", "CRD", *ablation]],
        "all images, 8 epochs": [accuracy(method) for method in ["KD", *NINE, "SSKD"]],
        "the five values of k": [accuracy("SSKD", images=0.25, k=k) for k in (0, 0.25, 0.5, 0.75, 1)],
    }
    for row in rows_under("Precision"):
        cells = np.array(pools.pop(row["pooled over"]))  # methods x seeds
        rest = cells - cells.mean(0) - cells.mean(1, keepdims=True) + cells.mean()
        freedom = (len(cells) - 1) * 2
        half = stats.t.ppf(0.975, freedom) * ((rest**2).sum() / freedom * 2 / 3) ** 0.5
        assert row["95 % interval"] == f"± {half:.1f}"
    assert not pools


def test_the_similarities_equal_their_record():
    found, shown = {}, {}
    for record in records("cifar100_similarity.jsonl"):
        images = "a quarter" if "_few0.25_" in record["student"] else "all"
        for measure in ("KL", "CKA"):
            of_seeds = found.setdefault((f"{measure}, {images}", method_of(record["student"])), [])
            assert record["teacher"] == f"teacher_resnet20_seed{len(of_seeds)}"
            of_seeds.append(record[measure])
    found = {case: np.array(of_seeds) for case, of_seeds in found.items()}
    for row in rows_under("How alike teacher and student are"):
        method, *minus = row.pop("method").split(" − ")
        for column, text in row.items():
            if minus:
                assert text == difference(found[column, method], found[column, minus[0]], 3)
            elif text != "–":
                shown[column, method] = text
    for (column, method), values in found.items():
        mark = ""
        if method != "SSKD":
            low, high = stats.ttest_rel(found[column, "SSKD"], values).confidence_interval(0.95)
            nearer, farther = (high < 0, low > 0) if column.startswith("KL") else (low > 0, high < 0)
            mark = " †" if nearer else " ‡" if farther else ""
        assert shown.pop((column, method)) == spread(values, 3) + mark
    assert not shown


def test_what_stored_features_save_equals_its_record():
    seconds = {}  # of a method: with the features computed, stored
    for record in sorted(records("cifar100_features.jsonl"), key=lambda record: bool(record["flags"]["t_features"])):
        seconds.setdefault(method_of(record["run"]), []).append(record["result"]["seconds"])
    # `sum` adds more exactly since Python 3.12, and 21.885 minutes may round either way
    seconds["together"] = [math.fsum(column) for column in zip(*seconds.values(), strict=True)]
    for row in rows_under("What stored features save"):
        compute, disk = seconds.pop(row["method"])
        expected = [f"{disk / 60:.2f}", f"{compute / 60:.2f}", f"{disk / compute - 1:+.0%}"]
        assert [row["`disk`"], row["`compute`"], row["change"]] == expected
    assert not seconds


@pytest.mark.parametrize("heading, part", [("Similar architectures", "similar"), ("Different architectures", "cross")])
def test_a_published_table_equals_the_data(heading, part):
    published = json.loads((EXPERIMENTS / "published_results.json").read_text())[part]

    def text(value):
        if isinstance(value, list):
            return "{:.2f} ± {:.2f}".format(*value)
        return "–" if value is None else f"{value:.2f}"

    expected = [list(names) for names in zip(("from", "to"), *published.pop("pairs"), strict=True)]
    expected += [[name, *map(text, values)] for name, values in published.items()]
    assert tables("published.md")[heading] == expected
