"""Prepared models against stock transformers: packs, padded batches, generate, gradients, checkpointing."""

import pytest
import torch

from rlhf.models.attention import PagedContext, kv_shapes, packed_attention, paged_attention
from tests.models.conftest import ARCHITECTURES

LENGTHS = [25, 1, 40, 7]


def packed_logits(model, pack, keep=0):
    with packed_attention(pack):
        return model(
            input_ids=pack.token_ids[None],
            position_ids=pack.position_ids[None],
            logits_to_keep=keep,
            use_cache=False,
        ).logits[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pack_equals_stock_model(name, stock, prepared, pack):
    """Would catch: tokens that see another sequence, a window or softcap lost on the way, a scale of its
    own.
    """
    sequences, model, reference = pack(LENGTHS), prepared(name, trainable=True), stock(name)
    logits = packed_logits(model, sequences)
    alone = [reference(ids[None]).logits[0] for ids in sequences.split(sequences.token_ids)]
    for got, want in zip(sequences.split(logits), alone):
        assert torch.allclose(got, want, atol=1e-5)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    sum((a * w).sum() for a, w in zip(alone, sequences.split(weights))).backward()
    wanted = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        want = wanted[key].grad
        assert (parameter.grad - want).abs().max() <= 2e-5 * max(1.0, want.abs().max()), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pages_give_the_bits_of_the_pack(name, prepared, pack):
    """Would catch: an engine whose logits are not the trainer's: prefill of a part, then one token at a
    time.
    """
    sequences, model = pack(LENGTHS), prepared(name)
    page, width = 16, 3
    shapes = kv_shapes(model)
    k = [torch.zeros(width * len(LENGTHS), h, page, d) for h, d, _ in shapes]
    v = [torch.zeros(width * len(LENGTHS), h, page, d) for h, _, d in shapes]
    table = torch.randperm(width * len(LENGTHS)).view(len(LENGTHS), width)
    ids = sequences.split(sequences.token_ids)
    got = [[] for _ in LENGTHS]
    with torch.no_grad():
        expected = sequences.split(packed_logits(model, sequences))
        at = [0] * len(LENGTHS)
        for take in (3, 1, 11, 1, 1, 30):
            rows = [r for r, n in enumerate(LENGTHS) if at[r] < n]
            spans = [range(at[r], min(at[r] + take, LENGTHS[r])) for r in rows]
            context = PagedContext(
                k_pages=k,
                v_pages=v,
                slots=torch.tensor(
                    [int(table[r, p // page]) * page + p % page for r, s in zip(rows, spans) for p in s]
                ),
                page_table=table[rows],
                context_lens=torch.tensor([s.stop for s in spans]),
                query_starts=torch.tensor([0, *(len(s) for s in spans)]).cumsum(0),
            )
            with paged_attention(context):
                tokens = torch.cat([ids[r][s.start : s.stop] for r, s in zip(rows, spans)])
                positions = torch.tensor([p for s in spans for p in s])
                logits = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False).logits[
                    0
                ]
            for r, s, part in zip(rows, spans, logits.split([len(s) for s in spans])):
                got[r].append(part)
                at[r] = s.stop
    for row, want in enumerate(expected):
        assert torch.equal(torch.cat(got[row]), want), row


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padded_batch_and_generate_without_a_context(name, stock, prepared, tokenizer):
    """Would catch: a prepared model that attends to padding, or that transformers can no longer generate
    from.
    """
    model, reference = prepared(name), stock(name)
    ids = torch.randint(3, 25, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :8] = mask[2, :15] = 0  # left padding
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits
        want = reference(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits
    assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=1e-5)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


def test_only_the_wanted_logits_are_computed(prepared, pack):
    """Would catch: an index of places that is taken for a number of places."""
    sequences, model = pack(LENGTHS), prepared("qwen3")
    keep = torch.tensor([3, 24, 25, 70])
    with torch.no_grad():
        assert torch.equal(packed_logits(model, sequences, keep), packed_logits(model, sequences)[keep])


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_gradient_checkpointing_recomputes_under_its_own_context(name, prepared, pack):
    """Would catch: a recomputation in the backward that no longer knows the pack, or takes another one's."""
    packs = [pack(LENGTHS), pack([40, 33], seed=1)]
    grads = []
    for checkpointing in (False, True):
        model = prepared(name, trainable=True, gradient_checkpointing=checkpointing)
        losses = [
            packed_logits(model, p).square().mean() for p in packs
        ]  # both forwards, then both backwards
        losses[0].backward()
        losses[1].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_batch_of_packs_and_dropout_are_refused(prepared, pack):
    """Would catch: a second row or dropout silently left out."""
    model, sequences = prepared("qwen3", trainable=True), pack([4])
    with packed_attention(sequences), pytest.raises(ValueError, match="batch size 1, not 2"):
        model(input_ids=sequences.token_ids.expand(2, -1), position_ids=sequences.position_ids[None])
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout 0.1"):
        packed_logits(model, sequences)


def test_context_ends_with_its_block(prepared, pack):
    """Would catch: a failed forward that leaves its context to the next one."""
    model, sequences = prepared("qwen3"), pack([4, 5])
    with pytest.raises(RuntimeError, match="stop"), packed_attention(sequences):
        raise RuntimeError("stop")
    with torch.no_grad():
        both = model(input_ids=sequences.token_ids.view(1, 9)).logits
        assert torch.equal(both, model(input_ids=sequences.token_ids.view(1, 9)).logits)
        assert not torch.allclose(both[0, 4:], packed_logits(model, sequences)[4:], atol=1e-3)
