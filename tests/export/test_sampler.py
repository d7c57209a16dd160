"""Sampler tables against diffusers' own schedulers, in diffusers' own loops."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging

from trimtab.errors import InputError
from trimtab.export.sampler import (
    SCHEDULERS,
    SamplerTable,
    make_scheduler,
    probe,
    replay,
)

diffusers_logging.set_verbosity_error()  # it warns of configuration keys that are another scheduler's

SHAPE = (2, 4, 6, 5)
SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
CONSISTENCY = {"_class_name": "CMStochasticIterativeScheduler"}


_MADE: dict[str, Any] = {}


@dataclass(frozen=True)
class Case:
    """A scheduler, what its configuration differs in, and the options of a run."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    timesteps_options: Mapping[str, Any] = field(default_factory=dict)
    step_options: Mapping[str, Any] = field(default_factory=dict)

    def scheduler(self) -> Any:
        base = SD
        if self.name.startswith("flow"):
            base = FLOW
        elif self.name.startswith("edm"):
            base = EDM
        elif self.name == "consistency":
            base = CONSISTENCY
        # Some constructors take half a second; a copy takes none.
        key = str((self.name, self.config))
        if key not in _MADE:
            _MADE[key] = make_scheduler(self.name, {**base, **self.config})
        return copy.deepcopy(_MADE[key])

    def __str__(self) -> str:
        options = {**self.config, **self.timesteps_options, **self.step_options}
        return " ".join([self.name, *(f"{key}={value}" for key, value in options.items())])


DRAWS_BY_GENERATOR = "randn_like" not in inspect.getsource(FlowMatchEulerDiscreteScheduler.step)

