"""utils.py: SGD, meters, evaluation, the sizes of networks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import nn

import cifar
import models
import teacher
import utils
from harness import sources
from harness.flags import Fault
from wrapper import Wrapper, classifier, frozen, of_feature

AUTOCAST = utils.precision("off", torch.device("cpu"))


def flags(*words):
    return teacher.parse_args(["--arch", "resnet8", *words])


# ---------------------------------------------------------------------------------------------------------------- SGD


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_sgd_is_the_published_optimizer_and_schedule(amp):
    torch.manual_seed(0)
    start = torch.randn(5)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    sgd = utils.SGD(nn.ParameterList([ours]), 0.3, [2, 3], flags("--amp", amp, "--gamma", "0.5"))
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
    first = utils.SGD(nn.ParameterList([a]), 0.1, [1, 3], args)
    for _ in range(2):
        first.step((a**2).sum())
        first.end_epoch()
    second = utils.SGD(nn.ParameterList([b]), 0.1, [1, 3], args)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as read from a file
    b.data.copy_(a.data)
    for _ in range(3):
        for sgd, weight in ((first, a), (second, b)):
            sgd.step((weight**2).sum())
            sgd.end_epoch()
        assert torch.equal(a, b)
        assert first.lr == second.lr
    assert first.lr == pytest.approx(0.001)


@pytest.mark.parametrize("restored", [False, True])
def test_a_step_of_float16_that_overflows_in_the_forward_pass_changes_nothing(restored):
    torch.manual_seed(0)
    args, x = flags("--amp", "fp16"), torch.randn(4, 3, 5, 5)
    network, meter = (
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten()),
        utils.Meter("epoch 1", amp="fp16"),
    )
    sgd, losses = utils.SGD(network, 0.1, [9], args), []

    def step(images):
        with torch.autocast("cpu", torch.float16):
            loss = network(images).float().sigmoid().mean()
        sgd.step(loss)
        meter.add(len(images), loss, {"ce_loss": loss, "acc": loss * 2})
        losses.append(loss.item())
        return {name: value.clone() for name, value in network.state_dict().items() if "batches" not in name}

    before = step(x)
    if restored:
        state, sgd = sgd.state_dict(), utils.SGD(network, 0.1, [9], args)
        sgd.load_state_dict(state)
    after = step(x * 1e6)
    assert math.isnan(losses[1]) and all(torch.equal(value, before[name]) for name, value in after.items())
    assert not any(torch.equal(value, before[name]) for name, value in step(x[:2]).items())
    assert meter.means()["acc"] == pytest.approx((4 * 2 * losses[0] + 2 * 2 * losses[2]) / 6, rel=1e-6)
    meter = utils.Meter("epoch 2", amp="fp16")
    step(x * 1e6)
    with pytest.raises(Fault, match="epoch 2, step 1: the loss is not finite"):
        meter.means()


# --------------------------------------------------------------------------------------------- how the networks run


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_teacher_that_is_cast_once_answers_like_one_that_autocast_casts(amp):
    """wrn keeps some batch norms, which stay float32."""
    torch.manual_seed(0)
    autocast, x = utils.precision(amp, torch.device("cpu")), torch.randn(4, 3, 32, 32)
    teacher = frozen(models.model_dict["wrn_16_1"](), maps=False)
    cast = copy.deepcopy(teacher)
    utils.cast_once(cast, amp)
    with torch.no_grad(), autocast():
        (expected, logits), (features, same) = teacher(x), cast(x)
        feature = features[-1].half()
        stored = [of_feature(classifier(each), feature)[1] for each in (teacher, cast)]
    assert torch.equal(features[-1], expected[-1]) and torch.equal(same, logits) and torch.equal(*stored)
    assert next(cast.parameters()).dtype == utils.DTYPES[amp]


def test_the_last_smaller_batch_is_not_compiled(monkeypatch):
    monkeypatch.setattr(utils, "compiled", lambda function, wanted, device: lambda batch: "graph")
    images = cifar.Images(sources.Split(*sources.synthetic(True, 10)), sources.STATISTICS["synthetic"], "cpu", 4)
    loss_of = utils.compiled_loss(lambda batch: "eager", True, images)
    assert [loss_of(batch) for batch in images.batches("teacher", 1, 1)] == ["graph", "graph", "eager"]


# -------------------------------------------------------------------------------------------------------------- meters


def scalar(value):
    return torch.tensor(float(value))


def test_a_meter_weighs_by_rows():
    meter = utils.Meter("epoch 1")
    meter.add(3, scalar(0), {"a": scalar(1), "b": scalar(10)})
    meter.add(1, scalar(0), {"a": scalar(5), "b": scalar(20)})
    assert meter.means() == {"loss": 0, "a": 2.0, "b": 12.5}
    meter = utils.Meter("epoch 1")
    meter.add(3, scalar(1), {"cls_loss": scalar(1), "cls_acc": scalar(5)})
    assert meter.means() == {"cls_loss": 1, "cls_acc": 5}  # the loss has no other part


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_meter_names_the_first_step_and_the_term_for_which_the_loss_is_not_finite(value):
    meter = utils.Meter("student epoch 7")
    for step in range(1, 6):
        bad = value if step == 3 else 1
        meter.add(2, scalar(bad), {"ce": scalar(1), "kd": scalar(bad), "tf": scalar(value if step == 4 else 1)})
    with pytest.raises(Fault, match=r"^student epoch 7, step 3: kd is not finite"):
        meter.means()


def test_a_term_that_is_no_part_of_the_loss_may_be_anything():
    meter = utils.Meter("student epoch 7")
    meter.add(2, scalar(1), {"ce": scalar(1), "ss": scalar("nan")})
    assert meter.means()["ce"] == 1


@pytest.mark.parametrize("k", [1, 5])
def test_accuracy_counts_the_rows_whose_target_is_among_the_k_best(k):
    generator = torch.Generator().manual_seed(0)
    scores = torch.stack([torch.randperm(9, generator=generator) for _ in range(200)]).bfloat16()
    target = torch.arange(200) % 9
    best = [sorted(range(9), key=row.__getitem__)[-k:] for row in scores.tolist()]
    expected = sum(int(label) in columns for columns, label in zip(best, target, strict=True)) / 2
    assert utils.accuracy(scores, target, k).item() == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------- evaluation


def data_of(classes, count=40):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    split = sources.Split(pixels, torch.arange(count) % classes)
    return cifar.Images(split, sources.STATISTICS["synthetic"], "cpu", batch_size=8)


@pytest.mark.parametrize("classes", [5, 6])
def test_evaluate_gives_loss_and_accuracies_over_the_whole_split(classes):
    data, model = data_of(classes), nn.Sequential(nn.Flatten(), nn.Linear(3072, classes)).train()
    loss, acc, top5 = utils.evaluate(model, data, AUTOCAST)
    logits = model(torch.cat([batch.x for batch in data.test_batches(1)]))
    assert not model.training
    assert loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert acc == pytest.approx((logits.argmax(1) == data.labels).float().mean().item() * 100)
    last = (logits.argmin(1) == data.labels).float().mean().item() * 100  # of six classes
    assert top5 == (None if classes == 5 else pytest.approx(100 - last))


def test_the_test_of_the_best_epoch_is_of_its_weights():
    val, test = data_of(3, 8), data_of(3)
    data, network = cifar.Data(val, val, test, {}), Wrapper(models.model_dict["resnet8"](num_classes=3))
    best = {name: value + 1 for name, value in network.state_dict().items()}
    acc = utils.test_of_best(network, {"state_dict": best}, data, AUTOCAST, network.backbone)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in best.items())
    assert acc == utils.evaluate(network.backbone, test, AUTOCAST).acc
    assert utils.test_of_best(network, {}, cifar.Data(val, test, test, {}), AUTOCAST) is None


def test_a_test_whose_loss_is_not_finite_says_which(tmp_path, monkeypatch, fails):
    class Explosion(utils.SGD):
        def step(self, loss):
            super().step(loss)
            self.optimizer.param_groups[0]["params"][-1].data.fill_(torch.nan)  # only the next forward pass meets it

    monkeypatch.setattr(utils, "SGD", Explosion)
    flags = ["--arch", "resnet8", *TINY, "--train-size", "16", "--experiments", tmp_path]
    assert "test after teacher epoch 1, step 1: cls_loss is not finite" in fails(teacher.main, *flags, status=1)


# ----------------------------------------------------------------------------------------------------- size of networks


def test_multiply_adds_are_those_counted_by_hand(capsys):
    stem, stage1 = 3 * 16 * 9 * 32**2, 2 * 16 * 16 * 9 * 32**2
    stage2 = (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32) * 16**2  # the last: the shortcut
    stage3 = (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64) * 8**2
    by_hand = stem + stage1 + stage2 + stage3
    model = models.model_dict["resnet8"]().train()
    statistics = model.bn1.running_mean.clone()
    assert utils.sizes(32, model)["multiply_adds"] == by_hand + 64 * 100
    assert utils.sizes(64, model)["multiply_adds"] == 4 * by_hand + 64 * 100
    assert model.training and torch.equal(model.bn1.running_mean, statistics)
    assert "0.08 M parameters, 12.5 M multiply-adds" in capsys.readouterr().out


def test_sizes_are_the_published_ones():
    student, teacher = (models.model_dict[arch](num_classes=10) for arch in ("resnet56", "resnet110"))
    published = {"params": 8.5e5, "multiply_adds": 1.25e8}  # Li et al., ICLR 2017, table 1
    published |= {"teacher_params": 1.72e6, "teacher_multiply_adds": 2.53e8}
    assert utils.sizes(32, student, teacher) == pytest.approx(published, rel=0.01)


# ------------------------------------------------------------------------------------------------------------ pictures


def test_similarities_stand_side_by_side_and_one_is_white():
    teacher_side, student_side = torch.full((3, 1), 1.0), torch.full((3, 1), -1.0)
    image = utils.similarity_image(teacher_side, student_side)
    assert image.shape == (1, 12, 16)
    assert image[0, :, :4].eq(1).all() and image[0, :, 12:].eq(0).all()
