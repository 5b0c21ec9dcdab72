"""Flux, UNet, VAE and T5Encoder against diffusers and transformers on small random networks, both ways."""
import copy
import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

import models
from models import VAE, Flux, MMDiT, T5Encoder, UNet, rotate

LIBRARY = {Flux: FluxTransformer2DModel, UNet: UNet2DConditionModel, VAE: AutoencoderKL, T5Encoder: T5EncoderModel,
           MMDiT: SD3Transformer2DModel}


def flux_config(**other):
    return dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=[4, 6, 6]) | other


def unet_config(kinds="ccd", **other):
    """kinds: from the finest resolution down, c with and d without attention to the text; the way up mirrors it."""
    cross, plain = {"c": "CrossAttn", "d": ""}, list(kinds)
    return dict(block_out_channels=[16, 24, 32][:len(kinds)], layers_per_block=2, cross_attention_dim=20,
                attention_head_dim=2, norm_num_groups=4, down_block_types=[f"{cross[k]}DownBlock2D" for k in plain],
                up_block_types=[f"{cross[k]}UpBlock2D" for k in plain[::-1]]) | other


def vae_config(widths=(8, 16, 24), **other):
    return dict(block_out_channels=list(widths), layers_per_block=2, norm_num_groups=4, latent_channels=4,
                down_block_types=["DownEncoderBlock2D"] * len(widths),
                up_block_types=["UpDecoderBlock2D"] * len(widths)) | other


def t5_config(**other):
    """Heads of 8 times 4 are 32, not d_model; 30 tokens reach past the distance of 20."""
    return dict(vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu",
                relative_attention_num_buckets=8, relative_attention_max_distance=20) | other


SD3_VAE = dict(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305)
MMDIT = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
             num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20,
             pos_embed_max_size=9, qk_norm="rms_norm", dual_attention_layers=[0])

