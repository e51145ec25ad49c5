"""Calibration: a real pass, a real failure, and the policy that follows; the model is left as it was."""

import copy
import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import FAMILIES, config, model, prompt
from outliers import healthy, with_outliers

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.policy import FP16, INT4, INT8, Adaptive, Calibrated, SinkProtect
from spectrumkv_hf.probe import CalibrationProbe, PaperProbe, PlanProbe, ProbeError, auto, paper, probe_model
from spectrumkv_hf.probe.calibration import LADDER
from spectrumkv_hf.probe.divergence import mean_kl
from spectrumkv_hf.probe.measurement import Coding, Measurement
from spectrumkv_hf.probe.verdict import CalibrationVerdict, TierReport
from spectrumkv_hf.tiered.cache import TieredCache
from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_kernels import DEFAULT_CODEC

pytestmark = pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")

SHORT = {"context": 200, "continuation": 40}


@pytest.fixture(autouse=True)
def own_storage(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(auto, "_remembered", {})


def calibrated(m, **settings):
    return probe_model(m, None, CalibrationProbe(**{**SHORT, **settings}))


class Characters:
    """A tokenizer of characters."""

    chat_template = None

    def __call__(self, text, return_tensors=None, **_):
        ids = [ord(character) % 90 + 3 for character in text]
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)


def verdict(int8_unsafe=(), int4_unsafe=(), plain_budget=0.25, tiered=(0, 1, 2, 3)):
    """A verdict with given findings."""

    def report(tier, unsafe):
        return TierReport(tier=tier, kl=0.0, kl_keys=0.0, kl_values=0.0, layers=(), unsafe=unsafe, kl_floored=0.0)

    return CalibrationVerdict(
        codec="spectrum", loss=0.01, context=512, continuation=128, text="passage", control=0.0, tiered=tiered,
        int8=report("int8", int8_unsafe), int4=report("int4", int4_unsafe), plain_budget=plain_budget, plain_kl=0.0,
        seconds=1.0,
    )  # fmt: skip


