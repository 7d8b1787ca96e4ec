"""CRD's negatives: drawn on the device, from (seed, epoch, step) alone, without waiting for the host."""

import torch
from torch import Tensor


def random_bits(when: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) int32 on the device of `when` (3,): a hash of the place, seed, epoch and step.

    The three are hashed into a start, one after the other, from which the places count on, two numbers to a place. The
    hash is SplitMix64's (Steele et al., 2014), in signed arithmetic: there a shift to the right needs a mask.
    """

    def mix(z: Tensor) -> Tensor:  # in place: new memory for 64 × 25,000 numbers costs more than the arithmetic
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            z.bitwise_xor_((z >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
        return z

    seed, epoch, step = when.clone().unbind()
    start = mix(mix(mix(seed) + epoch) + step)
    places = torch.arange(rows * ((columns + 1) // 2), device=when.device)
    return mix(places.add_(start)).view(rows, -1).view(torch.int32)[:, :columns]


def draw_negatives(labels: Tensor, target: Tensor, count: int, replace: bool, when: Tensor) -> Tensor:
    """For each image of a batch `count` images of other classes: uniform, without replacement, each row for itself.

    Every image of the training set gets a random number anew in each row, and the `count` largest of other classes are
    taken: any set of `count` is as likely as any other. (Cheaper draws, such as one permutation of the images read from
    a random place in each row, give uniform rows that hang on one another.)

    Args:
        labels: (N,) classes of the training set.
        target: (B,) classes of the batch.
        count: K.
        replace: whether K exceeds the number of images of other classes for some class; such rows, and only such, are
            drawn with replacement.
        when: (3,) int64 seed, epoch and step, all that the draw depends on.

    Returns:
        (B, K) places in the training set, in no particular order.
    """
    images = len(labels)
    bits = random_bits(when, len(target), images + count if replace else images)
    own = labels == target[:, None]  # B x N
    least = torch.iinfo(torch.int32).min
    keys = bits[:, :images].clamp_(min=least + 1).masked_fill_(own, least)
    order = keys.topk(min(count, images), sorted=replace).indices  # unsorted costs half
    if not replace:
        return order
    others = images - own.sum(1, keepdim=True)
    place = torch.where(others < count, bits[:, images:] % others, torch.arange(count, device=target.device))
    return order.gather(1, place)
