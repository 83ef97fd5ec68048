"""Who waited for whom: the waits of one step from its spans, and what a whole run should change about them.

learner  waits for groups (rollout actors too slow), for the weight update, for a checkpoint, for evaluators
rollout  waits for slots (learner too slow: the buffer admits no more), for weights, and works for evaluations
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncrl.monitor.timeline import Span, covered_s

METRICS: dict[str, str] = {
    "wait/learner_for_groups_s": "seconds since the last step that the learner waited for a batch of groups",
    "wait/learner_for_weights_s": "seconds since the last step that the learner waited for its weights to go live",
    "wait/learner_for_checkpoint_s": "seconds since the last step that the learner wrote a checkpoint",
    "wait/learner_for_evaluation_s": "seconds since the last step that the learner sent its weights to evaluators",
    "wait/outage_s": "seconds since the last step that the learner waited, for whatever, while no rollout actor was "
    "alive; they count as none of the waits above",
    "wait/rollout_for_slots_s": "seconds since the last step alive without any prompt to play, mean over rollout "
    "actors",
    "wait/rollout_for_weights_s": "seconds since the last step paused for new weights, mean over rollout actors",
    "wait/rollout_for_evaluation_s": "seconds since the last step with evaluations in the engine, mean over actors",
    "wait/window_s": "seconds since the last step, which the waits above are parts of",
}
"""Every metric of `waits`, with its meaning."""

ALIVE = "alive"
"""The span of an actor's lane in which it gets prompts."""
OUTAGE = "outage"
"""The lane of the time in which no rollout actor is alive."""

_LEARNER = {
    "wait for groups": "wait/learner_for_groups_s",
    "wait for weights": "wait/learner_for_weights_s",
    "checkpoint": "wait/learner_for_checkpoint_s",
    "update evaluators": "wait/learner_for_evaluation_s",
}
_NEEDED = ("rollout/num_actors", "rollout/idle", "time/step_s", "time/sync_s")
"""What a row must have to count, beside its waits."""
_ENOUGH = 5
"""Steps below which nothing is said: the first ones fill the buffer."""
_WORTH_SAYING = 0.1
"""Share of the time above which a wait is worth a change."""
_WORTH_TELLING = 0.05
"""Share of a step above which its line tells of a wait."""

_IN_WORDS = {
    "wait/learner_for_groups_s": "learner for groups",
    "wait/learner_for_weights_s": "learner for weights",
    "wait/learner_for_checkpoint_s": "learner for a checkpoint",
    "wait/learner_for_evaluation_s": "learner for evaluators",
    "wait/outage_s": "learner in an outage",
    "wait/rollout_for_slots_s": "rollouts for slots",
    "wait/rollout_for_weights_s": "rollouts for weights",
    "wait/rollout_for_evaluation_s": "rollouts in evaluation",
}


def waits(spans: Sequence[Span], begin_s: float, end_s: float, num_actors: int) -> dict[str, float]:
    """The waits of the window, exactly the keys of `METRICS`, in seconds. Lanes of actors start with "rollout"."""
    metrics = dict.fromkeys(METRICS, 0.0) | {"wait/window_s": end_s - begin_s}
    lanes: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        lanes[span.lane].append(span)
    outages = [(span.begin_s, span.end_s) for span in lanes[OUTAGE]]
    out_s = covered_s(outages, begin_s, end_s)
    for name, metric in _LEARNER.items():
        waited = _intervals(lanes["learner"], name)
        metrics[metric] = covered_s([*waited, *outages], begin_s, end_s) - out_s
        metrics["wait/outage_s"] += covered_s(waited, begin_s, end_s) - metrics[metric]
    actors = [lane for name, lane in lanes.items() if name.startswith("rollout")]
    if not actors:
        return metrics | {name: math.nan for name in METRICS if name.startswith("wait/rollout")}
    free_s = sum(_free_s(lane, begin_s, end_s) for lane in actors)
    paused_s = sum(span.facts.get("pause_s", 0.0) for lane in actors for span in lane if span.name == "update")
    evaluating_s = sum(covered_s(_intervals(lane, "evaluation"), begin_s, end_s) for lane in actors)
    return metrics | {
        "wait/rollout_for_slots_s": free_s / num_actors,
        "wait/rollout_for_weights_s": paused_s / num_actors,
        "wait/rollout_for_evaluation_s": evaluating_s / num_actors,
    }


