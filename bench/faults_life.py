"""One life of a run under fault injection: the main job with its deeds written down and, at a chosen moment, a fault.

What happened is written to an account of its own, apart from the run's journal, so that the journal can be checked
against it. Moments are counted in journal records: every change of a prompt's state is one, and between a record and
what it tells of is where a crash hurts most.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import re
import resource
import signal
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import hostile_env

from asyncrl.config import loading as configuration
from asyncrl.driver import build as assembly
from asyncrl.driver import run as job
from asyncrl.envs.base import Generate
from asyncrl.envs.digits import SortDigits
from asyncrl.recovery import group_files as groups
from asyncrl.recovery.journal import Journal
from asyncrl.recovery.prompt_queue import Finished, PromptQueue
from asyncrl.recovery.prompt_states import Dropped
from asyncrl.types import Group, Prompt, Trajectory

SLOW_S = 1.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What strikes a life, and when: after so many journal records. `dice` decides the details, 0 to 1."""

    kind: str
    at: int
    dice: float


class Sevens(SortDigits):
    """A task on which random weights already score: the share of sevens in the reply. Some prompts can be slow."""

    def __init__(self, tokenizer: Any, slow_share: float = 0.0) -> None:
        super().__init__(tokenizer)
        self._slow_share = slow_share

    async def play(self, prompt: Prompt, generate: Generate) -> Trajectory:
        played = await super().play(prompt, generate)
        if zlib.crc32(str(prompt.id).encode()) % 100 < 100 * self._slow_share:
            await asyncio.sleep(SLOW_S)
        seven = self.encode("7")[0]
        return replace(played, reward=float((played.token_ids[played.mask] == seven).mean()))


class Audit:
    """What a run did, one JSON line a deed, each in the kernel's hands before the run goes on."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, what: str, **facts: Any) -> None:
        os.write(self._file, json.dumps({"what": what, "at_s": time.time(), **facts}).encode() + b"\n")


def live(words: Sequence[str], resume: Path | None, fault: Fault | None, audit: Path, log: Path) -> NoReturn:
    """Runs the job in this process, which is a child made for it, and ends the process."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 1
    try:
        config = configuration.load(resume / "config.json" if resume else None, [] if resume else list(words))
        book = Audit(audit)
        book.note("life")
        assembly.load_runtime(config)  # before anything imports Ray
        watch(config.runtime, book)
        if config.env.path.endswith(":Hostile"):
            hostile_env.spoil_samples()
        if fault is not None:
            inject(fault, config.runtime, book)
        asyncio.run(job.train(config, resume))
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = 2 if isinstance(error, ValueError) else 1
    finally:
        os._exit(code)


def watch(runtime: str, book: Audit) -> None:
    """Has every deed noted: prompts issued, groups trained, weights sent, prompts dropped."""
    handles = handles_of(runtime)
    gradient, apply, send = handles.learner.gradient, handles.learner.apply, handles.learner.broadcast
    issue, append = PromptQueue.issue, Journal.append
    batch: Sequence[Group] = ()

    def issued(queue: PromptQueue) -> tuple[Prompt, Finished | None]:
        prompt, finished = issue(queue)
        book.note("issued", id=prompt.id)
        return prompt, finished

    async def taken(learner: Any, groups: Sequence[Group]) -> None:
        nonlocal batch
        batch = groups
        await gradient(learner, groups)

    async def trained(learner: Any) -> dict[str, float]:
        before = learner.version
        metrics: dict[str, float] = await apply(learner)
        told = [{"id": g.prompt.id, "oldest": g.oldest, "newest": g.newest, "digests": g.digests} for g in batch]
        if learner.version > before:
            book.note("trained", step=learner.version, groups=told)
        return metrics

    async def sent(learner: Any, audience: Any = "rollouts") -> str:
        digest: str = await send(learner, audience)
        book.note("sent", version=learner.version, digest=digest)
        return digest

    def appended(journal: Journal, *records: Any) -> None:
        append(journal, *records)
        for record in records:
            if isinstance(record, Dropped):
                book.note("dropped", ids=record.ids, version=record.version)

    PromptQueue.issue = issued  # type: ignore[method-assign]
    handles.learner.gradient, handles.learner.apply, handles.learner.broadcast = taken, trained, sent
    Journal.append = appended  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class Handles:
    """The classes that stand for the actors in the driver."""

    learner: Any
    rollout: Any


