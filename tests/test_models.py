"""models.py against the public libraries: diffusers, transformers and peft on small random networks, both ways."""
import json
import math
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest
import torch
import transformers
from diffusers import (DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models import CLIPText, CLIPTokenizer, MMDiT, T5Tokenizer
from pipelines import t5_tokenizer

ROOT = Path(models.__file__).parent


def mmdit_config(heads=2, head_dim=16, **other):
    return dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=head_dim,
                num_attention_heads=heads, joint_attention_dim=24, caption_projection_dim=heads * head_dim,
                pooled_projection_dim=20, pos_embed_max_size=9) | other


# name: (config, height, width of the input); the position table is 9 x 9 patches
MMDITS = {
    "sd3-m": (mmdit_config(), 8, 8),
    "sd35-m": (mmdit_config(qk_norm="rms_norm", dual_attention_layers=(0, 1)), 8, 8),
    "sd35-m, dual to the end": (mmdit_config(qk_norm="rms_norm", dual_attention_layers=(0, 1, 2)), 8, 8),
    "sd35-l": (mmdit_config(heads=3, qk_norm="rms_norm"), 8, 8),
    "dual without norms": (mmdit_config(dual_attention_layers=(0,)), 8, 8),
    "wide": (mmdit_config(qk_norm="rms_norm", dual_attention_layers=(0,)), 6, 18),
    "tall": (mmdit_config(heads=1, head_dim=32, qk_norm="rms_norm"), 18, 2),
    "whole table": (mmdit_config(heads=4, head_dim=8), 18, 18),
    "one layer, other channels": (mmdit_config(num_layers=1, in_channels=5, out_channels=3), 10, 4),
    "pixels, patch 4": (mmdit_config(in_channels=3, out_channels=3, patch_size=4, sample_size=28), 28, 20)}
SD35M = MMDITS["sd35-m"][0]


def redraw(net, seed=0, stream=1.0):
    """Random weights for a network of any library: no gate is zero, no norm the identity, outputs are O(1).

    stream scales what the norms see, residual streams, queries and keys: at 0.01 their eps is a visible part of it.
    """
    quiet = ("embedding.weight", "pos_embed.", "context_embedder.", "norm1.linear.", "norm1_context.linear.", ".to_q.",
             ".to_k.", ".add_q_proj.", ".add_k_proj.", ".out_proj.", ".mlp.fc2.")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(net.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            if "embedding.weight" in name or name == "pos_embed.pos_embed":
                value = noise
            elif tensor.ndim >= 2:
                value = noise / math.sqrt(tensor[0].numel())
            else:
                value = 0.3 * noise + (1 if "norm" in name and name.endswith(".weight") else 0)
            tensor.copy_(value * stream if any(part in name for part in quiet) else value)
    return net.eval().requires_grad_(False)


def mmdit_inputs(config, height=8, width=8, dtype=torch.float32, batch=3):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(batch, *shape, generator=generator).to(dtype)
    t = torch.tensor([0.0, 0.37, 1.0])[:batch]
    return (randn(config["in_channels"], height, width), t, randn(7, config["joint_attention_dim"]),
            randn(config["pooled_projection_dim"]))


def diffusers_forward(net, x, t, context, pooled):
    return net(hidden_states=x, timestep=1000 * t, encoder_hidden_states=context, pooled_projections=pooled).sample


def assert_equal(ours, theirs, tolerance=1e-5):
    """Within a fraction of the standard deviation."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert 0.01 < theirs.std() < 10
    error = (ours - theirs).abs().max() / theirs.std()
    assert error <= tolerance, f"off by {error:.1e} standard deviations"


def saved_mmdit(directory, config=SD35M, **options):
    """diffusers' own network with random weights, and the same in its own files."""
    net = redraw(SD3Transformer2DModel(**config))
    net.save_pretrained(directory, **options)
    return net


# ================================================================================================================ MMDiT

@pytest.mark.parametrize("stream", (1.0, 0.01))
@pytest.mark.parametrize("name", MMDITS)
def test_mmdit_reads_and_writes_diffusers_files(name, stream, tmp_path):
    config, height, width = MMDITS[name]
    inputs = mmdit_inputs(config, height, width)
    theirs = redraw(SD3Transformer2DModel(**config), stream=stream)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = MMDiT.from_pretrained(tmp_path / "theirs")
    assert_equal(ours(*inputs), diffusers_forward(theirs, *inputs))
    redraw(ours, seed=5, stream=stream).save_pretrained(tmp_path / "ours")
    again, info = SD3Transformer2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in again.config.items()
            if key in config} == config
    assert_equal(diffusers_forward(again, *inputs), ours(*inputs))


def test_mmdit_reads_shards(tmp_path):
    theirs = saved_mmdit(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    inputs = mmdit_inputs(SD35M)
    assert_equal(MMDiT.from_pretrained(tmp_path)(*inputs), diffusers_forward(theirs, *inputs))


def test_what_is_saved_over_shards_is_what_is_read(tmp_path):
    saved_mmdit(tmp_path, max_shard_size="100KB")
    net = MMDiT.from_pretrained(tmp_path)
    net.proj_out.bias.data.fill_(7)
    net.save_pretrained(tmp_path)
    assert MMDiT.from_pretrained(tmp_path).proj_out.bias.eq(7).all() and len(list(tmp_path.iterdir())) == 2
    saved_mmdit(tmp_path / "a", max_shard_size="100KB", variant="fp16")                    # another variant stays whole
    files = {file.name for file in (tmp_path / "a").iterdir()}
    net.save_pretrained(tmp_path / "a")
    assert {file.name for file in (tmp_path / "a").iterdir()} == files | {"diffusion_pytorch_model.safetensors"}


def test_a_full_disk_leaves_the_weights_that_were_there(tmp_path, monkeypatch):
    net = MMDiT(**SD35M)
    net.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(state, file, **options):
        Path(file).write_bytes(b"half")
        raise SafetensorError("No space left on device")
    monkeypatch.setattr(models, "save_file", full)
    with pytest.raises(ValueError, match=r"cannot write .*diffusion_pytorch_model\.safetensors: No space left"):
        net.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("value", ('"layer_norm"', "7", "null, \"num_layers\": null", "null, \"patch_size\": 0",
                                   "null, \"attention_head_dim\": -4", "null, \"sample_size\": []"))
def test_a_config_that_cannot_be_built_is_named(value, tmp_path):
    MMDiT(**SD35M).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | json.loads(f'{{"qk_norm": {value}}}')
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (MMDiT.from_pretrained, lambda directory: models.skeleton(MMDiT, directory)):
        with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json: no network can be made of it: "):
            read(tmp_path)


@pytest.mark.parametrize("options", ({}, {"max_shard_size": "100KB"}), ids=("one file", "shards"))
def test_mmdit_reads_the_fp16_variant(options, tmp_path):
    theirs = redraw(SD3Transformer2DModel(**SD35M)).half()
    theirs.save_pretrained(tmp_path, variant="fp16", **options)
    ours = MMDiT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(ours[name], tensor.float()) for name, tensor in theirs.state_dict().items())
    assert {t.dtype for t in MMDiT.from_pretrained(tmp_path, torch.bfloat16).state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ("sd3-m", "sd35-m", "sd35-l", "wide"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_mmdit_in_half_precision_is_as_exact_as_diffusers(name, dtype, tmp_path):
    """Root mean square error against float64 with the same rounded weights and inputs, at most twice diffusers'."""
    config, height, width = MMDITS[name]
    inputs = mmdit_inputs(config, height, width, dtype)
    theirs = saved_mmdit(tmp_path, config).to(dtype)
    exact = SD3Transformer2DModel(**config).double().eval()
    exact.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        exact = diffusers_forward(exact, *(tensor.double() for tensor in inputs))

    def error(out):
        return (out.double() - exact).square().mean().sqrt()
    ours = MMDiT.from_pretrained(tmp_path, dtype)(*inputs)
    assert ours.dtype == dtype
    assert 0 < error(ours) <= 2 * error(diffusers_forward(theirs, *inputs))


def test_mmdit_gradients_are_those_of_diffusers(tmp_path):
    theirs = saved_mmdit(tmp_path).requires_grad_(True)
    ours = MMDiT.from_pretrained(tmp_path).requires_grad_(True)
    inputs = mmdit_inputs(SD35M)
    ours(*inputs).square().mean().backward()
    diffusers_forward(theirs, *inputs).square().mean().backward()
    reference = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - reference[name].grad).abs().max() <= 1e-4 * reference[name].grad.abs().max(), name


@pytest.mark.parametrize("max_size, size, patch, head_dim", (
    (9, 8, 2, 16), (96, 128, 2, 64), (8, 28, 4, 32), (5, 64, 2, 4)))
def test_position_table_is_that_of_a_fresh_diffusers_network(max_size, size, patch, head_dim):
    config = mmdit_config(head_dim=head_dim, num_layers=1, sample_size=size, patch_size=patch,
                          pos_embed_max_size=max_size)
    theirs, ours = (cls(**config).pos_embed.pos_embed for cls in (SD3Transformer2DModel, MMDiT))
    assert ours.shape == theirs.shape == (1, max_size ** 2, 2 * head_dim) and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-6)         # float32 places up to 64 in diffusers


