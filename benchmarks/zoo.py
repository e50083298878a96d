"""timm's zoo as students and teachers: one small model of every family, with random weights, against timm itself.

    python benchmarks/zoo.py --markdown docs/evidence/zoo.md
    python benchmarks/zoo.py --modules deit pit 'vision_transformer*'

A family is a class of a module of timm's and the way it pools. Its smallest model is built, with fewer blocks where it
is large, and sees two small images. It works as

- a distilled student, if its class head, with the distillation token masked out of attention, answers as the plain
  model of timm's that it was started from, and otherwise not; without a token, if the mean of its two heads is timm's
  answer;
- a plain student and a teacher, if its logits are timm's own.

What is refused is shown with its line. The program ends with 1 where anything is wrong or ends in a traceback.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deit_kd import Batch, FrozenTeacher, InputError, StudentOutput, head_probabilities
from deit_kd.interfaces import Preprocessing
from deit_kd.models.create import size_argument
from deit_kd.models.names import distilled_twin, plain_twin
from deit_kd.models.tokens import is_grafted
from deit_kd.students import TimmStudent, build_student
from deit_kd.teachers import build_teacher

CLASSES = ("ant", "bee", "cat", "dog", "elk")
SMALL = 64  # pixels, where a model takes any size
LARGE = 10e6  # parameters above which a model is built with fewer blocks, where it has a depth
STUDENT_MEAN, STUDENT_STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)
TEACHER_MEAN, TEACHER_STD = (0.4, 0.5, 0.45), (0.2, 0.3, 0.25)
LAYER_SCALES = ("gamma", "gamma_1", "gamma_2", "gamma_3")  # timm's names
ROLES = ("distilled student", "plain student", "teacher")


PAGE = """# timm's zoo as students and teachers

The smallest model of each of {families} families of timm {timm}, with random weights, judged on {date} by
`python benchmarks/zoo.py --markdown docs/evidence/zoo.md`: {tally}.

A distilled student works if its class head gives the logits of the plain model it was started from while the
distillation token is masked out of attention, and other logits while it is not. A student with two heads
and no token works if they differ and their mean is timm's answer. A plain student and a teacher work if
their logits are timm's own. A refusal is one line, before a run starts. Large models are built with two blocks.

| module | class | pools | model | {roles} |
|---|---|---|---|---|---|---|
{rows}

{notes}
"""


class Specimen(NamedTuple):
    """The smallest model of a family."""

    module: str  # of timm.models
    kind: str  # its class
    pooling: str  # and what it pools from
    name: str
    parameters: int
    args: dict[str, Any]
    image_sizes: tuple[int, ...]  # to be tried in turn


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


def specimens(module: str) -> list[Specimen]:
    """Return the smallest model of every family of a module, measured without making its weights."""
    smallest: dict[tuple[str, str, str], Specimen] = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            model = timm.create_model(name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        family = (module, type(model).__name__, _pooling(model))
        if family not in smallest or parameters < smallest[family].parameters:
            smallest[family] = Specimen(*family, name, parameters, {}, ())
    return [_prepared(specimen) for _, specimen in sorted(smallest.items())]


def _pooling(model: Any) -> str:
    pool = getattr(model, "global_pool", "")
    tokens = [] if getattr(model, "cls_token", None) is None else ["class token"]
    return ", ".join([*([pool] if isinstance(pool, str) and pool else []), *tokens])


def _prepared(specimen: Specimen) -> Specimen:
    cfg = timm.get_pretrained_cfg(specimen.name)
    native = (cfg.input_size if cfg is not None else (3, 224, 224))[-1]
    sizes = (native,) if size_argument(specimen.name, SMALL) else (SMALL, native)
    args = {}
    if specimen.parameters > LARGE:
        try:
            with torch.device("meta"):
                timm.create_model(specimen.name, depth=2)
            args = {"depth": 2}
        except Exception:  # it has no such argument, or a depth for each of its stages
            pass
    return specimen._replace(args=args, image_sizes=sizes)


def as_student(specimen: Specimen, image_size: int, distilled: bool, checkpoint: Path | None = None) -> TimmStudent:
    """Build the specimen as a recipe would."""
    return build_student(
        name=specimen.name,
        pretrained=False,
        checkpoint=None if checkpoint is None else str(checkpoint),
        args=specimen.args,
        drop_path=0.0,
        classes=CLASSES,
        image_size=image_size,
        distilled=distilled,
        seed=0,
    ).eval()


def as_teacher(specimen: Specimen, image_size: int) -> FrozenTeacher:
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
        student=Preprocessing(image_size, STUDENT_MEAN, STUDENT_STD, "bicubic", 1.0),
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
    """Add noise to every parameter: heads, biases and layer scales that start near 0 would hide a difference."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in LAYER_SCALES:
            parameter.data.fill_(1.0)
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02 if parameter.ndim > 1 else 0.2)


def views(image_size: int) -> Tensor:
    """Return two images [2, 3, H, W]."""
    return torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(2))


def same(found: Tensor, expected: Tensor) -> bool:
    """Return whether logits [2, C] are equal up to rounding, which grows on its way through random weights."""
    spread = (expected - expected.mean()).abs().max()
    return bool((found - expected).abs().max() <= 1e-3 * spread) and bool(expected.isfinite().all())


