"""The contract of every engine, over real SGLang."""

from __future__ import annotations

import pytest
import test_engine as contract
from test_engine import (  # noqa: F401
    test_a_partial_update_is_an_error,
    test_a_request_that_cannot_fit_says_what_to_change,
    test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd,
    test_a_stop_at_the_last_token_that_is_allowed_is_a_stop,
    test_a_stop_text_ends_a_completion_with_the_token_that_completes_it,
    test_a_stop_token_ends_a_completion_and_is_part_of_it,
    test_greedy_is_greedy,
    test_logprobs_are_the_models_own,
    test_truncated_logprobs_are_of_the_renormalised_distribution,
    test_versions_and_digests_follow_an_update,
    test_weights_are_received_only_while_paused,
)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def setup(world, run, monkeypatch):
    monkeypatch.setattr(contract, "run", run)
    monkeypatch.setattr(world.engine, "_max_length", 96)
    run(world.reset())
    return contract.Setup(world.engine, world.old, 1e-5, world.folder)


@pytest.fixture
def trained(world):
    return world.new
