"""Every knob of a run. Imports nothing heavy, so that mistakes show at once; `rules` has what must hold between knobs.

A run's configuration is the defaults below, then a TOML file, then `section.key=value` words of the command line.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from asyncrl.algo import presets

TINY, TINY_BYTES = "tiny", "tiny-bytes"
BUILT_IN = (TINY, TINY_BYTES)
"""Models that are made in code (`tiny.py`)."""


TOY, TOY_TOKENS = "asyncrl.envs.digits:LargestDigit", 2
"""The environment where none is named, and the tokens of its replies: the digit and the end."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values that cannot change after loading; unknown keys are refused."""


class ModelConfig(_Section, frozen=True, kw_only=True):
    path: str = TINY
    """A Hugging Face id, a local folder, or a Qwen2-architecture model made in code with random weights: "tiny", or
    "tiny-bytes", which reads any text."""
    num_layers: int = 2
    """Layers of "tiny"; 2 layers are 0.40 M parameters."""
    chat_template: str = ""
    """A file with a chat template, or its text, in place of the model's own. Checkpoints have it, too."""
    template_args: dict[str, Any] = {}
    """Further arguments of the chat template in every environment, such as { enable_thinking = false } or `tools`."""
    date: str = ""
    """Today, for chat templates that ask (`strftime_now`), as in "2026-12-01". Default: the day that the run began."""


class EnvConfig(_Section, frozen=True, kw_only=True):
    path: str = TOY
    """`package.module:Class`."""
    args: dict[str, Any] = {}
    """Keyword arguments of the class."""
    timeout_s: float = 300.0
    """Bound on what an attempt takes beside generation (scoring, tools)."""


class WarmupConfig(_Section, frozen=True, kw_only=True):
    num_steps: int = 0
    """Supervised steps on the environment's demonstrations before reinforcement learning; cached on disk."""
    batch_size: int = 128
    micro_batch_size: int = 128
    """Demonstrations that go through the model at once."""
    learning_rate: float = 1e-3


class RolloutConfig(_Section, frozen=True, kw_only=True):
    num_actors: int = 2
    engine: Literal["embedded", "sglang"] = "embedded"
    group_size: int = 8
    """Samples per prompt (G)."""
    max_new_tokens: int = 512
    """Bound on a completion. 2 where `env.path` is the toy that runs when no environment is named."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end a reply, beside the model's end tokens, such as ["</answer>"]. They are part of the reply, as is
    what else their last token holds. With `on_update` "abort" one that a weight update cuts in two is missed."""
    max_running: int = 256
    """Requests that one engine generates at the same time; more wait their turn."""
    on_update: Literal["keep", "recompute", "abort"] = "keep"
    """What new weights do to a request in flight: keep its KV cache, recompute it, or end the request early."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_attempts: int = 3
    """Times that an attempt may fail in its environment, on each rollout actor that its prompt is tried on, and rollout
    actors that a prompt is tried on, before it is given up."""
    max_failed_prompts: int = 4
    """Prompts in a row that may be given up after their attempts, dropped and counted; one more ends the run."""
    max_replacements: int = 16
    """Rollout actors that may be started in place of dead ones, in one run."""
    start_timeout_s: float = 900.0
    """Bound on the start of a rollout actor, and of the learner."""
    num_threads: int | Literal["auto"] = "auto"
    """CPU threads of each rollout actor. "auto" is OMP_NUM_THREADS where that is set, else its share of the cores of
    its machine: they are divided evenly over learner ranks and engines."""
    tensor_parallel_size: int = 1
    """GPUs of each SGLang engine."""
    gpu_memory_utilization: float = 0.8
    """Share of a GPU's memory for an SGLang engine's weights and cache; lower it where the learner shares the GPU."""
    release_memory: bool = False
    """Give the memory of SGLang's weights and cache to the learner while it makes a step on the same GPU."""
    attention_backend: Literal["auto", "flashinfer", "fa3", "triton", "torch_native"] = "auto"
    """SGLang's attention kernels; "auto" chooses by the GPU's compute capability."""
    engine_args: dict[str, Any] = {}
    """Further arguments of SGLang, passed through."""

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary."""
        return self.top_p < 1 or self.top_k > 0


class BufferConfig(_Section, frozen=True, kw_only=True):
    max_staleness: int = 1
    """S: (S + 1) batches of groups may be in the system at once; 0 is synchronous training."""
    window: int | None = None
    """Groups that may compete with the oldest one for a place in the next batch; 1 is strict order. Default: P."""
    reuse: int = 1
    """Times that a group may be trained on."""


class LearnerConfig(_Section, frozen=True, kw_only=True):
    num_gpus: int = 1
    """Ranks that the model is split between (FSDP2): one GPU each, and without GPUs one process each."""
    reshard: Literal["auto", "layer", "step"] = "auto"
    """Of several ranks: when each lets go of the others' parts of the weights. "layer" is after each decoder layer;
    "step" is after the last pass of a step, which gathers weights and sums gradients once and takes up to 8 bytes a
    weight more. "auto" is "step" where that is at most a quarter of the GPU's memory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward and backward pass; "auto" is bfloat16 on GPUs. Weights, logits and optimizer are float32."""
    head_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of what goes into the head's products, which give float32; "auto" is `dtype`. Beside layers in bfloat16, a GPU
    takes "float32" as TF32, with 10 bits behind the point (bfloat16 has 7); with `dtype` float32 it has all 23."""
    groups_per_step: int = 32
    """P: groups in a batch, which is one optimizer step."""
    learning_rate: float = 2e-4
    warmup_steps: int = 5
    """Steps of linear learning-rate warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    row_tokens: int = 64
    """Length of a packed row; raised to the longest trajectory that can occur."""
    micro_batch_tokens: int = 16384
    """Tokens (padding included) that go through the model at once, on each rank."""
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """ "sdpa" takes any device and computes the prompt of a group once in each row; "varlen" needs a GPU and bfloat16
    and no mask of row_tokens x row_tokens. "auto" is varlen where it can be."""
    compile: bool = False
    """Compile each decoder layer and the head with torch.compile, at the first steps."""
    head_chunk: int = 2048
    """Trained tokens whose logits exist at once; of a micro-batch with more, logits are computed twice."""
    activation_checkpointing: bool = False
    """Compute each decoder layer again in the backward pass instead of keeping its activations."""
    num_threads: int | Literal["auto"] = "auto"
    """CPU threads of each learner rank; "auto" as for a rollout actor."""
    max_skipped_steps: int = 3
    """Optimizer steps in a row that may be skipped because their gradient is not finite; one more ends the run."""