PLAIN = [Case(name) for name in SCHEDULERS if name != "scm"]  # which one pipeline runs, in a way of its own
V, SAMPLE = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
KARRAS, EXPONENTIAL, BETA = ({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))
VARIANTS = [
    Case("ddim", step_options={"eta": 0.5}),
    Case("ddim", step_options={"eta": 1.0, "use_clipped_model_output": True}, config={"clip_sample": True}),
    Case("ddim", V),
    Case("ddim", SAMPLE),
    Case("ddim", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, **V}),
    Case("ddim", {"timestep_spacing": "linspace"}),
    Case("ddim", {"clip_sample": True}),
    Case("ddim", {"clip_sample": True, "clip_sample_range": 2.5, **V}),
    Case("ddpm", {"clip_sample": True}),
    Case("ddpm", {"clip_sample": True, **SAMPLE}),
    Case("ddpm", {"variance_type": "fixed_large", **V}),
    Case("ddpm", {"variance_type": "fixed_small_log"}),
    Case("pndm", {"skip_prk_steps": False}),
    Case("pndm", V),
    Case("lms", KARRAS),
    Case("lms", V),
    Case("euler", KARRAS),
    Case("euler", EXPONENTIAL),
    Case("euler", BETA),
    Case("euler", V),
    Case("euler", SAMPLE),
    Case("euler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, **V}),
    Case("euler", {"timestep_type": "continuous", "sigma_max": 700.0, "sigma_min": 0.002, **V, **KARRAS}),
    Case("euler", step_options={"s_churn": 3.0}),
    Case("euler", {"final_sigmas_type": "sigma_min"}),
    Case("euler-ancestral", {"timestep_spacing": "leading"}),
    Case("euler-ancestral", V),
    Case("heun", KARRAS),
    Case("heun", {"clip_sample": True}),
    Case("heun", V),
    Case("heun", SAMPLE),
    Case("dpm++", KARRAS),
    Case("dpm++", EXPONENTIAL),
    Case("dpm++", BETA),
    Case("dpm++", {"use_lu_lambdas": True}),
    Case("dpm++", {"solver_order": 1}),
    Case("dpm++", {"solver_order": 3}),
    Case("dpm++", {"solver_order": 3, "lower_order_final": False, **V}),
    Case("dpm++", {"algorithm_type": "sde-dpmsolver++"}),
    Case("dpm++", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, **KARRAS}),
    Case("dpm++", {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True, **KARRAS}),
    Case("dpm++", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    Case("dpm++", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}),
    Case("dpm++", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}),
    Case("dpm++", {"solver_type": "heun", "final_sigmas_type": "sigma_min"}),
    Case("dpm++", {"timestep_spacing": "trailing", **V}),
    Case("dpm++", {"timestep_spacing": "leading", **SAMPLE}),
    Case("dpm++", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    Case("dpm++-singlestep", {"solver_order": 1}),
    Case("dpm++-singlestep", {"solver_order": 3, "lower_order_final": True}),
    Case("dpm++-singlestep", {"algorithm_type": "sde-dpmsolver++"}),
    Case("dpm++-singlestep", {**V, **KARRAS}),
    Case("unipc", {"solver_order": 1}),
    Case("unipc", {"solver_order": 3}),
    Case("unipc", {"solver_type": "bh1", "disable_corrector": [0, 1], "final_sigmas_type": "sigma_min"}),
    Case("unipc", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    Case("unipc", {"predict_x0": False, "final_sigmas_type": "sigma_min", **SAMPLE}),
    Case("unipc", {"predict_x0": False, "final_sigmas_type": "sigma_min", "solver_order": 3, **V}),
    Case("unipc", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, **V}),
    Case("unipc", KARRAS),
    Case("unipc", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    Case("deis", {"solver_order": 1}),
    Case("deis", {"solver_order": 3}),
    Case("deis", V),
    Case("lcm", {"clip_sample": True}),
    Case("lcm", {"timestep_scaling": 5.0, **V}),
    Case("tcd", step_options={"eta": 0.0}),
    Case("tcd", step_options={"eta": 0.8}),
    Case("tcd", {"clip_sample": True, **V}),  # TCD's step leaves clip_sample unread
    Case("kdpm2", KARRAS),
    Case("kdpm2", V),
    Case("kdpm2-ancestral", V),
    Case("flow-euler", {"shift": 1.0}),
    Case("flow-euler", {"use_dynamic_shifting": True}, timesteps_options={"mu": 1.15}),
    # Older versions of diffusers draw this one's noise without the generator that is given.
    *([Case("flow-euler", {"stochastic_sampling": True})] if DRAWS_BY_GENERATOR else []),
    Case("flow-euler", {"shift_terminal": 0.1}),
    Case("flow-euler", {"shift": 1.0, **KARRAS}),
    Case("edm-euler", V),
    Case("edm-euler", {"sigma_schedule": "exponential"}),
    Case("edm-dpm++", {"algorithm_type": "sde-dpmsolver++"}),
    Case("sasolver", {"predictor_order": 3, "corrector_order": 4}),
    Case("sasolver", {"algorithm_type": "data_prediction", **KARRAS, **V}),
]


def model(sample: np.ndarray, timestep: float) -> np.ndarray:
    """A nonlinear stand-in for a denoiser, bounded and smooth, in the sample's own precision."""
    phase = np.asarray(np.cos(timestep / 200.0), sample.dtype)
    return np.tanh(np.roll(sample, 1, axis=-1) * phase + sample / 2).astype(sample.dtype)


@dataclass
class Run:
    """The same run, by diffusers and by a table."""

    expected: np.ndarray
    found: np.ndarray
    in_step: bool
    """Whether both generators stand at the same place afterwards."""
    table: SamplerTable
    scale: float
    """Of the first sample: init_noise_sigma."""

    @property
    def error(self) -> float:
        return float(np.abs(self.found - self.expected).max() / max(np.abs(self.expected).max(), 1e-9))


def compare(
    case: Case,
    steps: int,
    start: int = 0,
    from_image: bool = False,
    mask: np.ndarray | None = None,
    table: SamplerTable | None = None,
) -> Run:
    """Run diffusers' loop (text-to-image, image-to-image or inpainting) and the table's, both in float32."""
    scheduler = case.scheduler()
    if table is None:
        table = probe(
            scheduler,
            steps,
            start=start,
            from_image=from_image,
            keep_start=mask is not None,
            timesteps_options=case.timesteps_options,
            step_options=case.step_options,
        )
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(SHAPE, generator=generator)
    image = (
        torch.randn(SHAPE, generator=torch.Generator().manual_seed(8))
        if from_image or mask is not None
        else None
    )

    # As diffusers' pipelines: retrieve_timesteps, get_timesteps, prepare_latents and the loop.
    if "sigmas" in case.timesteps_options:
        scheduler.set_timesteps(**case.timesteps_options)
    else:
        scheduler.set_timesteps(steps, **case.timesteps_options)
    timesteps = scheduler.timesteps[start * scheduler.order :]
    if image is not None and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)

    def add_noise(at: torch.Tensor) -> torch.Tensor:
        if case.name.startswith("flow"):
            return scheduler.scale_noise(image, at, noise)
        return scheduler.add_noise(image, noise, at)

    if from_image:
        latents = add_noise(timesteps[:1].repeat(SHAPE[0]))
    else:
        latents = noise if case.name.startswith("flow") else noise * scheduler.init_noise_sigma
    options = dict(case.step_options)
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = generator
    for i, t in enumerate(timesteps):
        scaled = latents if case.name.startswith("flow") else scheduler.scale_model_input(latents, t)
        output = torch.from_numpy(model(scaled.numpy(), float(t)))
        latents = scheduler.step(output, t, latents, **options, return_dict=False)[0]
        if mask is not None:
            known = image if i == len(timesteps) - 1 else add_noise(torch.tensor([timesteps[i + 1]]))
            latents = (1 - torch.from_numpy(mask)) * known + torch.from_numpy(mask) * latents
    assert latents.dtype == torch.float32

    ours = torch.Generator().manual_seed(7)
    first = torch.randn(SHAPE, generator=ours).numpy()

    def draws() -> Iterator[np.ndarray]:
        while True:
            yield torch.randn(SHAPE, generator=ours).numpy()

    found = replay(table, model, first, draws(), None if image is None else image.numpy(), mask)
    in_step = torch.equal(generator.get_state(), ours.get_state())
    return Run(latents.numpy(), found, in_step, table, float(getattr(scheduler, "init_noise_sigma", 1.0)))


