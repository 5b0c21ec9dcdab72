"""Files from elsewhere: original single files against diffusers' converters, tokenizer.json against transformers."""
import inspect
import json
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from tokenizers.processors import TemplateProcessing

import models
from models import VAE, CLIPText, CLIPTokenizer, Flux, MMDiT, T5Encoder, T5Tokenizer, UNet, from_single_file

ROOT = Path(models.__file__).parent

# ======================================================================================= the originals, written by hand

def both(name, *shape):
    """A layer's weight and bias, {name: shape}."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def sd3_file(config):
    """The names and shapes of an original SD3 file, as its authors' MMDiT class has them."""
    d, p, head = config["caption_projection_dim"], config["patch_size"], config["attention_head_dim"]
    shapes = {"pos_embed": (1, config["pos_embed_max_size"] ** 2, d)}
    shapes |= both("x_embedder.proj", d, config["in_channels"], p, p)
    shapes |= both("t_embedder.mlp.0", d, 256) | both("t_embedder.mlp.2", d, d)
    shapes |= both("y_embedder.mlp.0", d, config["pooled_projection_dim"]) | both("y_embedder.mlp.2", d, d)
    shapes |= both("context_embedder", d, config["joint_attention_dim"])
    for i in range(config["num_layers"]):
        for stream in ("context_block", "x_block"):
            name, last = f"joint_blocks.{i}.{stream}", stream == "context_block" and i == config["num_layers"] - 1
            dual = stream == "x_block" and i in config.get("dual_attention_layers", ())
            shapes |= both(f"{name}.adaLN_modulation.1", (2 if last else 9 if dual else 6) * d, d)
            for attention in ("attn", "attn2") if dual else ("attn",):
                shapes |= both(f"{name}.{attention}.qkv", 3 * d, d)
                if config.get("qk_norm"):
                    shapes |= {f"{name}.{attention}.ln_{x}.weight": (head,) for x in "qk"}
                if not last:
                    shapes |= both(f"{name}.{attention}.proj", d, d)
            if not last:
                shapes |= both(f"{name}.mlp.fc1", 4 * d, d) | both(f"{name}.mlp.fc2", d, 4 * d)
    shapes |= both("final_layer.linear", p * p * config["out_channels"], d)
    return shapes | both("final_layer.adaLN_modulation.1", 2 * d, d)


def flux_file(config):
    """The names and shapes of an original FLUX file."""
    head, c = config["attention_head_dim"], config["in_channels"]
    d = config["num_attention_heads"] * head
    shapes = both("img_in", d, c) | both("txt_in", d, config["joint_attention_dim"])
    for name, width in (("time_in", 256), ("vector_in", config["pooled_projection_dim"]),
                        *([("guidance_in", 256)] if config["guidance_embeds"] else [])):
        shapes |= both(f"{name}.in_layer", d, width) | both(f"{name}.out_layer", d, d)

    def norms(name):
        return {f"{name}.{x}_norm.scale": (head,) for x in ("query", "key")}
    for i in range(config["num_layers"]):
        for stream in ("img", "txt"):
            name = f"double_blocks.{i}.{stream}"
            shapes |= both(f"{name}_mod.lin", 6 * d, d) | both(f"{name}_attn.qkv", 3 * d, d)
            shapes |= both(f"{name}_attn.proj", d, d) | norms(f"{name}_attn.norm")
            shapes |= both(f"{name}_mlp.0", 4 * d, d) | both(f"{name}_mlp.2", d, 4 * d)
    for i in range(config["num_single_layers"]):
        name = f"single_blocks.{i}"
        shapes |= both(f"{name}.linear1", 7 * d, d) | both(f"{name}.linear2", d, 5 * d) | norms(f"{name}.norm")
        shapes |= both(f"{name}.modulation.lin", 3 * d, d)
    return shapes | both("final_layer.linear", c, d) | both("final_layer.adaLN_modulation.1", 2 * d, d)


