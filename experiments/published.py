"""The published pipeline of SSKD, written anew: the reference that bench.py compares this repository with.

Views are PIL images, made one by one in a DataLoader. Cosine similarity expands both embeddings to all pairs. Selective
transfer sorts and calls `nonzero`. The frozen teacher builds a graph, which is then detached. Everything is float32 and
contiguous. SGD updates one parameter at a time. `.item()` reads every logged value in every step.

Two things differ from the published code: the sorts are stable, because ties would otherwise keep other rows, and
`random` draws the flips, because a DataLoader seeds it in each worker. Networks come with an SS head, as in wrapper.py;
all else is written here, so that no code is shared with what it is compared with.
"""

import random
from collections.abc import Iterable, Iterator
from itertools import chain, repeat

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

VIEWS = 4


class Views(Dataset):
    """The four views (4, 3, 32, 32) of each of the pixels (N, 32, 32, 3) and its label; `train` flips and crops."""

    def __init__(self, pixels: np.ndarray | Tensor, labels: np.ndarray | Tensor, statistics: tuple, train: bool):
        self.pixels, self.labels, self.train = np.asarray(pixels), labels.tolist(), train
        crop = [transforms.RandomCrop(32, padding=4)] if train else []
        self.transform = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(*statistics)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.pixels[i])
        if self.train and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        rotated = [Image.fromarray(np.rot90(np.asarray(image), k)) for k in range(VIEWS)]
        return torch.stack([self.transform(view) for view in rotated]), self.labels[i]


def batches(views: Views, batch: int, device: torch.device | str = "cpu", workers: int = 0) -> Iterator:
    """Endless epochs of views (4B, 3, 32, 32), the view fastest, and labels (B,)."""
    loader = DataLoader(views, batch, shuffle=views.train, num_workers=workers)
    for x, target in chain.from_iterable(repeat(loader)):
        yield x.flatten(0, 1).to(device), target.to(device)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(4B, …) → normal (B, …), rotated (3B, …)."""
    rotated = torch.arange(len(x), device=x.device) % VIEWS != 0
    return x[~rotated], x[rotated]


def similarity(embedding: Tensor) -> Tensor:
    """(4B, D) → (3B, B), through tensors of 3B × D × B."""
    normal, rotated = split(embedding)
    pairs = (len(rotated), embedding.shape[1], len(normal))
    return F.cosine_similarity(rotated.unsqueeze(2).expand(pairs), normal.t().unsqueeze(0).expand(pairs), dim=1)


def positives(similarities: Tensor) -> Tensor:
    """(3B, B) → (3B,): the column of each rotated view's own image."""
    return torch.arange(similarities.shape[1], device=similarities.device).repeat_interleave(VIEWS - 1)


def kept(scores: Tensor, target: Tensor, ratio: float) -> Tensor:
    """The indices, increasing, of the rows of (N, C) that selective transfer keeps."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = (order == target.unsqueeze(1)).long().argmax(1)
    wrong = torch.nonzero(rank).numel()  # waits for the device
    return rank.argsort(stable=True)[: len(rank) - wrong + int(wrong * ratio)].sort()[0]


def kl(s_logits: Tensor, t_logits: Tensor, T: float) -> Tensor:
    """T² · KL(teacher ‖ student), averaged over the rows; NaN without rows."""
    return F.kl_div(F.log_softmax(s_logits / T, 1), F.softmax(t_logits / T, 1), reduction="batchmean") * T * T


def terms(
    s_logits: Tensor, t_logits: Tensor, s_embedding: Tensor, t_embedding: Tensor, target: Tensor,
    kd_T: float = 4.0, tf_T: float = 4.0, ss_T: float = 0.5, ratio_tf: float = 1.0, ratio_ss: float = 0.75,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """ce, kd, tf and ss, unweighted; the teacher's tensors are detached after their graph was built."""
    s_normal, s_rotated = split(s_logits)
    t_normal, t_rotated = (x.detach() for x in split(t_logits))
    s_similarity, t_similarity = similarity(s_embedding), similarity(t_embedding).detach()
    tf_rows = kept(t_rotated, target.repeat_interleave(VIEWS - 1), ratio_tf)
    ss_rows = kept(t_similarity, positives(t_similarity), ratio_ss)
    tf = kl(s_rotated[tf_rows], t_rotated[tf_rows], tf_T)
    ss = kl(s_similarity[ss_rows], t_similarity[ss_rows], ss_T)
    return F.cross_entropy(s_normal, target), kl(s_normal, t_normal, kd_T), tf, ss


