"""experiments/similarity.py: KL divergence and CKA against NumPy, and for runs."""

import json

import numpy as np
import pytest
import torch

from experiments import similarity
from harness import sources


def test_kl_equals_its_definition():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 7, 5)) * 3
    p, q = (np.exp(logits / 2) / np.exp(logits / 2).sum(1, keepdims=True) for logits in (teacher, student))
    expected = (p * np.log(p / q)).sum(1).mean()
    assert similarity.kl_divergence(torch.from_numpy(student), torch.from_numpy(teacher), 2) == pytest.approx(expected)
    assert similarity.kl_divergence(torch.from_numpy(teacher), torch.from_numpy(teacher)) == pytest.approx(0, abs=1e-12)


def test_cka_equals_the_alignment_of_centred_kernels():
    rng = np.random.default_rng(1)
    x, y = rng.normal(2, 1, (30, 6)), rng.normal(-1, 3, (30, 4))
    y[:, 0] += x[:, 1]
    centre = np.eye(30) - 1 / 30
    k, other = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre  # Kornblith et al., eq. 1 to 3
    expected = (k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum())
    assert similarity.linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected)


def test_cka_ignores_rotation_scale_and_shift_of_the_features():
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(size=(20, 5)))
    rotation = torch.from_numpy(np.linalg.qr(rng.normal(size=(5, 5)))[0])
    assert similarity.linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)


def test_a_teacher_is_identical_to_itself_and_a_student_is_not(runs, capsys, monkeypatch):
    generated = sources.synthetic  # fewer, and so in less time
    monkeypatch.setattr(sources, "synthetic", lambda train, size: generated(train, 40))
    paths = [str(runs.teacher), str(runs.student)]
    similarity.main(["--t-path", str(runs.teacher), *paths, "--json"])
    own, student = map(json.loads, capsys.readouterr().out.splitlines())
    assert (own["KL"], own["CKA"]) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    assert student["student"] == runs.student.name
    assert student["KL"] > 1e-6 and 0 <= student["CKA"] < 1
    similarity.main(["--t-path", str(runs.teacher), str(runs.student)])
    assert capsys.readouterr().out.startswith(f"KL {student['KL']:.4f}  CKA {student['CKA']:.4f}  ")
