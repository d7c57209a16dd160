"""What trimtab says to .onnx files and TOML files that it cannot compile: one line, with a way out."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest

import trimtab
from trimtab.errors import BundleError, ExportError, InputError, TrimtabError

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import tiny  # noqa: E402
from foreign import LINEAR, PIXELS, write  # noqa: E402

TEXT = '[text]\nfile = "text.onnx"\ninputs = { ids = { tokens = "tokenizer", length = 6 } }\n'
WIRED = 'inputs = { hidden = "text.hidden" }\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs that fit and graphs that do not."""
    folder = tmp_path_factory.mktemp("refusals")
    inputs, outputs, body = LINEAR
    write(folder / "denoiser.onnx", inputs, outputs, body)
    write(folder / "four.onnx", inputs.replace("N,3", "N,4"), outputs.replace("N,3", "N,4"), body)
    write(folder / "five.onnx", inputs, "float[N,5,H,W] out_sample", body)
    write(folder / "taller.onnx", inputs.replace("H,W", "4,8"), "float[N,3,8,8] out_sample", body)
    write(folder / "fixed.onnx", inputs.replace("H,W", "4,8"), outputs, body)
    write(folder / "open.onnx", inputs.replace("N,3", "N,C"), outputs, body)
    write(folder / "flat.onnx", "float[N,L,64] sample, float timestep", "float[N,L,64] out_sample", body)
    write(folder / "double.onnx", inputs.replace("float[N", "int64[N"), outputs, body)
    whole = body.replace("Mul(timestep,", "Mul(f,").replace("{ t =", "{ f = Cast<to = 1>(timestep) t =")
    write(folder / "whole.onnx", inputs.replace("float t", "int64 t"), outputs, whole)
    reads = body.replace("Add(s, t)", "Add(s, u)").replace("s = Mul", "u = ReduceSum<keepdims = 0>(hidden) s = Mul")
    write(folder / "reads.onnx", inputs + ", float[N,T,2] hidden", outputs, reads)
    write(folder / "reads_ints.onnx", inputs + ", int64[N,T,1] hidden", outputs, reads)
    two = body.replace("}", "s2 = Add(s, other) }").replace("{ t =", "{ t =")
    write(folder / "two.onnx", "float[N,3,H,W] a, float[N,3,H,W] b, float timestep", outputs,
          body.replace("Mul(sample,", "Mul(a,").replace("Add(s, t)", "Add(s, b)"))  # fmt: skip
    del two
    write(folder / "text.onnx", "int64[B,T] ids", "float[B,T,1] hidden",
          "<int64[1] last = {2}> { f = Cast<to = 1>(ids) hidden = Unsqueeze(f, last) }")  # fmt: skip
    write(folder / "shapeless.onnx", "float[Q] ids", "float[R] hidden", "{ hidden = Compress(ids, keep) k = Not(keep) }"
          .replace("{", "<bool[2] keep = {1, 1}> {", 1))  # fmt: skip
    write(folder / "decoder.onnx", "float[B,4,h,w] z", "float[B,3,H,W] rgb",
          "<float[4] sizes = {1, 1, 2, 2}, float[3,4,1,1] kernel = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0}> "
          '{ u = Resize<mode = "nearest">(z, , sizes) rgb = Conv(u, kernel) }')  # fmt: skip
    write(folder / "decoder_fixed.onnx", "float[B,4,2,4] z", "float[B,3,4,8] rgb",
          "<float[4] sizes = {1, 1, 2, 2}, float[3,4,1,1] kernel = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0}> "
          '{ u = Resize<mode = "nearest">(z, , sizes) rgb = Conv(u, kernel) }')  # fmt: skip
    write(folder / "old.onnx", "float[N,3,H,W] sample, float timestep", outputs,
          "{ s = Upsample<mode = \"nearest\", width_scale = 1.0, height_scale = 1.0>(sample) "
          "out_sample = Add<axis = 0, broadcast = 1>(s, timestep) }", opset=6)  # fmt: skip
    (folder / "text.txt").write_text("not a graph")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "cut.onnx").write_bytes((folder / "denoiser.onnx").read_bytes()[:-40])
    tiny.t5_tokenizer(6).save_pretrained(folder / "tokenizer")
    (folder / "bare.json").write_text('{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", '
                                      '"vocab": {"a": 0}, "unk_token": "a"}}')  # fmt: skip
    return folder


