"""Blobs of exactly known size: what they restore, what they refuse."""

from dataclasses import replace

import pytest
import torch
from every_tier import EveryTier, EveryTierOfTwoBitsOrMore, all_in
from families import config

from spectrumkv_hf import POLICIES, get_policy
from spectrumkv_hf.engines import blocks
from spectrumkv_hf.engines.blocks import BlockCodec, KVSpec, RawSpec, spec_of
from spectrumkv_hf.engines.settings import block_codec, model_shape
from spectrumkv_hf.policy import FP16, INT4, INT8, TIERS
from spectrumkv_hf.policy.importance import kv_norm
from spectrumkv_hf.wire.frame import WireError
from spectrumkv_kernels import CODECS, Rotary, dequantize
from spectrumkv_kernels.codec.frame import key_mean
from spectrumkv_kernels.codec.quantize import quantize
from spectrumkv_kernels.codec.reference import encode
from spectrumkv_kernels.rotation.hadamard import hadamard
from spectrumkv_kernels.wire.tier_map import pack_map

SHAPE = (3, 2, 37, 16)  # layers, kv_heads, tokens, head_dim
LLAMA = model_shape(config("llama"))


def kv(shape=SHAPE, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, *shape, generator=generator)
    return (keys + 3).to(dtype), values.to(dtype)


def codec(policy="sink_protect", budget=0.3, **options):
    return block_codec(LLAMA, policy, budget, **options)


def every_tier(name="spectrum2", scope="head"):
    kind = EveryTier if CODECS[name].least_bits == 1 else EveryTierOfTwoBitsOrMore
    return BlockCodec(kind(importance="kv_norm", recent_window=0, scope=scope), CODECS[name], LLAMA.rotaries)


