"""Coverage-guided fuzzing of the wire format with atheris: `make fuzz`, or with libFuzzer's options by hand.

What it finds is written as a file `crash-...`; move it into `corpus/`, which `test_corpus.py` replays.
"""

import random
import struct
import sys
import tempfile
from pathlib import Path

import atheris
import torch

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parents[1]), str(FOLDER.parents[1] / "kernels"), str(FOLDER.parent / "support")]
with atheris.instrument_imports(include=["spectrumkv_hf"]):
    import wire_target
from wire_forge import forged, opened, split  # noqa: E402

torch.set_num_threads(1)
VALUES = (
    0,
    1,
    -1,
    2,
    3,
    7,
    15,
    16,
    255,
    2**31,
    2**24,
    2**40,
    2**47,
    1.5,
    1e308,
    True,
    False,
    None,
    "",
    "x",
    "\ud800\x1b[31m\n",
    "F32",
    "U8",
    [],
    {},
    [0],
    [16, 8],
    [16, 8, 4, 3, 2],
)


def nodes(value, found):
    """Containers inside a JSON value, with the keys that lead to their items."""
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            nodes(value[key], found)
    return found


def changed(value, rng):
    """One item of a JSON object replaced, moved, doubled or taken out."""
    container, key = rng.choice(nodes(value, []))
    old = container[key]
    if type(old) is int and rng.random() < 0.6:
        container[key] = rng.choice((old + 1, old - 1, old * 2, old // 2, -old))
    elif isinstance(container, dict) and rng.random() < 0.3:
        container[rng.choice((*container, "new"))] = container.pop(key)
    elif rng.random() < 0.3:
        del container[key]
    else:
        container[key] = rng.choice(VALUES)


def mutate(data, size, seed):
    """Half of the time a change to the JSON of a frame, or to the frames' order; else libFuzzer's own."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return atheris.Mutate(data, size)
    try:
        frames = split(wire_target.resealed(data[1:]))
        at = rng.randrange(len(frames))
        kind = rng.random()
        if kind < 0.45:
            frames[at] = forged(frames[at], edit=lambda metadata: changed(metadata, rng))
        elif kind < 0.8:
            frames[at] = forged(frames[at], describe=lambda described: changed(described, rng))
        elif kind < 0.95:
            raw = rng.randrange(max(len(opened(frames[at])[3]), 1))
            frames[at] = forged(frames[at], data=lambda _, d: d[:raw] + bytes([rng.randrange(256)]) + d[raw + 1 :])
        else:
            rng.choice((frames.reverse, lambda: frames.append(frames[at]), lambda: frames.pop(at)))()
        return (bytes([data[0]]) + b"".join(frames))[:size]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error):
        return atheris.Mutate(data, size)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate([*wire_target.seeds().values(), *wire_target.hostile().values()]):
            (Path(folder) / str(number)).write_bytes(seed)
        arguments = [*sys.argv, folder, str(FOLDER / "corpus"), "-max_len=65536"]
        atheris.Setup(arguments, wire_target.one_input, custom_mutator=mutate)
        atheris.Fuzz()