class TestOutliers:
    """Keys with huge constants that change nothing: they cost nothing where keys are centred, and much under absmax."""

    def test_the_function_is_the_same_to_the_last_bit(self):
        m, other = healthy(), with_outliers(healthy(), layer=1)
        assert not torch.equal(m.model.layers[1].self_attn.k_proj.bias, other.model.layers[1].self_attn.k_proj.bias)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            with torch.no_grad():
                assert torch.equal(m.to(dtype)(prompt(240)).logits, other.to(dtype)(prompt(240)).logits)

    def test_our_codec_passes(self):
        plain, other = calibrated(healthy()), calibrated(with_outliers(healthy(), layer=1))
        for found in (plain, other):
            assert found.control == 0
            assert found.safe == ("fp16", "int8", "int4")
            assert found.cheapest == SinkProtect(budget=0.25)
        assert other.int4.kl == pytest.approx(plain.int4.kl, rel=0.1)

    def test_absmax_fails_in_the_layer_that_has_them(self):
        assert calibrated(healthy(), codec="absmax").safe == ("fp16", "int8", "int4")
        found = calibrated(with_outliers(healthy(), layer=1), codec="absmax")
        assert found.safe == ("fp16",)
        assert found.int8.unsafe == found.int4.unsafe == (1,)
        assert found.int4.kl_keys > 5 * found.loss / 4 > found.loss > 5 * found.int4.kl_values
        assert found.int8.kl_floored < found.loss < found.int8.kl
        assert found.int4.kl_floored < found.loss < found.int4.kl
        errors = {error.layer: error.keys for error in found.int8.layers}
        assert errors[1] > 10 * max(errors[0], errors[2])
        assert found.cheapest == SinkProtect(budget=0.25, floors={1: "fp16"})
        assert found.cost(found.cheapest) == pytest.approx(0.5)

    def test_what_it_names_meets_the_loss(self):
        """Measured anew, by a real prefill and a real cache."""
        m = with_outliers(healthy(), layer=1)
        found = calibrated(m, codec="absmax")
        ids = CalibrationProbe(**SHORT).inputs(m, None)

        def logits(policy):
            cache = SpectrumCache(m.config, policy, codec="absmax")
            with torch.no_grad():
                m(ids[:, :200], **cache_argument(cache))
                return m(ids[:, 200:], **cache_argument(cache)).logits[0]

        exact = logits("fp16")
        floored, plain = (
            mean_kl(exact, logits(SinkProtect(budget=0.25, floors=floors, recent_window=0)))
            for floors in (found.cheapest.floors, ())
        )
        assert floored < found.loss < plain
        assert plain == pytest.approx(found.int4.kl, rel=1e-3)
        assert floored == pytest.approx(found.int4.kl_floored, rel=1e-3)

    def test_from_model_takes_what_the_verdict_names(self, caplog):
        m = with_outliers(healthy(), layer=1)
        options = {"budget": 0.3, "recent_window": 8}
        cache = SpectrumCache.from_model(m, codec="absmax", probe=CalibrationProbe(codec="absmax", **SHORT), **options)
        assert cache.policy == SinkProtect(floors={1: "fp16"}, **options)
        assert cache.codec.name == "absmax"
        assert "b=0.3 would cost this model more than 0.01 nats" in caplog.text
        with torch.no_grad():
            m(prompt(300), **cache_argument(cache))
        assert [INT4 in layer.store.arenas for layer in cache.layers] == [True, False, True]
        caplog.clear()
        cache = SpectrumCache.from_model(m, probe=CalibrationProbe(**SHORT), **options)
        assert cache.policy == SinkProtect(**options)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class TestMeasurement:
    @pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
    def test_uniform_tiers_equal_a_tiered_cache(self, codec):
        m, ids = healthy(), prompt(240)
        with torch.no_grad():
            measured = Measurement(m, ids, 200, codec)
            for tier, budget in ((INT8, 0.5), (INT4, 0.25)):
                recoded = measured.kl(dict.fromkeys(measured.tiered, Coding(tier, tier)))
                assert recoded == pytest.approx(measured.policy_kl(budget), rel=1e-3)

    def test_keys_and_values_apart(self):
        """Coded values leave the keys as they are, and the other way round."""
        with torch.no_grad():
            measured = Measurement(healthy(), prompt(240), 200, "spectrum")
            kl = {
                (k, v): measured.kl(dict.fromkeys(measured.tiered, Coding(k, v)))
                for k in (FP16, INT4)
                for v in (FP16, INT4)
            }
        assert kl[FP16, FP16] == 0
        assert 0 < max(kl[INT4, FP16], kl[FP16, INT4]) < kl[INT4, INT4]
        assert kl[INT4, FP16] != kl[FP16, INT4]

    @pytest.mark.parametrize("codec", ["spectrum", "spectrum2"])
    def test_errors_are_those_of_the_attention_output(self, codec):
        """Against attention written out, on the keys, values and queries of a layer."""
        m, ids, n = healthy(), prompt(240), 32
        with torch.no_grad():
            measured = Measurement(m, ids, 200, codec)
            errors = measured.attention_errors((INT4,))[INT4]
            cache = copy.deepcopy(measured._cache)
            seen = []
            cache.layers[2].on_attention.add(seen.append)
            measured._continued(cache)
            keys, values = cache.layers[2].keys, cache.layers[2].values
            coded = SpectrumCache(m.config, SinkProtect(budget=0.25, recent_window=0), codec=codec)
            m(ids[:, :200], **cache_argument(coded))
            coded_keys, coded_values = keys.clone(), values.clone()
            coded_keys[:, :, :200], coded_values[:, :, :200] = coded.layers[2].keys, coded.layers[2].values

        def attention(k, v):
            q = seen[0].query[:, :, -n:].double()
            k, v = (t.double().repeat_interleave(2, dim=1) for t in (k, v))
            scores = q @ k.transpose(2, 3) * seen[0].scale
            visible = torch.ones(n, 240, dtype=torch.bool).tril(240 - n)
            return scores.masked_fill(~visible, -math.inf).softmax(-1) @ v

        exact = attention(keys, values)
        for side, pair in (("keys", (coded_keys, values)), ("values", (keys, coded_values))):
            expected = ((attention(*pair) - exact).norm() / exact.norm()).item()
            assert getattr(errors[2], side) == pytest.approx(expected, rel=1e-3)
            assert expected > 1e-3

    @pytest.mark.parametrize("family", FAMILIES)
    def test_families(self, family):
        sizes = {"sliding_window": 150} if "sliding_window" in FAMILIES[family][1] else {}
        m = model(family, **sizes)
        if family == "deepseek_v3":
            with pytest.raises(ProbeError, match="no layer of the model is tiered:\n.*MLA latents"):
                calibrated(m)
            return
        found = calibrated(m)
        layers = SpectrumCache(m.config, recent_window=0).layers
        assert found.tiered == tuple(i for i, layer in enumerate(layers) if isinstance(layer, SpectrumLayer))
        assert found.control == 0
        assert 0 < found.int8.kl < found.int4.kl
        for report in (found.int8, found.int4):
            assert tuple(error.layer for error in report.layers) == found.tiered
            assert all(0 < value < 2 for error in report.layers for value in (error.keys, error.values))
        assert all(a.keys < b.keys for a, b in zip(found.int8.layers, found.int4.layers, strict=True))

    def test_attention_that_can_not_be_watched(self):
        """BLOOM computes attention by itself: its layers have no errors, but a KL and floors."""
        settings = {"vocab_size": 97, "hidden_size": 64, "n_layer": 3, "n_head": 4, "pad_token_id": 0}
        torch.manual_seed(0)
        m = transformers.BloomForCausalLM(transformers.BloomConfig(**settings)).eval()
        with torch.no_grad():
            for parameter in m.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8.0)  # else attention hardly matters, and the KL is rounding
        found = calibrated(m, loss=1e-9)
        assert found.int4.layers == () and found.tiered == (0, 1, 2)
        assert found.int4.kl > found.int8.kl > 0 and found.int4.unsafe

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype):
        found = calibrated(copy.deepcopy(healthy()).to(dtype))
        assert found.control == 0 and 0 < found.int8.kl < found.int4.kl

    def test_no_loss_can_be_met_but_none(self):
        found = calibrated(healthy(), loss=1e-12)
        assert found.int8.unsafe and found.int8.kl_floored <= 1e-12
        assert found.cheapest.budget == 1 or dict(found.cheapest.floors) == dict.fromkeys(found.tiered, "fp16")

    @pytest.mark.parametrize("loss", [3e-5, 3e-4, 1e-3])
    def test_the_ladder_and_the_floors_are_measured(self, loss):
        m = healthy()
        found = calibrated(m, loss=loss, codec="spectrum")
        assert found.int4.kl > loss >= found.int4.kl_floored and found.int4.unsafe
        assert found.plain_budget in LADDER and found.plain_kl <= loss
        with torch.no_grad():
            measured = Measurement(m, CalibrationProbe(**SHORT).inputs(m, None), 200, "spectrum")
            if 0.25 < found.plain_budget <= 0.5:
                assert measured.policy_kl(found.plain_budget) == pytest.approx(found.plain_kl, rel=1e-3)
                below = LADDER[LADDER.index(found.plain_budget) - 1]
                assert measured.policy_kl(below) > loss
            codings = {i: Coding(*[INT8 if i in found.int4.unsafe else INT4] * 2) for i in found.tiered}
            assert measured.kl(codings) == pytest.approx(found.int4.kl_floored, rel=1e-3)

    def test_a_model_of_nan(self):
        m = copy.deepcopy(healthy())
        with torch.no_grad():
            m.lm_head.weight[0, 0] = torch.nan
        with pytest.raises(ProbeError, match="differ by nan"):
            calibrated(m)