def vae_file(config):
    """The names and shapes of an original autoencoder."""
    widths, layers, latent = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    top, shapes = widths[-1], {}

    def resnet(name, a, b):
        layer = both(f"{name}.norm1", a) | both(f"{name}.conv1", b, a, 3, 3)
        layer |= both(f"{name}.norm2", b) | both(f"{name}.conv2", b, b, 3, 3)
        return layer | (both(f"{name}.nin_shortcut", b, a, 1, 1) if a != b else {})
    for part, first, channels in (("encoder", 3, 2 * latent), ("decoder", latent, 3)):
        shapes |= resnet(f"{part}.mid.block_1", top, top) | resnet(f"{part}.mid.block_2", top, top)
        shapes |= both(f"{part}.mid.attn_1.norm", top)
        for layer in ("q", "k", "v", "proj_out"):
            shapes |= both(f"{part}.mid.attn_1.{layer}", top, top, 1, 1)
        start, end = (widths[0], top) if part == "encoder" else (top, widths[0])
        shapes |= both(f"{part}.conv_in", start, first, 3, 3) | both(f"{part}.norm_out", end)
        shapes |= both(f"{part}.conv_out", channels, end, 3, 3)
    for i, dim in enumerate(widths):
        below, above = widths[max(i - 1, 0)], widths[min(i + 1, len(widths) - 1)]
        for j in range(layers):
            shapes |= resnet(f"encoder.down.{i}.block.{j}", dim if j else below, dim)
        for j in range(layers + 1):
            shapes |= resnet(f"decoder.up.{i}.block.{j}", dim if j else above, dim)
        if i < len(widths) - 1:
            shapes |= both(f"encoder.down.{i}.downsample.conv", dim, dim, 3, 3)
        if i > 0:
            shapes |= both(f"decoder.up.{i}.upsample.conv", dim, dim, 3, 3)
    if config.get("use_quant_conv", True):
        shapes |= both("quant_conv", 2 * latent, 2 * latent, 1, 1) | both("post_quant_conv", latent, latent, 1, 1)
    return shapes


def sd3_config(**other):
    return dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20,
                pos_embed_max_size=9) | other


def flux_config(**other):
    return dict(in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True,
                axes_dims_rope=(4, 6, 6)) | other


def vae_config(**other):
    return dict(block_out_channels=(8, 16, 24, 24), layers_per_block=2, latent_channels=4, norm_num_groups=4,
                use_quant_conv=False, use_post_quant_conv=False) | other


FLUX = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)


def convert_flux(state, config):
    """diffusers' converter; its source states FLUX's width as a number, and only that number is changed."""
    assert FLUX.count("inner_dim = 3072") == 1
    width = config["num_attention_heads"] * config["attention_head_dim"]
    space = dict(vars(single_file_utils))
    exec(FLUX.replace("inner_dim = 3072", f"inner_dim = {width}"), space)
    return space["convert_flux_transformer_checkpoint_to_diffusers"](state)


def convert_sd3(state, config):
    return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(state)


def convert_vae(state, config):
    blocks = [None] * len(config["block_out_channels"])
    return single_file_utils.convert_ldm_vae_checkpoint(state, dict(down_block_types=blocks, up_block_types=blocks))


