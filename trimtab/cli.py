"""The command line: typed arguments in, library calls, one table or one JSON object out.

The only file that prints. Results go to stdout; progress, warnings and errors go to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from trimtab import __version__, options, removal_commands, render
from trimtab.errors import TrimtabError, explain

EXIT_FAILED = 1

_RECIPE = (
    *(
        "steps",
        "scheduler",
        "eta",
        "guidance",
        "tasks",
        "precision",
        "inherit",
        "drifts",
        "switch",
        "vq",
        "vq_scale",
        "vq_minutes",
        "vq_codebooks",
        "hidiffusion",
        "hoist",
    ),
    *removal_commands.RECIPE,
)
"""Options of compile that are fields of a recipe, by the same name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; gives its exit code: 0 done, 1 failed with one line, 2 wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    # A polite kill cleans up as Ctrl-C does.
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    render.logs(arguments.debug)
    render.escape_names(sys.stdout)
    try:
        result = arguments.command(arguments)
        lines = [render.as_json(result)] if arguments.json else [*arguments.show(result)]
        try:
            print(*lines, sep="\n", flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            sys.stdout = None  # or Python would try once more when it ends, and say so
            raise TrimtabError(
                f"the result cannot be written to stdout ({error.strerror}): send it elsewhere"
            ) from error
        return 0
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        if arguments.debug:
            raise
        stopped = isinstance(error, KeyboardInterrupt)
        message = arguments.interrupted if stopped else explain(error, arguments.extra)
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)  # names in it are anybody's
    print(f"trimtab: error: {line}", file=sys.stderr)
    return EXIT_FAILED


def _build_extra() -> str:
    """What `trimtab build` needs: no torch."""
    from trimtab.runtime.sessions.check import JETSON

    return "jetson" if JETSON.exists() else "rtx"