class TestPolicy:
    def test_all_safe(self):
        assert verdict().safe == ("fp16", "int8", "int4")
        for budget in (0.25, 0.3, 0.5, 0.8):
            assert verdict().policy(budget, sinks=8) == SinkProtect(budget=budget, sinks=8)

    def test_floors_where_they_are_cheaper_than_a_higher_budget(self):
        found = verdict(int4_unsafe=(3,), plain_budget=0.4)
        assert found.safe == ("fp16", "int8")
        assert found.policy(0.25) == found.cheapest == SinkProtect(budget=0.25, floors={3: "int8"})
        assert found.cost(found.cheapest) == pytest.approx((3 * 0.25 + 0.5) / 4)
        assert found.policy(0.3).floors == ((3, "int8"),)
        assert found.policy(0.4) == SinkProtect(budget=0.4)

    def test_a_higher_budget_where_it_is_cheaper(self):
        found = verdict(int4_unsafe=(0, 1, 3), plain_budget=0.35)
        assert found.policy(0.25, decay=0.1) == SinkProtect(budget=0.35, decay=0.1)

    def test_int8_unsafe(self):
        found = verdict(int8_unsafe=(1,), int4_unsafe=(1, 2), plain_budget=0.9)
        assert found.safe == ("fp16",)
        assert found.policy(0.25).floors == ((1, "fp16"), (2, "int8"))
        assert found.policy(0.5).floors == found.policy(0.6).floors == ((1, "fp16"),)
        assert found.policy(0.9).floors == ()
        assert found.cost(found.policy(0.6)) == pytest.approx((3 * 0.6 + 1) / 4)

    def test_bad_budget(self):
        with pytest.raises(ValueError, match="from 0.25 to 1"):
            verdict().policy(0.2)