KINDS = {MMDiT: (sd3_file, convert_sd3), Flux: (flux_file, convert_flux), VAE: (vae_file, convert_vae)}
NET, STAGE = "model.diffusion_model.", "first_stage_model."
CASES = {                                                              # class, config, prefix
    "sd3-m": (MMDiT, sd3_config(), ""),
    "sd3-m, prefix": (MMDiT, sd3_config(), NET),
    "sd35-m": (MMDiT, sd3_config(qk_norm="rms_norm", dual_attention_layers=(0, 1)), NET),
    "sd35-m, dual to the end": (MMDiT, sd3_config(qk_norm="rms_norm", dual_attention_layers=(0, 1, 2)), ""),
    "sd35-l": (MMDiT, sd3_config(num_layers=12, qk_norm="rms_norm"), ""),
    "one layer": (MMDiT, sd3_config(num_layers=1, in_channels=5, out_channels=3), NET),
    "flux-dev": (Flux, flux_config(), ""),
    "flux-dev, prefix": (Flux, flux_config(num_layers=1, num_single_layers=11), NET),
    "flux-schnell": (Flux, flux_config(guidance_embeds=False, num_attention_heads=3), ""),
    "flux's vae": (VAE, vae_config(), ""),
    "sd3's vae": (VAE, vae_config(), STAGE),
    "sd1's vae": (VAE, vae_config(use_quant_conv=True, use_post_quant_conv=True), STAGE),
    "vae of another package": (VAE, vae_config(block_out_channels=(8, 12), layers_per_block=1), "vae.")}


def random_file(file, shapes, prefix="", **other):
    """Write random tensors, with those of `other` parts beside them where there is a prefix. Returns what was drawn."""
    generator = torch.Generator().manual_seed(0)
    state = {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(state | other, file, metadata={"format": "pt"})
    return state


@pytest.mark.parametrize("name", CASES)
def test_an_original_file_is_read_as_diffusers_converts_it(name, tmp_path):
    cls, config, prefix = CASES[name]
    write, convert = KINDS[cls]
    others = {"text_encoders.clip_l.transformer.x": torch.ones(2), "alphas": torch.ones(1),
              ("vae." if cls is not VAE else NET) + "decoder.conv_in.weight": torch.ones(3)} if prefix else {}
    state = random_file(tmp_path / "original.safetensors", write(config), prefix, **others)
    theirs = convert(dict(state), config)
    net = from_single_file(cls, tmp_path / "original.safetensors", config)
    ours = net.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    half = from_single_file(cls, tmp_path / "original.safetensors", config, torch.bfloat16).state_dict()
    assert all(torch.equal(half[key], tensor.bfloat16()) for key, tensor in theirs.items())
    assert all(tensor.is_contiguous() for tensor in [*ours.values(), *half.values()])


FULL = {
    "sd3-m": (MMDiT, dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, patch_size=2,
                          attention_head_dim=64, pooled_projection_dim=2048, joint_attention_dim=4096, in_channels=16,
                          out_channels=16, pos_embed_max_size=192)),
    "flux-schnell": (Flux, dict(num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
                                in_channels=64, joint_attention_dim=4096, pooled_projection_dim=768,
                                guidance_embeds=False)),
    "vae": (VAE, dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
                      use_quant_conv=False, use_post_quant_conv=False))}
FULL["sd35-m"] = (MMDiT, FULL["sd3-m"][1] | dict(qk_norm="rms_norm", dual_attention_layers=range(13),
                                                 pos_embed_max_size=384))
FULL["sd35-l"] = (MMDiT, FULL["sd3-m"][1] | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432,
                                                 qk_norm="rms_norm"))
FULL["flux-dev"] = (Flux, FULL["flux-schnell"][1] | dict(guidance_embeds=True))


@pytest.mark.parametrize("name", FULL)
def test_at_full_size_every_tensor_has_its_source(name):
    """The names of the original file and of the network, each exactly once, and as many numbers on both sides."""
    cls, config = FULL[name]
    with torch.device("meta"):
        net = cls(**config)
    names, shapes = models.original_names(net), KINDS[cls][0](config)
    assert names.keys() == shapes.keys()
    assert sorted(sum(names.values(), [])) == sorted(net.state_dict())
    sizes = {name: tensor.numel() for name, tensor in net.state_dict().items()}
    assert all(torch.Size(shapes[key]).numel() == sum(sizes[name] for name in parts) for key, parts in names.items())


