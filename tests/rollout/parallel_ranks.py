"""Two processes that run one model, for the tests of tensor parallelism: rank 0 is the test's own."""

from __future__ import annotations

import datetime
import multiprocessing
import socket
import traceback

import torch
import torch.distributed as dist
import transformers

from rlhf.models.parallel import TensorParallel, load_whole, shard
from rlhf.models.swap import swap_modules
from rlhf.rollout import Engine, EngineConfig

VOCAB = 51  # odd: the processes' parts differ
KINDS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),  # with biases
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 9, "query_pre_attn_scalar": 8}),  # by its own modules
}


def build(kind, dtype=torch.float32, seed=0, **changes):
    config_name, extra = KINDS[kind]
    sizes = dict(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=96, initializer_range=0.3, tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config = getattr(transformers, config_name)(**sizes | extra | changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    model.set_attn_implementation("rlhf")
    swap_modules(model)
    return model.eval()


def make_engine(model, **config):
    config = {"page_tokens": 16, "max_batch_tokens": 512, "max_sequences": 64, "prefix_cache": True} | config
    return Engine(model, EngineConfig(**config))


class Pair:
    """The other process, and the group with it."""

    def __init__(self, timeout_s=30.0):
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1", port, 2, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, port, timeout_s), daemon=True)
        self.process.start()
        theirs.close()
        self.parallel = _join(0, store, timeout_s)
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def both(self, function, *args, **kwargs):
        """function(parallel, *args) in both -> (this one's result, the other's)."""
        self.connection.send((function, args, kwargs))
        own = function(self.parallel, *args, **kwargs)
        other = self.connection.recv()
        if isinstance(other, str) and other.startswith("Traceback"):
            raise AssertionError(other)
        return own, other

    def close(self):
        self.connection.close()
        self.process.join(10)
        self.process.kill()
        torch.set_num_threads(self.threads)


def _join(rank, store, timeout_s):
    options = dist.ProcessGroupGloo._Options()
    options._timeout = datetime.timedelta(seconds=timeout_s)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    group = dist.ProcessGroupGloo(store, rank, 2, options)
    return TensorParallel(group, group)


def _serve(connection, port, timeout_s):
    torch.set_num_threads(1)
    parallel = _join(1, dist.TCPStore("127.0.0.1", port, 2, wait_for_workers=False), timeout_s)
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            connection.send(function(parallel, *args, **kwargs))
        except Exception:
            connection.send(traceback.format_exc())


# -- what both do ----------------------------------------------------------------------------------------------------------


def place(parallel):
    return parallel.rank


def generated(parallel, kind, dtype, calls, config=None, adapters=None):
    """Of every call's requests (the completions, the engine's counts), and whether it is the fused forward's."""
    engine = make_engine(shard(build(kind, dtype), parallel), **config or {})
    for name, folder in (adapters or {}).items():
        engine.add_adapter(name, folder)
    return [(engine.generate(requests), engine.counts) for requests in calls], engine._runner.forward.is_fused


def come_and_go(parallel, kind, first, second):
    """Updates of requests that are added, aborted, and go on under other weights."""
    engine = make_engine(build(kind) if parallel is None else shard(build(kind), parallel))
    engine.add(first)
    updates = [engine.step() for _ in range(5)]
    engine.add(second)
    updates += [engine.step() for _ in range(2)]
    aborted = engine.abort(first[0].id)
    weights = build(kind, seed=1)
    if parallel is None:
        engine.model.load_state_dict(weights.state_dict())
    else:
        load_whole(engine.model, weights.named_parameters())
    engine.set_version(7)
    while engine.has_work:
        updates.append(engine.step())
    return updates, aborted


def sizes(parallel, kind, requests):
    """(bytes that the weights keep, bytes of pages, number of pages)."""
    model = build(kind)
    engine = make_engine(model if parallel is None else shard(model, parallel))
    engine.generate(requests)
    storages = {p.data_ptr(): p.untyped_storage().nbytes() for p in engine.model.parameters()}
    weights = sum(storages.values())
    return weights, sum(x.nbytes for x in engine._pages.k + engine._pages.v), engine.num_pages


def with_less_memory(parallel, kind, requests):
    """Pages that both have, where rank 1 has memory for few."""
    import rlhf.rollout.engine as module

    before = module.free_pages
    module.free_pages = lambda pages: 100 if parallel.rank == 0 else 20
    try:
        engine = make_engine(shard(build(kind), parallel))
        return engine.generate(requests), engine.num_pages
    finally:
        module.free_pages = before


def failing(parallel, kind, of_each):
    """What happens when ranks are given different requests, and after that."""
    parallel = TensorParallel(parallel._group, parallel._numbers)  # to go on with the other
    engine = make_engine(shard(build(kind), parallel))
    found = []
    for run in (lambda: engine.generate(of_each[parallel.rank]), lambda: parallel.least("anything", 1)):
        try:
            run()
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def elsewhere(parallel):
    """What happens when one steps and the other is asked for its memory."""
    parallel = TensorParallel(parallel._group, parallel._numbers)
    try:
        parallel.least("step" if parallel.rank == 0 else "number of pages", 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def stepping(parallel, kind, requests, die_after):
    """Rank 1 is killed in the middle."""
    import os
    import signal

    engine = make_engine(shard(build(kind), parallel))
    engine.add(requests)
    for _ in range(die_after):
        engine.step()
    if parallel.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while engine.has_work:
        engine.step()
