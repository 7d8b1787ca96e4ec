"""The compared methods: one class each, with its adapters, features, weights and first phase.

    method = METHODS["crd"](student, teacher, labels)  # Outputs of one small batch; the labels (N,) of the training set
    loss = ce_weight * ce + kd_weight * kd_loss(...) + method.weight * method(student, teacher, target, rows)

The formulas are those of the code that made CRD's tables (github.com/HobbitLong/RepDistiller, commit b84f547), which
SSKD's tables used too. "Departs" in a docstring says where that code is not the method's own paper.

Features are a network's list with `is_feat=True`: stem, ends of the stages (N, C, H, W), pooled vector (N, D). "Middle
maps" are the ends of the stages. Of two maps of unequal height the larger is averaged down to the smaller.

What whoever trains a method has to know of it, beyond calling it; an attribute that a class lacks means the default:

    weight                        published β; the forward pass returns the unweighted term, a scalar
    ce_weight, kd_weight          published weights of cross-entropy and kd beside it; default 0.1 and 0.9 (SSKD's
                                  tables; CRD's have 1 and 0)
    maps = False                  asks for no maps of the teacher: its last feature and logits are enough; default True
    preact = True                 wants both networks' features with `preact=True`, in every phase; default False
    first_epochs                  length of a first phase: one view of each image, the optimizer of the main phase made
                                  anew, a constant rate; of dkd, which has none, the epochs of its warm-up
    first_loss(student, teacher)  its whole loss, a scalar
    first_student = False         first_loss does not look at the student, whose Outputs may be None; default True
    first_modules(network)        what trains in it, of the method and of the student network
    first_rate(s_arch, lr)        its learning rate, from the student's name and main rate
    main_modules()                what of the method trains in the main phase; default all of it
    choose_pair(t_arch, s_arch)   sets what differs from pair to pair
    start_epoch(seed, epoch)      to be called before the first step of each epoch (from 1) of the main phase

`set_phase` reads the modules: it sets the modes and returns what trains. Everything that a method draws follows from
(seed, epoch, step), and what start_epoch sets is no part of the state dict: a run is resumed at the start of an epoch.
The teacher gets no gradient, except CRD's own embedding of it. Half-precision features are raised to float32. A step
has no shape that depends on values and asks the device for none, so it compiles as one graph.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.negatives import draw_negatives


class Outputs(NamedTuple):
    """What a network gave for a batch: `network(x, is_feat=True)`."""

    features: list[Tensor]
    logits: Tensor


class MethodError(ValueError):
    """The method can't be used with these networks or images; the message says why."""


def set_phase(method: nn.Module, network: nn.Module, first: bool = False) -> nn.ModuleList:
    """Sets method and student network to the modes of a phase and returns the modules that train in it.

    What trains is in train mode. In the first phase all else is in eval mode and stays as it is; in the main phase the
    network trains, and of the method all that `main_modules` does not leave out.
    """
    if first:
        modules = method.first_modules(network)
    else:
        modules = [network, *(method.main_modules() if hasattr(method, "main_modules") else [method])]
    network.eval()
    method.eval()
    return nn.ModuleList(modules).train()


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pair(student: Outputs, teacher: Outputs, index: int) -> tuple[Tensor, Tensor]:
    """Feature `index` of both."""
    return _full(student.features[index]), _full(teacher.features[index]).detach()


