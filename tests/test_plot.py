"""experiments/plot.py: the figure of the method, as it is committed, and those of a study."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT, change, flags_of, write_run, write_student, write_teacher

import baseline
import losses

matplotlib = pytest.importorskip("matplotlib")
from experiments import plot  # noqa: E402 (once matplotlib is known to be there)


def drawn(path):
    plot.main(["method", "--output", str(path)])
    return path.read_bytes()


def test_the_figure_names_the_four_terms_and_is_the_committed_one(tmp_path):
    figure = drawn(tmp_path / "method.svg")
    committed = (ROOT / "experiments" / "figures" / "method.svg").read_bytes()
    assert len(committed) < 300_000
    for svg in (figure, committed):
        names = {element.get("id") for element in ElementTree.fromstring(svg).iter()}
        assert {"L_ce", "L_kd", "L_ss", "L_T"} <= names
    if f"Matplotlib v{matplotlib.__version__}," in committed.decode():  # another version may place text differently
        assert figure == committed


def test_the_readers_own_matplotlib_settings_do_not_change_the_figure(tmp_path):
    figure = drawn(tmp_path / "default.svg")
    own = {"svg.fonttype": "none", "svg.hashsalt": "mine", "font.size": 30, "axes.facecolor": "black"}
    with matplotlib.rc_context(own | {"savefig.facecolor": "black", "savefig.bbox": "tight"}):
        assert drawn(tmp_path / "own.svg") == figure
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("images, ratio", [(5, 0.75), (8, 0.5), (8, 0.0), (8, 1.0)])
def test_the_figure_drops_the_rows_that_selective_transfer_drops(images, ratio):
    teacher, student, kept = plot.similarities(images, ratio)
    mask = losses.selective_mask(torch.tensor(teacher), losses.positives(torch.tensor(teacher)), ratio)
    assert kept.tolist() == mask.tolist()
    assert abs(teacher).max() <= 1 and abs(student).max() <= 1


def test_the_figure_shows_a_row_that_is_dropped_and_wrong_rows_that_are_kept():
    teacher, _, kept = plot.similarities()
    right = (torch.tensor(teacher).argmax(1) == losses.positives(torch.tensor(teacher))).numpy()
    assert not kept.all() and (kept & ~right).any() and kept[right].all()


def test_other_endings_give_other_formats_on_an_opaque_ground(tmp_path):
    assert drawn(tmp_path / "method.png").startswith(b"\x89PNG")
    assert drawn(tmp_path / "method.jpg").startswith(b"\xff\xd8")
    pixels = matplotlib.image.imread(tmp_path / "method.png")
    assert pixels.shape[:2] == (840, 2000)
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1], :3] == 1).all() and (pixels[..., 3:] == 1).all()


# ------------------------------------------------------------------------------------------------ figures of a study

PAIR, KD, TF = ("resnet20", "resnet8"), ("--tf-weight", "0", "--ss-weight", "0"), ("--ss-weight", "0")
SEEDS = (("0", 0.0), ("1", 1.5))  # and what each adds to an accuracy


def timed(folder, seconds):
    change(folder / "result.json", epochs=20, seconds=20 * seconds)


@pytest.fixture
def study(tmp_path):
    """Two seeds of KD, KD + tf and SSKD, with some or all of the images and different shares of wrong matches."""
    root = tmp_path / "runs"
    for seed, more in SEEDS:
        words = ("--seed", seed)
        for few, less in (("1", 0), ("0.25", 20)):
            at = ("--few-shot", few)
            timed(write_student(root / few, PAIR, 60 + more - less, 50, *words, *at, *KD), 30)
            timed(write_student(root / few, PAIR, 62 + more - less, 50, *words, *at), 50)
        timed(write_student(root, PAIR, 61 + more, 50, *words, *TF), 40)
        timed(write_student(root / "k", PAIR, 59 + more, 50, *words, "--ratio-ss", "0.25"), 50)
        write_teacher(root, "resnet20", 70, 69, *words)
        write_teacher(root, "resnet8", 55, 54, *words)
        timed(root / f"teacher_resnet8_seed{seed}", 10)
    return root


def figure_of(*words):
    args = plot.parse_args([str(word) for word in words])
    return plot.draw(args)


def drawn_lines(ax):
    """{label: (x, y, lower and upper ends of the bars)} of the error bars."""
    found = {}
    for container in ax.containers:
        line, _, (bars,) = container
        ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
        found[container.get_label()] = line.get_xdata().tolist(), line.get_ydata().tolist(), ends
    return found


def test_accuracies_stand_beside_what_an_epoch_costs(study):
    figure = figure_of("accuracy", study)
    few, few_cost, all_images, cost = figure.axes
    assert few.get_title(loc="left") == "resnet20 → resnet8  --few-shot 0.25"
    assert all_images.get_title(loc="left") == "resnet20 → resnet8"
    methods = ["SSKD (2)", "KD + tf (2)", "KD, 4 views (2)", "SSKD --ratio-ss 0.25 (2)", "alone (2)"]
    assert [tick.get_text() for tick in all_images.get_yticklabels()] == methods
    bars = [container[2][0].get_segments()[0] for container in all_images.containers]
    deviation = np.std([0, 1.5], ddof=1)
    for y, (bar, best) in enumerate(zip(bars, (62.75, 61.75, 60.75, 59.75, 55), strict=True)):
        ends = [best - deviation, best + deviation] if best != 55 else [55, 55]
        assert bar == pytest.approx(np.array([[ends[0], y], [ends[1], y]]))
    assert [bar.get_width() for bar in cost.patches] == [50, 40, 30, 50, 10]
    assert [bar.get_width() for bar in few_cost.patches] == [50, 30]
    assert "(%)" in all_images.get_xlabel() and "(s)" in cost.get_xlabel()
    assert few_cost.get_xlim() == cost.get_xlim() and few.get_xlim() == all_images.get_xlim()


def test_a_row_is_named_by_the_flags_in_which_it_departs_from_most_of_its_panel(tmp_path):
    for i, words in enumerate((["2"], ["2", "--ratio-ss", "0.25"], ["8"])):
        timed(write_student(tmp_path / str(i), PAIR, 60 - i, 50, "--t-milestones", "1", "--t-epoch", *words), 1)
    timed(write_student(tmp_path, PAIR, 50, 50, *KD), 1)
    compared = (["dkd"], ["kd"], ["kd", "--ce-weight", "0.4"])  # the published --ce-weight: 1.0 and twice 0.1
    for i, (method, *words) in enumerate(compared):
        flags = flags_of(baseline.parse_args, "--t-path", "-", "--s-arch", "resnet8", "--method", method, *words)
        folder = tmp_path / f"{method}{i}_seed0_teacher_resnet20_seed0"
        write_run(folder, flags | {"teacher": "resnet20-0"}, 40 - i, 40)
        timed(folder, 1)
    labels = [tick.get_text() for tick in figure_of("accuracy", tmp_path).axes[0].get_yticklabels()]
    assert labels == [
        *("SSKD (1)", "SSKD --ratio-ss 0.25 (1)", "SSKD --t-epoch 8 (1)", "KD, 4 views (1)"),
        *("DKD (1)", "KD (1)", "KD --ce-weight 0.4 (1)"),
    ]


def test_accuracy_by_the_share_of_the_images_is_a_line_for_each_method(study):
    figure = figure_of("few-shot", study)
    (ax,) = figure.axes
    half = np.std([0, 1.5], ddof=1)
    kd, sskd = ([[y - half, y + half] for y in means] for means in ([40.75, 60.75], [42.75, 62.75]))
    lines = drawn_lines(ax)
    assert set(lines) == {"KD, 4 views", "SSKD"}
    for method, means, ends in (("KD, 4 views", [40.75, 60.75], kd), ("SSKD", [42.75, 62.75], sskd)):
        assert lines[method][:2] == ([25, 100], means)
        assert lines[method][2] == [pytest.approx(end) for end in ends]


def test_accuracy_by_k_stands_beside_the_levels_without_the_term(study):
    (ax,) = figure_of("ratio-ss", study).axes
    lines = {method: line[:2] for method, line in drawn_lines(ax).items()}
    assert lines == {
        "SSKD": ([25, 75], [59.75, 62.75]),
        "KD + tf": ([25, 75], [61.75, 61.75]),
        "KD, 4 views": ([25, 75], [60.75, 60.75]),
    }


def test_curves_are_the_accuracies_of_the_log(tmp_path):
    head = {"phase": "ss_head", "epoch": 1, "val/teacher_ssp_acc": 3.0}
    for words, line in ((KD, [10, 20, 30]), ((), [12, 25, 33])):
        folder = write_student(tmp_path, PAIR, 50, 49, *words)
        lines = [head, *({"phase": "student", "epoch": i, "val/cls_acc": acc} for i, acc in enumerate(line, 1))]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (ax,) = figure_of("curves", tmp_path).axes
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.get_lines()] == [
        ([1, 2, 3], [10, 20, 30]),
        ([1, 2, 3], [12, 25, 33]),
    ]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["resnet8, KD, 4 views", "resnet8, SSKD"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "test accuracy (%)")
    held = write_student(tmp_path / "held", PAIR, 50, 49, "--val-fraction", "0.1")
    change(held / "result.json", test_acc=49)
    (held / "log.jsonl").write_text((folder / "log.jsonl").read_text())
    (ax,) = figure_of("curves", tmp_path).axes
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {"resnet8, KD, 4 views", "resnet8, SSKD", "resnet8, SSKD, held-out images"}
    assert ax.get_ylabel() == "accuracy (%)"


def test_methods_are_told_apart_with_and_without_their_colours():
    looks = plot.LOOKS.values()
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == len(looks)
    assert len({(look["color"], look["linestyle"]) for look in looks}) == len(looks)


def test_a_figure_of_a_study_repeats_and_has_a_dark_variant(study, tmp_path):
    files = [tmp_path / name for name in ("a.svg", "b.svg", "light.png", "dark.png")]
    for file in files:
        plot.main(["ratio-ss", str(study), "--output", str(file), *["--dark"] * (file.stem == "dark")])
    assert files[0].read_bytes() == files[1].read_bytes()
    light, dark = (matplotlib.image.imread(file)[..., :3] for file in files[2:])
    assert light[0, 0].tolist() == [1, 1, 1] and dark[0, 0].max() < 0.1
    assert dark.max(axis=(0, 1)).min() > 0.8  # its ink is light


@pytest.mark.parametrize("more", ["", "_dark"])
@pytest.mark.parametrize("figure", ["accuracy", "few-shot", "ratio-ss"])
def test_the_committed_figures_of_the_study_are_those_of_its_record(figure, more, tmp_path):
    name = f"cifar100_{figure.replace('-', '_')}{more}.svg"
    committed = (ROOT / "experiments" / "figures" / name).read_bytes()
    words = [figure, str(ROOT / "experiments" / "cifar100.jsonl"), *["--dark"] * bool(more)]
    plot.main([*words, "--output", str(tmp_path / "drawn.svg")])
    assert len(committed) < 300_000
    if f"Matplotlib v{matplotlib.__version__}," in committed.decode():  # another version may place text differently
        assert (tmp_path / "drawn.svg").read_bytes() == committed


def test_what_cannot_be_drawn_ends_in_one_line(study, tmp_path, fails):
    assert "no finished run on synthetic" in fails(plot.main, "accuracy", study, "--dataset", "synthetic")
    assert "no method has two values of --label-noise" in fails(plot.main, "label-noise", study)
    assert "log.jsonl" in fails(plot.main, "curves", study)
    (study / "teacher_resnet8_seed0" / "log.jsonl").write_text('{"epoch": 1')
    assert "teacher_resnet8_seed0/log.jsonl" in fails(plot.main, "curves", study / "teacher_resnet8_seed0")
    change(study / "1" / next((study / "1").iterdir()).name / "result.json", seconds=None)
    assert "no seconds" in fails(plot.main, "accuracy", study)
    for file in (tmp_path / "none" / "a.svg", tmp_path / "a.nope"):
        assert str(file) in fails(plot.main, "method", "--output", file)
    assert "no distilled student" in fails(plot.main, "accuracy", study / "teacher_resnet8_seed0")
