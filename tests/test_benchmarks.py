# SPDX-License-Identifier: Apache-2.0
"""Code of benchmarks/gpu.py that a rehearsal on the CPU does not run: the search for the largest model, traces, parts
that time out, and missed goals. And the arithmetic of benchmarks/scale.py, whose times nothing here can measure, and
what benchmarks/one_process.py and finetune_proof.py make of their measurements.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
pytest.importorskip("matplotlib")
import finetune_proof
import gpu
import gpu_trace
import gpu_train
import one_process
import one_process_contenders
import scale
from scale_model import DECODERS, EXPERTS, Counts, Decoder, Machine, predict, traffic

from shardadam.cli.plan_parallel import ModelParallel


@pytest.mark.parametrize("truth", [4, 5, 17, 20, 23])
@pytest.mark.parametrize("predicted", [0, 4, 18, 20, 22])
def test_the_largest_model_is_found_from_a_prediction_near_it(truth: int, predicted: int) -> None:
    tried: list[int] = []

    def is_too_large(layers: int) -> bool:
        tried.append(layers)
        return layers > truth

    assert gpu_train.boundary(is_too_large, 4, predicted, 30) == (truth, truth + 1)
    assert len(tried) == len(set(tried)) <= abs(max(4, predicted) - truth) + 2


def test_a_search_that_ends_before_the_largest_model_returns_what_it_found() -> None:
    assert gpu_train.boundary(lambda layers: False, 4, 10, 3) == (12, None)
    assert gpu_train.boundary(lambda layers: True, 4, 10, 3) == (4, 8)


def event(name: str, category: str, thread: int, start: float, end: float, **args: int) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "tid": thread, "ts": start, "dur": end - start, "args": args}


def test_kernels_are_attributed_to_the_host_range_that_launched_them() -> None:
    node = "autograd::engine::evaluate_function: AddmmBackward0"
    events = [
        event("part.all", "user_annotation", 1, 0, 100),
        event("shardadam.reduce_scatter", "user_annotation", 2, 30, 40),
        event("shardadam.copy_in", "user_annotation", 2, 32, 34),
        event(node, "cpu_op", 2, 20, 29),
        event("cudaLaunchKernel", "cuda_runtime", 1, 5, 6, correlation=1),
        event("cudaLaunchKernel", "cuda_runtime", 2, 21, 22, correlation=2),
        event("cudaMemcpyAsync", "cuda_runtime", 2, 33, 33.5, correlation=3),
        event("cuLaunchKernelEx", "cuda_driver", 2, 38, 39, correlation=4),
        event("forward", "kernel", 0, 50, 51, correlation=1, stream=7),
        event("backward", "kernel", 0, 52, 53, correlation=2, stream=7),
        event("copy", "gpu_memcpy", 0, 54, 55, correlation=3, stream=7),
        event("nccl", "kernel", 0, 56, 57, correlation=4, stream=20),
        event("cudaStreamSynchronize", "cuda_runtime", 1, 60, 61),
        event("cudaDeviceSynchronize", "cuda_runtime", 1, 101, 102),  # by the benchmark, after the step
    ]
    found = gpu_trace.of_device(events, gpu_trace.ranges_of(events))
    assert [(one.part, one.row) for one in found] == [
        ("forward", "stream 7"),
        ("backward", "stream 7"),
        ("copy_in", "stream 7"),
        ("reduce_scatter", "stream 20"),
    ]
    assert gpu_trace.waits(events) == ["cudaStreamSynchronize"]


def test_a_part_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    found = gpu.run(gpu.Part("slow", (sys.executable, "-c", code), 60), tmp_path, 1.0)
    assert found["end"] == "cut off after 1 s" and found["last_line"] == "begun"
    time.sleep(3)
    assert not mark.exists()


def test_a_part_ends_in_its_printed_result_or_its_failure(tmp_path: Path) -> None:
    def run(code: str, **options: Any) -> dict[str, Any]:
        return gpu.run(gpu.Part("part", (sys.executable, "-c", code), 60, **options), tmp_path, 30.0)

    assert run("print('text'); print('{\"a\": 1}')")["found"] == {"a": 1}
    assert run("import sys; sys.exit(3)")["end"] == "exit code 3"
    assert run("", tool="no-such-tool")["end"] == "no-such-tool is not installed"


def test_the_summary_marks_missed_goals() -> None:
    form = {"dtype": "torch.bfloat16", "master": "split", "mib": 1024, "gbs": 3000.0}
    forms = [
        {**form, "moments": "int8", "floor": 0.81},
        {**form, "moments": "fp32", "floor": 0.81, "peers": {"by hand": {"ratio": 1.4}, "other": "not installed"}},
    ]
    parts = {
        "update": {"end": "exit code 0", "found": {"forms": forms}},
        "capture": {"end": "exit code 0", "found": {"job": {}, "fp32": {"equal": False}}},
        "ranks": {"end": "exit code 0", "found": {"job": {}, "8, fp32": {"planned": 100, "measured": 103}}},
    }
    text = "\n".join(gpu.summary({"hardware": {}, "versions": {}, "rehearsal": False, "parts": parts}))
    assert "int8 moments | 1024 | 3000 | 0.81 | 0.8 met" in text
    assert "fp32 moments | 1024 | 3000 | 0.81 | 0.9 MISSED" in text
    assert "by hand | 1.40" in text and "other | not installed" in text
    assert "NOT EQUAL" in text and "+3.00% (goal 2%)" in text


# scale.py

TINY = Decoder("tiny", 4, 256, 4, 4, 512, 1000)
COUNTED = {
    "bytes_per_parameter": {"fp32 8": 99.0, "bf16 split 1": 99.0, "bf16 split 8": 8.0, "bf16 split 64": 4.5},
    "launches_7b": 500,
    "events_7b": 300,
    "buckets_7b": 100,
}


@pytest.fixture
def counts(tmp_path: Path) -> Counts:
    (tmp_path / "ledger.json").write_text(json.dumps(COUNTED))
    return Counts.read(tmp_path / "ledger.json")


def test_counted_bytes_are_a_constant_and_a_share_of_each_rank(counts: Counts) -> None:
    assert counts.nbytes(1000, 8) == 8000 and counts.nbytes(1000, 64) == 4500
    assert counts.nbytes(1000, 10**9) == pytest.approx(4000)  # 4 + 32 / N
    assert counts.nbytes(1000, 1) == pytest.approx(36000)


@pytest.mark.parametrize(("ranks", "group", "scheme"), [(8, 8, "ring"), (512, 512, "ring"), (512, 8, "hybrid")])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_predicted_step_takes_its_bytes_its_launches_and_its_transfers(
    counts: Counts, ranks: int, group: int, scheme: str, overlap: bool
) -> None:
    machine = Machine(memory_gbs=2000.0, launch_us=4.0, event_us=2.0)
    layout = TINY.layout(group, 0.5)
    some = predict(TINY, layout, ranks, scheme, machine, overlap, counts)
    parameters = sum(TINY.numels)
    assert some.copy_in + some.update == pytest.approx(counts.nbytes(parameters, group) / 2000e9)
    assert some.copy_in == pytest.approx(4 * parameters / 2000e9)  # bf16, read and written
    assert some.launches == pytest.approx((500 * 4e-6 + 300 * 2e-6) * len(layout.buckets) / 100)
    everything = (some.copy_in, some.reduce, some.step_sync, some.update, some.launches, some.gather)
    assert some.percent == pytest.approx(100 * sum(everything) / some.compute)
    inside_step = predict(TINY, layout, ranks, scheme, machine, False, counts)
    longest = machine.ring_s(2 * max(bucket.numel for bucket in layout.buckets), group)
    assert inside_step.gather >= longest > 0 and some.gather <= inside_step.gather
    slower = predict(TINY, layout, ranks, scheme, replace(machine, intra_gbs=1.0, inter_gbs=1.0), overlap, counts)
    assert slower.gather + slower.reduce > some.gather + some.reduce


def test_a_ring_takes_the_faster_protocol() -> None:
    machine = Machine(intra_gbs=100.0, base_us=10.0, intra_us=1.0, ll128_base_us=2.0, ll128_intra_us=0.5)
    travel = 7 / 8 * 1e6 / 100e9
    assert machine.ring_s(1e6, 8) == pytest.approx(min(17e-6 + travel, 5.5e-6 + travel / 0.92))
    assert machine.ring_s(1e9, 8) == pytest.approx(17e-6 + 1000 * travel)


def test_predictions_are_printed_as_predictions(
    counts: Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["scale.py", "step", "--ledger", str(tmp_path / "ledger.json"), "--bucket-mb", "512"]
    monkeypatch.setattr(sys, "argv", command)
    scale.main()
    printed = capsys.readouterr().out
    assert "PREDICTED" in printed and repr(Machine()) in printed
    rows = [line for line in printed.splitlines() if line.startswith(("| 8 |", "| 512 |"))]
    assert len(rows) == 16 and sum("| before" in row for row in rows) == sum("| after" in row for row in rows) == 8


MIXTURE = Decoder("mixture", 6, 256, 4, 2, 512, 1000, experts=8, active_experts=2)


def test_decoders_have_the_sizes_of_their_models() -> None:
    assert [sum(one.numels) / 1e9 for one in DECODERS] == pytest.approx([6.7, 69.0, 405.9], rel=0.01)
    assert sum(EXPERTS.numels) / 1e9 == pytest.approx(140.6, rel=0.01)
    assert EXPERTS.active_numel / 1e9 == pytest.approx(39.1, rel=0.01)
    assert TINY.active_numel == sum(TINY.numels)


def test_a_rank_sends_what_it_holds_to_those_that_hold_the_same() -> None:
    parallel = ModelParallel(tensor=2, expert=4)
    layout = MIXTURE.layout(8, 0.5, parallel=parallel)
    found = traffic(layout, parallel)
    one_layer = 8 // 4 * (2 * 512 + 512) * 256 // 2  # of two experts, half of each
    experts = 6 * one_layer
    dense = sum(one.numel for name, one in MIXTURE.part(parallel).held.parameters if ".experts." not in name)
    assert found.reduce_scatter == found.all_gather
    assert found.reduce_scatter == pytest.approx(2 * (dense * 7 / 8 + experts * 1 / 2), rel=0.01)  # bf16
    assert found.experts == pytest.approx(experts / 2 / (dense * 7 / 8 + experts / 2), rel=0.01)
    assert found.data_sync == 8 * (4 + len(MIXTURE.part(parallel).held.parameters)) and found.model_sync == 40
    assert found.expert_sync == ((2, 8 * 2 * 6),)
    alone = traffic(MIXTURE.layout(8, 0.5))
    assert alone.model_sync == 0 and alone.experts == 0 and alone.expert_sync == ()
    assert alone.reduce_scatter == pytest.approx(2 * sum(MIXTURE.numels) * 7 / 8, rel=0.01)
    assert traffic(MIXTURE.layout(1, 0.5)).reduce_scatter == 0


def test_ranks_apart_from_each_other_travel_between_hosts() -> None:
    machine = Machine(intra_gbs=1000.0, inter_gbs=10.0, base_us=0.0, ll128_base_us=1e9)
    travel = 7 / 8 * 1e9
    assert machine.ring_s(1e9, 8) == pytest.approx(7 * 3.4e-6 + travel / 1000e9)
    assert machine.apart(8).ring_s(1e9, 8) == pytest.approx(7 * 14e-6 + travel / 10e9)
    assert machine.apart(2).ring_s(1e9, 8) == pytest.approx(6 * 3.4e-6 + 14e-6 + travel / 40e9)  # four in each host
    assert machine.within(2).all_reduce_s(8.0, 4) > machine.all_reduce_s(8.0, 4)  # stages are on different hosts


def test_a_step_with_model_parallelism_has_a_second_small_all_reduce(counts: Counts) -> None:
    machine = Machine()
    parallel = ModelParallel(tensor=2, pipeline=3)
    layout = MIXTURE.layout(16, 0.5, parallel=parallel)
    some = predict(MIXTURE, layout, 96, "ring", machine, False, parallel=parallel)
    blocks = traffic(layout, parallel)
    second = machine.within(2).all_reduce_s(40, 6)
    assert some.step_sync == pytest.approx(machine.apart(2).all_reduce_s(blocks.data_sync, 16) + second)
    assert second > 0 and some.compute == machine.compute_s(MIXTURE.active_numel)
    # Only the last of 12 micro-batches hides reductions, and only the first all-gathers.
    slow = replace(machine, intra_gbs=0.5, inter_gbs=0.5)
    more = replace(slow, microbatches=10**9)
    hidden = predict(MIXTURE, layout, 96, "ring", slow, True, parallel=parallel)
    shown = predict(MIXTURE, layout, 96, "ring", more, True, parallel=parallel)
    assert shown.reduce - hidden.reduce > 0 and shown.gather - hidden.gather > 0
    assert shown.reduce == pytest.approx(
        sum(slow.apart(2).ring_s(2 * bucket.numel, 16) for bucket in layout.buckets), rel=1e-3
    )


def test_experts_are_reduced_between_the_ranks_that_hold_them() -> None:
    machine = replace(Machine(), tokens=1e-6)  # type: ignore[arg-type]  # nothing hides transfers
    parallel = ModelParallel(expert=4)
    layout = MIXTURE.layout(16, 0.5, parallel=parallel)
    some = predict(MIXTURE, layout, 16, "ring", machine, False, parallel=parallel)
    expected = 0.0
    for bucket in layout.buckets:
        assert bucket.world_size in (4, 16)
        near = machine.apart(16 // bucket.world_size)
        expected += near.ring_s(2 * bucket.numel, bucket.world_size)
    assert some.reduce == pytest.approx(expected, rel=1e-3)
    blocks = traffic(layout, parallel)
    small = machine.all_reduce_s(blocks.data_sync, 16) + machine.apart(4).all_reduce_s(8 * 2 * 6, 4)
    assert some.step_sync == pytest.approx(small)


def test_a_paper_with_model_parallelism_is_printed_as_a_prediction(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "DECODERS", (TINY,))
    monkeypatch.setattr(scale, "EXPERTS", MIXTURE)
    command = ["scale.py", "paper", "--tensor-parallel", "4", "--expert-parallel", "8", "--pipeline-parallel", "2"]
    monkeypatch.setattr(sys, "argv", command)
    scale.main()
    printed = capsys.readouterr().out
    assert "PREDICTED: tensor 4 x pipeline 2, experts over 8 groups" in printed and repr(Machine()) in printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "| tiny" in line]
    assert [row[:3] for row in rows] == [["tiny", "64", "8"], ["tiny", "512", "64"], ["tiny", "4,096", "512"],
                                         ["tiny", "16,384", "2,048"]]  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "| mixture" in line]
    assert len(rows) == 4 and all(row[9].endswith("+ 40") for row in rows)
    assert rows[0][8] == "0%" and int(rows[-1][8][:-1]) > 0  # 8 data-parallel ranks: one holds each expert


# benchmarks/one_process.py


def measured(beyond: int, losses: list[float], seconds: float = 1.0) -> dict[str, Any]:
    sizes = dict(beyond=beyond, total=beyond + 400, building=0, counted=beyond, numel=100)
    return {**sizes, "losses": losses, "seconds": [seconds], "cpu_seconds": [seconds]}


def one_process_results(**of_ours: Any) -> tuple[list[dict[str, Any]], Any]:
    """Results in fp32: AdamW, AdamW in backward, and one of shardadam's contenders."""
    args = SimpleNamespace(rounds=1, only=["released", "ours"], layers=8, width=64, tokens=4, steps=3)
    found = {
        "fp32/1/adamw": measured(1200, [5.0, 4.0, 3.0], 2.0),
        "fp32/1/released": measured(900, [5.0, 4.0, 3.0]),
        "fp32/1/ours": measured(**{"beyond": 300, "losses": [5.0, 4.0, 3.0], "seconds": 3.0, **of_ours}),
    }
    return [one_process.evaluated("fp32", args, found, {})], args


