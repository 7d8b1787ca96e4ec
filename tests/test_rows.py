"""harness/rows.py: a row is read as it was written; a new, half written, damaged or foreign one is unknown."""

import contextlib
import errno
import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.flags import Fault, UserError
from harness.rows import FileRows, Rows

CPU = torch.device("cpu")
COUNT, WIDTH, KEY = 24, 2, "0123456789abcdef"
PLACES = torch.arange(COUNT)
WORDS = torch.randint(-(2**15), 2**15, (COUNT, WIDTH), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
ROW = 2 * (WIDTH + 4)  # bytes


def in_file(folder, count=COUNT, key=KEY, own=COUNT):
    return FileRows(folder / "rows.bin", count, WIDTH, key, CPU, own)


def in_memory(folder):
    return Rows(COUNT, WIDTH, KEY, CPU)


def known_in(table, places=PLACES):
    """Which rows are known; each of them is as it was written."""
    words, known = table.read(places)
    assert torch.equal(words[known], WORDS[places][known])
    return known.tolist()


@pytest.mark.parametrize("opened", [in_memory, in_file])
def test_a_row_is_known_once_it_is_written(opened, tmp_path):
    table, written = opened(tmp_path), set()
    assert not any(known_in(table))
    for places in (torch.tensor([7, 3, 20]), torch.tensor([3, 23])):
        table.write(places, WORDS[places])
        written |= set(places.tolist())
        assert known_in(table) == [place in written for place in range(COUNT)]
    asked = torch.tensor([20, 0, 20, 3])  # in any order, and one of them twice
    assert known_in(table, asked) == [True, False, True, True]


def test_a_longer_table_keeps_the_rows_of_a_shorter_one(tmp_path):
    in_file(tmp_path, count=5).write(PLACES[:5], WORDS[:5])
    assert known_in(in_file(tmp_path)) == [place < 5 for place in range(COUNT)]
    assert all(known_in(in_file(tmp_path, count=5), PLACES[:5]))


DAMAGE = {
    "cut short": lambda rows, other: rows[: COUNT // 2],
    "noise": lambda rows, other: np.random.default_rng(0).integers(-(2**15), 2**15, rows.shape, np.int16),
    "in another order": lambda rows, other: rows[::-1],
    "no checksums": lambda rows, other: rows * np.int16([1, 1, 0, 0, 0, 0]),
    "one bit of a word": lambda rows, other: rows ^ np.int16([0, 1, 0, 0, 0, 0]),
    "no words": lambda rows, other: rows * np.int16([0, 0, 1, 1, 1, 1]),
    "of another key": lambda rows, other: other,
    "copied without its holes": lambda rows, other: rows,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_or_foreign_row_is_unknown(kind, tmp_path):
    files = []
    for key in (KEY, KEY[::-1]):
        (tmp_path / key).mkdir()
        in_file(tmp_path / key, key=key).write(PLACES, WORDS)
        files.append(np.fromfile(tmp_path / key / "rows.bin", np.int16).reshape(COUNT, -1))
    file, folder = tmp_path / KEY / "rows.bin", tmp_path / KEY
    file.unlink()
    file.write_bytes(DAMAGE[kind](*files).tobytes())
    sound = {"cut short": COUNT // 2, "copied without its holes": COUNT}.get(kind, 0)
    table = in_file(folder)
    assert known_in(table) == [place < sound for place in range(COUNT)]
    table.write(PLACES, WORDS)
    assert all(known_in(in_file(folder)))


def test_two_that_use_the_file_at_once_read_each_others_rows(tmp_path):
    tables = [in_file(tmp_path) for _ in range(2)]
    tables[0].write(PLACES[:5], WORDS[:5])
    assert known_in(tables[1]) == [place < 5 for place in range(COUNT)]

    def use(table):
        for seed in range(50):
            places = torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed))[:8]
            known_in(table, places)
            table.write(places, WORDS[places])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(use, tables))
    assert all(known_in(tables[0]))


@pytest.mark.parametrize("how", ["an error", "half a row"])
def test_a_disk_that_fills_up_ends_in_a_fault_and_leaves_no_wrong_row(how, tmp_path, monkeypatch):
    table, pwrite, calls = in_file(tmp_path), os.pwrite, itertools.count(1)

    def full(file, content, place):
        if next(calls) < 7:
            return pwrite(file, content, place)
        if how == "an error":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, bytes(content)[:5], place)

    with monkeypatch.context() as patch, pytest.raises(Fault, match="No space left on device"):
        patch.setattr(os, "pwrite", full)
        table.write(PLACES, WORDS)
    assert known_in(in_file(tmp_path)) == [place < 6 for place in range(COUNT)]


def test_too_little_space_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be used: .*--t-features memory needs no file"):
        in_file(tmp_path / "missing")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=COUNT * ROW - 1))
    with pytest.raises(UserError, match="will grow by .* are free there"):
        in_file(tmp_path)
    assert not list(tmp_path.iterdir())
    in_file(tmp_path, own=COUNT - 1)
    for available, fits in ((60, False), (62, True)):  # kB, of which training needs a quarter
        monkeypatch.setattr(Path, "read_text", lambda self, kb=available: f"MemAvailable:   {kb} kB\n")
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="and training needs some"):
            Rows(46_656 // ROW, WIDTH, KEY, CPU)
