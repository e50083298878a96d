"""The tables that an evaluation prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from deit_kd.console import console, say
from deit_kd.interfaces import ANSWERS, counted


def print_scores(result: Mapping[str, Any]) -> None:
    """Print every head's scores of an evaluation, with their 95 % intervals, and what calibration improves."""
    images = counted(result["n"], "image")
    table = Table(title=f"{result['student']}: {images}, weights: {result['weights']}; [95 % interval]")
    columns = {"top-1 %": "top1", "top-5 %": "top5", "NLL": "nll", "Brier": "brier", "ECE": "ece"}
    for column in ("head", *columns, "T", "NLL at T"):
        table.add_column(column, justify="left" if column == "head" else "right")
    rows = {**{head: score for head, score in result["heads"].items() if head != "fused"}, "teacher": result["teacher"]}
    for name, score in rows.items():
        if score is not None:
            scaled = result["temperature"].get(name)
            table.add_row(
                name.replace("_", ", "),
                *(_with_interval(score, key) for key in columns.values()),
                *(("-", "-") if scaled is None else (f"{scaled['temperature']:.2f}", f"{scaled['after']['nll']:.4f}")),
            )
    console.print(table)


def print_probe(result: Mapping[str, Any]) -> None:
    """Print the scores of a student's features, beside those of its architecture with random weights."""
    probe = result["probe"]
    table = Table(title=f"features, from {probe['images']} training images to {result['n']}; top-1 % [95 % interval]")
    for column in ("weights", f"{probe['student']['knn']['neighbours']}-NN", "linear probe"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for name, weights in (("student", result["student"]), ("random", "random")):
        table.add_row(weights, *(_with_interval(probe[name][kind], "top1") for kind in ("knn", "linear")))
    console.print(table)


def _with_interval(score: Mapping[str, Any], key: str) -> str:
    if score[key] is None:
        return "-"
    digits = 2 if key.startswith("top") else 3
    if key not in score["intervals"]:  # measured elsewhere, not known image by image
        return f"{score[key]:.{digits}f}"
    low, high = score["intervals"][key]
    return f"{score[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_students(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the scores of several students, and compare the first with the heads of the others on the same images.

    Args:
        results: of evaluations, by the name of the student.
    """
    base, *_ = results
    table = Table(title=f"{results[base]['n']} images; [95 % interval]; differences in points, paired, from {base}")
    columns = {"top-1 %": "top1", "NLL": "nll", "ECE": "ece"}
    for column in ("student", "head", *columns, f"over {base}", "alone right", "p"):
        table.add_column(column, justify="left" if column in ("student", "head") else "right")
    for name, result in results.items():
        compared = {row["first"]: row for row in result["comparisons"] if row["second"].split(", ")[0] == base}
        for head in ANSWERS:
            score, row = result["heads"].get(head), compared.get(head)
            if score is None:
                continue
            table.add_row(
                name if head == "cls" else "",
                head,
                *(_with_interval(score, key) for key in columns.values()),
                *(("", "", "") if row is None else _compared(row)),
            )
        if result["teacher"] is not None:
            table.add_row("", "teacher", *(_with_interval(result["teacher"], key) for key in columns.values()))
    console.print(table)


def _compared(row: Mapping[str, Any]) -> tuple[str, str, str]:
    low, high = row["interval"]
    difference = f"{row['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
    return difference, f"{row['only_first']} : {row['only_second']}", f"{row['p']:.3g}"


def print_comparison(result: Mapping[str, Any]) -> None:
    """Print McNemar's test of each pair of heads, the disagreement matrix, and the best weight of the fusion."""
    if result["comparisons"]:
        table = Table(title="the same images: where only one is right, and McNemar's test")
        for column in ("first", "second", "alone right", "difference, points", "p"):
            table.add_column(column, justify="left" if column in ("first", "second") else "right")
        for row in result["comparisons"]:
            difference, alone, p = _compared(row)
            table.add_row(row["first"], row["second"], alone, difference, p)
        console.print(table)
    names, matrix = result["disagreement"]["names"], result["disagreement"]["matrix"]
    table = Table("disagreement", *names, title="share of the images on which two differ")
    for name, row in zip(names, matrix, strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)
    for fusion, found in (result["fusion_weight"] or {}).items():
        say(
            f"fused by {fusion}: the best weight of cls on one half is {found['weight_of_cls']:.2f}; on the other it "
            f"gives {found['weighted']['top1']:.2f} % and NLL {found['weighted']['nll']:.4f}, equal weights "
            f"{found['equal']['top1']:.2f} % and {found['equal']['nll']:.4f}"
        )