def test_loading_an_original_file_holds_one_copy(tmp_path):
    """Stacked layers are the larger part of the file: they're split as they are read."""
    config = flux_config(num_layers=4, num_single_layers=3, num_attention_heads=8, attention_head_dim=64,
                         axes_dims_rope=(16, 24, 24))
    random_file(tmp_path / "flux.safetensors", flux_file(config))
    random_file(tmp_path / "small.safetensors", flux_file(flux_config()))
    child = textwrap.dedent(f"""
        import re
        import torch
        from models import Flux, from_single_file

        def peak():                     # bytes; of this process alone, where getrusage would begin at its parent's
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        torch.set_num_threads(1)
        from_single_file(Flux, {str(tmp_path / "small.safetensors")!r}, {flux_config()!r})       # PyTorch's own share
        before = peak()
        net = from_single_file(Flux, {str(tmp_path / "flux.safetensors")!r}, {config!r})
        print(peak() - before)
        """)
    out = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    size = (tmp_path / "flux.safetensors").stat().st_size
    assert size > 190e6 and 0.9 * size < int(out.stdout) < 1.3 * size, int(out.stdout) / size


# ============================================================================================= the text encoders' files

def text_config(**other):
    return dict(vocab_size=50, hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=9, bos_token_id=48, eos_token_id=49) | other


def save_clip(file, change=lambda state: None, **config):
    """transformers' text tower with random weights, and a file of them that `change` has edited."""
    torch.manual_seed(0)
    net = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)).eval()
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    change(state)
    save_file(state, file)
    return net


IDS = torch.tensor([[48, 3, 4, 49, 49, 49], [48, 7, 8, 9, 10, 49]])


@pytest.mark.parametrize("act", ("quick_gelu", "gelu"))
def test_clip_files_have_the_names_of_transformers(act, tmp_path):
    config = text_config(hidden_act=act)
    theirs = save_clip(tmp_path / "clip.safetensors", lambda state: state.update(
        {"text_model.embeddings.position_ids": torch.arange(9)[None], "logit_scale": torch.ones(())}), **config)
    _, pooled = from_single_file(CLIPText, tmp_path / "clip.safetensors", config)(IDS)
    with torch.no_grad():
        torch.testing.assert_close(pooled, theirs(IDS).text_embeds)


def test_clip_l_without_a_projection_has_none(tmp_path):
    """SD3's clip_l.safetensors: its authors' code and diffusers put the identity there."""
    config = text_config(hidden_act="quick_gelu")
    theirs = save_clip(tmp_path / "clip_l.safetensors", lambda state: state.pop("text_projection.weight"), **config)
    net = from_single_file(CLIPText, tmp_path / "clip_l.safetensors", config, torch.float64)
    assert torch.equal(net.text_projection.weight, torch.eye(16, dtype=torch.float64))
    plain = from_single_file(CLIPText, tmp_path / "clip_l.safetensors", config | {"architectures": ["CLIPTextModel"]})
    with torch.no_grad():
        pooled = theirs.text_model(IDS).pooler_output
    torch.testing.assert_close(net(IDS)[1].float(), pooled)
    torch.testing.assert_close(plain(IDS)[1], pooled)


def test_bigg_without_a_projection_is_an_error(tmp_path):
    config = text_config(hidden_act="gelu")
    save_clip(tmp_path / "clip_g.safetensors", lambda state: state.pop("text_projection.weight"), **config)
    with pytest.raises(ValueError, match=r"clip_g\.safetensors: tensor text_projection\.weight is missing, 1 in all"):
        from_single_file(CLIPText, tmp_path / "clip_g.safetensors", config)


def test_flux_leaves_out_the_projection_of_a_file_that_has_one(tmp_path):
    config = text_config(hidden_act="quick_gelu", architectures=["CLIPTextModel"])
    theirs = save_clip(tmp_path / "clip_l.safetensors", **config)
    with torch.no_grad():
        torch.testing.assert_close(from_single_file(CLIPText, tmp_path / "clip_l.safetensors", config)(IDS)[1],
                                   theirs.text_model(IDS).pooler_output)