# ---- arguments ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trimtab", description="Compiles diffusion models into bundles that run on edge devices."
    )
    parser.add_argument("--version", action="version", version=f"trimtab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, text: str, example: str, run: Callable[[Any], Any], show: Callable[[Any], Iterable[str]]
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        command.add_argument("--debug", action="store_true", help="log everything; show tracebacks")
        command.set_defaults(
            command=run, show=show, interrupted="interrupted: nothing was written", extra=lambda: "compile"
        )
        return command

    command = add(
        "compile",
        "compile a diffusers pipeline into a bundle",
        "trimtab compile ./stable-diffusion-v1-5 --steps 20 --scheduler dpm++ -o sd15.bundle",
        _compile,
        render.compile,
    )
    _compile_arguments(command)

    command = add(
        "build",
        "finish or refresh the engines of a bundle on this machine",
        "trimtab build sd15.bundle --target orin-nano-8gb",
        _build,
        render.build,
    )
    options.bundle_argument(command)
    command.add_argument(
        "--target", action="append", metavar="NAME", help="a new one is added (default: all)"
    )
    options.devices_argument(command)
    options.cache_arguments(command)
    command.set_defaults(
        interrupted="interrupted: finished engines are kept, and the next build goes on",
        extra=_build_extra,
    )

    command = add(
        "run",
        "make pictures with a bundle",
        'trimtab run sd15.bundle --prompt "a red circle" --seed 0 -o circle.png',
        _run,
        render.run,
    )
    options.run_arguments(command)

    removal_commands.add_commands(add)

    command = add(
        "bench",
        "measure the time of every segment and step, and the memory",
        "trimtab bench small.bundle --against whole.bundle",
        _bench,
        render.bench,
    )
    options.bundle_argument(command)
    command.add_argument("--against", type=Path, metavar="BUNDLE", help="a second bundle, measured in turn")
    command.add_argument("--rounds", type=int, default=3, metavar="N", help="pictures that count (default 3)")
    options.run_options(command)

    command = add(
        "compare",
        "measure how far two bundles drift apart on the same latents",
        "trimtab compare whole.bundle small.bundle",
        _compare,
        render.compare,
    )
    options.compare_arguments(command)

    command = add(
        "inspect", "show what a bundle holds", "trimtab inspect sd15.bundle --json", _inspect, render.inspect
    )
    options.bundle_argument(command)

    command = add(
        "plan",
        "say whether a model fits a device, and how long it takes there, before anything is built",
        "trimtab plan sd15.bundle --target orin-nano-8gb --size 768x768",
        _plan,
        render.plan,
    )
    options.plan_arguments(command)

    command = add(
        "devices",
        "list the known devices, and mark the one at hand",
        "trimtab devices --devices my-devices.toml",
        _devices,
        render.devices,
    )
    options.devices_argument(command)
    return parser


def _compile_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a diffusers folder, a hub id, or a .toml file that names .onnx files")
    command.add_argument(
        "--target", action="append", metavar="NAME", help="a device of `trimtab devices` (default cpu)"
    )
    command.add_argument(
        "--steps", action="append", type=int, metavar="N", help="sampler steps (default 20); repeatable"
    )
    command.add_argument(
        "--scheduler", metavar="NAME", help="another scheduler than the pipeline's: ddim, dpm++, ..."
    )
    command.add_argument("--eta", type=float, help="for schedulers that take it (ddim, tcd)")
    command.add_argument(
        "--task",
        action="append",
        dest="tasks",
        metavar="NAME",
        help="what the bundle is to do, such as text-to-image; repeatable (default: all that the model does)",
    )
    command.add_argument(
        "--guidance", type=float, metavar="G", help="the scale by default, and that engines are made for"
    )
    command.add_argument(
        "--size",
        action="append",
        type=options.size,
        metavar="WxH",
        help="native size in pixels; given again, a further size that GPU engines are made for",
    )
    options.skip_arguments(command)
    removal_commands.add_options(command)
    command.add_argument("--precision", help="fp16, bf16 or fp32 (default: fp16 on GPUs, fp32 on CPUs)")
    options.packing_arguments(command)
    command.add_argument("--recipe", type=Path, metavar="FILE", help="a TOML file with these options")
    options.devices_argument(command)
    options.cache_arguments(command)
    command.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")


# ---- commands: arguments -> one JSON-able object ----


def _compile(arguments: argparse.Namespace) -> dict[str, Any]:
    from trimtab.compiler import compile

    start = time.perf_counter()
    with render.status() as progress:
        bundle = compile(
            arguments.model,
            arguments.output,
            recipe=arguments.recipe,
            device_file=arguments.device_file,
            cache=arguments.cache,
            progress=progress,
            targets=arguments.target,
            size=arguments.size[0] if arguments.size else None,
            buckets=arguments.size[1:] if arguments.size else None,
            vq_rules=arguments.vq_rule,
            **{name: getattr(arguments, name) for name in _RECIPE},
        )
    seconds = time.perf_counter() - start
    from trimtab.inspection import inspect

    return {"bundle": str(arguments.output), "seconds": round(seconds, 2), **inspect(bundle)}


def _build(arguments: argparse.Namespace) -> dict[str, Any]:
    from trimtab.targets.finish import build

    with render.status() as progress:
        report = build(
            arguments.bundle,
            arguments.target or (),
            device_file=arguments.device_file,
            cache=arguments.cache,
            progress=progress,
        )
    return {"bundle": str(arguments.bundle), **dataclasses.asdict(report)}


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from trimtab.runtime.images import check_place, save
    from trimtab.runtime.load import load

    check_place(arguments.output)
    start = time.perf_counter()
    with (
        load(
            arguments.bundle,
            target=arguments.target,
            provider=arguments.provider,
            threads=arguments.threads,
            low_memory=arguments.low_memory,
            tile=arguments.tile,
            fast=arguments.fast,
        ) as pipe,
        render.bar() as on_step,
    ):
        result = pipe(
            arguments.prompt,
            negative_prompt=arguments.negative,
            label=arguments.label,
            guidance=arguments.guidance,
            seed=arguments.seed,
            count=arguments.count,
            size=arguments.size,
            schedule=arguments.schedule,
            image=arguments.image,
            mask=arguments.mask,
            strength=arguments.strength,
            control=arguments.control,
            control_scale=arguments.control_scale,
            image_guidance=arguments.image_guidance,
            on_step=on_step,
        )
    paths = save(result.pixels, result.settings, arguments.output)
    seconds = round(time.perf_counter() - start, 3)
    return {"images": [str(path) for path in paths], "settings": result.settings, "seconds": seconds}


def _bench(arguments: argparse.Namespace) -> dict[str, Any]:
    from trimtab.runtime.bench import bench

    bundles = [arguments.bundle] + ([arguments.against] if arguments.against else [])
    with render.status() as progress:
        return bench(
            bundles,
            rounds=arguments.rounds,
            target=arguments.target,
            provider=arguments.provider,
            threads=arguments.threads,
            progress=progress,
        )


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    from trimtab.comparison import compare

    return compare(
        arguments.reference,
        arguments.other,
        seed=arguments.seed,
        prompt=arguments.prompt,
        label=arguments.label,
        schedule=arguments.schedule,
    )


def _inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    from trimtab.bundle import open_bundle
    from trimtab.inspection import inspect

    bundle = open_bundle(arguments.bundle)
    bundle.verify()
    return inspect(bundle)


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    from trimtab.targets.planning import plan_model

    with render.status() as progress:
        return plan_model(
            arguments.model,
            arguments.target,
            size=arguments.size,
            precision=arguments.precision,
            low_memory=arguments.low_memory,
            device_file=arguments.device_file,
            progress=progress,
        )


def _devices(arguments: argparse.Namespace) -> dict[str, Any]:
    from trimtab.targets.device import known_devices
    from trimtab.targets.recognise import recognise

    devices = known_devices(arguments.device_file)
    here = recognise(devices)
    return {
        "devices": [dataclasses.asdict(device) for device in devices.values()],
        "at_hand": here.name if here else None,
    }
