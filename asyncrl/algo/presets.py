"""Published methods as named losses, and the lookup by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from asyncrl.algo.loss_spec import Loss
from asyncrl.utils import settings_text as tables

_PPO: dict[str, Any] = {"scale": "group_std", "policy_weight": "token", "trust": "ratio"}
_RECOMPUTE: dict[str, Any] = {**_PPO, "anchor": "proximal", "behavior_weight": "token"}
_TV: dict[str, Any] = {"policy_weight": "token", "trust": "tv"}

PRESETS: dict[str, Loss] = {
    # Cap for the weight, signed total-variation mask for trust: one forward, exact REINFORCE at lag 0.
    "async_default": Loss(**_TV, policy_cap=2.0),
    # Truncated importance sampling (Yao et al. 2025), anchored on the behavior policy.
    "tis2": Loss(policy_weight="token", policy_cap=2.0),
    # REINFORCE with a group baseline: no correction (Williams 1992; 2402.14740).
    "reinforce": Loss(),
    # DeepSeekMath 2402.03300. TRL's, verl's and SkyRL's defaults differ in KL and mean: docs/guide.md.
    "grpo": Loss(**_PPO, reference_kl=0.04, aggregate="seq_mean"),
    # Dr. GRPO 2503.20783: no std, constant denominator.
    "dr_grpo": Loss(policy_weight="token", trust="ratio", aggregate="constant"),
    # DAPO 2503.14476: clip-higher, token mean; its group filter and length shaping belong to the data. verl's recipe
    # adds the dual clip (Ye et al. 1912.09729) at 10, which is policy_cap = 10 with policy_outside = "drop".
    "dapo": Loss(**_PPO, trust_high=0.28),
    # Decoupled PPO 2110.00641 as in AReaL 2505.24298: tokens with a behavior weight above 5 are dropped.
    "decoupled_ppo": Loss(**_RECOMPUTE, behavior_cap=5.0, behavior_outside="drop"),
    # A-3PO 2512.06547: log-linear proximal policy, which is PPO-clip with a range widening with lag.
    "a3po": Loss(**_PPO, anchor="loglinear"),
    # Truncated importance sampling over recomputed log-probs (Yao et al. 2025; slime, verl).
    "tis_recompute": Loss(**_RECOMPUTE, behavior_cap=2.0, trust_high=0.28),
    # The same with the product over the sequence as weight (verl rollout correction).
    "tis_seq": Loss(**{**_RECOMPUTE, "behavior_weight": "sequence"}, behavior_cap=2.0),
    # IcePop (Ling team 2025): a band on the behavior weight, outside it the token is dropped.
    "icepop": Loss(**_RECOMPUTE, behavior_floor=0.5, behavior_cap=5.0, behavior_outside="drop"),
    # Sequence mask on the geometric mean ratio, token weights capped (NeMo-RL leaves them raw).
    "seq_mask_tis": Loss(**_RECOMPUTE, behavior_cap=2.0, guard="geometric_band", guard_low=0.999, guard_high=1.002),
    # Geometric rejection with token weights (verl, SkyRL).
    "geo_rs_token_tis": Loss(**_RECOMPUTE, behavior_cap=2.0, guard="geometric_band", guard_low=0.99, guard_high=1.01),
    # AIPO, LlamaRL 2505.24034: one-sided cap.
    "aipo": Loss(scale="group_std", policy_weight="token", policy_cap=5.0),
    # CISPO, MiniMax-M1 2506.13585: weights in [0, 5], no token ever dropped.
    "cispo": Loss(scale="group_std", policy_weight="token", policy_cap=5.0),
    # ScaleRL 2510.13786: CISPO with batch std and equal prompts.
    "scalerl": Loss(scale="batch_std", policy_weight="token", policy_cap=5.0, aggregate="prompt"),
    # GLM-5 and SkyRL rollout_is: double-sided mask on the whole ratio.
    "rollout_is": Loss(**_PPO, trust_signed=False),
    # DPPO 2602.04879, binary total variation.
    "dppo_tv": Loss(**_TV, scale="group_std", policy_cap=10.0),
    # DPPO 2602.04879, binary KL.
    "dppo_kl": Loss(
        scale="group_std", policy_weight="token", policy_cap=10.0, trust="kl", trust_low=0.05, trust_high=0.05
    ),
    # prime-rl default since April 2026: DPPO-TV and the squared log-ratio of Kimi K2.5 (2602.02276).
    "prime": Loss(**_TV, penalty=1e-3),
    # prime-rl's IPO: the mask without sign.
    "ipo": Loss(**_TV, trust_low=0.1, trust_high=0.1, trust_signed=False, penalty=1e-3),
    # GSPO 2507.18071, anchored on the behavior policy. The paper's range is that of a ratio between two policies of its
    # learner; of a ratio to an engine in bfloat16, or one step behind, it removes much of the gradient: docs/guide.md.
    "gspo": Loss(
        scale="group_std",
        policy_weight="geometric",
        trust="ratio",
        trust_low=3e-4,
        trust_high=4e-4,
        aggregate="seq_mean",
    ),
    # M2PO 2510.01161: second moment of the log-ratios at most 0.04.
    "m2po": Loss(scale="group_std", policy_weight="token", trust="m2", trust_high=0.04),
    # TOPR 2503.14286: positives unweighted, negatives by the sequence ratio capped at 1.
    "topr": Loss(policy_weight="sequence", policy_cap=1.0, policy_sign="negative"),
    # GMPO 2507.20673: geometric mean of token ratios clipped to (exp(-0.4), exp(0.4)), anchored on the behavior policy.
    "gmpo": Loss(
        scale="group_std",
        policy_weight="clipped_geometric",
        trust="ratio",
        trust_low=1 - math.exp(-0.4),
        trust_high=math.exp(0.4) - 1,
        aggregate="seq_mean",
    ),
    # SAPO 2511.20347: a soft gate in place of the clip, narrower for negatives; anchored on the behavior policy.
    "sapo": Loss(
        scale="group_std", policy_weight="token", policy_gate=1.0, policy_gate_negative=1.05, aggregate="seq_mean"
    ),
    # DeepSeek-V3.2 2512.02556: off-policy sequence mask (OPSM) and the ratio-weighted KL. Their delta belongs to their
    # engine: set guard_high to a few times the mean of -log ratio at lag 0.
    "dsv32": Loss(
        policy_weight="token",
        trust="ratio",
        guard="negative_kl",
        guard_high=0.05,
        reference_kl=1e-3,
        reference_weighted=True,
        aggregate="seq_mean",
    ),
    # OPMD as in Trinity-RFT 2505.17826 with tau = 1: no ratio, half the advantage.
    "opmd": Loss(policy_factor=0.5),
    # VCPO 2602.17616: sequence ratio capped at 8, learning rate by the root of the effective sample size. Its baseline
    # of least variance needs the gradient norm of each trajectory; here it is the group mean.
    "vcpo": Loss(policy_weight="sequence", policy_cap=8.0, learning_rate_scale="sqrt_ess"),
    # REINFORCE++ 2501.03262: no group, advantages whitened over all tokens of the batch (equation 5; OpenRLHF, verl).
    # Its KL in the reward (equation 4) takes a reference model and is left out; reward_kl = 0.01 adds it (0.001 for
    # mathematics, in the first version of the paper).
    "reinforce_pp": Loss(center="batch", scale="token_std", policy_weight="token", trust="ratio"),
    # The same with the group mean as baseline. Its KL, in the loss (equation 8), is left out, too: reference_kl with
    # reference_estimator = "k2" adds it, for which the paper gives no coefficient.
    "reinforce_pp_baseline": Loss(scale="token_std", policy_weight="token", trust="ratio"),
    # PPO 1707.06347 with a critic and GAE, anchored on the behavior policy; advantages whitened over the tokens.
    "ppo": Loss(center="critic", scale="token_std", policy_weight="token", trust="ratio"),
    # RLOO 2402.14740 with the correction of `tis2`.
    "rloo_tis2": Loss(center="loo", policy_weight="token", policy_cap=2.0),
    # Kimi k1.5 2501.12599, which writes half of tau = 0.1 times the squared log-ratio of the sequence.
    "kimi_k15": Loss(penalty=0.05, penalty_level="sequence", aggregate="seq_sum"),
}

_SWITCHES: dict[str, str] = {
    **{f"behavior_{field}": "behavior_weight" for field in ("floor", "cap", "outside")},
    **{f"policy_{f}": "policy_weight" for f in ("floor", "cap", "outside", "sign", "gate", "gate_negative")},
    **{f"trust_{field}": "trust" for field in ("low", "high", "signed")},
    **{f"guard_{field}": "guard" for field in ("low", "high")},
    "penalty_level": "penalty",
    **{f"reference_{field}": "reference_kl" for field in ("estimator", "weighted")},
    **{f"reward_kl_{field}": "reward_kl" for field in ("estimator", "level")},
}
"""Field -> the field that turns it on: setting the first while the second is off would do nothing."""


def resolve(name: str, overrides: Mapping[str, Any]) -> Loss:
    """The preset `name` with single fields replaced; an import path `package.module:function` is a loss of your own.

    ValueError if the name or a field is unknown (naming the nearest one), a value has the wrong type or range, the
    result breaks a rule of `Loss`, or an override would have no effect.
    """
    if ":" not in name and name not in PRESETS:
        raise ValueError(
            f'unknown loss "{name}"{_nearest(name, PRESETS)}; there are: {", ".join(sorted(PRESETS))}; one of your own '
            "is written 'package.module:function'"
        )
    tables.check(dict(overrides), Loss, "algorithm.loss.")
    base = PRESETS[name] if name in PRESETS else Loss(function=name)
    try:
        loss = msgspec.convert({**msgspec.structs.asdict(base), **overrides}, Loss)
    except msgspec.ValidationError as error:
        raise ValueError(f'loss "{name}" with {dict(overrides)}: {error}') from error
    for replacement, key in (("function", "policy_factor"), ("advantage", "center")):
        if getattr(loss, replacement) and key in overrides:
            raise ValueError(
                f'{key} = {overrides[key]} has no effect on loss "{name}", where {replacement} = '
                f"{getattr(loss, replacement)!r} takes its place; remove {key}"
            )
    for key in overrides:
        switch = _SWITCHES.get(key)
        if switch is not None and getattr(loss, switch) in ("none", 0):
            raise ValueError(
                f'{key} = {overrides[key]} has no effect on loss "{name}" while {switch} = {getattr(loss, switch)}; '
                f"set {switch} too or remove {key}"
            )
    return loss


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f', did you mean "{near[0]}"?' if near else ""
