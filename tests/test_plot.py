"""experiments/plot.py, and the figure of the method that it drew."""

from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT

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
    pixels = matplotlib.image.imread(tmp_path / "method.png")
    assert pixels.shape[:2] == (840, 2000)
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1], :3] == 1).all() and (pixels[..., 3:] == 1).all()
