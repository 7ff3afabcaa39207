"""What a server, a chat and a generation on the command line may be told, with their defaults.

Here: no torch, so that mistakes are told at once. Not here: what a request may ask (`rlhf.serving.bodies`).
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["auto", "float32", "bfloat16"]
Policy = Literal["fcfs", "priority", "shortest_first", "longest_first", "fair"]


class EngineSettings(BaseModel):
    """The model and the engine's sizes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """Folder or hub name of a causal language model in Hugging Face's format."""
    dtype: Dtype = "auto"
    """Type of the weights; auto = the model's own, bfloat16 where that is float16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto = a GPU if there is one."""
    tensor_parallel: int = Field(default=1, gt=0)
    """Processes, each with a part of every weight and a device of its own, that run the model together; the answers are
    those of one process, bit by bit."""
    policy: Policy = "fcfs"
    """Who of the waiting is next; no policy changes a result."""
    cache_tokens: int | None = Field(default=None, gt=0)
    """Size of the key/value cache in tokens; default: what max_sequences of the model's context take, within half of the
    memory that is free."""
    max_sequences: int = Field(default=64, gt=0)
    """Sequences decoded at the same time."""
    max_batch_tokens: int = Field(default=2048, gt=0)
    """Tokens in one forward pass; a long prompt is cut into pieces of as many, between which others go on."""
    page_tokens: Literal[16, 32, 64, 128, 256] = 16
    """Tokens in one page of the cache."""
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Numbers of the cache; auto = the model's."""
    weights: Literal["auto", "int8", "int4"] = "auto"
    """Weights of the layers that the engine runs from; auto = the model's."""
    offload_layers: int = Field(default=0, ge=0)
    """Layers whose weights stay in host memory and are copied to the GPU just before they run; for a model that does not fit."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """Folders of LoRA adapters by the names under which clients call them; requests of several run in one batch."""
    draft_tokens: int = Field(default=8, ge=0)
    """Most tokens of an answer that are guessed, from the prompt and from what was written, and checked in one pass; no
    guess changes an answer. 0 = none."""

    @model_validator(mode="after")
    def _offloads_whole_weights(self) -> EngineSettings:
        if self.offload_layers and self.weights != "auto":
            raise ValueError(
                f"--offload-layers {self.offload_layers} with --weights {self.weights}: rounded copies are made on the device and "
                "stay there; leave one of them out"
            )
        return self


class ServeSettings(BaseModel):
    """The server around it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    """Address to listen on; others than loopback need a key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 = one that is free."""
    api_key: str | None = Field(default=None, repr=False)
    """What clients must send as a bearer token."""
    name: str
    """What clients call the model."""
    max_waiting: int = Field(default=1024, ge=0)
    """Samples that may wait beside those that run; more are answered 503."""
    grace_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """Seconds that requests in work have to finish after SIGTERM."""


class NotStarted(ValueError):
    """The server must not or cannot start like this."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`. Raises NotStarted for a name that is unknown."""
    try:
        found = {item[4][0] for item in socket.getaddrinfo(host, None)} if host else {"0.0.0.0"}
    except (OSError, UnicodeError) as error:
        raise NotStarted(f"--host {host!r} is no address of this machine: {error}") from None
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def listen(settings: ServeSettings) -> socket.socket:
    """A socket bound to the address, which does not listen yet. Raises NotStarted for an address beyond loopback
    without a key, and for one that is taken."""
    if settings.api_key is not None and not (settings.api_key.isascii() and settings.api_key.strip()):
        raise NotStarted("the API key is empty or not ASCII; set RLHF_API_KEY to a long random text")
    if settings.api_key is None and not is_loopback(settings.host):
        raise NotStarted(
            f"--host {settings.host} can be reached from other machines, and there is no key; set RLHF_API_KEY (or give "
            "--api-key), or listen on 127.0.0.1"
        )
    family, kind, _, _, address = socket.getaddrinfo(
        settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise NotStarted(
            f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}; choose another --port (0 = a free one)"
        ) from None
    return bound