def test_nothing_larger_than_the_position_table_is_made_on_the_way():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            self.size = max(self.size, out.untyped_storage().nbytes())
            return out
    with Largest() as largest:
        table = models.sincos_table(64, 32, 32)
    assert largest.size == table.nbytes == 32 * 32 * 64 * 4


PUBLIC = {                                                              # parameters, tensors
    "sd35-m": (dict(num_layers=24, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=1536,
                    dual_attention_layers=list(range(13)), qk_norm="rms_norm", pos_embed_max_size=384),
               2_243_171_520, 909),
    "sd3-m": (dict(num_layers=24, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=1536,
                   pos_embed_max_size=192), 2_028_328_000, 683),
    "sd35-l": (dict(num_layers=38, num_attention_heads=38, attention_head_dim=64, caption_projection_dim=2432,
                    qk_norm="rms_norm", pos_embed_max_size=192), 8_056_627_520, 1227)}


@pytest.mark.parametrize("name", PUBLIC)
def test_mmdit_of_full_size_has_the_public_names_and_shapes(name):
    config, parameters, tensors = PUBLIC[name]
    with torch.device("meta"):
        ours, theirs = MMDiT(**config), SD3Transformer2DModel(**config)
    assert all(tensor.is_meta for tensor in ours.state_dict().values())
    assert sum(p.numel() for p in ours.parameters()) == parameters and len(ours.state_dict()) == tensors
    assert ({key: t.shape for key, t in ours.state_dict().items()} ==
            {key: t.shape for key, t in theirs.state_dict().items()})
    assert ours.config == json.loads(json.dumps(ours.config))


@pytest.mark.parametrize("config, reason", (
    (dict(SD35M, caption_projection_dim=64), "caption_projection_dim=64"),
    (dict(SD35M, qk_norm="layer_norm"), "layer_norm")))
def test_mmdit_refuses_what_it_does_not_implement(config, reason):
    with pytest.raises(ValueError, match=reason):
        MMDiT(**config)


def test_mmdit_reads_a_config_with_nulls():
    net = MMDiT(**dict(SD35M, out_channels=None, dual_attention_layers=None, qk_norm=None, _name_or_path=None))
    assert net.out_channels == SD35M["in_channels"] and net.config["dual_attention_layers"] == []


def test_an_input_larger_than_the_position_table_is_an_error():
    net = MMDiT(**SD35M)
    with pytest.raises(ValueError, match="10 x 4 patches .* 9 x 9"):
        net(*mmdit_inputs(SD35M, 20, 8))


# ============================================================================================================= CLIPText

def clip_config(**other):
    return transformers.CLIPTextConfig(**dict(vocab_size=60, hidden_size=32, intermediate_size=48, projection_dim=24,
                                              num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=12,
                                              hidden_act="quick_gelu", bos_token_id=58, eos_token_id=59) | other)


CLIPS = {cls.__name__: cls for cls in (transformers.CLIPTextModelWithProjection, transformers.CLIPTextModel)}
IDS = torch.tensor([[58, 3, 59, 59, 59, 59, 59, 59, 59, 59, 59, 59],   # padded with the end of text, as CLIP-L
                    [58, 7, 8, 9, 10, 59, 0, 0, 0, 0, 0, 0],           # padded with "!", as bigG
                    [58, 41, 2, 3, 2, 6, 7, 2, 9, 10, 11, 59],         # full; 2 is an ordinary token
                    [5, 4, 3, 57, 57, 7, 6, 5, 3, 5, 6, 9]])           # no end: the explicit rule falls on the first


def assert_same_features(ours, theirs, ids=IDS):
    with torch.no_grad():
        hidden, pooled = ours(ids)
        out = theirs(ids, output_hidden_states=True)
    assert_equal(hidden, out.hidden_states[-2])
    assert_equal(pooled, out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output)


@pytest.mark.parametrize("stream", (1.0, 0.01))
@pytest.mark.parametrize("eos", (2, 59, 41))
@pytest.mark.parametrize("act", ("quick_gelu", "gelu"))
@pytest.mark.parametrize("name", CLIPS)
def test_clip_reads_and_writes_transformers_files(name, act, eos, stream, tmp_path):
    theirs = redraw(CLIPS[name](clip_config(hidden_act=act, eos_token_id=eos)), stream=stream)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CLIPText.from_pretrained(tmp_path / "theirs")
    assert_same_features(ours, theirs)
    redraw(ours, seed=5, stream=stream).save_pretrained(tmp_path / "ours")
    again, info = CLIPS[name].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_features(ours, again)


@pytest.mark.parametrize("prefix", (True, False), ids=("prefix", "no prefix"))
@pytest.mark.parametrize("name", CLIPS)
def test_clip_reads_old_and_new_names_and_ignores_position_ids(name, prefix, tmp_path):
    theirs = redraw(CLIPS[name](clip_config()))
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    state["embeddings.position_ids"] = torch.arange(12)[None]
    save_file({key if key.startswith("text_projection") or not prefix else "text_model." + key: tensor
               for key, tensor in state.items()}, tmp_path / "model.safetensors")
    assert_same_features(CLIPText.from_pretrained(tmp_path), theirs)


def test_clip_of_one_layer_and_short_texts(tmp_path):
    theirs = redraw(transformers.CLIPTextModelWithProjection(clip_config(num_hidden_layers=1)))
    theirs.save_pretrained(tmp_path)
    assert_same_features(CLIPText.from_pretrained(tmp_path), theirs, IDS[:2, :6])


def test_clip_defaults_are_those_of_transformers():
    """Old config.json files leave out what equals the default."""
    default = transformers.CLIPTextConfig().to_dict()
    ours = CLIPText().config
    assert {key: ours[key] for key in ours if key not in ("architectures", "model_type")} == {
        key: default[key] for key in ours if key not in ("architectures", "model_type")}
    assert ours["model_type"] == default["model_type"]


