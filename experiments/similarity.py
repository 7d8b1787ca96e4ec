"""How alike teacher and student are on test images: KL divergence and CKA, as in the paper's appendix.

    python experiments/similarity.py --t-path experiments/teacher_vgg13_seed0 experiments/*_student_vgg8_*
    python experiments/similarity.py --t-path … STUDENT … --json > similarity.jsonl        # a line a student

The paper says neither layer nor kernel, temperature nor direction. Here:

    KL   KL(teacher ‖ student) of softmax(logits / T), `--T` 1: nats, summed over the classes, averaged over the images;
         0 if both give the same, less is more alike
    CKA  linear, of the last features, which the classifiers read, of all test images at once: from 0 to 1, more is more
         alike

The images are those of every test, neither flipped nor cropped nor rotated.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the rooms lie there, wherever this is started from

from harness import flags


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.Parser("Prints how alike a teacher and its students are on the test images.")
    add = parser.add_argument
    add("students", nargs="+", metavar="STUDENT", help="run folders or checkpoints")
    add("--t-path", required=True, metavar="TEACHER", help="the teacher: a run folder or checkpoint")
    add("--T", type=flags.number(float, 0, above=True), default=1.0, help="temperature of the outputs")
    add("--gpu-id", type=flags.number(int, 0), default=0, help="the CUDA device; without CUDA: MPS, else the CPU")
    add("--json", action="store_true", help="print a JSON object a line")
    flags.add_source(add)
    parser.set_defaults(train_size=None, test_size=None)
    return parser.parse_args(argv)


import contextlib
import json

import torch
from torch import Tensor, nn

import cifar
import models
import utils
from methods import kd_loss
from harness.record import entry


@torch.inference_mode()
def outputs(network: nn.Module, images: cifar.Images) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and last features (N, D) of a network for all images of a split, in the widest float there is."""
    device = images.labels.device
    network.to(device, memory_format=torch.channels_last).eval()
    seen = (network(batch.x, is_feat=True) for batch in images.test_batches(views=1))
    # of a batch the last feature stays: the maps of all images would fill the memory
    logits, features = zip(*((logits, features[-1]) for features, logits in seen), strict=True)
    return torch.cat(logits).to(utils.wide(device)), torch.cat(features).to(utils.wide(device))


def kl_divergence(student: Tensor, teacher: Tensor, T: float = 1.0) -> float:
    """KL(teacher ‖ student) of softmax(logits / T), (N, C) each: nats, averaged over the N images."""
    return kd_loss(student, teacher, T).item() / T**2


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al., ICML 2019, section 3) of features (N, D) and (N, D').

    ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) with Frobenius norms and centred columns: 1 if they are the same up to rotation and scale.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


@entry(cifar.DataError, models.CheckpointError)
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # what is printed on the way is no result
        teacher, *students = (models.read(path) for path in (args.t_path, *args.students))
        cifar.use_dataset_of(args, teacher)
        source = cifar.read(args)
        device = utils.pick_device(args.gpu_id)
        images = cifar.Images(source.test.pixels, source.test.labels, source.statistics, device, about=source.about)
        t_logits, t_features = outputs(teacher.network(source.about["classes"]), images)
    for path, student in zip(args.students, students, strict=True):
        logits, features = outputs(student.network(source.about["classes"]), images)
        alike = {"KL": kl_divergence(logits, t_logits, args.T), "CKA": linear_cka(features, t_features)}
        if args.json:
            print(json.dumps({"student": Path(path).name, "teacher": Path(args.t_path).name, "T": args.T, **alike}))
        else:
            print(f"KL {alike['KL']:.4f}  CKA {alike['CKA']:.4f}  {path}", flush=True)


if __name__ == "__main__":
    main()
