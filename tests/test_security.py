"""What a run opens and writes: no port that other machines reach, and no secret in its folder."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_kill import ROOT, SMALL, session_of

from asyncrl import config as configuration
from asyncrl.transport import open_rendezvous

LISTEN = "0A"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def listening(processes):
    """Addresses that these processes listen on, by TCP, as in /proc/net: hexadecimal, little-endian words."""
    sockets = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").glob("*"):
            try:
                sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
            except OSError:  # closed meanwhile
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN and words[9] in sockets:
                found.add(words[1].partition(":")[0])
    return found


def is_loopback(address):
    last = address[-8:]  # of an IPv4 address within IPv6, the part that counts
    mapped = address[:-8] in ("", "0000000000000000FFFF0000")
    return (mapped and last.endswith("7F")) or address == "00000000000000000000000001000000"


def test_a_store_listens_on_the_address_of_its_node_alone():
    before = listening([os.getpid()])
    where, store = open_rendezvous("127.0.0.3", 2, 10)
    assert listening([os.getpid()]) - before == {"0300007F"}
    assert store.port == where.port
    store.set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.timeout(300)
def test_a_run_on_one_machine_opens_no_port_to_others(tmp_path):
    words = [*SMALL, f"run_dir={tmp_path}", "num_steps=100000"]
    command = [sys.executable, str(ROOT / "launch" / "run.py"), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True) as process:
        try:
            started = any(line.startswith("step 1 ") for line in process.stdout)
            members = session_of(process.pid)
            addresses = listening(members)
        finally:
            for member in session_of(process.pid):
                os.kill(member, signal.SIGKILL)
    assert started
    assert len(members) >= 6, "the driver, Ray's own processes and three actors"
    assert addresses
    assert {address for address in addresses if not is_loopback(address)} == set()


@pytest.mark.parametrize(
    "word", ["env.args={hf_token='x'}", "env.args={judge={api_key='x'}}", "rollout.engine_args={admin_api_key='x'}"]
)
def test_a_secret_is_refused_where_it_would_be_written_down(word):
    with pytest.raises(ValueError, match=r"is written to the run folder.*environment variable"):
        configuration.load(None, [word])


def test_words_that_only_sound_like_secrets_are_not_refused():
    configuration.load(None, ["env.args={eos_token='</s>', max_tokens=4, hf_token='', token_budget=3}"])