@pytest.mark.parametrize("config, parameters", (
    (dict(hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12), 123_650_304),
    (dict(hidden_size=1280, intermediate_size=5120, projection_dim=1280, num_attention_heads=20, num_hidden_layers=32,
          hidden_act="gelu"), 694_659_840)), ids=("L", "bigG"))
def test_clip_of_full_size_has_the_public_names_and_shapes(config, parameters):
    with torch.device("meta"):
        ours = CLIPText(**config)
        theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert ({key: t.shape for key, t in ours.state_dict().items()} ==
            {key: t.shape for key, t in theirs.state_dict().items()})


def test_clip_refuses_what_it_does_not_implement():
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        CLIPText(hidden_act="relu")
    with pytest.raises(ValueError, match="num_attention_heads=3 does not divide hidden_size=32"):
        CLIPText(hidden_size=32, num_attention_heads=3)


# ============================================================================================================ tokenizer

WORDS = ["a photo of a red circle", "two blue squares", "don't you're it's hello world 12 345"]
TEXTS = ["", " ", "a red circle", "A RED Circle", "a  red\n\tcircle ", "don't you're it's we've I'm they'll he'd",
         "it\u2019s \u201cquoted\u201d \u2018q\u2019", "hello! hello!!! (world) - a_b @#$%^&*", "!!!", "x!y !",
         "12 345 \u00bd \u0663 \u2167", "caf\u00e9 cafe\u0301 na\u00efve \u00dcBER \u0130 \u1e9e \u03a3\u03a3",
         "\u65e5\u672c\u8a9e \U0001f600\u200d\U0001f680 \u0915\u094d", "a\u00a0b\u3000c\u200bd\u00ad",
         "<|endoftext|> a", "a<|startoftext|>b", "<|ENDOFTEXT|> <|endoftext|", "</w> a</w>",
         "a red circle " * 30, "red" * 60, "\x00\x7f \ufffd &amp; <b>"]


@pytest.fixture(scope="module", params=("<|endoftext|>", "!", {"content": "!", "__type": "AddedToken"}),
                ids=("CLIP-L", "bigG", "bigG, dict"))
def tokenizer_files(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    models.train_tokenizer(WORDS, out, 24)
    config = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": request.param}))
    return out


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_tokenizer_is_that_of_transformers(text, tokenizer_files):
    theirs = transformers.CLIPTokenizer.from_pretrained(tokenizer_files)
    expected = theirs(text, padding="max_length", truncation=True, max_length=24).input_ids
    ids = CLIPTokenizer(tokenizer_files)([text, "a"])
    assert ids[0].tolist() == expected and ids.shape == (2, 24) and ids.dtype == torch.int64


def test_tokenizer_pads_as_its_config_says(tokenizer_files):
    pad = json.loads((tokenizer_files / "tokenizer_config.json").read_text())["pad_token"]
    vocab = json.loads((tokenizer_files / "vocab.json").read_text())
    tokenizer = CLIPTokenizer(tokenizer_files)
    assert tokenizer([""])[0].tolist() == ([vocab["<|startoftext|>"], vocab["<|endoftext|>"]] +
                                           [vocab["<|endoftext|>" if pad == "<|endoftext|>" else "!"]] * 22)
    long = tokenizer(["red " * 50])[0]
    assert long[-1] == vocab["<|endoftext|>"] == max(vocab.values()) and len(set(long[1:-1].tolist())) == 1


def test_tokenizer_errors_name_the_file(tokenizer_files, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copytree(tokenizer_files, tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            CLIPTokenizer(tmp_path / name)
    shutil.copytree(tokenizer_files, tmp_path / "other")
    (tmp_path / "other" / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    with pytest.raises(ValueError, match="vocab.json.*<pad>"):
        CLIPTokenizer(tmp_path / "other")


@pytest.mark.parametrize("changes, length", (
    (dict(pad_token=None), 24), (dict(model_max_length=10 ** 30), 77), (dict(model_max_length=1e30), 77),
    (dict(model_max_length=None), 77)), ids=str)
def test_a_tokenizer_whose_config_names_no_padding_or_length_has_clips(changes, length, tokenizer_files, tmp_path):
    """1e30 is what transformers writes where there is no length."""
    shutil.copytree(tokenizer_files, tmp_path / "tokenizer")
    edit_json(tmp_path / "tokenizer" / "tokenizer_config.json", **{"pad_token": "<|endoftext|>"} | changes)
    tokenizer = CLIPTokenizer(tmp_path / "tokenizer")
    ids = tokenizer(["a red circle", "red " * 100])
    assert ids.shape == (2, length) and ids[0, -1] == ids[1, -1] == tokenizer.end == tokenizer.pad


@pytest.mark.parametrize("changes", (
    *(dict(model_max_length=length) for length in (1, 2, -5, "x", [77], math.nan)), dict(pad_token=5),
    dict(pad_token={"content": 5}), dict(pad_token={})), ids=str)
def test_a_tokenizer_of_no_length_or_padding_is_refused(changes, tokenizer_files, tmp_path):
    shutil.copytree(tokenizer_files, tmp_path / "tokenizer")
    edit_json(tmp_path / "tokenizer" / "tokenizer_config.json", **changes)
    if changes == dict(pad_token={}):                                   # as none
        return CLIPTokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=rf"{tmp_path}/tokenizer/tokenizer_config\.json: model_max_length=.* pad_to"):
        CLIPTokenizer(tmp_path / "tokenizer")


def test_no_texts_are_no_rows(tokenizer_files, tmp_path):
    t5_tokenizer(tmp_path, WORDS[0].split())
    for tokenizer in (CLIPTokenizer(tokenizer_files), T5Tokenizer(tmp_path, 24)):
        assert tokenizer([]).shape == (0, 24) and tokenizer([]).dtype == torch.int64 == tokenizer(["a"]).dtype


# =========================================================================================================== the loader

def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file, change):
    state = load_file(file)
    change(state)
    save_file(state, file)


def truncate(file, part=0.7):
    content = file.read_bytes()
    file.write_bytes(content[:int(part * len(content))])


WEIGHTS, BIAS = "diffusion_pytorch_model.safetensors", "context_embedder.bias"
DAMAGES = {                             # what happened to the directory d, the error, what its message names
    "no directory": (shutil.rmtree, FileNotFoundError, r"config\.json is missing.* download"),
    "no config": (lambda d: (d / "config.json").unlink(), FileNotFoundError, r"config\.json is missing"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, r"no \*\.safetensors .*download"),
    "another variant": (lambda d: (d / WEIGHTS).rename(d / WEIGHTS.replace("l.s", "l.bf16.s")), FileNotFoundError,
                        r"holds diffusion_pytorch_model\.bf16\.safetensors; what is read is diffusion_pytorch_model\."),
    "a folder": (lambda d: (d / WEIGHTS).unlink() or (d / WEIGHTS).mkdir(), FileNotFoundError, "holds no "),
    "config cut off": (lambda d: truncate(d / "config.json"), ValueError, r"config\.json is damaged, not JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[1]"), ValueError, r"config\.json is damaged, a list"),
    "config binary": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), ValueError, r"config\.json is damaged"),
    "another class": (lambda d: edit_json(d / "config.json", _class_name="FluxTransformer2DModel"), ValueError,
                      r"config\.json describes a FluxTransformer2DModel, not a SD3Transformer2DModel"),
    "weights cut off": (lambda d: truncate(d / WEIGHTS), ValueError, rf"{WEIGHTS} is damaged"),
    "header cut off": (lambda d: truncate(d / WEIGHTS, 0.001), ValueError, rf"{WEIGHTS} is damaged"),
    "weights empty": (lambda d: (d / WEIGHTS).write_bytes(b""), ValueError, rf"{WEIGHTS} is damaged"),
    "an error page": (lambda d: (d / WEIGHTS).write_text("<html>404</html>"), ValueError, rf"{WEIGHTS} is damaged"),
    "wrong shape": (lambda d: edit_tensors(d / WEIGHTS, lambda s: s.update({BIAS: torch.zeros(31)})), ValueError,
                    rf"{WEIGHTS}: {BIAS} is \(31,\), .*\(32,\)"),
    "unexpected": (lambda d: edit_tensors(d / WEIGHTS, lambda s: s.update({"x.bias": torch.zeros(3)})), ValueError,
                   rf"{WEIGHTS}: unexpected tensor x\.bias"),
    "missing": (lambda d: edit_tensors(d / WEIGHTS, lambda s: s.pop(BIAS)), ValueError,
                rf"{WEIGHTS}: tensor {BIAS} is missing, 1 in all"),
    **{str(dtype): (lambda d, dtype=dtype: edit_tensors(d / WEIGHTS, lambda s: s.update({BIAS: s[BIAS].to(dtype)})),
                    ValueError, rf"{WEIGHTS}: {BIAS} is {dtype}, not floating point")
       for dtype in (torch.int8, torch.bool, torch.complex64)},
    "another size": (lambda d: edit_json(d / "config.json", num_layers=2, dual_attention_layers=[0]), ValueError,
                     rf"{WEIGHTS}: .*transformer_blocks\.")}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(name, tmp_path):
    damage, error, message = DAMAGES[name]
    saved_mmdit(tmp_path / "net")
    damage(tmp_path / "net")
    with pytest.raises(error, match=message) as caught:
        MMDiT.from_pretrained(tmp_path / "net")
    assert type(caught.value) is error and str(tmp_path / "net") in str(caught.value)


