"""timm's zoo as students and teachers: one small model of every family, with random weights, against timm itself.

    python benchmarks/zoo.py --markdown docs/zoo.md     # every family, about ten minutes on two cores
    python benchmarks/zoo.py --modules deit pit 'vision_transformer*'

A family is a class of a module of timm's and the way it pools. Its smallest model is built, and with fewer blocks
where it is large. It works as

- a distilled student, if its class head, with the distillation token masked out of attention, answers as the plain
  model of timm's that it was started from, and otherwise not;
- a plain student and a teacher, if its logits are timm's own.

What is refused is shown with its line. The program ends with 1 where anything is wrong or ends in a traceback.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deit_kd import Batch, FrozenTeacher, InputError, StudentOutput, head_probabilities
from deit_kd.models import distilled_twin, plain_twin, size_argument
from deit_kd.students import TimmStudent, build_student
from deit_kd.teachers import build_teacher
from deit_kd.tokens import is_grafted

CLASSES = ("ant", "bee", "cat", "dog", "elk")
SMALL = 64  # pixels, where a model takes any size
LARGE = 20e6  # parameters above which a model is built with fewer blocks, where it has a depth
STUDENT_MEAN, STUDENT_STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)
TEACHER_MEAN, TEACHER_STD = (0.4, 0.5, 0.45), (0.2, 0.3, 0.25)
ROLES = ("distilled student", "plain student", "teacher")


class Specimen(NamedTuple):
    """The smallest model of a family."""

    module: str  # of timm.models
    kind: str  # its class
    pooling: str  # and what it pools from
    name: str
    parameters: int
    args: dict[str, Any]
    image_size: int


class Verdict(NamedTuple):
    """What became of a specimen in one role: works, refused, wrong or traceback."""

    word: str
    line: str = ""


class TokenHidden(TorchFunctionMode):
    """Lets nobody but the distillation token itself attend to it, wherever patches and prefix tokens attend.

    Args:
        prefix_tokens: how many there are with it.
    """

    def __init__(self, prefix_tokens: int) -> None:
        super().__init__()
        self._prefix_tokens = prefix_tokens
        self.attentions = 0  # that were masked

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is nn.functional.scaled_dot_product_attention:
            mask = self._mask(args[0].shape[-2], args[1].shape[-2])
            if mask is not None:
                others = kwargs.get("attn_mask")
                kwargs["attn_mask"] = mask if others is None else others + mask
        elif function is Tensor.softmax and args[0].ndim == 4:
            mask = self._mask(*args[0].shape[-2:])
            if mask is not None:
                args = (args[0] + mask, *args[1:])
        return function(*args, **kwargs)

    def _mask(self, queries: int, keys: int) -> Tensor | None:
        patches = keys - self._prefix_tokens
        if queries != keys or patches <= 0 or math.isqrt(patches) ** 2 != patches:
            return None
        self.attentions += 1
        mask = torch.zeros(queries, keys)
        mask[:, 1] = -math.inf
        mask[1, 1] = 0.0
        return mask


def specimens(patterns: list[str], progress: Progress) -> list[Specimen]:
    """Return the smallest model of every family, by module, class and pooling."""
    names = {module: timm.list_models(module=module) for module in timm.list_modules()}
    names = {module: found for module, found in names.items() if any(fnmatch(module, one) for one in patterns)}
    task = progress.add_task("measuring", total=sum(map(len, names.values())))
    smallest: dict[tuple[str, str, str], Specimen] = {}
    for module, found in names.items():
        for name in found:
            with torch.device("meta"):
                model = timm.create_model(name)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            family = (module, type(model).__name__, _pooling(model))
            if family not in smallest or parameters < smallest[family].parameters:
                smallest[family] = Specimen(*family, name, parameters, {}, 0)
            progress.advance(task)
    return [_prepared(specimen) for _, specimen in sorted(smallest.items())]


def _pooling(model: Any) -> str:
    pool = getattr(model, "global_pool", "")
    tokens = "" if getattr(model, "cls_token", None) is None else ", class token"
    return (pool if isinstance(pool, str) else "") + tokens


def _prepared(specimen: Specimen) -> Specimen:
    cfg = timm.get_pretrained_cfg(specimen.name)
    native = (cfg.input_size if cfg is not None else (3, 224, 224))[-1]
    size = native if size_argument(specimen.name, SMALL) else SMALL
    args: dict[str, Any] = {}
    if specimen.parameters > LARGE:
        try:
            with torch.device("meta"):
                timm.create_model(specimen.name, depth=2)
            args = {"depth": 2}
        except Exception:  # it has no such argument, or a depth for each stage
            args = {}
    return specimen._replace(args=args, image_size=size)


def as_student(specimen: Specimen, distilled: bool, checkpoint: Path | None = None) -> TimmStudent:
    """Build the specimen as a recipe would."""
    return build_student(
        name=specimen.name,
        pretrained=False,
        checkpoint=None if checkpoint is None else str(checkpoint),
        args=specimen.args,
        drop_path=0.0,
        classes=CLASSES,
        image_size=specimen.image_size,
        distilled=distilled,
        seed=0,
    ).eval()


def as_teacher(specimen: Specimen) -> FrozenTeacher:
    """Build the specimen as a recipe would, with random weights."""
    return build_teacher(
        name=specimen.name,
        pretrained=False,
        checkpoint=None,
        random_weights=True,
        args=specimen.args,
        image_size=None,
        mean=TEACHER_MEAN,
        std=TEACHER_STD,
        channels_last=True,
        compiled=False,
        classes=CLASSES,
        student_image_size=specimen.image_size,
        student_mean=STUDENT_MEAN,
        student_std=STUDENT_STD,
        seed=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def timms_own(name: str, specimen: Specimen, image_size: int) -> Any:
    """Build a model by timm alone, in eval, with weights that leave no part of it silent."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=len(CLASSES), **size_argument(name, image_size), **specimen.args)
    shake(model)
    return model.eval()


