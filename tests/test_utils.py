"""utils.py: SGD, meters, an epoch of training and of testing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, end_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cifar
import models
import teacher
import utils
from wrapper import Wrapper

CPU = torch.device("cpu")


def flags(*words):
    return teacher.parse_args(["--arch", "resnet8", *words])


# ---------------------------------------------------------------------------------------------------------------- SGD


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_sgd_is_the_published_optimizer_and_schedule(amp):
    torch.manual_seed(0)
    start = torch.randn(5)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    sgd = utils.SGD([ours], 0.3, [2, 3], flags("--amp", amp, "--gamma", "0.5"))
    optimizer = torch.optim.SGD([theirs], 0.3, momentum=0.9, weight_decay=5e-4)
    for rate in (0.3, 0.3, 0.15, 0.075):
        assert sgd.lr == pytest.approx(rate, rel=1e-12)
        optimizer.param_groups[0]["lr"] = rate
        for x in (0.1, 0.7):
            sgd.step((ours * x).sin().sum())
            optimizer.zero_grad()
            (theirs * x).sin().sum().backward()
            optimizer.step()
        sgd.end_epoch()
    torch.testing.assert_close(ours, theirs)


def test_a_restored_sgd_goes_on_as_the_saved_one():
    args = flags("--amp", "fp16")
    a, b = (nn.Parameter(torch.arange(4.0)) for _ in range(2))
    first = utils.SGD([a], 0.1, [1, 3], args)
    for _ in range(2):
        first.step((a**2).sum())
        first.end_epoch()
    second = utils.SGD([b], 0.1, [1, 3], args)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # from a disk it comes as a copy
    b.data.copy_(a.data)
    for _ in range(3):
        for sgd, weight in ((first, a), (second, b)):
            sgd.step((weight**2).sum())
            sgd.end_epoch()
        assert torch.equal(a, b)
        assert first.lr == second.lr
    assert first.lr == pytest.approx(0.001)


# -------------------------------------------------------------------------------------------------------------- meters


def scalar(value):
    return torch.tensor(float(value))


def test_a_meter_weighs_by_rows():
    meter = utils.Meter("epoch 1")
    meter.add(3, scalar(0), {"a": scalar(1), "b": scalar(10)})
    meter.add(1, scalar(0), {"a": scalar(5), "b": scalar(20)})
    assert meter.means() == {"a": 2.0, "b": 12.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_meter_names_the_first_step_and_the_term_for_which_the_loss_is_not_finite(value):
    meter = utils.Meter("student epoch 7")
    for step in range(1, 6):
        bad = value if step == 3 else 1
        meter.add(2, scalar(bad), {"ce": scalar(1), "kd": scalar(bad), "tf": scalar(value if step == 4 else 1)})
    with pytest.raises(utils.Fault, match=r"^student epoch 7, step 3: kd is not finite"):
        meter.means()


def test_a_term_that_is_no_part_of_the_loss_may_be_anything():
    meter = utils.Meter("student epoch 7")
    meter.add(2, scalar(1), {"ce": scalar(1), "ss": scalar("nan")})
    assert meter.means()["ce"] == 1


def test_accuracy_is_exact():
    scores = torch.eye(7)[[0, 1, 2, 3, 4, 5, 0]]
    assert utils.accuracy(scores, torch.arange(7)).item() == pytest.approx(600 / 7, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_5_ranks_equal_scores_in_the_order_of_their_columns(dtype):
    scores = torch.randint(4, (200, 9), generator=torch.Generator().manual_seed(0)).to(dtype)  # many are equal
    target = torch.arange(200) % 9
    ranked = [sorted(range(9), key=lambda column: (-row[column], column)) for row in scores.tolist()]
    expected = sum(int(label) in columns[:5] for columns, label in zip(ranked, target, strict=True)) / 2
    assert utils.accuracy_top5(scores, target).item() == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < 100


# ------------------------------------------------------------------------------------------------------------ training


def linear_data(count=40, batch_size=16):
    pixels = torch.randint(256, (count, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return cifar.Images(pixels, torch.arange(count) % 3, cifar.STATISTICS["synthetic"], "cpu", batch_size)


def test_an_epoch_is_a_step_a_batch_in_train_mode_and_its_means_are_over_images(capsys):
    data, model = linear_data(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)).eval()
    sgd = utils.SGD(model.parameters(), 1e-3, [1], flags())
    seen = []

    def loss_of(batch):
        assert model.training
        loss = F.cross_entropy(model(batch.x), batch.target)
        seen.append((len(batch.target), loss.item()))
        return loss, {"cls_loss": loss}

    means = utils.train_epoch(model, loss_of, data.batches("teacher", 1, 1), sgd, len(data), "epoch 1")
    assert [rows for rows, _ in seen] == [16, 16, 8]
    assert means == {"cls_loss": pytest.approx(sum(rows * loss for rows, loss in seen) / 40, rel=1e-6)}
    assert capsys.readouterr().err == ""  # no bar where there is no terminal


def test_evaluate_gives_loss_and_accuracy_over_the_whole_split():
    data, model = linear_data(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)).train()
    loss, acc, top5 = utils.evaluate(model, data, utils.precision("off", CPU))
    x = torch.cat([batch.x for batch in data.test_batches(1)])
    logits = model(x)
    assert not model.training
    assert loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert acc == pytest.approx((logits.argmax(1) == data.labels).float().mean().item() * 100)
    assert top5 is None  # of three classes


class Own(nn.Module):
    """A network of the user's own, with a part of the name that a Wrapper has."""

    def __init__(self):
        super().__init__()
        self.backbone, self.fc = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.backbone(x))


