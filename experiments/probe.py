"""A linear probe: how well the frozen features of a network classify another data set, as in the paper's appendix.

    python experiments/probe.py experiments/teacher_vgg13_seed0 --dataset cifar10
    python experiments/probe.py STUDENT … --dataset folder --data-root stl10      # STL-10, TinyImageNet: class folders

The last feature of every image (neither flipped nor cropped) is computed once, with the normalisation that the network
was trained with. Then each feature is standardised: mean 0 and standard deviation 1 over the training images. The
probe is a linear classifier that minimises the mean cross-entropy + `--decay` · ‖W‖² / 2. This problem is convex, and
L-BFGS solves it to convergence, so no learning rate, number of epochs or seed matters. The paper followed CRD's
protocol but gave neither optimiser nor epochs: compare networks with each other here, not with the paper's figures.
"""

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this script runs from any folder

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cifar
import utils
from experiments.similarity import outputs
from harness import checkpoint, flags, machine, sources
from harness.record import entry


def parse_args(argv: list[str] | None) -> Namespace:
    parser = flags.Parser("Fits a linear classifier to frozen features and prints its test accuracy.")
    add, count = parser.add_argument, flags.number(int, 1)
    add("networks", nargs="+", metavar="NETWORK", help="run folders or checkpoints")
    add("--decay", type=flags.number(float, 0), default=1e-4, help="weight of half the squared length of the weights")
    add("--train-size", type=count, metavar="N", help="fit on at most N images, the first of every class")
    add("--test-size", type=count, metavar="N", help="test on at most N images, the first of every class")
    flags.add_device(add)
    flags.add_source(add)
    return parser.parse_args(argv)


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


def probe(found: checkpoint.Checkpoint, source: sources.Source, args: Namespace, device: torch.device) -> float:
    """Test accuracy (%) of the linear classifier on a network's frozen features of `source`."""
    # of what the network says of its own data, its classes do not matter
    own = {name: found.about[name] for name in ("dataset", "side", "mean", "std") if name in found.about}
    seen, network = source.seen_by(own, found.file), found.network()
    more = (seen.mean, seen.std), device
    train, test = (cifar.images_of(split, *more, workers=args.workers) for split in (seen.train, seen.test))
    (_, x), (_, test_x) = (outputs(network, images) for images in (train, test))
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)  # a feature that is 0 for every image stays 0
    linear = fit((x - mean) / std, train.labels, len(source.classes), args.decay)
    return utils.accuracy(linear((test_x - mean) / std), test.labels).item()


@entry
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    checkpoints = [checkpoint.read(path) for path in args.networks]
    device = machine.pick_device(args.gpu_id)
    of_side = {}  # the images, by the side that networks were trained with
    for path, found in zip(args.networks, checkpoints, strict=True):
        side = found.about.get("side") if args.dataset == "folder" else None
        if side not in of_side:
            source = sources.read_for(args, {} if side is None else {"side": side})
            halves = {"train": (source.train, args.train_size), "test": (source.test, args.test_size)}
            few = {half: split.some(cifar.sample(split.labels, size)) for half, (split, size) in halves.items()}
            of_side[side] = dataclasses.replace(source, **few)
        print(f"{probe(found, of_side[side], args, device):6.2f} %  {path}", flush=True)


if __name__ == "__main__":
    main()
