"""experiments/README.md: what it says of the studies, reckoned from their records."""

import json
import re

import numpy as np
from conftest import ROOT, records, rows_in, section

from experiments import runs, table

CIFAR100, FASHION_MNIST = (ROOT / "experiments" / f"{name}.jsonl" for name in ("cifar100", "fashion_mnist"))

# The study on CIFAR-100: what holds where a table or its row says nothing else, and the page's names for the methods
FRAME = {"--few-shot": 1.0, "--label-noise": 0.0, "--amp": "bf16", "--epoch": 8, "--t-epoch": 2, "--ratio-ss": 0.75}
ROWS = {name: row for name, (row, *_) in runs.METHODS.items()}
ABLATION = {(0, 0): "KD, 4 views", (2.7, 0): "KD + tf", (0, 10): "KD + ss", (2.7, 10): "SSKD"}
NINE = ("FitNet", "AT", "SP", "VID", "RKD", "PKT", "AB", "FT", "CRD")  # the compared methods of the paper's tables
T_975 = 4.302653  # of Student's distribution with two degrees of freedom, from a printed table


def named(record):
    """The network and method of a run, as the page names them."""
    flags = record["flags"]
    if "s_arch" not in flags:
        return flags["arch"] + " alone"
    if (flags["ce_weight"], flags["kd_weight"]) == (0.4, 3.6):
        return "KD, loss × 4"
    return ROWS[flags["method"]] if "method" in flags else ABLATION[flags["tf_weight"], flags["ss_weight"]]


def given(words):
    """{flag: value} of the flags in backticks."""
    return {flag: value if flag == "--amp" else float(value) for flag, value in re.findall(r"`(--\S+) (\S+)`", words)}


def cifar100_runs(method, flags):
    """{seed: record} of a method's runs with the flags of the frame, but for those that are given."""
    found = {}
    for record in records(CIFAR100):
        its = {flag: record["flags"].get(flag[2:].replace("-", "_"), value) for flag, value in (FRAME | flags).items()}
        if (named(record), its) == (method, FRAME | flags):
            assert found.setdefault(record["flags"]["seed"], record) is record
    return {seed: found[seed] for seed in sorted(found)}


def accuracies(method, flags, which="best_acc"):
    return np.array([record["result"][which] for record in cifar100_runs(method, flags).values()])


def half_interval(differences):
    """Half the width of the 95 % interval of their mean."""
    return T_975 * differences.std(ddof=1) / len(differences) ** 0.5


def told(a, b):
    """1 if the interval of their mean difference is above 0, −1 if below, 0 if it holds 0."""
    return int(np.sign((a - b).mean()) * (abs((a - b).mean()) > half_interval(a - b)))


def gain(a, b, digits=2):
    """Mean difference and its 95 % interval, as the page writes it, of three pairs."""
    difference, half = a - b, half_interval(a - b)
    mean, low, high = (f"{difference.mean() + end:+.{digits}f}" for end in (0, -half, half))
    return f"{mean} [{low}, {high}]"


def half_width(cells, t):
    """Of the 95 % interval of a difference of two methods, from what method and seed leave over of all their cells."""
    cells = np.stack(cells)
    rest = cells - cells.mean(0) - cells.mean(1, keepdims=True) + cells.mean()
    methods, seeds = cells.shape
    return t * ((rest**2).sum() / ((methods - 1) * (seeds - 1)) * 2 / seeds) ** 0.5


def tables(text):
    """(its flags, its title, rows by the heads of their columns) of each table."""
    for title, lines in re.findall(r"^(\*\*[^|]*?)\n\n((?:\|.*\n)+)", text, re.MULTILINE):
        yield given(title), " ".join(title.split()), rows_in(lines.splitlines())


# what a table's last column compares a row with, by the column's head: the method, and the flags that differ
# (2 epochs: of the SS head)
COMPARED = {"− KD": ("KD", {}), "− bf16": (None, {"--amp": "bf16"}), "− k = 0.75": (None, {"--ratio-ss": 0.75})}
COMPARED |= {"− 2 epochs": (None, {"--t-epoch": 2}), "− true labels": (None, {"--label-noise": 0.0})}


