"""Bytes and collectives of a step on many ranks: by hand, and seen on torch's fake ranks."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoo.features import Batch
from zoo.teachers.open import open_teacher
from zoo.train.cluster import (
    GPUS,
    Layout,
    exposed,
    exposed_gathers,
    failures,
    gathered,
    traffic,
)
from zoo.train.distill.placement import shard_teacher, teacher_blocks
from zoo.train.distill.recipes import RECIPES
from zoo.train.distill.setup import meta_models
from zoo.train.shard import local, mesh_of, shard, unit_sizes

H200 = GPUS["h200"]


class Sent(TorchDispatchMode):
    """Notes the bytes of the larger side of each collective."""

    def __init__(self):
        super().__init__()
        self.bytes: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name, _ = str(func).split(".")
        if namespace == "c10d":
            sides = [x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.bytes.setdefault(name, []).append(max(sides))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def join(monkeypatch):
    """Become rank 0 of n nodes of g ranks, of which the others are not there."""

    def begin(nodes: int, local: int) -> Layout:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=nodes * local)
        return Layout(nodes, local)

    yield begin
    dist.destroy_process_group()


def student() -> torch.nn.Module:
    return timm.create_model("test_vit", img_size=32, num_classes=8)


@pytest.mark.parametrize(("method", "nodes", "local"), [("fsdp", 4, 8), ("hsdp", 512, 8)])
def test_a_cut_student_sends_what_the_plan_counts(method, nodes, local, join):
    layout, model = join(nodes, local), student()
    ring = local if method == "hsdp" else nodes * local
    sizes = unit_sizes(model, ring)
    shard(model, mesh_of(method, torch.device("cpu")))
    with Sent() as sent:
        model(torch.zeros(2, 3, 32, 32)).sum().backward()
    check(sent, sizes, method, layout)


def check(sent: Sent, sizes: list[int], method: str, layout: Layout) -> None:
    """Hold the collectives of a step and their bytes against the plan's."""
    planned = traffic(method, 4 * sum(sizes), layout, H200, units=len(sizes))
    gathers, scatters = sent.bytes["_allgather_base_"], sent.bytes["_reduce_scatter_base_"]
    assert (len(gathers), len(scatters)) == (planned.gathers, planned.reductions)
    ring = layout.local if method == "hsdp" else layout.ranks
    seen = (sum(gathers) + sum(scatters)) * (ring - 1) / ring
    if method == "fsdp":
        assert "allreduce_" not in sent.bytes
        assert planned.within + planned.between == pytest.approx(seen)
        return
    assert planned.within == pytest.approx(seen)
    reduced, n = sent.bytes["allreduce_"], layout.nodes
    assert len(reduced) == planned.reductions
    assert planned.between == pytest.approx(2 * sum(reduced) * (n - 1) / n)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # nobody writes into that view
