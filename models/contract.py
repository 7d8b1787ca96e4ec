"""What every network answers, and a check of it: see `models`."""

import torch
from torch import nn

from harness.flags import UserError


@torch.no_grad()
def check_contract(network: nn.Module, arch: str, classes: int, side: int) -> None:
    """Tries a network (CPU) on two images. Leaves it in eval mode, otherwise as it was.

    Raises:
        UserError: logits, features or classifier are not as `wrapper.Wrapper` needs them.
    """
    images = torch.linspace(-1, 1, 2 * 3 * side * side).view(2, 3, side, side)
    try:
        logits = network.eval()(images)
        features, same = network(images, is_feat=True, preact=False)
        width = features[-1].shape[1:]
    except Exception as error:  # whatever the network's own code raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{arch} fails on two images, with is_feat=True or without: {reason}") from error
    if logits.shape != (2, classes) or not torch.allclose(logits, same, rtol=1e-3, atol=1e-4):
        shapes = f"{tuple(logits.shape)}, {tuple(same.shape)}"
        raise UserError(f"{arch}: logits with and without is_feat=True should both be (2, {classes}): {shapes}")
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear or width != (linear[-1].in_features,) or linear[-1].out_features != classes:
        raise UserError(f"{arch}: its last nn.Linear is no classifier of features[-1], {tuple(width)} per image")
    if not torch.allclose(linear[-1](features[-1]), logits, rtol=1e-3, atol=1e-4):
        raise UserError(f"{arch}: its logits are not what its last nn.Linear gives for features[-1]")