def shake(model: nn.Module) -> None:
    """Add noise to every parameter: heads, biases and layer scales that start at nothing would hide a difference."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02 if parameter.ndim > 1 else 0.2)


def views(image_size: int) -> Tensor:
    """Return two images [2, 3, H, W]."""
    return torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(2))


def same(found: Tensor, expected: Tensor) -> bool:
    """Return whether logits [2, C] are equal up to rounding, beside how far two images are apart."""
    spread = (expected - expected.mean()).abs().max()
    return bool((found - expected).abs().max() <= 1e-4 * spread) and bool(expected.isfinite().all())


def judge_distilled(specimen: Specimen) -> Verdict:
    """Compare a distilled student with the plain model of timm's that it was started from."""
    native = not is_grafted((built := as_student(specimen, distilled=True)).backbone)
    del built
    plain = timms_own(plain_twin(specimen.name), specimen, specimen.image_size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plain.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, file)
        student = as_student(specimen, distilled=True, checkpoint=file)
    images = views(specimen.image_size)
    expected, seen = plain(images), student(images)
    with TokenHidden(getattr(student.backbone, "num_prefix_tokens", 2)) as mask:
        hidden = student(images)
    if seen.dist_logits is None or seen.dist_logits.shape != expected.shape:
        return Verdict("wrong", "it has no second head")
    if not same(hidden.cls_logits, expected):
        return Verdict("wrong", "with its token masked the class head is not the plain model's")
    if not mask.attentions or same(seen.cls_logits, expected) or same(seen.dist_logits, seen.cls_logits):
        return Verdict("wrong", "its token does not take part")
    return Verdict("works", distilled_twin(specimen.name) if native else "grafted")


def judge_plain(specimen: Specimen) -> Verdict:
    """Compare a student without distillation with timm's model, given its weights."""
    student = as_student(specimen, distilled=False)
    shake(student.backbone)
    own = timms_own(plain_twin(specimen.name), specimen, specimen.image_size)
    own.load_state_dict(student.backbone.state_dict())
    images = views(specimen.image_size)
    said = student(images)
    if said.dist_logits is not None or not same(said.cls_logits, own(images)):
        return Verdict("wrong", "its logits are not timm's")
    return Verdict("works")


def judge_teacher(specimen: Specimen) -> Verdict:
    """Compare a teacher, which sees the student's images, with timm's model on images normalised for it."""
    teacher = as_teacher(specimen)
    size = teacher.facts["image_size"]
    own = timms_own(teacher.facts["name"], specimen, size)
    network = getattr(teacher.network, "backbone", teacher.network)  # fused heads hold it
    shake(network)
    own.load_state_dict(network.state_dict())
    photos = views(size)
    labels = torch.tensor([0, 1])
    batch = Batch(_normalised(photos, STUDENT_MEAN, STUDENT_STD), nn.functional.one_hot(labels, 5).float(), labels)
    found, seen = teacher(batch).logits, _normalised(photos, TEACHER_MEAN, TEACHER_STD)
    if network is teacher.network:
        expected = own(seen)
    else:
        own.set_distilled_training(True)
        expected = head_probabilities(StudentOutput(*own.train()(seen)))["fused"].log()
    return Verdict("works") if same(found, expected) else Verdict("wrong", "its logits are not timm's")


def _normalised(photos: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (photos - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


JUDGES: dict[str, Callable[[Specimen], Verdict]] = dict(
    zip(ROLES, (judge_distilled, judge_plain, judge_teacher), strict=True)
)


@torch.no_grad()
def judged(specimen: Specimen) -> dict[str, Verdict]:
    """Return the verdict on a specimen in every role."""
    verdicts = {}
    for role, judge in JUDGES.items():
        try:
            verdicts[role] = judge(specimen)
        except InputError as error:
            verdicts[role] = Verdict("refused", str(error))
        except Exception:
            verdicts[role] = Verdict("traceback", traceback.format_exc())
        gc.collect()
    return verdicts


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what timm warns of while it builds models that nobody will use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=["*"], help="of timm.models; * and ? stand for anything")
    parser.add_argument("--json", type=Path, help="write every verdict there")
    options = parser.parse_args()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    found = {}
    with quiet(), Progress(*columns, console=console) as progress:
        chosen = specimens(options.modules, progress)
        task = progress.add_task("", total=len(chosen))
        for specimen in chosen:
            progress.update(task, description=specimen.name)
            found[specimen.name] = judged(specimen)
            progress.advance(task)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print(Counter(v.word for vs in found.values() for v in vs.values()))


if __name__ == "__main__":
    main()
