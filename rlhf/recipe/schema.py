"""The recipe schema: one pydantic model per component, a line of text under every field, every default here.

Nothing here imports torch: a recipe is validated before anything heavy loads. A component receives only its own
section. Nothing is changed after loading; derived numbers are properties.
"""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rlhf.recipe import rules

_INHERITED = "(null takes out what a stage or a file inherits)"
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

Role = Literal["actor", "critic", "reference", "reward", "judge", "rollout", "teacher"]
PreferenceLoss = Literal[
    "dpo",
    "robust",
    "ipo",
    "hinge",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "aot",
    "aot_unpaired",
    "discopop",
    "sigmoid_norm",
    "simpo",
    "cpo",
    "orpo",
    "sft",
]
Method = Literal["sft", "rm", "prm", "ppo", "grpo", "dpo", "kto", "online_dpo", "rejection", "distill"]


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
            raise ValueError(f"model.path and model.build are both set; keep one {_INHERITED}")
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
    """File (.jsonl, .json, .parquet, .csv), folder of `datasets.save_to_disk`, hub name, or stage:NAME of an earlier
    rejection stage: what it selected."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str | None = None
    """Split of a hub dataset; default: train."""
    task: Literal["chain_arithmetic", "coverage"] | None = None
    """A built-in task that makes its own rows, instead of `path`."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the built-in task."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of {role, content} messages."""
    prompt_template: str | None = None
    """Text around the prompt, with the row's columns in braces: "Question: {question}\\nAnswer:"."""
    response_column: str | None = None
    """Column with the answer to imitate (sft)."""
    messages_column: str | None = None
    """Column with a whole conversation (sft): loss on the assistant's turns; instead of response_column."""
    chosen_column: str = "chosen"
    """Column with the better answer, or the better whole conversation (rm, dpo)."""
    rejected_column: str = "rejected"
    """Column with the worse answer, or the worse whole conversation (rm, dpo)."""
    margin_column: str | None = None
    """Column that says by how much the better answer is better (rm)."""
    label_column: str = "label"
    """Column that says whether the answer in response_column is desirable (kto)."""
    steps_column: str = "completions"
    """Column with an answer as a list of steps (prm)."""
    step_labels_column: str = "labels"
    """Column with one label for each step: right or wrong (prm)."""
    step_separator: str = "\n"
    """Text put after each step; a step's label stands at the last token of it (prm)."""
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

    @field_validator("task_args", mode="before")
    @classmethod
    def _none_is_no_argument(cls, value: Any) -> Any:
        return {} if value is None else value  # how a stage takes `path` in the place of its recipe's task

    @model_validator(mode="after")
    def _one_source(self) -> DatasetConfig:
        if (self.path is None) == (self.task is None):
            raise ValueError(f"set exactly one of path and task {_INHERITED}")
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError("system_prompt needs chat_template: true")
        return self


class MixedDatasetConfig(DatasetConfig):
    """One more training set."""

    weight: PositiveFloat = 1.0
    """How often each of its rows comes in one pass over all sets: 2 = twice, 0.5 = every other row once."""


class CurriculumConfig(Section):
    """Which rows come next, by how often their responses passed so far (grpo, ppo, online_dpo, rejection)."""

    kind: Literal["window", "variance"] = "window"
    """Keep rows whose pass rate p is within [low, high], or take them with chance 4 p (1 - p)."""
    low: Fraction = 0.1
    """window: lowest pass rate."""
    high: Fraction = 0.9
    """window: highest pass rate."""
    revisit: Fraction = 0.1
    """Chance of any other row, so that one that became easier is found again; a row never tried is always taken."""
    mix: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of a visit's share against the rate remembered; 1 = only the last visit counts."""
    correct_above: float = 0.5
    """A response counts as passed if its reward is above this."""


class RewardConfig(Section):
    function: str
    """A built-in rule (gsm8k, exact_match, format) or "package.module:function" or "file.py:function"."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of this part in the sum."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments passed to the function."""
    timeout_s: PositiveFloat = 60.0
    """Deadline for one call on one step's responses. A call that is late or fails is repeated response by response, within
    as much time again; what still fails is masked and counted."""


