"""Two vLLM servers, prefill and decode, over compressed prompts in a shared folder.

For each policy: start both servers; let the prefill server answer every prompt by itself, which also stores it; ask the
decode server, which restores it; damage every stored prompt and ask once more. Needs vLLM in this environment; see
docs/engines.md.

    python examples/engines/vllm_pd.py --model FOLDER --policies fp16:1 uniform_int8 sink_protect:0.3
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoConfig

from spectrumkv_hf.evaluation.report.tables import HelpFormatter, check_folders, print_table
from spectrumkv_hf.probe.passage import passage
from spectrumkv_hf.support.whole_file import write_whole

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"}


@dataclass
class Outcome:
    """Of one policy.

    Attributes:
        policy: As given.
        prompts: How many.
        restored: Prompts that the decode server restored in full.
        equal: Of its texts, those that equal the prefill server's own.
        tokens: Restored of the prompts together; each leaves the rest, at most a block, to the decode server.
        stored_bytes: Per prompt, of the files.
        fp16_bytes: Per prompt, of the same tokens at two bytes an element.
        refused: Damaged prompts that the decode server noticed.
        equal_after_damage: Of its texts then, those that equal the prefill server's own.
    """

    policy: str
    prompts: int
    restored: int
    equal: int
    tokens: int
    stored_bytes: int
    fp16_bytes: int
    refused: int
    equal_after_damage: int


@contextlib.contextmanager
def server(args: argparse.Namespace, role: str, port: int, policy: str, folder: Path, log: Path) -> Iterator[str]:
    """Start a server, and stop it. Yields its address."""
    name, _, budget = policy.partition(":")
    extra = {"path": str(folder), "policy": name} | ({"budget": float(budget)} if budget else {})
    transfer = {
        "kv_connector": "SpectrumConnector",
        "kv_connector_module_path": "spectrumkv_hf.engines.vllm_connector",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--dtype", args.dtype]
    command += ["--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager", "--no-enable-prefix-caching"]
    command += ["--disable-hybrid-kv-cache-manager", "--kv-transfer-config", json.dumps(transfer)]
    print(" ".join(command), file=sys.stderr)
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**ENVIRONMENT, **os.environ})
    address = f"http://127.0.0.1:{port}"
    try:
        yield address
    finally:
        process.terminate()
        process.wait(60)


def wait_for(address: str, log: Path, seconds: float = 300) -> None:
    """Until a server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{address} does not answer; the end of its log:\n{log.read_text()[-3000:]}"
                ) from None
            time.sleep(1)


def ask(address: str, prompt: str, tokens: int) -> str:
    """The server's greedy continuation."""
    body = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": tokens}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["text"]


def prompts_of(count: int, words: int) -> list[str]:
    """Stretches of the package's passage, each from another word on."""
    text = passage().split()
    step = max((len(text) - words) // max(count - 1, 1), 1)
    return [" ".join(text[i * step : i * step + words]) for i in range(count)]


def damage(folder: Path) -> int:
    """Flip a bit in one layer of every stored prompt."""
    names = [path for path in folder.iterdir() if path.is_dir()]
    for number, name in enumerate(names):
        files = sorted(name.iterdir())
        path = files[number * 7 % len(files)]
        data = bytearray(path.read_bytes())
        data[len(data) * (number + 1) // (len(names) + 1)] ^= 1 << number % 8
        path.write_bytes(data)
    return len(names)


def run(args: argparse.Namespace, policy: str) -> Outcome:
    config = AutoConfig.from_pretrained(args.model).get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    prompts = prompts_of(args.prompts, args.words)
    with tempfile.TemporaryDirectory() as temporary:
        folder, logs = Path(temporary, "kv"), [Path(temporary, "prefill.log"), Path(temporary, "decode.log")]
        with (
            server(args, "kv_producer", args.port, policy, folder, logs[0]) as prefill,
            server(args, "kv_consumer", args.port + 1, policy, folder, logs[1]) as decode,
        ):
            for address, log in zip((prefill, decode), logs, strict=True):
                wait_for(address, log)
            alone = [ask(prefill, prompt, args.new_tokens) for prompt in prompts]
            size = sum(path.stat().st_size for path in folder.glob("*/*"))
            through = [ask(decode, prompt, args.new_tokens) for prompt in prompts]
            restored = logs[1].read_text().count("Restored prompt")
            damaged = damage(folder)
            again = [ask(decode, prompt, args.new_tokens) for prompt in prompts]
            text = logs[1].read_text()
        blocks = sum(int(line.split(": ")[-1].split()[0]) for line in text.splitlines() if "Restored prompt" in line)
    if damaged != len(prompts):
        raise RuntimeError(f"{damaged} of {len(prompts)} prompts were stored")
    tokens = blocks * args.block
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    for prompt, a, b in zip(prompts, alone, through, strict=True):
        if a != b:
            print(f"{policy}: after {prompt[-30:]!r}\n  alone    {a!r}\n  restored {b!r}", file=sys.stderr)
    return Outcome(
        policy,
        len(prompts),
        restored,
        sum(a == b for a, b in zip(alone, through, strict=True)),
        tokens,
        size // len(prompts),
        per_token * tokens // len(prompts),
        text.count("can't be restored"),
        sum(a == b for a, b in zip(alone, again, strict=True)),
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model, or a hub id with HF_HUB_OFFLINE=0")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--policies", nargs="+", default=["fp16:1", "uniform_int8", "sink_protect:0.3"])
    parser.add_argument("--prompts", type=int, default=8, help="stretches of the package's passage")
    parser.add_argument("--words", type=int, default=230, help="in each")
    parser.add_argument("--new-tokens", type=int, default=16, help="to generate")
    parser.add_argument("--block", type=int, default=128, help="tokens in a block of vLLM's cache")
    parser.add_argument("--port", type=int, default=18100, help="of the prefill server; the next one is decode's")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_folders(args.json)
    outcomes = []
    for policy in args.policies:
        outcomes.append(run(args, policy))
        o = outcomes[-1]
        print(f"{policy}: {o}", file=sys.stderr)
        if args.json:
            write_whole(args.json, json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")
    head = ["policy", "restored", "text equal", "bytes a request", "of FP16", "damage noticed", "then text equal"]
    rows = [
        [
            o.policy,
            f"{o.restored}/{o.prompts}",
            f"{o.equal}/{o.prompts}",
            f"{o.stored_bytes:,}",
            f"{o.stored_bytes / o.fp16_bytes:.3f}",
            f"{o.refused}/{o.prompts}",
            f"{o.equal_after_damage}/{o.prompts}",
        ]
        for o in outcomes
    ]
    print_table(head, rows)


if __name__ == "__main__":
    main()
