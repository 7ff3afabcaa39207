"""The server, driven by OpenAI's own client."""

import asyncio
import json
import re
import socket
import threading
import time

import httpx
import openai
import pytest

from rlhf.serving.settings import NotStarted, ServeSettings, is_loopback, listen

PROMPT = "Once upon a time"


def test_the_model(client, server):
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'huge' is not here"):
        client.models.retrieve("huge")
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


def test_a_completion_is_the_engines(client, server):
    """Catches: parameters, or seeds, that do not arrive, and usage that counts something else."""
    wishes = dict(
        max_tokens=30, temperature=0.9, top_p=0.95, seed=5, n=3, presence_penalty=0.5, logit_bias={"7": 3}
    )
    done = client.completions.create(
        model="tiny", prompt=PROMPT, **wishes, extra_body={"top_k": 50, "min_p": 0.01, "return_token_ids": True}
    )  # fmt: skip
    from rlhf.rollout import Engine, Request, SamplingParams
    from rlhf.serving.model import sample_seeds

    served = server.served
    ids = tuple(served.tokenizer.encode(PROMPT))
    params = SamplingParams(
        max_tokens=30, temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, presence_penalty=0.5, logit_bias=((7, 3.0),),
        stop_ids=served.stop_ids,
    )  # fmt: skip
    (expected,) = Engine(served.engine.model, served.engine.config).generate(
        [Request("r", ids, params, sample_seeds(5, 3))]
    )
    for choice, c in zip(done.choices, expected, strict=True):
        assert choice.token_ids == list(c.token_ids) and choice.finish_reason == c.finish_reason
        text = [t for t in c.token_ids if t not in served.stop_ids]
        assert choice.text == served.tokenizer.decode(text, skip_special_tokens=True)
    written = sum(len(c.token_ids) for c in expected)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(ids), written)
    again = client.completions.create(model="tiny", prompt=[PROMPT, list(ids)[:3]][:1], **wishes, extra_body={"top_k": 50, "min_p": 0.01})  # fmt: skip
    assert [c.text for c in again.choices] == [c.text for c in done.choices]
    free = [
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30).choices[0].text for _ in "ab"
    ]
    assert free[0] != free[1]


def test_tokens_that_were_in_the_cache(client):
    """Catches: a prompt counted once for each sample, hits of what gave way counted, and none told by a stream."""
    prompt = list(range(40, 110)), list(range(30, 70))
    wishes = dict(model="tiny", max_tokens=4)
    first = client.completions.create(prompt=list(prompt), n=3, **wishes).usage
    assert first.prompt_tokens_details.cached_tokens == 0 and first.prompt_tokens == 110
    later = client.completions.create(prompt=[*prompt, [1, 2, 3]], n=2, **wishes).usage
    assert later.prompt_tokens_details.cached_tokens == 64 + 32
    *_, last = client.completions.create(
        prompt=prompt[0] + [1], stream=True, stream_options={"include_usage": True}, **wishes
    )
    assert last.usage.prompt_tokens_details.cached_tokens == 64
    chat = dict(model="tiny", messages=[{"role": "user", "content": "again and again"}], max_tokens=3)
    counts = [client.chat.completions.create(**chat).usage for _ in "ab"]
    assert [u.prompt_tokens_details.cached_tokens for u in counts] == [
        0,
        (counts[0].prompt_tokens - 1) // 16 * 16,
    ]