class RolloutConfig(Section):
    group_size: Positive = 8
    """Responses sampled for each prompt (G)."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer's log-probs use the same."""
    top_k: NonNegative = 0
    """Sample among the k likeliest tokens; 0 = all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest tokens that together hold this probability."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample among tokens with at least this share of the likeliest one's probability (2407.01082); 0 = all."""
    max_response_tokens: Positive = 512
    """Longest response in tokens."""
    stop: list[str] = Field(default_factory=list)
    """Extra stop tokens, by text; each must be one token of the vocabulary."""
    page_tokens: Literal[16, 32, 64, 128, 256] = 64
    """Tokens in one page of the key/value cache."""
    cache_tokens: Positive | None = None
    """Size of the key/value cache in tokens; default: what one step needs, within the memory that is free."""
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Numbers of the key/value cache: auto = the model's; int8 and fp8 (e4m3), with a scale for each token and key head, hold
    about twice the tokens of bf16, but the sampler's log-probs are then not the trainer's (mismatch/*): set
    algorithm.correction."""
    weights: Literal["auto", "int8", "int4"] = "auto"
    """Weights of the engine's layers: auto = the model's; int8 and int4 are copies of a half or a quarter of bf16's size,
    made anew at each version, for few sequences at a time; head and embeddings stay whole. The sampler's log-probs are
    then not the trainer's (mismatch/*): set algorithm.correction."""
    max_batch_tokens: Positive = 8192
    """Tokens in one forward pass of the engine (prefill and decode together)."""
    max_sequences: Positive = 512
    """Sequences decoded at the same time."""
    prefix_cache: bool = True
    """Keep the pages of finished prompts and use them again under the same weights."""
    order: Literal["fcfs", "shortest_first", "longest_first"] = "fcfs"
    """Whose turn it is where not all fit at once: first come, or by how long responses to the prompt were in earlier epochs.
    No order changes a sample; longest_first ends a step's last response sooner."""
    preemption: Literal["recompute", "swap"] = "recompute"
    """What becomes of the keys of a sample that gives way: made again, or put by in the host's memory."""
    draft_tokens: NonNegative = 0
    """Most tokens of a sample that are guessed and checked in one pass, from the prompt, its group and earlier epochs'
    responses, while few samples are left; no guess changes a sample. 0 = none."""
    cuda_graphs: bool = True
    """On a GPU, record a decoding step's launches once for each number of rows and run them as one; no sample changes. Their
    memory is some hundred MiB."""
    prefill_processes: NonNegative = 0
    """Processes of the rollout's group that run prompts only and hand their keys and values to the others, which run responses
    only, at the same time; no sample changes. 0 = every process does both."""
    tensor_parallel: Positive = 1
    """Processes over which the model of one engine is split, each with a part of every weight: a rollout group of n processes
    has n / tensor_parallel engines. It changes no sample, to the bit. More than 1 wants a group without the actor."""

    @property
    def is_rounded(self) -> bool:
        """Whether the engine rounds what the trainer does not, so that its log-probs are another policy's."""
        return self.kv_dtype != "auto" or self.weights != "auto"


class ReplayConfig(Section):
    groups: Positive = 256
    """Groups kept, of those whose rewards differ; a newer one pushes the oldest out."""
    fraction: Annotated[float, Field(gt=0, le=4, allow_inf_nan=False)] = 0.25
    """Earlier groups added to a step, as a share of its fresh ones."""


class AlgorithmConfig(Section):
    """Policy-gradient methods: grpo and ppo."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax"] = "grpo"
    """Baseline of grpo: group mean and std (2402.03300), mean only (2503.20783), mean of the others (2402.14740),
    none but whitening over the batch (2501.03262), both, or the greedy answer's reward (2310.10505)."""
    objective: Literal["ppo_clip", "gspo", "gspo_token", "cispo", "gmpo", "sapo", "reinforce"] = "ppo_clip"
    """Per-token objective: PPO's clip (1707.06347), sequence ratio (2507.18071), clipped weight (2506.13585),
    geometric mean (2507.20673), soft gate (2511.20347), or no ratio."""
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = "token_mean"
    """Mean over the step's tokens (DAPO), mean of per-response means (GRPO), or sum / constant (Dr.GRPO)."""
    clip_low: NonNegativeFloat | None = None
    """Ratio is clipped below at 1 - clip_low; default: the objective's paper's, 0.2 (gspo, gspo_token: 3e-4; gmpo: 0.4,
    in log space; cispo: 1, which is no bound)."""
    clip_high: NonNegativeFloat | None = None
    """Ratio is clipped above at 1 + clip_high; default: the objective's paper's, 0.2 (gspo, gspo_token: 4e-4; gmpo: 0.4,
    in log space; cispo: 4, as in ScaleRL, 2510.13786)."""
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Upper bound on the ratio where the advantage is negative (1912.09729; also called two-sided clip)."""
    sapo_tau_pos: PositiveFloat = 1.0
    """sapo: temperature of the gate where the advantage is positive."""
    sapo_tau_neg: PositiveFloat = 1.05
    """sapo: temperature of the gate where the advantage is negative."""
    covariance: Literal["none", "clip_cov", "kl_cov"] = "none"
    """Hold back the tokens whose log-prob and advantage vary together most (2505.22617)."""
    cov_frac: Fraction = 2e-4
    """Share of the tokens that `covariance` takes."""
    cov_low: float = 1.0
    """clip_cov: lowest covariance of a token that may be taken."""
    cov_high: float = 5.0
    """clip_cov: highest covariance of a token that may be taken."""
    kl_cov_coef: NonNegativeFloat = 1.0
    """kl_cov: weight of the KL to the old policy on the tokens taken."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to the reference; 0 = no reference model."""
    kl_in_reward: bool | None = None
    """Take the KL off the reward instead of adding it to the loss; default: what the method's paper does (reward for
    ppo, rloo and reinforce_pp)."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_k2"] | None = None
    """Estimator of the KL; k3_k2 has k3's value and k2's gradient. Default: k1 in the reward, where no other has the
    KL's gradient; k3 in the loss (reinforce_pp_baseline: k2), where k1 has none."""
    kl_target: PositiveFloat | None = None
    """Adapt kl_coef so that the KL stays near this (1909.08593), in nats per response."""
    kl_horizon: PositiveFloat = 10000.0
    """Samples over which kl_coef adapts."""
    early_stop_kl: PositiveFloat | None = None
    """Leave out a step's remaining updates once policy/approx_kl is above this."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    correction: Literal["none", "tis", "decoupled", "icepop", "sequence_mask", "sequence_tis"] = "none"
    """Weight for samples from stale or numerically different weights, w = old / sampler: min(w, cap), w (decoupled
    PPO), w inside the bounds else 0, sequences inside the bounds, or min(w of the sequence, cap)."""
    correction_cap: PositiveFloat = 2.0
    """Cap of tis and sequence_tis."""
    correction_low: NonNegativeFloat | None = None
    """Lower bound of icepop (default 0.5) and of sequence_mask (default 0.999: its mean over tokens is near 1)."""
    correction_high: PositiveFloat | None = None
    """Upper bound of icepop (default 5) and of sequence_mask (default 1.001)."""
    replay: ReplayConfig | None = None
    """grpo: learn from groups of earlier steps again; needs a correction, since other weights sampled them."""
    mask_truncated: bool = False
    """Leave responses that hit max_response_tokens out of the loss (DAPO's overlong filtering)."""
    overlong_buffer: NonNegative = 0
    """Tokens before max_response_tokens over which a penalty of up to overlong_penalty grows (DAPO); 0 = none."""
    overlong_penalty: NonNegativeFloat = 1.0
    """Reward taken off a response of max_response_tokens."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and sample more prompts until the step is full (DAPO)."""
    max_sampling_rounds: Positive = 4
    """Rounds of sampling after which a step goes on with what it has."""
    whiten_advantages: bool | None = None
    """Shift and scale advantages to mean 0 and std 1 over the step's tokens; default: yes for ppo and the reinforce_pp
    family, no otherwise."""
    reward_clip: PositiveFloat | None = None
    """Sequence rewards are clipped to +-this before advantages."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token (ppo, reinforce_pp)."""
    lam: Fraction = 0.95
    """GAE's lambda (1506.02438)."""
    critic_lam: Fraction | None = None
    """Another lambda for the critic's returns (VAPO: 1.0); default: lam."""
    length_adaptive_lam: PositiveFloat | None = None
    """alpha of VAPO's lambda = 1 - 1 / (alpha * response length) for the policy, instead of lam."""
    positive_nll_coef: NonNegativeFloat = 0.0
    """Weight of the NLL on right answers (VAPO: 0.1)."""
    correct_above: float = 0.5
    """positive_nll_coef: a response is a right answer if its reward is above this."""
    ptx_coef: NonNegativeFloat = 0.0
    """Weight of the language-modelling loss on `ptx` data (InstructGPT's PPO-ptx)."""


class CriticConfig(Section):
    path: str | None = None
    """Folder or hub name of the critic's starting weights; default: reward_model.path, else the actor's."""
    lr: PositiveFloat = 9e-6
    """Peak learning rate of the critic."""
    value_clip: PositiveFloat | None = 0.2
    """Values move at most this far from those at sampling time; null = no clipping."""
    pretrain_steps: NonNegative = 0
    """First steps in which only the critic learns (value pre-training)."""
    shared: bool = False
    """The actor carries a value head instead of a critic of its own: one pass gives log-probs and values, one update
    learns both. Half the memory and time; values and policy then pull at the same trunk."""
    coef: PositiveFloat = 0.1
    """shared: weight of the value loss beside the policy's (c1 of 1707.06347)."""


class RewardModelConfig(Section):
    path: str
    """Folder or hub name of a sequence-classification model with one label; scores every response."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of its score in the reward."""
    normalize: bool = False
    """Subtract the mean and divide by the std that training stored with the model."""
    steps: Literal["min", "product", "last"] | None = None
    """Of a process reward model (prm): what of its steps' probabilities of being right is the reward; default: min
    (2312.08935). product: 2305.20050."""


class JudgeConfig(Section):
    path: str
    """Folder or hub name of a causal language model, with a tokenizer of its own, that judges every response."""
    template: str
    """What it reads: text with {prompt} and {response}, or with {prompt}, {first} and {second} to compare every two
    responses of a group, in both orders."""
    verdicts: tuple[str, str] | None = None
    """The good and the bad answer, or "the first" and "the second", each one token; default: yes and no, or A and B."""
    chat_template: bool = False
    """Put the text into a user's turn of the judge's chat template."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of its probability in the reward."""

    @property
    def compares(self) -> bool:
        """Whether it is shown two responses at once."""
        return "{second}" in self.template

    @property
    def verdict_texts(self) -> tuple[str, str]:
        return self.verdicts or (("A", "B") if self.compares else ("yes", "no"))

    @field_validator("template")
    @classmethod
    def _known_fields(cls, value: str) -> str:
        try:
            fields = {
                text
                for _, text, spec, conversion in Formatter().parse(value)
                if text is not None and not (spec or conversion)
            }
        except ValueError as error:
            raise ValueError(f"{error}; write {{{{ and }}}} for braces that are meant") from None
        if fields not in ({"prompt", "response"}, {"prompt", "first", "second"}):
            found = ", ".join(sorted(fields)) or "nothing"
            raise ValueError(
                f"it has {found} in braces; use {{prompt}} and {{response}}, or {{prompt}}, {{first}} and {{second}}"
            )
        return value


class ReferenceConfig(Section):
    path: str | None = None
    """Folder or hub name of the reference; default: the actor's starting weights."""
    update_every: Positive | None = None
    """Steps between updates of the reference towards the actor; default: it stays."""
    update_mix: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the actor in an update: reference <- mix * actor + (1 - mix) * reference; 1 replaces it. Below 1 the
    average is one of whole weights (LoRA merged), kept in float32 in host memory."""
    cache_dir: str | None = None
    """Folder (dpo) in which runs share their data's reference log-probs, in files named by a hash of rows, weights and
    tokenizer; default: each run computes its own."""


class PtxConfig(Section):
    data: DatasetConfig
    """Texts to keep modelling while the policy is optimised."""
    rows_per_step: Positive = 32
    """Rows of it in every update."""


class PreferenceConfig(Section):
    """dpo and online_dpo."""

    losses: dict[PreferenceLoss, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=lambda: {"dpo": 1.0}, min_length=1
    )
    """Losses by name and their weights; the weighted sum is the loss."""
    beta: PositiveFloat | None = None
    """Strength of the pull towards the reference; default 0.1 (simpo, where it is a scale of its own: 2)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the preferences that are taken to be wrong (cDPO, robust)."""
    simpo_gamma: NonNegativeFloat = 1.0
    """simpo: target margin; its paper has 0.3 to 1.6, half of beta is usual."""
    orpo_lambda: NonNegativeFloat = 0.1
    """orpo: weight of the odds ratio."""
    discopop_tau: PositiveFloat = 0.05
    """discopop: temperature of the mixture."""
    nll_coef: NonNegativeFloat | None = None
    """Weight of the chosen answer's NLL per token (RPO's alpha); default 0 (cpo: 1, without which it is not CPO)."""
    wpo: bool = False
    """Weigh every pair by how likely the policy finds it (2406.11827)."""
    ld_alpha: Fraction = 1.0
    """Weight of the tokens beyond the shorter answer's length (LD-DPO, 2409.06411); 1 = as the others."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Divergence behind dpo's implicit reward (2309.16240)."""
    f_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """alpha of f_divergence: alpha."""


class KTOConfig(Section):
    loss: Literal["kto", "bco"] = "kto"
    """KTO (2402.01306), or the binary classifier of 2404.04656."""
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of desirable answers."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of undesirable answers."""


class RewardModelingConfig(Section):
    """rm: how a reward model is trained."""

    center_coef: NonNegativeFloat = 0.0
    """Weight of (r_w + r_l)^2, which keeps scores around 0 (2312.09244); 0.01 is usual."""


class OnlineConfig(Section):
    """online_dpo and rejection: what is made of a group of responses."""

    pairs: Literal["best_worst", "gold"] = "best_worst"
    """online_dpo: best against worst response, or the row's answer against a response of the reference, whose group then
    samples (SPIN, 2401.01335; with losses that have no reference, against one of the policy)."""
    min_gap: NonNegativeFloat = 0.0
    """online_dpo: pairs whose rewards differ by no more than this are left out."""
    keep_best: Positive = 1
    """rejection: best responses kept of every group."""
    min_reward: float | None = None
    """rejection: responses below this are left out."""
    train: bool = True
    """rejection: imitate what was selected at once; false = only sample and select, for a later stage's data
    ("stage:NAME")."""


class DistillConfig(Section):
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "sampled_kl"] = "forward_kl"
    """Distance between teacher and student at each token; sampled_kl: the reverse KL on the sampled token alone, as
    the advantage of a policy gradient (on the student's own responses only)."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """jsd: interpolation between forward (0) and reverse (1) KL (2306.13649)."""
    temperature: PositiveFloat = 1.0
    """Temperature of both distributions."""
    nll_coef: NonNegativeFloat = 0.0
    """Weight of the data's own NLL beside the divergence, on the steps that learn from the data."""
    on_policy_frac: Fraction = 0.0
    """Share of the steps that imitate the teacher on the student's own responses (GKD's lambda)."""
    top_k: Positive | Literal["all"] = 64
    """Teacher log-probs kept per token, the rest of its distribution one bucket: a lower bound of the divergence. all: the
    whole of it, from the teacher's logits of one micro-batch at a time; needs the teacher in the actor's group."""


class TeacherConfig(Section):
    path: str
    """Folder or hub name of the model to imitate; it must have the student's vocabulary."""


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
    schedule: Literal[
        "constant", "linear", "cosine", "polynomial", "inverse_sqrt", "wsd", "cosine_restarts"
    ] = "constant"
    """Learning rate after the warm-up: kept, or taken to min_lr_ratio at the last step."""
    warmup_steps: NonNegative = 0
    """Updates (optimiser steps) over which the learning rate rises from 0."""
    min_lr_ratio: Fraction = 0.0
    """Last learning rate as a share of the peak."""
    decay_steps: Positive | None = None
    """wsd: updates over which the rate falls at the end; default: a tenth of all."""
    cycles: Positive = 1
    """cosine_restarts: number of cycles."""
    poly_power: PositiveFloat = 2.0
    """polynomial: its power."""
    optimizer: Literal["adamw", "adam", "sgd", "adagrad", "rmsprop", "adafactor", "muon"] = "adamw"
    """Optimiser of torch.optim."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """sgd, rmsprop and muon (usual there: 0.95): momentum."""
    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Learning rate of a layer is lr * this^(layers above it)."""
    freeze: list[str] = Field(default_factory=list)
    """Parameters that stay as they are: names with *, for example model.embed_tokens.*"""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a moving average of the weights with this decay per update; it is what is evaluated and exported."""
    neftune_alpha: PositiveFloat | None = None
    """Noise on the input embeddings while training (NEFTune, 2310.05914)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of adamw and adam; rmsprop uses the second."""
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
            raise ValueError(f"trainer.steps and trainer.epochs are both set; keep one {_INHERITED}")
        return self


class EvaluationConfig(Section):
    sets: dict[str, DatasetConfig] = Field(default_factory=dict)
    """Held-out sets by name."""
    pairs: dict[str, DatasetConfig] = Field(default_factory=dict)
    """Held-out preference pairs by name (sft, rm, dpo, kto): how often the better answer gets the higher score."""
    held_out: dict[str, DatasetConfig] = Field(default_factory=dict)
    """Held-out rows of the training data's kind by name: loss on answers (sft), order of wanted and unwanted answers
    (kto), verdicts on steps (prm)."""
    every: Positive | None = None
    """Steps between evaluations; before the first and after the last step it always runs."""
    keep_best: str | None = None
    """Metric, for example eval/sums/pass@1: the model at its best value (the lowest of a loss or of
    truncated_frac) is kept in stages/<stage>/model-best."""
    samples: Positive = 1
    """Responses per prompt (n); above 1 they give mean@n, pass@k and, where the reward can read answers, maj@n."""
    ks: Annotated[list[Positive], Field(min_length=1)] | None = None
    """k of pass@k, each at most samples; default: samples itself."""
    temperature: NonNegativeFloat = 0.0
    """0 = greedy; several samples need one above."""
    max_response_tokens: Positive | None = None
    """Default: rollout.max_response_tokens."""
    correct_above: float = 0.5
    """A response counts as passed if its reward is above this."""
    reward: Annotated[list[RewardConfig], Field(min_length=1)] | None = None
    """Reward functions of evaluations alone, such as the true answers where a model gives the reward that is trained on;
    default: the training's own reward, whatever gives it."""

    @field_validator("sets", "pairs", "held_out", mode="before")
    @classmethod
    def _none_is_no_set(cls, value: Any) -> Any:
        """How a recipe leaves out the sets of its base, or one of them."""
        if isinstance(value, dict):
            return {name: data for name, data in value.items() if data is not None}
        return {} if value is None else value


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


class Recipe(Section):
    method: Method = "grpo"
    """What is trained: sft, rm, prm, ppo, grpo, dpo, kto, online_dpo, rejection or distill."""
    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    data: DatasetConfig
    """Training set."""
    mix: dict[str, MixedDatasetConfig] = Field(default_factory=dict)
    """Further training sets by name, visited in one random order with `data`."""
    curriculum: CurriculumConfig | None = None
    """Pass over rows that are too easy or too hard; an epoch then visits its rows without taking all."""
    reward: list[RewardConfig] = Field(default_factory=list)
    """Parts of the reward; their weighted sum is the reward."""
    reward_model: RewardModelConfig | None = None
    """A trained reward model, one more part of the reward."""
    judge: JudgeConfig | None = None
    """A language model whose verdict is one more part of the reward (RLAIF)."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    ptx: PtxConfig | None = None
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig)
    kto: KTOConfig = Field(default_factory=KTOConfig)
    reward_modeling: RewardModelingConfig = Field(default_factory=RewardModelingConfig)
    online: OnlineConfig = Field(default_factory=OnlineConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    teacher: TeacherConfig | None = None
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    placement: dict[str, GroupConfig] = Field(default_factory=dict)
    """Groups of processes and the roles that live in them; default: one group with every role."""
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that this recipe needs."""
        return rules.roles(self)

    @property
    def training_data(self) -> dict[tuple[str, ...], DatasetConfig]:
        """The sets that are learned from, by their keys."""
        return {("data",): self.data} | {("mix", name): data for name, data in self.mix.items()}

    @property
    def training_weights(self) -> dict[tuple[str, ...], float]:
        """How often each row of those sets comes in one pass."""
        return {("data",): 1.0} | {("mix", name): data.weight for name, data in self.mix.items()}

    @property
    def policy_temperature(self) -> float:
        """At which the policy's log-probs are taken: the sampler's where its samples are what is learned from by policy
        gradient, else 1."""
        return self.rollout.temperature if self.method in ("ppo", "grpo", "distill") else 1.0

    @property
    def shares_trunk(self) -> bool:
        """Whether the actor carries the value head."""
        return self.method == "ppo" and self.critic.shared

    @property
    def scored(self) -> bool:
        """Whether anything gives a reward."""
        return bool(self.reward) or self.reward_model is not None or self.judge is not None

    @property
    def eval_reward(self) -> list[RewardConfig]:
        """The reward functions of evaluations."""
        return self.reward if self.evaluation.reward is None else self.evaluation.reward

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
        found = list(rules.problems(self))
        if found:
            text = "; ".join(f"{keys[0]}: {message}" for keys, message in found)
            raise PydanticCustomError("inconsistent", "{text}", {"text": text, "problems": found})
        return self
