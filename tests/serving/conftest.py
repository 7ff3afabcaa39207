"""A small model with a byte-level tokenizer and a chat template on the disk, and a server of it in a thread."""

import asyncio
import threading

import openai
import peft
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.serving.model import load_served
from rlhf.serving.server import serve
from rlhf.serving.settings import EngineSettings, ServeSettings, listen

CONTEXT = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# As Qwen's: tools in the system's turn, calls and answers of tools in the conversation.
TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' and m.content == 'REFUSE' %}{{ raise_exception('not this') }}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@pytest.fixture(scope="session")
def tokenizer():
    """A token for each byte, so that most characters beyond ASCII take several."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    """The model's; its embedding has rows without a token."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def adapter_folder(folder, tmp_path_factory):
    """A LoRA adapter of the model as peft writes it, which changes its answers."""
    path = tmp_path_factory.mktemp("adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    adapted.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def load(folder):
    """load(**engine settings) -> a model to serve."""

    def make(**settings):
        sizes = dict(dtype="float32", device="cpu", cache_tokens=4096, max_sequences=16)
        return load_served(EngineSettings(model=str(folder), **(sizes | settings)), "tiny")

    return make


class Running:
    """A server in a thread, and clients of it."""

    def __init__(self, served, **settings):
        self.served = served
        self.settings = ServeSettings(**({"port": 0, "name": "tiny", "grace_s": 2} | settings))
        self._socket = listen(self.settings)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._is_up = threading.Event()
        self._thread.start()
        assert self._is_up.wait(20)

    async def _serve(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await serve(self.served, self.settings, self._socket, on_start=self._is_up.set, stop=self._stop)

    def stop(self):
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def client(self, kind=openai.OpenAI, **options):
        key = self.settings.api_key or "none"
        return kind(
            base_url=self.url + "/v1", **({"api_key": key, "max_retries": 0, "timeout": 30} | options)
        )


@pytest.fixture(scope="module")
def start(load):
    """start(engine settings, **server's) -> Running, stopped at the end of the module."""
    running = []

    def make(engine=None, **settings):
        running.append(Running(load(**(engine or {})), **settings))
        return running[-1]

    yield make
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def server(start):
    return start()


@pytest.fixture(scope="module")
def client(server):
    return server.client()
