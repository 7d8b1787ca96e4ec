"""experiments/published.py against the golden figures, NumPy and methods/crd.py: it computes what the published code
computes, and does the same work for it."""

import random

import numpy as np
import pytest
import torch
from oracle import GOLDEN, Operations, fill, golden_inputs, golden_settings, trajectory_batch
from torch import nn

import methods
import models
from experiments import published
from wrapper import Wrapper

STATISTICS = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=lambda case: f"B{case['batch']}")
def test_terms_gradients_and_kept_rows_equal_the_golden_figures(case):
    tensors, target = golden_inputs(case)
    s_logits, t_logits, s_embedding, t_embedding = (x.requires_grad_() for x in tensors)
    terms = published.terms(*tensors, target, **golden_settings(case))
    expected = [case[name] for name in ("ce", "kd", "tf", "ss")]
    assert [term.item() for term in terms] == pytest.approx(expected, rel=1e-5)
    total = published.total(*terms)
    assert total.item() == pytest.approx(case["total"], rel=1e-5)
    total.backward()
    assert s_logits.grad.norm().item() == pytest.approx(case["grad_logits_l2"], rel=1e-4)
    assert s_embedding.grad.norm().item() == pytest.approx(case["grad_embedding_l2"], rel=1e-4)
    assert t_logits.grad is None and t_embedding.grad is None

    _, rotated = published.split(t_logits)
    assert published.kept(rotated, target.repeat_interleave(3), case["ratio_tf"]).tolist() == case["kept_tf"]
    similarity = published.similarity(t_embedding)
    assert published.kept(similarity, published.positives(similarity), case["ratio_ss"]).tolist() == case["kept_ss"]


def test_both_training_steps_follow_the_golden_trajectories():
    case = GOLDEN["ss_head_trajectory"]
    x, target = trajectory_batch(case)
    x = x.float()  # the figures are float64's, so this agrees up to rounding
    teacher = fill(Wrapper(models.model_dict[case["teacher"]]()), case["fill_base"])
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):  # with this momentum one pass equals all the warm-up passes
            module.momentum = 1 - 0.9 ** case["bn_warmup_passes"]
    with torch.no_grad():
        teacher.train()(x)
    teacher.eval()
    optimizer = published.sgd(teacher.proj_head.parameters())
    for expected in case["steps"]:
        logged = published.step(optimizer, *published.ss_head_loss(teacher, x))
        assert list(logged.values()) == pytest.approx(expected, rel=1e-5)

    case = GOLDEN["student_trajectory"]
    student = fill(Wrapper(models.model_dict[case["student"]]()), case["student_fill_base"]).train()
    optimizer = published.sgd(student.parameters())
    for *terms, total in case["steps"]:
        loss, logged = published.loss(teacher, student, x, target)
        assert loss.item() == pytest.approx(total, rel=1e-4)
        logged = published.step(optimizer, loss, logged)
        assert [logged[f"{name}_loss"] for name in ("ce", "kd", "tf", "ss")] == pytest.approx(terms, rel=5e-4)


def test_a_step_does_the_work_of_the_published_code():
    """The frozen teacher builds a graph, SGD updates one parameter at a time, every logged value is read."""
    torch.manual_seed(0)
    teacher, student = Wrapper(models.model_dict["resnet8"]()).eval(), Wrapper(models.model_dict["resnet8"]())
    x, target, graphs = torch.randn(24, 3, 32, 32), torch.randint(100, (6,)), []
    teacher.backbone.register_forward_hook(lambda module, x, output: graphs.append(output[1].requires_grad))
    with Operations() as seen:
        logged = published.step(published.sgd(student.parameters()), *published.loss(teacher, student, x, target))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    published.ss_head_loss(teacher, x)[0].backward()
    assert all(parameter.grad is None for parameter in teacher.backbone.parameters())
    assert graphs == [True, True]
    assert list(logged) == ["ce_loss", "kd_loss", "tf_loss", "ss_loss", "cls_acc"]
    assert all(isinstance(value, float) for value in logged.values())
    assert {"nonzero", "_local_scalar_dense"} <= seen.names
    assert not any("_foreach" in name or "_fused" in name for name in seen.names)


