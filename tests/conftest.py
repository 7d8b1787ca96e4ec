import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import baseline
import student
import teacher

ROOT = Path(__file__).parent.parent
TINY = ["--dataset", "synthetic", "--train-size", "48", "--test-size", "40", "--batch-size", "16"]
TINY += ["--epoch", "3", "--milestones", "2"]
TINY_STUDENT = [*TINY, "--t-epoch", "2", "--t-milestones", "1", "--s-arch", "resnet14x05"]
SHORT = ["--dataset", "synthetic", "--train-size", "4", "--test-size", "4", "--batch-size", "4"]
SHORT += ["--epoch", "1", "--milestones", "1"]
SHORT_STUDENT = [*SHORT, "--s-arch", "resnet8", "--t-epoch", "1", "--t-milestones", "1"]
OF_THE_MOMENT = ("seconds", "starts", "teacher")  # teacher: its path


def run_script(*command, cwd, **kwargs):
    """A script of the repository as a user runs it; warnings are errors."""
    script, *flags = (str(word) for word in command)
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / script, *flags], cwd=cwd, capture_output=True, text=True, **kwargs
    )


def end_of(main, flags):
    """Exit status of an entry in this process."""
    try:
        main(flags)
    except SystemExit as end:
        return end.code
    return 0


def contents(folder):
    """Everything a run leaves that has to repeat: all files but the events, without times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name == ".lock" or path.parent.name == "events":
            continue
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            found[path.name] = {k: v for k, v in values.items() if k not in OF_THE_MOMENT}
        elif path.suffix == ".pth":
            found[path.name] = plain(torch.load(path, weights_only=True))
        else:
            found[path.name] = path.read_bytes()
    return found


def plain(value):
    """A checkpoint's content in a form that == compares bit for bit; times, sizes and files to be written left out."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if name not in ("seconds", "sizes", "files")}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A tiny teacher and its student, trained from the command line, nothing in between going wrong."""
    cwd = tmp_path_factory.mktemp("runs")
    trained = run_script("teacher.py", "--arch", "resnet8", *TINY, cwd=cwd)
    assert (trained.returncode, trained.stderr) == (0, "")
    teacher_folder = cwd / "experiments" / "teacher_resnet8_seed0"
    distilled = run_script("student.py", "--t-path", teacher_folder, *TINY_STUDENT, cwd=cwd)
    assert (distilled.returncode, distilled.stderr) == (0, "")
    (student_folder,) = (cwd / "experiments").glob("sskd_student_*")
    return SimpleNamespace(
        cwd=cwd, teacher=teacher_folder, student=student_folder, outputs=[trained.stdout, distilled.stdout]
    )


@pytest.fixture
def fails(capsys):
    """Runs an entry in this process, which has to end in one line and write nothing; returns that line."""

    def check(main, *flags, status=2):
        with pytest.raises(SystemExit) as end:
            main([str(flag) for flag in flags])
        error = capsys.readouterr().err
        assert end.value.code == status, error
        assert len(error.strip().splitlines()) == 1, error
        assert "Traceback" not in error
        return error

    return check


@pytest.fixture
def entries():
    return {"teacher.py": teacher.main, "student.py": student.main, "baseline.py": baseline.main}


# Finished runs, written without training them.
LOW_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")
NO_MATTER = {"gpu_id", "data_root", "data_url", "experiments", "overwrite", "evaluate", "export"}
NO_MATTER |= {"t_path", "t_arch", "s_path", "t_features"}  # a student's config.json has the teacher's fingerprint
START = {"command": ["-"], "commit": "0123456789ab", "python": "3.11.7", "torch": "2.14.1", "device": "cpu (x86_64)"}
START |= {"threads": 1, "started": "2026-01-02T03:04:05+00:00"}


def flags_of(parse_args, *words):
    """What config.json holds for a command line."""
    return {name: value for name, value in vars(parse_args(words)).items() if name not in NO_MATTER}


def write_run(folder, flags, best, last, starts=(START,)):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"flags": flags, "starts": starts}))
    (folder / "result.json").write_text(json.dumps({"best_acc": best, "last_acc": last, "best_epoch": 1}))


def write_teacher(root, arch, best, last, *words):
    flags = flags_of(teacher.parse_args, "--arch", arch, "--lr", "0.01" if arch in LOW_RATE else "0.05", *words)
    write_run(root / f"teacher_{arch}_seed{flags['seed']}", flags, best, last)


def write_student(root, pair, best, last, *words, teacher_seed=None, teacher=None, **more):
    """A student of the teacher of its own seed unless told; `teacher`: the fingerprint of the teacher's weights."""
    flags = flags_of(student.parse_args, "--t-path", "-", "--s-arch", pair[1], *words) | more
    teacher_seed = flags["seed"] if teacher_seed is None else teacher_seed
    flags["teacher"] = teacher or f"{pair[0]}-{teacher_seed}"
    weights = f"weight{flags['tf_weight']}+{flags['ss_weight']}"
    folder = f"sskd_student_{pair[1]}_{weights}_seed{flags['seed']}_teacher_{pair[0]}_seed{teacher_seed}"
    write_run(root / folder, flags, best, last)
    return root / folder


def section(study, title=None):
    """What experiments/README.md says of a study, or what stands there under one of its titles."""
    page = (ROOT / "experiments" / "README.md").read_text()
    text = page.partition(f"\n## {study}\n")[2].partition("\n## ")[0]
    return text if title is None else text.partition(f"\n### {title}\n")[2].partition("\n### ")[0]


def rows_in(lines):
    """The rows of a Markdown table, by the heads of their columns."""
    head, _, *rows = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def records(file):
    """What each line of a .jsonl file says."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def change(file, **entries):
    """Changes entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