def test_a_contender_whose_losses_are_not_adamws_is_named() -> None:
    for losses, expected in (([5.0, 4.0, 3.00001], []), ([5.0, 4.0, 3.0002], ["shardadam in fp32"])):
        (result,), _ = one_process_results(losses=losses)
        assert one_process.wrong(result) == expected
    (result,), _ = one_process_results(losses=[5.0, 4.0, float("nan")])
    assert one_process.wrong(result) == ["shardadam in fp32"]


def test_the_leanest_peer_with_exact_weights_is_the_one_compared_with() -> None:
    results, _ = one_process_results()
    lines = list(one_process.leanest(results, "beyond"))
    assert len(lines) == 4 and all("AdamW in backward, fp32" in line and "0.33 at most 0.6" in line for line in lines)
    assert results[0]["contenders"]["ours"]["cpu_seconds_ratio"] == [1.5]
    assert any("over 0.6" in line for line in one_process.leanest(one_process_results(beyond=600)[0], "beyond"))


def test_results_of_other_settings_are_not_resumed(tmp_path: Path) -> None:
    _, args = one_process_results()
    path = tmp_path / "out.json"
    path.write_text(json.dumps({"head": "", "settings": one_process.settings_of(args), "found": {"a": {}}}))
    assert one_process.saved_in(str(path), args)[1] == {"a": {}}
    args.steps = 9
    with pytest.raises(ValueError, match="pass the former"):
        one_process.saved_in(str(path), args)


