"""What clients may send: OpenAI's fields, and more under the names that vLLM gives them.

Here: names, types, and what is refused because it would be ignored silently. Unknown fields are errors; null is the
same as nothing. Not here: ranges that the engine checks (`rlhf.rollout.request`), and what the fields do
(`rlhf.serving.generation`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_SAMPLES = 128
_Id = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A body, or an object in one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(Part):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted: there is none


class JsonSchema(Part):
    name: str = ""
    description: str = ""
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool = True  # always is


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema needs json_schema, and no other type has one")
        return self


class StructuredOutputs(Part):
    """vLLM's."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None
    json_object: bool = False


class Sampling(Part):
    """Shared by completions and chats."""

    model: str | None = None
    n: int = Field(default=1, ge=1, le=MOST_SAMPLES)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    # vLLM's extras
    top_k: int = Field(default=0, ge=-1)  # -1 and 0 = all
    min_p: float = 0.0
    min_tokens: int = Field(default=0, ge=0)
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    stop_token_ids: list[_Id] = Field(default_factory=list)
    allowed_token_ids: list[_Id] | None = Field(default=None, min_length=1)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    priority: int = 0
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(default=None, min_length=1)
    guided_grammar: str | None = None

    # accepted, because nothing in the answer would be other
    user: str = ""  # the tenant of policy "fair"
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @model_validator(mode="after")
    def _streams(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options without stream=true has no meaning; leave it out")
        return self


class CompletionBody(Sampling):
    prompt: str | list[str] | list[_Id] | list[list[_Id]]
    best_of: int | None = Field(default=None, ge=1)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, ge=0)
    add_special_tokens: bool = True
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _can_be_done(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(
                f"best_of={self.best_of} other than n={self.n} is not supported; ask for n and choose"
            )
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 without echo asks for nothing; ask for 1 or more, or for echo")
        return self  # fmt: skip


class TextPart(Part):
    type: Literal["text"]
    text: str


class FunctionCall(Part):
    name: str
    arguments: str = "{}"


class ToolCall(Part):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Part):
    """One of the conversation. Content of other kinds than text is refused."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] = ""
    name: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None  # a client hands back the message that it got

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(TextPart.model_validate(part).text for part in self.content)

    @model_validator(mode="after")
    def _is_text(self) -> Message:
        if isinstance(self.content, list):
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ValueError(
                        f"content of type {part.get('type')!r} is not supported: this model takes text only"
                    )
        return self  # fmt: skip


class Function(Part):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # a forced call always is


class Tool(Part):
    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0)
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def forced_tools(self) -> list[Function]:
        """Of which one must be called."""
        functions = [tool.function for tool in self.tools]
        if isinstance(self.tool_choice, NamedTool):
            return [f for f in functions if f.name == self.tool_choice.function.name]
        return functions if self.tool_choice == "required" else []

    @property
    def shown_tools(self) -> list[Tool]:
        """Which the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice names a tool and there are no tools")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools {names}"
            )
        if self.shown_tools and self.response_format is not None and self.response_format.type != "text":
            raise ValueError(
                "response_format beside tools would keep the model from calling one; leave one of them out, or set tool_choice to none"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt=false")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a last message of the assistant")
        return self  # fmt: skip


class TokenizeBody(Part):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Part):
    model: str | None = None
    tokens: list[_Id]
