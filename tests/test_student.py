"""student.py: the two training steps against the published trajectories."""

import pytest
import torch
from oracle import GOLDEN, fill, hashed, labels

import models
import student
import utils
from losses import ss_head_loss
from wrapper import Wrapper, fold_batch_norms


def trajectory_batch(case):
    """Four rotated views of blocky images, with noise of their own, and labels."""
    batch = case["batch"]
    blocks = 2 * hashed(40000, (batch, 3, 4, 4))
    picture = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    views = torch.stack([torch.rot90(picture, k, (2, 3)) for k in range(4)], 1).flatten(0, 1)
    x = views + 0.3 * hashed(40002, (4 * batch, 3, 32, 32))
    return x.contiguous(memory_format=torch.channels_last), labels(40001, batch, 100)


def warm_teacher(case, x):
    teacher = fill(Wrapper(models.model_dict[case["teacher"]]()).double(), 20000)
    teacher.to(memory_format=torch.channels_last).train()
    with torch.no_grad():
        for _ in range(30):
            teacher(x)
    return teacher.eval()


@pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])
def test_both_training_steps_follow_the_published_trajectories(fold):
    case = GOLDEN["ss_head_trajectory"]
    x, target = trajectory_batch(case)
    teacher = warm_teacher(case, x)
    teacher = fold_batch_norms(teacher) if fold else teacher
    args = student.parse_args(["--t-path", "unused", "--s-arch", GOLDEN["student_trajectory"]["student"]])
    device = torch.device("cpu")
    precision = utils.Precision("off", device)

    optimizer, _ = utils.make_sgd(teacher.proj_head.parameters(), args, args.t_lr, args.t_milestones)
    loss_of = student.make_ss_loss(teacher, precision)
    for loss_before, accuracy in case["steps"]:
        loss, logged = loss_of(x)
        precision.update(optimizer, loss)
        assert loss.item() == pytest.approx(loss_before, rel=1e-6)
        assert logged["teacher_ssp_acc"].item() == pytest.approx(accuracy, rel=1e-6)

    case = GOLDEN["student_trajectory"]
    network = fill(Wrapper(models.model_dict[case["student"]]()).double(), case["student_fill_base"])
    network.to(memory_format=torch.channels_last).train()
    optimizer, _ = utils.make_sgd(network.parameters(), args, args.lr, args.milestones)
    loss_of = student.make_loss(args, teacher, network, precision)
    for *terms, total in case["steps"]:
        loss, logged = loss_of(x, target)
        precision.update(optimizer, loss)
        assert [logged[f"{name}_loss"].item() for name in ("ce", "kd", "tf", "ss")] == pytest.approx(terms, rel=1e-6)
        assert loss.item() == pytest.approx(total, rel=1e-6)