def _middle(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """The middle maps of both, as many as the network with fewer has."""
    return [_pair(student, teacher, i) for i in range(1, min(len(student.features), len(teacher.features)) - 1)]


def pool_to_smaller(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (N, C, H, W) of both, the one of larger height averaged down to the other's H × H."""
    height = min(s.shape[2], t.shape[2])

    def pooled(x: Tensor) -> Tensor:
        if x.shape[2] % height:
            return F.adaptive_avg_pool2d(x, height)
        return F.avg_pool2d(x, x.shape[2] // height)  # the same, and with a gradient that repeats bit for bit on CUDA

    s, t = (x if x.shape[2] == height else pooled(x) for x in (s, t))
    return s, t


def unit(x: Tensor, eps: float = 0.0) -> Tensor:
    """x / (|x| + eps) along the last dimension.

    A vector shorter than 1e-12 becomes zero and gets no gradient; the published division by max(|x|, 1e-12) gives such
    a vector a gradient of up to 1e12, the one by |x| NaN.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    some = length > 1e-12
    return torch.where(some, x / torch.where(some, length + eps, 1), 0)


def kd_loss(s_logits: Tensor, t_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), batch mean: (N, C), (N, C) → scalar."""
    s_log = F.log_softmax(_full(s_logits) / temperature, dim=1)
    t_log = F.log_softmax(_full(t_logits).detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(s_log, t_log, reduction="batchmean", log_target=True)


class KD(nn.Module):
    """Knowledge distillation (Hinton et al., 2015): `kd_loss` of the logits (N, C) at T = 4.

    Its weight is 0 because the total already holds this very term, as kd.
    """

    maps = False
    weight = 0.0

    def __init__(self, *_: object):
        super().__init__()

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        return kd_loss(student.logits, teacher.logits)


class Regressor(nn.Module):
    """Convolution and BN that bring a student's map (N, C, H, W) to the teacher's shape.

    Raises:
        MethodError: the student's map is smaller, but not by half.
    """

    def __init__(self, s_map: Tensor, t_map: Tensor):
        super().__init__()
        (s_width, s_height, w), (t_width, t_height, t_w) = s_map.shape[1:], t_map.shape[1:]
        if s_height == 2 * t_height:
            self.conv = nn.Conv2d(s_width, t_width, 3, stride=2, padding=1)
        elif 2 * s_height == t_height:
            self.conv = nn.ConvTranspose2d(s_width, t_width, 4, stride=2, padding=1)
        elif s_height >= t_height:
            self.conv = nn.Conv2d(s_width, t_width, (1 + s_height - t_height, 1 + w - t_w))
        else:
            heights = f"from the student's map of height {s_height} to the teacher's of {t_height}"
            raise MethodError(f"no adapter leads {heights}; choose another method or pair")
        self.bn = nn.BatchNorm2d(t_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class FitNet(nn.Module):
    """Hints (Romero et al., ICLR 2015): mean((ReLU(R(f_s)) − f_t)²), f the map of index 2, R a `Regressor`.

    Departs: one stage beside the cross-entropy, where the paper first trains the student up to the hint. BN and ReLU
    end the regressor, so the negative part of a map that is signed (wrn, MobileNetV2) is out of its reach.
    """

    weight = 100.0
    hint_layer = 2

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__()
        self.regressor = Regressor(student.features[self.hint_layer], teacher.features[self.hint_layer])

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = _pair(student, teacher, self.hint_layer)
        return F.mse_loss(F.relu(self.regressor(s)), t)


def attention(x: Tensor) -> Tensor:
    """q(f) = unit(mean over channels of f²): (N, C, H, W) → (N, HW)."""
    return unit(x.pow(2).mean(1).flatten(1))


class AT(nn.Module):
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017): Σ over the middle maps of mean((q(f_s) − q(f_t))²).

    q is `attention`; the mean is over N · HW. Departs: a mean of squares, not the norm of the difference; hence 1000.
    """

    weight = 1000.0

    def __init__(self, *_: object):
        super().__init__()

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        return sum(self.of_map(*pool_to_smaller(s, t)) for s, t in _middle(student, teacher))

    @staticmethod
    def of_map(s: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(attention(s), attention(t))


class SP(nn.Module):
    """Similarity-preserving (Tung and Mori, ICCV 2019): Σ (G_t − G_s)² / N², G = f fᵀ with rows of unit length.

    f: the last map as (N, CHW); G: (N, N). Departs: the last map only.
    """

    weight = 3000.0

    def __init__(self, *_: object):
        super().__init__()

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = (unit(x.flatten(1) @ x.flatten(1).T) for x in _pair(student, teacher, -2))
        return F.mse_loss(s, t)


class Variational(nn.Module):
    """The Gaussian q(t | s) of VID for one pair of maps: its mean by three 1×1 convolutions, a variance a channel."""

    def __init__(self, s_width: int, t_width: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((t_width,), math.log(math.expm1(5 - 1e-5))))  # variance 5
        self.regressor = nn.Sequential(
            nn.Conv2d(s_width, t_width, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(t_width, t_width, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(t_width, t_width, 1, bias=False),
        )

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        """Mean of −log q(t | s) without its constant: maps (N, C_s, H, H), (N, C_t, H, H) → scalar."""
        variance = (F.softplus(self.log_scale) + 1e-5)[:, None, None]
        return (0.5 * ((self.regressor(s) - t).pow(2) / variance + variance.log())).mean()


class VID(nn.Module):
    """Variational information distillation (Ahn et al., CVPR 2019): Σ over the middle maps of −log q(f_t | f_s).

    Departs: the middle maps only, without logits and embedding; means instead of sums.
    """

    weight = 1.0

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__()
        self.maps = nn.ModuleList(Variational(s.shape[1], t.shape[1]) for s, t in _middle(student, teacher))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        pairs = zip(self.maps, _middle(student, teacher), strict=True)
        return sum(q(*pool_to_smaller(s, t)) for q, (s, t) in pairs)


class RKD(nn.Module):
    """Relational KD (Park et al., CVPR 2019): 25 · distance + 50 · angle, each a smooth L1 of student and teacher.

    Of the pooled vectors (N, D). Means count the degenerate pairs and triples too, as in its authors' code.
    """

    maps = False
    weight = 1.0

    def __init__(self, *_: object):
        super().__init__()

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = _pair(student, teacher, -1)
        distance = F.smooth_l1_loss(self.distances(s), self.distances(t))
        return 25 * distance + 50 * F.smooth_l1_loss(self.angles(s), self.angles(t))

    @staticmethod
    def distances(e: Tensor) -> Tensor:
        """(N, D) → |e_i − e_j| (N, N) over their mean off the diagonal."""
        squares = e.pow(2).sum(1)
        d = (squares[:, None] + squares - 2 * e @ e.T).clamp(min=1e-12).sqrt()  # never 0: its root has a gradient
        d = d.masked_fill(torch.eye(len(e), dtype=torch.bool, device=e.device), 0)
        return d / (d.sum() / max(len(e) * (len(e) - 1), 1)).clamp(min=1e-12)  # one image alone has no distance

    @staticmethod
    def angles(e: Tensor) -> Tensor:
        """(N, D) → cosines (N, N, N) of the angles at e_i between e_j and e_k."""
        directions = unit(e[None] - e[:, None])  # N x N x D, row i starting from e_i
        return directions @ directions.transpose(1, 2)


class PKT(nn.Module):
    """Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018): mean of P_t · log(P_t / P_s), logs + 1e-7.

    P (N, N): the cosines of the pooled vectors, (cosine + 1) / 2, each row divided by its sum. Departs: a mean over N²
    instead of a sum; hence 30000.
    """

    maps = False
    weight = 30000.0

    def __init__(self, *_: object):
        super().__init__()

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = (self.probabilities(f) for f in _pair(student, teacher, -1))
        return (t * ((t + 1e-7) / (s + 1e-7)).log()).mean()

    @staticmethod
    def probabilities(f: Tensor) -> Tensor:
        f = unit(f, eps=1e-7)
        kernel = (f @ f.T + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)


class AB(nn.Module):
    """Activation boundaries (Heo et al., AAAI 2019): the student first learns which of the teacher's neurons are on.

        Σ over the middle maps i < n of 2^(i−n+1) · 3/1000 / N · Σ [(s+1)² · (s > −1, t ≤ 0) + (s−1)² · (s ≤ 1, t > 0)]

    of the maps before their ReLU, the student's through a connector: none for equal shapes, else a `Regressor`. In this
    first phase stem and stages train, and what lies behind them is left as it is. The main phase is cross-entropy and
    kd alone: the term is 0.

    Departs: the connector is a spatial convolution with bias and BN, and unused after the first phase.

    Raises:
        MethodError: the networks have unequal numbers of maps, or a student's map is smaller, but not by half.
    """

    weight = 1.0
    preact = True
    first_epochs = 30

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__()
        if len(student.features) != len(teacher.features):
            maps = f"the student has {len(student.features) - 2} of them, the teacher {len(teacher.features) - 2}"
            raise MethodError(f"ab compares the maps of the stages one by one: {maps}; choose another method or pair")
        self.connectors = nn.ModuleList(
            nn.Identity() if s.shape[1:3] == t.shape[1:3] else Regressor(s, t) for s, t in _middle(student, teacher)
        )

    def first_loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        pairs = zip(self.connectors, _middle(student, teacher), strict=True)
        parts = [self.boundary(connector(s), t) / len(s) * 3 / 1000 for connector, (s, t) in pairs]
        return sum(part * 2.0 ** (i + 1 - len(parts)) for i, part in enumerate(parts))

    @staticmethod
    def boundary(s: Tensor, t: Tensor) -> Tensor:
        """How far s lies from the right side of ±1: maps of one shape → the sum, a scalar."""
        wrongly_on, wrongly_off = (s > -1) & (t <= 0), (s <= 1) & (t > 0)
        return ((s + 1).pow(2) * wrongly_on + (s - 1).pow(2) * wrongly_off).sum()

    def first_modules(self, network: nn.Module) -> list[nn.Module]:
        children = dict(network.named_children())  # in the order of the forward pass, in every network of the zoo
        last_stage = max(i for i, name in enumerate(children) if name.startswith(("layer", "block")))
        return [self.connectors, *list(children.values())[: last_stage + 1]]

    def first_rate(self, s_arch: str, lr: float) -> float:
        return lr

    def main_modules(self) -> list[nn.Module]:
        return []

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        return _full(student.logits).new_zeros(())


def _layer(conv: nn.Module, norm: bool = False) -> list[nn.Module]:
    """Without BN its place is empty: weights keep their published names."""
    return [conv, nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity(), nn.LeakyReLU(0.1)]


def _encoder(width: int, factor: int, norm: bool) -> nn.Sequential:
    """(N, width, H, W) → (N, factor, H, W)."""
    widths = ((width, width), (width, factor), (factor, factor))
    return nn.Sequential(*(part for a, b in widths for part in _layer(nn.Conv2d(a, b, 3, padding=1), norm)))


class Paraphraser(nn.Module):
    """FT's autoencoder of the teacher's map: C → F channels and back."""

    def __init__(self, width: int, factor: int):
        super().__init__()
        self.encoder = _encoder(width, factor, norm=False)
        widths = ((factor, factor), (factor, width), (width, width))
        convs = (nn.ConvTranspose2d(a, b, 3, padding=1) for a, b in widths)
        self.decoder = nn.Sequential(*(part for conv in convs for part in _layer(conv)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class FT(nn.Module):
    """Factor transfer (Kim et al., NeurIPS 2018): mean |q(T(f_s)) − q(P(f_t))|, q as in AT, f the last map.

    P, the encoder of the paraphraser, makes F = C_t / 2 factors of the teacher's map; the autoencoder is trained in the
    first phase by mean((reconstruction − f_t)²), which does not touch the student. T, the translator, is an encoder
    with BN of the student's map, trained with the student.

    Departs: the factors are compared as attention maps, where the paper normalises the whole factor. The paraphraser
    has no BN, and its last layer a LeakyReLU. The first rate hangs on the student's name.
    """

    weight = 200.0
    first_epochs = 30
    first_student = False

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__()
        s, t = _pair(student, teacher, -2)
        factor = t.shape[1] // 2
        self.paraphraser = Paraphraser(t.shape[1], factor)
        self.translator = _encoder(s.shape[1], factor, norm=True)

    def first_loss(self, student: Outputs | None, teacher: Outputs) -> Tensor:
        t = _full(teacher.features[-2]).detach()
        return F.mse_loss(self.paraphraser(t), t)

    def first_modules(self, network: nn.Module) -> list[nn.Module]:
        return [self.paraphraser]

    def first_rate(self, s_arch: str, lr: float) -> float:
        return 0.01 if s_arch.startswith(("resnet", "wrn")) else lr

    def main_modules(self) -> list[nn.Module]:
        return [self.translator]

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = _pair(student, teacher, -2)
        with torch.no_grad():
            t = self.paraphraser.encoder(t)
        return self.factor_loss(*pool_to_smaller(self.translator(s), t))

    @staticmethod
    def factor_loss(s: Tensor, t: Tensor) -> Tensor:
        return F.l1_loss(attention(s), attention(t))


class Bank(nn.Module):
    """One network's embedding of each of the N training images, (N, D), and the constant Z of what is compared with it.

    Starts uniform in ±1/√(D/3), so that rows have about unit length. Z is 0 until the first step sets it.
    """

    def __init__(self, images: int, dim: int):
        super().__init__()
        self.register_buffer("memory", (2 * torch.rand(images, dim) - 1) / math.sqrt(dim / 3))
        self.register_buffer("Z", torch.zeros(()))

    def contrast(self, anchor: Tensor, places: Tensor, temperature: float) -> Tensor:
        """The NCE loss L(p) of CRD: anchors (B, D), places (B, 1 + K) of a positive and K negatives → scalar.

        Its gradient is worked out here: the bank is updated before the backward pass, which needs it as it was.
        """
        with torch.no_grad():
            # all B × N products cost less than gathering B · (1 + K) rows of the bank
            scores = (anchor @ self.memory.T / temperature).gather(1, places).exp()
            images, negatives = len(self.memory), places.shape[1] - 1
            self.Z.copy_(torch.where(self.Z > 0, self.Z, scores.mean() * images))
            positive, negative = (scores / self.Z).split([1, negatives], dim=1)
            noise = negatives / images
            # log(p / (p + c)) and log(noise / (p + c)), c = noise + 1e-7, in the form that float32 can add up
            c = noise + 1e-7
            loss = ((c / positive).log1p().sum() + ((negative + 1e-7) / noise).log1p().sum()) / len(anchor)
            slope = torch.cat([-c / (positive + c), negative / (negative + c)], 1)  # of each log of p, times B
            by_image = anchor.new_zeros(len(anchor), images).scatter_add_(1, places, slope)
            gradient = by_image @ self.memory / (temperature * len(anchor))
        linear = (anchor * gradient).sum()
        return loss + (linear - linear.detach())

    @torch.no_grad()
    def update(self, rows: Tensor, embedding: Tensor) -> None:
        """Rows (B,) ← unit(half the old, half the embedding (B, D))."""
        self.memory.index_copy_(0, rows, unit(0.5 * self.memory[rows] + 0.5 * embedding))


class CRD(nn.Module):
    """Contrastive representation distillation (Tian et al., ICLR 2020): L(p) + L(q), at T = 0.07, K = 16384.

    v, w: linear embeddings (to 128) of the pooled vectors of student and teacher, both trained, of unit length;
    M_s, M_t: banks of them. For each image a positive c_0 (itself) and K negatives c_1 … c_K of other classes:

        p_k = exp(M_t[c_k] · v / T) / Z_1        q_k = exp(M_s[c_k] · w / T) / Z_2
        L(p) = −mean over the batch of [ log(p_0 / (p_0 + K/N)) + Σ_k log((K/N) / (p_k + K/N)) ]

    with 1e-7 added in both denominators and Z = N · mean(exp(…)) of the run's first batch. Then the batch's rows of the
    banks become unit((M + v) / 2).

    Departs: a constant Z, which the paper's h does not have; T as in the code (the paper's text names another).

    Raises:
        MethodError: the training set has one class only.
    """

    maps = False
    weight = 0.8
    dim = 128
    negatives = 16384
    temperature = 0.07

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__()
        images, others = len(labels), len(labels) - int(labels.bincount().max())
        if not others:
            raise MethodError("crd draws negatives of other classes, and the training set has one class only")
        self.replace = self.negatives > others
        self.embed_s = nn.Linear(student.features[-1].shape[1], self.dim)
        self.embed_t = nn.Linear(teacher.features[-1].shape[1], self.dim)
        self.bank_s, self.bank_t = Bank(images, self.dim), Bank(images, self.dim)
        self.register_buffer("labels", labels.clone(), persistent=False)
        self.register_buffer("when", torch.zeros(3, dtype=torch.int64), persistent=False)

    def start_epoch(self, seed: int, epoch: int) -> None:
        self.when.copy_(torch.tensor([seed, epoch, 0]))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        negatives = draw_negatives(self.labels, self.labels[rows], self.negatives, self.replace, self.when)
        self.when[2].add_(1)
        return self.contrast(student, teacher, rows, torch.cat([rows[:, None], negatives], 1))

    def contrast(self, student: Outputs, teacher: Outputs, rows: Tensor, places: Tensor) -> Tensor:
        """The term for given `places` (B, 1 + K), column 0 the positives; updates the banks' `rows` (B,)."""
        s, t = _pair(student, teacher, -1)
        v, w = unit(self.embed_s(s)), unit(self.embed_t(t))
        loss = self.bank_t.contrast(v, places, self.temperature) + self.bank_s.contrast(w, places, self.temperature)
        self.bank_s.update(rows, v)
        self.bank_t.update(rows, w)
        return loss


class DKD(nn.Module):
    """Decoupled KD (Zhao et al., CVPR 2022): T² · (TCKD + β · NCKD), T = 4, times min(epoch / `first_epochs`, 1).

    TCKD: KL of the two probabilities (true class, all others); NCKD: KL over the other classes among themselves; batch
    means, of the logits (N, C). Before `start_epoch` there is no warm-up.
    """

    maps = False
    weight, ce_weight, kd_weight = 1.0, 1.0, 0.0
    temperature = 4.0
    beta = 8.0
    first_epochs = 20
    betas = {
        ("resnet56", "resnet20"): 2.0,
        ("vgg13", "vgg8"): 6.0,
        ("vgg13", "MobileNetV2"): 6.0,
        ("wrn_40_2", "wrn_16_2"): 6.0,
        ("wrn_40_2", "wrn_40_1"): 6.0,
    }

    def __init__(self, *_: object):
        super().__init__()
        self.register_buffer("warm_up", torch.ones(()), persistent=False)

    def choose_pair(self, t_arch: str, s_arch: str) -> None:
        self.beta = self.betas.get((t_arch, s_arch), DKD.beta)

    def start_epoch(self, seed: int, epoch: int) -> None:
        self.warm_up.fill_(min(epoch / self.first_epochs, 1))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        (s_true, s_others), (t_true, t_others) = (
            self.split(_full(x.logits) / self.temperature, target) for x in (student, teacher)
        )
        s_binary, t_binary = (
            torch.stack([true, others.logsumexp(1)], 1) for true, others in ((s_true, s_others), (t_true, t_others))
        )
        loss = kd_loss(s_binary, t_binary, 1.0) + self.beta * kd_loss(s_others, t_others, 1.0)
        return self.warm_up * self.temperature**2 * loss

    @staticmethod
    def split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, C) → those of the true class (N,) and of the others (N, C − 1)."""
        target = target[:, None]
        others = torch.arange(logits.shape[1] - 1, device=logits.device)
        return logits.gather(1, target).squeeze(1), logits.gather(1, others + (others >= target))


class LS(nn.Module):
    """Logit standardisation (Sun et al., CVPR 2024): `kd_loss` at T = 2 of z = (logits − mean) / (std + 1e-7).

    Mean and std (with C − 1) over the classes of a row of the logits (N, C).
    """

    maps = False
    weight, ce_weight, kd_weight = 9.0, 0.1, 0.0

    def __init__(self, *_: object):
        super().__init__()

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = (self.standardise(_full(x.logits)) for x in (student, teacher))
        return kd_loss(s, t, 2.0)

    @staticmethod
    def standardise(logits: Tensor) -> Tensor:
        """As a length: std = |logits − mean| / √(C − 1), which has a gradient where all logits are equal."""
        root = math.sqrt(logits.shape[1] - 1)
        return root * unit(logits - logits.mean(1, keepdim=True), eps=1e-7 * root)


METHODS: dict[str, type] = {
    "kd": KD, "fitnet": FitNet, "at": AT, "sp": SP, "vid": VID, "rkd": RKD, "pkt": PKT, "ab": AB, "ft": FT, "crd": CRD,
    "dkd": DKD, "ls": LS,
}  # fmt: skip
