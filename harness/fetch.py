"""Checkpoints that are no files yet: an address, or a library's own weights. torch.hub's folder keeps both."""

import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from harness import processes
from harness.files import digest, save
from harness.flags import UserError
from models import LIBRARIES, build, check_name, has_fixed_side, weights_of


def local(path: str, check: Callable[[Path], object]) -> Path:
    """`path` itself or, if it is an address or a library's network, the file that keeps what is fetched for it.

    `check` raises UserError if a file is no checkpoint; such a file is not kept.
    """
    if path.startswith(("https://", "http://")):
        with processes.first_then_others():
            return _download(path, check)
    if path.startswith(LIBRARIES) and not Path(path).exists():
        with processes.first_then_others():
            return _weights(path)
    return Path(path)


def _download(url: str, check: Callable[[Path], object]) -> Path:
    """The file at an address, under the names of its last folders."""
    names = [name for name in unquote(urlsplit(url).path).split("/") if name not in ("", "..")]
    file = Path(torch.hub.get_dir(), "sskd", digest(url), *names[-3:])
    if not file.is_file():
        print(f"fetching {url}, to be kept as {file}", flush=True)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), progress=bool(sys.stderr and sys.stderr.isatty()))
            check(file)
        except UserError as error:
            file.unlink()
            raise UserError(f"{url}: {error}") from None
        except Exception as error:  # urllib and http each raise their own
            raise UserError(f"{url} could not be fetched: {error or type(error).__name__}") from None
    return file


def _weights(name: str) -> Path:
    """The weights that a library has for a network, as a checkpoint of this repository."""
    file = Path(torch.hub.get_dir(), "sskd", name, "pretrained.pth")
    if not file.exists():
        check_name(name, ())
        about = weights_of(name)
        network = build(name, about["classes"], about["side"], pretrained=True)
        if not has_fixed_side(name):
            del about["side"]  # convolutions take any
        file.parent.mkdir(parents=True, exist_ok=True)
        save(file, {"state_dict": network.state_dict(), "about": {"arch": name} | about})
    return file