def test_every_figure_in_the_tables_on_cifar100_is_reckoned_from_the_record():
    used, lower = [], []
    for flags, title, rows in tables(section("CIFAR-100", "Figures")):
        of_table = []
        for row in rows:
            method = row["method"]
            its = flags | ({"--ratio-ss": float(row["k"])} if "k" in row else {})
            found = cifar100_runs(method, its)
            assert list(found) == [0, 1, 2], row
            of_table += found.values()
            best, last = (accuracies(method, its, which) for which in ("best_acc", "last_acc"))
            lower.append(best.mean() - last.mean())
            expected = {name: row[name] for name in row.keys() & {"method", "k"}}
            expected |= {n: f"{x.mean():.2f} ± {x.std(ddof=1):.2f}" for n, x in (("best", best), ("last", last))}
            for head in row.keys() & COMPARED:
                other, differing = COMPARED[head]
                compared = accuracies(other or method, its | differing)
                expected[head] = gain(best, compared) if method != other and len(compared) else "–"
            assert row == expected
        hours = sum(record["result"]["seconds"] for record in of_table) / 3600
        assert f"{len(of_table)} runs, {hours:.1f} hours" in title
        used += map(json.dumps, of_table)
    assert sorted(used) == sorted(map(json.dumps, records(CIFAR100)))
    hours = sum(record["result"]["seconds"] for record in records(CIFAR100)) / 3600
    assert f"It takes {hours:.0f} hours of a core" in section("CIFAR-100", "Running it")
    assert f"at the last the means are at most {max(lower):.2f} lower." in " ".join(section("CIFAR-100").split())


def test_the_compared_methods_on_cifar100_had_their_published_weights_and_one_epoch_of_a_first_phase():
    compared = [record["flags"] for record in records(CIFAR100) if named(record) in ROWS.values()]
    assert {flags["method"] for flags in compared} == runs.METHODS.keys()
    for flags in compared:
        row, *weights = runs.METHODS[flags["method"]]
        assert [flags[name] for name in ("ce_weight", "kd_weight", "weight")] == weights
        assert flags.get("first_epoch") == (1 if row in ("AB", "FT", "DKD") else None)