def test_the_best_epochs_test_is_of_the_whole_network_or_of_a_wrappers_backbone():
    test, val, autocast = linear_data(), linear_data(), utils.precision("off", CPU)
    own, best = Own(), Own().state_dict()
    acc = utils.test_of_best(own, {"state_dict": best}, cifar.Data(test, val, test), autocast)
    assert all(torch.equal(own.state_dict()[name], value) for name, value in best.items())
    assert acc == utils.evaluate(own, test, autocast).acc
    network = Wrapper(models.model_dict["resnet8"](num_classes=3))
    best, data = {"state_dict": network.state_dict()}, cifar.Data(test, val, test)
    acc = utils.test_of_best(network, best, data, autocast, network.backbone)
    assert acc == utils.evaluate(network.backbone, test, autocast).acc
    assert utils.test_of_best(network, {}, cifar.Data(test, test, test), autocast) is None


def test_the_accuracies_of_the_classes_are_counted_class_by_class():
    data, model = linear_data(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)).train()
    rows = utils.class_accuracies(model, data, utils.precision("off", CPU))
    chosen = model(torch.cat([batch.x for batch in data.test_batches(1)])).argmax(1).tolist()
    for label, (told, count, acc) in enumerate(rows):
        of_class = [i for i in range(40) if i % 3 == label]
        assert (told, count) == (label, len(of_class))
        assert acc == pytest.approx(100 * sum(chosen[i] == label for i in of_class) / count)
    assert len(rows) == 3


# ----------------------------------------------------------------------------------------------- size of networks


def test_multiply_adds_are_those_counted_by_hand():
    stem, stage1 = 3 * 16 * 9 * 32**2, 2 * 16 * 16 * 9 * 32**2
    stage2 = (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32) * 16**2  # the last: the shortcut
    stage3 = (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64) * 8**2
    model = models.model_dict["resnet8"]().train()
    statistics = model.bn1.running_mean.clone()
    assert utils.size_of(model)[1] == stem + stage1 + stage2 + stage3 + 64 * 100
    assert model.training and torch.equal(model.bn1.running_mean, statistics)
    assert not model.fc._forward_hooks


@pytest.mark.parametrize(
    ("arch", "params", "multiply_adds"),
    [("resnet56", 8.5e5, 1.25e8), ("resnet110", 1.72e6, 2.53e8)],  # Li et al., ICLR 2017, table 1
)
def test_sizes_are_the_published_ones(arch, params, multiply_adds):
    found = utils.size_of(models.model_dict[arch](num_classes=10))
    assert found == (pytest.approx(params, rel=0.01), pytest.approx(multiply_adds, rel=0.01))


@pytest.mark.parametrize("arch", ["ShuffleV1", "MobileNetV2", "vgg8"])
def test_multiply_adds_are_half_of_pytorchs_own_count(arch):
    model = models.model_dict[arch]().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    assert 2 * utils.size_of(model)[1] == counter.get_total_flops()


def test_a_test_whose_loss_is_not_finite_says_which(tmp_path, monkeypatch, capsys):
    class Explosion(utils.SGD):
        def step(self, loss):
            super().step(loss)
            self.optimizer.param_groups[0]["params"][-1].data.fill_(torch.nan)  # only the next forward pass meets it

    monkeypatch.setattr(utils, "SGD", Explosion)
    one_step = [*TINY, "--train-size", "16"]
    assert end_of(teacher.main, ["--arch", "resnet8", *one_step, "--experiments", str(tmp_path)]) == 1
    assert "test after teacher epoch 1, step 1: cls_loss is not finite" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ pictures


def test_similarities_stand_side_by_side_and_one_is_white():
    teacher_side, student_side = torch.full((3, 1), 1.0), torch.full((3, 1), -1.0)
    image = utils.similarity_image(teacher_side, student_side)
    assert image.shape == (1, 12, 16)
    assert image[0, :, :4].eq(1).all() and image[0, :, 12:].eq(0).all()
