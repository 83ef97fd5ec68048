"""The presets as data: they validate, resolve by name, take overrides, and refuse what contradicts itself."""

import re

import msgspec
import pytest

from asyncrl.algo.presets import PRESETS, Loss, resolve
from asyncrl.config import loading as configuration


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_its_own_validation(name):
    assert msgspec.convert(msgspec.to_builtins(PRESETS[name]), Loss) == PRESETS[name]
    assert msgspec.json.decode(msgspec.json.encode(PRESETS[name]), type=Loss) == PRESETS[name]
    assert resolve(name, {}) == PRESETS[name]


def test_an_override_replaces_one_field_and_leaves_the_preset_alone():
    loss = resolve("tis2", {"policy_cap": 5})
    assert loss == Loss(policy_weight="token", policy_cap=5.0)
    assert PRESETS["tis2"].policy_cap == 2.0


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("async_defualt", {}, 'did you mean "async_default"'),
        ("zzz", {}, "there are: a3po, "),
        ("my_losses.capped", {}, "one of your own is written 'package.module:function'"),
        ("tis2", {"policy_cpa": 5}, "did you mean 'algorithm.loss.policy_cap'"),
        ("tis2", {"policy_cap": -1}, "algorithm.loss.policy_cap must be a number of at least 0, got -1"),
        ("tis2", {"policy_cap": "5"}, "algorithm.loss.policy_cap must be a number of at least 0, got '5'"),
        ("tis2", {"policy_cap": float("inf")}, "policy_cap must be finite, got inf; for no cap set it to 0"),
        ("tis2", {"policy_floor": 3}, "policy_floor must be below policy_cap, got 3.0 and 2.0"),
        ("tis2", {"trust": "tvv"}, "algorithm.loss.trust must be 'none' or 'ratio' or 'tv' or 'kl' or 'm2', got 'tvv'"),
        ("tis2", {"behavior_weight": "token"}, 'needs anchor = "proximal", got "behavior"'),
        (
            "gmpo",
            {"trust_signed": False},
            'range of a signed trust = "ratio", got trust = "ratio", trust_signed = False',
        ),
        ("tis2", {"center": "batch", "scale": "group_std"}, 'center = "batch" knows no groups'),
        ("tis2", {"reference_estimator": "k1"}, "reference_estimator = k1 has no effect"),
        ("tis2", {"policy_factor": 0.0}, "algorithm.loss.policy_factor must be a number above 0, got 0.0"),
        ("my_losses:", {}, "function is an import path, got 'my_losses:'"),
        ("tis2", {"function": "a:b"}, "function = 'a:b' replaces policy_weight, which is 'token'"),
        ("grpo", {"advantage": "a:b"}, "advantage = 'a:b' replaces scale, which is 'group_std'"),
        ("tis2", {"anchor": "loglinear"}, 'only widens trust = "ratio", got "none"'),
        ("grpo", {"trust_low": 1.5}, "trust_low must be at most 1 for ratios, got 1.5"),
        ("tis2", {"guard": "geometric_band", "guard_low": 1.1, "guard_high": 1}, "0 < guard_low < guard_high, got 1.1"),
        ("tis2", {"guard": "negative_kl"}, "needs guard_high > 0, got 0.0"),
        ("tis2", {"guard": "veto", "guard_low": 2}, "needs 0 < guard_low < 1, got 2.0"),
        ("reinforce", {"policy_cap": 5}, "policy_cap = 5 has no effect"),
        ("tis2", {"trust_high": 0.1}, "trust_high = 0.1 has no effect"),
        ("tis2", {"penalty_level": "sequence"}, "penalty_level = sequence has no effect"),
        ("a:b", {"policy_factor": 0.5}, "policy_factor = 0.5 has no effect on loss \"a:b\", where function = 'a:b'"),
        ("tis2", {"advantage": "a:b", "center": "loo"}, 'center = loo has no effect on loss "tis2", where advantage'),
    ],
)
def test_mistakes_are_named(name, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(name, overrides)


def test_the_needs_of_a_loss():
    proximal = {"decoupled_ppo", "tis_recompute", "tis_seq", "icepop", "seq_mask_tis", "geo_rs_token_tis"}
    assert {name for name, loss in PRESETS.items() if loss.needs_proximal} == proximal
    assert {name for name, loss in PRESETS.items() if loss.needs_reference} == {"grpo", "dsv32"}
    assert {name for name, loss in PRESETS.items() if not loss.is_corrected} == {"reinforce", "opmd"}


def test_a_decoupled_loss_without_behavior_weight_is_uncorrected():
    plain = {"behavior_weight": "none"}
    assert not resolve("decoupled_ppo", plain).is_corrected
    assert not resolve("decoupled_ppo", {**plain, "penalty": 0.1}).is_corrected
    assert resolve("decoupled_ppo", {**plain, "anchor": "behavior"}).is_corrected
    assert not resolve("reinforce", {"trust": "tv"}).is_corrected


DECOUPLED = {"anchor": "proximal", "behavior_weight": "token"}


@pytest.mark.parametrize(
    ("preset", "overrides", "idle"),
    [
        ("decoupled_ppo", {"penalty": 0.1}, "penalty = 0.1"),
        ("decoupled_ppo", {"policy_cap": 2.0}, "policy_cap = 2.0"),
        ("icepop", {"policy_gate": 1.0, "trust_high": 0.3}, "policy_gate = 1.0, trust_high = 0.3"),
        ("tis2", DECOUPLED, "policy_cap = 2.0"),
        ("prime", DECOUPLED, "penalty = 0.001"),
    ],
)
def test_what_acts_on_a_ratio_that_is_always_one_is_refused(preset, overrides, idle):
    with pytest.raises(ValueError, match=rf"a batch is one optimizer step and that ratio is 1; got {idle}: remove"):
        configuration.from_tree({"algorithm": {"preset": preset, "loss": overrides}})


@pytest.mark.parametrize("preset", [name for name, loss in PRESETS.items() if loss.anchor == "proximal"])
def test_decoupled_losses_are_taken_as_published_and_with_what_acts(preset):
    for loss in ({}, {"behavior_cap": 9.0}, {"policy_factor": 0.5}, {"entropy_bonus": 0.1}):
        assert configuration.from_tree({"algorithm": {"preset": preset, "loss": loss}})
    composed = DECOUPLED | {"policy_cap": 0.0}
    assert configuration.from_tree({"algorithm": {"preset": "tis2", "loss": composed}}).loss.anchor == "proximal"


def test_an_advantage_of_the_user_may_do_without_groups():
    algorithm = {"loss": {"advantage": "my_package:baseline"}}
    assert configuration.from_tree({"algorithm": algorithm, "rollout": {"group_size": 1}})
    with pytest.raises(ValueError, match=r"or algorithm\.loss\.advantage to a function of your own"):
        configuration.from_tree({"rollout": {"group_size": 1}})
