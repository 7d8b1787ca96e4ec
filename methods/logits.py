"""Methods that compare logits: KD, DKD, LS."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.base import Method, Outputs, at_least_float32, unit


def kd_loss(s_logits: Tensor, t_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the batch: (N, C), (N, C) → scalar."""
    s_log = F.log_softmax(at_least_float32(s_logits) / temperature, dim=1)
    t_log = F.log_softmax(at_least_float32(t_logits).detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(s_log, t_log, reduction="batchmean", log_target=True)


class KD(Method):
    """Knowledge distillation (Hinton et al., 2015): `kd_loss` of the logits (N, C) at T = 4.

    Its weight is 0, because the total loss already contains this term as kd.
    """

    label = "KD"
    weight = 0.0
    maps = False

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        return kd_loss(student.logits, teacher.logits)


class DKD(Method):
    """Decoupled KD (Zhao et al., CVPR 2022): T² · (TCKD + β · NCKD) at T = 4, for logits (N, C).

    TCKD is the KL of the two probabilities (true class, all other classes). NCKD is the KL over the other classes,
    normalised among themselves. Both are averaged over the batch. In the first `first_epochs` epochs the term is
    multiplied by epoch / first_epochs. β depends on the pair of networks.
    """

    label = "DKD"
    weight, ce_weight, kd_weight = 1.0, 1.0, 0.0
    maps = False
    first_epochs = 20
    temperature = 4.0
    beta = 8.0
    betas = {
        ("resnet56", "resnet20"): 2.0,
        ("resnet110", "resnet32"): 2.0,
        ("vgg13", "vgg8"): 6.0,
        ("vgg13", "MobileNetV2"): 6.0,
        ("wrn_40_2", "wrn_16_2"): 6.0,
        ("wrn_40_2", "wrn_40_1"): 6.0,
    }

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__(student, teacher, labels)
        self.register_buffer("warm_up", torch.ones(()), persistent=False)

    def choose_pair(self, t_arch: str, s_arch: str) -> None:
        self.beta = self.betas.get((t_arch, s_arch), DKD.beta)

    def start_epoch(self, seed: int, epoch: int) -> None:
        self.warm_up.fill_(min(epoch / self.first_epochs, 1))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s_true, s_others = self.split(at_least_float32(student.logits) / self.temperature, target)
        t_true, t_others = self.split(at_least_float32(teacher.logits) / self.temperature, target)
        s_binary = torch.stack([s_true, s_others.logsumexp(1)], 1)
        t_binary = torch.stack([t_true, t_others.logsumexp(1)], 1)
        loss = kd_loss(s_binary, t_binary, 1.0) + self.beta * kd_loss(s_others, t_others, 1.0)
        return self.warm_up * self.temperature**2 * loss

    @staticmethod
    def split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, C) → those of the true class (N,) and those of the other classes (N, C − 1)."""
        target = target[:, None]
        others = torch.arange(logits.shape[1] - 1, device=logits.device)
        return logits.gather(1, target).squeeze(1), logits.gather(1, others + (others >= target))


class LS(Method):
    """Logit standardisation (Sun et al., CVPR 2024): `kd_loss` at T = 2 of z = (logits − mean) / (std + 1e-7).

    Mean and std (the unbiased one, with C − 1) are taken over the C classes of each row of the logits (N, C).
    """

    label = "KD + LS"
    weight, kd_weight = 9.0, 0.0
    maps = False

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        s, t = (self.standardise(at_least_float32(x.logits)) for x in (student, teacher))
        return kd_loss(s, t, 2.0)

    @staticmethod
    def standardise(logits: Tensor) -> Tensor:
        """(N, C) → (N, C). std = |logits − mean| / √(C − 1), so `unit` keeps the gradient finite at equal logits."""
        root = math.sqrt(logits.shape[1] - 1)
        return root * unit(logits - logits.mean(1, keepdim=True), eps=1e-7 * root)
