"""The run's prompts: drawn in order, written to the journal, each trained or dropped with a reason, none lost.

draw ----> (left out by the curriculum: dropped with that reason)
issue ---> (played, or finished before a crash) ---> generated ---> trained(step)
                                                          '-------> dropped(reason)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from asyncrl.recovery import group_files as files
from asyncrl.recovery.checkpoint import Cursor
from asyncrl.recovery.curriculum import Curriculum
from asyncrl.recovery.journal import Journal
from asyncrl.recovery.prompt_states import (
    Account,
    Admitted,
    Batch,
    Dropped,
    Generated,
    Record,
    Saved,
    Synced,
    checksum_of,
)
from asyncrl.types import Group, Prompt, Version, reaches


@dataclass(frozen=True, slots=True)
class Finished:
    """A group that was finished before a crash, and the times that it was trained."""

    group: Group
    uses: int


class BrokenPrompts(ValueError):
    """The environment has no next prompt to give."""


class PromptQueue:
    """Issues prompts and keeps the journal. A resumed run first issues those that are open, under the same ids."""

    def __init__(
        self,
        source: Iterator[Prompt],
        journal: Journal | None = None,
        folder: Path | None = None,
        *,
        keep_groups: bool = False,
        curriculum: Curriculum | None = None,
        pass_reward: float | None = None,
        fits: Callable[[Group], bool] = lambda _group: True,
        first_id: int = 0,
    ) -> None:
        """`source`: the endless prompts of the run, from that of `first_id` on: `Accounts.first_needed` at most, and 0
        with a curriculum, which has to meet them all. `folder`: where groups are stored, if they are.
        `pass_reward`: the reward from which on an attempt counts as passed, in the journal and for the curriculum, if
        there is such a mark.
        `fits`: whether the run's settings still take a stored group.

        Raises `ValueError` if an open prompt is no longer the one that was admitted under its id.
        """
        self.journal = journal or Journal(None)
        self._failure: str | None = None
        self._accounts = self.journal.accounts
        self._source, self._folder, self._keep_groups = source, folder, keep_groups
        again = {account.id: account for account in self._accounts if account.may_come_again}
        drawn: Iterator[Prompt] = islice(source, self._accounts.next_id - first_id)
        self._curriculum, self.pass_reward, self._fits = curriculum, pass_reward, fits
        if curriculum is not None:
            drawn = map(curriculum.meet, drawn)
        self._again = deque(_checked(prompt, again[prompt.id]) for prompt in drawn if prompt.id in again)
        if curriculum is not None:
            curriculum.replay(self.journal.records())
        self._finished: dict[int, Finished] = {}
        self.num_unstored = 0
        """Groups that could not be written to disk."""
        self._stored = {account.id for account in self._accounts if account.stored}
        if folder is not None and not keep_groups:
            files.delete_others(folder, self._stored)

    def restore(self, published: Mapping[Version, str], *, groups_per_step: int, window: int) -> int:
        """Finds the finished groups that can still be trained; returns how many. Call it once, before the first issue.

        A group qualifies if its file is whole and fits the settings of now, its tokens were made by weights that are
        published under the same digest, and it will be young enough even if it waits as long as the buffer's order
        allows. Other open prompts are played again.
        """
        waiting: deque[Prompt] = deque()
        for prompt in self._again:
            account = self._accounts[prompt.id]
            steps_to_wait = 0 if account.steps else (len(waiting) + window - 1) // groups_per_step
            group = self._read(account, published, steps_to_wait)
            if group is not None:
                self._finished[prompt.id] = Finished(group, len(account.steps))
            if group is not None or not account.settled:
                waiting.append(prompt)
        self._again = waiting
        return len(self._finished)

    def try_source(self) -> None:
        """Draws a prompt and puts it back, so that a broken environment is noticed before anything is started."""
        self._source = chain([self._draw()], self._source)

    def _draw(self) -> Prompt:
        """The next prompt of the environment; what it raised once is raised for all who ask."""
        if self._failure is None:
            given = self._accounts.next_id
            try:
                return next(self._source)
            except StopIteration:
                self._failure = (
                    f"the environment has only {given} training prompts: prompts() must be endless for the split "
                    "'train', so begin again after the last one"
                )
            except Exception as error:  # whatever the user's code raises
                self._failure = (
                    f"the environment failed after {given} training prompts: {type(error).__name__}: {error}"
                )
        raise BrokenPrompts(self._failure)

    def issue(self) -> tuple[Prompt, Finished | None]:
        """The next prompt to play; or one that was played before the crash, with its group."""
        while True:
            again = bool(self._again)
            prompt = self._again.popleft() if again else self._draw()
            finished = self._finished.pop(prompt.id, None)
            if finished is not None:
                return prompt, finished
            admitted = Admitted(id=prompt.id, checksum=checksum_of(prompt))
            left_out = self._left_out(prompt, again)
            self._write(admitted, *left_out)
            if not left_out:
                return prompt, None

    def generated(self, group: Group) -> bool:
        """The group is finished and about to enter the buffer; whether its tokens are on disk, or need not be."""
        number, oldest, newest = group.prompt.id, group.oldest, group.newest
        mark, rewards = self.pass_reward, group.scored
        passed = None
        if mark is not None and rewards:
            passed = sum(reaches(reward, mark) for reward in rewards) / len(rewards)
        self._write(Generated(id=number, oldest=oldest, newest=newest, stored=group.stored, passed=passed))
        if group.stored:
            self._stored.add(group.prompt.id)
        elif self._folder is not None:
            self.num_unstored += 1
            return False
        return True

    def training(self, groups: Sequence[Group], step: Version) -> None:
        """The batch is about to be trained in this optimizer step."""
        self._write(Batch(step=step, ids=tuple(group.prompt.id for group in groups)))

    def drop(self, ids: Sequence[int], reason: str, version: Version) -> None:
        """These prompts are given up by a learner at `version`."""
        self._write(Dropped(ids=tuple(ids), reason=reason, version=version))

    def synced(self, version: Version, digest: str) -> None:
        """Every engine holds the version. Deletes files of groups that no resume can need any more."""
        self._write(Synced(version=version, digest=digest))
        self._delete_unneeded()

    def saved(self, version: Version, kept: Sequence[Version]) -> None:
        """A checkpoint of `version` is complete, and `kept` are on disk."""
        self._write(Saved(version=version, kept=tuple(kept)))
        self._delete_unneeded()
        self._accounts.forget_settled()

    def is_saved(self, version: Version) -> bool:
        """Whether there is a checkpoint of the version; version 0 needs one only to be loaded from outside."""
        return version > 0 and version in self._accounts.kept

    def cursor(self, version: Version) -> Cursor:
        """Where a resumed run goes on. What it says is on disk once this returns."""
        self.journal.sync()
        return Cursor(version, self._accounts.next_id, self._accounts.open_ids, self.journal.num_bytes)

    def metrics(self) -> dict[str, float]:
        """What a step logs about the prompts."""
        row = {"journal/unstored": float(self.num_unstored)}
        return row | self._curriculum.metrics(self._accounts.totals()) if self._curriculum else row

    def _left_out(self, prompt: Prompt, again: bool) -> list[Record]:
        """The record of a draw that the curriculum leaves out; empty if it is played."""
        if self._curriculum is None:
            return []
        reason = self._curriculum.reason(self._curriculum.meet(prompt), again=again)
        return [Dropped(ids=(prompt.id,), reason=reason, version=self._curriculum.version)] if reason else []

    def _write(self, *records: Record) -> None:
        self.journal.append(*records)
        if self._curriculum is not None:
            for record in records:
                self._curriculum.apply(record)

    def _read(self, account: Account, published: Mapping[Version, str], steps_to_wait: int) -> Group | None:
        accounts = self._accounts
        latest = accounts.version + accounts.reuse * steps_to_wait
        too_old = latest - account.oldest > accounts.max_lag
        if self._folder is None or not accounts.usable_at(account, accounts.version) or too_old:
            return None
        group = files.read(self._folder, account.id, account.stored)
        if group is None or any(published.get(version) != digest for version, digest in group.digests.items()):
            return None
        if not self._fits(group):
            return None
        return group

    def _delete_unneeded(self) -> None:
        if self._folder is None or self._keep_groups:
            return
        unneeded = [number for number in self._stored if not self._accounts.needs_group(number)]
        for number in unneeded:
            files.delete(self._folder, number)
        self._stored.difference_update(unneeded)


def _checked(prompt: Prompt, account: Account) -> Prompt:
    if account.checksum is not None and account.checksum != checksum_of(prompt):
        raise ValueError(
            f"prompt {prompt.id} is not the one that the run admitted under this number: env.path, env.args, seed, the "
            "data behind them or the tokenizer of model.path have changed since; restore them, or start a new run"
        )
    return prompt
