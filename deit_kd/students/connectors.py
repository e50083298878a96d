"""Connectors: linear maps from a student's features to the widths of a teacher's, used only in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deit_kd.interfaces import Link, StudentOutput
from deit_kd.randomness import seed_initialisation
from deit_kd.students.heads import TimmStudent


class Connectors(nn.Module):
    """One linear map with bias for each link that has a connector; maps are connected at each place separately.

    Args:
        links: what to connect.
        seed: of the run; the student's own initial weights do not depend on the connectors.
    """

    def __init__(self, links: Sequence[Link], seed: int = 0) -> None:
        super().__init__()
        self.links = tuple(links)
        with torch.random.fork_rng(devices=[]):
            seed_initialisation("connectors", seed)
            self.linears = nn.ModuleList(_connector(link) for link in links)

    def forward(self, features: Mapping[str, Tensor], links: Sequence[Link]) -> dict[str, Tensor]:
        """Return the features of `links` by their names, those that have a connector in the teacher's widths."""
        return {
            link.name: _by_channels(linear, features[link.student])
            for link, linear in zip(self.links, self.linears, strict=True)
            if link in links
        }

    def freeze_all_but(self, links: Sequence[Link]) -> None:
        """Train only the connectors of `links` from now on."""
        for link, linear in zip(self.links, self.linears, strict=True):
            linear.requires_grad_(link in links)


def _connector(link: Link) -> nn.Module:
    return nn.Linear(link.student_width, link.teacher_width) if link.has_connector else nn.Identity()


def _by_channels(linear: nn.Module, features: Tensor) -> Tensor:
    connected: Tensor = linear(features.movedim(1, -1))
    return connected.movedim(-1, 1)


class ConnectedStudent(nn.Module):
    """A student that also answers with what a teacher's is compared with: what DDP wraps meanwhile.

    Args:
        student: its weights are trained, averaged and saved; the connectors are only trained.
        connectors: of the features to answer with.
        links: which of them.
        grid: h x w, of the teacher's dense logits; None if they are not compared.
    """

    def __init__(
        self,
        student: TimmStudent,
        connectors: Connectors,
        links: Sequence[Link],
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.connectors = connectors
        self._links = tuple(links)
        self._grid = grid
        self._features = tuple(dict.fromkeys(link.student for link in links))

    def draw_paths(self, views: int) -> Tensor | None:
        """Return what the student's does."""
        return self.student.draw_paths(views)

    def forward(self, images: Tensor, paths: Tensor | None = None) -> StudentOutput:
        """Answer `images` [B, 3, H, W] with every head, the connected features and the logits at places."""
        output: StudentOutput = self.student(images, self._features, self._grid, paths)
        if output.features is None:
            return output
        return output._replace(features=self.connectors(output.features, self._links))
