"""How similar a teacher and its students are on test images: KL divergence and CKA, as in the paper's appendix.

    python experiments/similarity.py --t-path experiments/teacher_vgg13_seed0 experiments/*_student_vgg8_*
    python experiments/similarity.py --t-path … STUDENT … --json > similarity.jsonl        # one line per student

The paper gives neither the layer and the kernel of CKA nor the temperature and the direction of KL. Here:

    KL   KL(teacher ‖ student) of softmax(logits / T), with `--T` 1: in nats, summed over the classes and averaged over
         the images. 0 means that both networks give the same output; smaller means more similar.
    CKA  linear CKA of the last features (the inputs of the classifiers) of all test images at once: from 0 to 1; larger
         means more similar.

The test images are neither flipped nor cropped nor rotated.
"""

import contextlib
import json
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this script runs from any folder

import torch
from torch import Tensor, nn

import cifar
import utils
from harness import checkpoint, flags, machine, sources
from harness.record import entry
from methods import kd_loss


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.Parser("Prints how similar a teacher and its students are on the test images.")
    add = parser.add_argument
    add("students", nargs="+", metavar="STUDENT", help="run folders or checkpoints")
    add("--t-path", required=True, metavar="TEACHER", help="the teacher: a run folder or checkpoint")
    add("--T", type=flags.number(float, 0, above=True), default=1.0, help="temperature of the outputs")
    add("--json", action="store_true", help="print one JSON object per line")
    flags.add_device(add)
    flags.add_source(add)
    parser.set_defaults(train_size=None, test_size=None)  # the whole data set
    return parser.parse_args(argv)


@torch.inference_mode()
def outputs(network: nn.Module, images: cifar.Images) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and last features (N, D) of a network for all images of a split, in the device's widest float."""
    network.to(images.device, memory_format=cifar.LAYOUT).eval()
    batches = (network(batch.x, is_feat=True) for batch in images.test_batches(views=1))
    # keep only the last feature of each batch: the maps of all images would fill the memory
    logits, features = zip(*((logits, features[-1]) for features, logits in batches), strict=True)
    return torch.cat(logits).to(utils.wide(images.device)), torch.cat(features).to(utils.wide(images.device))


def kl_divergence(student: Tensor, teacher: Tensor, T: float = 1.0) -> float:
    """KL(teacher ‖ student) of softmax(logits / T), (N, C) each: in nats, averaged over the N images."""
    return kd_loss(student, teacher, T).item() / T**2


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al., ICML 2019, section 3) of features (N, D) and (N, D').

    ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) with Frobenius norms and centred columns: 1 if they are equal up to rotation and scale.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


@entry
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results
        teacher, *students = (checkpoint.read(path) for path in (args.t_path, *args.students))
        source = sources.read_for(args, teacher.about, teacher.file, train=False)
        seen = [source, *(source.seen_by(student.about, student.file) for student in students)]
        device = machine.pick_device(args.gpu_id)

    def outputs_of(found: checkpoint.Checkpoint, its: sources.Source) -> tuple[Tensor, Tensor]:
        """A network's outputs for the images as it was trained to see them; the classes in the teacher's order."""
        images = cifar.images_of(its.test, (its.mean, its.std), device, workers=args.workers)
        logits, features = outputs(found.network(len(its.classes)), images)
        return logits[:, [its.classes.index(name) for name in source.classes]], features

    t_logits, t_features = outputs_of(teacher, source)
    for path, student, its in zip(args.students, students, seen[1:], strict=True):
        logits, features = outputs_of(student, its)
        similarity = {"KL": kl_divergence(logits, t_logits, args.T), "CKA": linear_cka(features, t_features)}
        if args.json:
            names = {"student": Path(path).name, "teacher": Path(args.t_path).name}
            print(json.dumps({**names, "T": args.T, **similarity}))
        else:
            print(f"KL {similarity['KL']:.4f}  CKA {similarity['CKA']:.4f}  {path}", flush=True)


if __name__ == "__main__":
    main()
