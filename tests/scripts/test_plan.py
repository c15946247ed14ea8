"""What a step holds and exchanges, read from its compiled program: the promises about memory, traffic and FLOPs."""

import argparse
import itertools
import math
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from bench import methods as bench_methods
from helpers import programs
from steppe.configs import base, sizes
from steppe.lm.model import hlo
from steppe.lm.model.mesh import make_mesh
from steppe.lm.model.parameters import STACKED, name_of
from steppe.lm.parts import chips
from steppe.lm.parts.assembly import assemble
from steppe.lm.parts.budget import step_flops
from steppe.optim.methods import Cost
from steppe.scripts.plan import __main__ as plan
from steppe.scripts.plan import compiled, search


def config(size: str, batch: int, length: int, method: str, **model):
    made = base.get_config()
    made.model.size, made.optim.method = size, method
    sizes.resolve(made)
    made.model.update(**model)
    made.train.batch_size, made.data.sequence_length = batch, length
    return made


def test_a_collective_in_a_loop_counts_as_often_as_it_runs():
    mesh = make_mesh((2, 4, 1))

    def total(x):
        def body(carry, _):
            return carry + jax.lax.psum(carry, "fsdp"), None

        return jax.lax.scan(body, x, None, length=5)[0]

    split = jax.shard_map(total, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
    text = jax.jit(split).lower(jax.ShapeDtypeStruct((64, 32), jnp.float32)).compile().as_text()
    (found,) = hlo.collectives(text)
    assert (found.kind, found.size, found.times) == ("all-reduce", 4, 5)
    assert found.bytes == 5 * 2 * (16 * 32 * 4) * 3 / 4  # in a ring, all but a device's own part travels twice


_OF_A_GPU = """
ENTRY %main (a: bf16[20,64]) -> bf16[1280,64] {
  %g = ((bf16[20,64]{1,0}, bf16[20,128]{1,0}), (bf16[1280,64]{1,0}, bf16[1280,128]{1,0})) all-gather-start(%a, %b), channel_id=2, replica_groups={{REPLICAS}}, dimensions={0}
  %s = ((f32[1280,64]{1,0}), f32[20,64]{1,0}) reduce-scatter-start(%c), channel_id=3, replica_groups={{REPLICAS}}, dimensions={0}
  ROOT %d = (bf16[1280,64]{1,0}, bf16[1280,128]{1,0}) all-gather-done(%g)
}
"""  # noqa: E501
_OF_A_TPU = """
%begins (p: bf16[20,64]) -> bf16[1280,64] {
  ROOT %ag.1 = bf16[1280,64]{1,0} all-gather(%p), channel_id=54, replica_groups={{REPLICAS}}, dimensions={0}
}
%ends (q: bf16[20,64]) -> bf16[1280,64] {
  ROOT %ag.2 = bf16[1280,64]{1,0} all-gather(%q), channel_id=54, replica_groups={{REPLICAS}}, dimensions={0}
}
ENTRY %main (a: bf16[20,64]) -> bf16[1280,64] {
  %start = bf16[1280,64]{1,0} fusion(%a), kind=kCustom, calls=%begins
  ROOT %done = bf16[1280,64]{1,0} fusion(%start), kind=kCustom, calls=%ends
}
"""


def test_what_travels_together_or_in_parts_counts_once():
    replicas = ",".join(map(str, range(64)))
    gathered, scattered = hlo.collectives(_OF_A_GPU.replace("REPLICAS", replicas))
    assert (gathered.kind, gathered.bytes) == ("all-gather", 1280 * (64 + 128) * 2 * 63 / 64)
    assert (scattered.kind, scattered.bytes) == ("reduce-scatter", 1280 * 64 * 4 * 63 / 64)
    of_a_tpu = _OF_A_TPU.replace("REPLICAS", replicas)
    # Parts of a chain may lie in different memories; other chains have the same channel.
    start, *rest = of_a_tpu.replace("channel_id=54", 'channel_id=1, frontend_attributes={chain_id="3"}').split("%ends")
    chained = "%ends".join([start.replace("= bf16[1280,64]{1,0}", "= bf16[1280,64]{1,0:S(1)}"), *rest])
    for text in (of_a_tpu, chained):
        (gathered,) = hlo.collectives(text)
        assert (gathered.times, gathered.bytes) == (1, 1280 * 64 * 2 * 63 / 64)
    assert len(hlo.collectives(chained.replace('"3"', '"4"', 1))) == 2


_WINDOWED = """
%counts (p: (bf16[20,64], u32[])) -> pred[] {
  %p = (bf16[20,64]{1,0}, u32[]) parameter(0)
  %c = u32[] constant(4)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}
%turns (q: (bf16[20,64], u32[])) -> (bf16[20,64], u32[]) {
  %q = (bf16[20,64]{1,0}, u32[]) parameter(0)
  %x = bf16[20,64]{1,0} get-tuple-element(%q), index=0
  %j = u32[]{:T(128)} get-tuple-element(%q), index=1
  %by = u32[] constant(STEP)
  %r = bf16[20,64]{1,0} collective-permute(%x), channel_id=7, source_target_pairs={{0,1},{1,0}}
  %n = u32[]{:T(128)} add(%j, %by)
  ROOT %t = (bf16[20,64]{1,0}, u32[]) tuple(%r, %n)
}
ENTRY %main (a: bf16[20,64]) -> (bf16[20,64], u32[]) {
  %zero = u32[] constant(START)
  %begin = u32[]{:T(128)} copy(%zero)
  %in = (bf16[20,64]{1,0}, u32[]) tuple(%a, %begin)
  %twin = bf16[20,64]{1,0} collective-permute(%a), channel_id=7, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (bf16[20,64]{1,0}, u32[]) while(%in), condition=%counts, body=%turns
}
"""


@pytest.mark.parametrize(("start", "step", "times"), [(0, 1, 4), (0, 2, 2), (1, 1, 3), (1, 2, 2), (0, 3, 2), (4, 1, 0)])
def test_a_loop_of_which_xla_notes_no_count_runs_as_its_counter_says(start, step, times):
    before, inside = hlo.collectives(_WINDOWED.replace("START", str(start)).replace("STEP", str(step)))
    assert (before.times, inside.times) == (1, times)  # one channel, two collectives
    assert inside.bytes == times * 20 * 64 * 2


def test_a_network_is_that_of_the_devices():
    class Device(NamedTuple):
        platform: str
        device_kind: str
        coords: tuple = ()
        process_index: int = 0
        slice_index: int = 0

    def tpus(kind, *sizes, slices=1):
        places = itertools.product(*map(range, sizes))
        return [Device("tpu", kind, place, 0, at) for at, place in itertools.product(range(slices), places)]

    def gpus(kind, hosts, each):
        return [Device("gpu", kind, (), host) for host in range(hosts) for _ in range(each)]

    for devices, gigabytes, said in (
        (tpus("TPU v5 lite", 2, 4, 1), 45, "2 in a line, 4 in a line"),
        (tpus("TPU v5 lite", 16, 16, 1), 90, "16 in a ring, 16 in a ring"),
        (tpus("TPU v6 lite", 4, 4, 1), 90, "4 in a line, 4 in a line"),
        (tpus("TPU v5", 4, 4, 4), 180, "4 in a ring, 4 in a ring, 4 in a ring"),
        (tpus("TPU v5 lite", 4, 4, 1, slices=2), 45, "2 slices, 50 GB/s between them"),
        (gpus("NVIDIA H100 80GB HBM3", 1, 8), 450, "links of one host"),
        (gpus("NVIDIA H100 80GB HBM3", 4, 8), 400, "4 hosts, 400 GB/s between them"),
        (gpus("NVIDIA H100 80GB HBM3", 4, 1), 50, "4 hosts, 50 GB/s between them"),
    ):
        found = chips.network_of(devices, chips.chip_of(devices[0]))
        assert found.bandwidth == pytest.approx(gigabytes * 1e9)
        assert said in found.name


@pytest.fixture(scope="module")
def wide():
    """Two layers of the 1.2b model's width on 2 x 2 x 2 devices: the layer loop's body is that of all 24.

    96 tokens, unlike any size of a weight, so that an activation is told by its shape.
    """
    made = config("1.2b", 8, 96, "precond_functional_sam", layers=2, readout_chunk=32, functional_readout="rebuild")
    made.mesh.data = made.mesh.fsdp = made.mesh.tensor = 2
    parts, program = compiled.compiled_step(made, 32100, 0, jax.devices())
    return parts, program.as_text()


def numbers(collective: hlo.Collective) -> int:
    """How many numbers the one array has that a collective makes."""
    (shape,) = re.findall(r"\w+\[([\d,]*)\]", collective.shape)
    return math.prod(int(size) for size in shape.split(",") if size)


def test_no_array_of_all_logits(wide):
    parts, text = wide
    V, T, rows = parts.shape.vocabulary, 96, 2
    logits = [s for s in programs.array_shapes(text) if len(s) > 2 and s[-1] in (V, V // 2)]
    assert logits  # those of a chunk are there, so the test can fail
    for shape in logits:
        tokens = 1
        for size in shape[:-1]:
            tokens *= size
        assert tokens < rows * T, shape


def test_optimizer_state_and_whole_stacks_are_never_gathered(wide):
    """All-gathers belong to a forward or backward pass, and take one layer, a table, or a sum's few numbers."""
    parts, text = wide
    gathers = [c for c in hlo.collectives(text) if c.kind == "all-gather"]
    assert gathers
    one_layer = set()
    for path, leaf in jax.tree.leaves_with_path(parts.abstract.params):
        stacked = parts.shape.layers if re.search(STACKED, name_of(path)) else 1
        one_layer.add(math.prod(leaf.shape) // stacked // (2 if "tensor" in leaf.sharding.spec else 1))
    for gather in gathers:
        assert "jvp(" in gather.source, gather
        assert numbers(gather) in one_layer or numbers(gather) < 2**16, gather


def test_tables_cross_devices_once_a_pass_and_no_activation_is_gathered(wide):
    parts, text = wide
    table = parts.shape.vocabulary // 2 * parts.shape.width
    found = hlo.collectives(text)

    def times(kind, size):  # a table travels in blocks of whole tiles
        return sum(c.times for c in found if c.kind == kind and numbers(c) == size)

    assert 0 < times("all-gather", table) <= 3  # theta, theta + epsilon, and theta again where it is rebuilt
    assert times("reduce-scatter", table // 2) == 4  # lookup and readout, in each of two passes; none per chunk
    for collective in found:
        assert not (collective.kind == "all-gather" and ",96,2048]" in collective.shape), collective


def test_the_two_passes_of_functional_sam_share_the_memory_of_their_activations():
    """118m, 32 x 512, 32k vocabulary on one CPU: AdamW's temporary memory, a copy of the parameters, h, and a tenth."""
    temporary = {}
    for method in ("adamw", "functional_sam"):
        made = config("118m", 32, 512, method, functional_readout="rebuild")
        parts, program = compiled.compiled_step(made, 32100, 0, jax.devices()[:1])
        temporary[method] = program.memory_analysis().temp_size_in_bytes
    copy, hidden = 4 * parts.budget.parameters.total, 4 * 32 * 512 * parts.shape.width
    assert temporary["functional_sam"] <= 1.1 * (temporary["adamw"] + copy + hidden)
    assert parts.budget.flops <= 2.0 * parts.budget.adamw_flops


def test_analytic_flops_are_the_compilers_of_an_unrolled_model(optimized):
    """XLA also counts norms, softmax and the optimizer: a few per cent on top at this width."""
    options = argparse.Namespace(layers=2, width=256, vocabulary=4096, batch_size=4, sequence_length=64, chunks=1)
    measured, _, _ = bench_methods.measure("adamw", options)
    made = config("", 4, 64, "adamw", layers=2, width=256, heads=4, mlp_width=1024)
    parts = assemble(made, 4096, 10**6, devices=jax.devices()[:1])
    analytic = step_flops(parts.shape, 4 * 64, Cost())
    assert analytic <= measured <= 1.06 * analytic


def test_the_program_does_not_grow_with_depth():
    """Layers are a loop: twelve times as many add next to nothing to what is compiled."""
    size = {}
    for layers in (4, 48):
        made = config("", 8, 64, "functional_sam", layers=layers)
        _, program = compiled.compiled_step(made, 256, 10**6, jax.devices()[:1])
        size[layers] = sum(map(len, hlo.computations(program.as_text())[0].values()))
    assert size[48] <= 1.02 * size[4]


def test_the_plan_of_a_small_run_is_printed(capsys, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    status = plan.main(["--config=quickstart", "--topology=cpu:8", "--config.mesh.fsdp=2"])
    printed = capsys.readouterr().out
    assert status == 0
    for part in ("parameters", "optimizer", "anchor", "temporary", "all-reduce", "MFU", "run  ", "fits"):
        assert part in printed


@pytest.mark.parametrize(("megabytes", "status"), [pytest.param(24, 0, marks=pytest.mark.exhaustive), (4, 1)])
def test_a_search_ends_with_flags_that_fit_or_with_what_is_missing(capsys, request, monkeypatch, megabytes, status):
    monkeypatch.chdir(request.config.rootpath)
    small = chips.chip_of(jax.devices()[0])._replace(memory=megabytes * 1e6)
    for module in (plan, compiled, search):
        monkeypatch.setattr(module, "chip_of", lambda device, devices_here=1: small)
    line = ["--config=quickstart", "--config.model.size=0.1m", "--config.train.batch_size=64", "--topology=cpu:1"]
    assert plan.main(line) == 1
    assert "--search chooses" in capsys.readouterr().out
    assert plan.main([*line, "--search"]) == status
    last = capsys.readouterr().out.splitlines()[-1]
    if status == 0:
        assert "--config.train.microbatches=" in last
        assert plan.main([*line, *last.removeprefix("use it with ").split()]) == 0
    else:
        assert re.search(r"alone take 0\.00\d+ GiB, .* use 2 or more devices, or a smaller config\.model\.size", last)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--topology=v5e", "v5e:16x16"), ("--topology=cpu:0", "cpu:8"), ("--topology=", "cpu:8"),
        ("--topology=h100:", "h100:8"), ("--topology=h200:8", "a100:4x8"),
    ],
)  # fmt: skip
def test_a_topology_that_is_none_is_one_line(argument, said, capsys, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    assert plan.main(["--config=quickstart", argument]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert said in printed


@pytest.mark.parametrize(("kind", "needs"), [("h100:2x8", "steppe[gpu]"), ("v5e:2x4", "steppe[plan]")])
def test_a_machine_that_is_not_here_is_planned_for_or_what_that_needs_is_said(kind, needs, request):
    """In a process of its own: the compilers of accelerators, where there are any, start with settings of their own."""
    arguments = ["--config=quickstart", f"--topology={kind}", "--config.mesh.fsdp=8", "--config.mesh.data=-1"]
    arguments += ["--config.model.compute_dtype=bfloat16", "--vocabulary_size=256", "--config.train.batch_size=16"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "steppe.scripts.plan", *arguments],
        capture_output=True,
        text=True,
        cwd=request.config.rootpath,
    )
    if done.returncode == 2:
        assert done.stderr.count("\n") == 1
        assert needs in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        for part in ("fsdp 8", "temporary", "reduce", "fits"):
            assert part in done.stdout


def test_times_have_the_unit_that_fits():
    assert [plan.span(*pair) for pair in ((5, 6), (100, 148), (3600, 9000), (1e5, 1e6))] == [
        "5 to 6 seconds", "1.67 to 2.47 minutes", "1 to 2.5 hours", "1.16 to 11.6 days"
    ]  # fmt: skip