def judge_distilled(specimen: Specimen, image_size: int) -> Verdict:
    """Compare a distilled student with the plain model of timm's that it was started from."""
    as_student(specimen, image_size, distilled=True)  # refused before a large plain model is made for nothing
    plain = timms_own(plain_twin(specimen.name), specimen, image_size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plain.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, file)
        student = as_student(specimen, image_size, distilled=True, checkpoint=file)
    images = views(image_size)
    expected, seen = plain(images), student(images)
    if not student.has_distillation_token:
        if seen.dist_logits is None or same(seen.dist_logits, seen.cls_logits):
            return Verdict("wrong", "it has no second head")
        if not same((seen.cls_logits + seen.dist_logits) / 2, expected):
            return Verdict("wrong", "the mean of its heads is not timm's answer")
        return Verdict("works", "with its own two heads")
    with TokenHidden(getattr(student.backbone, "num_prefix_tokens", 2)) as mask:
        hidden = student(images)
    if seen.dist_logits is None or seen.dist_logits.shape != expected.shape:
        return Verdict("wrong", "it has no second head")
    if not same(hidden.cls_logits, expected):
        return Verdict("wrong", "with its token masked the class head is not the plain model's")
    moved, rounding = ((logits - expected).abs().max() for logits in (seen.cls_logits, hidden.cls_logits))
    # one key of a thousand moves the logits little, but more than rounding does
    if not mask.attentions or moved <= 10 * rounding or same(seen.dist_logits, seen.cls_logits):
        return Verdict("wrong", "its token does not take part")
    return Verdict("works", "grafted" if is_grafted(student.backbone) else f"as `{distilled_twin(specimen.name)}`")


def judge_plain(specimen: Specimen, image_size: int) -> Verdict:
    """Compare a student without distillation with timm's model, given its weights."""
    student = as_student(specimen, image_size, distilled=False)
    shake(student.backbone)
    own = timms_own(plain_twin(specimen.name), specimen, image_size)
    own.load_state_dict(student.backbone.state_dict())
    images = views(image_size)
    said = student(images)
    if said.dist_logits is not None or not same(said.cls_logits, own(images)):
        return Verdict("wrong", "its logits are not timm's")
    return Verdict("works")


def judge_teacher(specimen: Specimen, image_size: int) -> Verdict:
    """Compare a teacher, which sees the student's images, with timm's model on images normalised for it."""
    teacher = as_teacher(specimen, image_size)
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


JUDGES: dict[str, Callable[[Specimen, int], Verdict]] = dict(
    zip(ROLES, (judge_distilled, judge_plain, judge_teacher), strict=True)
)


@torch.no_grad()
def judged(specimen: Specimen) -> dict[str, Verdict]:
    """Return the verdict on a specimen in every role, at the first of its sizes that is not refused."""
    verdicts = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's, of models that nobody will use
        for role, judge in JUDGES.items():
            for image_size in specimen.image_sizes:
                try:
                    verdicts[role] = judge(specimen, image_size)
                except InputError as error:
                    verdicts[role] = Verdict("refused", str(error))
                except Exception:
                    verdicts[role] = Verdict("traceback", traceback.format_exc())
                gc.collect()
                if not verdicts[role].line.partition(":")[0].endswith("image_size"):
                    break
    return verdicts


def spread_out(function: Callable[[Any], Any], items: list[Any], processes: int, what: str) -> Iterable[Any]:
    """Yield `function` of every item, in order, with a progress bar; each process holds one item at a time."""
    console = Console(stderr=True)
    if processes == 1:
        yield from track(map(function, items), what, len(items), console=console)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from track(pool.map(function, items), what, len(items), console=console)


def page(found: list[tuple[Specimen, dict[str, Verdict]]]) -> str:
    """Return the page of docs/ that tells what became of every specimen."""
    counts = Counter(verdict.word for _, verdicts in found for verdict in verdicts.values())
    notes: list[str] = []
    rows = []
    for specimen, verdicts in found:
        cells = [f"`{specimen.module}`", f"{specimen.kind}", specimen.pooling, f"`{specimen.name}`"]
        for word, line in verdicts.values():
            if word == "works":
                cells.append(f"works, {line}" if line else word)
                continue
            note = line.strip().splitlines()[-1].replace(repr(specimen.name), "…").replace(specimen.kind, "…")
            notes += [note] * (note not in notes)
            cells.append(f"{word} [{notes.index(note) + 1}]")
        rows.append(f"| {' | '.join(cells)} |")
    tally = ", ".join(f"{counts[word]} {word}" for word in ("works", "refused", "wrong", "traceback"))
    return PAGE.format(
        families=len(found),
        timm=timm.__version__,
        date=f"{date.today():%d %B %Y}",
        tally=tally,
        roles=" | ".join(ROLES),
        rows="\n".join(rows),
        notes="\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=["*"], help="of timm.models; * and ? stand for anything")
    parser.add_argument("--markdown", type=Path, help="write the table there and print the exceptions alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    modules = [name for name in timm.list_modules() if any(fnmatch(name, pattern) for pattern in options.modules)]
    chosen = [one for some in spread_out(specimens, modules, options.processes, "measuring") for one in some]
    verdicts = spread_out(judged, chosen, options.processes, "judging")
    found = list(zip(chosen, verdicts, strict=True))
    faults = [
        f"{specimen.name} as {role}: {verdict.word}\n{verdict.line}"
        for specimen, by_role in found
        for role, verdict in by_role.items()
        if verdict.word in ("wrong", "traceback")
    ]
    if options.markdown:
        options.markdown.write_text(page(found))
    else:
        print(page(found))
    print("\n".join(faults) or f"{len(found)} families: nothing wrong, no traceback")
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