SHARD, INDEX = "diffusion_pytorch_model-00002-of-00006.safetensors", f"{WEIGHTS}.index.json"
SHARD_DAMAGES = {
    "shard absent": (lambda d: (d / SHARD).unlink(), FileNotFoundError, rf"{SHARD} is missing.*download"),
    "shard cut off": (lambda d: truncate(d / SHARD), ValueError, rf"{SHARD} is damaged"),
    "index cut off": (lambda d: truncate(d / INDEX), ValueError, rf"{INDEX} is damaged"),
    **{f"index {text}": (lambda d, text=text: (d / INDEX).write_text(text), ValueError,
                         rf"{INDEX} is damaged, it names no file")
       for text in ("{}", '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"a": "b", "c": 1}}')},
    "twice": (lambda d: edit_tensors(d / SHARD, lambda s: s.update({"pos_embed.proj.bias": torch.ones(32)})),
              ValueError, r"-of-00006\.safetensors: pos_embed\.proj\.bias is in .*-of-00006\.safetensors, too: ")}


@pytest.mark.parametrize("name", SHARD_DAMAGES)
def test_a_damaged_shard_is_an_error_that_names_the_file(name, tmp_path):
    damage, error, message = SHARD_DAMAGES[name]
    saved_mmdit(tmp_path, max_shard_size="100KB")
    damage(tmp_path)
    with pytest.raises(error, match=message):
        MMDiT.from_pretrained(tmp_path)


def test_floating_point_of_any_width_is_read(tmp_path):
    saved_mmdit(tmp_path)
    for dtype in (torch.float8_e4m3fn, torch.float16, torch.float64):
        edit_tensors(tmp_path / WEIGHTS, lambda s: s.update({BIAS: s[BIAS].to(dtype)}))
        want = load_file(tmp_path / WEIGHTS)[BIAS].float()
        assert want.any() and torch.equal(MMDiT.from_pretrained(tmp_path).context_embedder.bias, want)


def test_a_forbidden_file_is_not_called_missing(tmp_path, monkeypatch):
    """Where tests run as root nothing is forbidden, so open, and what safe_open says then, stand in for that."""
    net = saved_mmdit(tmp_path) and MMDiT.from_pretrained(tmp_path)

    def forbidden(file, *_, **__):
        raise PermissionError(13, "Permission denied", str(file))

    def missing(file, **_):
        raise FileNotFoundError(f"No such file or directory: {file}")
    monkeypatch.setattr(models, "open", forbidden, raising=False)
    monkeypatch.setattr(models, "safe_open", missing)
    for read in (lambda: MMDiT.from_pretrained(tmp_path), lambda: models.load_lora(net, tmp_path / WEIGHTS)):
        with pytest.raises(PermissionError, match=f"Permission denied: .*{WEIGHTS}"):
            read()


def test_clip_files_are_no_mmdit_and_the_reverse(tmp_path):
    saved_mmdit(tmp_path / "mmdit")
    transformers.CLIPTextModel(clip_config()).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="describes a CLIPTextModel, not a SD3Transformer2DModel"):
        MMDiT.from_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="a SD3Transformer2DModel, not a CLIPTextModelWithProjection or CLIPTextModel"):
        CLIPText.from_pretrained(tmp_path / "mmdit")


def test_loading_holds_one_copy_and_leaves_the_file_alone(tmp_path):
    config = mmdit_config(heads=8, head_dim=64, num_layers=6, qk_norm="rms_norm")
    with torch.device("meta"):
        net = MMDiT(**config)
    save_file({name: torch.randn(t.shape) for name, t in net.state_dict().items()}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(net.config))
    saved_mmdit(tmp_path / "small")
    child = textwrap.dedent(f"""
        import re, sys
        import torch
        import models

        def peak():                     # bytes; of this process alone, where getrusage would begin at its parent's
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        torch.set_num_threads(1)
        models.MMDiT.from_pretrained({str(tmp_path / "small")!r})        # what PyTorch itself takes on first use
        before = peak()
        net = models.MMDiT.from_pretrained({str(tmp_path)!r})
        print(peak() - before)
        open({str(tmp_path / WEIGHTS)!r}, "r+b").write(bytes({2 ** 20}))  # the weights do not live in the file
        assert net.context_embedder.weight.abs().max() > 0 and not net.training
        """)
    out = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    size = (tmp_path / WEIGHTS).stat().st_size
    assert size > 100e6 and 0.9 * size < int(out.stdout) < 1.3 * size, int(out.stdout) / size


def test_loaded_networks_are_frozen_and_in_eval_mode(random_model):
    for cls, part in ((MMDiT, "transformer"), (CLIPText, "text_encoder")):
        net = cls.from_pretrained(random_model / part)
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        assert not any(t.is_meta for t in net.state_dict().values())


# ========================================================================================================= the pipeline

