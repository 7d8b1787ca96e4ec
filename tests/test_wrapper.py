"""wrapper.py: the SS head, gradients through it, and the folded teacher."""

import pytest
import torch
from oracle import fill
from torch import nn

import models
from wrapper import NetworkError, Wrapper, check_network, fold_batch_norms, frozen


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


@pytest.mark.parametrize("arch", models.model_dict)
def test_the_folded_teacher_equals_the_plain_one_and_answers_from_its_own_feature_alike(arch):
    teacher = fill(Wrapper(models.model_dict[arch]())).to(memory_format=torch.channels_last).eval()
    folded = fold_batch_norms(teacher)
    with torch.inference_mode():
        answer = folded(images())
        for plain, fast in zip(teacher(images()), answer, strict=True):
            assert (plain - fast).norm() <= 1e-4 * plain.norm()
        for again, fast in zip(folded(None, feature=answer.feature), answer, strict=True):
            assert torch.equal(again, fast)


@pytest.mark.parametrize("preact", [False, True])
@pytest.mark.parametrize("arch", models.model_dict)
def test_the_frozen_network_has_all_features_of_the_plain_one(arch, preact):
    plain = fill(models.model_dict[arch]()).to(memory_format=torch.channels_last).eval()
    fast = frozen(plain, preact=preact)
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    with torch.no_grad():
        (features, logits), (expected, expected_logits) = fast(images()), plain(images(), is_feat=True, preact=preact)
    assert len(features) == len(expected)
    for got, want in zip((*features, logits), (*expected, expected_logits), strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()


def test_folding_removes_every_batch_norm_but_those_that_read_a_sum():
    def norms(arch):
        backbone = fold_batch_norms(Wrapper(models.model_dict[arch]())).backbone
        called = [backbone.get_submodule(node.target) for node in backbone.graph.nodes if node.op == "call_module"]
        return sum(isinstance(module, nn.BatchNorm2d) for module in called)

    assert norms("resnet56") == norms("ResNet50") == norms("vgg13") == norms("ShuffleV2") == 0
    assert norms("wrn_40_2") == 18  # of 37: each of 18 blocks begins with one, the first of which follows the stem


def test_folding_leaves_the_teacher_as_it_was_and_shares_its_head():
    teacher = Wrapper(models.model_dict["resnet8"]())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    folded = fold_batch_norms(teacher)
    assert folded.proj_head is teacher.proj_head
    assert not any(parameter.requires_grad for parameter in folded.backbone.parameters())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


class Small(nn.Module):
    """(N, 3, any, any) → 7 classes, as a network of the zoo; `lacking` says in what not."""

    def __init__(self, lacking=None):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc, self.lacking = nn.Linear(5, 7), lacking
        if lacking == "order":
            self.unused = nn.Linear(5, 7)

    def forward(self, x, is_feat=False, preact=False):
        if self.lacking == "trace" and x.mean() > 10:
            raise ValueError
        feature = self.body(x)
        logits = self.fc(feature * 2 if self.lacking == "feature" else feature)
        if self.lacking == "logits" and is_feat:
            logits = logits + 1
        features = [] if self.lacking == "features" else [x if self.lacking == "last" else feature]
        return (features, logits) if is_feat else logits


@pytest.mark.parametrize(
    ("lacking", "classes", "words"),
    [
        ("features", 7, "mine fails on two images, with is_feat=True or without: list index out of range"),
        ("last", 7, r"its last nn.Linear is no classifier of features\[-1\], \(3, 32, 32\) an image"),
        ("feature", 7, r"its logits are not what its last nn.Linear gives for features\[-1\]"),
        ("order", 7, r"its logits are not what its last nn.Linear gives for features\[-1\]"),
        ("logits", 7, r"gives for two images not twice the same logits \(2, 7\)"),
        (None, 8, r"gives for two images not twice the same logits \(2, 8\): \(2, 7\), \(2, 7\)"),
    ],
)
def test_a_network_that_lacks_what_a_teacher_needs_is_told_in_what(lacking, classes, words):
    with pytest.raises(NetworkError, match=words):
        check_network(fill(Small(lacking)), "mine", classes, 32)


def test_a_network_without_preact_is_refused_too():
    class Without(Small):
        def forward(self, x, is_feat=False):
            return super().forward(x, is_feat)

    with pytest.raises(NetworkError, match="unexpected keyword argument 'preact'"):
        check_network(fill(Without()), "mine", 7, 32)


@pytest.mark.parametrize("arch", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_a_network_of_the_zoo_passes_and_stays_as_it_is(arch, capsys):
    network = models.model_dict[arch](num_classes=10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    draws = torch.get_rng_state()
    check_network(network, arch, 10, 32)
    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), draws)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_teacher_that_cannot_be_traced_is_used_unfolded_with_a_line(capsys):
    network = fill(Small("trace"))
    check_network(network, "mine", 7, 32)
    folded = fold_batch_norms(Wrapper(network))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert lines[0].startswith("frozen teacher: its batch norms stay, for torch.fx can't trace it (symbolically traced")
    assert not any(parameter.requires_grad for parameter in folded.backbone.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    torch.testing.assert_close(folded(images()).logits, network.eval()(images()))
