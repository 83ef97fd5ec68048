"""One policy loss as data: the fields of `Loss` and the rules between them. The arithmetic is in `loss.py`.

Every method here is one score-function loss with a detached coefficient,

    L = - sum_t n * stop_gradient[M * c * A + kappa] * logprob

so a method is a choice of advantage A (`center`, `scale`), anchor and weight c (`anchor`, `behavior_*`, `policy_*`),
token mask (`trust*`) and sequence mask (`guard*`) that make up M, regulariser kappa (`penalty*`, `reference_*`) and
normaliser n (`aggregate`).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

import msgspec

from asyncrl.utils.quote import quote

Center: TypeAlias = Literal["mean", "loo", "batch", "critic", "none"]
Estimator: TypeAlias = Literal["k1", "k2", "k3"]
Scale: TypeAlias = Literal["none", "group_std", "batch_std", "token_std"]
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
    with the lag d of a token to ((1 - low)^max(d, 1), (1 + high)^max(d, 1)). The learner makes one optimizer step a
    batch, so its "proximal" x_r is 0: what acts on x_r then does nothing, and `rules` refuses a run that asks for it.

    A weight "none" is 1; otherwise it is the ratio of the token, the geometric mean of the ratios of the sequence, or
    their product. Outside floor and cap it is clamped and keeps its gradient, or the token is dropped; a cap of 0
    means no cap.
    """

    function: str = ""
    """`package.module:function`, your own loss in place of weight, masks and penalties: from the `Columns` of a
    micro-batch to the scalar to minimise, already multiplied by `normalizers`. That it corrects for old tokens is up to
    you."""
    advantage: str = ""
    """`package.module:function`, your own advantages in place of `center` and `scale`: from rewards float32[N] and the
    group of each trajectory, int64[N], to float[N]. Groups may then be of one sample."""

    center: Center = "mean"
    """What the reward is compared with: the mean of its group, of the others of the group, of the batch (each
    trajectory once, however long), or what a critic expected token by token (PPO; `[critic]` has its settings)."""
    scale: Scale = "none"
    """What advantages are divided by: the standard deviation of the rewards of their group, or of all trajectories of
    the batch ("batch_std"), or of advantages over all trained tokens of the batch, whose mean is taken off, too
    ("token_std"; a critic's have no other)."""
    std_correction: Literal[0, 1] = 1
    """That deviation of n values divides by n - 1, as in TRL, verl, SkyRL and AReaL; 0 divides by n, as runs of asyncrl
    0.1 did."""
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
    """With trust = "ratio", "drop" and a cap above 1 + `trust_high` are the dual clip (1912.09729): beyond the cap
    tokens of negative advantage have no gradient, and those of positive advantage have none already."""
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
    weight, "tv" change of the token's probability, "kl" binary KL of it, "m2" the largest squared log-ratios of the
    step until their mean is at most `trust_high`: one more forward pass where a step has several micro-batches."""
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
    reference_estimator: Estimator = "k3"
    """With x = current - reference: "k1" x, "k2" x^2 / 2, "k3" exp(-x) - 1 + x. Without `reference_weighted` the
    gradient of "k1" is noise of mean 0 at lag 0, and that of "k2" is the unbiased one."""
    reference_weighted: bool = False
    """Multiply the estimate by the ratio to the behavior policy, and differentiate both (DeepSeek-V3.2)."""
    reward_kl: NonNegative = 0.0
    """Coefficient of an estimate of KL(behavior || reference) that is taken off the rewards, before advantages."""
    reward_kl_estimator: Estimator = "k1"
    """The same formulas, with x = behavior - reference: in a reward "k1" and "k3" are unbiased."""
    reward_kl_level: Literal["token", "sequence"] = "token"
    """"token": each token is charged for itself, and its advantage has what follows; "sequence": the reward of the
    trajectory is charged with the sum. A `scale` divides rewards and charges alike."""
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
            raise ValueError(
                'center = "batch" knows no groups: set scale = "token_std", "batch_std" or "none", got "group_std"'
            )
        if self.center == "none" and self.scale == "group_std":
            raise ValueError(
                'center = "none" with scale = "group_std" divides the rewards of a group without variance by nothing: '
                'set scale = "none", "batch_std" or "token_std"'
            )
        if self.center == "critic" and (self.scale in ("group_std", "batch_std") or self.advantage):
            raise ValueError(
                f'center = "critic" gives each token an advantage of its own: scale is {self.scale!r} and advantage is '
                f'{self.advantage!r}; set scale = "token_std" or "none", and no advantage'
            )
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
        self._check_functions()

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

    def _check_functions(self) -> None:
        for name in ("function", "advantage"):
            value = getattr(self, name)
            if value and not all(value.partition(":")[::2]):
                raise ValueError(f"{name} is an import path, got {quote(value)}; write 'package.module:function'")
        replaced = {
            "function": ("policy_weight", "behavior_weight", "trust", "guard", "penalty", "reference_kl"),
            "advantage": ("scale",),
        }
        for name, fields in replaced.items():
            for field in fields:
                if getattr(self, name) and getattr(self, field) not in ("none", 0):
                    raise ValueError(
                        f"{name} = {getattr(self, name)!r} replaces {field}, which is {getattr(self, field)!r}; "
                        f"set {field} to {0 if isinstance(getattr(self, field), float) else 'none'!r} or remove {name}"
                    )

    @property
    def needs_proximal(self) -> bool:
        """Whether the learner must score the batch once more before the first step on it."""
        return self.anchor == "proximal"

    @property
    def needs_reference(self) -> bool:
        """Whether the batch must be scored under the frozen reference model."""
        return self.reference_kl > 0 or self.reward_kl > 0

    @property
    def needs_critic(self) -> bool:
        """Whether advantages come from a value function."""
        return self.center == "critic"

    @property
    def engine_weight(self) -> str:
        """What weights by a ratio to the probabilities of the engine."""
        return self.behavior_weight if self.anchor == "proximal" else self.policy_weight

    @property
    def is_corrected(self) -> bool:
        """Whether something in the loss accounts for tokens sampled by other weights than the ones being trained.

        Only a weight on, or a penalty of, the ratio to the behavior policy counts: a mask alone chooses tokens but does
        not reweight them, and a ratio to the proximal policy says nothing about where the tokens came from. How well it
        accounts for them is not judged: a penalty counts however small, and a `function` of the user always.
        """
        if self.function:
            return True
        if self.anchor == "proximal":
            return self.behavior_weight != "none"
        return self.policy_weight != "none" or self.penalty > 0

    def removed_from(self, least: float) -> list[str]:
        """The bounds, as `field = value`, by which tokens are removed because their ratio current / behavior, or the
        mean of it over a sequence, is `least` (0 to 1); none if it takes more than that.

        Of truncated sampling: the engine's probabilities are of what it draws from, and the learner's of the whole
        vocabulary, so that the ratio of a fresh token is the share that was left to draw from. Bounds on a change of
        probability ("tv", "kl") are not told, as that of a rare token changes little by any share; nor is "veto", whose
        bound no such share comes near.
        """
        away = -math.log(least) if least else math.inf
        fresh_anchor = self.anchor == "proximal"  # scored by the learner, like the policy itself
        slot = "behavior" if fresh_anchor else "policy"
        lowest = 0.0 if self.engine_weight == "sequence" else least  # a product over tokens has no bound
        drops = self.engine_weight != "none" and getattr(self, f"{slot}_outside") == "drop"
        found = {
            f"{slot}_floor": drops and lowest < getattr(self, f"{slot}_floor"),
            "trust_low": self.trust == "ratio" and not fresh_anchor and lowest < 1.0 - self.trust_low,
            "trust_high": self.trust == "m2" and not fresh_anchor and away**2 > self.trust_high,
            "guard_low": self.guard == "geometric_band" and least < self.guard_low,
            "guard_high": (self.guard == "negative_kl" and away > self.guard_high)
            or (self.guard == "max_kl" and least - 1.0 + away > self.guard_high),
        }
        return [f"{name} = {getattr(self, name)}" for name, removes in found.items() if removes]