CASES = {                                                               # class, config, height and width or length
    "flux-dev": (Flux, flux_config(guidance_embeds=True), (6, 10)),
    "flux-schnell": (Flux, flux_config(guidance_embeds=False, num_layers=1, num_single_layers=3), (12, 4)),
    "flux, 3 heads, other axes": (Flux, flux_config(num_attention_heads=3, attention_head_dim=8,
                                                    axes_dims_rope=[2, 2, 4], in_channels=12), (2, 8)),
    "sd1": (UNet, unet_config(), (8, 12)),
    "unet, odd sizes": (UNet, unet_config(), (13, 7)),
    "unet, one layer": (UNet, unet_config("cdc", layers_per_block=1, norm_eps=1e-4), (5, 6)),
    "unet, plain first, other channels": (UNet, unet_config("dc", in_channels=5, out_channels=3), (6, 9)),
    "unet, one resolution": (UNet, unet_config("c", attention_head_dim=4), (3, 5)),
    "unet, other way up": (UNet, unet_config("cd", up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"]), (7, 4)),
    "sd3-vae": (VAE, vae_config(**SD3_VAE), (12, 20)),
    "sd1-vae": (VAE, vae_config((8, 16), latent_channels=3), (10, 6)),
    "vae, quant conv in the encoder": (VAE, vae_config((8, 12), use_post_quant_conv=False, layers_per_block=1), (4, 8)),
    "vae, quant conv in the decoder": (VAE, vae_config((12,), use_quant_conv=False, in_channels=1, out_channels=3,
                                                       shift_factor=-0.2), (5, 7)),
    "t5": (T5Encoder, t5_config(), 30),
    "t5, 32 buckets to 128": (T5Encoder, t5_config(relative_attention_num_buckets=32, d_kv=4, num_layers=1,
                                                   relative_attention_max_distance=128), 150),
    "t5, eps": (T5Encoder, t5_config(layer_norm_epsilon=1e-3, num_heads=3, d_kv=8), 1),
    "mmdit": (MMDiT, MMDIT, (6, 8))}
NEW = [name for name in CASES if name != "mmdit"]                       # test_models.py has the rest of MMDiT's tests
SOME = ("flux-dev", "flux-schnell", "sd1", "unet, one layer", "sd3-vae", "sd1-vae", "t5")      # where each is slow

# What writes into a residual stream, to queries or to keys, from behind a norm; and the biases of what only passes on.
QUIET = {"Flux": ("x_embedder.", "context_embedder.", "norm1.linear.", "norm1_context.linear.", ".norm.linear.",
                  ".to_q.", ".to_k.", ".add_q_proj.", ".add_k_proj."),
         "UNet": ("conv_in.", ".conv1.", ".conv2.", ".time_emb_proj.", ".proj_in.", ".proj_out.", ".to_out.0.",
                  ".net.2.", ".conv_shortcut.bias", "samplers.0.conv.bias"),
         "VAE": ("coder.conv_in.", ".conv1.", ".conv2.", ".to_out.0.", ".conv_shortcut.bias", "samplers.0.conv.bias"),
         "T5Encoder": ("shared.", "embed_tokens.", ".o.weight", ".wo.weight"), "MMDiT": ()}


def redraw(net, kind, seed=0, stream=1.0):
    """Random weights for a network of any library: no branch is zero, no norm the identity, outputs are O(1).

    stream scales what the norms see: at 0.01 their eps is a visible part of it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(net.state_dict().items()):
            value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            if tensor.ndim >= 2 and "shared" not in name and "embed_tokens" not in name and "_bias." not in name:
                value /= math.sqrt(tensor[0].numel())
            elif tensor.ndim == 1:
                value = 0.3 * value + (1 if "norm" in name and name.endswith(".weight") else 0)
            tensor.copy_(value * stream if any(part in name for part in QUIET[kind.__name__]) else value)
    return net.eval().requires_grad_(False)


def library(kind, config):
    """The library's network of a config."""
    return T5EncoderModel(transformers.T5Config(**config)) if kind is T5Encoder else LIBRARY[kind](**config)


def saved(name, directory, stream=1.0, **options):
    """The library's network of a case, with random weights, and the same in its own files."""
    kind, config, _ = CASES[name]
    net = redraw(library(kind, config), kind, stream=stream)
    net.save_pretrained(directory, **options)
    return net


def inputs(name, dtype=torch.float32, exact=False):
    """Three different images of a case. exact: times and scales that bfloat16 holds, thousandfold too."""
    kind, config, size = CASES[name]
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(3, *shape, generator=generator).to(dtype)
    if kind is T5Encoder:
        return (torch.randint(config["vocab_size"], (3, size), generator=generator),)
    if kind is VAE:
        image = torch.randint(129, (3, config.get("in_channels", 3), *size), generator=generator)
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        return (image / 128).to(dtype), randn(config["latent_channels"], *(s // factor for s in size))
    if kind is UNet:
        return randn(config.get("in_channels", 4), *size), torch.tensor([999, 0, 421]), randn(7, 20)
    t = torch.tensor([0.0, 0.25, 1.0] if exact else [0.0, 0.3719, 1.0])
    text = randn(7, 24), randn(20)
    if kind is MMDiT:
        return randn(4, *size), t, *text
    guidance = torch.tensor([1.0, 4.0, 2.0] if exact else [3.5, 1.0, 7.3])
    return randn(config["in_channels"] // 4, *size), t, *text, guidance if config.get("guidance_embeds") else None


def outputs(net, *args):
    """What a network of either side makes of our inputs, in our conventions, as a tuple of tensors."""
    if isinstance(net, FluxTransformer2DModel):
        x, t, context, pooled, guidance = args
        b, c, h, w = x.shape
        packed = FluxPipeline._pack_latents(x, b, c, h, w)
        places = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32)
        packed = net(packed, context, pooled, t, places, torch.zeros(context.shape[1], 3), guidance).sample
        return (FluxPipeline._unpack_latents(packed, 8 * h, 8 * w, 8),)
    if isinstance(net, UNet2DConditionModel):
        return (net(*args).sample,)
    if isinstance(net, AutoencoderKL):
        images, latents = args
        scale, shift = net.config.scaling_factor, net.config.shift_factor or 0
        mean = net.encode(images * 2 - 1).latent_dist.mean
        return (mean - shift) * scale, (net.decode(latents / scale + shift).sample / 2 + 0.5).clamp(0, 1)
    if isinstance(net, T5EncoderModel):
        return (net(*args).last_hidden_state,)
    return (net.encode(args[0]), net.decode(args[1])) if isinstance(net, VAE) else (net(*args),)


def assert_equal(ours, theirs, tolerance=1e-5):
    """Each output within a fraction of its standard deviation."""
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape and our.dtype == their.dtype
        assert 0.01 < their.std() < 10
        error = (our - their).abs().max() / their.std()
        assert error <= tolerance, f"off by {error:.1e} standard deviations"


# ======================================================================================================== all networks

@pytest.mark.parametrize("stream", (1.0, 0.01))
@pytest.mark.parametrize("name", NEW)
def test_a_network_reads_and_writes_the_librarys_files(name, stream, tmp_path):
    kind, config, _ = CASES[name]
    theirs = saved(name, tmp_path / "theirs", stream)
    ours = kind.from_pretrained(tmp_path / "theirs")
    assert_equal(outputs(ours, *inputs(name)), outputs(theirs, *inputs(name)))
    redraw(ours, kind, seed=5, stream=stream).save_pretrained(tmp_path / "ours")
    again, info = LIBRARY[kind].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    kept = again.config.to_dict() if kind is T5Encoder else json.loads(json.dumps(again.config, default=str))
    assert {key: kept[key] for key in config} == config
    assert_equal(outputs(again, *inputs(name)), outputs(ours, *inputs(name)))


@pytest.mark.parametrize("name", NEW)
def test_small_activations_make_every_eps_visible(name):
    """Otherwise the test above would not notice a wrong one: twice one of the norms' eps moves every output."""
    kind, config, _ = CASES[name]
    net = redraw(kind(**config), kind, stream=0.01)
    before, eps = outputs(net, *inputs(name)), {m: m.eps for m in net.modules() if hasattr(m, "eps")}
    for value in set(eps.values()):
        for m in eps:
            m.eps = 2 * value if eps[m] == value else eps[m]
        for now, then in zip(outputs(net, *inputs(name)), before):
            assert (now - then).abs().max() > 5e-5 * then.std(), value


@pytest.mark.parametrize("name", ("flux-dev", "t5"))
def test_a_network_reads_shards(name, tmp_path):
    theirs = saved(name, tmp_path, max_shard_size="50KB" if name == "flux-dev" else "10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal(outputs(CASES[name][0].from_pretrained(tmp_path), *inputs(name)), outputs(theirs, *inputs(name)))


@pytest.mark.parametrize("name", SOME)
def test_in_bfloat16_a_network_is_as_exact_as_the_librarys(name, tmp_path):
    """Mean absolute error against float64 with the same rounded weights and inputs, at most twice the library's."""
    theirs = saved(name, tmp_path).bfloat16()
    rounded = inputs(name, torch.bfloat16, exact=True)
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in rounded]
    exact = outputs(copy.deepcopy(theirs).double(), *wide)
    ours = outputs(CASES[name][0].from_pretrained(tmp_path, torch.bfloat16), *rounded)
    for our, their, best in zip(ours, outputs(theirs, *rounded), exact, strict=True):
        assert our.dtype == torch.bfloat16
        assert 0 < (our.double() - best).abs().mean() <= 2 * (their.double() - best).abs().mean()


def test_attention_rounds_alike_with_gradients_and_without():
    """In bf16 on a CPU: else a reference would not be the policy that it was copied from."""
    q, k, v = (torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    plain, want = models.attend(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert torch.equal(models.attend(q.requires_grad_(), k, v), plain)
    torch.testing.assert_close(plain.double(), want, rtol=2 ** -7, atol=2 ** -7)


def gradients(net, args):
    """{name: gradient} of a scalar of the outputs, for the parameters and, by number, for the inputs."""
    args = [x.clone().requires_grad_(True) if torch.is_tensor(x) and x.ndim > 1 and x.is_floating_point() else x
            for x in args]
    net.requires_grad_(True)
    sum(((i + 1) * out + out.square()).mean() for i, out in enumerate(outputs(net, *args))).backward()
    named = dict(net.named_parameters()) | {i: x for i, x in enumerate(args) if torch.is_tensor(x) and x.requires_grad}
    return {name: x.grad for name, x in named.items()}


@pytest.mark.parametrize("name", SOME)
def test_gradients_are_the_librarys(name, tmp_path):
    theirs = saved(name, tmp_path).double()
    ours = gradients(CASES[name][0].from_pretrained(tmp_path, torch.float64), inputs(name, torch.float64))
    theirs = gradients(theirs, inputs(name, torch.float64))
    assert set(ours) == set(theirs)
    largest = max(grad.abs().max() for grad in theirs.values())
    for key, grad in theirs.items():                                     # keys' biases have none: softmax is blind
        assert (ours[key] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-9 * largest, key


@pytest.mark.parametrize("name, layer", (("flux-dev", "transformer_blocks.0.ff"), ("mmdit", "transformer_blocks.0.ff"),
                                         ("flux-dev", "single_transformer_blocks.1.norm"),
                                         ("sd1", "down_blocks.0.attentions.1"), ("sd1", "up_blocks.2.resnets.2")))
def test_checkpointing_computes_twice_and_changes_no_gradient(name, layer):
    kind, config, _ = CASES[name]
    net, calls = redraw(kind(**config), kind), []
    net.get_submodule(layer).register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients(net, inputs(name))
    assert len(calls) == 1
    net.zero_grad()
    net.checkpointing = True
    again = gradients(net, inputs(name))
    assert len(calls) == 3
    assert plain.keys() == again.keys() and all(torch.equal(plain[key], again[key]) for key in plain)
    with torch.no_grad():
        outputs(net, *inputs(name))
    assert len(calls) == 4


@pytest.mark.parametrize("name, layer, tensor", (
    ("mmdit", "transformer_blocks.1", 0), ("flux-dev", "transformer_blocks.0", 0), ("t5", "encoder.block.1", 1),
    ("flux-dev", "single_transformer_blocks.1", 0), ("sd1", "up_blocks.1.attentions.0.transformer_blocks.0.norm2", 0)))
def test_tensors_lie_in_memory_as_they_are_read(name, layer, tensor):
    """Tokens, which would else be copied at each read, and T5's bias, which fused attention on CUDA wants so."""
    kind, config, _ = CASES[name]
    net, seen = redraw(kind(**config), kind), []
    net.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[tensor].is_contiguous()))
    outputs(net, *inputs(name))
    assert seen and all(seen)


PUBLIC = {                                                              # class, config, parameters, tensors
    "FLUX.1-dev": (Flux, dict(guidance_embeds=True), 11_901_408_320, 1160),
    "SD1.4": (UNet, dict(cross_attention_dim=768, sample_size=64), 859_520_964, 686),
    "SD3.5 and FLUX VAE": (VAE, vae_config((128, 256, 512, 512), norm_num_groups=32, latent_channels=16, **SD3_VAE),
                           83_819_683, 244),
    "SD1 VAE": (VAE, vae_config((128, 256, 512, 512), norm_num_groups=32), 83_653_863, 248),
    "T5-XXL": (T5Encoder, dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"),
               4_762_310_656, 219)}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_network_of_full_size_has_the_public_names_and_shapes(name):
    kind, config, parameters, tensors = PUBLIC[name]
    with torch.device("meta"):
        ours, theirs = kind(**config), library(kind, config)
    assert all(tensor.is_meta for tensor in ours.state_dict().values())
    assert sum(p.numel() for p in ours.parameters()) == parameters and len(ours.state_dict()) == tensors
    shapes = {key: t.shape for key, t in theirs.state_dict().items() if key != "encoder.embed_tokens.weight"}
    assert {key: t.shape for key, t in ours.state_dict().items()} == shapes


def test_defaults_are_the_librarys():
    """A config.json may leave out what equals the default, and what we do not write must be at its default."""
    def defaults(function):
        return {key: p.default for key, p in inspect.signature(function).parameters.items()
                if p.default is not p.empty}
    for kind in (Flux, VAE):
        theirs = defaults(LIBRARY[kind].__init__)
        for key, value in defaults(kind.__init__).items():
            assert theirs[key] == value, (kind, key)
    theirs = defaults(UNet2DConditionModel.__init__)
    for key, value in (UNet.defaults | UNet.fixed).items():
        assert theirs[key] == value, key
    theirs = transformers.T5Config().to_dict()
    for key, value in defaults(T5Encoder.__init__).items():
        assert theirs[key] == value, key


@pytest.mark.parametrize("kind, config, reason", (
    (Flux, flux_config(patch_size=2), "patch_size=2"), (Flux, flux_config(out_channels=8), "out_channels=8"),
    *((Flux, flux_config(axes_dims_rope=axes), f"axes_dims_rope={axes}.* head of 16".replace("[", r"\[")) for axes in (
        [4, 4, 4], [5, 5, 6], [8, 8], [])),
    (UNet, unet_config(attention_head_dim=3), "attention_head_dim=3, the number of heads, does not divide a width of "),
    *((VAE, vae_config(scaling_factor=value), f"scaling_factor={value!r}") for value in (None, 0, "x")),
    (UNet, unet_config(attention_head_dim=[2, 2, 4]), r"attention_head_dim=\[2, 2, 4\]"),
    (UNet, unet_config(cross_attention_dim=[8, 8, 8]), r"cross_attention_dim=\[8, 8, 8\]"),
    (UNet, unet_config(layers_per_block=[1, 2, 2]), r"layers_per_block=\[1, 2, 2\]"),
    (UNet, unet_config(down_block_types=["AttnDownBlock2D"] * 3), "down_block_types=.*'AttnDownBlock2D'"),
    (UNet, unet_config(up_block_types=["UpBlock2D"] * 2), "up_block_types=.* 3 resolutions"),
    (VAE, vae_config(act_fn="relu"), "act_fn='relu'"), (VAE, vae_config(latents_mean=[0.5] * 4), "latents_mean="),
    (VAE, vae_config(latents_std=[0.5] * 4), r"latents_std=\[0.5"),
    (VAE, vae_config(mid_block_add_attention=False), "mid_block_add_attention=False"),
    (T5Encoder, t5_config(feed_forward_proj="relu"), "feed_forward_proj='relu'"), (T5Encoder, {}, "'relu'")))
def test_a_network_refuses_what_it_does_not_implement(kind, config, reason):
    with pytest.raises(ValueError, match=reason):
        kind(**config)


@pytest.mark.parametrize("name", ("mmdit", "flux-dev"))
@pytest.mark.parametrize("height, width", ((7, 8), (8, 5)))
def test_latents_that_patches_do_not_fill_are_an_error(name, height, width):
    kind, config, _ = CASES[name]
    x, *others = inputs(name)
    with pytest.raises(ValueError, match=f"{height} x {width} is no multiple of 2, the side of a patch"):
        kind(**config)(x[:, :, :1, :1].repeat(1, 1, height, width), *others)


# =============================================================================================================== Flux

@pytest.mark.parametrize("name, guidance, reason", (("flux-dev", None, "give one, .* usually 3.5"),
                                                    ("flux-schnell", torch.ones(3), "takes no guidance")))
def test_flux_says_when_guidance_is_missing_or_too_much(name, guidance, reason):
    kind, config, _ = CASES[name]
    with pytest.raises(ValueError, match=reason):
        kind(**config)(*inputs(name)[:4], guidance)


@pytest.mark.parametrize("dtype, rounding", ((torch.bfloat16, 2 ** -8), (torch.float32, 1e-6)), ids=str)
def test_flux_turns_queries_in_float32_by_the_angles_of_diffusers(dtype, rounding):
    """Far from the origin too, where angles in float32 or products in bfloat16 would show."""
    angle = Flux(**flux_config()).angles(4096, 2, 3, "cpu")
    places = torch.zeros(8195, 3)
    places[:8192, 1], places[:8192, 2] = torch.arange(4096).repeat_interleave(2), torch.arange(2).repeat(4096)
    x = torch.randn(1, 1, 8195, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = apply_rotary_emb(x.float(), FluxPosEmbed(10000, (4, 6, 6))(places))
    ours = rotate(x, torch.stack([angle.cos(), angle.sin()]).float())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), exact, rtol=rounding, atol=1e-6)


def test_flux_takes_the_cosines_of_its_angles_once():
    """For all of its blocks, queries and keys."""
    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func is torch.ops.aten.cos.default and args[0].dtype == torch.float64
            return func(*args, **kwargs or {})
    kind, config, _ = CASES["flux-dev"]
    with torch.no_grad(), Count() as count:
        kind(**config)(*inputs("flux-dev"))
    assert count.seen == 1


# =============================================================================================================== UNet

@pytest.mark.parametrize("option", UNet.fixed)
def test_unet_refuses_the_options_of_other_unets(option):
    other = {"use_linear_projection": True, "freq_shift": 1}.get(option, "another")
    with pytest.raises(ValueError, match=f"{option}={other!r} is not implemented"):
        UNet(**unet_config(**{option: other}))


def test_unet_options_that_it_ignores_change_nothing(tmp_path):
    """In diffusers too, so long as the refused ones are at their defaults: nothing of its signature is left over."""
    ignored = dict(upcast_attention=True, mid_block_only_cross_attention=True, addition_embed_type_num_heads=2,
                   addition_time_embed_dim=8, projection_class_embeddings_input_dim=8,
                   reverse_transformer_layers_per_block=[1, 1, 1])
    names = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    assert names == {*UNet.defaults, *UNet.fixed, *ignored}
    theirs = redraw(UNet2DConditionModel(**unet_config(**ignored)), UNet)
    theirs.save_pretrained(tmp_path)
    assert_equal(outputs(UNet.from_pretrained(tmp_path), *inputs("sd1")), outputs(theirs, *inputs("sd1")))


# ================================================================================================================ VAE

VAES = [name for name in CASES if CASES[name][0] is VAE]


@pytest.mark.parametrize("name", VAES)
def test_vae_with_a_generator_draws_from_the_posterior(name, tmp_path):
    theirs = saved(name, tmp_path)
    images, _ = inputs(name)
    posterior, shift = theirs.encode(images * 2 - 1).latent_dist, theirs.config.shift_factor or 0
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    for sample in (posterior.mean + posterior.std * noise, posterior.sample(torch.Generator().manual_seed(3))):
        ours = VAE.from_pretrained(tmp_path).encode(images, torch.Generator().manual_seed(3))
        assert_equal((ours,), ((sample - shift) * theirs.config.scaling_factor,))


def test_vae_clamps_the_variance(tmp_path):
    theirs = saved("sd1-vae", tmp_path / "theirs").double()
    theirs.quant_conv.bias[3:] = torch.tensor([100.0, -100.0, 0.0])     # log-variances: above 20, below -30, between
    theirs.save_pretrained(tmp_path)
    images, _ = inputs("sd1-vae", torch.float64)
    sample = theirs.encode(images * 2 - 1).latent_dist.sample(torch.Generator().manual_seed(3))
    ours = VAE.from_pretrained(tmp_path, torch.float64).encode(images, torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, sample * 0.18215, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", VAES)
def test_vae_gives_images_in_0_1(name):
    """The random networks reach both ends, so the comparisons above include them, and most values lie between."""
    kind, config, _ = CASES[name]
    images = redraw(VAE(**config), VAE).decode(inputs(name)[1])
    assert images.min() == 0 and images.max() == 1 and ((images > 0) & (images < 1)).float().mean() > 0.5


@pytest.mark.parametrize("slice_size", (1, 2))
@pytest.mark.parametrize("name", VAES)
def test_vae_in_slices_is_the_whole_batch(name, slice_size):
    net = redraw(VAE(**CASES[name][1]), VAE)
    images, latents = inputs(name)

    def both():
        return net.encode(images), net.encode(images, torch.Generator().manual_seed(3)), net.decode(latents)
    whole, sizes = both(), []
    for part in (net.encoder, net.decoder):
        part.conv_in.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    net.slice_size = slice_size
    assert_equal(both(), whole)
    assert sizes == ([1, 1, 1] if slice_size == 1 else [2, 1]) * 3


@pytest.mark.parametrize("side, parts", ((256, [8, 1]), (512, [8, 1]), (1024, [2, 2, 2, 2, 1]), (4096, [1] * 9)))
def test_vae_takes_fewer_images_at_once_the_larger_they_are(side, parts):
    """Eight of 512 px, two of 1024: shapes alone, of nine images, without their memory."""
    with torch.device("meta"):
        net, images = VAE(**vae_config((4, 4, 4, 4))), torch.empty(9, 3, side, side)
    sizes = []
    for part in (net.encoder, net.decoder):
        part.conv_in.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    assert net.decode(net.encode(images)).shape == images.shape and sizes == parts * 2


def test_vae_reads_the_old_names_of_its_attention(tmp_path):
    """SD1's public file has query, key, value and proj_attn; diffusers still reads them, and so do we."""
    theirs = saved("sd1-vae", tmp_path)
    file, old = tmp_path / "diffusion_pytorch_model.safetensors", {}
    for key, tensor in load_file(file).items():
        for name, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        old[key] = tensor
    assert sum(".proj_attn." in key or ".query." in key for key in old) == 8 and "to_" not in "".join(old)
    save_file(old, file, metadata={"format": "pt"})
    for net in (VAE.from_pretrained(tmp_path), AutoencoderKL.from_pretrained(tmp_path)):
        assert_equal(outputs(net, *inputs("sd1-vae")), outputs(theirs, *inputs("sd1-vae")))


# ================================================================================================================= T5

@pytest.mark.parametrize("buckets, distance", ((32, 128), (8, 20), (16, 64), (4, 3)))
def test_t5_buckets_are_those_of_transformers(buckets, distance):
    net = T5Encoder(**t5_config(relative_attention_num_buckets=buckets, relative_attention_max_distance=distance))
    for length in (1, 2, 33, 77, 256, 512):
        place = torch.arange(length)
        theirs = T5Attention._relative_position_bucket(place[None] - place[:, None], True, buckets, distance)
        assert torch.equal(net.bucket(length, "cpu"), theirs)
    assert set(theirs.flatten().tolist()) == set(range(buckets)) - {buckets // 2}        # that one: at 0, and after


@pytest.mark.parametrize("names", (["shared.weight"], ["encoder.embed_tokens.weight"],
                                   ["shared.weight", "encoder.embed_tokens.weight"]), ids=("shared", "embed", "both"))
def test_t5_reads_the_embedding_under_either_name(names, tmp_path):
    theirs = saved("t5", tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    table = state.pop("shared.weight")
    assert "encoder.embed_tokens.weight" not in state
    save_file(state | {name: table.clone() for name in names}, file, metadata={"format": "pt"})
    assert_equal(outputs(T5Encoder.from_pretrained(tmp_path), *inputs("t5")), outputs(theirs, *inputs("t5")))
    T5Encoder.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with safe_open(file, "pt") as written:
        assert set(written.keys()) == {*state, "shared.weight"}


def test_t5_without_its_embedding_is_incomplete(tmp_path):
    saved("t5", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if key != "shared.weight"}, file)
    with pytest.raises(ValueError, match="tensor shared.weight is missing"):
        T5Encoder.from_pretrained(tmp_path)
