"""CRD, which contrasts each image with many others through banks of embeddings."""

import math

import torch
from torch import Tensor, nn

from harness.flags import UserError
from methods.base import Method, Outputs, feature_pair, unit
from methods.negatives import draw_negatives


class Bank(nn.Module):
    """One network's embedding of each of the N training images, (N, D), and the normaliser Z of its products.

    The embeddings start uniform in ±1/√(D/3), so that rows have about unit length. The first step sets Z, which is 0
    until then.
    """

    def __init__(self, images: int, dim: int):
        super().__init__()
        self.register_buffer("memory", (2 * torch.rand(images, dim) - 1) / math.sqrt(dim / 3))
        self.register_buffer("Z", torch.zeros(()))

    def contrast(self, anchor: Tensor, places: Tensor, temperature: float) -> Tensor:
        """The NCE loss L(p) of CRD: anchors (B, D), places (B, 1 + K) of a positive and K negatives → scalar.

        The gradient is computed here and not by autograd, because the bank is updated before the backward pass.
        """
        with torch.no_grad():
            # computing all B × N products is cheaper than gathering B · (1 + K) rows of the bank
            scores = (anchor @ self.memory.T / temperature).gather(1, places).exp()
            images, negatives = len(self.memory), places.shape[1] - 1
            self.Z.copy_(torch.where(self.Z > 0, self.Z, scores.mean() * images))
            positive, negative = (scores / self.Z).split([1, negatives], dim=1)
            noise = negatives / images
            # log(p / (p + c)) and log(noise / (p + c)) with c = noise + 1e-7, in a form that is precise in float32
            c = noise + 1e-7
            loss = ((c / positive).log1p().sum() + ((negative + 1e-7) / noise).log1p().sum()) / len(anchor)
            # the derivative of B · loss by the logarithm of each p
            slope = torch.cat([-c / (positive + c), negative / (negative + c)], 1)
            by_image = anchor.new_zeros(len(anchor), images).scatter_add_(1, places, slope)
            gradient = by_image @ self.memory / (temperature * len(anchor))
        linear = (anchor * gradient).sum()
        return loss + (linear - linear.detach())  # the value of `loss` with `gradient` as its gradient

    @torch.no_grad()
    def update(self, rows: Tensor, embedding: Tensor) -> None:
        """Rows (B,) of the bank become unit(half the old row + half the embedding (B, D))."""
        self.memory.index_copy_(0, rows, unit(0.5 * self.memory[rows] + 0.5 * embedding))


class CRD(Method):
    """Contrastive representation distillation (Tian et al., ICLR 2020): L(p) + L(q), with T = 0.07 and K = 16384.

    v and w are linear embeddings, of unit length, of the pooled vectors of student and teacher; both embeddings train.
    M_s and M_t are banks of them. Each image has a positive c_0 (itself) and K negatives c_1 … c_K of other classes:

        p_k = exp(M_t[c_k] · v / T) / Z_1        q_k = exp(M_s[c_k] · w / T) / Z_2
        L(p) = −mean over the batch of [ log(p_0 / (p_0 + K/N)) + Σ_k log((K/N) / (p_k + K/N)) ]

    Both denominators have 1e-7 added. Z = N · mean(exp(…)) of the run's first batch. After each step the batch's rows
    of the banks become unit((M + v) / 2), for the teacher's bank with w in place of v.

    Departs: the paper's h has no constant Z; T is the code's (the paper's text gives another one).

    Raises:
        UserError: the training set has one class only.
    """

    label = "CRD"
    weight = 0.8
    maps = False
    dim = 128
    negatives = 16384
    temperature = 0.07

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__(student, teacher, labels)
        images, others = len(labels), len(labels) - int(labels.bincount().max())
        if not others:
            raise UserError("crd draws negatives from other classes, but the training set has one class only")
        self.replace = self.negatives > others
        self.embed_s = nn.Linear(student.features[-1].shape[1], self.dim)
        self.embed_t = nn.Linear(teacher.features[-1].shape[1], self.dim)
        self.bank_s, self.bank_t = Bank(images, self.dim), Bank(images, self.dim)
        self.register_buffer("labels", labels.clone(), persistent=False)
        self.register_buffer("when", torch.zeros(3, dtype=torch.int64), persistent=False)  # seed, epoch, step

    def start_epoch(self, seed: int, epoch: int) -> None:
        self.when.copy_(torch.tensor([seed, epoch, 0]))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        negatives = draw_negatives(self.labels, self.labels[rows], self.negatives, self.replace, self.when)
        self.when[2].add_(1)
        return self.contrast(student, teacher, rows, torch.cat([rows[:, None], negatives], 1))

    def contrast(self, student: Outputs, teacher: Outputs, rows: Tensor, places: Tensor) -> Tensor:
        """The term for given `places` (B, 1 + K), column 0 the positives; updates `rows` (B,) of the banks."""
        s, t = feature_pair(student, teacher, -1)
        v, w = unit(self.embed_s(s)), unit(self.embed_t(t))
        loss = self.bank_t.contrast(v, places, self.temperature) + self.bank_s.contrast(w, places, self.temperature)
        self.bank_s.update(rows, v)
        self.bank_t.update(rows, w)
        return loss