@pytest.mark.parametrize("names", (["shared.weight"], ["encoder.embed_tokens.weight"],
                                   ["shared.weight", "encoder.embed_tokens.weight"]), ids=len)
def test_t5_files_have_the_names_of_transformers(names, tmp_path):
    config = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
    torch.manual_seed(0)
    theirs = transformers.T5EncoderModel(transformers.T5Config(**config)).eval()
    state = {key: tensor for key, tensor in theirs.state_dict().items()
             if key not in ("shared.weight", "encoder.embed_tokens.weight")}
    save_file(state | {name: theirs.shared.weight.detach().clone() for name in names}, tmp_path / "t5xxl.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(from_single_file(T5Encoder, tmp_path / "t5xxl.safetensors", config)(IDS % 40),
                                   theirs(IDS % 40).last_hidden_state)


# =============================================================================================================== errors

QKV = "joint_blocks.1.x_block.attn.qkv.weight"
DIFFUSERS = {"transformer_blocks.1.norm1.linear.weight": torch.ones(192, 32)}
DAMAGES = {                                                            # what happened to the tensors, what is said
    "missing": (lambda state: state.pop(QKV), rf"original\.safetensors: tensor {QKV} is missing, 1 in all"),
    "unexpected": (lambda state: state.update({"y.bias": torch.ones(1)}),
                   r"original\.safetensors: unexpected .*y\.bias"),
    "wrong shape": (lambda state: state.update({QKV: torch.ones(95, 32)}),
                    rf"original\.safetensors: .*{QKV} is \(95, 32\), .* is \(96, 32\)"),
    "another's name": (lambda state: state.update(DIFFUSERS), r"original\.safetensors: unexpected .*norm1\.linear"),
    "a block too many": (lambda state: state.update({"joint_blocks.3.x_block.attn.qkv.bias": torch.ones(96)}),
                         r"original\.safetensors: unexpected .*joint_blocks\.3")}


@pytest.mark.parametrize("prefix", ("", NET))
@pytest.mark.parametrize("name", DAMAGES)
def test_inside_its_prefix_a_file_is_read_strictly(name, prefix, tmp_path):
    change, message = DAMAGES[name]
    file = tmp_path / "original.safetensors"
    state = random_file(file, sd3_file(sd3_config()))
    change(state)
    save_file({prefix + key: tensor for key, tensor in state.items()}, file)
    with pytest.raises(ValueError, match=message) as caught:
        from_single_file(MMDiT, file, sd3_config())
    assert str(tmp_path) in str(caught.value)


def test_without_a_prefix_nothing_is_skipped(tmp_path):
    random_file(tmp_path / "ae.safetensors", vae_file(vae_config()), "", **{"loss.logvar": torch.ones(())})
    with pytest.raises(ValueError, match=r"ae\.safetensors: unexpected tensor loss\.logvar"):
        from_single_file(VAE, tmp_path / "ae.safetensors", vae_config())


def test_a_vae_of_fewer_resolutions_is_an_error(tmp_path):
    file = tmp_path / "ae.safetensors"
    random_file(file, vae_file(vae_config()))
    with pytest.raises(ValueError, match=r"ae\.safetensors: .*(unexpected|is \()"):
        from_single_file(VAE, file, vae_config(block_out_channels=(8, 16, 24)))