def test_the_student_of_c_radio_v4_sends_on_4096_ranks_what_the_plan_counts(join):
    layout = join(512, 8)
    _, model = meta_models(RECIPES["c_radio_v4"]())
    sizes, mesh = unit_sizes(model, 8), mesh_of("hsdp", torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu").train()
        shard(model, mesh)
        with Sent() as sent:
            answers = model(Batch(torch.zeros(1, 3, 128, 128)), size=(128, 128)).values()
            parts = [x for a in answers for x in (a.summary, a.spatial) if x is not None]
            torch.stack([x.sum() for x in parts]).sum().backward()
    check(sent, sizes, "hsdp", layout)


def test_a_cut_teacher_sends_within_its_node_what_the_plan_counts(join):
    layout, teacher = join(4, 8), open_teacher("timm:test_vit/random@64")
    teacher.to_bf16()  # but for its norms: a block has two types
    blocks = teacher_blocks(teacher)
    shard_teacher(teacher, mesh_of("hsdp", torch.device("cpu")))
    with Sent() as sent:
        for _ in range(3):
            teacher(Batch(torch.zeros(1, 3, 64, 64)))
    assert set(sent.bytes) == {"_allgather_base_"}
    gathers, planned = sent.bytes["_allgather_base_"], gathered(blocks, 3, layout, H200)
    assert len(gathers) == planned.gathers == 3 * len(blocks)
    assert planned.within == pytest.approx(sum(gathers) * 7 / 8)
    assert planned.between == 0
    kept = sum(local(p).nbytes for p in teacher.parameters())
    whole = sum(p.nbytes for p in teacher.parameters())
    assert kept == whole - sum(blocks) * 7 / 8


def test_a_cut_teacher_waits_for_its_first_block_or_for_its_links():
    sent = gathered([10**9] * 4, 2, Layout(1, 8), H200)
    assert sent.seconds == pytest.approx(2 * 4 * (7 / 8 / 300 + 7 * 5e-6))
    assert exposed_gathers(sent, 100.0, blocks=4) == pytest.approx(sent.seconds / 4)
    assert exposed_gathers(sent, 0.0, blocks=4) == sent.seconds
    assert gathered([10**9], 1, Layout(1, 1), H200) == (0, 0, 0, 0, 0)


def test_whole_copies_reduce_each_gradient_once(join):
    layout, model = join(1, 4), student()
    reduced = []

    def hook(_, bucket):
        reduced.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, hook)
    wrapped(torch.zeros(2, 3, 32, 32)).sum().backward()
    planned = traffic("ddp", 4 * sum(unit_sizes(model, 1)), layout, H200)
    assert planned.within == pytest.approx(2 * sum(reduced) * 3 / 4)
    assert planned.between == 0


def test_bytes_of_a_step_by_hand():
    two = Layout(2, 4)
    ddp, fsdp, hsdp = (traffic(m, 800e6, two, H200) for m in ("ddp", "fsdp", "hsdp"))
    # a node's GPUs add 800 MB up in a ring (6/4 of it); each then swaps its 200 MB with its like
    assert (ddp.within, ddp.between) == (1200e6, 200e6)
    # 7/8 of 800 MB, three times; one rank in four sends to the other node
    assert (fsdp.within, fsdp.between) == pytest.approx((1575e6, 525e6))
    assert (hsdp.within, hsdp.between) == (1800e6, 200e6)
    assert traffic("hsdp", 800e6, two, H200, slices=3).within == 3 * hsdp.within
    assert traffic("ddp", 800e6, two, H200, slices=3) == ddp
    assert traffic("ddp", 800e6, Layout(1, 1), H200) == (0, 0, 0, 0, 0)


def test_links_and_hops_take_their_time():
    slow = replace(H200, within=1, between=0.1)
    sent = traffic("ddp", 800e6, Layout(2, 4), slow)
    buckets, hops = 31, 6 * 5e-6 + 2 * 1e-5  # 25 MiB each; a ring of four, a tree of two
    assert sent.seconds == pytest.approx(1.2 + 2.0 + buckets * hops)


def test_communication_hides_behind_the_backward_pass_but_for_its_end():
    sent = traffic("ddp", 800e6, Layout(2, 8), H200)
    assert exposed(sent, 100.0) == pytest.approx(sent.seconds / sent.reductions)
    assert exposed(sent, 0.0) == sent.seconds
    assert exposed(traffic("fsdp", 8e6, Layout(2, 8), H200), 0.0) == pytest.approx(
        traffic("fsdp", 8e6, Layout(2, 8), H200).seconds
    )


def test_failures_and_the_interval_that_loses_least():
    found = failures(1024)
    assert found.between / 3600 == pytest.approx(48.8, abs=0.1)  # 50,000 / 1,024
    assert found.interval / 60 == pytest.approx(44, abs=1)

    def lost(interval: float) -> float:
        return 20 / interval + (interval / 2 + 300) / found.between

    assert found.lost == pytest.approx(lost(found.interval))
    assert found.lost < min(lost(found.interval * 1.1), lost(found.interval / 1.1))


def test_gpus_that_do_not_fill_their_nodes_are_refused():
    assert Layout.of(4, 8) == (1, 4)
    with pytest.raises(ValueError, match="20 GPUs do not fill nodes of 8; 16 do"):
        Layout.of(20, 8)