CASES: dict[str, tuple[str, str]] = {
    "not TOML": ("size = [", "cannot be read as TOML"),
    "no scheduler": ('[denoiser]\nfile = "denoiser.onnx"', r"no table \[scheduler\]: add one with class"),
    "no denoiser": ('[scheduler]\nclass = "DDIMScheduler"', r"no table \[denoiser\]: add one with file"),
    "denoiser misspelt": (PIXELS.replace("[denoiser]", "[denoisr]"), r"no table \[denoiser\]: rename \[denoisr\]"),
    "unknown key": (PIXELS.replace("size =", "sizes ="), "no key 'sizes': did you mean size"),
    "unknown denoiser key": (PIXELS + 'predictions = "x"', "no key 'predictions': did you mean prediction"),
    "unknown scheduler option": (
        PIXELS.replace("clip_sample", "clip_samples"),
        "DDIMScheduler has no option 'clip_samples': did you mean clip_sample",
    ),
    "unknown scheduler": (PIXELS.replace("DDIMS", "DIMS"), "no scheduler 'DIMScheduler'.*DDIMScheduler"),
    "wrong scheduler value": (
        PIXELS.replace("clip_sample = false", 'beta_schedule = "wavy"'),
        "DDIMScheduler does not take these options",
    ),
    "a scheduler that is no file": (
        PIXELS.replace("clip_sample", 'config = "no.json"\nclip_sample'), "no.json, which .* does not exist"
    ),
    "size of one number": (PIXELS.replace("[8, 4]", "[8]"), "a list of 2 whole numbers"),
    "no size": (PIXELS.replace("size = [8, 4]", ""), r"size = \[width, height\] is missing"),
    "guidance as a text": (f'guidance = "high"\n{PIXELS}', "guidance = 'high', and a number is needed"),
    "guidance without a text": (f"guidance = 3\n{PIXELS}", "needs a prompt or a class to guide by"),
    "missing file": (PIXELS.replace("denoiser.onnx", "unet.onnx"), "unet.onnx, which .* does not exist: give"),
    "a folder": (PIXELS.replace("denoiser.onnx", "tokenizer"), "tokenizer, which .* is a folder"),
    "no ONNX": (PIXELS.replace("denoiser.onnx", "text.txt"), "text.txt (cannot be read as|holds no) ONNX"),
    "empty": (PIXELS.replace("denoiser.onnx", "empty.onnx"), "empty.onnx holds no ONNX graph"),
    "cut": (PIXELS.replace("denoiser.onnx", "cut.onnx"), "cut.onnx cannot be read as ONNX"),
    "too old": (PIXELS.replace("denoiser.onnx", "old.onnx"), "old.onnx has opset 6, and it cannot be converted"),
    "no such input": (PIXELS + 'sample = "smaple"', "no input 'smaple': did you mean sample"),
    "no such output": (PIXELS + 'prediction = "out"', "no output 'out'.*out_sample"),
    "which sample": (PIXELS.replace("denoiser.onnx", "two.onnx"), r'which input is the sample\? Say sample = .* a, b'),
    "an input without a wire": (
        PIXELS.replace("denoiser.onnx", "two.onnx") + 'sample = "a"',
        r"needs the input 'b', and model.toml says nothing of it: write b = \.\.\. under \[denoiser.inputs\]",
    ),
    "a wire without an input": (PIXELS + 'inputs = { lable = { classes = 3 } }', "'lable', which is no input"),
    "a wire of no kind": (PIXELS + 'inputs = { label = "text" }', "an input is one of"),
    "an option of no kind": (
        PIXELS + "inputs = { label = { classes = 3, nul = 3 } }", "no key 'nul': did you mean null"
    ),
    "no such graph": (
        PIXELS.replace("denoiser.onnx", "reads.onnx") + WIRED.replace("text.", "txt.") + TEXT,
        r"no graph \[txt\]: did you mean text",
    ),
    "no such graph output": (
        PIXELS.replace("denoiser.onnx", "reads.onnx") + WIRED.replace("text.hidden", "text.hiden") + TEXT,
        "no output 'hiden': did you mean hidden",
    ),
    "a graph that nobody reads": (PIXELS + TEXT, r"nothing reads \[text\]"),
    "a table without a file": (PIXELS + "[shceduler]\nx = 1", r"\[shceduler\] has no file.*did you mean scheduler"),
    "a name that is taken": (PIXELS + TEXT.replace("[text]", "[denoiser2]"), r"\[denoiser2\] cannot be the name"),
    "a circle": (
        PIXELS.replace("denoiser.onnx", "reads.onnx")
        + WIRED.replace("text.", "a.")
        + '[a]\nfile = "text.onnx"\ninputs = { ids = "b.hidden" }\n[b]\nfile = "text.onnx"\ninputs = { ids = "a.hidden" }',
        "a and b read each other",
    ),
    "another width": (
        PIXELS.replace("denoiser.onnx", "reads.onnx") + WIRED + TEXT,
        r"the input hidden takes 2 along axis 2 and text.hidden has 1",
    ),
    "another kind of number": (
        PIXELS.replace("denoiser.onnx", "reads_ints.onnx") + WIRED + TEXT, "the input hidden is INT64 and text.hidden is FLOAT"
    ),
    "no length": (
        PIXELS.replace("denoiser.onnx", "reads.onnx") + WIRED + TEXT.replace(", length = 6", ""), "say how many, as in length = 77"
    ),
    "no padding token": (
        PIXELS.replace("denoiser.onnx", "reads.onnx") + WIRED + TEXT.replace('"tokenizer"', '"bare.json"'),
        'says no padding token: say which one pads, as in pad = ',
    ),
    "another padding token": (
        PIXELS.replace("denoiser.onnx", "reads.onnx") + WIRED + TEXT.replace('"tokenizer"', '"bare.json", pad = "b"'),
        "has no token 'b'",
    ),
    "not a tokenizer": (
        PIXELS.replace("denoiser.onnx", "reads.onnx") + WIRED + TEXT.replace('"tokenizer"', '"text.txt"'),
        "cannot be read as a tokenizer.json",
    ),
    "five channels": (PIXELS.replace("denoiser.onnx", "five.onnx"), "the output out_sample has 5 channels, and 3 or"),
    "another height": (PIXELS.replace("denoiser.onnx", "taller.onnx"), "out_sample has 8 along axis 2 and the sample 4"),
    "open channels": (PIXELS.replace("denoiser.onnx", "open.onnx"), "leaves the channels of sample open: say channels"),
    "other channels": (PIXELS + "channels = 4", "has 3 channels and channels = 4: leave it out"),
    "packed latents": (PIXELS.replace("denoiser.onnx", "flat.onnx") + 'sample = "sample"\nprediction = "out_sample"', r"float \(rows, channels, h, w\) is needed"),
    "another fixed size": (PIXELS.replace("denoiser.onnx", "fixed.onnx").replace("[8, 4]", "[8, 8]"), r"exported for \[8, 4\]"),
    "latents without a decoder": (PIXELS.replace("denoiser.onnx", "four.onnx"), r"4 channels, which are no picture: add \[decoder\]"),
    "another decoder": (PIXELS + '[decoder]\nfile = "decoder.onnx"\nfactor = 2', "takes 4 channels and the denoiser gives 3"),
    "decoder's layout": (
        PIXELS.replace("denoiser.onnx", "four.onnx") + '[decoder]\nfile = "decoder.onnx"\nfactor = 2\nlayout = "NHWC"',
        "rgb has .* channels in the layout NHWC, and 1 or 3",
    ),
    "decoder's unknown layout": (PIXELS + '[decoder]\nfile = "decoder.onnx"\nlayout = "HWC"', "NCHW and NHWC are known"),
    "decoder's scale": (PIXELS + '[decoder]\nfile = "decoder.onnx"\nscale = 0', "scale = 0, and latents are divided"),
    "decoder's range": (PIXELS + '[decoder]\nfile = "decoder.onnx"\nrange = [1, 0]', "black must be below white"),
    "decoder's factor": (
        PIXELS.replace("denoiser.onnx", "four.onnx") + '[decoder]\nfile = "decoder_fixed.onnx"\nfactor = 4',
        "takes latents of|say factor = N",
    ),
    "a multiple that latents have not": (
        PIXELS.replace("denoiser.onnx", "four.onnx").replace("size", "multiple = 3\nsize") + '[decoder]\nfile = "decoder.onnx"\nfactor = 2',
        "multiple = 3 is no multiple of 2",
    ),
    "a size that latents have not": (
        PIXELS.replace("denoiser.onnx", "four.onnx") + '[decoder]\nfile = "decoder.onnx"', "both must be multiples of 8"
    ),
    "fractions of steps": (
        PIXELS.replace("denoiser.onnx", "whole.onnx").replace('"DDIMScheduler"\nclip_sample = false', '"EulerDiscreteScheduler"'),
        "the schedule euler-3 has the time step 499.5 and whole.onnx takes whole ones",
    ),
}  # fmt: skip


@pytest.mark.parametrize("toml,message", CASES.values(), ids=CASES)
def test_refusals_are_one_line(folder: Path, tmp_path: Path, toml: str, message: str) -> None:
    (folder / "model.toml").write_text(toml)
    with pytest.raises((InputError, ExportError), match=message) as caught:
        trimtab.compile(folder / "model.toml", tmp_path / "bundle", steps=3)
    assert "\n" not in str(caught.value)
    assert type(caught.value) in (InputError, ExportError)
    assert not (tmp_path / "bundle").exists()


def test_a_lone_graph_says_what_the_toml_needs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'write a model.toml .* \[denoiser\] file = "denoiser.onnx"'):
        trimtab.compile(folder / "denoiser.onnx", tmp_path / "bundle")
    with pytest.raises(InputError, match=r"text.txt is a file, and a diffusers folder, a hub id or a .toml"):
        trimtab.compile(folder / "text.txt", tmp_path / "bundle")
