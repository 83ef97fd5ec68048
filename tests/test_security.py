"""What a run opens and writes: no port that other machines reach, and no secret in its folder."""

import os
import sys

import pytest
from helpers import listening

from asyncrl.config import loading as configuration
from asyncrl.weights.broadcast import open_rendezvous

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_store_listens_on_the_address_of_its_node_alone():
    before = listening([os.getpid()])
    where, store = open_rendezvous("127.0.0.3", 2, 10)
    assert listening([os.getpid()]) - before == {"0300007F"}
    assert store.port == where.port
    store.set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.parametrize(
    "word", ["env.args={hf_token='x'}", "env.args={judge={api_key='x'}}", "rollout.engine_args={admin_api_key='x'}"]
)
def test_a_secret_is_refused_where_it_would_be_written_down(word):
    with pytest.raises(ValueError, match=r"is written to the run folder.*environment variable"):
        configuration.load(None, [word])


def test_words_that_only_sound_like_secrets_are_not_refused():
    configuration.load(None, ["env.args={eos_token='</s>', max_tokens=4, hf_token='', token_budget=3}"])
