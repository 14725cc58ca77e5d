"""From the answers of all rounds to ratios and a table; whether all did the same work."""

import statistics
from typing import Any

from contenders import Contender

Answers = dict[str, list[dict[str, Any]]]


def check(settings: dict[str, Any], answers: Answers) -> None:
    """All contenders did the same work."""
    every = [(name, answer) for name, rounds in answers.items() for answer in rounds]
    for name, answer in every:
        if "new" in answer:
            assert answer["new"] == [settings["new"]], f"{name} drew {answer['new']} tokens"
        if "nats" in answer:
            first = every[0][1]
            bound = 2e-3 if "bf16" in name else 1e-5
            apart = abs(answer["nats"] / first["nats"] - 1)
            assert apart < bound, f"{name}: {answer['nats']} nats, not {first['nats']}"
            assert answer["tokens"] == first["tokens"], f"{name}: {answer['tokens']} tokens"
        if "sparsity" in answer:
            short = abs(answer["sparsity"] - settings["sparsity"])
            assert short < 0.01, f"{name}: sparsity {answer['sparsity']}"


def ratio(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> float:
    """How many times our processor seconds theirs are, the median over rounds."""
    pairs = zip(theirs, ours, strict=True)
    return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)


def ratios(answers: Answers, kept: list[Contender]) -> dict[str, dict[str, float]]:
    """Ours -> peer of the same group -> ratio."""
    return {
        ours.name: {
            peer.name: ratio(answers[peer.name], answers[ours.name])
            for peer in kept
            if peer.environment and peer.group == ours.group
        }
        for ours in kept
        if not ours.environment
    }


def shown(record: dict[str, Any], kept: list[Contender]) -> str:
    """A table for each group of contenders: seconds, speed, layer error, and our advantage."""
    lines = []
    usual = record["settings"].get("tokens", 0) * record["settings"].get("steps", 1)
    for group in dict.fromkeys(each.group for each in kept):
        mine = [each for each in kept if each.group == group]
        ours = [each.name for each in mine if not each.environment]
        head = "".join(f"{'x ' + name:>26s}" for name in ours)
        title = group or record["what"]
        lines += ["", f"{title:26s}{'CPU s':>9s}{'tokens/s':>10s}{'error':>9s}{head}"]
        for each in mine:
            rounds = record["rounds"][each.name]
            seconds = statistics.median(answer["seconds"] for answer in rounds)
            tokens = rounds[0].get("tokens", usual)
            error = record["layer_errors"].get(each.name)
            cells = "".join(f"{ratio(rounds, record['rounds'][name]):26.2f}" for name in ours)
            lines.append(
                f"{each.name:26s}{seconds:9.2f}{tokens / seconds:10.0f}"
                f"{'' if error is None else format(error, '.4f'):>9s}{cells}"
            )
    if record["missing"]:
        lines += ["", f"left out, see above: {', '.join(record['missing'])}"]
    return "\n".join([*lines, ""])
