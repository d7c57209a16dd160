"""What a table is made of, what cannot be one, what options do not fit, and the names of schedulers."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
from diffusers.utils import logging as diffusers_logging

from trimtab.errors import ExportError, InputError
from trimtab.export.sampler import SCHEDULERS, make_scheduler, probe, replay, scheduler_name
from trimtab.export.sampler.onehot import Interception

diffusers_logging.set_verbosity_error()  # it warns of configuration keys that are another scheduler's

SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def test_the_scheduler_is_not_touched() -> None:
    scheduler = make_scheduler("dpm++", SD)
    scheduler.set_timesteps(7)
    before = dict(vars(scheduler))
    probe(scheduler, 20)
    assert vars(scheduler).keys() == before.keys()
    assert all(vars(scheduler)[name] is value for name, value in before.items())


def test_a_table_is_plain_data() -> None:
    table = probe(make_scheduler("lcm", SD | {"clip_sample": True}), 4)
    assert table.scheduler == "LCMScheduler"
    assert table.clip_range == 1.0
    assert table.draws_noise
    for evaluation in table.evaluations:
        assert type(evaluation.timestep) is float
        for weights in (evaluation.sample_weights, evaluation.next_weights, evaluation.clip_weights):
            assert weights is not None
            assert all(type(weight) is float for weight in weights)
        assert all(type(w) is float for w in (evaluation.output_weight, evaluation.noise_weight))


def test_unused_draws_are_counted() -> None:
    table = probe(make_scheduler("euler-ancestral", SD), 5)
    assert [evaluation.draws for evaluation in table.evaluations] == [1] * 5
    assert [evaluation.noise_draw for evaluation in table.evaluations] == [0, 0, 0, 0, None]
    assert not probe(make_scheduler("ddim", SD), 5).draws_noise


def test_a_thousand_steps_are_probed_in_seconds_and_need_two_slots() -> None:
    begin = time.process_time()  # what else runs on the machine is not counted
    table = probe(make_scheduler("ddpm", SD | {"steps_offset": 0}), 1000)
    assert time.process_time() - begin < 20
    assert len(table.evaluations) == 1000
    assert table.slots == 2


class Bent:
    """A scheduler that does one thing wrong."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.config = {"thresholding": fault == "threshold", "variance_type": fault}
        self.timesteps = torch.tensor([])
        self.old = torch.zeros(())

    def set_timesteps(self, num_inference_steps: int, device: str) -> None:
        self.timesteps = torch.arange(num_inference_steps, 0, -1).float()

    def step(
        self, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        noise = torch.randn(sample.shape)
        result = 0.5 * sample + 0.25 * output
        if self.fault == "square":
            result = result + sample**2
        elif self.fault == "norm":
            result = result / sample.norm()
        elif self.fault == "roll":
            result = sample.roll(1, 1)
        elif self.fault == "two draws":
            result = result + noise - 0.5 * torch.randn_like(sample)
        elif self.fault == "uniform":
            result = result + torch.rand(sample.shape)
        elif self.fault == "small noise":
            result = result + torch.randn((1,))
        elif self.fault == "one side":
            result = result.clamp(0, 1)
        elif self.fault == "own bounds":
            result = torch.clamp(result, -output.abs(), output.abs())
        elif self.fault == "two clips":
            result = result.clip(-1, 1) + output.clip(-1, 1)
        elif self.fault == "two ranges":
            result = result.clamp(-float(timestep), float(timestep))
        elif self.fault == "old noise":
            result, self.old = result + self.old, noise
        elif self.fault == "infinite":
            result = result / 0
        elif self.fault == "shape":
            result = result[:, :1]
        elif self.fault == "error":
            raise RuntimeError("two\nlines")
        return (result,)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("threshold", "thresholding=True: dynamic thresholding takes a quantile"),
        ("learned_range", "a variance that the model predicts"),
        ("square", "not reproduced by its table"),
        ("norm", "not reproduced by its table"),
        ("roll", "not reproduced by its table"),
        ("two draws", "uses two draws of noise in evaluation 0"),
        ("uniform", "draws random numbers with rand"),
        ("small noise", r"draws noise of shape \(1,\)"),
        ("one side", r"clips to \[0, 1\]"),
        ("own bounds", "a bound of its own"),
        ("two clips", "clips twice"),
        ("two ranges", "different ranges"),
        ("old noise", "not drawn for its next sample"),
        ("infinite", "not finite in the sample after evaluation 0"),
        ("shape", "keep the shape"),
        ("error", r"RuntimeError: two lines\)"),
    ],
)
def test_what_no_table_can_hold_is_refused(fault: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason) as caught:
        probe(Bent(fault), 4)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("Bent")


def test_noise_of_an_earlier_step_is_read_off_the_sample() -> None:
    """SASolver's corrector reads the predictor's noise; here is the least scheduler that does the same."""

    class Correcting(Bent):
        def step(
            self, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, return_dict: bool = True
        ) -> tuple[torch.Tensor]:
            noise = torch.randn(sample.shape)
            corrected = sample - 0.3 * self.old
            self.old = noise
            return (0.5 * corrected + 0.25 * output + 0.7 * noise,)

    table = probe(Correcting("none"), 6)
    assert all(evaluation.draws == 1 and evaluation.noise_weight == 0.7 for evaluation in table.evaluations)