def test_several_prompts(client):
    """Catches: answers under the wrong number, and prompts whose answers depend on their place."""
    texts = ["a", "bb", "ccc"]
    wishes = dict(model="tiny", max_tokens=8, seed=1, n=2, echo=True)
    together = client.completions.create(prompt=texts, **wishes)
    assert [c.index for c in together.choices] == list(range(6))
    alone = [c.text for text in texts for c in client.completions.create(prompt=text, **wishes).choices]
    assert [c.text for c in together.choices] == alone
    assert all(text.startswith(texts[i // 2]) for i, text in enumerate(alone))
    streamed = ["" for _ in range(6)]
    for chunk in client.completions.create(prompt=texts, stream=True, **wishes):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone
    ids = client.completions.create(model="tiny", prompt=[[97], [98, 98]], max_tokens=1)
    assert len(ids.choices) == 2 and ids.usage.prompt_tokens == 3


@pytest.mark.parametrize("wishes", [{}, {"stop": ["e", "xy"]}, {"logprobs": 2}], ids=str)
def test_a_stream_says_what_the_whole_says(client, wishes):
    """Catches: pieces lost, doubled, or with half characters; two ends; usage in the wrong place."""
    for seed in range(3):
        wishes = dict(model="tiny", prompt=PROMPT, max_tokens=30, n=2, seed=seed) | wishes
        whole = client.completions.create(**wishes)
        options = {"include_usage": True}
        *chunks, last = list(client.completions.create(stream=True, stream_options=options, **wishes))
        assert last.usage == whole.usage and last.choices == []
        for choice in whole.choices:
            own = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
            assert "".join(c.text for c in own) == choice.text
            assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
            if "logprobs" in wishes:
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    joined = [x for c in own if c.logprobs for x in getattr(c.logprobs, name)]
                    assert joined == getattr(choice.logprobs, name)


def test_stop_texts(client):
    """Catches: a stop that does not end the answer, or is in it."""
    wishes = dict(model="tiny", prompt=PROMPT, max_tokens=60, seed=3)
    text = client.completions.create(**wishes).choices[0].text
    stop = next(text[i : i + 2] for i in range(5, len(text)) if text[i : i + 2].isascii())
    (choice,) = client.completions.create(stop=stop, **wishes).choices
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"
    kept = client.completions.create(stop=[stop], extra_body={"include_stop_str_in_output": True}, **wishes)
    assert kept.choices[0].text == choice.text + stop
    later = client.completions.create(stop=stop, extra_body={"min_tokens": 59}, **wishes)
    assert later.usage.completion_tokens >= 59  # found again only where it is written again


def test_a_text_is_scored(client):
    """Catches: log-probs beside the wrong token of the prompt, offsets that forget it, a token that nobody asked for, and a
    stream that tells the prompt twice or never. As evaluation harnesses ask: echo, log-probs, 0 or 1 tokens."""
    said = client.completions.create(
        model="tiny", prompt="ab", max_tokens=20, seed=1, logprobs=2, extra_body={"return_token_ids": True}
    ).choices[0]
    ids = [*said.prompt_token_ids, *said.token_ids]
    wishes = dict(model="tiny", prompt=ids, echo=True, logprobs=2, seed=5)
    for max_tokens in (0, 1):
        answer = client.completions.create(max_tokens=max_tokens, **wishes)
        (choice,) = answer.choices
        own = choice.logprobs
        columns = (own.tokens, own.token_logprobs, own.top_logprobs, own.text_offset)
        assert [len(column) for column in columns] == [len(ids) + max_tokens] * 4
        assert own.token_logprobs[0] is None and own.top_logprobs[0] is None
        assert own.token_logprobs[2 : len(ids)] == said.logprobs.token_logprobs
        assert own.top_logprobs[2 : len(ids)] == said.logprobs.top_logprobs
        assert own.tokens[2 : len(ids)] == said.logprobs.tokens and own.text_offset[:3] == [0, 1, 2]
        assert answer.usage.completion_tokens == max_tokens and choice.finish_reason == "length"
        pieces = list(client.completions.create(max_tokens=max_tokens, stream=True, **wishes))
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            streamed = [x for c in pieces for x in getattr(c.choices[0].logprobs, name)]
            assert streamed == getattr(own, name)
        assert "".join(c.choices[0].text for c in pieces) == choice.text
    many = client.completions.create(
        model="tiny", prompt=["abc", "de"], echo=True, logprobs=0, max_tokens=0, n=2
    )
    assert [c.text for c in many.choices] == ["abc", "abc", "de", "de"]
    assert [c.logprobs.tokens for c in many.choices] == [["a", "b", "c"]] * 2 + [["d", "e"]] * 2


def test_logprobs(client, server):
    """Catches: log-probs beside the wrong token, and of another distribution."""
    wishes = dict(model="tiny", prompt=PROMPT, max_tokens=20, seed=2, temperature=0.7)
    (choice,) = client.completions.create(logprobs=3, extra_body={"return_token_ids": True}, **wishes).choices
    found, texts = choice.logprobs, server.served.token_texts
    assert found.tokens == [texts.name(t) for t in choice.token_ids]
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs):
        assert 3 <= len(top) <= 4 and top[token] == pytest.approx(logprob, abs=1e-5)
    messages = [{"role": "user", "content": "hi"}]
    (choice,) = client.chat.completions.create(model="tiny", messages=messages, logprobs=True, top_logprobs=2, max_tokens=12, temperature=0, seed=0).choices  # fmt: skip
    for entry in choice.logprobs.content:
        best = entry.top_logprobs[0]
        assert (entry.token, entry.logprob) == (best.token, pytest.approx(best.logprob, abs=1e-5))
        assert bytes(entry.bytes) == bytes(best.bytes) and len(entry.top_logprobs) == 2
    bare = client.completions.create(logprobs=0, **wishes).choices[0].logprobs
    assert bare.top_logprobs is None and bare.token_logprobs == pytest.approx(found.token_logprobs)


def test_a_chat_goes_through_the_template(client, server):
    """Catches: a prompt without the template, with a second BOS, or with the roles lost."""
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]  # fmt: skip
    want = (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = server.served.tokenizer.encode(want)
    done = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=10, seed=4, extra_body={"return_token_ids": True}
    )  # fmt: skip
    assert done.choices[0].prompt_token_ids == ids and done.usage.prompt_tokens == len(ids)
    same = client.completions.create(model="tiny", prompt=ids, max_tokens=10, seed=4)
    assert done.choices[0].message.content == same.choices[0].text
    reply = httpx.post(server.url + "/tokenize", json={"messages": messages}).json()
    assert reply["tokens"] == ids and reply["count"] == len(ids)
    reply = httpx.post(server.url + "/detokenize", json={"tokens": ids}).json()
    assert reply["prompt"] == want


def test_a_chat_streams(server):
    """Catches: a first chunk without the role, text that differs from the whole's, and an asyncio client left hanging."""

    async def main():
        client = server.client(openai.AsyncOpenAI)
        wishes = dict(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=30, n=2)
        wholes = await asyncio.gather(*(client.chat.completions.create(seed=i, **wishes) for i in range(8)))

        async def stream(seed):
            texts, reasons, roles = ["", ""], [], []
            chunks = await client.chat.completions.create(seed=seed, stream=True, **wishes)
            async for chunk in chunks:
                (choice,) = chunk.choices
                texts[choice.index] += choice.delta.content or ""
                roles += [choice.delta.role] if choice.delta.role else []
                reasons += [choice.finish_reason] if choice.finish_reason else []
            assert roles == ["assistant"] * 2 and len(reasons) == 2
            return texts

        streams = await asyncio.gather(*(stream(i) for i in range(8)))
        assert streams == [[c.message.content for c in whole.choices] for whole in wholes]
        await client.close()

    asyncio.run(main())


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Zürich"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop"}},
]
ASK = dict(model="tiny", messages=[{"role": "user", "content": "weather?"}], tools=TOOLS, max_tokens=150)