@pytest.mark.parametrize("width, text_length", ((80, None), (96, None), (96, 7)))
def test_text_features_are_those_of_diffusers_pipeline(width, text_length, tmp_path):
    """Two CLIP encoders as in SD3: side by side, zeros up to the network's width, pooled features side by side.

    Zeros stand for the absent T5, too; not where the CLIPs fill the network's width, as the tiny model's does.
    """
    config = dict(SD35M, joint_attention_dim=width, pooled_projection_dim=40)
    texts = ["", "a red circle!", "two blue squares " * 20]
    encoders, tokenizers = [], []
    for i, (pad, dim, act) in enumerate((("<|endoftext|>", 32, "quick_gelu"), ("!", 48, "gelu"))):
        suffix = ("", "_2")[i]
        vocab = models.train_tokenizer(WORDS, tmp_path / f"tokenizer{suffix}", 12)
        edit_json(tmp_path / f"tokenizer{suffix}" / "tokenizer_config.json", pad_token=pad)
        tokenizers.append(transformers.CLIPTokenizer.from_pretrained(tmp_path / f"tokenizer{suffix}"))
        encoders.append(redraw(transformers.CLIPTextModelWithProjection(clip_config(
            vocab_size=vocab, hidden_size=dim, projection_dim=20, hidden_act=act, eos_token_id=2)), seed=i))
        encoders[i].save_pretrained(tmp_path / f"text_encoder{suffix}")
    net = saved_mmdit(tmp_path / "transformer", config)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"} | {
        part: ["library", "class"] for part in
        ("transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")} | {"vae": [None, None]}))
    theirs = StableDiffusion3Pipeline(
        transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=encoders[0],
        text_encoder_2=encoders[1], text_encoder_3=None, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
        tokenizer_3=None)
    context, _, pooled, _ = theirs.encode_prompt(texts, texts, texts, do_classifier_free_guidance=False,
                                                 max_sequence_length=text_length or 128)
    ours, other = models.load(str(tmp_path), text_length=text_length), models.load(str(tmp_path), text_length=9)
    our_context, our_pooled = ours.encode_text(texts)
    assert_equal(our_context, context[:, :12] if width == 80 else context)
    assert_equal(our_pooled, pooled)
    edit_json(tmp_path / "tokenizer_2" / "tokenizer_config.json", model_max_length=11)
    with pytest.raises(ValueError, match=f"{tmp_path}: the CLIP tokenizers' model_max_length differ"):
        models.load(str(tmp_path))
    again = ours.encode_text(texts[::-1] + texts[:1])                   # from the cache, in the order asked for
    assert torch.equal(again[0], our_context[[2, 1, 0, 0]]) and torch.equal(again[1], our_pooled[[2, 1, 0, 0]])
    for pipe in (ours, other):
        pipe.prepare([""], tmp_path / "cache")
    assert (ours.folder == other.folder) == (width == 80)               # as many zeros, so the same features


def test_decode_and_latent_shape(random_model):
    pipe = models.load(str(random_model))
    images = pipe.decode(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 7.0], dtype=torch.bfloat16))
    assert images.tolist() == [0, 0, 0.5, 0.75, 1, 1] and images.dtype == torch.float32
    assert pipe.latent_shape() == (3, 12, 12) and pipe.latent_shape(16) == (3, 16, 16)
    with pytest.raises(ValueError, match="resolution=13 is not a multiple of 4"):
        pipe.latent_shape(13)


@pytest.mark.parametrize("damage, error, message", (
    (shutil.rmtree, FileNotFoundError, "does not exist"),
    (lambda d: (d / "model_index.json").unlink(), FileNotFoundError, r"model_index\.json is missing"),
    (lambda d: edit_json(d / "model_index.json", _class_name="FluxPipeline"), ValueError, "describes a SD3Transformer"),
    (lambda d: edit_json(d / "model_index.json", _class_name="SanaPipeline"), ValueError, "SanaPipeline: only Stable"),
    (lambda d: edit_json(d / "model_index.json", controlnet=["a", "b"]), ValueError, "has no part controlnet"),
    (lambda d: edit_json(d / "model_index.json", transformer=[None, None]), ValueError, "names no transformer"),
    (lambda d: edit_json(d / "model_index.json", transformer=[]), ValueError, "names no transformer"),
    (lambda d: edit_json(d / "model_index.json", _class_name=["x"]), ValueError, r"describes a \['x'\]: only Stable"),
    (lambda d: edit_json(d / "model_index.json", scheduler=7, _class_name=None), ValueError, "describes a None: only "),
    (lambda d: edit_json(d / "text_encoder" / "config.json", num_attention_heads=3), ValueError,
     r"text_encoder/config\.json: .*num_attention_heads=3 does not divide"),
    (lambda d: shrink(d / "text_encoder", vocab_size=50), ValueError,
     r"model/tokenizer makes 16 tokens of 641 kinds, .*model/text_encoder takes 16 of 50: parts of different models"),
    (lambda d: edit_json(d / "tokenizer" / "tokenizer_config.json", model_max_length=20), ValueError,
     r"model/tokenizer makes 20 tokens of 641 kinds, .*model/text_encoder takes 16 of 641: parts of different"),
    (lambda d: edit_json(d / "model_index.json", vae=["diffusers", "AutoencoderKL"]), FileNotFoundError, "vae/config"),
    (lambda d: shutil.rmtree(d / "text_encoder"), FileNotFoundError, r"text_encoder/config\.json is missing"),
    (lambda d: edit_json(d / "model_index.json", text_encoder=[None, None]), ValueError, r"give 0 \(CLIP\)"),
    (lambda d: saved_mmdit(d / "transformer"), ValueError, "give 32 .* takes 24 .* different models")),
    ids=("no directory", "no index", "another pipeline", "an unknown pipeline", "an unknown part", "no network",
         "an empty part", "a list", "a number", "three heads", "a small vocabulary", "long texts", "a VAE",
         "no text encoder", "none named", "too wide"))
def test_a_damaged_pipeline_is_an_error_that_names_the_file(damage, error, message, random_model, tmp_path):
    shutil.copytree(random_model, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=message):
        models.load(str(tmp_path / "model"))
    assert models.family(str(tmp_path / "model")) in ("sd3", "flux", None)


def shrink(directory, vocab_size):
    edit_json(directory / "config.json", vocab_size=vocab_size, eos_token_id=2)
    edit_tensors(directory / "model.safetensors", lambda state: state.update(
        {key: t[:vocab_size].clone() for key, t in state.items() if "token_embedding" in key}))


def test_a_clip_of_another_tokenizers_end_is_warned_of(random_model, tmp_path):
    shutil.copytree(random_model, tmp_path / "model")
    edit_json(tmp_path / "model" / "text_encoder" / "config.json", eos_token_id=7)
    with pytest.warns(UserWarning, match="eos_token_id is 7, its tokenizer ends a text with .* different models"):
        models.load(str(tmp_path / "model"))


def test_load_by_name_and_with_random_weights(random_model):
    saved = models.load("tiny", weights=random_model).net.context_embedder.weight
    drawn = models.load(str(random_model), init="random").net.context_embedder.weight
    assert saved.shape == drawn.shape and not torch.equal(saved, drawn)
    with pytest.raises(ValueError, match="init='zeros'"):
        models.load(str(random_model), init="zeros")
    everything = "A model is tiny, tiny-prox, tiny-score, sd35m, flux, sd14, uvit or a directory"
    for name, weights in (("no-such-model", None), ("tiny", "nowhere")):
        with pytest.raises(FileNotFoundError, match=f"--model {name}: .* does not exist. {everything}"):
            models.load(name, weights)


@pytest.mark.parametrize("name, holds", (("sd14", "StableDiffusion3"), ("flux", "StableDiffusion3"),
                                         ("uvit", "StableDiffusion3"), ("sd35m", "UViT")))