def total(ce: Tensor, kd: Tensor, tf: Tensor, ss: Tensor) -> Tensor:
    return 0.1 * ce + 0.9 * kd + 2.7 * tf + 10.0 * ss


def accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """Share of the rows of (N, C) whose highest column is the target, in percent."""
    return (scores.argmax(1) == target).float().mean() * 100


def loss(teacher: nn.Module, student: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's loss on a batch, and what to log."""
    t_logits, t_embedding, _ = teacher(x)  # builds a graph that is not needed
    s_logits, s_embedding, _ = student(x)
    ce, kd, tf, ss = terms(s_logits, t_logits, s_embedding, t_embedding, target)
    logged = {"ce_loss": ce, "kd_loss": kd, "tf_loss": tf, "ss_loss": ss}
    return total(ce, kd, tf, ss), logged | {"cls_acc": accuracy(split(s_logits)[0], target)}


def ss_head_loss(teacher: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the teacher's SS head on a batch, and what to log."""
    features, _ = teacher.backbone(x, is_feat=True)  # builds a graph that is not needed
    similarities = similarity(teacher.proj_head(features[-1].detach()))
    target = positives(similarities)
    loss = F.cross_entropy(similarities, target)
    return loss, {"teacher_ssp_loss": loss, "teacher_ssp_acc": accuracy(similarities, target)}


class CRD(nn.Module):
    """CRD's term (Tian et al., ICLR 2020): contrasts each network's embedding with rows of the other one's memory."""

    def __init__(self, s_width: int, t_width: int, images: int, dim: int = 128, temperature: float = 0.07):
        super().__init__()
        self.embed_s, self.embed_t = nn.Linear(s_width, dim), nn.Linear(t_width, dim)
        bound = (dim / 3) ** -0.5
        for name in ("memory_s", "memory_t"):
            self.register_buffer(name, torch.empty(images, dim).uniform_(-bound, bound))
        self.temperature, self.Z = temperature, {}

    def forward(self, s: Tensor, t: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Features (B, D_s), (B, D_t), the images' rows (B,), places (B, 1 + K) with the positive first → scalar."""
        v, w = self.embed_s(s), self.embed_t(t)
        v, w = v / v.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)
        loss = self.contrast("memory_t", v, places) + self.contrast("memory_s", w, places)
        with torch.no_grad():
            for memory, embedding in ((self.memory_s, v), (self.memory_t, w)):
                mean = 0.5 * memory[rows] + 0.5 * embedding
                memory[rows] = mean / mean.norm(dim=1, keepdim=True)
        return loss

    def contrast(self, name: str, anchor: Tensor, places: Tensor) -> Tensor:
        memory = getattr(self, name)
        chosen = memory[places.flatten()].unflatten(0, places.shape)  # B x (1 + K) x D
        scores = (torch.bmm(chosen, anchor.unsqueeze(2)).squeeze(2) / self.temperature).exp()
        if name not in self.Z:
            self.Z[name] = scores.mean().item() * len(memory)
        p, noise = scores / self.Z[name], (places.shape[1] - 1) / len(memory)
        positive = (p[:, 0] / (p[:, 0] + noise + 1e-7)).log()
        negative = (noise / (p[:, 1:] + noise + 1e-7)).log()
        return -(positive.sum() + negative.sum()) / len(anchor)


def sgd(parameters: Iterable[nn.Parameter], lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4, foreach=False, fused=False)


def step(optimizer: torch.optim.SGD, loss: Tensor, logged: dict[str, Tensor]) -> dict[str, float]:
    """One update; returns what to log as numbers."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return read(logged)


def read(logged: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in logged.items()}  # each waits for the device