def test_a_forced_call(client):
    """Catches: a call that is not what the tool's schema says, and a stream of it that cannot be put together."""
    choice = {"type": "function", "function": {"name": "weather"}}
    for seed in range(2):
        wishes = ASK | dict(tool_choice=choice, seed=seed, parallel_tool_calls=False)
        (whole,) = client.chat.completions.create(**wishes).choices
        (call,) = whole.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "weather" and set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Oslo", "Zürich") and 1 <= arguments["days"] <= 9
        assert whole.finish_reason == "tool_calls" and whole.message.content is None and call.id
        chunks = [c.choices[0] for c in client.chat.completions.create(stream=True, **wishes)]
        first, *others = [call for c in chunks for call in c.delta.tool_calls or ()]
        assert first.function.name == "weather" and first.id and first.type == "function"
        assert len(others) > 5 and all((c.index, c.id, c.function.name) == (0, None, None) for c in others)
        assert "".join(c.function.arguments for c in [first, *others]) == call.function.arguments
        assert not any(c.delta.content for c in chunks) and chunks[-1].finish_reason == "tool_calls"
    for seed in range(2):
        wishes = ASK | dict(tool_choice="required", seed=seed, parallel_tool_calls=False)
        (whole,) = client.chat.completions.create(**wishes).choices
        (call,) = whole.message.tool_calls
        assert call.function.name in ("weather", "stop") and whole.message.content is None
        assert whole.finish_reason in ("tool_calls", "length")  # it may not have ended in time


