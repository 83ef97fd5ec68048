"""The journal against crashes: torn and damaged files, and accounts that hold whatever is killed whenever."""

import asyncio
import copy
import errno
import fcntl
import itertools
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial
from random import Random
from unittest.mock import Mock

import pytest
from helpers import run, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.driver import build as assembly
from asyncrl.driver.buffer import Buffer
from asyncrl.driver.loop import check_digests
from asyncrl.recovery import group_files as files
from asyncrl.recovery.journal import Journal, in_use, read
from asyncrl.recovery.prompt_queue import BrokenPrompts, PromptQueue
from asyncrl.recovery.prompt_states import (
    Accounts,
    Admitted,
    Batch,
    Dropped,
    Generated,
    Resumed,
    Saved,
    Started,
    Synced,
)
from asyncrl.runtime.rollout_worker import make_group
from asyncrl.types import Prompt


def prompts():
    return (Prompt(number, (number + 2,), "") for number in itertools.count())


def filled(path, count=5):
    journal = Journal(path)
    for number in range(count):
        journal.append(Admitted(id=number, checksum=number))
    journal.close()
    return path


def test_every_kind_of_record_survives(tmp_path):
    records = [
        Started(version=1, next_id=3, open_ids=(2,)),
        Admitted(id=3, checksum=7),
        Generated(id=3, oldest=1, newest=2, stored="ab"),
        Batch(step=2, ids=(3, 2)),
        Synced(version=2, digest="cd"),
        Dropped(ids=(2,), reason="because", version=1),
        Saved(version=2, kept=(1, 2)),
        Resumed(version=2),
    ]
    journal = Journal(tmp_path / "journal.bin")
    for record in records:
        journal.append(record)
    journal.close()
    assert read(tmp_path / "journal.bin")[0] == records
    accounts = Journal(tmp_path / "journal.bin").accounts
    assert (accounts.next_id, accounts.open_ids, accounts.kept) == (4, [], (1, 2))
    assert (accounts[2].steps, accounts[3].steps, accounts.published) == ([], [2], {2: "cd"})


def test_a_group_takes_about_130_bytes(tmp_path):
    """The figure in the README: records of 32 groups from admission to training, late in a long run."""
    journal = Journal(tmp_path / "journal.bin")
    first = 1_000_000
    for number in range(first, first + 32):
        journal.append(Admitted(id=number, checksum=2**32 - 1))
        journal.append(Generated(id=number, oldest=9000, newest=9001, stored="0" * 32, passed=0.5))
    journal.append(Batch(step=9002, ids=tuple(range(first, first + 32))))
    journal.append(Synced(version=9002, digest="0" * 16))
    assert 120 < journal.num_bytes / 32 < 135


@pytest.mark.parametrize("cut", [1, 9, 20])
def test_a_torn_tail_is_cut_off_and_counted(tmp_path, cut):
    path = filled(tmp_path / "journal.bin")
    whole = path.stat().st_size
    os.truncate(path, whole - cut)
    journal = Journal(path)
    assert 0 < journal.torn_bytes < whole / 5
    assert journal.accounts.next_id == 4
    journal.append(Admitted(id=4, checksum=4))
    journal.close()
    assert path.stat().st_size == whole
    assert Journal(path).accounts.open_ids == list(range(5))


def test_zeros_at_the_end_are_torn_too(tmp_path):
    """What a power failure leaves of pages that were never written."""
    path = filled(tmp_path / "journal.bin")
    with path.open("ab") as file:
        file.write(bytes(4096))
    journal = Journal(path)
    assert (journal.torn_bytes, journal.accounts.next_id) == (4096, 5)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_damage_before_the_last_record_is_never_passed_over(tmp_path_factory, data):
    path = filled(tmp_path_factory.mktemp("journal") / "journal.bin")
    content = bytearray(path.read_bytes())
    last = len(content) - len(content) // 5
    at = data.draw(st.integers(0, last - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: the record at byte \d+ .*Delete the file to go on"):
        Journal(path)


def test_two_processes_cannot_run_the_same_run(tmp_path):
    path = filled(tmp_path / "journal.bin")
    holder = Journal(path)
    code = f"from pathlib import Path; from asyncrl.recovery.journal import Journal; Journal(Path({str(path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process runs this run" in other.stderr
    holder.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
@pytest.mark.parametrize("ask", [Journal, in_use])
def test_a_file_system_without_locks_is_told_of_with_a_remedy(tmp_path, monkeypatch, number, ask):
    """Lustre without -o flock, and NFS without a lock daemon."""
    path = filled(tmp_path / "journal.bin")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(number, os.strerror(number))))
    with pytest.raises(ValueError, match=rf"journal.bin cannot be locked .*{os.strerror(number)}.*run_dir to"):
        ask(path)


