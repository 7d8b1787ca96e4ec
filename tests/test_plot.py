"""experiments/plot.py."""

import json

import numpy as np
import pytest
from recorded import PLAIN, TF, change, write_network, write_student

matplotlib = pytest.importorskip("matplotlib")
from experiments import plot  # noqa: E402 (once matplotlib is known to be there)

PAIR = ("resnet20", "resnet8")
SEEDS = ((0, 0.0), (1, 1.5))  # and what each adds to an accuracy
DEVIATION = np.std([0, 1.5], ddof=1)


@pytest.fixture
def study(tmp_path):
    """Two seeds of KD, KD + tf and SSKD: with some or all images, with two shares of wrong matches."""
    root = tmp_path / "runs"
    for seed, more in SEEDS:
        for few, less in ((1.0, 0), (0.25, 20)):
            write_student(root, PAIR, 60 + more - less, 50, seed, few_shot=few, **PLAIN)
            write_student(root, PAIR, 62 + more - less, 50, seed, few_shot=few)
        write_student(root, PAIR, 61 + more, 50, seed, **TF)
        write_student(root, PAIR, 59 + more, 50, seed, ratio_ss=0.25)
        write_student(root, PAIR, 63 + more, 50, seed, method="kd", weight=0.0)
        write_network(root, "resnet20", 70, 69, seed)
        write_network(root, "resnet8", 55, 54, seed)
    return root


def figure_of(*words):
    return plot.draw(plot.parse_args([str(word) for word in words]))


def test_accuracy_has_a_row_for_each_method_of_the_setting_with_most_methods_the_best_at_the_top(study):
    figure = figure_of("accuracy", study)
    (ax,) = figure.axes
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == ["resnet8 alone", "SSKD --ratio-ss 0.25", "KD, 4 views", "KD + tf", "SSKD", "KD"]
    bars = [container[2][0].get_segments()[0] for container in ax.containers]
    for y, (bar, best) in enumerate(zip(bars, (55, 59.75, 60.75, 61.75, 62.75, 63.75), strict=True)):
        half = DEVIATION if best != 55 else 0
        assert bar == pytest.approx(np.array([[best - half, y], [best + half, y]]))
    colours = dict(zip(labels, (tick.get_color() for tick in ax.get_yticklabels()), strict=True))
    assert len({colours["SSKD"], colours["KD"], colours["KD + tf"]}) == 3
    assert "2 seeds" in ax.get_xlabel()
    assert figure.get_suptitle() == "resnet20 → resnet8, cifar100"


def test_flags_that_all_rows_share_stand_below_and_published_ones_nowhere(tmp_path):
    for method, ce, kd, weight in (("dkd", 1.0, 0.0, 1.0), ("kd", 0.1, 0.9, 0.0), ("kd", 0.4, 3.6, 0.0)):
        flags = {"method": method, "ce_weight": ce, "kd_weight": kd, "weight": weight}
        write_student(tmp_path, PAIR, 50 - weight - ce, 40, epoch=8, **flags)
    write_student(tmp_path, PAIR, 60, 40, epoch=8, t_epoch=2)
    figure = figure_of("accuracy", tmp_path)
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == ["DKD", "KD --ce-weight 0.4 --kd-weight 3.6", "KD", "SSKD"]
    assert figure.get_supxlabel() == "--amp off --epoch 8 --t-epoch 2"


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("few-shot", {"KD, 4 views": ([25, 100], [40.75, 60.75]), "SSKD": ([25, 100], [42.75, 62.75])}),
        (
            "ratio-ss",  # beside the levels without the term
            {
                "SSKD": ([25, 75], [59.75, 62.75]),
                "KD + tf": ([25, 75], [61.75, 61.75]),
                "KD, 4 views": ([25, 75], [60.75, 60.75]),
            },
        ),
    ],
)
def test_accuracy_by_a_flag_is_a_line_for_each_method(study, flag, expected):
    (ax,) = figure_of(flag, study).axes
    lines = {bars.get_label(): (bars[0].get_xdata().tolist(), bars[0].get_ydata().tolist()) for bars in ax.containers}
    assert lines == expected


