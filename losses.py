"""The four terms of SSKD as pure functions on tensors (Xu et al., ECCV 2020, section 3).

Every image of a batch of B is seen as V = 4 views, rotated by 0, 90, 180 and 270 degrees, stored view-fastest: rows
0, 4, 8, … of a (4B, …) tensor are the unrotated ("normal") images, the other 3B the rotated ones, three to an image.

Nothing here has a shape that depends on values, and nothing asks the device for a number: a step traces as one graph
and never makes the GPU wait for the host. Half-precision inputs are raised to float32 before any softmax or cosine.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VIEWS = 4


class SSKDTerms(NamedTuple):
    """The unweighted terms of the student's loss (section 3.2, "Learning SSKD"); each a scalar, in nats."""

    ce: Tensor
    kd: Tensor
    tf: Tensor
    ss: Tensor


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_views(x: Tensor) -> tuple[Tensor, Tensor]:
    """(4B, …) → the B unrotated rows and the 3B rotated rows."""
    # split rather than indexed: its gradient is one concatenation, not two tensors of zeros to add up
    unrotated, rotated = x.unflatten(0, (-1, VIEWS)).split([1, VIEWS - 1], dim=1)
    return unrotated.flatten(0, 1), rotated.flatten(0, 1)


def per_rotated(x: Tensor) -> Tensor:
    """(B,) values of the images → (3B,), one for each of their rotated views."""
    return x.unsqueeze(1).expand(-1, VIEWS - 1).flatten()


def own_image(rows: int, device: torch.device) -> Tensor:
    """(3B,): the column of a similarity matrix with `rows` = 3B rows that each rotated view should find."""
    return per_rotated(torch.arange(rows // (VIEWS - 1), device=device))


def similarity_matrix(embedding: Tensor) -> Tensor:
    """Cosine similarity of every rotated view to every unrotated image (section 3.1, the matrix A).

    (4B, D) → (3B, B) in [-1, 1]. One matrix product, not the 3B × D × B tensor of all pairs; lengths are divided out
    of the product, not of the wider embeddings.
    """
    embedding = _full(embedding)
    unrotated, rotated = split_views(embedding)
    length, rotated_length = split_views(torch.linalg.vector_norm(embedding, dim=1).clamp(min=1e-8))
    return rotated @ unrotated.T / (rotated_length.unsqueeze(1) * length)


def selective_mask(scores: Tensor, target: Tensor, ratio: float) -> Tensor:
    """Selective transfer by error-level ranking (section 3.3): the rows whose teacher output is worth imitating.

    A row is correct if `scores` ranks its target first. All correct rows are kept and, of the W wrong ones, the
    int(W · ratio) that rank their target best; equal ranks go to the lower row.

    Args:
        scores: (N, C) teacher logits or similarities. Equal scores rank in the order of their columns.
        target: (N,) true columns.
        ratio: share of the wrong rows that is kept, in [0, 1].

    Returns:
        (N,) bool.
    """
    if ratio == 1:
        return torch.ones_like(target, dtype=torch.bool)
    target = target.unsqueeze(1)
    of_target = scores.gather(1, target)
    before = torch.arange(scores.shape[1], device=scores.device) < target
    rank = torch.where(before, scores >= of_target, scores > of_target).sum(1)  # error level: 0 is correct
    wrong = (rank > 0).sum()
    # W · ratio is Python's product only in float64, which Apple's MPS does not have
    precise = torch.float32 if scores.device.type == "mps" else torch.float64
    kept = len(scores) - wrong + (wrong.to(precise) * ratio).long()
    position = rank.argsort(stable=True).argsort()
    return position < kept


def _kl_rows(s_logits: Tensor, t_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """KL(softmax(teacher / T) ‖ softmax(student / T)) along the last dimension: (…, C), (…, C) → (…)."""
    s_log = F.log_softmax(s_logits / temperature, dim=-1)
    t_log = F.log_softmax(t_logits / temperature, dim=-1)
    return F.kl_div(s_log, t_log, reduction="none", log_target=True).sum(-1)


def _mean_kept(rows: Tensor, kept: Tensor) -> Tensor:
    """Mean of `rows` (N,) where `kept` (N,), 0 if nothing is kept."""
    return torch.where(kept, rows, 0).sum() / kept.sum().clamp(min=1)


def ss_head_loss(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """The contrastive task that trains the teacher's SS head (section 3.1): find your own image in the batch.

    Args:
        embedding: (4B, D) output of the head.

    Returns:
        Cross-entropy of each similarity row against the row's own image (scalar), and the (3B, B) similarities.
    """
    similarity = similarity_matrix(embedding)
    return F.cross_entropy(similarity, own_image(len(similarity), similarity.device)), similarity


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
    """The four unweighted terms of the student's loss (section 3.2).

        ce = cross-entropy of the student on the unrotated images
        kd = T² · KL(teacher ‖ student) of the logits of the unrotated images
        tf = the same on the rotated images ("T-SS"), over the rows that selective transfer keeps
        ss = T² · KL(teacher ‖ student) of softmax(similarity row / T), over the rows that it keeps

    Each KL is summed over its columns and averaged over its (kept) rows; a term with no kept row is 0.

    Args:
        s_logits, t_logits: (4B, C) of student and teacher.
        s_embedding, t_embedding: (4B, D) of their SS heads; the two D may differ.
        target: (B,) labels.
        kd_T, tf_T, ss_T: temperatures, positive.
        ratio_tf, ratio_ss: share of the teacher's wrong rows that is kept, in [0, 1].
    """
    s_logits, t_logits = (_full(logits).unflatten(0, (-1, VIEWS)) for logits in (s_logits, t_logits))  # B x 4 x C
    ce = F.cross_entropy(s_logits[:, 0], target)

    # kd and tf are one divergence, at two temperatures: half the kernels of two
    temperature = s_logits.new_full((VIEWS, 1), tf_T)
    temperature[0] = kd_T
    kl = _kl_rows(s_logits, t_logits, temperature)  # B x 4
    kd = kl[:, 0].mean() * kd_T**2
    kept = selective_mask(t_logits[:, 1:].flatten(0, 1), per_rotated(target), ratio_tf)
    tf = _mean_kept(kl[:, 1:].flatten(), kept) * tf_T**2

    s_similarity, t_similarity = similarity_matrix(s_embedding), similarity_matrix(t_embedding)  # 3B x B
    kept = selective_mask(t_similarity, own_image(len(t_similarity), target.device), ratio_ss)
    ss = _mean_kept(_kl_rows(s_similarity, t_similarity, ss_T), kept) * ss_T**2
    return SSKDTerms(ce, kd, tf, ss)