def test_a_journal_that_cannot_be_written_says_so_and_stays_whole(tmp_path, monkeypatch):
    path = filled(tmp_path / "journal.bin")
    journal = Journal(path)
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, frame: real(handle, frame[:5]))
    with pytest.raises(OSError, match="5 of"):
        journal.append(Admitted(id=5, checksum=5))
    monkeypatch.undo()
    assert journal.accounts.next_id == 5
    journal.close()
    assert Journal(path).torn_bytes == 0


def test_open_prompts_are_issued_again_in_order_and_none_is_skipped(tmp_path):
    queue = PromptQueue(prompts(), Journal(tmp_path / "journal.bin"))
    issued = [queue.issue()[0] for _ in range(6)]
    for number in (0, 3):
        queue.generated(make_group(issued[number], [trajectory(1, 2, seed=0)]))
    queue.training([make_group(issued[n], [trajectory(1, 2, seed=0)]) for n in (0, 3)], 1)
    queue.journal.close()
    journal = Journal(tmp_path / "journal.bin")
    journal.append(Resumed(version=1))
    again = PromptQueue(prompts(), journal)
    assert again.cursor(1).open_prompts == [1, 2, 4, 5], "nothing issued yet: a second stop must not forget them"
    assert [again.issue()[0].id for _ in range(6)] == [1, 2, 4, 5, 6, 7]


def test_a_step_that_was_lost_is_trained_again(tmp_path):
    queue = PromptQueue(prompts(), Journal(tmp_path / "journal.bin"))
    made = [make_group(queue.issue()[0], [trajectory(1, 2, seed=0)]) for _ in range(2)]
    for step, group in enumerate(made, 1):
        queue.generated(group)
        queue.training([group], step)
    queue.journal.close()
    journal = Journal(tmp_path / "journal.bin")
    journal.append(Resumed(version=1))
    assert [PromptQueue(prompts(), journal).issue()[0].id] == [1]


def test_a_refused_second_use_leaves_a_prompt_trained_also_once_it_is_forgotten():
    accounts = Accounts(reuse=2, max_lag=3)
    accounts.apply(Admitted(id=0, checksum=1))
    accounts.apply(Generated(id=0, oldest=0, newest=0, stored=""))
    for step in (1, 2):
        accounts.apply(Batch(step=step, ids=(0,)))
    accounts.apply(Dropped(ids=(0,), reason="non-finite gradient", version=1))
    assert accounts.totals() == {"trained": 1}
    accounts.apply(Saved(version=1, kept=(1,)))
    accounts.forget_settled()
    assert not list(accounts)
    assert accounts.totals() == {"trained": 1}


def test_other_prompts_under_the_same_ids_are_refused(tmp_path):
    queue = PromptQueue(prompts(), Journal(tmp_path / "journal.bin"))
    queue.issue()
    other = (Prompt(number, (9, 9), "") for number in itertools.count())
    with pytest.raises(ValueError, match=r"prompt 0 is not the one.*seed"):
        PromptQueue(other, queue.journal)


def test_a_stored_group_comes_back_as_it_was_or_not_at_all(tmp_path):
    group = make_group(Prompt(3, (1, 2), "x"), [trajectory(2, 5, seed=1, reward=0.5), trajectory(2, 3, seed=2)])
    stored = files.write(tmp_path, group)
    back = files.read(tmp_path, 3, stored.stored)
    assert (back.prompt, back.rewards, back.lengths) == (group.prompt, group.rewards, group.lengths)
    for before, after in zip(group.trajectories, back.trajectories, strict=True):
        for name in ("token_ids", "mask", "logprobs", "versions"):
            assert (getattr(before, name) == getattr(after, name)).all()
            assert getattr(before, name).dtype == getattr(after, name).dtype
        assert (before.reward, before.finish) == (after.reward, after.finish)
    path = files.path_of(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-1])
    assert files.read(tmp_path, 3, stored.stored) is None
    assert files.read(tmp_path, 4, stored.stored) is None