def test_settings_that_differ_in_another_flag_have_panels_of_their_own(study):
    for few in (1.0, 0.25):
        write_student(study, PAIR, 30, 20, few_shot=few, epoch=8)
    titles = [ax.get_title(loc="left") for ax in figure_of("few-shot", study).axes]
    assert titles == ["resnet20 → resnet8  --epoch 8", "resnet20 → resnet8  --epoch 240"]


def test_curves_are_the_accuracies_of_the_log_and_held_out_images_are_named(tmp_path):
    head = {"phase": "ss_head", "epoch": 1, "val/teacher_ssp_acc": 3.0}
    expected = {"resnet8, KD, 4 views": [10, 20, 30], "resnet8, SSKD, held-out images": [12, 25, 33]}
    for flags, accuracies in zip((PLAIN, {"val_fraction": 0.1}), expected.values(), strict=True):
        folder = write_student(tmp_path, PAIR, 50, 49, **flags)
        lines = [{"phase": "student", "epoch": i, "val/cls_acc": acc} for i, acc in enumerate(accuracies, 1)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))
    change(folder / "result.json", test_acc=49)
    (ax,) = figure_of("curves", tmp_path).axes
    found = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.get_lines()}
    assert found == {label: ([1, 2, 3], accuracies) for label, accuracies in expected.items()}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "accuracy (%)")


def test_curves_draw_runs_in_progress_on_whatever_data_set_they_are(tmp_path, capsys):
    runs = ("resnet20", "synthetic", [10, 20]), ("resnet8", "folder", [5]), ("vgg8", "folder", [])
    for arch, dataset, accuracies in runs:
        run = write_network(tmp_path, arch, 50, 49, dataset=dataset)
        lines = [{"phase": "teacher", "epoch": i, "val/cls_acc": acc} for i, acc in enumerate(accuracies, 1)]
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if arch != "resnet20":
            (run / "result.json").unlink()
    (ax,) = figure_of("curves", tmp_path).axes
    found = {line.get_label(): line.get_ydata().tolist() for line in ax.get_lines()}
    assert found == {"resnet20, alone, synthetic": [10, 20], "resnet8, alone, folder": [5]}
    (line,) = capsys.readouterr().err.splitlines()
    assert "teacher_vgg8_seed0 left out" in line  # it has no epoch yet
    (ax,) = figure_of("curves", tmp_path / "teacher_resnet8_seed0").axes
    assert [line.get_label() for line in ax.get_lines()] == ["resnet8, alone"]


def test_the_data_set_is_that_of_the_runs_and_the_file_is_named_and_not_among_the_tracked_figures(tmp_path, capsys):
    for seed, more in SEEDS:
        write_student(tmp_path, PAIR, 60 + more, 50, seed, dataset="cifar10")
    assert "cifar10" in figure_of("accuracy", tmp_path).get_suptitle()
    assert "figures" not in plot.parse_args(["accuracy", str(tmp_path)]).output.parts
    plot.main(["accuracy", str(tmp_path), "--output", str(tmp_path / "a.svg")])
    assert capsys.readouterr().out == f"{tmp_path / 'a.svg'} is written\n"


def test_a_figure_has_a_white_background_and_the_format_of_its_suffix(study, tmp_path):
    with matplotlib.rc_context({"axes.facecolor": "black", "savefig.facecolor": "black"}):  # the reader's own settings
        plot.main(["ratio-ss", str(study), "--output", str(tmp_path / "a.png")])
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()
    plot.main(["ratio-ss", str(study), "--output", str(tmp_path / "a.svg")])
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_what_cannot_be_drawn_ends_in_one_line(study, tmp_path, fails):
    alone = study / "teacher_resnet8_seed0"
    (alone / "log.jsonl").write_text('{"epoch": 1')
    for words, message in [
        (["accuracy", study, "--dataset", "synthetic"], "no finished run on synthetic"),
        (["accuracy", alone], "no distilled student"),
        (["label-noise", study], "no method has two values of --label-noise"),
        (["curves", alone], "teacher_resnet8_seed0/log.jsonl"),
        (["ratio-ss", study, "--output", tmp_path / "none" / "a.svg"], "none"),
        (["ratio-ss", study, "--output", tmp_path / "a.nope"], "nope"),
    ]:
        assert message in fails(plot.main, *words)