def handles_of(runtime: str) -> Handles:
    if runtime == "local":
        from asyncrl.runtime.local import LocalLearner
        from asyncrl.runtime.rollout_worker import Rollout

        return Handles(LocalLearner, Rollout)
    from asyncrl.runtime.ray_handles import RemoteLearner, RemoteRollout

    return Handles(RemoteLearner, RemoteRollout)


def inject(fault: Fault, runtime: str, book: Audit) -> None:
    """Arms the fault: it strikes at its journal record, or from there on."""

    def struck() -> None:
        book.note("fault", kind=fault.kind)

    strikes = {
        "kill driver": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "kill all": kill_all,
        "kill learner": lambda: signal_actor("LearnerActor", fault.dice),
        "kill rollout actor": lambda: signal_actor("RolloutActor", fault.dice),
        "pause": lambda: signal_actor("RolloutActor", fault.dice, signal.SIGSTOP),
        "sync reply dropped": lambda: hold_reply(runtime, None, struck),
        "sync reply delayed": lambda: hold_reply(runtime, 0.2 + 2 * fault.dice, struck),
        "disk full: journal": lambda: limit_files(journal_size() + int(100 * fault.dice)),
        "disk full: checkpoint": lambda: limit_files(300_000),
        "disk full: groups": refuse_groups,
    }
    strike = strikes.get(fault.kind.removesuffix(", checkpoint damaged").removesuffix(", journal damaged"))
    if strike is None:
        return  # one of the environment, from the start
    append, seen = Journal.append, 0

    def counted(journal: Journal, *records: Any) -> None:
        nonlocal seen
        append(journal, *records)
        seen += 1
        if seen == fault.at:
            if "reply" not in fault.kind:  # which strikes at the update that comes next
                struck()
            strike()

    Journal.append = counted  # type: ignore[method-assign]


def kill_all() -> None:
    """Every process of the run, the driver last."""
    for process in session_of(os.getpid()):
        if process != os.getpid():
            os.kill(process, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def signal_actor(name: str, dice: float, number: signal.Signals = signal.SIGKILL) -> None:
    """Kills or stops one of the actors. A stopped one stays so until the run ends it."""
    actors = sorted(process for process in session_of(os.getpid()) if name in title_of(process))
    if not actors:
        raise RuntimeError(f"no process of {name} ")
    os.kill(actors[int(dice * len(actors))], number)


def hold_reply(runtime: str, delay_s: float | None, struck: Callable[[], None]) -> None:
    """The next answer to a weight update comes late, or never."""
    rollout = handles_of(runtime).rollout
    update, held = rollout.update_weights, False

    async def late(actor: Any, buckets: Any, version: int) -> Any:
        nonlocal held
        report = await update(actor, buckets, version)
        if not held:
            held = True
            struck()
            await (asyncio.sleep(delay_s) if delay_s else asyncio.Event().wait())
        return report

    rollout.update_weights = late


def limit_files(num_bytes: int) -> None:
    """From here on no file of this process grows beyond this: a write is cut short and the next one refused."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def journal_size() -> int:
    return max(Path(f"/proc/self/fd/{name}").stat().st_size for name in os.listdir("/proc/self/fd") if is_journal(name))


def is_journal(descriptor: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").endswith("journal.bin")
    except OSError:
        return False


def refuse_groups() -> None:
    def full(_folder: Path, _group: Group) -> Group:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    groups.write = full


def session_of(leader: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = re.sub(r"^.*\) ", "", path.read_text()).split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def title_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def damage_checkpoint(folder: Path, rng: random.Random) -> str:
    """Harms one file of the newest checkpoint: a flipped bit, a cut, or no file at all."""
    newest = max(folder.glob("checkpoints/step-*"), key=lambda path: path.name)
    path = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    how = rng.choice(["flip", "cut", "delete"])
    harm(path, how, rng)
    return f"{path.name}: {how}"


def damage_journal(folder: Path, rng: random.Random) -> str:
    """Tears the end of the journal as a power failure may, or flips a bit anywhere in it."""
    path = folder / "journal.bin"
    how = rng.choice(["tear", "tear", "flip"])
    harm(path, how, rng)
    return how


def harm(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    match how:
        case "delete":
            path.unlink()
            return
        case "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "cut":
            del content[rng.randrange(len(content)) :]
        case "tear":
            del content[len(content) - rng.randrange(1, 8) :]
            content += rng.randbytes(rng.randrange(40))
    path.write_bytes(content)
