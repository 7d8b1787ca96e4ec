"""Methods that compare how the images of a batch relate to each other: SP, RKD, PKT."""

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import Method, Outputs, feature_pair, unit


class SP(Method):
    """Similarity-preserving KD (Tung and Mori, ICCV 2019): Σ (G_t − G_s)² / N², G = f fᵀ with rows of unit length.

    f is the last map as (N, CHW); G is (N, N). Departs: only the last map is compared.
    """

    label = "SP"
    least_features = 2
    weight = 3000.0

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = (unit(x.flatten(1) @ x.flatten(1).T) for x in feature_pair(student, teacher, -2))
        return F.mse_loss(s, t)


class RKD(Method):
    """Relational KD (Park et al., CVPR 2019): 25 · distance + 50 · angle, each a smooth L1 of student and teacher.

    Distances and angles are those between pooled vectors (N, D). As in the authors' code, the means include the pairs
    and triples in which an image occurs twice.
    """

    label = "RKD"
    weight = 1.0
    maps = False

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = feature_pair(student, teacher, -1)
        distance = F.smooth_l1_loss(self.distances(s), self.distances(t))
        return 25 * distance + 50 * F.smooth_l1_loss(self.angles(s), self.angles(t))

    @staticmethod
    def distances(e: Tensor) -> Tensor:
        """(N, D) → |e_i − e_j| (N, N), divided by their mean off the diagonal."""
        squares = e.pow(2).sum(1)
        d = (squares[:, None] + squares - 2 * e @ e.T).clamp(min=1e-12).sqrt()  # above 0 its gradient is finite
        d = d.masked_fill(torch.eye(len(e), dtype=torch.bool, device=e.device), 0)
        return d / (d.sum() / max(len(e) * (len(e) - 1), 1)).clamp(min=1e-12)  # a single image has no distances

    @staticmethod
    def angles(e: Tensor) -> Tensor:
        """(N, D) → cosines (N, N, N) of the angles at e_i between e_j and e_k."""
        directions = unit(e[None] - e[:, None])  # N x N x D; block i holds the directions from e_i
        return directions @ directions.transpose(1, 2)


class PKT(Method):
    """Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018): mean of P_t · log((P_t + ε) / (P_s + ε)).

    P (N, N) holds (cosine + 1) / 2 of the pooled vectors, each row divided by its sum; ε = 1e-7. Departs: a mean over
    N² replaces the sum; hence the weight of 30000.
    """

    label = "PKT"
    weight = 30000.0
    maps = False

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = (self.probabilities(f) for f in feature_pair(student, teacher, -1))
        return (t * ((t + 1e-7) / (s + 1e-7)).log()).mean()

    @staticmethod
    def probabilities(f: Tensor) -> Tensor:
        """(N, D) → P (N, N)."""
        f = unit(f, eps=1e-7)
        kernel = (f @ f.T + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)
