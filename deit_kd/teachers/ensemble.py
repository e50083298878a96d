"""Several teachers at once: the mean of their probabilities, or one drawn for each view (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deit_kd.interfaces import Batch, InputError, TeacherOutput
from deit_kd.randomness import derive
from deit_kd.teachers.frozen import FrozenTeacher
from deit_kd.teachers.specialists import Panel

COMBINATIONS = ("mean", "draw")


class EnsembleTeacher(nn.Module):
    """Answers with several frozen teachers, each with its own preprocessing and class map.

    ``mean`` is the log of the weighted mean of their probabilities at T = 1, so that a temperature acts on the
    ensemble's distribution. ``draw`` lets one teacher answer each view, drawn by weight from the view's epoch and
    position: neither batch size nor number of processes matters, and a label store replays it. Every teacher
    answers every batch; if a batch has no view ids, as in evaluation, ``draw`` answers like ``mean``.

    Specialists among them, which know some classes alone, join the mean of the others as `Panel` says.

    Args:
        members: the teachers.
        weights: of each; they are scaled to sum to 1.
        combine: ``mean`` or ``draw``.
        seed: of the draw.

    Raises:
        InputError: there are not as many weights as teachers, a weight is not positive, `combine` is unknown, or
            specialists are drawn or without a teacher that knows all classes.
    """

    _shares: Tensor
    _general_shares: Tensor  # here, since a list as an index waits for the device

    def __init__(
        self, members: Sequence[FrozenTeacher], weights: Sequence[float], combine: str = "mean", seed: int = 0
    ) -> None:
        super().__init__()
        if len(members) != len(weights) or not members or min(weights) <= 0:
            raise InputError(
                f"teacher.members: {len(members)} teachers have weights {list(weights)}; give each a weight above 0"
            )
        if combine not in COMBINATIONS:
            raise InputError(f"teacher.combine: {combine!r} is unknown; use one of {', '.join(COMBINATIONS)}")
        self.members = nn.ModuleList(members)
        self.combine = combine
        self._key = derive("teacher of a view", seed) >> 1  # fits int64
        self.grid = _common_grid([member.grid for member in members])
        shares = torch.tensor(weights, dtype=torch.float64, device=members[0]._gain.device)
        self.register_buffer("_shares", shares / shares.sum())
        self._general = [place for place, member in enumerate(members) if member.specialty is None]
        self._special = [place for place, member in enumerate(members) if member.specialty is not None]
        self.register_buffer("_general_shares", self._shares[self._general], persistent=False)
        self._panel = self._build_panel(members, weights) if self._special else None
        self.facts: dict[str, Any] = {
            "name": f"{combine} of {', '.join(member.facts.get('name', 'a teacher') for member in members)}",
            "members": [
                {**member.facts, "weight": share} for member, share in zip(members, self._shares.tolist(), strict=True)
            ],
        }

    def _build_panel(self, members: Sequence[FrozenTeacher], weights: Sequence[float]) -> Panel:
        if not self._general:
            raise InputError("teacher.members: all are specialists; add a teacher that knows every class")
        if self.combine != "mean":
            raise InputError(
                f"teacher.combine: {self.combine} lets a specialist answer alone, which knows some of the classes; use "
                "mean"
            )
        specialties = [member.specialty for member in members if member.specialty is not None]
        panel = Panel(specialties, [weights[place] for place in self._special], sum(weights[p] for p in self._general))
        return panel.to(self._shares.device)

    def lines(self, role: str = "teacher") -> list[str]:
        """Return the lines to print about the members."""
        members: list[Any] = list(self.members)
        return [line for member in members for line in member.lines(role)]

    def ask_for_dense(self, asked: bool) -> None:
        """From now on, also answer with log-probabilities [B, h, w, C] at each place, or no longer.

        Raises:
            InputError: a member has no logits at places.
        """
        members: list[Any] = list(self.members)
        for member in members:
            member.ask_for_dense(asked)

    @torch.no_grad()
    def forward(self, batch: Batch) -> TeacherOutput:
        """Answer the views of `batch` with log-probabilities [B, C] in fp32; each place is combined as the image is."""
        outputs = [member(batch) for member in self.members]
        dense = [output.dense_logits for output in outputs if output.dense_logits is not None]
        return TeacherOutput(
            self._combined([output.logits for output in outputs], batch.view_ids),
            dense_logits=self._combined(dense, batch.view_ids) if dense else None,
        )

    def _combined(self, logits: Sequence[Tensor], view_ids: Tensor | None) -> Tensor:
        answers = torch.stack([logits[place] for place in self._general]).log_softmax(-1)  # [members, B, …, C]
        if self.combine == "draw" and view_ids is not None:
            drawn = self.draw(view_ids.to(answers.device, non_blocking=True))
            return answers[drawn, torch.arange(len(drawn), device=drawn.device)]
        shares = self._general_shares.to(answers.dtype).log()
        mean = (answers + shares.view(-1, *(1,) * (answers.ndim - 1))).logsumexp(0)
        if self._panel is None:
            return mean
        joined: Tensor = self._panel(mean.log_softmax(-1), [logits[place] for place in self._special])
        return joined

    def draw(self, view_ids: Tensor) -> Tensor:
        """Return the member [B] that answers each view; a pure function of ``view_ids`` [B, 2] and the seed."""
        mixed = _scramble(_scramble(view_ids[:, 0] + self._key) + view_ids[:, 1])
        uniform = (mixed & 0xFFFFFFFF).double() / 2**32
        return torch.bucketize(uniform, self._shares.cumsum(0)[:-1], right=True)


def _common_grid(grids: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
    """Return the grid that all members have.

    Raises:
        InputError: their dense logits have several.
    """
    if len(set(grids)) > 1:
        named = ", ".join("none" if grid is None else f"{grid[0]} x {grid[1]}" for grid in grids)
        raise InputError(
            f"teacher.members: their dense logits have the grids {named}, and places are combined one by one; give the "
            "members sizes (image_size) with the same grid, or leave out the dense term"
        )
    return grids[0]


def _scramble(integers: Tensor) -> Tensor:
    """Mix the bits of int64 `integers` (splitmix64's finaliser, with a logical shift), on their device."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        integers = (integers ^ ((integers >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return integers ^ ((integers >> 31) & ((1 << 33) - 1))
