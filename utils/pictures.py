"""What TensorBoard shows of a student: its input, and whether its similarities come to look like the teacher's."""

from typing import Any

import torch
from tensorboardX import summary
from torch import Tensor
from torchvision.utils import make_grid


def picture(tag: str, image: Tensor) -> Any:
    """A summary of an image (3, H, W) or (1, H, W) in [0, 1]."""
    return summary.image(tag, (image.clamp(0, 1) * 255).round().byte().cpu().numpy(), dataformats="CHW")


def views_grid(tag: str, views: Tensor, per_image: int) -> Any:
    """A summary of views (V·N, 3, H, W) in [0, 1], view fastest: one row for each image."""
    return picture(tag, make_grid(views, nrow=per_image, padding=1))


def similarity_pair(tag: str, teacher: Tensor, student: Tensor) -> Any:
    """A summary of two similarity matrices (3B, B) side by side, black at -1, white at 1, four pixels to an entry."""
    gap = teacher.new_full((len(teacher), 2), 1.0)
    both = (torch.cat([teacher, gap, student], 1) + 1) / 2
    return picture(tag, both.repeat_interleave(4, 0).repeat_interleave(4, 1).unsqueeze(0))