@pytest.mark.parametrize("steps", [12, 20])
@pytest.mark.parametrize("case", [*PLAIN, *VARIANTS], ids=str)
def test_text_to_image_agrees_with_diffusers(case: Case, steps: int) -> None:
    run = compare(case, steps)
    assert run.error < 1e-4
    assert run.in_step
    # Rows are local: nothing but the first sample, at the scheduler's own scale, weighs much.
    weights = [w for row in run.table.evaluations for w in (*row.sample_weights, *row.next_weights)]
    assert max(map(abs, weights)) < 16 * max(1.0, run.scale)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("case", [case for case in PLAIN if case.name != "consistency"], ids=str)
def test_schedules_of_few_steps_and_of_many_agree_with_diffusers(case: Case, steps: int) -> None:
    run = compare(case, steps)
    assert run.error < 1e-4
    assert run.in_step


IMAGE = [case for case in PLAIN if case.name != "ipndm"]  # which has no add_noise


@pytest.mark.parametrize(("steps", "start"), [(12, 0), (12, 5), (20, 19)])
@pytest.mark.parametrize("case", IMAGE, ids=str)
def test_image_to_image_agrees_with_diffusers(case: Case, steps: int, start: int) -> None:
    run = compare(case, steps, start, from_image=True)
    assert run.error < 1e-4
    assert run.in_step


@pytest.mark.parametrize(("start", "from_image"), [(0, False), (3, True)])
@pytest.mark.parametrize("case", IMAGE, ids=str)
def test_inpainting_agrees_with_diffusers(case: Case, start: int, from_image: bool) -> None:
    mask = np.random.default_rng(1).integers(0, 2, (SHAPE[0], 1, *SHAPE[2:])).astype(np.float32)
    run = compare(case, 12, start, from_image, mask)
    assert run.error < 1e-4
    assert run.in_step


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_trig_flow_agrees_with_the_loop_of_sana_sprint(steps: int) -> None:
    data = 0.25
    scheduler = make_scheduler("scm", {"_class_name": "SCMScheduler", "sigma_data": data})
    options = {"max_timesteps": 1.57080, "intermediate_timesteps": 1.3 if steps == 2 else None}
    table = probe(scheduler, steps, timesteps_options=options)
    ours, theirs = (torch.Generator().manual_seed(7) for _ in range(2))
    latents = torch.randn(SHAPE, generator=theirs) * data
    scheduler.set_timesteps(steps, **options)
    for t in scheduler.timesteps[:-1]:
        output = torch.from_numpy(model((latents / data).numpy(), float(t))) * data
        latents, foreseen = scheduler.step(output, t, latents, generator=theirs, return_dict=False)
    noise, *draws = (torch.randn(SHAPE, generator=ours).numpy() for _ in range(1 + steps))
    assert np.abs(replay(table, model, noise, draws) - (foreseen / data).numpy()).max() <= 1e-5
    assert [evaluation.draws for evaluation in table.evaluations] == [1] * steps


def test_a_sampler_of_trig_flow_is_for_no_other_model() -> None:
    with pytest.raises(InputError, match="SCMScheduler is for trig-flow models"):
        make_scheduler("scm", FLOW)
    with pytest.raises(InputError, match="choose one of scm"):
        make_scheduler("dpm++", {"_class_name": "SCMScheduler"})


