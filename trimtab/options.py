"""Groups of command-line options that belong together, or that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from trimtab.errors import InputError
from trimtab.targets.place import DEFAULT_CACHE


def packing_arguments(command: argparse.ArgumentParser) -> None:
    """How weights are packed."""
    command.add_argument(
        "--vq", type=int, metavar="BITS", help="pack the denoiser's weights to 2, 3 or 4 bits"
    )
    command.add_argument(
        "--vq-rule",
        action="append",
        metavar="PATTERN=BITS",
        help='other bits, or "keep", for modules whose path fits PATTERN; repeatable, the first that fits decides',
    )
    command.add_argument(
        "--vq-scale", action="store_true", default=None, help="a factor for every output channel"
    )
    command.add_argument(
        "--vq-minutes",
        type=float,
        metavar="M",
        help="calibrate packed weights for so long (default: not at all)",
    )
    command.add_argument(
        "--vq-codebooks", type=Path, metavar="DIR", help="keep codebooks there, and go on from them"
    )


def skip_arguments(command: argparse.ArgumentParser) -> None:
    """What steps leave out or do otherwise."""
    group = command.add_argument_group("steps (docs/inherit.md, docs/hidiffusion.md, docs/hoist.md)")
    group.add_argument("--inherit", metavar="N|FILE", help="full steps: every Nth, or by a plan")
    group.add_argument(
        "--drifts", metavar="FILE", help="keep what a search for a plan measures there, and go on from it"
    )
    group.add_argument(
        "--switch",
        action="append",
        metavar="PATH@SHARE",
        help="another bundle's denoiser, or this one pruned by a plan or student, from that share of the steps on; "
        "repeatable",
    )
    group.add_argument(
        "--hidiffusion",
        action="store_true",
        default=None,
        help="for pictures larger than a U-Net was trained for",
    )
    group.add_argument(
        "--hoist",
        action="store_true",
        default=None,
        help="take what is known before the steps out of them: the time embedding, modulations, keys of the text",
    )


def bundle_argument(command: argparse.ArgumentParser) -> None:
    """The bundle to work on."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE")


def devices_argument(command: argparse.ArgumentParser) -> None:
    """Where devices of one's own stand."""
    command.add_argument(
        "--devices",
        type=Path,
        dest="device_file",
        metavar="FILE",
        help="a TOML file with devices of your own (docs/devices.md)",
    )


def cache_arguments(command: argparse.ArgumentParser) -> None:
    """Where engines are kept."""
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--cache",
        default=DEFAULT_CACHE,
        metavar="DIR|URL",
        help="where engines are looked for and kept (default %(default)s)",
    )
    where.add_argument(
        "--no-cache", dest="cache", action="store_const", const=None, help="build every engine anew"
    )


def run_options(command: argparse.ArgumentParser) -> None:
    """Whose engines run, and how."""
    command.add_argument("--target", metavar="NAME", help="whose engines to run")
    command.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads (default: one a core)"
    )
    command.add_argument(
        "--provider", metavar="NAME", help="where ONNX Runtime runs its graphs: cpu (default) or cuda"
    )


def request_arguments(command: argparse.ArgumentParser) -> None:
    """What to draw with which bundle."""
    bundle_argument(command)
    what = command.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="what to draw")
    what.add_argument("--class", dest="label", metavar="N", help="the class to draw: its number or name")
    command.add_argument("--negative", metavar="TEXT", help="what not to draw")
    command.add_argument("--guidance", type=float, metavar="G", help="guidance scale")
    command.add_argument(
        "--schedule", metavar="NAME", help="a schedule of the bundle, or its number of steps"
    )
    command.add_argument("--image", type=Path, metavar="FILE", help="a picture to start from, or to change")
    command.add_argument("--mask", type=Path, metavar="FILE", help="where to draw anew (white)")
    command.add_argument("--strength", type=float, metavar="S", help="how much of --image is lost, 0 to 1")
    command.add_argument(
        "--control", type=Path, metavar="FILE", help="a picture to draw along (ControlNet, Control)"
    )
    command.add_argument(
        "--control-scale", type=float, metavar="S", help="how much --control counts (default 1)"
    )
    command.add_argument(
        "--image-guidance",
        type=float,
        metavar="G",
        help="guidance scale of --image (InstructPix2Pix, default 1.5)",
    )
    command.add_argument(
        "--seed", type=int, metavar="N", help="start noise as torch's CPU generator draws it"
    )
    command.add_argument("-n", "--count", type=int, default=1, metavar="COUNT", help="pictures")
    command.add_argument("--size", type=size, metavar="WxH", help="size in pixels")
    run_options(command)


def size(text: str) -> tuple[int, int]:
    """A size as (width, height)."""
    from trimtab.recipe import parse_size

    try:
        return parse_size(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_arguments(command: argparse.ArgumentParser) -> None:
    """What `trimtab run` takes."""
    request_arguments(command)
    command.add_argument(
        "--low-memory", action="store_true", help="load one stage's engines at a time, for every picture"
    )
    command.add_argument("--tile", type=int, metavar="N", help="decode in overlapping tiles of N x N pixels")
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT.png", help="a .png, or .npy for floats"
    )
    command.add_argument(
        "--fast",
        action="store_true",
        help="CPU: decode packed weights once, as large as dense; CUDA provider: TF32 products",
    )


def compare_arguments(command: argparse.ArgumentParser) -> None:
    """What `trimtab compare` takes."""
    command.add_argument("reference", type=Path, metavar="BUNDLE")
    command.add_argument("other", type=Path, metavar="BUNDLE")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--prompt", metavar="TEXT")
    command.add_argument("--class", dest="label", metavar="N")
    command.add_argument("--schedule", metavar="NAME")


def plan_arguments(command: argparse.ArgumentParser) -> None:
    """What `trimtab plan` takes."""
    command.add_argument("model", metavar="MODEL|BUNDLE", help="a bundle, or what `trimtab compile` takes")
    command.add_argument("--target", default="cpu", metavar="NAME", help="a device (default cpu)")
    command.add_argument("--size", type=size, metavar="WxH", help="size in pixels")
    command.add_argument("--precision", help="fp16, bf16 or fp32 (default: fp16 on GPUs, fp32 on CPUs)")
    command.add_argument(
        "--low-memory", action="store_true", help="as `trimtab run --low-memory`: one stage at a time"
    )
    devices_argument(command)
