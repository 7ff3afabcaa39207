"""Weights: buckets, checksum, source and sink, and publishing between groups of this process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import faults
from rlhf.models.parallel import Rows
from rlhf.recipe.schema import RuntimeConfig
from rlhf.runtime.groups import GroupSpec, launch
from rlhf.trainers.weights import (
    TensorSpec,
    WeightSink,
    WeightSource,
    WeightSyncError,
    bytes_of,
    plan_buckets,
    publish,
    tensor_checksum,
)

LOCAL = RuntimeConfig(backend="local", bucket_mb=1)


class Net(torch.nn.Module):
    """Mixed types, a tied weight, a scalar, odd sizes, one tensor much larger than a bucket of 100 bytes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)

        def weight(*shape, dtype=torch.float32):
            return torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype))

        self.embed = torch.nn.Embedding(7, 5)
        self.embed.weight = weight(7, 5)
        self.head = torch.nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.lower = weight(3, 3, dtype=torch.bfloat16)
        self.scale = weight()
        self.big = weight(101)
        self.nothing = torch.nn.Parameter(torch.empty(0))


def move(
    source: WeightSource, sink: WeightSink, *, version=1, bucket_bytes=100, base=None, damage=None
) -> None:
    plan = source.export_plan(bucket_bytes, base, [sink.share])
    sink.begin_weights(version, plan)
    for bucket in plan.buckets:
        data = source.export_bucket(bucket.index).clone()
        if damage == bucket.index:
            data[-1] ^= 1
        sink.load_bucket(bucket.index, data.numpy())
    sink.end_weights(version, source.export_checksum(), source.export_share_checksums()[0])


def source_of(net: torch.nn.Module) -> WeightSource:
    return WeightSource(net.named_parameters, rank=0)


# -- buckets -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 300), max_size=12), bucket_bytes=st.integers(1, 256))
def test_buckets_cover_every_byte_once_within_their_bound(sizes, bucket_bytes):
    """A byte left out or sent twice, or a bucket larger than the memory that was promised."""
    tensors = [TensorSpec(str(i), "uint8", (n,), n) for i, n in enumerate(sizes)]
    buckets = plan_buckets(tensors, bucket_bytes)
    sent = [(p.tensor.name, p.start + i) for b in buckets for p in b.pieces for i in range(p.num_bytes)]
    assert sent == [(t.name, i) for t in tensors for i in range(t.num_bytes)]
    for bucket in buckets:
        assert bucket.num_bytes <= bucket_bytes
        assert [p.offset for p in bucket.pieces] == [
            sum(q.num_bytes for q in bucket.pieces[:i]) for i in range(len(bucket.pieces))
        ]
    assert all(bucket.num_bytes == bucket_bytes for bucket in buckets[:-1])


# -- checksum ------------------------------------------------------------------------------------------------


def slow_checksum(data: bytes) -> int:
    """The formula in Python's integers."""

    def wrap(x):
        return (x + 2**63) % 2**64 - 2**63

    total = len(data)
    for place, first in enumerate(range(0, len(data), 8)):
        word = int.from_bytes(data[first : first + 8].ljust(8, b"\0"), "little", signed=True)
        x = wrap((wrap(place * 0x1E3779B97F4A7C15) ^ word) * 0x3F58476D1CE4E5B9)
        x = wrap((x ^ (x >> 29)) * 0x14D049BB133111EB)
        total += x ^ (x >> 32)
    return total % 2**64


@settings(deadline=None)
@given(data=st.binary(max_size=200))
def test_checksum_is_its_formula(data):
    assert tensor_checksum(torch.tensor(list(data), dtype=torch.uint8)) == slow_checksum(data)