def test_states_are_counted_by_what_a_tensor_subclass_wraps() -> None:
    class Wrapper:
        codes, scale = torch.zeros(256, dtype=torch.uint8), torch.zeros(2)

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes", "scale"], None

    assert one_process_contenders._nbytes(Wrapper()) == 256 + 8  # type: ignore[arg-type]
    assert one_process_contenders._nbytes(torch.zeros(3)) == 12


def test_files_of_an_offload_that_would_be_in_memory_are_refused(tmp_path: Path) -> None:
    one_process.check_directory(str(tmp_path))
    with pytest.raises(ValueError, match="expected a file system on a disk"):
        one_process.check_directory("/dev/shm")


# benchmarks/finetune_proof.py


def finetuned(seed: int, loss: float) -> dict[str, Any]:
    curves = {"training_losses": [4.0, 3.0, loss], "validation_losses": [[2, 3.5], [3, loss]]}
    sizes = {"state_bytes": 5_000_000, "optimizer_s": 0.02}
    return {"seed": seed, "validation_loss": loss, "accuracy": 0.5, **curves, **sizes}


def test_curves_are_smoothed_over_the_steps_around_and_bands_span_all_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_proof, "SMOOTHED", 5)
    assert finetune_proof.smoothed([1.0, 2.0, 6.0]) == [3.0, 3.0, 3.0]
    long = finetune_proof.smoothed([float(i) for i in range(100)])
    assert long[50] == 50.0 and long[0] == 1.0 and len(long) == 100
    assert finetune_proof.band([[1.0, 5.0], [3.0, 1.0], [2.0, 3.0]]) == ([2.0, 3.0], [1.0, 1.0], [3.0, 5.0])


