"""The recipe schema: one pydantic model per component, a line of text under every field, every default here.

Nothing here imports torch: a recipe is validated before anything heavy loads. A component receives only its own
section. Nothing is changed after loading; derived numbers are properties.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

# The keys that disagree, the one to change first, and what is wrong.
Inconsistency = tuple[tuple[str, ...], str]

Role = Literal["actor", "critic", "reference", "reward", "rollout"]
Method = Literal["sft", "grpo"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    """Name of the run and of its directory: letters, digits, '.', '_' and '-'."""
    output_dir: str = "runs"
    """Folder that holds run directories; this run writes to output_dir/name."""
    seed: NonNegative = 0
    """Every random choice of the run is a function of this number."""
    save_every: Positive = 20
    """Optimiser steps between checkpoints; a stage's last step is always saved."""
    keep_last: Positive = 2
    """Checkpoints kept; older ones are deleted only after a newer one is complete."""


class LoraConfig(Section):
    rank: Positive = 16
    """Rank r of the update (arXiv 2106.09685)."""
    alpha: PositiveFloat = 32.0
    """Scale of the update is alpha / rank."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter."""


class BuildModelConfig(Section):
    model_type: str = "qwen3"
    """Architecture name of transformers' AutoConfig, for example qwen3, llama, gpt_neox."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that architecture's config class; the vocabulary size comes from the tokenizer."""


class TrustedCode(Section):
    model: str
    """The repository whose own code may run; must equal model.path."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """The exact commit that was reviewed, 40 hex digits."""


class ModelConfig(Section):
    path: str | None = None
    """Folder or hub name of a causal language model in Hugging Face's format."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    build: BuildModelConfig | None = None
    """Build a model with random weights (seeded by run.seed) instead of loading one."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights in forward and backward; the optimiser keeps float32 masters."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter instead of every weight."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_code: TrustedCode | None = None
    """Allow a model repository's own Python code, for one named model and commit."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.path is not None and self.build is not None:
            raise ValueError("model.path and model.build are both set; keep one")
        if self.trust_code is not None and self.trust_code.model != self.path:
            raise ValueError(
                f"model.trust_code names {self.trust_code.model!r}, but model.path is {self.path!r}"
            )
        return self


class BuildTokenizerConfig(Section):
    kind: Literal["characters", "bpe"] = "characters"
    """One token per character of `alphabet`, or byte-level BPE trained on `train_on`."""
    alphabet: str = "0123456789+-*=() ,.:#?"
    """Characters of a `characters` tokenizer; anything else in the data is an error."""
    vocab_size: Positive = 2048
    """Size of a `bpe` vocabulary, special tokens included."""
    train_on: str | None = None
    """Text or JSON-lines file on which a `bpe` tokenizer is trained."""


class TokenizerConfig(Section):
    path: str | None = None
    """Folder or hub name; default: the model's own."""
    build: BuildTokenizerConfig | None = None
    """Build a tokenizer instead of loading one."""


class DatasetConfig(Section):
    path: str | None = None
    """File (.jsonl, .json, .parquet, .csv), folder of `datasets.save_to_disk`, or hub name."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str | None = None
    """Split of a hub dataset; default: train."""
    task: Literal["chain_arithmetic"] | None = None
    """A built-in task that makes its own rows, instead of `path`."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the built-in task."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of {role, content} messages."""
    prompt_template: str | None = None
    """Text around the prompt, with the row's columns in braces: "Question: {question}\\nAnswer:"."""
    response_column: str | None = None
    """Column with the answer to imitate (sft)."""
    chat_template: bool = False
    """Render the prompt through the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message put before the prompt; needs chat_template."""
    max_prompt_tokens: Positive = 1024
    """Longest prompt in tokens."""
    too_long: Literal["error", "filter", "truncate"] = "filter"
    """What to do with a longer prompt: stop, drop it and count it, or keep its last tokens."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a row whose columns are missing or empty: stop, or drop it and count it."""
    limit: Positive | None = None
    """Use only the first rows."""

    @model_validator(mode="after")
    def _one_source(self) -> DatasetConfig:
        if (self.path is None) == (self.task is None):
            raise ValueError("set exactly one of path and task")
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError("system_prompt needs chat_template: true")
        return self


class RewardConfig(Section):
    function: str
    """A built-in rule (gsm8k, exact_match, format) or "package.module:function" or "file.py:function"."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of this part in the sum."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments passed to the function."""
    timeout_s: PositiveFloat = 60.0
    """Deadline for one call on one step's responses."""


