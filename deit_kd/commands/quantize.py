"""``deit-kd quantize``: a run's student in integers, trained for them first if they are few."""

from __future__ import annotations

import os

from deit_kd.commands.shared import Arguments, asks_for_help, first_argument
from deit_kd.config import build_parser, parse_config
from deit_kd.interfaces import InputError
from deit_kd.places import path_of

SHARE_OF_EPOCHS = 4  # of the run's, for quantisation-aware training: a quarter


def quantize(arguments: Arguments) -> None:
    """Write a run's student in integers, and score what that costs."""
    parser = build_parser("deit-kd quantize")
    parser.add_argument("run", type=str, help="folder of a run; options override the recipe of its training")
    parser.add_argument("--bits", type=int, default=None, help="of the weights, 8 or 4; 8 unless the run says")
    parser.add_argument(
        "--epochs", type=int, default=None, help="of training for the integers; with 4 bits a quarter of the run's"
    )
    parser.add_argument(
        "--recipe_teacher", type=bool, default=False, help="learn from the recipe's teacher, not from the run itself"
    )
    parser.add_argument("--to", type=str, default=None, help="folder to write; RUN/quantized-BITS unless set")
    if asks_for_help(arguments):
        parse_config(arguments, parser)
    named, typed = first_argument(arguments, parser), arguments[1:]
    if not path_of(named).exists():
        raise InputError(f"{named}: is not there; name the folder of a run, or one of its checkpoints")
    from deit_kd.evaluation.sources import open_source
    from deit_kd.jobs.quantize import check_quantize, training_options
    from deit_kd.jobs.quantize import quantize as quantize_student
    from deit_kd.jobs.train import train

    source = open_source(named)
    config, others = parse_config([named, *source.recipe, *typed], parser)
    bits, folder = check_quantize(source, config, others["bits"], others["to"])
    epochs, trained = others["epochs"], source
    if epochs is not None and epochs < 0:
        raise InputError(f"--epochs: {epochs} is below 0; 0 does not train")
    if epochs is None:
        few = bits == 4 and config.student.bits is None
        epochs = max(1, config.train.epochs // SHARE_OF_EPOCHS) if few else 0
    if epochs:
        options = training_options(source, config, bits, folder, epochs, others["recipe_teacher"])
        learning = parse_config([named, *source.recipe, *options, *typed], parser)[0]
        train(learning)
        trained = open_source(str(learning.output))
    if os.environ.get("RANK", "0") == "0":  # several processes may have trained it; one writes it
        quantize_student(source, config, trained, bits, folder)