class Killed(Exception):
    """The driver is gone."""


class World:
    """A run without models: its weights are the list of what they were trained on, and it can be killed anywhere."""

    def __init__(self, folder, random, shape, fragile=0.02) -> None:
        self.folder, self.random, self.shape, self.fragile = folder, random, shape, fragile
        self.checkpoints: dict[int, tuple[tuple[int, ...], ...]] = {}
        self.num_crashes = self.num_restored = self.synced_bytes = 0
        (folder / "groups").mkdir()

    def maybe_die(self) -> None:
        if self.random.random() < self.fragile:
            raise Killed

    async def live(self, num_steps: int) -> tuple[PromptQueue, Counter]:
        while True:
            try:
                return await self.life(num_steps)
            except Killed:
                self.num_crashes += 1
                self.queue.journal.close()
                self.tear()

    def tear(self) -> None:
        """A power failure takes what was not synced; a kill leaves at most half a record more."""
        path = self.folder / "journal.bin"
        size = path.stat().st_size
        if self.random.random() < 0.3:
            os.truncate(path, self.random.randint(min(self.synced_bytes, size), size))
        elif self.random.random() < 0.5:
            with path.open("ab") as file:
                file.write(path.read_bytes()[:11])

    async def life(self, num_steps: int) -> tuple[PromptQueue, Counter]:
        buffer = Buffer(**self.shape)
        version = max(self.checkpoints, default=0)
        path, bounds = self.folder / "journal.bin", {"reuse": buffer.reuse, "max_lag": buffer.max_lag}
        journal = Journal(path, **bounds, resume_at=version)
        assert_same_accounts(journal, Accounts(**bounds), version)
        journal.append(Resumed(version=version))
        weights = list(self.checkpoints.get(version, ()))
        published = dict(journal.accounts.published)
        self.queue = queue = PromptQueue(prompts(), journal, self.folder / "groups")

        def sync() -> None:
            self.maybe_die()
            published[len(weights)] = str(hash(tuple(weights)))
            queue.synced(len(weights), published[len(weights)])

        sync()
        self.num_restored += queue.restore(published, groups_per_step=buffer.groups_per_step, window=buffer.window)
        flying: list = []
        while len(weights) < num_steps:
            await self.fill(buffer, queue, flying, len(weights))
            trained = await self.take(buffer, queue, flying, len(weights), published)
            check_digests(trained, published)
            queue.training(trained, len(weights) + 1)
            self.maybe_die()
            weights.append(tuple(group.prompt.id for group in trained))
            sync()
            buffer.release()
            if self.random.random() < 0.3:
                await self.save(queue, weights)
            for _ in range(self.random.randint(0, 3)):
                await self.finish(buffer, queue, flying, len(weights), published)
        return queue, Counter(itertools.chain.from_iterable(weights))

    async def take(self, buffer, queue, flying, version, published):
        batch = asyncio.ensure_future(buffer.take(version))
        try:
            while True:
                for _ in range(3):
                    await asyncio.sleep(0)
                if batch.done():
                    return batch.result()
                await self.fill(buffer, queue, flying, version)
                await self.finish(buffer, queue, flying, version, published)
        finally:
            batch.cancel()

    async def fill(self, buffer, queue, flying, version) -> None:
        while buffer.charged < buffer.capacity:
            ticket = await buffer.admit()
            self.maybe_die()
            prompt, finished = queue.issue()
            if finished is None:
                flying.append((ticket, prompt, version))
            else:
                buffer.put(ticket, finished.group, finished.uses)

    async def finish(self, buffer, queue, flying, version, published) -> None:
        if not flying:
            return
        ticket, prompt, oldest = flying.pop(self.random.randrange(len(flying)))
        attempts = [trajectory(1, 1, seed=0, version=v) for v in sorted({oldest, version})]
        group = replace(make_group(prompt, attempts), digests={v: published[v] for v in {oldest, version}})
        if self.random.random() < 0.9:  # else the disk is full
            group = files.write(self.folder / "groups", group)
        self.maybe_die()
        queue.generated(group)
        self.maybe_die()
        if self.random.random() < 0.1:
            buffer.drop(ticket, "test")
            queue.drop([prompt.id], "test", version)
        else:
            buffer.put(ticket, group)

    async def save(self, queue, weights) -> None:
        queue.cursor(len(weights))
        self.synced_bytes = queue.journal.num_bytes
        self.maybe_die()
        self.checkpoints[len(weights)] = tuple(weights)
        for old in sorted(self.checkpoints)[:-2]:
            del self.checkpoints[old]
        self.maybe_die()
        queue.saved(len(weights), sorted(self.checkpoints))
        if self.random.random() < 0.1 and len(self.checkpoints) > 1:
            del self.checkpoints[len(weights)]  # it turns out damaged
            raise Killed