class TestFromModel:
    def test_an_explicit_policy_or_none_does_not_probe(self, monkeypatch):
        monkeypatch.setattr(auto, "probed_policy", None)
        m = model("llama", "sdpa")
        for policy in ("balanced", SinkProtect(budget=0.3)):
            SpectrumCache.from_model(m, policy=policy)
        assert SpectrumCache.from_model(m, policy="balanced", budget=0.4).policy.budget == 0.4
        assert SpectrumCache.from_model(m, probe=None).policy == SinkProtect(budget=0.5)
        assert SpectrumCache.from_model(m, probe=None, floors={0: "int8"}).policy.floors == ((0, "int8"),)
        with pytest.raises(TypeError):
            SpectrumCache.from_model(m)  # the one that would have probed

    @pytest.mark.parametrize(
        ("options", "probe", "policy"),
        [({}, PlanProbe, Calibrated), ({"codec": "spectrum"}, CalibrationProbe, SinkProtect)],
    )
    def test_probes_once(self, options, probe, policy, monkeypatch):
        m, ran = healthy(), []
        measure = probe.measure
        monkeypatch.setattr(probe, "measure", lambda *args: ran.append(1) or measure(*args))
        policies = [SpectrumCache.from_model(m, budget=b, **options).policy for b in (0.3, 0.3, 0.5)]
        assert [(type(each), each.budget) for each in policies] == [(policy, 0.3), (policy, 0.3), (policy, 0.5)]
        assert policies[0] == policies[1] and len(ran) == 1
        monkeypatch.setattr(auto, "_remembered", {})  # another process
        assert SpectrumCache.from_model(m, budget=0.3, **options).policy == policies[0]
        assert len(ran) == 1

    def test_bad_arguments_are_refused_before_anything_runs(self, monkeypatch):
        monkeypatch.setattr(auto, "probe_model", None)
        m = model("llama", "sdpa")
        for options, error, message in (
            ({"budget": 0.05}, ValueError, "from 0.0625 to 1"),
            ({"budget": 0.2, "codec": "spectrum"}, ValueError, "from 0.25 to 1"),
            ({"codec": "zip"}, ValueError, "unknown codec 'zip'"),
            ({"colour": "red"}, TypeError, "no option colour"),
            ({"floors": {0: "int8"}}, TypeError, "floors come from the probe"),
            ({"probe": "luck"}, ValueError, "unknown probe 'luck': choose from auto, calibration, pap"),
            ({"probe": PaperProbe()}, ValueError, "measures codec 'absmax', the cache has 'spectrum2'"),
        ):
            with pytest.raises(error, match=message):
                SpectrumCache.from_model(m, **options)

    def test_models_that_can_not_be_probed(self, caplog):
        m = model("deepseek_v3")
        assert SpectrumCache.from_model(m, budget=0.3, sinks=2).policy == SinkProtect(budget=0.3, sinks=2)
        assert "can't be probed (calibration): no layer of the model is tiered" in caplog.text
        m = model("llama", "sdpa", max_position_embeddings=512)
        assert SpectrumCache.from_model(m, budget=0.3).policy == SinkProtect(budget=0.3)
        assert "the model takes 512 tokens" in caplog.text

    def test_encoder_decoders(self):
        settings = {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32}
        m = transformers.BartForConditionalGeneration(transformers.BartConfig(**settings, **heads, decoder_ffn_dim=32))
        with pytest.raises(ValueError, match="for_encoder_decoder"):
            SpectrumCache.from_model(m)
        with pytest.raises(ProbeError, match="encoder-decoder"):
            probe_model(m)

    @pytest.mark.parametrize(
        ("exact", "tiered", "expected"),
        [
            ("yyy", "yyn", Adaptive(budget=0.3, probe_passed=True)),
            ("yyy", "nny", Adaptive(budget=0.3, probe_passed=False)),
            ("yyn", "ynn", Adaptive(budget=0.3, probe_passed=False)),
            ("ynn", "nnn", SinkProtect(budget=0.3)),  # calibration takes its place
        ],
    )
    def test_the_papers_probe(self, exact, tiered, expected, monkeypatch, caplog):
        """Its verdict gives `adaptive`, but for a model that fails over the exact cache too."""
        found = {transformers.DynamicCache: list(exact), TieredCache: list(tiered)}

        def ask(model, tokenizer, cache, prompts, **_):
            return [prompts.answer if found[type(cache)].pop(0) == "y" else "nothing"]

        monkeypatch.setattr(paper, "ask", ask)
        probe = PaperProbe(codec=DEFAULT_CODEC, tokens=400)
        cache = SpectrumCache.from_model(healthy(), Characters(), budget=0.3, probe=probe)
        assert cache.policy == expected
        assert ("calibrating instead" in caplog.text) == (expected.name != "adaptive")

    def test_prompts_that_are_too_long_for_the_model(self, caplog):
        cache = SpectrumCache.from_model(healthy(), Characters(), budget=0.3, probe="paper")
        assert cache.policy == SinkProtect(budget=0.3)
        assert "the model takes 1024 tokens, the prompts of the probe have 4096" in caplog.text

    def test_the_papers_probe_asks_questions(self):
        with pytest.raises(TypeError, match="give a tokenizer"):
            SpectrumCache.from_model(healthy(), probe="paper")


