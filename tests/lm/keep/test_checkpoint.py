"""Checkpoints under damage: every flipped bit is seen, what is not whole is not used, what does not fit is refused."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import SingleDeviceSharding

from steppe.data.errors import StorageError
from steppe.lm.keep import checkpoint, saving, seal
from steppe.lm.keep.checkpoint import Checkpoints
from steppe.lm.keep.exits import Unusable
from steppe.lm.parts.state import State


def state(step, width=4, dtype=jnp.float32):
    params = {"embed": {"embedding": jnp.arange(3.0 * width).reshape(3, width).astype(dtype)}}
    return State(jnp.int32(step), params, (params, jnp.int32(step)), (), {})


def abstract(of):
    place = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), of)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Sealed checkpoints of steps 10 and 20 of the run `mine`."""
    place = tmp_path_factory.mktemp("original")
    with Checkpoints(str(place), keep=2, run="mine") as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state(step), {"note": step})
    return place


@pytest.fixture
def two(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoints")


def files(step):
    return [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]


def flip(path, chance):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def test_what_was_saved_comes_back(two):
    with Checkpoints(str(two), run="mine") as checkpoints:
        assert checkpoints.newest() == 20
        assert checkpoints.newest(before=20) == 10
        found, meta = checkpoints.restore(20, abstract(state(0)))
    assert meta == {"note": 20}
    assert jax.tree.all(jax.tree.map(np.array_equal, found, state(20)))


def test_every_flipped_bit_is_detected(two):
    """210 random flips of one bit, in turn over every file of a checkpoint, the seal among them."""
    chance, step = random.Random(0), two / "20"
    every = files(step)
    seal.verify(epath.Path(step), 20, "mine")
    for number in range(210):
        path = every[number % len(every)]
        content = path.read_bytes()
        flip(path, chance)
        with pytest.raises(seal.Broken):
            seal.verify(epath.Path(step), 20, "mine")
        path.write_bytes(content)
    seal.verify(epath.Path(step), 20, "mine")


def truncated(two, chance):
    path = chance.choice(files(two / "20"))
    path.write_bytes(path.read_bytes()[:-1])
    return 20, "was altered"


def lost(two, chance):
    (two / "20" / "state" / "_METADATA").unlink()
    return 20, "lacks state/_METADATA"


def added(two, chance):
    (two / "20" / "state" / "more").write_text("x")
    return 20, "foreign file state/more"


def unsealed(two, chance):
    (two / "20" / "SEAL").unlink()
    return 20, "never finished"


def forged(two, chance):
    body = b'{"format": 1, "step": 20}'
    (two / "20" / "SEAL").write_bytes(seal._digest(body).encode() + b"\n" + body)
    return 20, "does not have the format"


def empty(two, chance):
    (two / "30").mkdir()
    return 30, "never finished"


def renamed(two, chance):
    (two / "20").rename(two / "30")
    return 30, "saved as step 20 and renamed"


def foreign(two, chance):
    with Checkpoints(str(two.parent / "theirs"), run="theirs") as checkpoints:
        checkpoints.save(30, state(30), {})
    shutil.move(two.parent / "theirs" / "30", two / "30")
    return 30, "belongs to another run"


def flipped(two, chance):
    flip(two / "20" / "state" / "_METADATA", chance)
    return 20, "was altered"


HARMS = [truncated, lost, added, unsealed, forged, empty, renamed, foreign, flipped]


@pytest.mark.parametrize("harm", HARMS)
def test_a_bad_step_is_named_and_the_one_before_is_used(two, harm):
    step, why = harm(two, random.Random(1))
    said = []
    with Checkpoints(str(two), run="mine", log=said.append) as checkpoints:
        newest = checkpoints.newest()
        assert newest in (10, 20)
        assert newest < step
        found, _ = checkpoints.restore(newest, abstract(state(0)))
        assert int(found.step) == newest
        checkpoints.save(step, state(step), {"note": "again"})  # the place is free again
    assert f"CHECKPOINT {step} IS NOT USED" in said[0]
    assert why in said[0]
    assert said[1] == f"falling back to the checkpoint of step {newest}"
    assert (two / "damaged" / str(step)).is_dir()  # nothing is thrown away


def test_without_a_sound_step_nothing_is_moved_or_begun(two):
    for step in (10, 20):
        flip(two / str(step) / "state" / "_METADATA", random.Random(0))
    with Checkpoints(str(two), run="mine") as checkpoints, pytest.raises(Unusable, match="no checkpoint can be used"):
        checkpoints.newest()
    assert {path.name for path in two.iterdir()} == {"10", "20"}


def test_a_save_that_never_finished_is_no_checkpoint(two):
    for step in (10, 20):
        (two / str(step) / "SEAL").unlink()
    said = []
    with Checkpoints(str(two), run="mine", log=said.append) as checkpoints:
        assert checkpoints.newest() is None
    assert said[-1] == "falling back to the beginning"


def test_reading_changes_nothing(two):
    unsealed(two, None)
    (two / "30.orbax-checkpoint-tmp-1").mkdir()
    before = sorted(two.rglob("*"))
    with Checkpoints(str(two), read_only=True, log=lambda line: None) as checkpoints:
        assert checkpoints.newest() == 10
    assert sorted(two.rglob("*")) == before
    with Checkpoints(str(two), run="mine", log=lambda line: None):
        assert not (two / "30.orbax-checkpoint-tmp-1").exists()  # left by a kill


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (state(0, dtype=jnp.bfloat16), r"embed/embedding: float32\[3, 4\] in the checkpoint, bfloat16\[3, 4\] here"),
        (state(0, width=8), r"float32\[3, 4\] in the checkpoint, float32\[3, 8\] here"),
        (state(0)._replace(rule=(jnp.int32(0),)), r"rule/0: absent in the checkpoint, int32\[\] here"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_it_is_cast(two, other, why):
    with Checkpoints(str(two), read_only=True) as checkpoints, pytest.raises(Unusable, match=why):
        checkpoints.restore(20, abstract(other))


def test_the_newest_and_every_nth_are_kept(tmp_path):
    with Checkpoints(str(tmp_path), keep=2, keep_every=20, run="mine") as checkpoints:
        for step in range(10, 80, 10):
            checkpoints.save(step, state(step), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "40", "60", "70"]


def test_the_newest_regular_one_is_kept_and_others_forgotten(tmp_path):
    with Checkpoints(str(tmp_path), keep=1, period=10, run="mine") as checkpoints:
        for step in (10, 20, 23, 27):
            checkpoints.save(step, state(step), {})
        checkpoints.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "27"]
        checkpoints.forget(after=20)
        assert checkpoints.newest() == 20


def test_room_is_asked_for_before_a_save(two):
    huge = state(0)._replace(params=np.broadcast_to(np.float32(0), (1 << 50,)))
    with Checkpoints(str(two), run="mine") as checkpoints:
        assert checkpoints.room(state(0)) == ""
        assert "MB needed" in checkpoints.room(huge)


def test_a_save_that_fails_is_one_line_and_reported_once(two):
    said = []
    checkpoints = Checkpoints(str(two), run="mine", log=said.append)
    shutil.rmtree(two)
    two.write_text("a file where the directory was")

    def save():
        checkpoints.save(30, state(30), {})
        checkpoints.wait()

    with pytest.raises(StorageError, match="not written"):
        save()
    checkpoints.close()
    assert said == []


def load_params(path, params, *log):
    return checkpoint.load_parts(path, {"params": params}, *log)["params"]


def test_parameters_of_an_old_run(two, tmp_path):
    params = abstract(state(0).params)
    for path in (two / "20", two, two.parent):
        found = load_params(str(path), params, lambda line: None)
        assert np.array_equal(found["embed"]["embedding"], state(20).params["embed"]["embedding"])
    with pytest.raises(Unusable, match=r"float32\[3, 4\] in the checkpoint, float32\[3, 8\] here"):
        load_params(str(two / "20"), abstract(state(0, width=8).params), lambda line: None)
    with pytest.raises(Unusable, match="holds no checkpoint"):
        load_params(str(tmp_path / "nowhere"), params)
    flip(two / "20" / "state" / "_METADATA", random.Random(0))
    with pytest.raises(Unusable, match="was altered"):
        load_params(str(two / "20"), params)


def test_an_address_that_nothing_reaches_is_refused():
    with pytest.raises(Unusable, match="abc://x: cannot be reached"):
        checkpoint.place("abc://x")


def test_minutes_are_counted_from_the_last_save():
    now = [0.0]
    timer = saving.Timer(2.0, every=1, clock=lambda: now[0])
    assert not timer.due(1)
    now[0] = 119.0
    assert not timer.due(2)
    now[0] = 120.0
    assert timer.due(3)
    timer.restart()
    assert not timer.due(4)
    assert not saving.Timer(0.0, every=1, clock=lambda: 1e9).due(5)
