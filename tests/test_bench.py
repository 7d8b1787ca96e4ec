"""bench.py: the published baseline does the same work, and the rows are what the manual says."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import GOLDEN
from test_losses import golden_inputs

import bench
import cifar
import losses
import utils

PAIR = "resnet8:resnet8"
TINY = bench.Plan(
    torch.device("cpu"), batch=4, images=16, seconds=0, least=1, ss_batches=5, widths=(8, 16), batches=(2, 4), side=32
)


def outputs(seed=0, batch=6, width=16):
    """Logits of student and teacher, embeddings of both, labels; half of the teacher's rows are right."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(4 * batch, columns, generator=generator) for columns in (10, 10, width, width)]
    target = torch.randint(10, (batch,), generator=generator)
    tensors[1][torch.arange(0, 4 * batch, 2), target.repeat_interleave(2)] += 6
    tensors[3] = tensors[3] + torch.rand(4 * batch, 1, generator=generator) * 2 * tensors[3][::4].repeat_interleave(
        4, 0
    )
    return tensors, target


@pytest.mark.parametrize("seed", range(5))
def test_the_published_terms_and_gradients_equal_those_of_losses(seed):
    tensors, target = outputs(seed)
    found = []
    for terms_of in (bench.published_terms, losses.sskd_terms):
        inputs = [x.clone().requires_grad_() for x in tensors]
        terms = terms_of(*inputs, target)
        bench.total(terms).backward()
        assert inputs[1].grad is None or terms_of is losses.sskd_terms  # the teacher's graph ends in a detach
        found.append([*terms, inputs[0].grad, inputs[2].grad])
    for published, here in zip(*found, strict=True):
        torch.testing.assert_close(published, here, rtol=1e-4, atol=1e-6)


def test_the_published_terms_equal_the_golden_figures():
    case = next(c for c in GOLDEN["losses"] if (c["kd_T"], c["tf_T"], c["ss_T"], c["ratio_ss"]) == (4, 4, 0.5, 0.75))
    inputs, target = golden_inputs(case)
    terms = bench.published_terms(*inputs, target)
    for name, term in terms._asdict().items():
        assert term.item() == pytest.approx(case[name], rel=1e-5), name


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 1.0])
def test_the_published_rows_kept_are_those_of_losses(ratio):
    for seed in range(5):
        (_, scores, _, _), target = outputs(seed)
        target = target.repeat_interleave(4)
        kept = losses.selective_mask(scores, target, ratio)
        assert bench.published_kept(scores, target, ratio).tolist() == kept.nonzero().flatten().tolist()


def test_the_published_ss_loss_equals_that_of_losses():
    embedding = outputs()[0][3]
    loss, logged = bench.published_ss_loss(embedding)
    expected, similarity = losses.ss_head_loss(embedding)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(bench.published_similarity(embedding), similarity)
    own = losses.own_image(len(similarity), similarity.device)
    assert logged["ss_acc"] == utils.accuracy(similarity, own)


def test_the_published_views_share_their_flip_and_are_rotations():
    images = bench.make_images(8, TINY.device)
    x, target = next(bench.published_batches(images, 8, train=False))
    expected, labels = next(images.test_batches(8, 4))
    assert x.shape == (32, 3, 32, 32)
    assert x.is_contiguous()
    torch.testing.assert_close(x, expected.contiguous(), rtol=0, atol=1e-5)
    assert torch.equal(target, labels)

    # an image that tells left from right: whichever crop, flipped views rise towards the left
    ramp = torch.arange(32, dtype=torch.uint8).mul(4).add(100).view(1, 1, 32, 1).expand(40, 32, 32, 3).contiguous()
    images = cifar.Images(ramp, torch.zeros(40, dtype=torch.long), bench.STATISTICS, "cpu")
    x, _ = next(bench.published_batches(images, 40))
    upright = torch.stack([torch.rot90(view, -k, (2, 3)) for k, view in enumerate(x.view(40, 4, 3, 32, 32).unbind(1))])
    flipped = upright[:, :, 0, 16, 20] < upright[:, :, 0, 16, 10]
    assert torch.equal(flipped.all(0), flipped.any(0))  # the four views of an image agree …
    assert 0 < flipped[0].sum() < 40  # … and images differ


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
