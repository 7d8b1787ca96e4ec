"""The compared methods: one class each, with its adapters, published weights and, for AB and FT, a first phase.

    method = METHODS["crd"](student, teacher, labels)  # Outputs of a small batch; labels (N,) of the training set
    loss = ce_weight * ce + kd_weight * kd + weight * method(student, teacher, target, rows)

ce is the cross-entropy of the student's logits with the labels; kd is `kd_loss` of the logits of both networks.
`Method` documents what the training script reads of a method.

The formulas are those of the code that produced CRD's tables (github.com/HobbitLong/RepDistiller, commit b84f547);
SSKD's tables use that code, too. DKD and LS follow their authors' code. "Departs" in a docstring says where this code
differs from the method's own paper.

In the formulas f_s and f_t are a feature of the student and of the teacher. The "middle maps" are the ends of the
stages: all features but the stem and the pooled vector. If two maps differ in height, the larger one is averaged down
to the smaller one.

All methods keep these rules. Random draws depend on (seed, epoch, step) alone. The teacher gets no gradient, except
CRD's own embedding of it. Half-precision features are raised to float32. No shape depends on values and no step reads a
number from the device, so a step compiles to one graph.
"""

from methods.base import Method, Outputs, set_phase
from methods.crd import CRD
from methods.logits import DKD, KD, LS, kd_loss
from methods.maps import AT, VID, FitNet
from methods.phases import AB, FT
from methods.relations import PKT, RKD, SP

__all__ = ["METHODS", "Method", "Outputs", "kd_loss", "set_phase"]

METHODS: dict[str, type[Method]] = {
    "kd": KD,
    "fitnet": FitNet,
    "at": AT,
    "sp": SP,
    "vid": VID,
    "rkd": RKD,
    "pkt": PKT,
    "ab": AB,
    "ft": FT,
    "crd": CRD,
    "dkd": DKD,
    "ls": LS,
}