def test_a_fine_tunes_row_has_each_seed_and_their_deviation(tmp_path: Path) -> None:
    form, twin = finetune_proof.FORMATS[0], finetune_proof.TWIN
    results = {form: [finetuned(0, 1.0), finetuned(1, 1.2)], twin: [finetuned(0, 1.1)]}
    rows = finetune_proof.table(results)
    assert rows[2].startswith(
        f"| {form.title} | 1.0000 | 1.2000 | 1.1000 ± 0.1414 | +0.0000, +0.0000 | 50.0, 50.0 | 5.00 MB |"
    )
    assert rows[3].startswith(f"| {twin.title} | 1.1000 |  | 1.1000 | +0.1000 | 50.0 |")
    assert len({row.count("|") for row in rows}) == 1
    finetune_proof.draw(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_runs_with_other_options_are_not_taken_for_these(tmp_path: Path) -> None:
    run = finetune_proof.Run(finetune_proof.FORMATS[2], 1, ("--epochs=1",))
    assert run.kept(tmp_path) is None
    run.path(tmp_path).write_text(json.dumps({"options": run.options, "results": {"a": 1}}))
    assert run.kept(tmp_path) == {"a": 1}
    with pytest.raises(ValueError, match="give the same options"):
        replace(run, common=("--epochs=2",)).kept(tmp_path)
    paths = {finetune_proof.Run(form, seed, ()).path(tmp_path) for form in finetune_proof.FORMATS for seed in (0, 1)}
    assert len(paths) == 10