def test_the_differences_that_the_text_on_cifar100_names_are_those_of_the_record():
    few = {"--few-shot": 0.25}
    sskd, kd, kd_4, alone = (accuracies(method, few) for method in ("SSKD", "KD", "KD, loss × 4", "resnet8 alone"))
    at, crd, plain, tf, ss = (accuracies(each, few) for each in ("AT", "CRD", "KD, 4 views", "KD + tf", "KD + ss"))
    other_k = [accuracies("SSKD", few | {"--ratio-ss": k}) for k in (0, 0.25, 0.5, 1)]
    sskd_float, kd_float = (accuracies(method, few | {"--amp": "off"}) for method in ("SSKD", "KD"))
    long = few | {"--epoch": 32, "--t-epoch": 8}
    sskd_32, kd_32, kd_4_32, tf_32 = (accuracies(each, long) for each in ("SSKD", "KD", "KD, loss × 4", "KD + tf"))
    sskd_all, kd_all, kd_4_all, alone_all = (accuracies(m, {}) for m in ("SSKD", "KD", "KD, loss × 4", "resnet8 alone"))
    plain_all, tf_all, ss_all = (accuracies(method, {}) for method in ("KD, 4 views", "KD + tf", "KD + ss"))
    dkd_all, ls_all = (accuracies(method, {}) for method in ("DKD", "KD + LS"))
    nine = {method: accuracies(method, {}) for method in NINE}
    near, far = (pick(nine, key=lambda method: nine[method].mean()) for pick in (max, min))
    noisy = {"--label-noise": 0.3}
    wrong = {method: accuracies(method, noisy) for method in ("SSKD", "KD", "FT", "CRD")}
    true = {method: accuracies(method, {}) for method in wrong}
    sskd_noisy, kd_noisy, ft_noisy, crd_noisy = wrong.values()
    kd_4_noisy = accuracies("KD, loss × 4", noisy)
    ss_longer, sskd_longer = (accuracies(method, few | {"--t-epoch": 8}) for method in ("KD + ss", "SSKD"))

    pairs = [(sskd, kd), (sskd, at), (sskd, crd), (sskd_all, kd_all), (sskd_all, nine[near]), (sskd_all, nine[far])]
    pairs += [(kd_4_all, nine[near]), (kd_4_all, nine[far]), *((nine[each], kd_all) for each in ("AB", "CRD", "FT"))]
    pairs += [(plain, kd), (tf, plain), (ss, plain), (sskd, plain)]
    pairs += [(tf_all, plain_all), (ss_all, plain_all), (sskd_all, plain_all), (plain_all, kd_all)]
    pairs += [(sskd, tf), (sskd_32, tf_32), (sskd_all, tf_all)]
    pairs += [(ss_longer, ss), (sskd_longer, sskd), *((k, sskd) for k in other_k)]
    pairs += [(kd_4, kd), (sskd, kd_4), (kd_4_32, kd_32), (sskd_32, kd_4_32)]
    pairs += [(kd_4_all, kd_all), (sskd_all, kd_4_all)]
    pairs += [(dkd_all, kd_all), (sskd_all, dkd_all), (dkd_all, kd_4_all), (ls_all, kd_all), (sskd_all, ls_all)]
    pairs += [(sskd_32, kd_32), (sskd_all, kd_all), (kd_all, kd_32)]
    pairs += [(kd_32, sskd), (kd_32, kd)]
    pairs += [(sskd_noisy, each) for each in (kd_noisy, ft_noisy, crd_noisy, kd_4_noisy)]
    pairs += [(kd_noisy, kd_all), (ft_noisy, nine["FT"]), (crd_noisy, nine["CRD"]), (sskd_noisy, sskd_all)]
    pairs += [(crd_noisy, kd_noisy), (kd_all, alone_all), (kd, alone)]
    pairs += [(sskd_float, sskd), (kd_float, kd), (sskd_float, kd_float)]
    text = " ".join(section("CIFAR-100").partition("\n### Figures\n")[0].split())
    assert re.findall(r"[+-]\d+\.\d\d \[[^]]*\]", text) == [gain(*pair) for pair in pairs]

    assert all(told(each, accuracy) == 1 for each in (sskd_all, kd_4_all) for accuracy in nine.values())
    assert f"({near}, the nearest) to {gain(sskd_all, nine[far])} ({far}). So is KD, loss × 4 (below)," in text
    assert f"Of the nine, AB and CRD are above KD, by {gain(nine['AB'], kd_all)}" in text
    others = {method: told(accuracy, kd_all) for method, accuracy in nine.items() if told(accuracy, kd_all)}
    assert others == {"AB": 1, "CRD": 1, "FT": -1}
    pooled = half_width([kd_all, sskd_all, *nine.values()], 2.085963)  # Student's t with 10 · 2 degrees
    assert f"all images is good to about ± {pooled:.1f} only, and CRD's is within that." in text
    assert nine["CRD"].mean() - kd_all.mean() < pooled < nine["AB"].mean() - kd_all.mean()
    similar = json.loads((ROOT / "experiments" / "published_results.json").read_text())["similar"]
    over_best = similar["SSKD"] - np.max([similar[method] for method in NINE], 0)
    assert f"from {-over_best.min():.1f} below to {over_best.max():.1f} above the best of the nine" in text
    over_kd = [similar[method][2] - similar["KD"][2] for method in NINE]
    assert similar["pairs"][2] == ["resnet56", "resnet20"]
    assert f"for resnet56 → resnet20, by {min(over_kd):.1f} to {max(over_kd):.1f}, but" in text

    pooled = half_width([kd, at, crd, plain, tf, ss, sskd], 2.178813)  # Student's t with 6 · 2 degrees
    assert f"quarter of the images is good to about ± {pooled:.1f}." in text
    pooled = half_width([*other_k, sskd], 2.306004)  # with 4 · 2
    assert f"pooled over the five a difference is good to about ± {pooled:.1f} only." in text
    assert "0.75 is the lowest of the five" in text and all(sskd.mean() < k.mean() for k in other_k)
    pairs = [(sskd, kd), (sskd_32, kd_32), (sskd_all, kd_all), (kd_32, sskd)]
    short, later, whole, control = (f"{(a - b).mean():.1f}" for a, b in pairs)
    assert f"it falls from {short} (" in text
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"SSKD is {short} points above KD after 8 epochs and {later} after 32;" in readme
    with_noise = (sskd_noisy - kd_noisy).mean()
    assert f"all images it is {whole} above KD after 8, and {with_noise:.1f} with 30 % of their labels wrong." in readme
    assert "above the nine compared methods of the paper, too, but cannot be told from DKD" in readme
    assert "On one view DKD, a later method, could not be told from SSKD." in text and not told(dkd_all, sskd_all)
    assert not any(told(sskd_noisy - wrong[each], sskd_all - true[each]) for each in ("KD", "FT", "CRD"))
    assert "What the noise costs could be told for KD and FT only" in text and not told(sskd_noisy, kd_4_noisy)
    assert {each: told(wrong[each], true[each]) for each in true} == {"KD": -1, "FT": -1, "CRD": 0, "SSKD": 0}
    assert not told(*(accuracies("FT", flags, "last_acc") for flags in (noisy, {}))) and "(FT's not at the last" in text
    assert f"is {(sskd - kd_4).mean():.1f} below SSKD after 8 epochs" in readme
    assert f"is {control} above SSKD after 8." in readme


