"""What trimtab says to .onnx files and TOML files that it cannot compile: one line, with a way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from foreign import LINEAR, PIXELS, write

import trimtab
from trimtab.errors import ExportError, InputError

TEXT = '[text]\nfile = "text.onnx"\ninputs = { ids = { tokens = "tokenizer", length = 6 } }\n'
WIRED = 'inputs = { hidden = "text.hidden" }\n'
DECODER = '[decoder]\nfile = "decoder.onnx"\n'


def using(file: str) -> str:
    """The TOML file of another denoiser."""
    return PIXELS.replace("denoiser.onnx", file)


READS = using("reads.onnx") + WIRED + TEXT


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
    write(folder / "circle.onnx", inputs, outputs, "{ a = Tanh(b) b = Add(a, sample) out_sample = Tanh(b) }")
    write(folder / "nobody.onnx", inputs, outputs, "{ a = Tanh(b) out_sample = Add(a, sample) }")
    write(folder / "unmade.onnx", inputs, outputs, "{ a = Tanh(sample) }")
    write(folder / "twice.onnx", inputs, outputs, "{ a = Tanh(sample) a = Tanh(a) out_sample = Tanh(a) }")
    whole = body.replace("Mul(timestep,", "Mul(f,").replace("{ t =", "{ f = Cast<to = 1>(timestep) t =")
    write(folder / "whole.onnx", inputs.replace("float t", "int64 t"), outputs, whole)
    reads = body.replace("Add(s, t)", "Add(s, u)").replace(
        "s = Mul", "u = ReduceSum<keepdims = 0>(hidden) s = Mul"
    )
    write(folder / "reads.onnx", inputs + ", float[N,T,2] hidden", outputs, reads)
    write(folder / "reads_ints.onnx", inputs + ", int64[N,T,1] hidden", outputs, reads)
    write(
        folder / "two.onnx",
        "float[N,3,H,W] a, float[N,3,H,W] b, float timestep",
        outputs,
        body.replace("Mul(sample,", "Mul(a,").replace("Add(s, t)", "Add(s, b)"),
    )
    write(
        folder / "text.onnx",
        "int64[B,T] ids",
        "float[B,T,1] hidden",
        "<int64[1] last = {2}> { f = Cast<to = 1>(ids) hidden = Unsqueeze(f, last) }",
    )
    write(
        folder / "wider.onnx",
        "int64[B,T] ids",
        "float[B,T,2] hidden",
        "<int64[1] last = {2}> { f = Cast<to = 1>(ids) hidden = Unsqueeze(f, last) }",
    )
    write(
        folder / "shapeless.onnx",
        "int64[B,T] ids",
        "float[B,T,Q] hidden",
        "<int64[1] last = {2}, bool[1] keep = {1}> "
        "{ f = Cast<to = 1>(ids) u = Unsqueeze(f, last) hidden = Compress<axis = 2>(u, keep) }",
    )
    write(
        folder / "decoder.onnx",
        "float[B,4,h,w] z",
        "float[B,3,H,W] rgb",
        "<float[4] sizes = {1, 1, 2, 2}, float[3,4,1,1] kernel = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0}> "
        '{ u = Resize<mode = "nearest">(z, , sizes) rgb = Conv(u, kernel) }',
    )
    write(
        folder / "decoder_fixed.onnx",
        "float[B,4,2,4] z",
        "float[B,3,4,8] rgb",
        "<float[4] sizes = {1, 1, 2, 2}, float[3,4,1,1] kernel = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0}> "
        '{ u = Resize<mode = "nearest">(z, , sizes) rgb = Conv(u, kernel) }',
    )
    write(
        folder / "old.onnx",
        "float[N,3,H,W] sample, float timestep",
        outputs,
        '{ s = Upsample<mode = "nearest", width_scale = 1.0, height_scale = 1.0>(sample) '
        "out_sample = Add<axis = 0, broadcast = 1>(s, timestep) }",
        opset=6,
    )
    (folder / "text.txt").write_text("not a graph")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "cut.onnx").write_bytes((folder / "denoiser.onnx").read_bytes()[:-40])
    tiny.t5_tokenizer(6).save_pretrained(folder / "tokenizer")
    (folder / "bare.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", '
        '"vocab": {"a": 0}, "unk_token": "a"}}'
    )
    return folder


CASES: dict[str, tuple[str, str]] = {
    "not TOML": ("size = [", "cannot be read as TOML"),
    "no scheduler": ('[denoiser]\nfile = "denoiser.onnx"', r"no table \[scheduler\]: add one with class"),
    "no denoiser": ('[scheduler]\nclass = "DDIMScheduler"', r"no table \[denoiser\]: add one with file"),
    "denoiser misspelt": (
        PIXELS.replace("[denoiser]", "[denoisr]"),
        r"no table \[denoiser\]: rename \[denoisr\]",
    ),
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
        PIXELS.replace("clip_sample", 'config = "no.json"\nclip_sample'),
        "no.json, which .* does not exist",
    ),
    "size of one number": (PIXELS.replace("[8, 4]", "[8]"), "a list of 2 whole numbers"),
    "no size": (PIXELS.replace("size = [8, 4]", ""), r"size = \[width, height\] is missing"),
    "guidance as a text": (f'guidance = "high"\n{PIXELS}', "guidance = 'high', and a number is needed"),
    "guidance without a text": (f"guidance = 3\n{PIXELS}", "needs a prompt or a class to guide by"),
    "missing file": (using("unet.onnx"), "unet.onnx, which .* does not exist: give"),
    "a folder": (using("tokenizer"), "tokenizer, which .* is a folder"),
    "no ONNX": (using("text.txt"), "text.txt (cannot be read as|holds no) ONNX"),
    "empty": (using("empty.onnx"), "empty.onnx holds no ONNX graph"),
    "cut": (using("cut.onnx"), "cut.onnx cannot be read as ONNX"),
    "too old": (using("old.onnx"), "old.onnx has opset 6, and it cannot be converted"),
    "no such input": (PIXELS + 'sample = "smaple"', "no input 'smaple': did you mean sample"),
    "no such output": (PIXELS + 'prediction = "out"', "no output 'out'.*out_sample"),
    "which sample": (using("two.onnx"), r"which input is the sample\? Say sample = .* a, b"),
    "an input without a wire": (
        using("two.onnx") + 'sample = "a"',
        r"needs the input 'b', and model.toml says nothing of it: write b = \.\.\. under \[denoiser.inputs\]",
    ),
    "a wire without an input": (
        PIXELS + "inputs = { lable = { classes = 3 } }",
        "'lable', which is no input",
    ),
    "a wire of no kind": (PIXELS + 'inputs = { label = "text" }', "an input is one of"),
    "an option of no kind": (
        PIXELS + "inputs = { label = { classes = 3, nul = 3 } }",
        "no key 'nul': did you mean null",
    ),
    "no such graph": (
        using("reads.onnx") + WIRED.replace("text.", "txt.") + TEXT,
        r"no graph \[txt\]: did you mean text",
    ),
    "no such graph output": (
        using("reads.onnx") + WIRED.replace("text.hidden", "text.hiden") + TEXT,
        "no output 'hiden': did you mean hidden",
    ),
    "a graph that nobody reads": (PIXELS + TEXT, r"nothing reads \[text\]"),
    "a table without a file": (
        PIXELS + "[shceduler]\nx = 1",
        r"\[shceduler\] has no file.*did you mean scheduler",
    ),
    "a name that is taken": (
        PIXELS + TEXT.replace("[text]", "[denoiser2]"),
        r"\[denoiser2\] cannot be the name",
    ),
    "a circle": (
        using("reads.onnx")
        + WIRED.replace("text.", "a.")
        + '[a]\nfile = "text.onnx"\ninputs = { ids = "b.hidden" }\n'
        + '[b]\nfile = "text.onnx"\ninputs = { ids = "a.hidden" }\n',
        "a and b read each other",
    ),
    "another width": (
        READS,
        r"the input hidden takes 2 along axis 2 and text.hidden has 1",
    ),
    "another kind of number": (
        using("reads_ints.onnx") + WIRED + TEXT,
        "the input hidden is INT64 and text.hidden is FLOAT",
    ),
    "an output of unknown size": (
        READS.replace("text.onnx", "shapeless.onnx"),
        "the output hidden has an open size along axis 2 that follows from no input",
    ),
    "a sample of integers": (using("double.onnx") + 'sample = "sample"', "sample is INT64 .*, and float"),
    "no length": (READS.replace(", length = 6", ""), "say how many, as in length = 77"),
    "no padding token": (
        READS.replace('"tokenizer"', '"bare.json"'),
        "says no padding token: say which one pads, as in pad = ",
    ),
    "another padding token": (
        READS.replace('"tokenizer"', '"bare.json", pad = "b"'),
        "has no token 'b'",
    ),
    "not a tokenizer": (
        READS.replace('"tokenizer"', '"text.txt"'),
        "cannot be read as a tokenizer.json",
    ),
    "five channels": (using("five.onnx"), "the output out_sample has 5 channels, and 3 or"),
    "another height": (using("taller.onnx"), "out_sample has 8 along axis 2 and the sample 4"),
    "open channels": (using("open.onnx"), "leaves the channels of sample open: say channels"),
    "other channels": (PIXELS + "channels = 4", "has 3 channels and channels = 4: leave it out"),
    "packed latents": (
        using("flat.onnx") + 'sample = "sample"\nprediction = "out_sample"',
        r"float \(rows, channels, h, w\) is needed",
    ),
    "another fixed size": (using("fixed.onnx").replace("[8, 4]", "[8, 8]"), r"exported for \[8, 4\]"),
    "latents without a decoder": (using("four.onnx"), r"4 channels, which are no picture: add \[decoder\]"),
    "another decoder": (PIXELS + DECODER + "factor = 2", "takes 4 channels and the denoiser gives 3"),
    "decoder's layout": (
        using("four.onnx") + DECODER + 'factor = 2\nlayout = "NHWC"',
        "rgb has .* channels in the layout NHWC, and 1 or 3",
    ),
    "decoder's unknown layout": (PIXELS + DECODER + 'layout = "HWC"', "NCHW and NHWC are known"),
    "decoder's scale": (PIXELS + DECODER + "scale = 0", "scale = 0, and latents are divided"),
    "decoder's range": (PIXELS + DECODER + "range = [1, 0]", "black must be below white"),
    "decoder's factor": (
        using("four.onnx") + '[decoder]\nfile = "decoder_fixed.onnx"\nfactor = 4',
        r"takes latents of \[2, 4\] and \[1, 2\] are decoded",
    ),
    "open decoder's factor": (
        using("four.onnx") + DECODER + "factor = 4",
        "the output image comes out with 2 along axis 1, and 4 was expected: say factor = N",
    ),
    "an output of another size": (
        READS.replace("text.onnx", "wider.onnx"),
        "the output hidden comes out with 1 along axis 2, and 2 was expected",
    ),
    "a cycle of nodes": (using("circle.onnx"), r"circle.onnx cannot be taken apart \(Graph contains a cycle"),
    "what nothing makes": (
        using("nobody.onnx"),
        "nobody.onnx reads 'b', which nothing in it makes: export it",
    ),
    "a result that nothing makes": (using("unmade.onnx"), "unmade.onnx reads 'out_sample', which nothing"),
    "what two nodes make": (
        using("twice.onnx"),
        r"twice.onnx cannot be read as ONNX \(Output 'a' is redeclared",
    ),
    "a multiple that latents have not": (
        using("four.onnx").replace("size", "multiple = 3\nsize") + DECODER + "factor = 2",
        "multiple = 3 is no multiple of 2",
    ),
    "a size that latents have not": (using("four.onnx") + DECODER, "both must be multiples of 8"),
    "a name of trimtab's own": (
        READS.replace("[text]", "[shift]").replace("text.hidden", "shift.hidden"),
        r"\[shift\] cannot be the name of a graph: .* but not vae_decoder, pixels, shift",
    ),
    "fractions of steps": (
        using("whole.onnx").replace('"DDIMScheduler"\nclip_sample = false', '"EulerDiscreteScheduler"'),
        "the schedule euler-3 has the time step 499.5 and whole.onnx takes whole ones",
    ),
    "steps that follow the size": (
        using("whole.onnx").replace(
            '"DDIMScheduler"\nclip_sample = false',
            '"FlowMatchEulerDiscreteScheduler"\nuse_dynamic_shifting = true',
        ),
        "the schedule flow-euler-3 has time steps that follow the size and whole.onnx takes whole ones",
    ),
}


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


def test_a_checkpoint_of_one_file_says_how_it_becomes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        InputError, match=r"model.safetensors is a file, .*: save a folder from it with .*single_file"
    ):
        trimtab.compile(tmp_path / "model.safetensors", tmp_path / "bundle")