def test_where_a_scheduler_itself_loses_digits_its_table_keeps_them() -> None:
    """UniPC on noise, whose first step from zero terminal SNR divides by an alpha of 1/4096."""
    config = {"predict_x0": False, "prediction_type": "sample", "final_sigmas_type": "sigma_min"}
    scheduler = make_scheduler("unipc", SD | config | {"rescale_betas_zero_snr": True})
    table = probe(scheduler, 10)
    generator = torch.Generator().manual_seed(0)
    noise, *outputs = torch.randn((11, 1, 4, 8, 8), generator=generator)

    def drawn(dtype: torch.dtype) -> torch.Tensor:
        scheduler.set_timesteps(10)
        sample = noise.to(dtype)
        for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
            sample = scheduler.step(output.to(dtype), timestep, sample).prev_sample
        return sample.double()

    exact, theirs = drawn(torch.float64), drawn(torch.float32)
    given = iter(outputs)
    ours = torch.from_numpy(replay(table, lambda *_: next(given).numpy(), noise.numpy())).double()
    scale = exact.abs().max()
    assert (ours - exact).abs().max() < 1e-5 * scale < 1e-4 * scale < (theirs - exact).abs().max()


def test_what_a_scheduler_casts_to_float32_is_not_held_against_its_table() -> None:
    """DPMSolver on noise casts its sample, and divides by an alpha of 1/4096 too."""
    config = {"prediction_type": "v_prediction", "final_sigmas_type": "sigma_min", "solver_order": 1}
    config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "algorithm_type": "dpmsolver"}
    scheduler = make_scheduler("dpm++", SD | config | {"beta_schedule": "squaredcos_cap_v2"})
    table = probe(scheduler, 2)
    noise, *outputs = torch.randn((3, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))

    def drawn(within: contextlib.AbstractContextManager[object]) -> torch.Tensor:
        scheduler.set_timesteps(2)
        sample = noise.double()
        with within:
            for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
                sample = scheduler.step(output.double(), timestep, sample).prev_sample
        return sample.double()

    exact = drawn(Interception(tuple(noise.shape), lambda: noise, None, "DPMSolver"))
    theirs = drawn(contextlib.nullcontext())
    given = iter(outputs)
    ours = torch.from_numpy(replay(table, lambda *_: next(given).numpy(), noise.numpy())).double()
    scale = exact.abs().max()
    assert (ours - exact).abs().max() < 1e-6 * scale < 2e-5 * scale < (theirs - exact).abs().max()


def test_options_that_do_not_fit() -> None:
    scheduler = make_scheduler("euler", SD)
    with pytest.raises(InputError, match="start=3 was given without an image"):
        probe(scheduler, 10, start=3)
    with pytest.raises(InputError, match="leaves none of 10 steps"):
        probe(scheduler, 10, start=10, from_image=True)
    with pytest.raises(InputError, match=r"does not take 10 steps with mu \(.*\): choose other steps"):
        probe(scheduler, 10, timesteps_options={"mu": 1.0})
    with pytest.raises(InputError, match="does not take s_spin"):
        probe(scheduler, 10, step_options={"s_spin": 1.0})
    # As prepare_extra_step_kwargs: eta goes only to the schedulers that take it.
    assert probe(scheduler, 10, step_options={"eta": 1.0}) == probe(scheduler, 10)
    with pytest.raises(ExportError, match="neither add_noise nor scale_noise"):
        probe(make_scheduler("ipndm", SD), 10, from_image=True)


def test_a_scheduler_goes_by_its_short_name_or_its_class() -> None:
    for name, class_name in SCHEDULERS.items():
        scheduler = make_scheduler(name, {})
        assert type(scheduler).__name__ == class_name
        assert scheduler_name(scheduler) == name
    assert type(make_scheduler("DPMSolverMultistepScheduler", SD)).__name__ == SCHEDULERS["dpm++"]
    with pytest.raises(InputError, match=r"no scheduler 'eular': did you mean euler .*known are ddim, "):
        make_scheduler("eular", SD)
    with pytest.raises(InputError, match="no scheduler 'UNet2DModel'"):
        make_scheduler("UNet2DModel", SD)
    with pytest.raises(ExportError, match="Brownian tree"):
        make_scheduler("DPMSolverSDEScheduler", SD)
    with pytest.raises(
        InputError, match=r"for diffusion models and .* for flow-matching ones: choose one of flow"
    ):
        make_scheduler("dpm++", FLOW)
    with pytest.raises(InputError, match="for flow-matching models"):
        make_scheduler("flow-euler", {"_class_name": "PNDMScheduler", **SD})


@pytest.mark.parametrize("name", ["UnCLIPScheduler", "VQDiffusionScheduler"])
def test_a_class_that_does_not_take_the_configuration_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} does not take these options") as caught:
        make_scheduler(name, {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"})
    assert "\n" not in str(caught.value) and "choose one of ddim" in str(caught.value)


def test_a_scheduler_without_an_order_is_refused_as_any_other_that_does_not_run() -> None:
    with pytest.raises(ExportError, match="DDPMWuerstchenScheduler failed while it was probed"):
        probe(make_scheduler("DDPMWuerstchenScheduler", {"_class_name": "DDIMScheduler"}), 4)