class RolloutConfig(Section):
    group_size: Positive = 8
    """Responses sampled for each prompt (G)."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer's log-probs use the same."""
    top_k: NonNegative = 0
    """Sample among the k likeliest tokens; 0 = all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest tokens that together hold this probability."""
    max_response_tokens: Positive = 512
    """Longest response in tokens."""
    stop: list[str] = Field(default_factory=list)
    """Extra stop tokens, by text; each must be one token of the vocabulary."""
    page_tokens: Literal[16, 32, 64, 128, 256] = 64
    """Tokens in one page of the key/value cache."""
    cache_tokens: Positive | None = None
    """Size of the key/value cache in tokens; default: what one step needs, within the memory that is free."""
    max_batch_tokens: Positive = 8192
    """Tokens in one forward pass of the engine (prefill and decode together)."""
    max_sequences: Positive = 512
    """Sequences decoded at the same time."""
    prefix_cache: bool = True
    """Keep the pages of finished prompts and use them again under the same weights."""


class AlgorithmConfig(Section):
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Group baseline: mean and std (2402.03300), mean only (2503.20783), mean of the others (2402.14740)."""
    objective: Literal["ppo_clip"] = "ppo_clip"
    """Per-token objective; ppo_clip: -min(r A, clip(r) A) (1707.06347)."""
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = "token_mean"
    """Mean over the step's tokens (DAPO), mean of per-response means (GRPO), or sum / constant (Dr.GRPO)."""
    clip_low: NonNegativeFloat = 0.2
    """Ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """Ratio is clipped above at 1 + clip_high."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to the reference in the loss; 0 = no reference model."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """Estimator used as a loss; k1 has zero expected gradient and is refused."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    mask_truncated: bool = False
    """Leave responses that hit max_response_tokens out of the loss (DAPO's overlong filtering)."""


class TrainerConfig(Section):
    steps: Positive | None = None
    """Steps of this stage: rollout + update for RL, updates for SFT. Set this or epochs."""
    epochs: Positive | None = None
    """Passes over the training set, instead of steps."""
    prompts_per_step: Positive = 32
    """Dataset rows per step: prompts for RL, examples for SFT."""
    minibatches_per_step: Positive = 1
    """Optimiser steps on one step's samples."""
    passes_per_step: Positive = 1
    """Times one step's samples are visited (PPO epochs)."""
    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: kept, or taken to min_lr_ratio at the last step."""
    warmup_steps: NonNegative = 0
    """Updates (optimiser steps) over which the learning rate rises from 0."""
    min_lr_ratio: Fraction = 0.0
    """Last learning rate as a share of the peak."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay; not applied to biases and norms."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global 2-norm."""
    micro_batch_tokens: Positive = 8192
    """Tokens in one forward and backward pass of a process; one longer sequence is taken alone."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 nothing is split; 1 optimiser; 2 + gradients; 3 + weights."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in host memory (GPU only)."""
    max_skipped_steps: Positive = 3
    """Stop after this many updates in a row with a non-finite loss or gradient."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainerConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("trainer.steps and trainer.epochs are both set; keep one")
        return self


class EvaluationConfig(Section):
    sets: dict[str, DatasetConfig] = Field(default_factory=dict)
    """Held-out sets by name."""
    every: Positive | None = None
    """Steps between evaluations; before the first and after the last step it always runs."""
    samples: Positive = 1
    """Responses per prompt (k of pass@k)."""
    temperature: NonNegativeFloat = 0.0
    """0 = greedy."""
    max_response_tokens: Positive | None = None
    """Default: rollout.max_response_tokens."""
    correct_above: float = 0.5
    """A response counts as passed if its reward is above this."""


class GroupConfig(Section):
    roles: Annotated[list[Role], Field(min_length=1)]
    """Models that live in this group."""
    gpus: NonNegative = 0
    """GPUs of the group, one process each; 0 = on the CPU."""
    processes: Positive | None = None
    """Processes of a group on the CPU; default 1."""

    @property
    def num_processes(self) -> int:
        return self.gpus or self.processes or 1

    @model_validator(mode="after")
    def _one_process_per_gpu(self) -> GroupConfig:
        if self.gpus and self.processes not in (None, self.gpus):
            raise ValueError(
                f"processes={self.processes} with gpus={self.gpus}: a group has one process per GPU"
            )
        if len(set(self.roles)) != len(self.roles):
            raise ValueError(f"a role is listed twice in {self.roles}")
        return self


class RuntimeConfig(Section):
    backend: Literal["local", "ray"] = "local"
    """local: every group in this process; ray: every group in Ray actors of its own."""
    threads: Positive | None = None
    """CPU threads of each process; default: the machine's cores shared out. Bitwise comparisons need it equal."""
    deterministic: bool = True
    """Row-invariant kernels: the engine's log-probs equal the trainer's bit for bit."""
    launch_timeout_s: PositiveFloat = 300.0
    """Wait for devices and processes."""
    call_timeout_s: PositiveFloat = 3600.0
    """Longest single call to a group."""
    weight_transport: Literal["auto", "object_store", "collective"] = "auto"
    """How weights reach another process; auto: collective between GPUs, else object store."""
    bucket_mb: Positive = 256
    """Size of one packed bucket of weights."""
    ray_address: str | None = None
    """Address of a running Ray cluster; default: start one and stop it at the end."""


class TrackingConfig(Section):
    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases; offline needs no account. Metrics are in metrics.jsonl in any case."""
    wandb_project: str = "rlhf"
    """Project name."""
    samples_per_step: NonNegative = 4
    """Responses written to samples.jsonl each step."""
    console_samples: NonNegative = 3
    """Responses shown in the terminal's table."""
    report_every: Positive = 10
    """Steps between rewrites of report.html."""


_ROLES = {"sft": ("actor",), "grpo": ("actor", "rollout")}


class Recipe(Section):
    method: Method = "grpo"
    """What is trained: sft, grpo."""
    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    data: DatasetConfig
    """Training set."""
    reward: list[RewardConfig] = Field(default_factory=list)
    """Parts of the reward; their weighted sum is the reward."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    placement: dict[str, GroupConfig] = Field(default_factory=dict)
    """Groups of processes and the roles that live in them; default: one group with every role."""
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that this recipe needs."""
        roles = list(_ROLES[self.method])
        if self.evaluation.sets and "rollout" not in roles:
            roles.append("rollout")
        if self.method == "grpo" and self.algorithm.kl_coef > 0:
            roles.append("reference")
        return tuple(roles)

    @property
    def groups(self) -> dict[str, GroupConfig]:
        """The placement with its default filled in; roles that this recipe does not need are left out."""
        if not self.placement:
            return {"all": GroupConfig(roles=list(self.roles))}
        groups = {}
        for name, group in self.placement.items():
            roles = [r for r in group.roles if r in self.roles]
            if roles:
                groups[name] = group.model_copy(update={"roles": roles})
        return groups

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        found = [*self._source_problems(), *self._method_problems(), *self._placement_problems()]
        if found:
            text = "; ".join(f"{keys[0]}: {message}" for keys, message in found)
            raise PydanticCustomError("inconsistent", "{text}", {"text": text, "problems": found})
        return self

    def _source_problems(self) -> Iterator[Inconsistency]:
        if self.model.path is None and self.model.build is None:
            yield ("model.path", "model.build"), "set model.path (a folder or hub name) or model.build"
        if self.model.build is not None and self.tokenizer.path is None and self.tokenizer.build is None:
            keys = ("tokenizer.build", "tokenizer.path", "model.build")
            yield keys, "a built model has no tokenizer of its own; set tokenizer.build or tokenizer.path"
        if self.trainer.steps is None and self.trainer.epochs is None:
            yield ("trainer.steps", "trainer.epochs"), "set trainer.steps or trainer.epochs"

    def _method_problems(self) -> Iterator[Inconsistency]:
        if self.method == "grpo" and not self.reward:
            yield ("reward", "method"), "grpo needs at least one reward function"
        elif self.evaluation.sets and not self.reward:
            yield ("reward", "evaluation.sets"), "evaluation needs at least one reward function"
        if self.method == "grpo" and self.rollout.group_size < 2:
            message = f"group_size={self.rollout.group_size} gives every response zero advantage; use group_size >= 2"
            yield ("rollout.group_size", "method"), message
        if self.method == "sft" and self.data.response_column is None:
            yield ("data.response_column", "method"), "sft needs the column with the answer to imitate"
        rows, updates = self.trainer.prompts_per_step, self.trainer.minibatches_per_step
        if rows % updates:
            message = (
                f"minibatches_per_step={updates} does not divide prompts_per_step={rows}; choose a divisor"
            )
            yield ("trainer.minibatches_per_step", "trainer.prompts_per_step"), message

    def _placement_problems(self) -> Iterator[Inconsistency]:
        home: dict[Role, str] = {}
        for name, group in self.placement.items():
            for role in group.roles:
                if role in home:
                    yield (
                        (f"placement.{name}.roles",),
                        f"role {role} is in group {home[role]!r} too; keep one",
                    )
                home[role] = name
        missing = [role for role in self.roles if role not in home] if self.placement else []
        if missing:
            keys = ("placement", "method", "evaluation", "algorithm.kl_coef")
            yield keys, f"no group holds {', '.join(missing)}; add it to a group's roles"
        if self.runtime.backend == "local":
            if len(self.groups) > 1 and any(group.gpus for group in self.groups.values()):
                message = "one process drives one GPU: put every role into one group, or set runtime.backend: ray"
                yield ("placement", "runtime.backend"), message
            for name, group in self.groups.items():
                if group.num_processes > 1:
                    message = f"{group.num_processes} processes need Ray; set runtime.backend: ray"
                    yield (f"placement.{name}", "runtime.backend"), message
