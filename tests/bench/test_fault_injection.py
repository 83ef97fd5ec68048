"""`bench/faults.py`: its judge sees what it is for, and one trial of each kind of fault passes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.recovery.journal import Journal
from asyncrl.recovery.prompt_states import Admitted, Batch
from bench import faults

ROOT = Path(__file__).parents[2]

TRIALS = 10
"""As many as there are kinds: trials take them in turns."""
TRIAL = faults.Trial(0, "local", 1, (faults.Fault("kill all", 5, 0.5),))


def account():
    """Two prompts a step, the steps 3 and 4 lost and made again; and two prompts that stay open."""
    life = [{"what": "life", "at_s": 0.0}, {"what": "sent", "at_s": 0.0, "version": 0, "digest": "d0"}]
    deeds = [*life]
    for step in range(1, 5):
        deeds += made(step)
    deeds.append({"what": "fault", "at_s": 50.0, "kind": "kill all"})
    deeds += [{"what": "life", "at_s": 60.0}, {"what": "sent", "at_s": 61.0, "version": 2, "digest": "d2"}]
    for step in range(3, faults.NUM_STEPS + 1):
        deeds += made(step)
    last = 2 * faults.NUM_STEPS
    return [*deeds, *({"what": "issued", "at_s": 99.0, "id": number} for number in (last, last + 1))]


def made(step):
    ids = (2 * step - 2, 2 * step - 1)
    group = {"oldest": step - 1, "newest": step - 1, "digests": {str(step - 1): f"d{step - 1}"}}
    return [
        *({"what": "issued", "at_s": 62.0, "id": number} for number in ids),
        {"what": "trained", "at_s": 62.0 + step, "step": step, "groups": [{"id": number, **group} for number in ids]},
        {"what": "sent", "at_s": 62.0, "version": step, "digest": f"d{step}"},
    ]


def judged(tmp_path, deeds):
    journal = Journal(tmp_path / "journal.bin")
    for number in range(2 * faults.NUM_STEPS + 2):
        journal.append(Admitted(id=number, checksum=0))
    for step in range(1, faults.NUM_STEPS + 1):
        journal.append(Batch(step=step, ids=(2 * step - 2, 2 * step - 1)))
    journal.close()
    path = tmp_path / "audit.jsonl"
    path.write_text("".join(json.dumps(deed) + "\n" for deed in deeds))
    verdict = faults.Verdict()
    faults.judge(path, tmp_path, TRIAL, verdict)
    return verdict


def test_a_good_account_passes(tmp_path):
    verdict = judged(tmp_path, account())
    assert verdict.good, verdict
    assert verdict.recovery_s == [15.0]


def change_trained(deeds, step, change):
    """In the last life."""
    deed = [deed for deed in deeds if deed["what"] == "trained" and deed["step"] == step][-1]
    change(deed["groups"][0])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda group: group.update(id=4), "twice"),
        (lambda group: group.update(id=4), "lost"),
        (lambda group: group["digests"].update({"6": "other"}), "wrong"),
        (lambda group: group.update(oldest=3), "wrong"),
    ],
)
def test_a_prompt_trained_twice_or_lost_and_weights_that_were_not_sent_are_seen(tmp_path, change, field):
    deeds = account()
    change_trained(deeds, 7, change)
    assert getattr(judged(tmp_path, deeds), field)


def test_weights_that_come_back_changed_are_seen(tmp_path):
    deeds = account()
    resumed = [deed for deed in deeds if deed["what"] == "sent" and deed["version"] == 2][-1]
    resumed["digest"] = "other"
    assert any("came back as other weights" in told for told in judged(tmp_path, deeds).wrong)


def test_an_open_prompt_that_is_not_issued_again_is_lost_unless_its_turn_has_not_come(tmp_path):
    deeds = account()
    crash = next(number for number, deed in enumerate(deeds) if deed["what"] == "fault")
    deeds.insert(crash, deeds.pop(-2))
    assert judged(tmp_path, deeds).lost == [2 * faults.NUM_STEPS]
    deeds.insert(crash, deeds.pop())
    assert judged(tmp_path, deeds).lost == []


@pytest.mark.timeout(300)
def test_a_run_survives_each_kind_of_fault(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "faults.py"), "--runtime", "local", "--seed", "7"]
    words = ["--trials", str(TRIALS), "--out", str(tmp_path)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"trials": TRIALS, "seed": 7, "bad": []}
    kinds = re.findall(r"^\| local: (.+?) \| 1 \|", done.stdout, re.MULTILINE)
    assert len(kinds) == TRIALS, done.stdout