class LoraConfig(_Section, frozen=True, kw_only=True):
    """Adapters in place of all weights (LoRA, 2106.09685). Needs the package peft."""

    rank: int = 0
    """Rank of each adapter; 0 trains the whole model. Adapters take a learning rate some ten times as high."""
    alpha: int = 32
    """What an adapter adds is scaled by alpha / rank."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Linear layers of the decoder layers that get an adapter, by the ends of their names: ["q_proj", "v_proj"]. There
    is no dropout: with it the learner's log-probs would not be the engine's."""
    sync: Literal["merged", "adapter"] = "merged"
    """What a weight update sends. "merged" is every weight, for any engine. "adapter" is the adapters alone: much less
    for a slow network, but an SGLang engine then keeps a second copy of the layers that they are added to."""


class AlgorithmConfig(_Section, frozen=True, kw_only=True):
    preset: str = "async_default"
    """A name in `asyncrl/algo/presets.py`, or `package.module:function` of a loss of your own."""
    loss: dict[str, Any] = {}
    """Single fields of the preset's loss to replace."""
    drop_zero_variance: bool = False
    """Replace groups whose rewards are all equal by new prompts, counted (dynamic sampling). `reward/mean` is then of
    the others alone, and `reward/generated` of all."""
    mask_truncated: bool = False
    """Give no gradient to trajectories that ran out of tokens (overlong filtering)."""
    overlong_tail: int = 0
    """Lower the reward over the last so many tokens before rollout.max_new_tokens, in a line down to -1 (soft overlong
    punishment); 0 is off."""
    allow_uncorrected: bool = False
    """Permit off-policy training without an importance correction."""


class CriticConfig(_Section, frozen=True, kw_only=True):
    """The value function of a preset with `center = "critic"`."""

    backbone: Literal["own", "policy"] = "own"
    """A model of its own with a value head, or a value head on the policy's last hidden states, which it leaves as they
    are: cheaper in memory, and it learns less."""
    path: str = ""
    """Model that a backbone of its own starts from; empty is the one that the policy starts from."""
    learning_rate: float = 1e-3
    num_updates: int = 2
    """Optimizer steps of the critic on each batch; the clip of the value loss acts from the second on."""
    warmup_steps: int = 0
    """Steps at the beginning in which the critic learns alone and the policy stays as it is."""
    clip: float = 0.2
    """How far a value may move on one batch, in the units of the reward; 0 is no limit."""
    max_grad_norm: float = 1.0
    gamma: float = 1.0
    """Discount per sampled token."""
    lam: float = 0.95
    """GAE: 0 trusts the critic after one token, 1 uses the rewards alone."""


class CurriculumConfig(_Section, frozen=True, kw_only=True):
    """Draws that are left out by pass rate; `asyncrl/recovery/curriculum.py` says what that does to training."""

    by: Literal["off", "prompt", "source"] = "off"
    """What a pass rate is of: each prompt, for data that come again, or each source (an environment of a mixture, or a
    value of a data set's source column)."""
    visits: int = 2
    """Last groups that the rate is a mean over; with less, nothing is left out. More for sources, such as 64."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """A rate up to the first is too hard, from the second on too easy."""
    skip: float = 0.8
    """Probability that a draw that is too hard or too easy is left out."""


class EvalConfig(_Section, frozen=True, kw_only=True):
    every: int = 20
    """Steps between held-out evaluations; 0 is never. The last step is always evaluated."""
    num_prompts: int = 200
    """Held-out prompts, or all that there are if there are less."""
    num_samples: int = 1
    """Attempts at each prompt (n), for the mean and pass@k."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    pass_reward: float | None = None
    """The reward from which on an attempt passes, for pass@k and for the curriculum. Default: the environment's own
    `pass_reward`; without one there is no pass@k."""
    baseline: bool = True
    """Begin a run by scoring policies without skill on these prompts, which calls the scorer once for each of them. A
    resumed run keeps the numbers."""
    num_actors: int = 0
    """Engines for evaluation alone: they hold the version under evaluation still while the rollout actors go on. With
    none, rollout actors evaluate, and later weights reach their attempts."""
    max_running: int = 64
    """Attempts that evaluation has in flight on each engine, so that training's do not wait behind all of them."""


