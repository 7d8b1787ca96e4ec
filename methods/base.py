"""The base class of the compared methods, and the functions on features that several of them use."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from harness.flags import UserError
from losses import at_least_float32


class Outputs(NamedTuple):
    """What a network returns for a batch: `network(x, is_feat=True)`."""

    features: list[Tensor]  # stem and ends of the stages, each (N, C, H, W); last the pooled vector (N, D)
    logits: Tensor  # (N, classes)


class Method(nn.Module):
    """Base class of the compared methods: everything that the training script reads, with its defaults.

    A method overrides what is different for it. Its adapters are parameters and its banks are buffers.

    Args:
        student, teacher: outputs for a small batch, which give the adapters their sizes.
        labels: (N,) labels of the training set.

    Raises:
        UserError: the method does not work with these networks or labels.
    """

    label = ""  # name of the method's row in the tables; by default its name in METHODS
    weight = 1.0  # published weight of the method's term
    ce_weight = 0.1  # published weight of the cross-entropy beside it (SSKD's tables; CRD's tables use 1)
    kd_weight = 0.9  # published weight of kd beside it (SSKD's tables; CRD's tables use 0)
    maps = True  # False: of the teacher, the method needs only the last feature and the logits
    least_features = 3  # with maps: the fewest features of a network (here: stem, one stage, pooled vector)
    preact = False  # True: the method needs the features of both networks before their ReLU, in both phases
    first_phase = False  # True: a first phase comes before the main phase, with `first_loss`
    first_epochs = 0  # length of the first phase, or of DKD's warm-up; the script may set it
    first_student = True  # False: `first_loss` ignores the student, so the student need not run

    def __init__(self, student: Outputs, teacher: Outputs, labels: Tensor):
        super().__init__()
        for whose, outputs in (("student", student), ("teacher", teacher)):
            if self.maps and (found := len(outputs.features)) < self.least_features:
                raise UserError(
                    f"{self.label or type(self).__name__} compares feature maps: with is_feat=True the {whose} returns "
                    f"{found} features, and it needs {self.least_features} (maps first, last the pooled vector); "
                    "choose another method"
                )

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, rows: Tensor) -> Tensor:
        """The unweighted term of a batch, a scalar; `target` (B,): labels, `rows` (B,): places in the training set."""
        raise NotImplementedError

    def choose_pair(self, t_arch: str, s_arch: str) -> None:
        """Sets what depends on the pair of networks; called once, before training."""

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Called before each epoch (from 1) of the main phase. What it sets is not part of the state dict."""

    def main_modules(self) -> list[nn.Module]:
        """The modules of the method that train in the main phase."""
        return [self]

    def first_modules(self, network: nn.Module) -> list[nn.Module]:
        """The modules of the method and of the student network that train in the first phase."""
        raise NotImplementedError

    def first_loss(self, student: Outputs | None, teacher: Outputs) -> Tensor:
        """The whole loss of a batch in the first phase, a scalar; `student` may be None if not `first_student`."""
        raise NotImplementedError

    def first_rate(self, s_arch: str, lr: float) -> float:
        """The constant learning rate of the first phase; `lr` is the student's rate in the main phase."""
        return lr


def set_phase(method: Method, network: nn.Module, first: bool = False) -> nn.ModuleList:
    """Prepares the method and the student network for the first or the main phase; returns the modules that train.

    What trains goes to train mode, everything else to eval mode and without gradients. In the main phase the whole
    student network trains.
    """
    modules = nn.ModuleList(method.first_modules(network) if first else [network, *method.main_modules()])
    nn.ModuleList([network, method]).eval().requires_grad_(False)
    return modules.train().requires_grad_(True)


def feature_pair(student: Outputs, teacher: Outputs, index: int) -> tuple[Tensor, Tensor]:
    """Feature number `index` of both networks, the teacher's without a graph."""
    return at_least_float32(student.features[index]), at_least_float32(teacher.features[index]).detach()


def middle_maps(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """The middle maps of both networks, in pairs; extra maps of the deeper network are left out."""
    return [feature_pair(student, teacher, i) for i in range(1, min(len(student.features), len(teacher.features)) - 1)]


def unit(x: Tensor, eps: float = 0.0) -> Tensor:
    """x / (|x| + eps), where |x| is the length along the last dimension.

    A vector shorter than 1e-12 becomes zero and gets no gradient. The published code divides by max(|x|, 1e-12), which
    gives such a vector a gradient of up to 1e12; division by |x| would give NaN.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    long_enough = length > 1e-12
    return torch.where(long_enough, x / torch.where(long_enough, length + eps, 1), 0)
