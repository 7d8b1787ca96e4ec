"""A linear probe: what the frozen features of a network tell about another data set, as in the paper's appendix.

    python experiments/probe.py experiments/teacher_vgg13_seed0 --dataset cifar10
    python experiments/probe.py STUDENT … --dataset folder --data-root stl10      # STL-10, TinyImageNet: class folders

The last feature of every image, neither flipped nor cropped, is computed once, with the normalisation that the network
was trained with, and brought to mean 0 and deviation 1 over the training images. On it a linear classifier is fitted:
averaged cross-entropy + `--decay` · ‖W‖² / 2, which is convex and is solved to its end (L-BFGS), so that no learning
rate, epoch or seed enters. The paper followed CRD's protocol without naming optimiser and epochs: compare networks with
each other here, not with its figures.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the rooms lie there, wherever this is started from

from harness import flags


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.Parser("Fits a linear classifier to frozen features and prints its test accuracy.")
    add = parser.add_argument
    add("networks", nargs="+", metavar="NETWORK", help="run folders or checkpoints")
    add("--decay", type=flags.number(float, 0), default=1e-4, help="weight of half the squared length of the weights")
    count = flags.number(int, 1)
    add("--train-size", type=count, metavar="N", help="fit on N images only, the first of every class")
    add("--test-size", type=count, metavar="N", help="test on N images only, the first of every class")
    add("--gpu-id", type=flags.number(int, 0), default=0, help="the CUDA device; without CUDA: MPS, else the CPU")
    flags.add_source(add)
    parser.set_defaults(val_fraction=None, few_shot=1.0, label_noise=0.0, seed=0, batch_size=1)
    return parser.parse_args(argv)


import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cifar
import models
import utils
from experiments.similarity import outputs
from harness.record import entry


def fit(x: Tensor, labels: Tensor, classes: int, decay: float) -> nn.Linear:
    """The classifier of features (N, D) that minimises the mean cross-entropy + decay · ‖W‖² / 2."""
    linear = nn.Linear(x.shape[1], classes, device=x.device, dtype=x.dtype)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=1000, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x), labels) + decay / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear


def probe(checkpoint: models.Checkpoint, data: cifar.Data, decay: float) -> float:
    """Test accuracy (%) of the linear classifier on a network's frozen features."""
    device = data.train.labels.device
    network = checkpoint.network()
    own = [checkpoint.about.get(name, data.train.about[name]) for name in ("mean", "std")]
    train, test = (
        outputs(network, cifar.Images(split.pixels, split.labels, own, device))[1] for split in (data.train, data.test)
    )
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)  # a feature that is 0 on every image stays 0
    linear = fit((train - mean) / std, data.train.labels, data.train.about["classes"], decay)
    return utils.accuracy(linear((test - mean) / std), data.test.labels).item()


@entry(cifar.DataError, models.CheckpointError)
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    checkpoints = [models.read(path) for path in args.networks]
    data = cifar.load(args, utils.pick_device(args.gpu_id))
    for path, checkpoint in zip(args.networks, checkpoints, strict=True):
        print(f"{probe(checkpoint, data, args.decay):6.2f} %  {path}", flush=True)


if __name__ == "__main__":
    main()