def test_a_directory_of_another_family_than_the_names_is_refused(name, holds):
    directory = models.SHIPPED["tiny-prox" if holds == "UViT" else "tiny"]
    for init in (None, "random"):
        with pytest.raises(ValueError, match=f"{directory} holds a {holds}Pipeline, --model {name} .*: give --model "
                                             f"{directory} instead"):
            models.load(name, directory, init=init)
    assert models.load("uvit" if holds == "UViT" else "sd35m", directory).family == models.family(str(directory))


def test_where_a_name_is_looked_for(tmp_path, monkeypatch):
    """A public model's name is weights/NAME, whatever else is called so; another name is a folder, or weights/NAME."""
    monkeypatch.setattr(models, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    for folder in ("flux", "own", "weights/mine"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "weights/mine/model_index.json").write_text('{"_class_name": "UViTPipeline"}')
    assert models.locate("flux") == (None, tmp_path / "weights" / "flux")
    assert models.locate("./flux") == (None, Path("flux")) and models.locate("own") == (None, Path("own"))
    assert models.locate("mine") == (None, tmp_path / "weights" / "mine") and models.family("mine") == "uvit"
    assert models.family("tiny") == "sd3" and models.family("own") is None is models.family("nowhere")


# ============================================================================================================ schedules

STEPS = pytest.mark.parametrize("steps", (1, 4, 10, 28, 40))


def assert_same_times(ours, theirs):
    assert ours == sorted(ours, reverse=True) and all(type(t) is float for t in ours) and ours[-1] == 0
    torch.testing.assert_close(torch.tensor(ours), theirs.float(), rtol=0, atol=1e-6)


@STEPS
@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_sd3_schedule(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    assert_same_times(models.schedule(steps, shift, "sd3"), scheduler.sigmas)


@STEPS
def test_dpm_schedule(steps):
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction",
                                            algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    assert_same_times(models.schedule(steps, 3.0, "dpm"), scheduler.sigmas)


@STEPS
@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_linear_schedule_is_diffusers_with_even_sigmas(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    assert_same_times(models.schedule(steps, shift), scheduler.sigmas)


def test_schedule_errors():
    with pytest.raises(ValueError, match="steps=0"):
        models.schedule(0)
    with pytest.raises(ValueError, match="kind='cosine'"):
        models.schedule(4, kind="cosine")


# ================================================================================================================= LoRA

RANK, ALPHA = 4, 6.0                                                    # alpha / rank = 1.5


def lora_pair(directory, alpha=ALPHA):
    """Our network and diffusers', the same weights; ours with a LoRA whose A and B are random."""
    theirs = saved_mmdit(directory)
    ours = MMDiT.from_pretrained(directory)
    models.add_lora(ours, RANK, alpha, models.MMDiT.lora_targets)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in models.trainable(ours):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return ours, theirs


def inject(theirs, ours=None, alpha=ALPHA, **options):
    """peft's LoRA in diffusers' network, its values ours or random."""
    config = peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(models.MMDiT.lora_targets), **options)
    peft.inject_adapter_in_model(config, theirs)
    theirs.peft_config, theirs._hf_peft_config_loaded = {"default": config}, True
    values, generator = dict(ours.named_parameters()) if ours else {}, torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if ".lora_" in name:
                value = values.get(name.removesuffix(".default.weight")) if ours else None
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 if value is None else value)
    return theirs


def test_add_lora_starts_at_the_network_and_trains_the_lora_alone(tmp_path):
    saved_mmdit(tmp_path)
    net, inputs = MMDiT.from_pretrained(tmp_path), mmdit_inputs(SD35M)
    before, names = net(*inputs), set(net.state_dict())
    params = models.add_lora(net.requires_grad_(True), RANK, ALPHA, models.MMDiT.lora_targets)
    assert torch.equal(net(*inputs), before) and names < set(net.state_dict())
    assert {name.rsplit(".", 1)[1] for name, p in net.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert [id(p) for p in params] == [id(p) for p in models.trainable(net)]
    net(*inputs).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert [name for name, layer in models.lora_layers(net).items() if not layer.lora_B.grad.any()] == [
        "transformer_blocks.2.attn.add_q_proj"]                         # the last block drops what these queries find


def test_add_lora_changes_the_layers_that_peft_changes(tmp_path):
    ours, theirs = lora_pair(tmp_path)
    inject(theirs)
    assert set(models.lora_layers(ours)) == {
        name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert not any("attn2" in name for name in models.lora_layers(ours))
    other = MMDiT(**SD35M)
    models.add_lora(other, RANK, ALPHA, ["proj"])                       # whole words: not add_q_proj
    assert {name.split(".", 2)[2] for name in models.lora_layers(other)} == {"ff.net.0.proj", "ff_context.net.0.proj"}
    other, targets = MMDiT(**SD35M), ["context_embedder", "attn2.to_q"]                  # a whole name is one's end
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, target_modules=targets), saved_mmdit(tmp_path))
    models.add_lora(other, RANK, ALPHA, iter(targets))
    assert list(models.lora_layers(other)) == [
        name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("rank", (4, 32))
def test_lora_starts_as_pefts_gaussian(rank):
    def wide():
        return torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(4096, 8)))
    ours, theirs = wide(), wide()
    models.add_lora(ours, rank, 1.0, ["0"])
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=1.0, target_modules=["0.0"], init_lora_weights="gaussian"), theirs)
    reference = theirs[0][0].lora_A["default"].weight
    assert ours[0][0].lora_A.shape == reference.shape
    assert abs(reference.std() * rank - 1) < 0.03 and abs(ours[0][0].lora_A.std() * rank - 1) < 0.03
    assert not ours[0][0].lora_B.any() and not theirs[0][0].lora_B["default"].weight.any()


@pytest.mark.parametrize("alpha", (4.0, 6.0))
def test_lora_forward_and_gradients_are_those_of_peft(alpha, tmp_path):
    ours, theirs = lora_pair(tmp_path, alpha)
    inputs = mmdit_inputs(SD35M)
    with torch.no_grad():
        base = diffusers_forward(theirs, *inputs)
    inject(theirs, ours, alpha)
    a, b = ours(*inputs), diffusers_forward(theirs, *inputs)
    assert_equal(a, b)
    assert (a - base).abs().max() > 0.05 * base.std()                   # the LoRA is more than a rounding error
    a.square().mean().backward()
    b.square().mean().backward()
    theirs = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            reference = theirs[f"{name}.default.weight"].grad
            assert (p.grad - reference).abs().max() <= 1e-4 * reference.abs().max(), name


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_lora_trains_in_at_least_float32(dtype, tmp_path):
    saved_mmdit(tmp_path)
    net = MMDiT.from_pretrained(tmp_path, dtype)
    params = models.add_lora(net, RANK, ALPHA, models.MMDiT.lora_targets)
    out = net(*mmdit_inputs(SD35M, dtype=dtype))
    out.float().square().mean().backward()
    assert out.dtype == dtype
    assert {p.dtype for p in params} == {p.grad.dtype for p in params} == {torch.promote_types(dtype, torch.float32)}


def test_diffusers_reads_our_lora(tmp_path):
    ours, theirs = lora_pair(tmp_path)
    models.save_lora(ours, tmp_path / "lora.safetensors")
    inputs = mmdit_inputs(SD35M)
    pipe = StableDiffusion3Pipeline(
        transformer=theirs, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
        text_encoder_2=None, text_encoder_3=None, tokenizer=None, tokenizer_2=None, tokenizer_3=None)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert_equal(ours(*inputs).detach(), diffusers_forward(theirs, *inputs).detach())
    again = saved_mmdit(tmp_path)
    again.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix="transformer")
    assert_equal(ours(*inputs).detach(), diffusers_forward(again, *inputs).detach())


