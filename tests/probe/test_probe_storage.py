"""Verdicts on disk: other models have other keys, damage is rebuilt, processes may write at the same time."""

import copy
import json
import logging
import multiprocessing
import os
from dataclasses import replace

import pytest
import torch
from families import model
from outliers import healthy, with_outliers

from spectrumkv_hf.probe import CalibrationProbe, CalibrationVerdict, PaperVerdict, Trial, auto, probe_model, storage
from spectrumkv_hf.probe.auto import key_of
from spectrumkv_hf.tiered.identity import fingerprint
from spectrumkv_kernels.backend import cache_folder

PROBE = CalibrationProbe(context=100, continuation=8)


@pytest.fixture(autouse=True)
def own_storage(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(auto, "_remembered", {})


def key(m, probe=PROBE, tokenizer=None):
    return key_of(m, probe, probe.inputs(m, tokenizer))


def stored(m):
    """The verdict on a model and the file that holds it."""
    found = probe_model(m, None, PROBE)
    (file,) = cache_folder.location(storage.KIND).iterdir()
    return found, file


class TestKey:
    def test_the_same_model_again(self):
        assert key(healthy()) == key(healthy())
        m = copy.deepcopy(healthy())
        m.config._name_or_path = "elsewhere"
        m.train()
        assert key(m) == key(healthy())

    def test_other_weights(self):
        """A reparametrised model, a finetune, and any single row, column or element of a vector."""
        seen = {key(healthy())["model"]}

        def differs(m):
            before = len(seen)
            seen.add(key(m)["model"])
            return len(seen) == before + 1

        assert differs(with_outliers(healthy(), 1)) and differs(with_outliers(healthy(), 2))
        finetune = copy.deepcopy(healthy())
        with torch.no_grad():
            for parameter in finetune.parameters():
                parameter.add_(1e-4 * torch.randn_like(parameter))
        assert differs(finetune)
        for change in (
            lambda m: m.model.layers[0].mlp.up_proj.weight[17].mul_(1.01),
            lambda m: m.model.layers[0].mlp.up_proj.weight[:, 5].mul_(1.01),
            lambda m: m.model.layers[0].mlp.down_proj.weight[:, 32].mul_(1.01),  # in no sample of a row
            lambda m: m.model.layers[0].input_layernorm.weight[33].add_(0.01),
            lambda m: m.model.layers[1].self_attn.k_proj.bias[3].add_(0.01),
        ):
            m = copy.deepcopy(healthy())
            with torch.no_grad():
                change(m)
            assert differs(m)

    def test_other_configs_and_settings(self, monkeypatch):
        keys = [key(healthy())]
        m = copy.deepcopy(healthy())
        m.config.rms_norm_eps = 1e-3
        keys.append(key(m))
        keys.append(key(copy.deepcopy(healthy()).to(torch.bfloat16)))
        keys.append(key(model("qwen2", "sdpa", num_hidden_layers=3)))
        for change in ({"codec": "absmax"}, {"loss": 0.02}, {"context": 101}, {"continuation": 9}):
            settings = {"context": 100, "continuation": 8, **change}
            keys.append(key(healthy(), CalibrationProbe(**settings)))
        monkeypatch.setattr(auto, "VERSION", auto.VERSION + 1)
        keys.append(key(healthy()))
        assert len({storage.name_of(each) for each in keys}) == len(keys)

    def test_another_codec_under_the_same_name(self, monkeypatch):
        before = key(healthy())
        newer = replace(auto.CODECS[PROBE.codec], version=2)
        monkeypatch.setitem(auto.CODECS, PROBE.codec, newer)
        assert key(healthy()) != before

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.bool, torch.int64], ids=str)
    def test_weights_of_any_type(self, dtype):
        m = copy.deepcopy(healthy())
        m.register_buffer("table", torch.ones(5, 4, 3).to(dtype))
        before = fingerprint(m)
        m.table[2, 1] = 0
        assert fingerprint(m) != before
        m.register_buffer("table", torch.empty(5, 4, 3, dtype=dtype, device="meta"))
        assert fingerprint(m) != before