def test_a_streamed_call_as_the_client_puts_it_together(client):
    """Catches: deltas that OpenAI's own accumulator joins to something else, such as a name that comes twice."""
    strict = [{**t, "function": {**t["function"], "strict": True, "parameters": WEATHER}} for t in TOOLS[:1]]
    call = r'<tool_call>\{"name": "weather", "arguments": \{"city": "Oslo", "days": [1-9]\}\}</tool_call>'
    forced = ASK | dict(tools=strict, tool_choice="required", seed=3, parallel_tool_calls=False)
    two = ASK | dict(tools=strict, max_tokens=300, extra_body={"guided_regex": rf"first {call}\n{call}"})
    for count, wishes in ((1, forced), (2, two | dict(seed=3))):
        whole = client.chat.completions.create(**wishes).choices[0].message
        with client.chat.completions.stream(**wishes) as stream:
            events = list(stream)
            (message,) = [choice.message for choice in stream.get_final_completion().choices]
        assert (message.content or None) == whole.content == (None if count == 1 else "first")
        functions = [c.function for c in message.tool_calls]
        assert [f.name for f in functions] == ["weather"] * count
        assert [f.arguments for f in functions] == [c.function.arguments for c in whole.tool_calls]
        told = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
        done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
        assert len(told) > 5 and len(done) == count


def test_calls_that_the_model_chooses(client):
    """Catches: calls left in the text, text before them lost, and tools shown that the client does not want used."""
    regex = r'hm <tool_call>\{"name": "(stop|other)", "arguments": \{\}\}</tool_call>'
    for seed in range(4):
        wishes = ASK | dict(seed=seed, extra_body={"guided_regex": regex})
        (choice,) = client.chat.completions.create(**wishes).choices
        if choice.message.tool_calls:
            assert choice.message.content == "hm" and choice.finish_reason == "tool_calls"
            assert choice.message.tool_calls[0].function.name == "stop"
        else:
            assert '"other"' in choice.message.content and choice.finish_reason == "stop"
    shown, hidden = (
        client.chat.completions.create(**ASK | dict(max_tokens=1, tool_choice=c)).usage.prompt_tokens
        for c in ("auto", "none")
    )
    assert shown > hidden + 100
    (choice,) = client.chat.completions.create(**ASK | dict(tool_choice="none", extra_body={"guided_regex": regex})).choices  # fmt: skip
    assert choice.message.tool_calls is None and "<tool_call>" in choice.message.content


def test_structured_output(client):
    """Catches: answers that the schema does not describe."""
    messages = [{"role": "user", "content": "weather?"}]
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER, "strict": True}}
    done = client.chat.completions.create(
        model="tiny", messages=messages, n=4, max_tokens=150, response_format=form
    )
    values = [json.loads(c.message.content) for c in done.choices if c.finish_reason == "stop"]
    assert values and all(v["city"] in ("Oslo", "Zürich") and v["days"] in range(1, 10) for v in values)
    form = {"type": "json_object"}
    done = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=60, response_format=form, n=4
    )
    assert all(c.message.content.lstrip().startswith("{") for c in done.choices)
    for extra in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
        done = client.completions.create(model="tiny", prompt="?", max_tokens=9, extra_body=extra, n=4)
        assert {c.text for c in done.choices} <= {"yes", "no"}
    done = client.completions.create(model="tiny", prompt="?", extra_body={"guided_grammar": 'start: "a" "b"+ "c"'}, max_tokens=40, n=3)  # fmt: skip
    assert all(re.fullmatch("ab+c?", c.text) for c in done.choices)