def test_checksum_of_many_chunks_and_of_an_unaligned_slice():
    """Chunks that forget their place; an 8-byte view of memory that does not start at a multiple of 8."""
    data = torch.randint(0, 256, (3 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert tensor_checksum(data[1:]) == tensor_checksum(data[1:].clone())
    swapped = data.clone()
    swapped[:8], swapped[1 << 20 : (1 << 20) + 8] = data[1 << 20 : (1 << 20) + 8], data[:8]
    assert tensor_checksum(swapped) != tensor_checksum(data)


@settings(deadline=None)
@given(size=st.integers(1, 64), place=st.integers(0, 63), bit=st.integers(0, 7))
def test_checksum_sees_every_bit(size, place, bit):
    data = torch.arange(size, dtype=torch.uint8)
    flipped = data.clone()
    flipped[place % size] ^= 1 << bit
    assert tensor_checksum(flipped) != tensor_checksum(data)
    assert tensor_checksum(torch.cat([data, torch.zeros(1, dtype=torch.uint8)])) != tensor_checksum(data)


# -- source and sink -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes", [1, 7, 100, 1 << 20])
def test_weights_arrive_bit_for_bit_in_place(bucket_bytes):
    """A tied weight, a scalar, bf16 beside fp32, pieces over bucket borders; and storage stays."""
    sender, receiver = Net(0), Net(1)
    before = {name: p.data_ptr() for name, p in receiver.named_parameters()}
    sink = WeightSink(receiver)
    move(source_of(sender), sink, version=3, bucket_bytes=bucket_bytes)
    for (name, sent), held in zip(sender.named_parameters(), receiver.parameters(), strict=True):
        assert torch.equal(bytes_of(sent), bytes_of(held)), name
    assert {name: p.data_ptr() for name, p in receiver.named_parameters()} == before
    assert receiver.head.weight is receiver.embed.weight and sink.version == 3
    sink.check_clean()


SHARES = [
    {"embed.weight": Rows(0, 3, 7), "head.weight": Rows(0, 3, 7), "lower": Rows(0, 1, 3), "big": Rows(0, 50, 101)},
    {"embed.weight": Rows(3, 7, 7), "head.weight": Rows(3, 7, 7), "lower": Rows(1, 3, 3), "big": Rows(50, 101, 101)},
]  # fmt: skip


def part_of(net, share):
    """What a process holds of the net; its numbers are others."""
    own = {n: (share[n].of(p) if n in share else p).detach() + 1 for n, p in net.named_parameters()}
    return own | {"head.weight": own["embed.weight"]}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bucket_bytes", [1, 7, 100, 1 << 20])
def test_of_a_split_model_the_own_rows_arrive(bucket_bytes, share):
    """Would catch: rows of another process, bytes beside a bucket's border, and a part that is held for the whole."""
    sender = Net(0)
    sink = WeightSink(part_of(sender, share), share)
    move(source_of(sender), sink, bucket_bytes=bucket_bytes)
    copied = part_of(Net(1), share)
    own_bytes = WeightSink(copied, share).copy_from(sender.named_parameters(), version=1)
    for name, p in sender.named_parameters():
        sent = share[name].of(p) if name in share else p
        assert torch.equal(sink._params[name], sent) and torch.equal(copied[name], sent)
    assert own_bytes == sum(x.nbytes for n, x in copied.items() if n != "head.weight")
    assert sink.version == 1


@pytest.mark.parametrize("share", SHARES)
def test_damage_in_the_own_rows_is_noticed(share):
    """Would catch: a checksum of what was sent instead of what is held."""
    sender, noticed, there = Net(0), [], []
    for bucket in source_of(sender).export_plan(40).buckets:
        tensor, last = bucket.pieces[-1].tensor, bucket.pieces[-1].start + bucket.pieces[-1].num_bytes - 1
        rows = share.get(tensor.name, Rows(0, 1, 1))
        there.append(rows.first <= last * rows.whole // tensor.num_bytes < rows.end)
        try:
            move(
                source_of(sender),
                WeightSink(part_of(sender, share), share),
                bucket_bytes=40,
                damage=bucket.index,
            )
            noticed.append(False)
        except WeightSyncError:
            noticed.append(True)
    assert noticed == there and 3 < sum(there) < len(there) - 3
    wrong = {**share, "big": Rows(0, 51, 102)}
    with pytest.raises(
        WeightSyncError, match=r"'big' is float32 \(101,\) at the sender and float32 \(102,\)"
    ):
        move(source_of(sender), WeightSink(part_of(sender, share) | {"big": torch.zeros(51)}, wrong))


def test_a_tied_weight_may_arrive_under_its_other_name():
    sender, receiver = Net(0), Net(1)
    named = [("head.weight" if n == "embed.weight" else n, p) for n, p in sender.named_parameters()]
    move(WeightSource(lambda: named, rank=0), WeightSink(receiver))
    assert torch.equal(receiver.embed.weight, sender.embed.weight)


def test_a_source_sends_what_the_weights_are_now():
    """The plan is kept between publishes, the bytes are not."""
    sender, receiver = Net(0), Net(1)
    source, sink = source_of(sender), WeightSink(receiver)
    move(source, sink)
    first = source.export_checksum()
    with torch.no_grad():
        sender.big += 1
    move(source, sink, version=2)
    assert torch.equal(receiver.big, sender.big) and source.export_checksum() != first


def test_a_damaged_bucket_is_noticed_and_nothing_is_generated():
    sender, receiver = Net(0), Net(1)
    sink = WeightSink(receiver)
    with pytest.raises(WeightSyncError, match="checksum"):
        move(source_of(sender), sink, version=5, damage=2)
    with pytest.raises(WeightSyncError, match="version 5 are half written"):
        sink.check_clean()
    move(source_of(sender), sink, version=5)
    sink.check_clean()


def test_a_bucket_that_never_came_is_noticed():
    sender, receiver = Net(0), Net(1)
    source, sink = source_of(sender), WeightSink(receiver)
    plan = source.export_plan(100)
    sink.begin_weights(1, plan)
    for bucket in plan.buckets:
        data = source.export_bucket(bucket.index)
        if bucket.index != 1:
            sink.load_bucket(bucket.index, data)
    with pytest.raises(WeightSyncError, match="checksum"):
        sink.end_weights(1, source.export_checksum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: named[1:], "never sends 1 of the receiver's weights, first 'lower'"),
        (lambda named: [*named, ("more", torch.zeros(2))], "weight 'more'"),
        (lambda named: [(n, p.double() if n == "big" else p) for n, p in named], "float64.*float32"),
        (lambda named: [(n, p[:50] if n == "big" else p) for n, p in named], r"\(50,\).*\(101,\)"),
    ],
)
def test_weights_of_another_model_are_refused_before_anything_is_overwritten(change, message):
    sender, receiver = Net(0), Net(1)
    named = change(list(sender.named_parameters()))
    sink = WeightSink(receiver)
    before = [p.clone() for p in receiver.parameters()]
    with pytest.raises(WeightSyncError, match=message):
        sink.begin_weights(1, WeightSource(lambda: named, rank=0).export_plan(100))
    sink.check_clean()
    assert all(torch.equal(a, b) for a, b in zip(before, receiver.parameters(), strict=True))


def test_ranks_other_than_0_go_through_the_weights_and_send_nothing():
    """With sharded weights every rank must take part in gathering, or rank 0 waits for ever."""
    taken = []

    def named():
        for name, p in Net(0).named_parameters():
            taken.append(name)
            yield name, p

    source = WeightSource(named, rank=1)
    buckets = source.export_plan(100).buckets
    taken.clear()
    assert [source.export_bucket(b.index) for b in buckets] == [None] * len(buckets)
    assert taken == [name for name, _ in Net(0).named_parameters()]


def test_buckets_out_of_order_are_refused():
    source = source_of(Net(0))
    source.export_plan(100)
    source.export_bucket(0)
    with pytest.raises(ValueError, match="bucket 2 asked for, 1 is next"):
        source.export_bucket(2)


def test_weights_are_copied_within_a_process():
    """And what never changes only once, but again after a copy that failed."""
    sender, receiver = Net(0), Net(1)
    sink = WeightSink(receiver)
    with pytest.raises(WeightSyncError, match="never sends"):
        sink.copy_from([("big", sender.big)], version=1)
    with pytest.raises(WeightSyncError, match="half written"):
        sink.check_clean()
    copied = sink.copy_from(sender.named_parameters(), version=2)
    assert copied == sum(p.numel() * p.element_size() for p in sender.parameters())
    assert torch.equal(receiver.big, sender.big) and sink.version == 2 and sink.has_copied
    assert sink.copy_from([("big", sender.big)], version=3) == sender.big.numel() * 4
    with pytest.raises(WeightSyncError, match="none of that name"):
        sink.copy_from([("big", sender.big), ("more", sender.big)], version=4)
    assert not sink.has_copied
    with pytest.raises(WeightSyncError, match="never sends"):
        sink.copy_from([("big", sender.big)], version=4)


# -- weights that never change -------------------------------------------------------------------------------


def lora_like(net: Net) -> WeightSource:
    """Only `big` and `scale` are trained."""
    return WeightSource(
        net.named_parameters, rank=0, named_trained=lambda: [("scale", net.scale), ("big", net.big)]
    )


def test_what_never_changes_is_sent_once():
    """Would catch: a frozen base that travels at every step; trained weights that are not sent, or not verified."""
    sender, receiver = Net(0), Net(1)
    source, sink = lora_like(sender), WeightSink(receiver)
    assert source.base is None and sink.base is None
    move(source, sink)
    assert source.base == sink.base == source.export_checksum()
    with torch.no_grad():
        sender.big += 1
        sender.scale += 1
    plan = source.export_plan(100, source.base)
    assert plan.num_bytes == 4 * (101 + 1) and source.export_plan(100).num_bytes > plan.num_bytes
    move(source, sink, version=2, base=source.base)
    for (name, sent), held in zip(sender.named_parameters(), receiver.parameters(), strict=True):
        assert torch.equal(bytes_of(sent), bytes_of(held)), name
    assert sink.version == 2 and sink.base == source.base
    with pytest.raises(WeightSyncError, match="checksum"):
        move(source, sink, version=3, base=source.base, damage=0)
    assert sink.base is None, "a dirty receiver must get everything"
    with pytest.raises(WeightSyncError, match="does not hold whole; publish everything"):
        move(source, sink, version=3, base=source.base)
    move(source, sink, version=3)
    assert sink.base == source.base


# -- publish -------------------------------------------------------------------------------------------------


def weight_spec(name: str, roles: tuple[str, ...], seed: int) -> GroupSpec:
    return GroupSpec(name, roles, 1, 0, "weight_workers:Holder", {"seed": seed})


@pytest.fixture
def pair():
    with launch(
        [weight_spec("train", ("actor",), 0), weight_spec("sample", ("rollout",), 1)], LOCAL
    ) as groups:
        yield groups["train"], groups["sample"]


def test_publish_moves_weights_between_groups(pair):
    train, sample = pair
    assert train.call("fingerprint") != sample.call("fingerprint")
    report = publish(train, sample, version=1, runtime=LOCAL)
    assert sample.call("fingerprint") == train.call("fingerprint")
    assert report.bytes == train.call("num_bytes")[0] > 2 << 20 and report.buckets == 3
    assert report.transport == "object_store" and report.checksum is not None
    assert sample.call("versions") == [[1]], "the engine was not told"


def test_publish_sends_the_frozen_base_once_and_again_after_a_cut(monkeypatch):
    """Would catch: a new or a dirty engine that is sent the adapters only, on top of another base."""
    train = GroupSpec("train", ("actor",), 1, 0, "weight_workers:Holder", {"seed": 0, "trained": ("scale",)})
    with launch([train, weight_spec("sample", ("rollout",), 1)], LOCAL) as groups:
        train, sample = groups["train"], groups["sample"]
        whole = train.call("num_bytes")[0]
        sent = []
        for version in (1, 2):
            sent.append(publish(train, sample, version=version, runtime=LOCAL).bytes)
            assert sample.call("fingerprint") == train.call("fingerprint")
            train.call("nudge")
        monkeypatch.setattr(faults, "_armed", [("publish.mid", "*", "raise")])
        with pytest.raises(faults.InjectedFault):
            publish(train, sample, version=3, runtime=LOCAL)
        sent += [publish(train, sample, version=v, runtime=LOCAL).bytes for v in (3, 4)]
        assert sent == [whole, 4, whole, 4]
        with launch([weight_spec("new", ("rollout",), 2)], LOCAL) as others:
            assert publish(train, others["new"], version=4, runtime=LOCAL).bytes == whole


def test_publish_within_one_group_moves_only_the_version():
    with launch([weight_spec("all", ("actor", "rollout"), 0)], LOCAL) as groups:
        report = publish(groups["all"], groups["all"], version=4, runtime=LOCAL)
        assert (report.bytes, report.buckets, report.transport) == (0, 0, "shared")
        assert groups["all"].call("versions") == [[4]]


def test_a_publish_that_was_cut_short_leaves_the_target_dirty(pair, monkeypatch):
    """The engine would generate from a mixture of two versions."""
    train, sample = pair
    monkeypatch.setattr(faults, "_armed", [("publish.mid", "*", "raise")])
    with pytest.raises(faults.InjectedFault):
        publish(train, sample, version=1, runtime=LOCAL)
    with pytest.raises(WeightSyncError, match="half written"):
        sample.call("generate")
    assert sample.call("versions") == [[]]
    publish(train, sample, version=1, runtime=LOCAL)
    sample.call("generate")
    assert sample.call("fingerprint") == train.call("fingerprint")
