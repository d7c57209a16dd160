"""A whole run on ONNX Runtime, one call an evaluation, against diffusers' loop with guidance."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from trimtab.export.sampler import SamplerTable, make_scheduler, probe
from trimtab.passes.sampler import FuseSampler

BATCH, CHANNELS, SIZE = 2, 3, (6, 4)
SLOTS = 9
CLIP = 1.0
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def denoise(sample: np.ndarray, timestep: np.ndarray, context: np.ndarray) -> np.ndarray:
    """What the graph of `denoiser` computes."""
    return np.tanh(sample * context + timestep / np.float32(1000))


def denoiser() -> ir.Model:
    dtype = ir.TensorType(ir.DataType.FLOAT)
    shape = ["batch", CHANNELS, "height", "width"]
    sample = ir.Value(name="sample", shape=ir.Shape(shape), type=dtype)
    timestep = ir.Value(name="timestep", shape=ir.Shape([]), type=dtype)
    context = ir.Value(name="context", shape=ir.Shape(["batch", CHANNELS, 1, 1]), type=dtype)
    thousand = ir.Value(name="thousand", const_value=ir.tensor(np.float32(1000), name="thousand"))
    scaled = ir.node("Mul", [sample, context])
    shift = ir.node("Div", [timestep, thousand])
    moved = ir.node("Add", [scaled.outputs[0], shift.outputs[0]])
    bent = ir.node("Tanh", moved.outputs)
    bent.outputs[0].name = "prediction"
    bent.outputs[0].shape, bent.outputs[0].type = ir.Shape(shape), dtype
    graph = ir.Graph(
        [sample, timestep, context],
        bent.outputs,
        nodes=[scaled, shift, moved, bent],
        initializers=[thousand],
        opset_imports={"": 23},
        name="denoiser",
    )
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    model = denoiser()
    assert FuseSampler(SLOTS, CLIP, noise=True)(model).modified
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])


def run_fused(
    session: ort.InferenceSession,
    table: SamplerTable,
    context: np.ndarray,
    mix: list[float],
    generator: torch.Generator,
) -> np.ndarray:
    table = table.pad(SLOTS)
    shape = (BATCH, CHANNELS, *SIZE)
    state = np.zeros((SLOTS, *shape), np.float32)
    state[0] = torch.randn(shape, generator=generator).numpy()
    nothing = np.zeros(shape, np.float32)
    latents = nothing
    for step in table.evaluations:
        drawn = [torch.randn(shape, generator=generator).numpy() for _ in range(step.draws)]
        weights = [*step.next_weights, step.output_weight, step.clipped_weight, step.noise_weight]
        latents, output, clipped = session.run(
            ["next_sample", "model_output", "clipped"],
            {
                "state": state,
                "sample_weights": np.array(step.sample_weights, np.float32),
                "mix": np.array(mix, np.float32),
                "next_weights": np.array(weights, np.float32),
                "clip_weights": np.array(step.clip_weights or [0.0] * (SLOTS + 1), np.float32),
                "noise": nothing if step.noise_draw is None else drawn[step.noise_draw],
                "timestep": np.array(step.timestep, np.float32),
                "context": context,
            },
        )
        for slot, value in (
            (step.next_slot, latents),
            (step.output_slot, output),
            (step.clipped_slot, clipped),
        ):
            if slot is not None:
                state[slot] = value
    return latents


def run_diffusers(
    scheduler: Any, steps: int, context: np.ndarray, guidance: float | None, generator: torch.Generator
) -> np.ndarray:
    scheduler.set_timesteps(steps)
    latents = torch.randn((BATCH, CHANNELS, *SIZE), generator=generator) * getattr(
        scheduler, "init_noise_sigma", 1.0
    )
    options = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        scaled = (
            scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        )
        rows = torch.cat([scaled] * (1 if guidance is None else 2)).numpy()
        output = torch.from_numpy(denoise(rows, np.float32(t), context))
        if guidance is not None:
            negative, positive = output.chunk(2)
            output = negative + guidance * (positive - negative)
        latents = scheduler.step(output, t, latents, **options, return_dict=False)[0]
    return latents.numpy()


@pytest.mark.parametrize("guidance", [None, 7.5])
@pytest.mark.parametrize("steps", [12, 20])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ddim", SD),
        ("ddim", {**SD, "clip_sample": True, "clip_sample_range": CLIP}),
        ("ddpm", {**SD, "clip_sample": True}),
        ("heun", {**SD, "clip_sample": True}),
        ("euler-ancestral", SD),
        ("dpm++", SD),
        ("dpm++", {**SD, "algorithm_type": "sde-dpmsolver++"}),
        ("unipc", SD),
        ("sasolver", SD),
        ("pndm", {**SD, "skip_prk_steps": True}),
        ("flow-euler", FLOW),
    ],
)
def test_one_graph_serves_every_scheduler(
    session: ort.InferenceSession, name: str, config: dict[str, Any], steps: int, guidance: float | None
) -> None:
    scheduler = make_scheduler(name, config)
    rows = 1 if guidance is None else 2
    # Both rows predict much alike, as a real model's do. Far apart, guidance and clipping make the run
    # chaotic, and diffusers in float32 then differs from diffusers in float64 as much as from anything else.
    random = np.random.default_rng(3)
    context = random.uniform(0.4, 0.6, (rows * BATCH, CHANNELS, 1, 1)).astype(np.float32)
    mix = [1.0] if guidance is None else [1 - guidance, guidance]
    table = probe(scheduler, steps)
    assert table.clip_range in (None, CLIP)
    ours, theirs = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    expected = run_diffusers(scheduler, steps, context, guidance, theirs)
    found = run_fused(session, table, context, mix, ours)
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-4
    assert torch.equal(ours.get_state(), theirs.get_state())
