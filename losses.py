"""The four terms of SSKD as pure functions on tensors (Xu et al., ECCV 2020; numbers of equations: arXiv 2006.07114).

    L = λ1 L_ce + λ2 L_kd + λ3 L_ss + λ4 L_T        (eq. 8; L_T is called tf here)

Each of a batch's B images is seen as 4 views: a `normal` one and three `rotated` by 90, 180 and 270 degrees. Tensors
are (4B, …) with the view fastest: rows 0, 4, 8, … are the normal views. The positive of a rotated view is the normal
view of its own image.

No shape depends on values and nothing asks the device for a number: a step traces as one graph, and the GPU never
waits for the host. Half-precision inputs are raised to float32 first; float64 stays.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VIEWS = 4


class SSKDTerms(NamedTuple):
    """The terms of eq. 8 without their weights λ, in the order λ1, λ2, λ4, λ3; each a scalar, in nats."""

    ce: Tensor
    kd: Tensor
    tf: Tensor
    ss: Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_views(x: Tensor) -> tuple[Tensor, Tensor]:
    """(4B, …) → normal (B, …), rotated (3B, …)."""
    # split rather than indexed: its gradient is one concatenation, not two tensors of zeros to add up
    normal, rotated = x.unflatten(0, (-1, VIEWS)).split([1, VIEWS - 1], dim=1)
    return normal.flatten(0, 1), rotated.flatten(0, 1)


def similarity_matrix(embedding: Tensor) -> Tensor:
    """Cosine similarity of every rotated view with every normal view (section 3.1, the matrix A).

    (4B, D) → (3B, B) in [-1, 1]. One matrix product, not the 3B × D × B tensor of all pairs. It is divided by the
    lengths afterwards, which is cheaper than normalising the wider embeddings.
    """
    embedding = at_least_float32(embedding)
    normal, rotated = split_views(embedding)
    normal_length, rotated_length = split_views(torch.linalg.vector_norm(embedding, dim=1).clamp(min=1e-8))
    return rotated @ normal.T / (rotated_length.unsqueeze(1) * normal_length)


def positives(similarity: Tensor) -> Tensor:
    """The column of each rotated view's positive in a similarity matrix: (3B, B) → (3B,), which is 0, 0, 0, 1, 1, …"""
    return torch.arange(similarity.shape[1], device=similarity.device).repeat_interleave(VIEWS - 1)


def selective_mask(scores: Tensor, target: Tensor, ratio: float) -> Tensor:
    """Selective transfer by error-level ranking (section 3.3): the rows whose teacher output is worth imitating.

    A row is correct if `scores` ranks its target first. All correct rows are kept and, of the W wrong ones, the
    int(W · ratio) that rank their target best; equal ranks go to the lower row.

    Args:
        scores: (N, C) logits or similarities of the teacher. Equal scores rank in the order of their columns.
        target: (N,) true columns: labels or positives.
        ratio: share of the wrong rows that is kept, in [0, 1]: the paper's k.

    Returns:
        (N,) bool.
    """
    if ratio == 1:
        return torch.ones_like(target, dtype=torch.bool)
    target = target.unsqueeze(1)
    of_target = scores.gather(1, target)
    before = torch.arange(scores.shape[1], device=scores.device) < target
    rank = torch.where(before, scores >= of_target, scores > of_target).sum(1)  # the error level: 0 is correct
    wrong = (rank > 0).sum()
    # float64, so that int(W · ratio) is the number that Python would give; Apple's MPS has float32 only
    precise = torch.float32 if scores.device.type == "mps" else torch.float64
    count = len(scores) - wrong + (wrong.to(precise) * ratio).long()
    place = rank.argsort(stable=True).argsort()  # of each row, best rank first
    return place < count


def _kl_rows(s_logits: Tensor, t_logits: Tensor, T: float) -> Tensor:
    """KL(teacher ‖ student) of each row's softmax(logits / T): (N, C), (N, C) → (N,)."""
    s_log, t_log = F.log_softmax(s_logits / T, dim=1), F.log_softmax(t_logits / T, dim=1)
    return F.kl_div(s_log, t_log, reduction="none", log_target=True).sum(1)


def _mean_kept(rows: Tensor, kept: Tensor) -> Tensor:
    """Mean of `rows` (N,) where `kept` (N,), 0 if nothing is kept."""
    return torch.where(kept, rows, 0).sum() / kept.sum().clamp(min=1)


def ss_head_loss(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """The contrastive task of the teacher's SS head (section 3.1, eq. 5): find each rotated view's positive.

    It trains the head alone: the features come to it without a graph (Wrapper's `bb_grad=False`), so gradients stop.

    Args:
        embedding: (4B, D) output of the head.

    Returns:
        Cross-entropy of the similarity rows with their positives (a scalar; no temperature), and the similarities.
    """
    similarity = similarity_matrix(embedding)
    return F.cross_entropy(similarity, positives(similarity)), similarity


def sskd_terms(
    s_logits: Tensor,
    t_logits: Tensor,
    s_embedding: Tensor,
    t_embedding: Tensor,
    target: Tensor,
    *,
    kd_T: float = 4.0,
    tf_T: float = 4.0,
    ss_T: float = 0.5,
    ratio_tf: float = 1.0,
    ratio_ss: float = 0.75,
) -> SSKDTerms:
    """The four unweighted terms of the student's loss (section 3.2; selective transfer, section 3.3).

        λ1 L_ce  ce = cross-entropy of the student's logits of normal views with the labels
        λ2 L_kd  kd = T² · KL(teacher ‖ student) of the logits of normal views
        λ4 L_T   tf = T² · KL(teacher ‖ student) of the logits of rotated views; rows kept by selective transfer
        λ3 L_ss  ss = T² · KL(teacher ‖ student) of the similarity matrix; rows kept by selective transfer

    KL compares softmax(row / T): summed over the columns, averaged over the (kept) rows, 0 if no row is kept.
    Gradients reach the student, its SS head included; the teacher's tensors come without a graph.

    Args:
        s_logits, t_logits: (4B, C) of student and teacher.
        s_embedding, t_embedding: (4B, D) of their SS heads; the two D may differ.
        target: (B,) labels.
        kd_T, tf_T, ss_T: temperatures, positive.
        ratio_tf, ratio_ss: share of the teacher's wrong rows that is kept, in [0, 1].
    """
    s_normal, s_rotated = split_views(at_least_float32(s_logits))  # B x C, 3B x C
    t_normal, t_rotated = split_views(at_least_float32(t_logits))
    s_similarity, t_similarity = similarity_matrix(s_embedding), similarity_matrix(t_embedding)  # 3B x B

    ce = F.cross_entropy(s_normal, target)
    kd = kd_T**2 * _kl_rows(s_normal, t_normal, kd_T).mean()
    kept = selective_mask(t_rotated, target.repeat_interleave(VIEWS - 1), ratio_tf)
    tf = tf_T**2 * _mean_kept(_kl_rows(s_rotated, t_rotated, tf_T), kept)
    kept = selective_mask(t_similarity, positives(t_similarity), ratio_ss)
    ss = ss_T**2 * _mean_kept(_kl_rows(s_similarity, t_similarity, ss_T), kept)
    return SSKDTerms(ce, kd, tf, ss)