def save_by_adapter(theirs, directory):
    theirs.save_lora_adapter(directory)
    return directory / "pytorch_lora_weights.safetensors"


def save_by_pipeline(theirs, directory, metadata=True):
    layers = peft.get_peft_model_state_dict(theirs, adapter_name="default")
    config = theirs.peft_config["default"].to_dict()
    config = {key: list(value) if isinstance(value, set) else value for key, value in config.items()}
    StableDiffusion3Pipeline.save_lora_weights(
        directory, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config if metadata else None)
    return directory / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("save", (save_by_adapter, save_by_pipeline))
def test_load_lora_reads_what_diffusers_wrote(save, tmp_path):
    """Its alpha, 10, is not that of our network, which keeps its own and still computes the same."""
    ours, theirs = lora_pair(tmp_path)
    inject(theirs, alpha=10.0)
    scale = {layer.lora_scale for layer in models.lora_layers(ours).values()}
    save(theirs, tmp_path / "lora")
    models.load_lora(ours, tmp_path / "lora")                          # the folder of its pytorch_lora_weights
    inputs = mmdit_inputs(SD35M)
    assert_equal(ours(*inputs).detach(), diffusers_forward(theirs, *inputs).detach())
    assert {layer.lora_scale for layer in models.lora_layers(ours).values()} == scale == {1.5}


def test_a_lora_file_without_alpha_has_scale_one(tmp_path):
    ours, theirs = lora_pair(tmp_path)
    inject(theirs, alpha=float(RANK))
    models.load_lora(ours, save_by_pipeline(theirs, tmp_path / "lora", metadata=False))
    inputs = mmdit_inputs(SD35M)
    assert_equal(ours(*inputs).detach(), diffusers_forward(theirs, *inputs).detach())


def test_load_lora_reads_the_alpha_that_dancegrpo_writes_beside_it(tmp_path):
    ours, theirs = lora_pair(tmp_path)
    inject(theirs, alpha=2.0 * RANK)
    file = save_by_pipeline(theirs, tmp_path / "lora", metadata=False)
    beside = Path(file).parent / "lora_config.json"
    beside.write_text(json.dumps({"step": 100, "lora_params": {"lora_rank": RANK, "lora_alpha": 2 * RANK}}))
    models.load_lora(ours, file)
    inputs = mmdit_inputs(SD35M)
    assert_equal(ours(*inputs).detach(), diffusers_forward(theirs, *inputs).detach())
    beside.write_text("{}")
    with pytest.raises(ValueError, match="lora_config.json states no lora_params"):
        models.load_lora(ours, file)


def test_load_lora_reads_what_peft_wrote(tmp_path):
    ours, theirs = lora_pair(tmp_path)
    config = peft.LoraConfig(r=RANK, lora_alpha=10.0, target_modules=list(models.MMDiT.lora_targets))
    theirs = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for p in models.trainable(theirs):
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    theirs.save_pretrained(tmp_path / "lora")
    models.load_lora(ours, tmp_path / "lora" / "adapter_model.safetensors")
    inputs = mmdit_inputs(SD35M)
    want = diffusers_forward(theirs, *inputs).detach()
    assert_equal(ours(*inputs).detach(), want)
    renamed = shutil.copy(tmp_path / "lora" / "adapter_model.safetensors", tmp_path / "lora" / "renamed.safetensors")
    for path in (tmp_path / "lora", renamed):
        bare = MMDiT.from_pretrained(tmp_path)
        models.load_lora(bare, path)
        assert_equal(bare(*inputs).detach(), want)
    (tmp_path / "lora" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        models.load_lora(ours, renamed)


def test_load_lora_reads_pefts_names_in_memory(tmp_path):
    ours, _ = lora_pair(tmp_path)
    models.save_lora(ours, tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    state = {key.replace(".weight", ".default.weight"): tensor for key, tensor in state.items()}
    save_file(state, tmp_path / "other.safetensors")
    nets = [MMDiT.from_pretrained(tmp_path) for _ in range(2)]
    for net, name in zip(nets, ("lora", "other")):
        models.load_lora(net, tmp_path / f"{name}.safetensors")
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters())) and models.lora_layers(nets[1])


def test_save_lora_and_load_lora_are_inverse(tmp_path):
    ours, _ = lora_pair(tmp_path)
    models.save_lora(ours, tmp_path / "lora.safetensors")
    again = MMDiT.from_pretrained(tmp_path)
    params = models.add_lora(again, RANK, ALPHA, models.MMDiT.lora_targets)
    models.load_lora(again, tmp_path / "lora.safetensors")
    for p, q in zip(params, models.trainable(ours), strict=True):
        torch.testing.assert_close(p, q, rtol=3e-7, atol=0)             # B is multiplied by 1.5 and divided again
    assert models.trainable(again) == params and all(p.is_leaf and p.grad is None for p in params)


def test_load_lora_into_a_bare_network(tmp_path):
    """On the layers that the file has and no others, at its rank; other ranks side by side are refused."""
    MMDiT(**SD35M).save_pretrained(tmp_path)
    ours, bare = MMDiT.from_pretrained(tmp_path), MMDiT.from_pretrained(tmp_path)
    for p in models.add_lora(ours, 3, 7.0, ("0.attn.to_q", "attn.to_out.0")):
        torch.nn.init.normal_(p.data, generator=torch.Generator().manual_seed(p.numel()))
    models.save_lora(ours, tmp_path / "lora.safetensors")
    models.load_lora(bare, tmp_path / "lora.safetensors")
    inputs = mmdit_inputs(SD35M)
    torch.testing.assert_close(bare(*inputs), ours(*inputs), rtol=1e-5, atol=1e-6)
    assert models.lora_layers(bare).keys() == models.lora_layers(ours).keys()
    assert [p.shape for p in models.trainable(bare)] == [p.shape for p in models.trainable(ours)]
    edit_tensors(tmp_path / "lora.safetensors", lambda state: state.update(
        {key: t[:2] for key, t in state.items() if key.endswith("0.attn.to_q.lora_A.weight")}))
    with pytest.raises(ValueError, match=r"no LoRA of one rank, but \[2, 3\]"):
        models.load_lora(MMDiT.from_pretrained(tmp_path), tmp_path / "lora.safetensors")


LORA_B = "transformer_blocks.0.attn.to_q.lora_B.weight"


def other_rank(state):
    state.update({key: t[:2] if "lora_A" in key else t[:, :2].contiguous() for key, t in state.items()})