@pytest.mark.parametrize(
    ("wishes", "message", "param"),
    [
        (dict(temperature=-1), "temperature=-1.0", "temperature"),
        (dict(temperature=1e-20), "use 0 for greedy", "temperature"),
        (dict(top_p=0), "top_p=0.0 is outside", "top_p"),
        (dict(top_p="x"), "valid number", "top_p"),
        (dict(max_tokens=0), "max_tokens=0 without echo asks for nothing", None),
        (dict(max_tokens=-1), "greater than or equal to 0", "max_tokens"),
        (dict(max_tokens=1100), "room for 1024 tokens; the prompt has 2 and 1100", "max_tokens"),
        (dict(prompt="x" * 1100), "room for 1024 tokens; the prompt has 1100", None),
        (dict(prompt="x" * 60_000), "60000 characters", None),
        (dict(prompt=""), "no tokens", "prompt"),
        (dict(prompt=[]), "prompt is empty", "prompt"),
        (dict(prompt=[1, 999]), "999 is no token", "prompt"),
        (dict(n=0), "greater than or equal to 1", "n"),
        (dict(n=129), "less than or equal to 128", "n"),
        (dict(best_of=3), "best_of=3 other than n=1", None),
        (dict(logprobs=100), "64 at most", "top_logprobs"),
        (dict(stop=["a", ""]), "empty text", None),
        (dict(logit_bias={"5": 101}), "less than or equal to 100", "logit_bias"),
        (dict(logit_bias={"999": 1}), "999 is no token", "logit_bias"),
        (dict(presence_penalty=3), "presence_penalty=3.0 is outside", "presence_penalty"),
        (dict(suffix="x"), "unknown parameter: suffix", "suffix"),
        (dict(extra_body={"top_k": -2}), "greater than or equal to -1", "top_k"),
        (dict(extra_body={"min_p": 2}), "min_p=2.0 is outside", "min_p"),
        (dict(extra_body={"min_tokens": 99}), "min_tokens=99 is outside", "min_tokens"),
        (dict(extra_body={"repetition_penalty": 0}), "repetition_penalty=0.0", "repetition_penalty"),
        (dict(extra_body={"stop_token_ids": [999]}), "999 is no token", "stop_token_ids"),
        (dict(extra_body={"allowed_token_ids": []}), "at least 1 item", "allowed_token_ids"),
        (dict(extra_body={"guided_regex": "("}), "regex cannot be read", None),
        (dict(extra_body={"guided_regex": "a", "guided_choice": ["b"]}), "2 grammars", None),
        (dict(extra_body={"guided_json": {"type": "integer", "minimum": 3, "maximum": 1}}), "json_schema", None),
        (dict(extra_body={"guided_json": {"type": "nonsense"}}), "json_schema cannot be read", None),
        (dict(extra_body={"guided_regex": "a+", "min_tokens": 1}), "neither allowed_token_ids nor min_tokens", None),
        (dict(extra_body={"nonsense": 1}), "unknown parameter: nonsense", "nonsense"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(client, server, wishes, message, param):
    """Catches: a value that is quietly another one, an error that says nothing, and one that reaches the engine."""
    with pytest.raises(openai.BadRequestError, match=re.escape(message)) as caught:
        client.completions.create(**dict(model="tiny", prompt="hi", max_tokens=4) | wishes)
    assert caught.value.body["type"] == "invalid_request_error" and caught.value.param == param
    assert "request '" not in str(caught.value)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (dict(messages=[]), "at least 1 item"),
        (dict(messages=[{"role": "king", "content": "x"}]), "messages.0.role"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "'image_url' is not supported: this model takes text only"),
        (dict(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]), "text only"),
        (dict(messages=[{"role": "user", "content": "REFUSE"}]), "template refuses the messages: not this"),
        (dict(messages=[{"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]), "are no JSON"),
        (dict(modalities=["audio"]), "modalities"),
        (dict(functions=[]), "unknown parameter: functions"),
        (dict(top_logprobs=2), "needs logprobs=true"),
        (dict(tool_choice="required"), "there are no tools"),
        (dict(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "x"}}), "none of the tools"),
        (dict(tools=TOOLS + TOOLS), "two tools have the same name"),
        (dict(tools=TOOLS, response_format={"type": "json_object"}), "would keep the model from calling"),
        (dict(response_format={"type": "json_schema"}), "needs json_schema"),
        (dict(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools.0.function.name"),
        (dict(tools=[{"type": "function", "function": {"name": "a", "parameters": {"type": "nonsense"}}}], tool_choice="required"), "cannot be read"),
        (dict(extra_body={"chat_template_kwargs": {"chat_template": "x"}}), "chat_template cannot be set"),
        (dict(messages=[{"role": "user", "content": "x" * 1100}]), "room for 1024 tokens"),
    ],
    ids=lambda x: str(x)[:60],
)  # fmt: skip
def test_what_a_chat_refuses(client, wishes, message):
    with pytest.raises(openai.BadRequestError, match=re.escape(message)):
        client.chat.completions.create(
            **dict(model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=4) | wishes
        )


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"", 400), (b"[]", 400), (b'{"prompt": "\\ud800"}', 400), (b"\xff", 400), (b"[" * 100_000, 400), (b" " * ((32 << 20) + 1), 413)],
    ids=lambda x: str(x)[:20],
)  # fmt: skip
def test_bodies_that_are_none(server, body, status):
    """Catches: a traceback, or a connection that breaks, for what any program may send."""
    reply = httpx.post(
        server.url + "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert reply.status_code == status and reply.json()["error"]["message"]


def test_other_requests(server):
    url = server.url
    assert httpx.post(url + "/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415  # fmt: skip
    assert httpx.get(url + "/v1/completions").status_code == 405
    missing = httpx.get(url + "/v1/nothing")
    assert missing.status_code == 404 and "error" in missing.json()
    assert httpx.get(url + "/v1/models", headers={"Host": "evil.example"}).status_code == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert httpx.get(url + "/v1/models", headers={"Host": host}).status_code == 200


def test_what_is_harmless_is_taken(client):
    client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=2, user="u", store=False, metadata={"a": "b"},
        service_tier="auto", extra_body={"audio": None, "prediction": None},
    )  # fmt: skip


def wait_for(what, timeout=10):
    ends = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)


def metric(server, name):
    text = httpx.get(server.url + "/metrics").text
    return float(re.search(rf"^rlhf_{re.escape(name)} (\S+)$", text, re.M).group(1))


def test_a_client_that_goes_away(server):
    """Catches: samples that nobody reads any more, and go on."""
    wishes = dict(model="tiny", prompt="x", max_tokens=500, extra_body={"ignore_eos": True})
    for kind in ("stream", "whole"):
        before = metric(server, 'requests_total{outcome="aborted"}') if kind == "whole" else 0
        client = server.client()
        if kind == "stream":
            chunks = client.completions.create(stream=True, n=8, **wishes)
            next(iter(chunks))
            chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(n=8, **wishes, timeout=0.05)
        wait_for(lambda: metric(server, "requests_running") == 0 == metric(server, "requests_waiting"))
        assert metric(server, 'requests_total{outcome="aborted"}') == before + 1
        assert metric(server, "cache_used_ratio") == 0


def test_metrics(server, client):
    """Catches: numbers that stand still, and text that Prometheus does not read."""
    before = {n: metric(server, n) for n in ("prompt_tokens_total", "generated_tokens_total", "time_to_first_token_seconds_count", "inter_token_seconds_count")}  # fmt: skip
    done = client.completions.create(model="tiny", prompt="abc", max_tokens=9, n=2, extra_body={"ignore_eos": True})  # fmt: skip
    assert done.usage.completion_tokens == 18
    grown = [metric(server, n) - v for n, v in before.items()]
    assert grown[:3] == [3, 18, 1] and 0 < grown[3] <= 16
    text = httpx.get(server.url + "/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in text.text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) rlhf_\w+ .+|rlhf_\w+(\{\w+="[^"]+"\})? [0-9.e+-]+', line), line
    assert metric(server, 'request_seconds_bucket{le="+Inf"}') == metric(server, "request_seconds_count")


def test_the_key(start):
    """Catches: a route that answers without the key."""
    server = start(api_key="s3cret")
    assert httpx.get(server.url + "/health").status_code == 200
    for key in ("", "S3CRET", "s3cret2", "é"):
        with pytest.raises((openai.AuthenticationError, openai.OpenAIError, UnicodeEncodeError)):
            server.client(api_key=key).models.list()
    for path in ("/v1/models", "/metrics", "/nothing", "/v1/chat/completions", "/tokenize"):
        assert httpx.get(server.url + path).status_code == 401
        reply = httpx.get(server.url + path, headers={"Authorization": "Basic s3cret"})
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    assert [m.id for m in server.client().models.list()] == ["tiny"]


def test_where_it_may_listen():
    """Catches: a server that anybody in the network can use."""
    for host in ("0.0.0.0", "::", "", "192.0.2.1"):
        with pytest.raises(NotStarted, match="there is no key"):
            listen(ServeSettings(host=host, port=0, name="x"))
    with pytest.raises(NotStarted, match="no address"):
        listen(ServeSettings(host="no such host", port=0, name="x"))
    with pytest.raises(NotStarted, match="empty"):
        listen(ServeSettings(port=0, name="x", api_key=" "))
    assert is_loopback("127.0.0.9") and is_loopback("localhost") and "k3y" not in repr(ServeSettings(name="x", api_key="k3y"))  # fmt: skip
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(NotStarted, match="cannot be listened on"):
            listen(ServeSettings(port=taken.getsockname()[1], name="x"))
    listen(ServeSettings(host="0.0.0.0", port=0, name="x", api_key="k")).close()


def test_too_many(start):
    """Catches: a server that takes more than it can hold, or does not say when to come again."""
    server = start(dict(max_sequences=2), max_waiting=2)
    wishes = dict(model="tiny", prompt="x", max_tokens=200, extra_body={"ignore_eos": True}, stream=True)
    streams = [server.client().completions.create(**wishes) for _ in range(4)]
    with pytest.raises(openai.InternalServerError, match="4 samples run or wait") as caught:
        server.client().completions.create(**wishes)
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.BadRequestError, match="this server takes 4 at once"):
        server.client().completions.create(**wishes | dict(stream=False), n=5)
    for stream in streams:
        assert sum(len(c.choices) for c in stream) > 0