def assert_same_accounts(journal, whole, version):
    """What was forgotten while the file was read makes no difference to a run resumed at this version."""
    for record in [*journal.records(), Resumed(version=version)]:
        whole.apply(record)
    found = copy.deepcopy(journal.accounts)
    found.apply(Resumed(version=version))
    assert found.open_ids == whole.open_ids
    assert found.totals() == whole.totals()
    assert (found.next_id, found.kept) == (whole.next_id, whole.kept)
    for accounts in (found, whole):
        accounts.useful = {a.id: a for a in accounts if accounts.usable_at(a, version) or not a.settled}
    assert found.useful == whole.useful


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "groups_per_step": st.integers(1, 4),
            "max_staleness": st.integers(0, 3),
            "window": st.integers(1, 8),
            "reuse": st.integers(1, 2),
        }
    ),
    st.integers(0, 2**32),
)
def test_whatever_is_killed_every_prompt_is_trained_dropped_or_open(tmp_path_factory, shape, seed):
    world = World(tmp_path_factory.mktemp("run"), Random(seed), shape)
    queue, trained = run(world.live(12))
    accounts = queue.journal.accounts
    known = {account.id: account for account in accounts}
    dropped = {number for number, account in known.items() if account.dropped}
    forgotten = set(range(accounts.next_id)) - set(known)
    assert all(count <= shape["reuse"] for count in trained.values()), "trained too often"
    assert set(trained) <= set(range(accounts.next_id))
    assert not dropped & set(trained), "dropped and trained"
    assert set(trained) & set(known) == {number for number, account in known.items() if account.steps}
    assert accounts.open_ids == sorted(set(known) - dropped - set(trained)), "neither trained, dropped nor open"
    totals = accounts.totals()
    assert totals.total() == accounts.next_id, "the accounts do not add up"
    assert (totals["trained"], totals["open"]) == (len(trained), len(accounts.open_ids))
    assert forgotten - set(trained) <= world_dropped(world), "lost"
    stored = {int(path.stem) for path in (world.folder / "groups").iterdir()}
    assert len(stored) <= 4 * (shape["max_staleness"] + 1) * shape["groups_per_step"], "files pile up"


def world_dropped(world) -> set[int]:
    """Every prompt that any life dropped, read from the file itself."""
    records, _, _ = read(world.folder / "journal.bin")
    return {number for record in records if isinstance(record, Dropped) for number in record.ids}


def test_finished_groups_are_used_after_a_crash(tmp_path):
    """Two finished groups, one of them made by weights that were lost: the first is used, the other played again."""
    (tmp_path / "groups").mkdir()
    queue = PromptQueue(prompts(), Journal(tmp_path / "journal.bin", max_lag=2), tmp_path / "groups")
    queue.synced(0, "zero")
    for version in (0, 1):
        prompt, _ = queue.issue()
        group = make_group(prompt, [trajectory(1, 2, seed=0, version=version)])
        queue.generated(files.write(tmp_path / "groups", replace(group, digests={version: "zero"})))
    queue.journal.close()
    journal = Journal(tmp_path / "journal.bin", max_lag=2)
    journal.append(Resumed(version=0))
    again = PromptQueue(prompts(), journal, tmp_path / "groups")
    assert again.restore({0: "zero"}, groups_per_step=1, window=1) == 1
    first, second = again.issue(), again.issue()
    assert (first[0].id, first[1].uses) == (0, 0)
    assert (second[0].id, second[1]) == (1, None)


