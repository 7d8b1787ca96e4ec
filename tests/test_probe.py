"""experiments/probe.py: the classifier is optimal, and runs can be probed."""

import numpy as np
import torch

from experiments import probe


def test_the_classifier_minimises_the_loss():
    """A convex function is minimal where its gradient is 0; the gradient is written out in NumPy."""
    rng = np.random.default_rng(0)
    x, labels, decay = rng.normal(size=(60, 4)), rng.integers(0, 3, 60), 0.1
    linear = probe.fit(torch.from_numpy(x), torch.from_numpy(labels), 3, decay)
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    logits = x @ weight.T + bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[labels]
    assert np.abs(p.T @ x / 60 + decay * weight).max() < 1e-5
    assert np.abs(p.mean(0)).max() < 1e-5
    assert np.abs(weight).max() > 0.01


def test_a_network_is_probed_on_another_data_set(runs, capsys):
    sizes = ["--train-size", "200", "--test-size", "100", "--dataset", "synthetic"]
    probe.main([str(runs.teacher), str(runs.student), *sizes])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split("%  ")[1] for line in lines] == [str(runs.teacher), str(runs.student)]
    assert all(0 <= float(line.split()[0]) <= 100 for line in lines)


def test_a_missing_network_is_reported(fails):
    assert "nowhere: no such file or folder" in fails(probe.main, "nowhere", "--dataset", "synthetic")