class TestSize:
    @pytest.mark.parametrize("policy", ["fp16", "greedy", "sink_protect", "balanced", "uniform_int8", "uniform_int4"])
    @pytest.mark.parametrize("name", CODECS)
    def test_is_known_beforehand(self, policy, name):
        ours = codec(policy, POLICIES[policy]().budget, codec=name)
        parts = [kv(), torch.arange(7, dtype=torch.int32), kv((1, 4, 3, 32), torch.bfloat16)]
        specs = [spec_of(part) for part in parts]
        assert specs[1] == RawSpec(28)
        assert len(ours.compress(parts, key="some name")) == ours.size(specs)

    @pytest.mark.parametrize("scope", ["head", "layer", "token"])
    @pytest.mark.parametrize("name", CODECS)
    def test_with_every_tier(self, scope, name):
        ours = every_tier(name, scope)
        parts = [kv(), kv((1, 4, 30, 32), torch.bfloat16)]
        specs = [spec_of(part) for part in parts]
        blob = ours.compress(parts, key="some name")
        assert len(blob) == ours.size(specs)
        for (k, v), part in zip(ours.restore(blob, specs, "some name"), parts, strict=True):
            for side, given in ((k, part[0]), (v, part[1])):
                assert side.dtype == given.dtype
                error = (side - given).float().square().mean(-1).sqrt()
                assert (error == 0).any() and error.max() < {"absmax": 3, "spectrum": 4, "spectrum2": 2.5}[name]
                assert (error < 1.5).float().mean() > (0.4 if name == "absmax" else 0.59)  # what has 2 bits or more

    def test_every_tier_by_hand(self):
        """6 tiers of 240 tokens: a byte of scale a vector, the frame, and 4 bits a token for the map."""
        layers, heads, tokens, dim = 2, 2, 240, 64
        spec = KVSpec(layers, heads, tokens, dim, torch.float16)
        counts = EveryTier().counts(tokens)
        assert list(counts.values()) == [10, 20, 30, 40, 50, 90]
        row = 2 * (10 * 2 * dim + sum(counts[t] * (dim * t.bits // 8 + 1) for t in TIERS[1:-1])) + 4 * (3 * dim + 1)
        tensors = layers * heads * (row + tokens // 2)
        size = every_tier("spectrum2", "head").size([spec])
        assert tensors <= size < tensors + 3072

    def test_does_not_follow_the_contents(self):
        ours = codec()
        like = [kv(seed=seed) for seed in range(3)] + [(torch.zeros(SHAPE), torch.zeros(SHAPE))]
        assert {len(ours.compress([part], key=str(i) * i)) for i, part in enumerate(like)} == {
            ours.size([spec_of(like[0])])
        }

    @pytest.mark.parametrize("scope", ["head", "layer", "token"])
    def test_bytes_by_hand(self, scope):
        """256 tokens at b=.3: 4 FP16, 50 INT8, 202 INT4; two bytes of scale and two of zero a vector."""
        layers, heads, tokens, dim = 2, 2, 256, 64
        spec = KVSpec(layers, heads, tokens, dim, torch.float16)
        counts = codec().policy.counts(tokens)
        assert counts == {FP16: 4, INT8: 50, INT4: 202}
        row = 2 * (4 * 2 * dim + 50 * (dim + 4) + 202 * (dim // 2 + 4)) + 4 * dim
        maps = {"head": layers * heads, "layer": layers, "token": layers}[scope] * tokens // 4
        tensors = layers * heads * row + maps
        size = codec(scope=scope).size([spec])
        assert tensors <= size < tensors + 2048


class TestContents:
    def test_fp16_policy_is_exact(self):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            part = kv(dtype=dtype)
            ours = codec("fp16", 1.0)
            restored = ours.restore(ours.compress([part]), [spec_of(part)])[0]
            assert torch.equal(restored[0], part[0])
            assert torch.equal(restored[1], part[1])
            assert restored[0].dtype == dtype

    def test_copies_are_exact(self):
        raw = torch.randn(3, 5)
        part = kv()
        ours = codec()
        restored = ours.restore(ours.compress([raw, part]), [RawSpec(60), spec_of(part)])
        assert torch.equal(restored[0].view(torch.float32).view(3, 5), raw)

    def test_uniform_int8_by_the_kernels(self):
        """The whole of it again, from the codec's parts: centred, rotated, rounded."""
        keys, values = kv()
        ours = codec("uniform_int8", 0.5, sinks=0)
        ((k, v),) = ours.restore(ours.compress([(keys, values)]), [spec_of((keys, values))])
        rotary = LLAMA.rotaries[0]
        positions = torch.arange(SHAPE[2])
        mean = key_mean(keys, positions, rotary)
        placed = positions.int().expand(SHAPE[:3])
        coded = encode(keys, values, placed, 8, CODECS["spectrum"], mean, rotary)
        assert torch.equal(k, hadamard(dequantize(coded[0], 8)) + rotary.rotate(mean.unsqueeze(-2), placed))
        assert torch.equal(v, hadamard(dequantize(quantize(hadamard(values), 8), 8)))
        assert rotary.inv_freq

    def test_tiers_by_norm(self):
        """Sinks exact; of the others those of the highest value norm over key norm at INT8."""
        keys, values = kv()
        ours = codec(budget=0.35)
        ((k, v),) = ours.restore(ours.compress([(keys, values)]), [spec_of((keys, values))])
        assert torch.equal(k[:, :, :4], keys[:, :, :4])
        error = (v - values).norm(dim=-1)[..., 4:]
        int8 = ours.policy.counts(SHAPE[2])[INT8]
        best = kv_norm(keys, values)[..., 4:].topk(int8).indices
        assert (error.gather(-1, best) < 0.03).all()
        rest = error.scatter(-1, best, torch.inf)
        assert (rest > 0.05).all()
        assert int8 == 13

    @pytest.mark.parametrize("scope", ["layer", "token"])
    def test_scopes(self, scope):
        keys, values = kv()
        ours = codec(scope=scope, budget=0.4)
        ((k, _),) = ours.restore(ours.compress([(keys, values)]), [spec_of((keys, values))])
        int4 = (k - keys).norm(dim=-1) > 0.15
        assert (int4 == int4[:, :1]).all()
        assert bool((int4 == int4[:1]).all()) == (scope == "token")
        assert int(int4.sum(-1).max()) == ours.policy.counts(SHAPE[2])[INT4]

    def test_rotation_of_each_layer(self):
        """A model with two kinds of RoPE: as each layer alone with its own."""
        kinds = (Rotary((1.0, 0.1)), Rotary((1.0, 0.1)), Rotary((0.5, 0.05)))
        part = kv()
        both = replace(codec(), rotaries=kinds)
        ((k, v),) = both.restore(both.compress([part]), [spec_of(part)])
        for layer, rotary in enumerate(kinds):
            alone = replace(both, rotaries=(rotary,))
            one = tuple(side[layer : layer + 1] for side in part)
            ((k1, v1),) = alone.restore(alone.compress([one]), [spec_of(one)])
            assert torch.equal(k[layer], k1[0])
            assert torch.equal(v[layer], v1[0])

    def test_centring_follows_the_rotation(self):
        """Keys that are one vector, rotated: with the rotation nothing is left to round."""
        rotary = LLAMA.rotaries[0]
        keys = rotary.rotate(torch.full((1, 1, 64, 16), 5.0), torch.arange(64)).contiguous()
        part = keys, torch.randn(1, 1, 64, 16)

        def error(ours):
            ((k, _),) = ours.restore(ours.compress([part]), [spec_of(part)])
            return float((k - keys).abs().max())

        aware = codec("uniform_int4", 0.25)
        assert error(aware) < 1e-3
        assert error(replace(aware, rotaries=(Rotary(),))) > 0.1

    def test_a_shift_of_positions_is_absorbed(self):
        """A chunk does not know where it begins."""
        rotary = LLAMA.rotaries[0]
        flat = torch.randn(1, 1, 64, 16) + 5
        ours = codec("uniform_int4", 0.25)
        errors = []
        for start in (0, 5000):
            keys = rotary.rotate(flat, torch.arange(start, start + 64)).contiguous()
            ((k, _),) = ours.restore(ours.compress([(keys, keys)]), [spec_of((keys, keys))])
            errors.append(float((k - keys).norm()))
        assert errors[1] == pytest.approx(errors[0], rel=0.2)

    @pytest.mark.parametrize(
        ("rotaries", "shape"), [((Rotary((1.0, 0.5)),) * 2, (2, 1, 9, 2)), ((Rotary((1.0,)), Rotary((2.0,))), SHAPE)]
    )
    def test_rotations_that_do_not_fit(self, rotaries, shape):
        """Of too many channels, or of another number of layers: the plain mean."""
        part = kv(shape)
        restored = [
            ours.restore(ours.compress([part]), [spec_of(part)])[0]
            for ours in (replace(codec(), rotaries=rotaries), replace(codec(), rotaries=(Rotary(),)))
        ]
        assert torch.equal(restored[0][0], restored[1][0])

    @pytest.mark.parametrize("tokens", [1, 3, 4, 5])
    def test_few_tokens(self, tokens):
        part = kv((2, 2, tokens, 16))
        ours = codec()
        ((k, _),) = ours.restore(ours.compress([part]), [spec_of(part)])
        assert torch.equal(k[:, :, :4], part[0][:, :, :4])
        assert (k - part[0]).abs().max() < 0.6

    def test_into_a_buffer(self):
        part = kv()
        ours = codec()
        size = ours.size([spec_of(part)])
        out = torch.empty(size + 64, dtype=torch.uint8)
        ours.compress([part], out=out[:size])
        assert torch.equal(out[:size], ours.compress([part]))
        with pytest.raises(ValueError, match=f"out is {size} bytes"):
            ours.compress([part], out=out)


@pytest.fixture(scope="module")
def blob():
    return codec().compress([kv()], "key")


class TestRefusals:
    specs = [spec_of(kv())]

    def test_every_flipped_byte(self, blob):
        """Of the header and the JSON each, of the rest some."""
        data = blob.numpy().copy()
        for at in [*range(1500), *range(1500, len(data), 97), len(data) - 1]:
            data[at] ^= 16
            with pytest.raises(WireError):
                codec().restore(bytes(data), self.specs, "key")
            data[at] ^= 16
        codec().restore(bytes(data), self.specs, "key")

    @pytest.mark.parametrize("size", [0, 10, 64, 1000, -64, -1])
    def test_short(self, blob, size):
        with pytest.raises(WireError):
            codec().restore(blob.numpy().tobytes()[:size], self.specs, "key")

    def test_long(self, blob):
        with pytest.raises(WireError, match="expected BLOCKS that fill it"):
            codec().restore(blob.numpy().tobytes() + bytes(64), self.specs, "key")

    def test_zeros(self, blob):
        """What a sparse or preallocated file reads as."""
        with pytest.raises(WireError, match="no frame"):
            codec().restore(bytes(len(blob)), self.specs, "key")

    def test_another_key(self, blob):
        with pytest.raises(WireError, match="'key'"):
            codec().restore(blob, self.specs, "other")

    @pytest.mark.parametrize(
        "other",
        [
            block_codec(model_shape(config("qwen2")), "sink_protect", 0.3),
            block_codec(replace(LLAMA, rotaries=(Rotary(),)), "sink_protect", 0.3),
            codec(identity="revision 2"),
            codec(budget=0.301),
            codec(codec="absmax"),
            codec(sinks=5),
        ],
        ids=["model", "rotation", "revision", "budget", "codec", "sinks"],
    )
    def test_other_settings(self, blob, other):
        with pytest.raises(WireError, match="'settings'"):
            other.restore(blob, self.specs, "key")

    @pytest.mark.parametrize(
        "spec",
        [
            KVSpec(3, 2, 37, 16, torch.bfloat16),
            KVSpec(2, 3, 37, 16, torch.float32),
            KVSpec(3, 2, 36, 16, torch.float32),
            RawSpec(28416),
        ],
        ids=str,
    )
    def test_other_shapes(self, blob, spec):
        with pytest.raises(WireError, match="'parts'"):
            codec().restore(blob, [spec], "key")

    def test_another_frame(self):
        from wire_forge import golden_cache

        frame = golden_cache().serialize()
        with pytest.raises(WireError, match="a frame of kind HEADER"):
            codec().restore(frame, self.specs)

    def test_no_cache_takes_it(self, blob):
        from wire_forge import CONFIG

        from spectrumkv_hf import SpectrumCache

        with pytest.raises(WireError, match="BLOCKS"):
            SpectrumCache.deserialize(blob, config=CONFIG)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("side", [0, 1])
    @pytest.mark.parametrize("name", CODECS)
    def test_not_finite(self, bad, side, name):
        part = kv()
        part[side][1, 1, 20, 3] = bad
        for ours in (codec(codec=name), every_tier(name)):
            with pytest.raises(ValueError, match="NaN or infinity"):
                ours.compress([part])
        exact = codec("fp16", 1.0)
        restored = exact.restore(exact.compress([part]), [spec_of(part)])[0]
        assert torch.equal(restored[side].isfinite(), part[side].isfinite())

    @pytest.mark.parametrize("tier", TIERS[1:-1], ids=lambda tier: tier.name)
    @pytest.mark.parametrize("side", [0, 1])
    def test_too_far_from_the_others(self, tier, side):
        """No scale of `spectrum2` is large enough for a vector of 100 times the size of 599 others."""
        part = kv((1, 1, 600, 16))
        part[side][0, 0, 20] *= 100
        ours = BlockCodec(replace(all_in(tier), importance="kv_norm", recent_window=0), CODECS["spectrum2"])
        with pytest.raises(ValueError, match="or numbers beyond the scales of their codes"):
            ours.compress([part])

    def test_channels_that_codes_do_not_fill(self):
        with pytest.raises(ValueError, match="3-bit codes need a head_dim divisible by 8, got 12"):
            every_tier().compress([kv((1, 1, 37, 12))])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"importance": "attention"}, "an engine shows no queries"),
            ({"policy": "two_tier", "budget": 0.3}, "drops tokens"),
            ({"policy": "drop_window", "budget": 0.3}, "drops tokens"),
            ({"recent_window": 64}, "recent_window is 0"),
            ({"codec": "zip"}, "unknown codec 'zip'"),
            ({"policy": "best"}, "unknown policy 'best'"),
        ],
        ids=str,
    )
    def test_settings(self, options, message):
        with pytest.raises(ValueError, match=message):
            codec(**options)

    @pytest.mark.parametrize(
        ("forge", "message"),
        [
            (lambda packed: packed ^ 1, "other counts than its policy"),
            (lambda packed: packed | 192, "bits after the tier map's last token"),
        ],
        ids=["counts", "padding"],
    )
    def test_forged_map(self, monkeypatch, forge, message):
        """Under a right checksum."""
        monkeypatch.setattr(blocks, "pack_map", lambda *codes: forge(pack_map(*codes)))
        with pytest.raises(WireError, match=message):
            codec().restore(codec().compress([kv()]), self.specs)

    @pytest.mark.parametrize(
        ("forge", "message"),
        [
            (lambda packed: packed ^ 1, "other counts than its policy"),
            (lambda packed: packed | 0x0E, "other counts than its policy"),
            (lambda packed: packed | 0xF0, "bits after the tier map's last token"),
        ],
        ids=["counts", "no tier", "padding"],
    )
    def test_forged_map_of_every_tier(self, monkeypatch, forge, message):
        monkeypatch.setattr(blocks, "pack_map", lambda *codes: forge(pack_map(*codes)))
        with pytest.raises(WireError, match=message):
            every_tier().restore(every_tier().compress([kv()]), self.specs)

    @pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, 1e30])
    def test_forged_frame(self, monkeypatch, value):
        """The scale of values, under a right checksum."""
        encode = BlockCodec._encode

        def forged(self, *args):
            tensors = encode(self, *args)
            tensors["mean"][0, 0, -1] = value
            return tensors

        monkeypatch.setattr(BlockCodec, "_encode", forged)
        with pytest.raises(WireError, match="0.0.mean' has (NaN|scales that are not from)"):
            every_tier().restore(every_tier().compress([kv()]), self.specs)

    def test_unfit_parts(self):
        keys, values = kv()
        for part in [(keys, values[:1]), (keys[0], values[0]), (keys, values.half()), (keys.int(), values.int())]:
            with pytest.raises(ValueError, match="keys and values are"):
                codec().compress([part])

    def test_a_policy_is_a_policy(self):
        with pytest.raises(ValueError, match="an engine shows no queries"):
            BlockCodec(get_policy("greedy", 0.5), CODECS["spectrum"])


class TestModelShape:
    def test_llama(self):
        assert (LLAMA.kv_heads, LLAMA.head_dim) == (2, 16)
        assert len(LLAMA.rotaries) == 2
        assert LLAMA.identity["model_type"] == "llama"

    def test_two_kinds_of_rotation(self):
        assert len(set(model_shape(config("gemma3")).rotaries)) == 2

    def test_layers_without_keys(self):
        assert len(model_shape(config("qwen3_next")).rotaries) == 1

    def test_unknown_model(self):
        shape = model_shape(None)
        assert shape.kv_heads is None
        assert shape.rotaries == (Rotary(),)

    def test_a_folder(self, tmp_path):
        config("llama").save_pretrained(tmp_path)
        assert model_shape(str(tmp_path)).rotaries == LLAMA.rotaries
