"""harness/progress.py: a line a minute where there is no terminal."""

from harness import progress


def test_without_a_terminal_a_line_a_minute_says_how_far_the_work_is(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    work = progress.Progress(5000, "teacher epoch 3", "images")
    for seconds in (0, 59, 30, 20, 40):
        now += seconds
        work.add(1000, lambda: {"loss": 1.25})
    work.close()
    lines = [
        "teacher epoch 3: 3,000 of 5,000 images, 0:00:59 left  loss 1.250",  # 89 s for three fifths
        "teacher epoch 3: 5,000 of 5,000 images, 0:00:00 left  loss 1.250",
    ]
    assert capsys.readouterr().out.splitlines() == lines