class TestFiles:
    def test_another_process_reads_it(self, monkeypatch):
        found, file = stored(healthy())
        monkeypatch.setattr(auto, "_remembered", {})
        monkeypatch.setattr(CalibrationProbe, "measure", None)
        again = probe_model(healthy(), None, PROBE)
        assert again == found and again is not found
        assert json.loads(file.read_text())["verdict"] == found.to_json()

    def test_fresh(self, monkeypatch):
        found, file = stored(healthy())
        before = file.stat().st_mtime_ns
        again = probe_model(healthy(), None, PROBE, fresh=True)
        assert again.int4 == found.int4 and file.stat().st_mtime_ns > before

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[: len(data) // 2],
            lambda data: b"\xff\xfe" + data,
            lambda data: b"[" * 100000,
            lambda data: b"[]",
            lambda data: data.replace(b'"kl_keys": ', b'"kl_keys": 1'),
            lambda data: data.replace(b'"fp', b'"xx').replace(b'"int8"', b'"int4"'),
            lambda data: data.replace(b'"format": 1', b'"format": 2'),
            lambda data: data.replace(b'"loss": 0.01', b'"loss": 0.02', 1),
        ],
    )
    def test_damage_is_ignored_and_rebuilt(self, damage, monkeypatch, caplog):
        found, file = stored(healthy())
        whole = file.read_bytes()
        assert damage(whole) != whole
        file.write_bytes(damage(whole))
        monkeypatch.setattr(auto, "_remembered", {})
        again = probe_model(healthy(), None, PROBE)
        assert (again.int8, again.int4) == (found.int8, found.int4)
        assert f"ignoring the probe's verdict in {file}" in caplog.text
        assert json.loads(file.read_text())["verdict"] == again.to_json()

    @pytest.mark.parametrize(
        "change",
        [
            lambda v: v.pop("tiered"),
            lambda v: v.update(colour="red"),
            lambda v: v.update(tiered=[]),
            lambda v: v.update(tiered=3),
            lambda v: v.update(context="512"),
            lambda v: v["int4"].update(tier="int8"),
            lambda v: v["int4"].update(unsafe=[99]),
            lambda v: v["int8"].update(layers=[{"layer": 0}]),
            lambda v: v.update(int8=[]),
        ],
    )
    def test_what_is_no_verdict_under_a_right_checksum(self, change, monkeypatch, caplog):
        found, file = stored(healthy())
        other = copy.deepcopy(found.to_json())
        change(other)
        with pytest.raises(ValueError):
            CalibrationVerdict.from_json(other)
        storage.write(key(healthy()), other)
        monkeypatch.setattr(auto, "_remembered", {})
        assert probe_model(healthy(), None, PROBE).int4 == found.int4
        assert "ignoring a stored verdict" in caplog.text
        assert json.loads(file.read_text())["verdict"] != other

    def test_round_trips(self):
        found = probe_model(with_outliers(healthy(), 1), None, CalibrationProbe(codec="absmax", context=100))
        assert found.int4.unsafe and CalibrationVerdict.from_json(json.loads(json.dumps(found.to_json()))) == found
        trials = (Trial(answer="BLUEFISH42", depth=0.5, exact=True, tiered=False),)
        paper = PaperVerdict(codec="absmax", tokens=4096, trials=trials, seconds=1.5)
        assert PaperVerdict.from_json(json.loads(json.dumps(paper.to_json()))) == paper

    def test_a_folder_that_can_not_be_written(self, tmp_path, monkeypatch, caplog):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert abs(probe_model(healthy(), None, PROBE).control) < 1e-6
        assert "can't be stored" in caplog.text

    def test_a_write_that_fails_leaves_the_old_file(self, monkeypatch, caplog):
        _, file = stored(healthy())
        before = file.read_bytes()
        monkeypatch.setattr(os, "replace", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        storage.write(key(healthy()), {"other": 1})
        assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
        assert "can't be stored: full" in caplog.text

    def test_folder(self, tmp_path):
        _, file = stored(healthy())
        assert file.parent == tmp_path / "spectrumkv" / "probe" and file.stat().st_mode & 0o777 == 0o600
        assert storage.stored_at(key(healthy())) == file

    @pytest.mark.parametrize("where", ["", "probe"])
    def test_a_folder_that_others_may_write(self, where, tmp_path, monkeypatch, caplog):
        """They could plant a verdict that makes a model's answers worse."""
        found, file = stored(healthy())
        (tmp_path / "spectrumkv" / where).chmod(0o777)
        monkeypatch.setattr(auto, "_remembered", {})
        planted = copy.deepcopy(found.to_json()) | {"seconds": 12345.0}
        entry = {"format": 1, "key": key(healthy()), "verdict": planted, "checksum": storage._checksum(planted)}
        file.write_text(json.dumps(entry))
        before = file.read_bytes()
        assert probe_model(healthy(), None, PROBE).seconds != 12345.0
        assert "ignoring a verdict" in caplog.text and "chmod go-w" in caplog.text
        assert "can't be stored" in caplog.text and file.read_bytes() == before
        assert storage.stored_at(key(healthy())) is None


def _write_and_read(number, failed):
    logging.disable(logging.CRITICAL)
    for turn in range(60):
        storage.write({"key": 1}, {"writer": number, "turn": turn, "filling": "x" * 20000})
        read = storage.read({"key": 1})
        if read is None or read["filling"] != "x" * 20000:
            failed.set()


def test_processes_at_the_same_time():
    """Whoever reads finds a whole verdict, whatever others write."""
    context = multiprocessing.get_context("fork")
    failed = context.Event()
    processes = [context.Process(target=_write_and_read, args=(n, failed)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4 and not failed.is_set()
    assert [path.name for path in cache_folder.location(storage.KIND).iterdir()] == [storage.name_of({"key": 1})]