def test_the_engine_goes_on_after_a_failure(start, monkeypatch):
    """Catches: an error in the middle of a stream that looks like its end, and a server that is gone after it."""
    server = start()
    inner, client = server.served.engine, server.client()
    step, broken = inner._step, []

    def failing():
        if broken:
            raise RuntimeError(broken.pop())
        return step()

    monkeypatch.setattr(inner, "_step", failing)
    wishes = dict(model="tiny", prompt="x", max_tokens=200, extra_body={"ignore_eos": True})
    chunks = iter(client.completions.create(stream=True, **wishes))
    next(chunks)
    broken.append("no memory")
    with pytest.raises(openai.APIError, match="RuntimeError: no memory"):
        list(chunks)
    broken.append("again")
    with pytest.raises(openai.InternalServerError, match="again"):
        client.completions.create(**wishes)
    assert client.completions.create(**wishes).usage.completion_tokens == 200


def test_the_end_of_the_server(start):
    """Catches: answers cut that had time to finish, and clients that wait for ever for those that had not."""
    for grace, whole in ((20, True), (0.01, False)):
        server, found = start(grace_s=grace), []
        wishes = dict(
            model="tiny", prompt="x", max_tokens=200, n=4, extra_body={"ignore_eos": True}, stream=True
        )
        chunks = iter(server.client().completions.create(**wishes))
        next(chunks)

        def read(chunks=chunks, found=found):
            try:
                found.append(len(list(chunks)))
            except openai.APIError as error:
                found.append(error)

        reading = threading.Thread(target=read)
        reading.start()
        server.stop()
        reading.join(10)
        assert isinstance(found[0], int) == whole
        assert whole or "shutting down" in str(found[0])


def test_adapters_are_models_of_their_own(start, adapter_folder):
    """Catches: an adapter that is not asked for, another's, and one whose name is unknown to /v1/models or in the answer."""
    client = start({"adapters": {"tuned": str(adapter_folder)}}).client()
    assert [m.id for m in client.models.list().data] == ["tiny", "tuned"]
    assert client.models.retrieve("tuned").parent == "tiny"
    wishes = dict(prompt="ab", max_tokens=8, temperature=0)
    answers = {m: client.completions.create(model=m, **wishes) for m in ("tiny", "tuned")}
    assert all(answer.model == name for name, answer in answers.items())
    assert answers["tiny"].choices[0].text != answers["tuned"].choices[0].text
    chats = [
        client.chat.completions.create(
            model=m, messages=[{"role": "user", "content": "ab"}], max_tokens=8, temperature=0
        )
        for m in ("tiny", "tuned")
    ]
    assert chats[1].model == "tuned" and chats[0].choices[0].message != chats[1].choices[0].message
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny', 'tuned'"):
        client.completions.create(model="other", **wishes)
