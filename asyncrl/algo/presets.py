"""Policy losses as data: one `Loss` per published method, and the lookup by name.

Every method here is one score-function loss with a detached coefficient,

    L = - sum_t n * stop_gradient[M * c * A + kappa] * logprob

so a method is a choice of advantage A (`center`, `scale`), anchor and weight c (`anchor`, `behavior_*`, `policy_*`),
token mask (`trust*`) and sequence mask (`guard*`) that make up M, regulariser kappa (`penalty*`, `reference_kl`) and
normaliser n (`aggregate`). This file holds data and rules only; the arithmetic is in `advantage.py` and `loss.py`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

Center: TypeAlias = Literal["mean", "loo", "batch", "none"]
Scale: TypeAlias = Literal["none", "group_std", "batch_std"]
Aggregate: TypeAlias = Literal["token", "seq_mean", "seq_sum", "prompt", "constant"]
Anchor: TypeAlias = Literal["behavior", "proximal", "loglinear"]
Weight: TypeAlias = Literal["none", "token", "geometric", "sequence"]
PolicyWeight: TypeAlias = Literal["none", "token", "geometric", "sequence", "clipped_geometric"]
Outside: TypeAlias = Literal["clamp", "drop"]
Trust: TypeAlias = Literal["none", "ratio", "tv", "kl", "m2"]
Guard: TypeAlias = Literal["none", "geometric_band", "negative_kl", "max_kl", "veto"]
NonNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]


class Loss(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One policy loss. Log-ratios: behavior x_w, policy x_r; every bound is on the ratio exp(x), not on its logarithm.

    `anchor` says what x_w and x_r are: "behavior" has x_r = current - behavior and no x_w; "proximal" has
    x_w = proximal - behavior and x_r = current - proximal; "loglinear" is "behavior" with a trust range that widens
    with the lag d of a token to ((1 - low)^max(d, 1), (1 + high)^max(d, 1)).

    A weight "none" is 1; otherwise it is the ratio of the token, the geometric mean of the ratios of the sequence, or
    their product. Outside floor and cap it is clamped and keeps its gradient, or the token is dropped; a cap of 0
    means no cap.
    """

    center: Center = "mean"
    scale: Scale = "none"
    aggregate: Aggregate = "token"

    anchor: Anchor = "behavior"
    behavior_weight: Weight = "none"
    behavior_floor: NonNegative = 0.0
    behavior_cap: NonNegative = 0.0
    behavior_outside: Outside = "clamp"

    policy_weight: PolicyWeight = "none"
    """"clipped_geometric" is "geometric" over token ratios that are first clamped to the trust range on the side to
    which the advantage pushes them; the trust mask then judges each token."""
    policy_floor: NonNegative = 0.0
    policy_cap: NonNegative = 0.0
    policy_outside: Outside = "clamp"
    policy_sign: Literal["both", "negative"] = "both"
    """Sign of the advantages that are weighted; with "negative" the others keep weight 1."""
    policy_gate: NonNegative = 0.0
    """Temperature tau of a soft trust region on positive advantages: the weight r times 4 s (1 - s) with
    s = sigmoid(tau (r - 1)), which is 1 at r = 1 and falls smoothly on both sides; 0 is no gate."""
    policy_gate_negative: NonNegative = 0.0
    """The same for negative advantages."""
    policy_factor: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Constant factor of the weight."""

    trust: Trust = "none"
    """What removes a token that moved too far from the anchor: "ratio" (1 - low, 1 + high) at the level of the policy
    weight, "tv" change of the token's probability, "kl" binary KL of it, "m2" the largest squared log-ratios until
    their mean is at most `trust_high`."""
    trust_low: NonNegative = 0.2
    trust_high: NonNegative = 0.2
    trust_signed: bool = True
    """Remove only tokens that the gradient would push further out."""

    guard: Guard = "none"
    """What removes a whole sequence, judged on current - behavior: "geometric_band" mean ratio outside (low, high),
    "negative_kl" negative advantage and mean(-x) > high, "max_kl" any exp(x) - 1 - x > high, "veto" any ratio < low."""
    guard_low: NonNegative = 0.0
    guard_high: NonNegative = 0.0

    penalty: NonNegative = 0.0
    """Coefficient of the squared policy log-ratio, of the token or summed over the sequence; masks do not apply."""
    penalty_level: Literal["token", "sequence"] = "token"
    reference_kl: NonNegative = 0.0
    """Coefficient of an estimate of KL(current || reference) in the loss; masks do not apply."""
    reference_estimator: Literal["k1", "k2", "k3"] = "k3"
    """With x = current - reference: "k1" x, "k2" x^2 / 2, "k3" exp(-x) - 1 + x. Without `reference_weighted` the
    gradient of "k1" is noise of mean 0 at lag 0, and that of "k2" is the unbiased one."""
    reference_weighted: bool = False
    """Multiply the estimate by the ratio to the behavior policy, and differentiate both (DeepSeek-V3.2)."""
    entropy_bonus: NonNegative = 0.0
    """Coefficient of the entropy of the policy; the learner, which holds the logits, adds the term."""
    learning_rate_scale: Literal["none", "sqrt_ess"] = "none"
    """Factor of the step's learning rate: "sqrt_ess" is the root of the effective sample size of the trajectories, as
    a share of them, on unclipped ratios. (A factor of the gradient would be lost in Adam.)"""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}; for no cap set it to 0")
        for slot in ("behavior", "policy"):
            floor, cap = getattr(self, f"{slot}_floor"), getattr(self, f"{slot}_cap")
            if cap and floor >= cap:
                raise ValueError(f"{slot}_floor must be below {slot}_cap, got {floor} and {cap}; lower the floor")
        if self.behavior_weight != "none" and self.anchor != "proximal":
            raise ValueError(
                f'behavior_weight = "{self.behavior_weight}" needs anchor = "proximal", got "{self.anchor}"; '
                'set behavior_weight = "none" and use policy_weight, which then holds the whole ratio'
            )
        if self.center == "batch" and self.scale == "group_std":
            raise ValueError('center = "batch" knows no groups: set scale = "batch_std" or "none", got "group_std"')
        if self.anchor == "loglinear" and self.trust != "ratio":
            raise ValueError(
                f'anchor = "loglinear" only widens trust = "ratio", got "{self.trust}"; set trust = "ratio"'
            )
        if self.policy_weight == "clipped_geometric" and (self.trust != "ratio" or not self.trust_signed):
            raise ValueError(
                f'policy_weight = "clipped_geometric" clamps to the range of a signed trust = "ratio", got trust = '
                f'"{self.trust}", trust_signed = {self.trust_signed}; set trust = "ratio" and trust_signed = true'
            )
        if self.trust == "ratio" and self.trust_low > 1:
            raise ValueError(f"trust_low must be at most 1 for ratios, got {self.trust_low}; 1 removes the lower bound")
        self._check_guard()

    def _check_guard(self) -> None:
        low, high = self.guard_low, self.guard_high
        if self.guard == "geometric_band" and not 0 < low < high:
            raise ValueError(f'guard = "geometric_band" needs 0 < guard_low < guard_high, got {low} and {high}')
        if self.guard in ("negative_kl", "max_kl") and not high > 0:
            raise ValueError(
                f'guard = "{self.guard}" needs guard_high > 0, got {high}; a few times its 99.9th percentile at lag 0'
            )
        if self.guard == "veto" and not 0 < low < 1:
            raise ValueError(f'guard = "veto" needs 0 < guard_low < 1, got {low}; 1e-4 is usual')

    @property
    def needs_proximal(self) -> bool:
        """Whether the learner must score the batch once more before the first step on it."""
        return self.anchor == "proximal"

    @property
    def needs_reference(self) -> bool:
        """Whether the batch must be scored under the frozen reference model."""
        return self.reference_kl > 0

    @property
    def is_corrected(self) -> bool:
        """Whether the gradient accounts for tokens sampled by other weights than the ones being trained.

        Only a weight on, or a penalty of, the ratio to the behavior policy counts: a mask alone chooses tokens but does
        not reweight them, and a ratio to the proximal policy says nothing about where the tokens came from.
        """
        if self.anchor == "proximal":
            return self.behavior_weight != "none"
        return self.policy_weight != "none" or self.penalty > 0


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
    # DeepSeekMath 2402.03300.
    "grpo": Loss(**_PPO, reference_kl=0.04, aggregate="seq_mean"),
    # Dr. GRPO 2503.20783: no std, constant denominator.
    "dr_grpo": Loss(policy_weight="token", trust="ratio", aggregate="constant"),
    # DAPO 2503.14476: clip-higher, token mean; its group filter and length shaping belong to the data.
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
    # GSPO 2507.18071, anchored on the behavior policy.
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
    # REINFORCE++ 2501.03262: no group, mean and standard deviation of the whole batch.
    "reinforce_pp": Loss(center="batch", scale="batch_std", policy_weight="token", trust="ratio"),
    # The same with the group mean as baseline.
    "reinforce_pp_baseline": Loss(scale="batch_std", policy_weight="token", trust="ratio"),
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
}
"""Field -> the field that turns it on: setting the first while the second is off would do nothing."""


def resolve(name: str, overrides: Mapping[str, Any]) -> Loss:
    """The preset `name` with single fields replaced.

    ValueError if the name or a field is unknown (naming the nearest one), a value has the wrong type or range, the
    result breaks a rule of `Loss`, or an override would have no effect.
    """
    if name not in PRESETS:
        raise ValueError(f'unknown loss "{name}"{_nearest(name, PRESETS)}; there are: {", ".join(sorted(PRESETS))}')
    for key in overrides:
        if key not in Loss.__struct_fields__:
            fields = Loss.__struct_fields__
            raise ValueError(f'unknown loss field "{key}"{_nearest(key, fields)}; there are: {", ".join(fields)}')
    try:
        loss = msgspec.convert({**msgspec.structs.asdict(PRESETS[name]), **overrides}, Loss)
    except msgspec.ValidationError as error:
        raise ValueError(f'loss "{name}" with {dict(overrides)}: {error}') from error
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