class WeightsConfig(_Section, frozen=True, kw_only=True):
    bucket_mb: float = 1024.0
    """Of weights that travel together, in MiB. Two buckets exist at a time on each side; on a GPU that they share, the
    learner keeps its two from update to update."""
    timeout_s: float = 120.0
    """Bound on joining a broadcast group, on each broadcast, and on the silence of a rollout actor: one that does not
    answer for longer is ended and replaced as if it had died."""
    backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """ "auto" is NCCL between GPUs, CUDA IPC on one GPU that is shared, and gloo elsewhere."""
    overlap: bool = True
    """Compute the next step's gradient while weights travel, where staleness and a learner of one rank allow it."""


class ClusterConfig(_Section, frozen=True, kw_only=True):
    address: str | None = None
    """An existing Ray cluster to join, "auto" or an address; by default the run starts its own on this machine."""
    learner_resources: dict[str, float] = {}
    """Custom Ray resources that each learner rank takes of its node, to place it."""
    rollout_resources: dict[str, float] = {}
    """The same for each rollout actor."""


class CheckpointConfig(_Section, frozen=True, kw_only=True):
    every: int = 100
    """Steps between checkpoints; 0 is only at the end and on Ctrl-C."""
    keep: int = 2
    """Newest checkpoints that are kept; one that is damaged is skipped on resume."""


class JournalConfig(_Section, frozen=True, kw_only=True):
    sync_s: float = 1.0
    """Seconds of the journal that a power failure may take; a killed process loses nothing of it."""
    keep_groups: bool = False
    """Keep the tokens of every group, not only of those that a resume may need."""


class WatchdogConfig(_Section, frozen=True, kw_only=True):
    timeout_s: float = 1800.0
    """Seconds after which a wait (for a slot, a group, a step, weights, memory, an evaluation, a checkpoint) is
    reported as a stall."""
    action: Literal["warn", "restart", "stop"] = "warn"
    """Beside the report: go on; kill and replace the rollout actor that is waited for; or save and stop."""


class MetricsConfig(_Section, frozen=True, kw_only=True):
    sample_trajectories: int = 4
    """Trajectories of each step that are saved with every column; 0 is none."""
    timeline: bool = True
    """Write what every part of the run did, and when, to the run folder."""
    prometheus_port: int = 0
    prometheus_host: str = "127.0.0.1"
    """Serve the newest metrics at http://HOST:PORT/metrics, for Prometheus; port 0 is off."""
    wandb: str = ""
    """Weights & Biases project to log to as well; empty is off."""


class Config(_Section, frozen=True, kw_only=True):
    seed: int = 0
    num_steps: int = 100
    run_dir: str = "runs"
    """Folder that run folders are made in."""
    runtime: Literal["cluster", "local"] = "cluster"
    """Ray actors, or everything in one process (for debugging)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """ "auto" uses GPUs where Ray finds any."""
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """GPUs of their own for the learner and for each engine, or one GPU that all of them share."""
    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    warmup: WarmupConfig = WarmupConfig()
    rollout: RolloutConfig = RolloutConfig()
    buffer: BufferConfig = BufferConfig()
    learner: LearnerConfig = LearnerConfig()
    lora: LoraConfig = LoraConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig = CriticConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    eval: EvalConfig = EvalConfig()
    weights: WeightsConfig = WeightsConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    journal: JournalConfig = JournalConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    metrics: MetricsConfig = MetricsConfig()

    @property
    def num_engines(self) -> int:
        """Rollout actors, those for evaluation included."""
        return self.rollout.num_actors + self.eval.num_actors

    @property
    def in_flight(self) -> int:
        """Attempts that may be at one engine at once: all that the buffer has room for, and those of evaluation."""
        admitted = (self.buffer.max_staleness + 1) * self.learner.groups_per_step * self.rollout.group_size
        return admitted + min(self.eval.max_running, self.eval.num_prompts * self.eval.num_samples)

    @property
    def overlaps(self) -> bool:
        """Whether a gradient is computed while weights travel. Ranks that share a model would mix up the two."""
        alone = self.learner.num_gpus == 1 and not self.rollout.release_memory
        return self.weights.overlap and alone and self.buffer.max_staleness > 0

    @property
    def loss(self) -> presets.Loss:
        """The preset with its replaced fields."""
        return presets.resolve(self.algorithm.preset, self.algorithm.loss)
