"""The sampler, compiled: a diffusers scheduler becomes a table of coefficients, a table the steps of a program.

schedulers   names, and what cannot be tabulated
probing      the scheduler, run on basis elements   (onehot: the basis; walk: how pipelines run it)
table        the result, and what running it means  (slots: where its state lies)
schedules    tables -> tasks and steps              (shift: where they depend on the picture's size)
"""

from trimtab.export.sampler.probing import probe
from trimtab.export.sampler.schedulers import SCHEDULERS, make_scheduler, scheduler_name
from trimtab.export.sampler.table import Evaluation, SamplerTable, replay

__all__ = [
    "SCHEDULERS",
    "Evaluation",
    "SamplerTable",
    "make_scheduler",
    "probe",
    "replay",
    "scheduler_name",
]
