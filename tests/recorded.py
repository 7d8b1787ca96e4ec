"""Finished runs, written by hand."""

import json

START = {"command": ["student.py", "--t-path", "/home/me"], "commit": "0123456789ab", "python": "3.11.7"}
START |= {"torch": "2.14.1", "device": "cpu (x86_64)", "threads": 1, "started": "2026-01-02T03:04:05+00:00"}
# What config.json says of the published flags
COMMON = {"epoch": 240, "batch_size": 64, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "gamma": 0.1}
COMMON |= {"milestones": [150, 180, 210], "dataset": "cifar100", "side": 32, "train_size": None, "test_size": None}
COMMON |= {"val_fraction": None, "few_shot": 1.0, "label_noise": 0.0, "seed": 0, "amp": "off", "compile": False}
COMMON |= {"deterministic": False, "save_interval": 40}
KD = {"ce_weight": 0.1, "kd_weight": 0.9, "kd_T": 4.0}
SSKD = KD | {"tf_weight": 2.7, "ss_weight": 10.0, "tf_T": 4.0, "ss_T": 0.5, "ratio_tf": 1.0, "ratio_ss": 0.75}
SSKD |= {"t_epoch": 60, "t_lr": 0.05, "t_milestones": [30, 45]}
TF, SS = {"ss_weight": 0.0}, {"tf_weight": 0.0}  # SSKD without ss, without tf
PLAIN = TF | SS


def write_run(folder, flags, best, last, starts=(START,), **result):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"flags": flags, "starts": starts}))
    (folder / "result.json").write_text(json.dumps({"best_acc": best, "last_acc": last, "best_epoch": 1} | result))
    return folder


def write_network(root, arch, best, last, seed=0, **flags):
    """A network trained alone."""
    return write_run(root / f"teacher_{arch}_seed{seed}", COMMON | {"arch": arch, "seed": seed} | flags, best, last)


def write_student(root, pair, best, last, seed=0, teacher_seed=None, teacher=None, method=None, **flags):
    """A student by SSKD or a compared method. Its teacher has its seed, unless a seed or a fingerprint is given."""
    teacher_seed = seed if teacher_seed is None else teacher_seed
    given = COMMON | {"s_arch": pair[1], "seed": seed, "teacher": teacher or f"{pair[0]}-{teacher_seed}"}
    given |= (KD | {"method": method, "first_epoch": None} if method else SSKD) | flags
    number = len(list(root.glob("*")))  # the real name has the flags
    name = f"{method or 'sskd'}_student_{pair[1]}_{number}_seed{seed}_teacher_{pair[0]}_seed{teacher_seed}"
    return write_run(root / name, given, best, last)


def change(file, **entries):
    """Changes entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
