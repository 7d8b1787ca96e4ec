"""Methods with a first phase before the main phase: AB, FT.

The first phase sees one view of each image. It has an optimizer of its own and a constant learning rate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.flags import UserError
from methods.base import Method, Outputs, at_least_float32, feature_pair, middle_maps
from methods.maps import Regressor, attention, pool_to_smaller


class AB(Method):
    """Activation boundaries (Heo et al., AAAI 2019): the student first learns which of the teacher's neurons are on.

        Σ over the middle maps i < n of 2^(i−n+1) · 3/1000 / N · Σ [(s+1)² · (s > −1, t ≤ 0) + (s−1)² · (s ≤ 1, t > 0)]

    s and t are the maps before their ReLU. The student's goes through a connector: the identity if the shapes are
    equal, else a `Regressor`. This first phase trains the student's stem and stages and leaves the layers behind them
    unchanged. The main phase is cross-entropy and kd alone: there the term is 0.

    Departs: the connector is a spatial convolution with bias and BN, and the main phase does not use it.

    Raises:
        UserError: the networks have different numbers of maps, or a student's map is smaller, but not by half.
            `first_modules`: the student's stages can't be told by their names.
    """

    label = "AB"
    weight = 1.0
    preact = True
    first_phase = True
    first_epochs = 30

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__(student, teacher, labels)
        if len(student.features) != len(teacher.features):
            maps = f"the student has {len(student.features) - 2} of them, the teacher {len(teacher.features) - 2}"
            raise UserError(f"ab compares the maps of the stages in pairs: {maps}; choose another method or pair")
        self.connectors = nn.ModuleList(
            nn.Identity() if s.shape[1:3] == t.shape[1:3] else Regressor(s, t) for s, t in middle_maps(student, teacher)
        )

    def first_loss(self, student: Outputs | None, teacher: Outputs) -> Tensor:
        pairs = zip(self.connectors, middle_maps(student, teacher), strict=True)
        parts = [self.boundary(connector(s), t) / len(s) * 3 / 1000 for connector, (s, t) in pairs]
        return sum(part * 2.0 ** (i + 1 - len(parts)) for i, part in enumerate(parts))

    @staticmethod
    def boundary(s: Tensor, t: Tensor) -> Tensor:
        """The inner sum of the formula: two maps (N, C, H, W) of one shape → scalar."""
        wrongly_on, wrongly_off = (s > -1) & (t <= 0), (s <= 1) & (t > 0)
        return ((s + 1).pow(2) * wrongly_on + (s - 1).pow(2) * wrongly_off).sum()

    def first_modules(self, network: nn.Module) -> list[nn.Module]:
        children = dict(network.named_children())  # every network of models/ lists them in the order of its forward
        stages = [i for i, name in enumerate(children) if name.startswith(("layer", "block"))]
        if not stages:
            parts = ", ".join(children)
            raise UserError(f"ab trains the stages first: name them layer… or block… in the student (it has {parts})")
        return [self.connectors, *list(children.values())[: stages[-1] + 1]]

    def main_modules(self) -> list[nn.Module]:
        return []

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        return at_least_float32(student.logits).new_zeros(())


def layer(conv: nn.Module, norm: bool = False) -> list[nn.Module]:
    """A convolution, BN and LeakyReLU. Without BN an identity takes its place: weights keep their published names."""
    return [conv, nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity(), nn.LeakyReLU(0.1)]


def encoder(channels: int, factor: int, norm: bool) -> nn.Sequential:
    """Three layers, with BN if `norm`: (N, channels, H, W) → (N, factor, H, W)."""
    widths = ((channels, channels), (channels, factor), (factor, factor))
    return nn.Sequential(*(part for a, b in widths for part in layer(nn.Conv2d(a, b, 3, padding=1), norm)))


class Paraphraser(nn.Module):
    """FT's autoencoder of the teacher's map (N, channels, H, W): `factor` channels in the middle."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.encoder = encoder(channels, factor, norm=False)
        widths = ((factor, factor), (factor, channels), (channels, channels))
        convs = (nn.ConvTranspose2d(a, b, 3, padding=1) for a, b in widths)
        self.decoder = nn.Sequential(*(part for conv in convs for part in layer(conv)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class FT(Method):
    """Factor transfer (Kim et al., NeurIPS 2018): mean |q(T(f_s)) − q(P(f_t))|, with f the last map and q as in AT.

    P is the encoder of the paraphraser, an autoencoder of the teacher's map with C_t / 2 channels in the middle. The
    first phase trains the paraphraser with mean((reconstruction − f_t)²) and does not involve the student. T, the
    translator, is an encoder with BN of the student's map; it trains with the student in the main phase.

    Departs: the factors are compared as attention maps; the paper normalises whole factors. The paraphraser has no BN,
    and its last layer ends in a LeakyReLU. The first phase's rate depends on the student's name.
    """

    label = "FT"
    least_features = 2
    weight = 200.0
    first_phase = True
    first_epochs = 30
    first_student = False

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__(student, teacher, labels)
        s, t = feature_pair(student, teacher, -2)
        factor = t.shape[1] // 2
        self.paraphraser = Paraphraser(t.shape[1], factor)
        self.translator = encoder(s.shape[1], factor, norm=True)

    def first_loss(self, student: Outputs | None, teacher: Outputs) -> Tensor:
        t = at_least_float32(teacher.features[-2]).detach()
        return F.mse_loss(self.paraphraser(t), t)

    def first_modules(self, network: nn.Module) -> list[nn.Module]:
        return [self.paraphraser]

    def first_rate(self, s_arch: str, lr: float) -> float:
        return 0.01 if s_arch.startswith(("resnet", "wrn")) else lr

    def main_modules(self) -> list[nn.Module]:
        return [self.translator]

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = feature_pair(student, teacher, -2)
        with torch.no_grad():
            t = self.paraphraser.encoder(t)
        s, t = pool_to_smaller(self.translator(s), t)
        return F.l1_loss(attention(s), attention(t))
