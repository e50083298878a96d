"""What an export says about its student besides the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deit_kd.interfaces import Preprocessing, counted, printable


@dataclass(frozen=True)
class About:
    """The facts of a run that a format writes down.

    Args:
        architecture: timm's name of it.
        model_args: what ``timm.create_model`` needs besides the number of classes.
        classes: names, in label order.
        preprocessing: of its images.
        fusion: of the heads, ``softmax`` or ``logits``.
        heads: the content of ``heads.json``; None if it was not scored.
        teacher: the teacher's entry in ``run.json``; None if there was none.
        data: a line about the photos.
        recipe: the run's ``config.yaml``.
        temperature: by head, if an evaluation has fitted it; no output is divided by it.
    """

    architecture: str
    model_args: Mapping[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    fusion: str
    heads: Mapping[str, Any] | None
    teacher: Mapping[str, Any] | None
    data: str
    recipe: str
    temperature: Mapping[str, float] | None = None

    def for_deployment(self) -> dict[str, Any]:
        """Return, as JSON, everything that a program needs to run the model and read its outputs."""
        return {
            "architecture": self.architecture,
            "classes": list(self.classes),
            **self.preprocessing._asdict(),
            "fusion": self.fusion,
            "temperature": None if self.temperature is None else dict(self.temperature),
        }

    def card(self, format_name: str, how_to_load: str) -> str:
        """Return the model card, in Markdown."""
        seen = self.preprocessing
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", self.recipe)), default=0))
        return "\n".join(
            [
                f"# {self.architecture}, distilled with deit_kd",
                "",
                f"Exported as `{format_name}`. {how_to_load}",
                "",
                f"- Data: {_text(self.data)}, {counted(len(self.classes), 'class')}, seen at {seen.image_size} px "
                f"(mean {list(seen.mean)}, std {list(seen.std)}, {seen.interpolation}, crop {seen.crop_fraction}, "
                f"{seen.crop_mode})",
                *(f"- Teacher: {line}" for line in self._teacher_lines()),
                "",
                *self._score_lines(),
                "## Classes",
                "",
                *(f"{label}. {_text(name)}" for label, name in enumerate(self.classes)),
                "",
                "## Recipe",
                "",
                f"{fence}yaml",
                self.recipe.rstrip(),
                fence,
                "",
            ]
        )

    def _score_lines(self) -> list[str]:
        if self.heads is None:
            return []
        return [
            f"## Scores on {self.heads['n']} validation images ({self.heads['weights']} weights)",
            "",
            "| head | top-1 % | NLL |",
            "|---|---|---|",
            *(
                f"| {f'fused ({self.fusion})' if head == 'fused' else head} | {score['top1']:.2f} "
                f"| {score['nll']:.4f} |"
                for head, score in {**self.heads["heads"], "teacher": self.heads["teacher"]}.items()
                if score is not None
            ),
            "",
        ]

    def _teacher_lines(self) -> list[str]:
        if self.teacher is None:
            return ["none"]
        members = self.teacher.get("members", [self.teacher])
        return [
            f"{_text(member['name'])} from {_text(str(member.get('origin')))}, "
            f"licence of the weights: {_text(member.get('licence') or 'not known')}"
            for member in members
        ]


def _text(name: str) -> str:
    """Return `name` escaped for Markdown."""
    return re.sub(r"([\\`*\[\]<>&|~]|^[#+-]|(?<!\w)_|_(?!\w))", r"\\\1", printable(name))