@pytest.mark.parametrize(("group_size", "row_tokens", "used"), [(1, 3, True), (2, 3, False), (1, 2, False)])
def test_a_finished_group_that_the_settings_of_now_do_not_take_is_played_again(tmp_path, group_size, row_tokens, used):
    (tmp_path / "groups").mkdir()
    queue = PromptQueue(prompts(), Journal(tmp_path / "journal.bin"), tmp_path / "groups")
    prompt, _ = queue.issue()
    queue.generated(files.write(tmp_path / "groups", make_group(prompt, [trajectory(1, 2, seed=0)])))
    queue.journal.close()
    takes = partial(assembly.fits, group_size, row_tokens)
    again = PromptQueue(prompts(), Journal(tmp_path / "journal.bin"), tmp_path / "groups", fits=takes)
    assert again.restore({}, groups_per_step=1, window=1) == used
    prompt, finished = again.issue()
    assert (prompt.id, finished is not None) == (0, used)


def test_an_environment_whose_prompts_end_is_told_that_they_must_not():
    queue = PromptQueue(itertools.islice(prompts(), 2))
    queue.issue(), queue.issue()
    with pytest.raises(ValueError, match=r"has only 2 training prompts: .* must be endless"):
        queue.issue()


def test_prompts_that_fail_fail_for_all_who_ask():
    def broken():
        yield from itertools.islice(prompts(), 2)
        raise KeyError("question")

    queue = PromptQueue(broken())
    queue.try_source()
    assert [queue.issue()[0].id for _ in range(2)] == [0, 1]
    with pytest.raises(BrokenPrompts, match="failed after 2"):
        queue.try_source()
    for _ in range(2):
        with pytest.raises(BrokenPrompts, match=r"failed after 2 training prompts: KeyError: 'question'"):
            queue.issue()


def test_a_group_file_that_is_a_folder_counts_as_not_there_and_ends_nothing(tmp_path):
    (tmp_path / "000000003.msgpack").mkdir()
    (tmp_path / "notes.msgpack").write_text("mine")
    assert files.read(tmp_path, 3, "ab") is None
    with pytest.raises(ValueError, match=r"000000003\.msgpack cannot be read"):
        files.read_any(tmp_path, 3)
    with pytest.warns(UserWarning, match=r"000000003\.msgpack cannot be deleted"):
        files.delete(tmp_path, 3)
    with pytest.warns(UserWarning, match=r"000000003\.msgpack cannot be deleted"):
        files.delete_others(tmp_path, set())
    assert (tmp_path / "notes.msgpack").exists()


def history(path, steps, groups=2):
    """A journal of so many steps, of which each second one is saved."""
    journal = Journal(path)
    for step in range(1, steps + 1):
        ids = tuple(range((step - 1) * groups, step * groups))
        journal.append(*(Admitted(id=number, checksum=0) for number in ids))
        journal.append(*(Generated(id=number, oldest=step - 1, newest=step - 1, stored="ab") for number in ids))
        journal.append(Batch(step=step, ids=ids), Synced(version=step, digest="cd"))
        if step % 2 == 0:
            journal.append(Saved(version=step, kept=(step - 2, step)))
    journal.close()


def test_memory_of_a_resume_is_bounded_by_what_is_open(tmp_path):
    path = tmp_path / "journal.bin"
    history(path, 2000)
    tracemalloc.start()
    accounts = Journal(path, resume_at=2000, max_lag=1).accounts
    assert tracemalloc.get_traced_memory()[1] < 3e5
    tracemalloc.stop()
    assert accounts.totals() == {"trained": 4000}
    assert len(list(accounts)) + len(accounts.published) < 20


def test_a_restored_old_checkpoint_opens_again_what_was_trained_since(tmp_path):
    path = tmp_path / "journal.bin"
    history(path, 10)
    journal = Journal(path, resume_at=4)
    journal.append(Resumed(version=4))
    assert journal.accounts.open_ids == list(range(8, 20))
    journal.append(Batch(step=5, ids=(8, 9)), Synced(version=5, digest="cd"), Saved(version=5, kept=(5,)))
    journal.close()
    again = Journal(path, resume_at=5)
    again.append(Resumed(version=5))
    assert again.accounts.open_ids == list(range(10, 20)), "what was forgotten waits for the last time that it can open"
    assert again.accounts.totals() == {"trained": 10, "open": 10}