class TestState:
    def test_the_model_is_left_as_it_was(self):
        m = copy.deepcopy(healthy())
        m.train()
        m.model.layers[0].eval()
        modes = [module.training for module in m.modules()]
        weights = copy.deepcopy(m.state_dict())
        torch.manual_seed(3)
        before = torch.get_rng_state()
        SpectrumCache.from_model(m, budget=0.3)
        assert torch.equal(torch.get_rng_state(), before)
        assert [module.training for module in m.modules()] == modes
        assert all(parameter.grad is None and parameter.requires_grad for parameter in m.parameters())
        assert all(torch.equal(value, weights[name]) for name, value in m.state_dict().items())
        m(prompt(20)).logits.sum().backward()  # nothing of the probe is in the way of training

    def test_also_after_an_error(self, monkeypatch):
        m = copy.deepcopy(healthy()).train()
        monkeypatch.setattr(PlanProbe, "measure", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            probe_model(m)
        assert all(module.training for module in m.modules()) and torch.is_grad_enabled()

    def test_random_tokens_stay_away_from_the_ends_of_the_vocabulary(self):
        ids = CalibrationProbe().inputs(healthy(), None)
        assert ids.shape == (1, 640) and ids.min() >= 9 and ids.max() < 87
        assert torch.equal(ids, CalibrationProbe().inputs(healthy(), None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "zip"}, "unknown codec 'zip'"),
        ({"loss": 0}, "loss is a positive number of nats, got 0"),
        ({"loss": math.nan}, "got nan"),
        ({"context": 10}, "context is a number of tokens, 64 or more, got 10"),
        ({"continuation": 0}, "continuation is a number of tokens, 1 or more, got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CalibrationProbe(**settings)


def test_config_is_needed_for_the_length():
    assert config("llama").max_position_embeddings == 1024
    with pytest.raises(ProbeError, match="the model takes 1024 tokens"):
        calibrated(model("llama", "sdpa"), context=1000, continuation=100)


class TestProgress:
    """Users see that the model is probed, without setting anything up, unless they turned Transformers' bars off."""

    @pytest.fixture(autouse=True)
    def bars(self):
        transformers.utils.logging.enable_progress_bar()
        yield
        transformers.utils.logging.enable_progress_bar()

    def test_from_model_shows_what_it_does_once(self, capfd):
        m = healthy()
        SpectrumCache.from_model(m, budget=0.3, probe=CalibrationProbe(**SHORT))
        said = capfd.readouterr()
        assert f"Probing once which tiers {type(m).__name__} tolerates: 100%" in said.err and "11/11" in said.err
        assert not said.out
        assert not m._forward_hooks
        SpectrumCache.from_model(m, budget=0.3, probe=CalibrationProbe(**SHORT))
        assert capfd.readouterr().err == ""

    def test_forwards_beyond_the_least_are_counted(self, capfd):
        verdict = calibrated(with_outliers(healthy(), layer=1), codec="absmax")
        assert verdict.int4.unsafe
        last = capfd.readouterr().err.rpartition("\r")[2]
        done, total = map(int, re.search(r"(\d+)/(\d+)", last).groups())
        assert done == total > 11

    def test_bars_that_are_off_stay_off(self, capfd):
        transformers.utils.logging.disable_progress_bar()
        calibrated(healthy())
        assert capfd.readouterr().err == ""

    def test_the_hook_goes_with_a_probe_that_fails(self):
        m = healthy()
        with pytest.raises(ProbeError), auto.shown(m, CalibrationProbe()):
            raise ProbeError
        assert not m._forward_hooks

    def test_the_papers_probe(self, capfd):
        probe_model(model("llama", "sdpa"), Words(), PaperProbe(tokens=400))
        assert "192/192" in capfd.readouterr().err


class Words(Characters):
    """It decodes too."""

    def batch_decode(self, ids, **_):
        return ["" for _ in ids]