def test_how_alike_students_and_teachers_are_is_reckoned_from_its_record():
    found = {}
    for record in records(CIFAR100.with_name("cifar100_similarity.jsonl")):
        method, _, weights = record["student"].partition("_student_resnet8_weight")
        names = "ce_weight", "kd_weight", "tf_weight", "ss_weight"  # a compared method has but three weights
        weights = dict(zip(names, map(float, weights.partition("_")[0].split("+")), strict=False))
        of_method = {} if method == "sskd" else {"method": method}
        row = named({"flags": {"s_arch": "resnet8"} | weights | of_method})
        images = "a quarter" if "_few0.25_" in record["student"] else "all"
        assert record["T"] == 1 and "_noise" not in record["student"]
        found.setdefault((row, images), {})[record["teacher"]] = record["KL"], record["CKA"]
    heads = [f"{name}, {images}" for images in ("a quarter", "all") for name in ("KL", "CKA")]
    expected = {row: {"method": row} | dict.fromkeys(heads, "–") for row, _ in found}
    for (row, images), values in found.items():
        assert list(values) == [f"teacher_resnet20_seed{seed}" for seed in (0, 1, 2)]
        found[row, images] = columns = np.array(list(values.values())).T
        for name, column in zip(("KL", "CKA"), columns, strict=True):
            expected[row][f"{name}, {images}"] = f"{column.mean():.3f} ± {column.std(ddof=1):.3f}"
    lines = [line for line in section("CIFAR-100", "How alike").splitlines() if line[:1] == "|"]
    assert {row["method"]: row for row in rows_in(lines)} == expected

    text = " ".join(section("CIFAR-100").partition("\n### Figures\n")[0].split())
    (kl, cka), (kl_4, cka_4) = (found[row, "all"] for row in ("SSKD", "KD, loss × 4"))
    assert f"nothing could be told: KL {gain(kl, kl_4, 3)}, CKA {gain(cka, cka_4, 3)}." in text
    nearer = {}  # of SSKD's students and a row's: whose are nearer, in KL and in CKA
    for row, images in found:
        (kl, cka), (kl_row, cka_row) = found["SSKD", images], found[row, images]
        nearer[row, images] = told(kl_row, kl), told(cka, cka_row)
    compared = {case: its for case, its in nearer.items() if case[0] in ("KD", *NINE)}
    assert len(compared) == 13 and all(kl == 1 for kl, _ in compared.values())
    others = {case: cka for case, (_, cka) in compared.items() if cka != 1}
    assert others == {(row, "all"): 0 for row in ("KD", "RKD", "AB")} | {(row, "all"): -1 for row in ("SP", "PKT")}
    assert "nothing could be told against KD, RKD and AB, and those of SP and PKT," in text
    assert nearer["DKD", "all"] == (0, 1) and "DKD's are as near in KL, but not in CKA." in text
    of_all = {row: kl.mean() for (row, images), (kl, _) in found.items() if images == "all"}
    assert max(of_all, key=of_all.get) == "KD + LS" and "open, are the farthest in KL." in text
    assert nearer["KD + tf", "a quarter"] == nearer["KD + tf", "all"] == (0, 0)
    for images, its in (("a quarter", 1), ("all", 0)):
        assert [told(*pair) for pair in zip(found["KD + ss", images], found["KD", images], strict=True)] == [-its, its]


def test_what_stored_features_save_is_reckoned_from_their_record():
    stored, computed = {}, {}
    for record in records(CIFAR100.with_name("cifar100_features.jsonl")):
        (stored if record["flags"].pop("t_features", None) else computed)[named(record)] = record
    text = " ".join(section("CIFAR-100", "Figures").split())
    assert list(stored) == list(computed) and "KD, KD + tf, SSKD and KD + ss, one after another" in text
    seconds = {}
    for method, record in stored.items():
        seconds[method] = its, other = [each[method]["result"].pop("seconds") for each in (stored, computed)]
        assert record["flags"] == computed[method]["flags"] and record["result"] == computed[method]["result"]
        assert record["result"].items() <= cifar100_runs(method, {"--few-shot": 0.25})[0]["result"].items()
    with_it, without = (f"{sum(column) / 60:.1f}" for column in zip(*seconds.values(), strict=True))
    assert f"They take {with_it} minutes with it and {without} without" in text
    ratios = {method: its / other for method, (its, other) in seconds.items()}
    assert f"KD + tf, which looks first, takes {(ratios['KD + tf'] - 1) * 100:.0f} % longer" in text
    sskd, ss = (f"{(1 - ratios[method]) * 100:.0f} %" for method in ("SSKD", "KD + ss"))
    assert f"SSKD and KD + ss take {sskd} and {ss} less" in text