def test_known_weights_are_those_of_the_next_timestep() -> None:
    scheduler = Case("ddim").scheduler()
    table = probe(scheduler, 10, from_image=True, keep_start=True, start=4)
    scheduler.set_timesteps(10)
    following = scheduler.timesteps[5:]
    for evaluation, timestep in zip(table.evaluations, following, strict=False):
        alpha = float(scheduler.alphas_cumprod[timestep])
        assert evaluation.known_weights == pytest.approx(((1 - alpha) ** 0.5, alpha**0.5), rel=1e-6)
    assert table.evaluations[-1].known_weights == (0.0, 1.0)
    assert len(table.evaluations) == 6


def test_custom_sigmas_as_flux_passes_them() -> None:
    sigmas = np.linspace(1.0, 1 / 12, 12).tolist()
    case = Case("flow-euler", {"use_dynamic_shifting": True}, {"sigmas": sigmas, "mu": 0.9})
    assert compare(case, 12).error < 1e-4
    with pytest.raises(InputError, match="12 sigmas were given for 20 steps"):
        probe(case.scheduler(), 20, timesteps_options=case.timesteps_options)


def test_timesteps_of_ones_own_are_the_schedules() -> None:
    case = Case("lcm", timesteps_options={"original_inference_steps": 40})
    assert compare(case, 4).error < 1e-4
    table = probe(Case("ddpm").scheduler(), 3, timesteps_options={"timesteps": [900, 500, 20]})
    assert [evaluation.timestep for evaluation in table.evaluations] == [900, 500, 20]


@pytest.fixture(scope="module")
def every_kind_of_table() -> list[SamplerTable]:
    tables = []
    for case in [*PLAIN, *VARIANTS]:
        for options in ({}, {"from_image": True, "start": 2}, {"from_image": True, "keep_start": True}):
            if case.name == "ipndm" and options:
                continue
            extra = {"timesteps_options": case.timesteps_options, "step_options": case.step_options}
            tables.append(probe(case.scheduler(), 5, **options, **extra))
    return tables


@pytest.mark.xdist_group("tables")
def test_no_evaluation_writes_a_slot_that_it_reads(every_kind_of_table: list[SamplerTable]) -> None:
    for table in every_kind_of_table:
        kept = table.evaluations[0].known_weights is not None
        for evaluation in table.evaluations:
            written = [evaluation.next_slot, evaluation.output_slot, evaluation.clipped_slot]
            slots = [slot for slot in written if slot is not None]
            assert len(set(slots)) == len(slots)
            assert all(slot < table.slots for slot in slots)
            if kept:
                assert not {0, 1} & set(slots)
            for slot in slots:
                assert evaluation.sample_weights[slot] == 0
                assert evaluation.next_weights[slot] == 0
                assert evaluation.clip_weights is None or evaluation.clip_weights[slot] == 0


@pytest.mark.xdist_group("tables")
def test_no_evaluation_reads_a_slot_before_it_is_written(every_kind_of_table: list[SamplerTable]) -> None:
    for table in every_kind_of_table:
        written = {0, 1}
        for evaluation in table.evaluations:
            weights = [
                evaluation.sample_weights,
                evaluation.next_weights,
                (evaluation.clip_weights or ())[:-1],
            ]
            assert {slot for row in weights for slot, weight in enumerate(row) if weight} <= written
            slots = {evaluation.next_slot, evaluation.output_slot, evaluation.clipped_slot}
            written |= {slot for slot in slots if slot is not None}
        assert table.evaluations[-1].next_slot is None


@pytest.mark.parametrize(
    ("case", "slots"),
    [
        (Case("ddim"), 2),
        (Case("ddpm"), 2),
        (Case("euler"), 2),
        (Case("euler-ancestral"), 2),
        (Case("lcm"), 2),
        (Case("flow-euler"), 2),
        (Case("dpm++-singlestep"), 3),
        (Case("heun"), 4),
        (Case("dpm++"), 5),
        (Case("lms"), 6),
        (Case("unipc"), 7),
        (Case("sasolver"), 7),
        (Case("dpm++", {"solver_order": 3}), 7),
    ],
    ids=str,
)
def test_the_state_is_small_and_does_not_grow_with_the_steps(case: Case, slots: int) -> None:
    assert probe(case.scheduler(), 20).slots <= slots
    assert probe(case.scheduler(), 50).slots <= slots


def test_padding_changes_nothing() -> None:
    case = Case("ddpm", {"clip_sample": True})
    table = probe(case.scheduler(), 8)
    padded = table.pad(table.slots + 3)
    assert padded.slots == table.slots + 3
    assert len(padded.evaluations[0].clip_weights or ()) == padded.slots + 1
    np.testing.assert_array_equal(compare(case, 8, table=padded).found, compare(case, 8, table=table).found)
    assert table.pad(table.slots) == table
    with pytest.raises(InputError, match=f"needs {table.slots}"):
        table.pad(table.slots - 1)
