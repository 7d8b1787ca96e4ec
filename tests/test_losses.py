"""losses.py against the golden figures, the published pipeline and brute force."""

import math

import numpy as np
import pytest
import torch
from oracle import GOLDEN, Operations, golden_inputs, golden_settings, random_inputs

import losses
from experiments import published


@pytest.fixture(params=GOLDEN["losses"], ids=lambda case: f"B{case['batch']}")
def case(request):
    return request.param


def test_terms_and_their_gradients_equal_the_golden_figures(case):
    (s_logits, t_logits, s_embedding, t_embedding), target = golden_inputs(case)
    s_logits.requires_grad_()
    s_embedding.requires_grad_()
    terms = losses.sskd_terms(s_logits, t_logits, s_embedding, t_embedding, target, **golden_settings(case))
    assert terms._fields == ("ce", "kd", "tf", "ss")
    for name, term in terms._asdict().items():
        assert term.item() == pytest.approx(case[name], rel=1e-5), name
    total = 0.1 * terms.ce + 0.9 * terms.kd + 2.7 * terms.tf + 10.0 * terms.ss
    assert total.item() == pytest.approx(case["total"], rel=1e-5)
    total.backward()
    assert s_logits.grad.norm().item() == pytest.approx(case["grad_logits_l2"], rel=1e-4)
    assert s_embedding.grad.norm().item() == pytest.approx(case["grad_embedding_l2"], rel=1e-4)


@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float32, 1e-4, 1e-6), (torch.float64, 1e-9, 1e-13)])
@pytest.mark.parametrize("seed", range(5))
def test_each_term_and_its_gradients_are_those_of_the_published_pipeline(seed, dtype, rtol, atol):
    settings = {"kd_T": 3.0, "tf_T": 5.0, "ss_T": 0.3, "ratio_tf": 0.4, "ratio_ss": 0.6} if seed % 2 else {}
    found = []
    for terms_of in (published.terms, losses.sskd_terms):
        tensors, target = random_inputs(seed, dtype=dtype)
        learnt = tensors[0].requires_grad_(), tensors[2].requires_grad_()
        terms = terms_of(*tensors, target, **settings)
        gradients = [torch.autograd.grad(x, learnt, retain_graph=True, materialize_grads=True) for x in terms]
        found.append((list(terms), gradients))
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=atol)


def test_selective_transfer_keeps_the_golden_rows(case):
    (_, t_logits, _, t_embedding), target = golden_inputs(case)
    _, rotated = losses.split_views(t_logits)
    kept = losses.selective_mask(rotated, target.repeat_interleave(3), case["ratio_tf"])
    assert kept.nonzero().flatten().tolist() == case["kept_tf"]
    similarity = losses.similarity_matrix(t_embedding)
    kept = losses.selective_mask(similarity, losses.positives(similarity), case["ratio_ss"])
    assert kept.nonzero().flatten().tolist() == case["kept_ss"]


def brute_force_kept(scores, target, ratio):
    """Error-level ranking with Python's own sort and int()."""
    ranks = []
    for row, true in zip(scores.tolist(), target.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda column: (-row[column], column))
        ranks.append(order.index(true))
    wrong = sorted((rank, i) for i, rank in enumerate(ranks) if rank > 0)
    kept = {i for i, rank in enumerate(ranks) if rank == 0} | {i for _, i in wrong[: int(len(wrong) * ratio)]}
    return [i in kept for i in range(len(ranks))]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.29, 0.3, 0.5, 0.7, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_selective_mask_equals_brute_force_even_with_ties(ratio, seed):
    rng = np.random.default_rng(seed)
    rows, columns = [(1, 2), (30, 5), (100, 10), (192, 64)][seed]
    scores = torch.from_numpy(rng.integers(0, 4 if seed % 2 else 1000, (rows, columns)).astype(np.float32))
    target = torch.from_numpy(rng.integers(0, columns, rows))
    assert losses.selective_mask(scores, target, ratio).tolist() == brute_force_kept(scores, target, ratio)


def test_similarity_is_the_cosine_of_each_rotated_view_with_each_normal_view():
    embedding = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.empty((9, 3))
    for i in range(3):
        for view in (1, 2, 3):
            for j in range(3):
                a, b = embedding[4 * i + view].numpy(), embedding[4 * j].numpy()
                expected[3 * i + view - 1, j] = a @ b / math.sqrt((a @ a) * (b @ b))
    np.testing.assert_allclose(losses.similarity_matrix(embedding).numpy(), expected, rtol=1e-12)


def test_ss_head_loss_is_cross_entropy_with_the_positives():
    embedding = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss, similarity = losses.ss_head_loss(embedding)
    rows = similarity.numpy()
    expected = np.mean([np.log(np.exp(rows[r]).sum()) - rows[r, r // 3] for r in range(15)])
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert losses.positives(similarity).tolist() == [r // 3 for r in range(15)]


def test_a_term_without_a_kept_row_is_zero_and_has_no_gradient():
    (s_logits, t_logits, s_embedding, t_embedding), target = random_inputs()
    t_logits[torch.arange(24), target.repeat_interleave(4)] = -100  # the teacher is always wrong
    s_logits.requires_grad_()
    terms = losses.sskd_terms(s_logits, t_logits, s_embedding, t_embedding, target, ratio_tf=0.0)
    assert terms.tf.item() == 0
    terms.tf.backward()
    assert s_logits.grad.abs().max() == 0


def test_a_dropped_row_cannot_spoil_its_term():
    (s_logits, t_logits, s_embedding, t_embedding), target = random_inputs()
    t_logits[torch.arange(24), target.repeat_interleave(4)] = 100
    t_logits[1, target[0]] = -100
    s_logits[1] = math.nan  # the one wrong row, which ratio 0 drops
    terms = losses.sskd_terms(s_logits, t_logits, s_embedding, t_embedding, target, ratio_tf=0.0)
    assert math.isfinite(terms.tf)


def test_half_precision_inputs_are_computed_in_float32():
    half, target = random_inputs(dtype=torch.bfloat16)
    of_half, of_float = losses.sskd_terms(*half, target), losses.sskd_terms(*(x.float() for x in half), target)
    for a, b in zip(of_half, of_float, strict=True):
        assert a.dtype == torch.float32
        assert a.item() == b.item()


def test_the_terms_trace_as_one_graph():
    tensors, target = random_inputs()
    traced = torch.compile(losses.sskd_terms, fullgraph=True, backend="eager")
    for a, b in zip(traced(*tensors, target), losses.sskd_terms(*tensors, target), strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-6)


def test_the_loss_makes_no_tensor_of_all_pairs_and_never_asks_the_device():
    batch, dim = 16, 200
    tensors, target = random_inputs(batch=batch, s_dim=dim, t_dim=dim)
    for x in tensors[0], tensors[2]:
        x.requires_grad_()
    with Operations() as seen:
        sum(losses.sskd_terms(*tensors, target, ratio_tf=0.5)).backward()
    assert seen.largest == 4 * batch * dim  # an embedding; all pairs would be 3 · 16 · 16 · 200
    assert not seen.names & {"_local_scalar_dense", "nonzero", "item", "masked_select"}