LORA_DAMAGES = {
    "no file": (Path.unlink, FileNotFoundError, r"lora\.safetensors"),
    "cut off": (truncate, ValueError, r"lora\.safetensors is damaged"),
    "missing": (lambda file: edit_tensors(file, lambda s: s.pop(f"transformer.{LORA_B}")), ValueError,
                rf"lora\.safetensors: tensor {LORA_B} is missing, 1 in all"),
    "unexpected": (lambda file: edit_tensors(file, lambda s: s.update({"transformer.x.lora_A.weight": torch.ones(1)})),
                   ValueError, r"unexpected tensor transformer\.x\.lora_A\.weight"),
    "another rank": (lambda file: edit_tensors(file, other_rank), ValueError, r"lora_[AB]\.weight is .*2.*4"),
    "int8": (lambda file: edit_tensors(file, lambda s: s.update({k: t.to(torch.int8) for k, t in s.items()})),
             ValueError, r"lora_[AB]\.weight is torch.int8, not floating point"),
    "no dimension": (lambda file: edit_tensors(file, lambda s: s.update({k: torch.ones(()) for k in s if "A" in k})),
                     ValueError, r"lora_A\.weight is \(\)"),
    **{f"header {text}": (lambda file, text=text: save_file(load_file(file), file, {"lora_adapter_metadata": text}),
                          ValueError, rf"lora\.safetensors{message}") for text, message in (
        ("{", " is damaged, its lora_adapter_metadata"), ("[1]", " is damaged, its lora_adapter_metadata"),
        ('{"transformer.r": 4}', ": its lora_alpha is None, its r 4"),
        ('{"r": 0, "lora_alpha": 8}', ": its lora_alpha is 8, its r 0"),
        ('{"r": "4", "lora_alpha": 8}', ": its lora_alpha is 8, its r '4'"))},
    **{name: (lambda file, name=name: edit_tensors(file, lambda s: s.update({name: torch.ones(4, 4)})), ValueError,
              rf"lora\.safetensors: {name} is {kind}.*: only the network's LoRA is read, .*save_lora_adapter")
       for name, kind in (
        ("lora_unet_mid_block_attentions_0.lora_down.weight", "in kohya's format"),
        ("lora_te1_text_model_encoder.alpha", "a text encoder's"),
        ("text_encoder.text_model.encoder.layers.0.lora_A.weight", "a text encoder's"),
        ("unet.mid_block.attn1.processor.to_q_lora.down.weight", "in an old format of diffusers"))}}


def test_a_lora_that_cannot_be_read_leaves_the_network_as_it_was(tmp_path):
    ours, _ = lora_pair(tmp_path)
    models.save_lora(ours, tmp_path / "lora.safetensors")
    edit_tensors(tmp_path / "lora.safetensors", lambda state: state.pop(f"transformer.{LORA_B}"))
    bare, before = MMDiT.from_pretrained(tmp_path), [p.clone() for p in ours.parameters()]
    names = list(bare.state_dict())
    for net in (bare, ours):
        with pytest.raises(ValueError, match="is missing"):
            models.load_lora(net, tmp_path / "lora.safetensors")
    assert not models.lora_layers(bare) and list(bare.state_dict()) == names
    trained = MMDiT(**SD35M)
    with pytest.raises(ValueError, match="is missing"):
        models.load_lora(trained, tmp_path / "lora.safetensors")
    assert all(p.requires_grad for p in trained.parameters())
    assert not any("lora" in name for module in trained.modules() for name in vars(module))
    assert all(map(torch.equal, ours.parameters(), before))
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        models.load_lora(bare, tmp_path / "adapter_model.bin")


@pytest.mark.parametrize("name", LORA_DAMAGES)
def test_a_damaged_lora_is_an_error_that_names_the_file(name, tmp_path):
    damage, error, message = LORA_DAMAGES[name]
    ours, _ = lora_pair(tmp_path)
    models.save_lora(ours, tmp_path / "lora.safetensors")
    damage(tmp_path / "lora.safetensors")
    for net in (ours, MMDiT.from_pretrained(tmp_path)):
        if net is ours or name not in ("unexpected", "another rank", "no dimension"):    # a bare one says it otherwise
            with pytest.raises(error, match=message) as caught:
                models.load_lora(net, tmp_path / "lora.safetensors")
            assert type(caught.value) is error and str(tmp_path / "lora.safetensors") in str(caught.value)
    if name == "no dimension":
        with pytest.raises(ValueError, match=r"lora\.safetensors: rank=0"):
            models.load_lora(net, tmp_path / "lora.safetensors")


@pytest.mark.parametrize("option", (dict(use_rslora=True), dict(alpha_pattern={"to_q": 2})), ids=str)
def test_a_lora_of_another_kind_is_refused(option, tmp_path):
    ours, theirs = lora_pair(tmp_path)
    inject(theirs, **option)
    with pytest.raises(ValueError, match=next(iter(option))):
        models.load_lora(ours, save_by_adapter(theirs, tmp_path / "lora"))


def test_add_lora_errors(tmp_path):
    net = MMDiT(**SD35M)
    with pytest.raises(ValueError, match="rank=0"):
        models.add_lora(net, 0, 1.0, models.MMDiT.lora_targets)
    for alpha in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"alpha={alpha}: .* alpha above 0"):
            models.add_lora(net, 4, alpha, models.MMDiT.lora_targets)
    with pytest.raises(ValueError, match="attn.to_x"):
        models.add_lora(net, 4, 1.0, ("attn.to_q", "attn.to_x"))
    assert not models.lora_layers(net) and all(p.requires_grad for p in net.parameters())
    for targets in ("attn.to_q", (), []):
        with pytest.raises(ValueError, match="targets=.*give a LoRA a tuple"):
            models.add_lora(net, 4, 1.0, targets)
    with pytest.raises(ValueError, match="no LoRA to write: call add_lora"):
        models.save_lora(net, tmp_path / "lora.safetensors")
    unknown = {"transformer.x.lora_A.weight": torch.ones(4, 8)}
    for tensors, message in (({}, "no LoRA of one rank, but none"), (unknown, "the LoRA target x ends the name of no")):
        save_file(tensors, tmp_path / "lora.safetensors")
        with pytest.raises(ValueError, match=rf"lora\.safetensors.* {message}"):
            models.load_lora(net, tmp_path / "lora.safetensors")
    assert not models.lora_layers(net)
    models.add_lora(net, 4, 1.0, models.MMDiT.lora_targets)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/absent does not exist"):
        models.save_lora(net, tmp_path / "absent" / "lora.safetensors")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no adapter_model.* and no pytorch_lora_weights"):
        models.load_lora(net, tmp_path)
    with pytest.raises(ValueError, match="a LoRA already"):
        models.add_lora(net, 4, 1.0, models.MMDiT.lora_targets)
    with pytest.raises(ValueError, match="save_lora"):
        net.save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()


# ======================================================================================================== other weights

def test_using_swaps_the_weights_and_gives_them_back():
    layer = torch.nn.Linear(3, 2)
    params, x = list(layer.parameters()), torch.randn(5, 3)
    own, other = [p.detach().clone() for p in params], [torch.randn(p.shape) for p in params]
    expected = torch.nn.functional.linear(x, *other)
    with models.using(params, other):
        assert torch.equal(layer(x), expected)
        assert all(p.data_ptr() == value.data_ptr() for p, value in zip(params, other))      # nothing is copied
    with pytest.raises(KeyError):
        with models.using(params, other):
            raise KeyError
    with models.using(params, other), models.using(params, None):
        assert torch.equal(layer(x), expected)
    assert all(torch.equal(p, value) for p, value in zip(params, own))
    with pytest.raises(ValueError):
        with models.using(params, other[:1]):
            pass
    assert all(torch.equal(p, value) for p, value in zip(params, own))


def test_using_sends_gradients_to_the_parameters_at_the_values_in_use():
    layer = torch.nn.Linear(3, 1, bias=False)
    weight, x, other = layer.weight, torch.randn(5, 3), torch.randn(1, 3)
    own = weight.detach().clone()
    with models.using([weight], [other]):
        layer(x).square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * (x @ other.T * x).sum(0, keepdim=True))
    assert other.grad is None and torch.equal(weight, own)
    torch.optim.SGD([weight], lr=1.0).step()                              # and a step starts from the parameters' own
    torch.testing.assert_close(weight.detach(), own - weight.grad)
