"""Prompts in a shared folder: what one engine stores another restores, whatever its layout."""

import os
import stat

import pytest
import torch
from families import config

from spectrumkv_hf.engines.blocks import spec_of
from spectrumkv_hf.engines.layouts import LAYOUTS, PER_TOKEN, VLLM_CPU, split_blocks
from spectrumkv_hf.engines.prompt_store import PromptStore
from spectrumkv_hf.engines.settings import ModelShape, block_codec, model_shape
from spectrumkv_hf.wire.frame import WireError
from spectrumkv_kernels import Rotary

LLAMA = model_shape(config("llama"))
TOKENS = list(range(24))


def cache(seed=0, dtype=torch.float32):
    """An engine's cache of one layer: 5 blocks, 2 KV heads, 8 tokens in a block, head_dim 16."""
    return torch.randn(5, 2, 8, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def store(folder, layout=PER_TOKEN, policy="uniform_int8", budget=0.5, shape=LLAMA, **options):
    return PromptStore(folder, block_codec(shape, policy, budget, **options), layout)


def saved(ours, layers=2):
    name = ours.name(TOKENS)
    for layer in range(layers):
        assert ours.save(name, layer, cache(layer)[[3, 0, 2]]) > 0
    ours.commit(name)
    return name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact(tmp_path, layout):
    ours = store(tmp_path, layout, "fp16", 1.0)
    name = saved(ours)
    other = store(tmp_path, layout, "fp16", 1.0)
    for layer in range(2):
        assert torch.equal(other.load(name, layer, cache(), 3), cache(layer)[[3, 0, 2]])


def test_gpu_to_cpu(tmp_path):
    """Blobs know no layout: tokens arrive where the other engine has them."""
    name = saved(store(tmp_path, PER_TOKEN, "fp16", 1.0))
    there = store(tmp_path, VLLM_CPU, "fp16", 1.0).load(name, 1, cache(), 3)
    for ours, theirs in zip(split_blocks(there, VLLM_CPU), split_blocks(cache(1)[[3, 0, 2]], PER_TOKEN), strict=True):
        assert torch.equal(ours, theirs)


def test_each_layer_has_its_rotation(tmp_path):
    shape = ModelShape(rotaries=(Rotary((1.0, 0.1)), Rotary((0.5, 0.05))))
    ours = store(tmp_path, shape=shape, policy="uniform_int4", budget=0.25)
    name = saved(ours)
    for layer in range(2):
        part = tuple(side[None] for side in split_blocks(cache(layer)[[3, 0, 2]], PER_TOKEN))
        single = block_codec(ModelShape(rotaries=(shape.rotaries[layer],)), "uniform_int4", 0.25)
        expected = single.restore(single.compress([part]), [spec_of(part)])[0]
        restored = split_blocks(ours.load(name, layer, cache(), 3), PER_TOKEN)
        assert torch.equal(restored[0], expected[0][0])
        assert torch.equal(restored[1], expected[1][0])


def test_rotations_are_found_by_the_models_index(tmp_path):
    """In a hybrid the layers with keys and values are not the first ones."""
    rotary = Rotary((1.0, 0.1)), Rotary((0.5, 0.05))
    shape = ModelShape(rotaries=rotary, layers=(1, 3))
    ours = PromptStore(tmp_path, block_codec(shape, "uniform_int4", 0.25), PER_TOKEN, shape.layers)
    found = [ours._codec(layer).rotaries for layer in range(5)]
    assert found == [(Rotary(),), rotary[:1], (Rotary(),), rotary[1:], (Rotary(),)]
    assert model_shape(config("qwen3_next")).layers == (1,)


def test_visible_when_committed(tmp_path):
    ours, other = store(tmp_path), store(tmp_path)
    name = ours.name(TOKENS)
    ours.save(name, 0, cache()[:3])
    assert name not in other
    ours.commit(name)
    assert name in other


def test_stored_twice(tmp_path):
    ours, other = store(tmp_path), store(tmp_path)
    name = ours.name(TOKENS)
    for each in (ours, other):
        each.save(name, 0, cache()[:3])
    ours.commit(name)
    other.commit(name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_discard(tmp_path):
    ours = store(tmp_path)
    name = saved(ours)
    ours.save(name, 0, cache()[:3])
    ours.discard(name)
    assert name not in ours
    assert not list(tmp_path.iterdir())


def test_names(tmp_path):
    """Another prompt, tenant, policy or model has another name; the layout has not."""
    ours = store(tmp_path)
    others = [
        ours.name(TOKENS[:-1]),
        ours.name(TOKENS, "tenant"),
        ours.name(TOKENS, "", "tenant"),
        store(tmp_path, "per_token", "uniform_int4", 0.25).name(TOKENS),
        store(tmp_path, shape=model_shape(config("qwen2"))).name(TOKENS),
        store(tmp_path, identity="other weights").name(TOKENS),
    ]
    assert len({ours.name(TOKENS), *others}) == 7
    assert store(tmp_path, VLLM_CPU).name(TOKENS) == ours.name(TOKENS)


def test_folder_and_files_are_for_their_user(tmp_path):
    """Whatever the umask; where the owner lets a group in, for that too."""
    for place, folders, files in ((tmp_path / "made", 0o700, 0o600), (tmp_path / "shared", 0o770, 0o660)):
        if folders != 0o700:
            place.mkdir()
            place.chmod(folders)
        old = os.umask(0o022)
        try:
            name = saved(store(place))
        finally:
            os.umask(old)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (place, place / name)}
        assert modes == {folders}
        assert {stat.S_IMODE(path.stat().st_mode) for path in (place / name).iterdir()} == {files}


def test_folder_of_everyone(tmp_path):
    tmp_path.chmod(0o1777)
    with pytest.raises(PermissionError, match="everyone can write into"):
        store(tmp_path)


class TestDamage:
    @pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.with_name("other"))])
    def test_what_is_no_file(self, tmp_path, plant):
        ours = store(tmp_path)
        name = saved(ours)
        path = next((tmp_path / name).iterdir())
        path.rename(path.with_name("other"))
        plant(path)
        with pytest.raises(OSError):
            ours.load(name, int(path.stem[-4:]), cache(), 3)

    def test_long(self, tmp_path):
        """It is not read."""
        ours = store(tmp_path)
        name = saved(ours)
        path = next((tmp_path / name).iterdir())
        os.truncate(path, 1 << 40)
        with pytest.raises(WireError, match="1099511627776 bytes, expected"):
            ours.load(name, int(path.stem[-4:]), cache(), 3)

    @pytest.mark.parametrize("layer", [0, 1])
    def test_flipped_byte(self, tmp_path, layer):
        ours = store(tmp_path)
        name = saved(ours)
        path = sorted((tmp_path / name).iterdir())[layer]
        data = bytearray(path.read_bytes())
        data[-100] ^= 4
        path.write_bytes(data)
        with pytest.raises(WireError, match="digest"):
            ours.load(name, layer, cache(), 3)
        ours.load(name, 1 - layer, cache(), 3)

    @pytest.mark.parametrize("size", [0, 64, -1])
    def test_short(self, tmp_path, size):
        ours = store(tmp_path)
        name = saved(ours)
        path = next((tmp_path / name).iterdir())
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(WireError):
            ours.load(name, int(path.stem[-4:]), cache(), 3)

    def test_missing(self, tmp_path):
        ours = store(tmp_path)
        with pytest.raises(OSError):
            ours.load(saved(ours), 2, cache(), 3)

    def test_swapped_layers(self, tmp_path):
        ours = store(tmp_path)
        name = saved(ours)
        first, second = sorted((tmp_path / name).iterdir())
        second.write_bytes(first.read_bytes())
        with pytest.raises(WireError, match="'key'"):
            ours.load(name, 1, cache(), 3)

    @pytest.mark.parametrize(
        ("like", "blocks"),
        [(cache(), 2), (cache()[:, :1], 3), (cache(dtype=torch.bfloat16), 3)],
        ids=["blocks", "heads", "dtype"],
    )
    def test_other_shapes(self, tmp_path, like, blocks):
        ours = store(tmp_path)
        with pytest.raises(WireError, match="bytes, expected .* or of other tokens, heads or dtype|'parts'"):
            ours.load(saved(ours), 0, like, blocks)