def test_the_page_shows_what_the_record_of_fashion_mnist_says(capsys):
    """Every line of the tables that table.py makes of the record stands in experiments/README.md, and no other."""
    table.main([str(FASHION_MNIST), "--dataset", "fashion_mnist", "--markdown"])
    shown = capsys.readouterr()
    assert shown.err == ""
    printed = shown.out.splitlines()
    page = section("Fashion-MNIST").splitlines()
    assert [line for line in page if line.startswith(("|", "**fashion"))] == [line for line in printed if line]
    assert len(printed) > 4


def fashion_mnist():
    """{(network, method, few_shot, label_noise): [best and last accuracy of seed 0, of seed 1, …]} from the record."""
    methods = {(0, 0): "KD", (2.7, 0): "KD + tf", (2.7, 10): "SSKD"}
    groups = {}
    for record in sorted(records(FASHION_MNIST), key=lambda record: record["flags"]["seed"]):
        flags, result = record["flags"], record["result"]
        method = methods[flags["tf_weight"], flags["ss_weight"]] if "s_arch" in flags else "alone"
        group = flags.get("s_arch") or flags["arch"], method, flags["few_shot"], flags["label_noise"]
        groups.setdefault(group, {})[flags["seed"]] = result["best_acc"], result["last_acc"]
    assert all(list(seeds) == [0, 1, 2, 3, 4] for seeds in groups.values())
    return {group: np.array(list(seeds.values())) for group, seeds in groups.items()}


def test_the_figures_on_fashion_mnist_are_those_of_its_record():
    """The same, reckoned here from the record and without table.py."""
    lines = [line for line in section("Fashion-MNIST", "Figures").splitlines() if line.startswith("|")]
    found = {
        (
            row["network"],
            row["method"].removesuffix(", 4 views"),
            float(row["--few-shot"]),
            float(row["--label-noise"]),
        ): (row["best"], row["last"])
        for row in rows_in(lines)
    }
    expected = {
        group: tuple(f"{column.mean():.2f} ± {column.std(ddof=1):.2f} (5)" for column in accuracies.T)
        for group, accuracies in fashion_mnist().items()
    }
    assert found == expected
    assert len(found) == 9


def test_the_gains_on_fashion_mnist_are_those_of_its_record():
    best = {group: accuracies[:, 0] for group, accuracies in fashion_mnist().items()}

    def gain(over, few_shot=1.0, noise=0.0):
        return best["resnet8", "SSKD", few_shot, noise] - best["resnet8", over, few_shot, noise]

    few = gain("KD", few_shot=0.25)
    gains = [gain("KD"), gain("KD + tf"), few, gain("KD", noise=0.3)]
    text = " ".join(section("Fashion-MNIST").partition("### Figures")[0].split())
    expected = [f"{gain.mean():.2f} ± {gain.std(ddof=1):.2f}" for gain in gains]
    assert re.findall(r"\d\.\d\d ± \d\.\d\d", text) == expected

    alone, kd, tf, sskd = (best["resnet8", method, 1.0, 0.0] for method in ("alone", "KD", "KD + tf", "SSKD"))
    assert f"({alone.mean():.1f} → {kd.mean():.1f} and {tf.mean():.1f})" in text
    assert f"{sskd.mean():.1f}" == f"{tf.mean():.1f}"
    assert "KD is above it in each of the five seeds" in text and (kd > alone).all()
    assert "SSKD is above KD in each of the five seeds" in text and (few > 0).all()
    assert f"from {few.min():.1f} to {few.max():.1f}," in text
    assert f"KD loses only {(kd - best['resnet8', 'KD', 1.0, 0.3]).mean():.1f} to the noise" in text
    t = few.mean() / few.std(ddof=1) * 5**0.5
    p = 1 - t * (t**2 + 6) / (t**2 + 4) ** 1.5  # of Student's t with 4 degrees of freedom, two-sided
    assert f"p = {p:.3f}" in text