def _free_s(lane: Sequence[Span], begin_s: float, end_s: float) -> float:
    """Seconds of the window that an actor was alive with nothing to do."""
    work = [(span.begin_s, span.end_s) for span in lane if span.name != ALIVE]
    alive = [(max(begin, begin_s), min(end, end_s)) for begin, end in _intervals(lane, ALIVE)]
    return sum(end - begin - covered_s(work, begin, end) for begin, end in alive if end > begin)


def _intervals(spans: Sequence[Span], name: str) -> list[tuple[float, float]]:
    return [(span.begin_s, span.end_s) for span in spans if span.name == name]


def told(row: Mapping[str, float]) -> str:
    """Who waited for whom in a step, and for how long, the longest first; what is less than a twentieth is left out."""
    least = (row.get("wait/window_s") or math.nan) * _WORTH_TELLING
    known = [(row[name], words) for name, words in _IN_WORDS.items() if row.get(name) is not None]
    found = sorted((pair for pair in known if pair[0] >= least), key=lambda pair: -pair[0])
    return ", ".join(f"{words} {seconds:.2f} s" for seconds, words in found) or "none"


@dataclass(frozen=True, slots=True)
class Blame:
    """What the waits of a run say. Shares are of the run's wall time between its first and last step."""

    shares: dict[str, float]
    num_actors: int
    balanced_actors: int
    """Rollout actors at which neither side would wait, if throughput grew with their number."""
    sentence: str
    bound: str
    """The measured time of a step beside the least possible one, and the share of the time in which the busier of the
    two sides worked, in a sentence."""


def takes_turns(config: Mapping[str, Any]) -> bool:
    """Whether a run folder's configuration has generation and training take turns."""
    return bool(config.get("rollout", {}).get("release_memory"))