@pytest.mark.parametrize("part", (0, 0.001, 0.6))
def test_a_damaged_original_is_an_error_that_names_it(part, tmp_path):
    file = tmp_path / "flux1-dev.safetensors"
    random_file(file, flux_file(flux_config()))
    file.write_bytes(file.read_bytes()[:int(part * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"flux1-dev\.safetensors is damaged .*download it again"):
        from_single_file(Flux, file, flux_config())


@pytest.mark.parametrize("ending", ("ckpt", "bin", "pt", "pth"))
def test_pickles_are_refused(ending, tmp_path):
    file = tmp_path / f"sd3.{ending}"
    file.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=rf"sd3\.{ending} is a pickle.*safetensors file is expected"):
        from_single_file(MMDiT, file, sd3_config())


@pytest.mark.parametrize("name", ("diffusion_pytorch_model.bin", "pytorch_model.bin", "pytorch_model.fp16.bin",
                                  "pytorch_model-00001-of-00002.bin"))
def test_a_directory_with_only_a_pickle_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps({}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is a pickle.*safetensors file is expected"):
        models.weight_files(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        MMDiT.from_pretrained(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert models.weight_files(tmp_path) == [tmp_path / "model.safetensors"]          # beside that, it is left alone


def test_an_absent_file_and_a_network_without_a_table_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sd3\.safetensors is missing"):
        from_single_file(MMDiT, tmp_path / "sd3.safetensors", sd3_config())
    with pytest.raises(ValueError, match="original names of a UNet are not known"):
        from_single_file(UNet, tmp_path / "sd3.safetensors", {})


# =========================================================================================================== tokenizers

WORDS = ["a photo of a red circle", "two blue squares, two green ones", "don't you're it's hello world 12 345"] * 3
TEXTS = ["", " ", "a red circle", "A RED Circle", "  a   red\n\tcircle ", "don't you're it's", "!!! x!y !",
         "it\u2019s \u201cquoted\u201d", "12 345 \u00bd \u0663", "caf\u00e9 cafe\u0301 \u00dcBER", "\ufb01ne \uff21",
         "\u65e5\u672c\u8a9e \U0001f600 \u0915\u094d", "a\u00a0b\u3000c\u200bd\u00ad", "a red circle " * 30, "red" * 60,
         "<|endoftext|> a", "a<|startoftext|>b", "</s> a", "a<extra_id_0>b <extra_id_9>", "\u2581a \u2581",
         "\x7f <pad>"]


@pytest.mark.parametrize("pad", ("<|endoftext|>", "!"))
def test_clip_ids_from_tokenizer_json_are_the_same(pad, tmp_path):
    models.train_tokenizer(WORDS, tmp_path / "two", 24)
    config = json.loads((tmp_path / "two" / "tokenizer_config.json").read_text()) | {"pad_token": pad}
    (tmp_path / "two" / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "two")
    theirs.save_pretrained(tmp_path / "one")
    for file in (tmp_path / "one").iterdir():
        if file.name not in ("tokenizer.json", "tokenizer_config.json"):
            file.unlink()
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=24).input_ids
    assert CLIPTokenizer(tmp_path / "two")(TEXTS).tolist() == expected
    assert CLIPTokenizer(tmp_path / "one")(TEXTS).tolist() == expected
    content = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [" ".join(pair) if isinstance(pair, list) else pair.split(" ") for pair in merges]
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps(content))         # older and newer files differ in it
    assert CLIPTokenizer(tmp_path / "one")(TEXTS).tolist() == expected


TOKENIZER_DAMAGES = {                                                 # what is left of each file's text
    "vocab cut off": ("vocab.json", lambda text: text[:300]), "vocab empty": ("vocab.json", lambda text: ""),
    "merges cut in a line": ("merges.txt", lambda text: text.rstrip("\n")[:-2]),
    "merges cut at a line": ("merges.txt", lambda text: "".join(text.splitlines(keepends=True)[:9])),
    "merges empty": ("merges.txt", lambda text: ""),
    "a pointer": ("merges.txt", lambda text: "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")}


@pytest.mark.parametrize("name", TOKENIZER_DAMAGES)
def test_a_damaged_clip_tokenizer_is_an_error_that_names_the_file(name, tmp_path):
    """Half of the merges would make another prompt of every prompt."""
    models.train_tokenizer(WORDS, tmp_path, 24)
    file, left = TOKENIZER_DAMAGES[name]
    (tmp_path / file).write_text(left((tmp_path / file).read_text()))
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / file))}.* damaged.*download"):
        CLIPTokenizer(tmp_path)


