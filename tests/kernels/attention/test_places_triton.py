"""Places of programs: each is taken once, whatever multiprocessor gets how many of them."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from spectrumkv_kernels.attention.triton_places import place_of, processor_of  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def places_kernel(processors, tickets, places, own, PROCESSORS: tl.constexpr):
    program = tl.program_id(0)
    place = place_of(tickets, tl.load(processors + program), tl.num_programs(0), own, PROCESSORS)
    tl.store(places + program, place)


@triton.jit
def processors_kernel(processors):
    tl.store(processors + tl.program_id(0), processor_of(tl.program_id(0)))


def places(processors, count, own):
    processors = torch.tensor(processors, dtype=torch.int32, device=DEVICE)
    tickets = torch.zeros(count + 1, dtype=torch.int32, device=DEVICE)
    found = torch.full_like(processors, -1)
    places_kernel[(len(processors),)](processors, tickets, found, own, PROCESSORS=count)
    return found.tolist()


def in_turn(programs, count):
    return [program % count for program in range(programs)]


@pytest.mark.parametrize("programs, count, own", [(30, 5, 6), (33, 5, 6), (34, 7, 4), (3, 5, 0), (40, 5, 6), (1, 1, 1)])
def test_programs_of_a_processor_get_neighbours(programs, count, own):
    found = places(in_turn(programs, count), count, own)
    assert sorted(found) == list(range(programs))
    for processor in range(count):
        first = sorted(found[processor::count])[:own]
        assert first == list(range(processor * own, processor * own + own))


@pytest.mark.parametrize(
    "processors",
    [
        [0] * 30,
        [4] * 29 + [0],
        [0, 1, 2, 3] * 7 + [0, 0],
        [*[0] * 9, *[1] * 4, *[2] * 6, *[3] * 7, *[4] * 4],
        [*in_turn(25, 5), *[2] * 5],
        [program * 7919 % 5 for program in range(30)][::-1],
    ],
    ids=["one", "one and another", "one is not free", "uneven", "the last", "mixed"],
)
@pytest.mark.parametrize("own", [0, 1, 5, 6])
def test_each_place_is_taken_once(processors, own):
    assert sorted(places(processors, 5, own)) == list(range(30))


def test_more_programs_than_a_device_holds():
    programs, count = 5000, 132
    uneven = [(program * program) % count for program in range(programs)]
    assert sorted(places(uneven, count, 8)) == list(range(programs))


def test_processors():
    found = torch.full((300,), -1, dtype=torch.int32, device=DEVICE)
    processors_kernel[(300,)](found)
    count = torch.cuda.get_device_properties(DEVICE).multi_processor_count if DEVICE.type == "cuda" else 300
    assert set(found.tolist()) <= set(range(count)) and len(set(found.tolist())) > count // 2
