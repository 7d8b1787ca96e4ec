"""bench.py: the published baseline does the same work, and the rows are what the manual says."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bench
import utils

PAIR = "resnet8:resnet8"
TINY = bench.Plan(
    torch.device("cpu"), batch=4, images=16, seconds=0, least=1, ss_batches=5, widths=(8, 16), batches=(2, 4), side=32
)


def test_unequal_work_is_refused(monkeypatch):
    bench.check_pair(PAIR)
    monkeypatch.setattr(bench, "published_kl", lambda s, t, T: (s - t).square().mean())
    with pytest.raises(utils.Fault, match="unequal work"):
        bench.check_pair(PAIR)


def test_a_run_writes_every_figure_as_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *args, **kwargs: ThreadPoolExecutor(1))
    monkeypatch.setattr(bench, "Plan", lambda *args, **kwargs: TINY)
    bench.main(["--pairs", PAIR, "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows:
        assert list(row) == ["figure", "pair", "amp", "published", "here", "ratio"]
        assert isinstance(row["here"], float)
        if row["figure"] not in ("batch_scaling", "overhead") and row["here"] > 0:
            assert row["ratio"] == pytest.approx(row["published"] / row["here"])
    found = {(row["figure"], row["pair"], row["amp"]) for row in rows}
    figures = "views loss teacher_forward student_forward_backward student_step overhead peak_share ss_epoch"
    assert {(figure, PAIR, "off") for figure in [*figures.split(), "peak_memory"]} <= found
    assert {("loss", "D8", "off"), ("batch_scaling", f"{PAIR} B4", "off")} <= found
    printed = capsys.readouterr().out
    assert "threads, PyTorch" in printed
    assert len(printed.splitlines()) == 2 + len(rows)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_concerns_this_repository_alone(amp):
    side = bench.here_side(TINY._replace(amp=amp), PAIR, bench.make_images(16, TINY.device))
    side["student_step"]()
    side["ss_features"]()
    side["ss_epoch"]()
    side["loss"]()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pairs", "resnet8"], "no such network|missing"),
        (["--pairs", "resnet8:nothing"], "no such network"),
        (["--device", "nonsense"], "nonsense|device"),
        (["--json", "/nowhere/at/all.json"], "folder does not exist"),
        (["--amp", "fp8"], "invalid choice"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert re.search(message, error)