def unigram():
    """A small vocabulary in T5's order: <pad>, </s>, <unk>, pieces, extra ids from the last to the first."""
    tokenizer = Tokenizer(tokenizer_models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(WORDS, trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return pieces + [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]


@pytest.fixture(scope="module")
def t5_files(tmp_path_factory):
    out = tmp_path_factory.mktemp("t5")
    transformers.T5TokenizerFast(vocab=unigram()).save_pretrained(out)
    assert (out / "tokenizer.json").is_file()
    return out


@pytest.mark.parametrize("length", (2, 8, 64))
def test_t5_ids_are_those_of_transformers(length, t5_files):
    theirs = transformers.T5TokenizerFast.from_pretrained(t5_files)
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=length).input_ids
    tokenizer = T5Tokenizer(t5_files, length)
    ids = tokenizer(TEXTS)
    assert ids.tolist() == expected and ids.dtype == torch.int64 and tokenizer.length == length
    assert [tokenizer([text])[0].tolist() for text in TEXTS] == expected               # whatever the company
    assert ids[0].tolist() == ([1] + [0] * 63)[:length] and ids[TEXTS.index("red" * 60)][-1] == 1


def test_t5_ids_of_the_first_public_layout(tmp_path):
    """As older converters wrote it: a normaliser that folds characters and runs of spaces, and settings left behind."""
    tokenizer = Tokenizer(tokenizer_models.Unigram(unigram(), unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(left=False),
                                                 normalizers.Replace(Regex(" {2,}"), "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"] + [f"<extra_id_{i}>" for i in range(100)])
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=7)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>",
                                                  eos_token="</s>", unk_token="<unk>")
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=20).input_ids
    assert T5Tokenizer(tmp_path, 20)(TEXTS).tolist() == expected
    assert len({tuple(row) for row in expected}) > len(TEXTS) - 4


def test_spiece_model_alone_is_an_error_with_the_command_that_helps(t5_files, tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\n")
    with pytest.raises(FileNotFoundError, match="tokenizer.json is needed") as caught:
        T5Tokenizer(tmp_path, 8)
    install, _, command = str(caught.value).split("\n")[1].strip().partition(" && ")
    assert install == "pip install transformers sentencepiece protobuf"
    assert command.startswith("python -c 'from transformers import T5TokenizerFast")
    (tmp_path / "spiece.model").unlink()                              # the command itself, with nothing to convert
    (tmp_path / "tokenizer.json").write_bytes((t5_files / "tokenizer.json").read_bytes())
    command = command.replace("python", f'"{sys.executable}"', 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert T5Tokenizer(tmp_path, 8)(TEXTS).tolist() == T5Tokenizer(t5_files, 8)(TEXTS).tolist()


@pytest.mark.parametrize("content, message", (
    (b"{", "is damaged, not JSON"), (b"{}", "holds a None model"), (b'{"model": {"type": "Unigram"}}', "is damaged"),
    (b'{"model": {"type": "WordLevel"}}', "holds a WordLevel model")), ids=repr)
def test_a_tokenizer_json_of_another_kind_is_an_error(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"tokenizer\.json {message}"):
        T5Tokenizer(tmp_path, 8)
    with pytest.raises(ValueError, match=r"tokenizer\.json (is damaged|holds no byte-pair model)"):
        CLIPTokenizer(tmp_path)


def test_a_unigram_without_t5s_ends_is_an_error(t5_files, tmp_path):
    text = (t5_files / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("</s>", "<end>"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the special tokens </s> and <pad> are missing"):
        T5Tokenizer(tmp_path, 8)
