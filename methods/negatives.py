"""CRD's negatives: drawn on the device, from (seed, epoch, step) alone, without waiting for the host."""

import torch
from torch import Tensor


def random_bits(when: Tensor, rows: int, columns: int) -> Tensor:
    """Random int32 (rows, columns) on the device of `when` (3,), which holds seed, epoch and step.

    A hash of seed, epoch and step gives a start. Entry i of the counter is start + i; its hash gives two numbers. The
    hash is SplitMix64's (Steele et al., 2014). Signed integers keep their sign in a right shift, so a mask removes it.
    """

    def mix(z: Tensor) -> Tensor:  # in place: allocating 64 × 25,000 numbers costs more than the arithmetic
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            z.bitwise_xor_((z >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
        return z

    seed, epoch, step = when.clone().unbind()
    start = mix(mix(mix(seed) + epoch) + step)
    places = torch.arange(rows * ((columns + 1) // 2), device=when.device)
    return mix(places.add_(start)).view(rows, -1).view(torch.int32)[:, :columns]


def draw_negatives(labels: Tensor, target: Tensor, count: int, replace: bool, when: Tensor) -> Tensor:
    """Draws `count` images of other classes for each image of a batch: uniformly, without replacement.

    Each row gives every image of the training set a new random number and takes the `count` images of other classes
    with the largest numbers. So all sets of `count` images are equally likely, and rows are independent. (With cheaper
    draws, such as one permutation that each row reads from a random start, rows depend on each other.)

    Args:
        labels: (N,) classes of the training set.
        target: (B,) classes of the batch.
        count: K.
        replace: whether some class has fewer than K images of other classes. The rows of such classes, and only these,
            are drawn with replacement.
        when: (3,) int64: seed, epoch and step. The draw depends on nothing else.

    Returns:
        (B, K) places in the training set, in no particular order.
    """
    images = len(labels)
    bits = random_bits(when, len(target), images + count if replace else images)
    own = labels == target[:, None]  # B x N
    least = torch.iinfo(torch.int32).min
    keys = bits[:, :images].clamp_(min=least + 1).masked_fill_(own, least)
    order = keys.topk(min(count, images), sorted=replace).indices  # unsorted takes half the time
    if not replace:
        return order
    others = images - own.sum(1, keepdim=True)
    place = torch.where(others < count, bits[:, images:] % others, torch.arange(count, device=target.device))
    return order.gather(1, place)