def test_the_similarity_expands_all_pairs():
    with Operations() as seen:
        published.similarity(torch.randn(24, 64))
    assert seen.largest == 18 * 64 * 6


def test_the_views_of_the_test_set_are_the_four_rotations():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    x, target = next(published.batches(published.Views(pixels, np.arange(5), STATISTICS, train=False), 5))
    assert target.tolist() == [0, 1, 2, 3, 4]
    assert x.dtype == torch.float32 and x.is_contiguous()
    mean, std = np.array(STATISTICS)
    for row, view in enumerate(x.permute(0, 2, 3, 1).numpy()):
        expected = (np.rot90(pixels[row // 4], row % 4) / 255 - mean) / std
        np.testing.assert_allclose(view, expected, atol=1e-5)


def test_the_training_views_of_an_image_share_the_flip_but_not_the_crop():
    torch.manual_seed(0)
    random.seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    views = published.Views(torch.from_numpy(pixels), torch.arange(8), STATISTICS, train=True)
    x, target = next(published.batches(views, 8))
    mean, std = np.array(STATISTICS)
    shown = np.rint((x.permute(0, 2, 3, 1).numpy() * std + mean) * 255)
    found = []
    for i, view in enumerate(shown):
        image = pixels[target[i // 4]]
        padded = [np.pad(np.rot90(x, i % 4), ((4, 4), (4, 4), (0, 0))) for x in (image, image[:, ::-1])]  # black
        windows = np.ndindex(2, 9, 9)
        ((flip, *crop),) = [w for w in windows if (view == padded[w[0]][w[1] :, w[2] :][:32, :32]).all()]
        found.append((flip, tuple(crop)))
    flips, crops = zip(*found, strict=True)
    assert list(flips) == np.repeat(flips[::4], 4).tolist()
    assert set(flips) == {0, 1}
    assert all(len(set(crops[i : i + 4])) > 1 for i in range(0, 32, 4))
    assert {0, 8} <= set(np.ravel(crops).tolist())


def test_the_term_of_crd_its_gradients_and_its_memories_equal_those_of_methods():
    torch.manual_seed(0)
    images, batch = 40, 6
    features = [torch.randn(batch, width, dtype=torch.float64).requires_grad_() for width in (16, 24)]
    outputs = [methods.Outputs([x], None) for x in features]
    ours = methods.METHODS["crd"](*outputs, torch.arange(images) % 4).double()
    theirs = published.CRD(16, 24, images).double()
    embeddings = {name: value for name, value in ours.state_dict().items() if name.startswith("embed")}
    theirs.load_state_dict({"memory_s": ours.bank_s.memory, "memory_t": ours.bank_t.memory} | embeddings)
    for _ in range(3):  # the first sets Z
        rows, negatives = torch.randperm(images)[:batch], torch.randint(images, (batch, 15))
        places = torch.cat([rows[:, None], negatives], 1)
        terms = ours.contrast(*outputs, rows, places), theirs(*features, rows, places)
        torch.testing.assert_close(*terms, rtol=1e-9, atol=0)
        gradients = [torch.autograd.grad(terms[i], [features[0], *(ours, theirs)[i].parameters()]) for i in (0, 1)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)
        memories = (ours.bank_s.memory, ours.bank_t.memory), (theirs.memory_s, theirs.memory_t)
        torch.testing.assert_close(*memories, rtol=1e-9, atol=1e-9)


def test_the_term_of_crd_gathers_a_row_of_the_memory_for_every_negative():
    term, rows = published.CRD(16, 24, 40), torch.arange(6)
    places = torch.cat([rows[:, None], torch.randint(40, (6, 63))], 1)
    with Operations() as seen:
        term(torch.randn(6, 16), torch.randn(6, 24), rows, places).backward()
    assert seen.largest == 6 * 64 * 128
    assert "_local_scalar_dense" in seen.names  # Z
    assert all(parameter.grad.abs().max() > 0 for parameter in term.parameters())
