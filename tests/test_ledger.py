"""Where the time of a step goes, from traces whose truth is known. Times in microseconds."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdimo.train.instruments.step_breakdown import (
    KERNELS,
    PARTS,
    PREFIX,
    WINDOW,
    kernel_kind,
    labels,
    shares,
)


def host(part: str, begin: float, end: float) -> dict[str, Any]:
    return {"cat": "user_annotation", "name": PREFIX + part, "ts": begin, "dur": end - begin}


def window(begin: float, end: float) -> dict[str, Any]:
    return {"cat": "user_annotation", "name": WINDOW, "ts": begin, "dur": end - begin}


def kernel(
    name: str, begin: float, end: float, launched: float | None, cat: str = "kernel"
) -> list[dict[str, Any]]:
    """On the device, and the call that launched it, which has the same correlation."""
    span = {"cat": cat, "name": name, "ts": begin, "dur": end - begin}
    if launched is None:
        return [span]
    args = {"correlation": hash((name, begin))}
    call = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": launched, "dur": 1}
    return [{**span, "args": args}, {**call, "args": args}]


def found(events: list[dict[str, Any]], **options: Any) -> dict[str, float]:
    """Microseconds of each part that has any."""
    parts, seconds = shares(events, **options)
    assert sum(parts.values()) == pytest.approx(1)
    assert tuple(parts) == PARTS
    return {part: pytest.approx(share * seconds * 1e6) for part, share in parts.items() if share}


EAGER = [
    window(0, 1000),
    host("data", 0, 100),
    host("vae", 100, 110),
    host("forward", 110, 200),
    host("backward", 200, 400),
    host("optimizer", 400, 450),
    *kernel("Memcpy HtoD (Pinned -> Device)", 100, 120, 101, "gpu_memcpy"),
    *kernel("conv2d", 120, 150, 105),
    *kernel("ampere_gemm", 150, 350, 120),  # runs while the host is in backward already
    *kernel("ampere_gemm", 350, 700, 210),
    *kernel("ncclDevKernel_AllReduce_Sum_f32", 600, 900, 250),  # 200 of it exposed
    *kernel("multi_tensor_apply", 900, 980, 410),
]


def test_a_kernel_belongs_to_the_part_that_launched_it() -> None:
    assert found(EAGER) == {
        "data": 100,
        "host_to_device": 20,
        "vae": 30,
        "forward": 200,
        "backward": 350,
        "all_reduce": 200,
        "optimizer": 80,
        "other": 20,  # the device idle, the host at its end
    }


def test_work_hides_copies_and_all_reduces() -> None:
    events = [
        window(0, 100),
        host("forward", 0, 10),
        *kernel("gemm", 0, 100, 5),
        *kernel("ncclKernel", 20, 60, 6),
        *kernel("Memcpy HtoD", 0, 30, 7, "gpu_memcpy"),
    ]
    assert found(events) == {"forward": 100}


def test_an_idle_device_counts_for_what_the_host_does() -> None:
    events = [window(0, 100), host("data", 0, 60), host("forward", 60, 90)]
    events += kernel("gemm", 80, 100, 70)
    assert found(events) == {"data": 60, "forward": 40}


def test_work_outside_the_window_does_not_count() -> None:
    events = [window(100, 200), host("forward", 50, 150), *kernel("gemm", 0, 120, 60)]
    events += kernel("gemm", 190, 300, 140)
    assert found(events) == {"forward": 60, "other": 40}


def test_a_replayed_graph_has_its_parts_from_the_step_as_it_stands() -> None:
    names = labels(EAGER)
    assert names["ampere_gemm"] == ["forward", "backward"]
    replay = [window(0, 1100), host("data", 0, 50)]
    for start in (100, 600):  # two replays, each launched at once, by a call in no range
        replay += kernel("Memcpy HtoD", start, start + 10, start - 1, "gpu_memcpy")
        replay += kernel("ampere_gemm", start + 10, start + 110, start)
        replay += kernel("ampere_gemm", start + 110, start + 310, start)
        replay += kernel("ncclDevKernel_AllReduce_Sum_f32", start + 300, start + 350, start)
        replay += kernel("multi_tensor_apply", start + 350, start + 400, start)
        replay += kernel("nobody_knows_me", start + 400, start + 430, start)
    assert found(replay, labels=names) == {
        "data": 50,
        "host_to_device": 20,
        "forward": 200,
        "backward": 400,
        "all_reduce": 80,
        "optimizer": 100,
        "other": 250,  # unknown kernels 60, idle 50 + 70 + 70
    }


def test_on_a_cpu_operators_take_the_kernels_place() -> None:
    def operator(begin: float, end: float) -> dict[str, Any]:
        return {"cat": "cpu_op", "name": "aten::mm", "ts": begin, "dur": end - begin}

    gloo = {"cat": "user_annotation", "name": "gloo:all_reduce", "ts": 40, "dur": 50}
    events = [
        window(0, 100),
        host("data", 0, 10),
        host("forward", 10, 30),
        host("backward", 30, 95),
        operator(12, 28),
        operator(31, 60),
        gloo,
    ]
    assert found(events) == {
        "data": 10,
        "forward": 20,
        "backward": 10 + 20 + 5,  # before, under operators, and after the all-reduce
        "all_reduce": 30,
        "other": 5,
    }


spans = st.tuples(st.floats(0, 1000), st.floats(0, 1000)).map(sorted)


def test_the_experts_kernels_are_theirs_alone() -> None:
    theirs = ["matmul_rows", "weight_gradient", "sum_parts", "sum_tiles", "sum_choices"]
    theirs += ["gather_choices", "route_choices", "count_choices", "begin_chunks", "place_choices"]
    assert {kernel_kind(name) for name in theirs} == {"experts"}
    assert kernel_kind("sum_columns") == "other elementwise"  # of any layer's bias gradient


@given(
    st.lists(st.tuples(st.sampled_from(["gemm", "ncclKernel", "Memcpy HtoD"]), spans), max_size=20),
    st.lists(st.floats(0, 1000), max_size=6).map(sorted),
)
def test_shares_always_sum_to_the_step(work: Any, borders: Any) -> None:
    events = [window(100, 900)]
    for part, begin, end in zip(PARTS, borders, borders[1:], strict=False):
        events.append(host(part, begin, end))
    for name, (begin, end) in work:
        events += kernel(name, begin, end, max(begin - 20, 0))
    parts, seconds = shares(events)
    assert sum(parts.values()) == pytest.approx(1)
    assert min(parts.values()) >= 0
    assert seconds == pytest.approx(800e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-reduce"),
        ("void at::native::multi_tensor_apply_kernel<...FusedAdamMathFunctor>", "optimizer + EMA"),
        ("matmul_rows", "experts"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("triton_poi_fused_add_mul_3", "other elementwise"),
    ],
)
def test_kernels_have_a_kind(name: str, kind: str) -> None:
    assert kernel_kind(name) == kind
    assert kind in KERNELS
