"""The peers of a run: how they are built, how they learn, and the folder that each of them leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from deit_kd.config import Config, names_of_peers, recipe_of_peer
from deit_kd.distributed import Processes
from deit_kd.files import write_atomically, write_json
from deit_kd.interfaces import InputError
from deit_kd.randomness import derive
from deit_kd.run_folder import (
    CONFIG_FILE,
    FACTS_FILE,
    HEADS_FILE,
    METRICS_FILE,
    HeadScores,
    peer_folder,
    read_facts,
    record_of_peer,
)
from deit_kd.runs import parts
from deit_kd.runs.outcome import save_student
from deit_kd.runs.prepared import Peer, Run
from deit_kd.students import TimmStudent


def build_peers(
    config: Config, classes: tuple[str, ...], processes: Processes, steps_per_epoch: int
) -> tuple[Peer, ...]:
    """Return the peers that a recipe names, each with weights of its own seed.

    Raises:
        InputError: one cannot be built, for a reason for which no student could.
    """
    return tuple(
        _build_peer(config, place, name, classes, processes, steps_per_epoch)
        for place, name in enumerate(names_of_peers(config.peers))
    )


def _build_peer(
    config: Config, place: int, name: str, classes: tuple[str, ...], processes: Processes, steps_per_epoch: int
) -> Peer:
    recipe = recipe_of_peer(config, place)
    try:
        with processes.busy(f"builds the peer {name}"):
            seed = derive("peer", config.seed, place) >> 1
            student = parts.build_student(recipe, classes, processes.device, seed=seed)
        parts.check_batch_norms(recipe, student, processes)
    except InputError as error:
        raise InputError(re.sub(r"\bstudent\.", f"peers.{place}.", str(error))) from error
    optimizer = parts.build_student_optimizer(recipe, student)
    schedule = parts.build_schedule(recipe, optimizer, steps_per_epoch)
    return Peer(name, recipe, student, optimizer, schedule, parts.build_objective(recipe, {}, {}))


def split_scores(scores: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the scores of the student by its weights, and those of each peer by its name; see `Trainer.weights`."""
    own = {weights: result for weights, result in scores.items() if "/" not in weights}
    peers: dict[str, dict[str, Any]] = {}
    for called, result in scores.items():
        name, _, weights = called.rpartition("/")
        if name:
            peers.setdefault(name, {})[weights] = result
    return own, peers


def save_peer(run: Run, peer: Peer, student: TimmStudent, heads: HeadScores) -> None:
    """Write the folder of a peer, laid out as a run of its own: recipe, facts, records, the final student, scores."""
    folder = peer_folder(run.folder, peer.name)
    folder.mkdir(parents=True, exist_ok=True)
    save_student(run, student, folder)
    facts = read_facts(run.folder)
    accounts = facts.pop("peers")
    write_json(folder / FACTS_FILE, facts | {"student": accounts[peer.name]})
    recipe = peer.config.model_copy(update={"output": str(folder), "recipe": peer.name, "resume": None})
    write_atomically(folder / CONFIG_FILE, recipe.to_yaml().encode())
    lines = (run.folder / METRICS_FILE).read_text().splitlines()
    records = [record_of_peer(json.loads(line), peer.name) for line in lines]
    write_atomically(folder / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in records).encode())
    write_json(folder / HEADS_FILE, heads)