def warmed_up(rows: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """A run's steps without the first tenth, at most ten, in which kernels are compiled."""
    return rows[min(10, len(rows) // 10) :]


def blame(rows: Sequence[Mapping[str, float]], *, turns: bool = False) -> Blame | None:
    """Sums up the metric rows of steps under one configuration; None while they are too few.

    `turns`: the two sides take turns by that configuration, so waits are no mistake of it.

    The balance: N actors were busy for the share b of the time and the learner for the share l (steps and updates).
    Both would always be busy with N * b / l actors to one learner. The bound: with devices of their own and nothing
    else to do, the two sides overlap until the busier one never stops, so a step takes no less than its work.
    """
    rows = [row for row in rows if row.get("wait/window_s") and all(row.get(name) is not None for name in _NEEDED)]
    if len(rows) < _ENOUGH:
        return None
    whole_s = sum(row["wait/window_s"] for row in rows)
    out_s = sum(row.get("wait/outage_s") or 0.0 for row in rows)  # about which no setting of the balance does anything
    total_s = max(whole_s - out_s, 1e-9)
    shares = {
        name: sum(value for row in rows if math.isfinite(value := row.get(name) or 0.0)) / total_s
        for name in METRICS
        if name not in ("wait/window_s", "wait/outage_s")
    }
    num_actors = int(rows[-1]["rollout/num_actors"])
    idle_s = sum(row["rollout/idle"] * _without_outage(row) for row in rows)
    engine_busy = 1 - idle_s / total_s
    learner_busy = min(1.0, sum(row["time/step_s"] + row["time/sync_s"] for row in rows) / total_s)
    balanced = max(1, math.ceil(round(num_actors * engine_busy / max(learner_busy, 1e-9), 2)))
    works = {"rollout actors": engine_busy, "learner": sum(row["time/step_s"] for row in rows) / total_s}
    busier = max(works, key=works.__getitem__)
    step_s = total_s / len(rows)
    bound = (
        f"{works[busier]:.0%} of the ideal overlap: a step took {step_s:.3g} s, of which the busier side, the "
        f"{busier}, worked {works[busier] * step_s:.3g} s"
    )
    held = sum(row.get("rollout/held", 0.0) * _without_outage(row) for row in rows) / total_s
    remedy = _against_turns(int(rows[-1].get("buffer/staleness", 1)), turns)
    told = _advice(shares, num_actors, balanced, held, remedy)
    if out_s >= _WORTH_TELLING * whole_s:
        told = f"{_outage(out_s, out_s / whole_s)}. Without that time, {told}"
    return Blame(shares | {"wait/outage_s": out_s / whole_s}, num_actors, balanced, told, bound)


def _without_outage(row: Mapping[str, float]) -> float:
    return max(0.0, row["wait/window_s"] - (row.get("wait/outage_s") or 0.0))


def _outage(seconds: float, share: float) -> str:
    return (
        f"no rollout actor was alive for {seconds:.0f} s in which the learner waited, {share:.0%} of the time: see the "
        "deaths in events.jsonl for their cause"
    )


def _against_turns(staleness: int, wanted: bool) -> str:
    if wanted:
        return ", as rollout.release_memory has it: with a GPU for each they would overlap"
    if staleness == 0:
        return ", as buffer.max_staleness is 0: raise it, with a preset that corrects for old samples"
    return f": raise buffer.window, or buffer.max_staleness (now {staleness})"


def _advice(shares: Mapping[str, float], num_actors: int, balanced: int, held: float, against_turns: str) -> str:
    groups, slots = shares["wait/learner_for_groups_s"], shares["wait/rollout_for_slots_s"]
    waits = {
        "groups": groups,
        "slots": slots,
        "weights": max(shares["wait/learner_for_weights_s"], shares["wait/rollout_for_weights_s"]),
        "checkpoints": shares["wait/learner_for_checkpoint_s"],
        "evaluators": shares["wait/learner_for_evaluation_s"],
    }
    most = max(waits, key=waits.__getitem__)
    share = f"{waits[most]:.0%} of the time"
    if waits[most] < _WORTH_SAYING:
        return f"nobody waited for more than {share}: the system is balanced"
    if held >= _WORTH_SAYING and most == "groups":
        return (
            f"the learner waited {share} for groups, and play() of the environment held the rollout actors' threads "
            f"{held:.0%} of the time: put what blocks there into `await in_thread(...)` (asyncrl.utils.threads)"
        )
    if min(groups, slots) >= _WORTH_SAYING and most in ("groups", "slots"):
        return (
            f"the learner waited {groups:.0%} of the time for groups and the rollout actors {slots:.0%} for slots, in "
            f"turns{against_turns}"
        )
    if most == "groups":
        return (
            f"the learner waited {share} for groups: set rollout.num_actors={max(num_actors + 1, balanced)} "
            f"(now {num_actors}) or lower rollout.max_new_tokens{_evaluations(shares)}"
        )
    if most == "slots":
        fewer = f"rollout.num_actors={balanced} would do (now {num_actors})" if balanced < num_actors else ""
        remedy = fewer or "give the learner more (learner.num_gpus, learner.num_threads)"
        return f"the rollout actors waited {share} for slots that the learner frees: {remedy}"
    return {
        "weights": f"weight updates took {share}: raise learner.groups_per_step, so that there are fewer, or place the "
        "learner beside the engines",
        "checkpoints": f"the learner wrote checkpoints for {share}: raise checkpoint.every",
        "evaluators": f"the learner sent weights to evaluators for {share}: raise eval.every",
    }[most]


def _evaluations(shares: Mapping[str, float]) -> str:
    """What to do about evaluations that share the engines with rollouts, while the learner waits for these."""
    share = shares["wait/rollout_for_evaluation_s"]
    if share < _WORTH_SAYING:
        return ""
    return f"; evaluations were in the engines {share:.0%} of the time: raise eval.every or set eval.num_actors=1"
