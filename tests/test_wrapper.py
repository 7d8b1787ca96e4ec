"""wrapper.py: the SS head, gradients through it, and the folded teacher."""

import pytest
import torch
from oracle import fill
from torch import nn

import models
from wrapper import Wrapper, check_network, classifier, frozen

ONE_A_FAMILY = ("resnet8", "ResNet50", "wrn_16_2", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2")


def images(count=4):
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=torch.channels_last)


def test_the_head_is_a_two_layer_projection_of_the_last_feature():
    wrapper = Wrapper(models.model_dict["vgg8"](num_classes=10)).eval()
    assert [type(layer) for layer in wrapper.proj_head] == [nn.Linear, nn.ReLU, nn.Linear]
    logits, embedding, feature = wrapper(images())
    assert logits.shape == (4, 10)
    assert embedding.shape == feature.shape == (4, 512)
    features, expected = wrapper.backbone(images(), is_feat=True)
    torch.testing.assert_close(logits, expected)
    first, last = wrapper.proj_head[0], wrapper.proj_head[2]
    by_hand = (features[-1] @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(embedding, by_hand, rtol=1e-4, atol=1e-6)


def test_without_backbone_gradients_only_the_head_learns():
    wrapper = Wrapper(models.model_dict["resnet8"]())
    logits, embedding, feature = wrapper(images(), bb_grad=False)
    assert not logits.requires_grad
    assert not feature.requires_grad
    embedding.sum().backward()
    assert all(parameter.grad is None for parameter in wrapper.backbone.parameters())
    assert all(parameter.grad is not None for parameter in wrapper.proj_head.parameters())
    wrapper(images())[1].sum().backward()
    assert wrapper.backbone.conv1.weight.grad is not None


def close(fast, plain):
    """Equal up to the rounding of float32."""
    return all((got - want).norm() <= 1e-4 * want.norm() for got, want in zip(fast, plain, strict=True))


@pytest.mark.parametrize(
    "arch", [pytest.param(x, marks=pytest.mark.slow) if x == "ResNet50" else x for x in ONE_A_FAMILY]
)
def test_a_frozen_network_answers_as_the_plain_one_which_stays_as_it_was(arch):
    plain = fill(models.model_dict[arch]()).to(memory_format=torch.channels_last).eval()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    for maps, preact in ((False, False), (True, False), (True, True)):
        network = frozen(plain, maps, preact)
        assert not any(parameter.requires_grad for parameter in network.parameters())
        with torch.no_grad():
            features, logits = network(images())
            expected, expected_logits = plain(images(), is_feat=True, preact=preact)
        assert close([*features, logits], [*(expected if maps else expected[-1:]), expected_logits])
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_only_batch_norms_that_read_a_sum_or_a_returned_feature_stay():
    def norms(arch, maps):
        network = frozen(models.model_dict[arch](), maps)
        called = [network.get_submodule(node.target) for node in network.graph.nodes if node.op == "call_module"]
        return sum(isinstance(module, nn.BatchNorm2d) for module in called)

    assert [norms(arch, maps=True) for arch in ("resnet56", "ResNet50", "vgg13", "ShuffleV2")] == [0] * 4
    # of 37: each of 18 blocks begins with one, the first of which reads the stem, and the stem's output is a feature
    assert (norms("wrn_40_2", maps=False), norms("wrn_40_2", maps=True)) == (18, 19)


@pytest.mark.parametrize("arch", ["wrn_16_1", "vgg8", "ShuffleV1"])
def test_a_frozen_teachers_unfolded_state_is_that_of_the_plain_network_with_its_head(arch):
    network, plain = (fill(models.model_dict[arch](), base) for base in (0, 1000))
    teacher = Wrapper(frozen(network, maps=False)).eval()
    restored = Wrapper(plain).eval()
    restored.load_state_dict(teacher.unfolded_state(network))
    with torch.no_grad():
        answer = teacher(images())
        assert close(answer, restored(images()))
        from_feature = teacher(None, feature=answer.feature)
    assert all(torch.equal(again, first) for again, first in zip(from_feature, answer, strict=True))


class OwnLinear(nn.Linear):
    pass


class Small(nn.Module):
    """(N, 3, any, any) → 7 classes, as a network of the zoo; `lacking` says in what not."""

    def __init__(self, lacking=None):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        if lacking == "hook":
            self.body[1].register_forward_hook(lambda module, given, made: made * 2)
        self.fc, self.lacking = (OwnLinear if lacking == "own linear" else nn.Linear)(5, 7), lacking

    def forward(self, x, is_feat=False, **preact):
        if self.lacking == "preact" and preact:
            raise TypeError("unexpected keyword argument 'preact'")
        if self.lacking == "trace" and x.mean() > 10:
            raise ValueError
        if self.lacking == "twice":
            x = self.body[0](x.mean(1, keepdim=True).expand_as(x) / 2).mean(1, keepdim=True).expand(-1, 3, -1, -1)
        feature = self.body(x)
        logits = self.fc(feature * 2 if self.lacking == "feature" else feature)
        return ([x if self.lacking == "last" else feature], logits) if is_feat else logits


@pytest.mark.parametrize(
    ("lacking", "classes", "words"),
    [
        ("preact", 7, "mine fails on two images, with is_feat=True or without: .*unexpected keyword argument 'preact'"),
        ("last", 7, r"its last nn.Linear is no classifier of features\[-1\], \(3, 32, 32\) per image"),
        ("feature", 7, r"its logits are not what its last nn.Linear gives for features\[-1\]"),
        (None, 8, r"logits with and without is_feat=True should both be \(2, 8\): \(2, 7\), \(2, 7\)"),
    ],
)
def test_a_network_that_no_student_can_learn_from_is_refused(lacking, classes, words):
    with pytest.raises(models.NetworkError, match=words):
        check_network(fill(Small(lacking)), "mine", classes, 32)


@pytest.mark.parametrize("arch", ["resnet8", "MobileNetV2"])
def test_a_network_of_the_zoo_passes_and_stays_as_it_is(arch, capsys):
    network = models.model_dict[arch](num_classes=10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    draws = torch.get_rng_state()
    check_network(network, arch, 10, 32)
    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_linear_layer_of_ones_own_class_is_a_classifier():
    teacher = Wrapper(frozen(fill(Small("own linear")), maps=False))
    assert isinstance(classifier(teacher.backbone), OwnLinear)


@pytest.mark.parametrize("lacking", ["trace", "twice", "hook"])
def test_a_teacher_that_cannot_be_traced_or_folded_is_used_unfolded_with_a_line(lacking, capsys):
    network = fill(Small(lacking))
    check_network(network, "mine", 7, 32)
    assert capsys.readouterr().out.startswith("frozen teacher: its batch norms can't be folded")
    unfolded = frozen(network)
    assert not any(parameter.requires_grad for parameter in unfolded.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    torch.testing.assert_close(unfolded(images())[1], network.eval()(images()))
