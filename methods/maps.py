"""Methods that compare feature maps: FitNet, AT, VID."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.flags import UserError
from methods.base import Method, Outputs, feature_pair, middle_maps, unit


def pool_to_smaller(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Averages the larger of two square maps (N, C, H, H) down to the height of the smaller one."""
    height = min(s.shape[2], t.shape[2])

    def pooled(x: Tensor) -> Tensor:
        if x.shape[2] % height:
            return F.adaptive_avg_pool2d(x, height)
        return F.avg_pool2d(x, x.shape[2] // height)  # same values, and on CUDA its gradient is deterministic

    s, t = (x if x.shape[2] == height else pooled(x) for x in (s, t))
    return s, t


class Regressor(nn.Module):
    """Convolution and BN that bring a student's map (N, C, H, W) to the shape of the teacher's.

    Raises:
        UserError: the student's map is smaller than the teacher's, but not by half.
    """

    def __init__(self, s_map: Tensor, t_map: Tensor):
        super().__init__()
        (s_channels, s_height, s_width), (t_channels, t_height, t_width) = s_map.shape[1:], t_map.shape[1:]
        if s_height == 2 * t_height:
            self.conv = nn.Conv2d(s_channels, t_channels, 3, stride=2, padding=1)
        elif 2 * s_height == t_height:
            self.conv = nn.ConvTranspose2d(s_channels, t_channels, 4, stride=2, padding=1)
        elif s_height >= t_height:
            self.conv = nn.Conv2d(s_channels, t_channels, (1 + s_height - t_height, 1 + s_width - t_width))
        else:
            raise UserError(
                f"no adapter turns the student's map of height {s_height} into the teacher's of height {t_height}; "
                "choose another method or pair of networks"
            )
        self.bn = nn.BatchNorm2d(t_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class FitNet(Method):
    """Hints (Romero et al., ICLR 2015): mean((ReLU(R(f_s)) − f_t)²), with f the map of index 2 and R a `Regressor`.

    Departs: the hint is trained together with the cross-entropy; the paper first trains the student up to the hint. The
    regressor ends in BN and ReLU, so it can't reach the negative values of a signed map (wrn, MobileNetV2).
    """

    label = "FitNet"
    weight = 100.0
    least_features = 4
    hint_layer = 2

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__(student, teacher, labels)
        self.regressor = Regressor(student.features[self.hint_layer], teacher.features[self.hint_layer])

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = feature_pair(student, teacher, self.hint_layer)
        return F.mse_loss(F.relu(self.regressor(s)), t)


def attention(x: Tensor) -> Tensor:
    """q(f) = unit(mean over the channels of f²): (N, C, H, W) → (N, HW)."""
    return unit(x.pow(2).mean(1).flatten(1))


class AT(Method):
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017): Σ over the middle maps of mean((q(f_s) − q(f_t))²).

    q is `attention`; the mean is over N · HW. Departs: the paper takes the norm of the difference, not the mean of its
    squares; hence the weight of 1000.
    """

    label = "AT"
    weight = 1000.0

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        pairs = [pool_to_smaller(s, t) for s, t in middle_maps(student, teacher)]
        return sum(F.mse_loss(attention(s), attention(t)) for s, t in pairs)


class Variational(nn.Module):
    """The Gaussian q(t | s) of VID for one pair of maps: its mean by three 1×1 convolutions, a variance per channel."""

    def __init__(self, s_channels: int, t_channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((t_channels,), math.log(math.expm1(5 - 1e-5))))  # variance 5
        self.regressor = nn.Sequential(
            nn.Conv2d(s_channels, t_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(t_channels, t_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(t_channels, t_channels, 1, bias=False),
        )

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        """Mean of −log q(t | s), without its constant: maps (N, C_s, H, H), (N, C_t, H, H) → scalar."""
        variance = (F.softplus(self.log_scale) + 1e-5)[:, None, None]
        return (0.5 * ((self.regressor(s) - t).pow(2) / variance + variance.log())).mean()


class VID(Method):
    """Variational information distillation (Ahn et al., CVPR 2019): Σ over the middle maps of −log q(f_t | f_s).

    Departs: only the middle maps are compared, not the logits and the embedding; means replace sums.
    """

    label = "VID"
    weight = 1.0

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__(student, teacher, labels)
        pairs = middle_maps(student, teacher)
        self.adapters = nn.ModuleList(Variational(s.shape[1], t.shape[1]) for s, t in pairs)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        pairs = zip(self.adapters, middle_maps(student, teacher), strict=True)
        return sum(q(*pool_to_smaller(s, t)) for q, (s, t) in pairs)
