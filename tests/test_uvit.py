"""UViT against a forward pass written here once more, and against the names and sizes of the public files."""
import inspect
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import models
import pipelines
from models import UVITS, UViT

SMALL = dict(img_size=8, in_chans=3, patch_size=2, embed_dim=24, depth=4, num_heads=3, clip_dim=10, num_clip_token=5)
CASES = {                                                               # config, height and width
    "as public": (SMALL, (8, 8)),
    "lambda": (SMALL | dict(lam=True), (8, 8)),
    "lambda, time mlp": (SMALL | dict(lam=True, mlp_time_embed=True, depth=2, mlp_ratio=2.5), (8, 8)),
    "patches of 4, deeper": (SMALL | dict(patch_size=4, depth=6, num_heads=2, in_chans=2), (8, 8)),
    "not square": (SMALL | dict(lam=True), (6, 10)),
    "larger": (SMALL, (16, 14))}


def network(name, dtype=torch.float32):
    """A network of a case with random weights: no branch is zero, no norm the identity, the output is O(1)."""
    net, generator = UViT(**CASES[name][0]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in net.named_parameters():
            value = torch.randn(p.shape, generator=generator)
            value /= math.sqrt(p[0].numel()) if p.ndim in (2, 4) else 3
            p.copy_(value + 1 if "norm" in key and key.endswith("weight") else value)
    return net.to(dtype).eval().requires_grad_(False)


def inputs(name, dtype=torch.float32):
    """Three images of a case. Times and scales that bfloat16 holds."""
    config, size = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config["in_chans"], *size, generator=generator)
    context = torch.randn(3, config["num_clip_token"], config["clip_dim"], generator=generator)
    lam = torch.tensor([0.001953125, 0.375, 38.0]) if config.get("lam") else None
    return x.to(dtype), torch.tensor([0.0, 0.3125, 1.0]), lam, context.to(dtype)


# ========================================================================================== the forward pass once more

def waves(value, dim):
    """Features of a scalar, in float32 as the public code has them."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angle = torch.outer(value.float(), frequency)
    return torch.hstack([torch.cos(angle), torch.sin(angle)])


def cubic(size_in, size_out):
    """The matrix (size_out, size_in) of cubic interpolation with a = -3/4; edges are repeated."""
    matrix, a = torch.zeros(size_out, size_in, dtype=torch.float64), -0.75
    for i in range(size_out):
        place = (i + 0.5) * size_in / size_out - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            d = abs(place - j)
            weight = (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1 if d <= 1 else a * (d ** 3 - 5 * d ** 2 + 8 * d - 4)
            matrix[i, min(max(j, 0), size_in - 1)] += weight
    return matrix


def reference(state, config, x, t, lam, context, latest_first=True):
    """U-ViT as functions of a table of tensors, in their dtype; norms and softmax in float32 at least."""
    dim, p, heads, half = config["embed_dim"], config["patch_size"], config["num_heads"], config["depth"] // 2
    dtype = x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    batch, channels, height, width = x.shape
    rows, columns, side = height // p, width // p, config["img_size"] // p

    def linear(key, y):
        return y @ state[f"{key}.weight"].T + state.get(f"{key}.bias", 0)

    def mlp(key, y):
        y = linear(f"{key}.0", y)
        return linear(f"{key}.2", y * torch.sigmoid(y))

    def norm(key, y):
        y = y.to(wide)
        y = y - y.mean(-1, keepdim=True)
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5)
        return (y * state[f"{key}.weight"].to(wide) + state[f"{key}.bias"].to(wide)).to(dtype)

    def block(key, y):
        z = linear(f"{key}.attn.qkv", norm(f"{key}.norm1", y))
        results, d = [], dim // heads
        for head in range(heads):
            q, k, v = (z[..., part * dim + head * d:part * dim + (head + 1) * d] for part in range(3))
            score = torch.einsum("bid,bjd->bij", q, k).to(wide) / math.sqrt(d)
            score = torch.exp(score - score.amax(-1, keepdim=True))
            results.append((score / score.sum(-1, keepdim=True)).to(dtype) @ v)
        y = y + linear(f"{key}.attn.proj", torch.cat(results, -1))
        z = linear(f"{key}.mlp.fc1", norm(f"{key}.norm2", y)).to(wide)
        return y + linear(f"{key}.mlp.fc2", (z * (1 + torch.erf(z / math.sqrt(2))) / 2).to(dtype))

    cut = x.reshape(batch, channels, rows, p, columns, p)
    image = torch.einsum("bcipjq,dcpq->bijd", cut, state["patch_embed.proj.weight"]).reshape(batch, -1, dim)
    image = image + state["patch_embed.proj.bias"]
    time = waves(t * 1000, dim).to(dtype)
    time = mlp("time_embed", time) if config.get("mlp_time_embed") else time
    table = state["pos_embed"][0]
    extra = len(table) - side * side
    assert extra == 1 + config["num_clip_token"]
    grid = table[extra:].reshape(side, side, dim)
    if (rows, columns) != (side, side):
        grid = torch.einsum("ri,cj,ijd->rcd", cubic(side, rows), cubic(side, columns), grid.double()).to(dtype)
    tokens = [time + table[0], *(linear("context_embed", context) + table[1:extra]).unbind(1),
              *(image + grid.reshape(-1, dim)).unbind(1)]
    if lam is not None:
        tokens.insert(1, mlp("lambda_embed", waves(10 * torch.log(lam.float()), dim).to(dtype))
                      + state["lambda_pos"][0, 0])
    y, kept = torch.stack(tokens, 1), []
    for i in range(half):
        y = block(f"in_blocks.{i}", y)
        kept.append(y)
    y = block("mid_block", y)
    for i in range(half):
        skip = kept[half - 1 - i] if latest_first else kept[i]
        y = block(f"out_blocks.{i}", linear(f"out_blocks.{i}.skip_linear", torch.cat([y, skip], -1)))
    y = linear("decoder_pred", norm("norm", y))[:, y.shape[1] - rows * columns:]
    out = torch.empty(batch, channels, height, width, dtype=dtype)
    for a in range(p):
        for b in range(p):
            for c in range(channels):
                out[:, c, a::p, b::p] = y[..., (a * p + b) * channels + c].reshape(batch, rows, columns)
    padded, kernel = F.pad(out, (1, 1, 1, 1)), state["final_layer.weight"]
    out = sum(torch.einsum("bchw,oc->bohw", padded[:, :, a:a + height, b:b + width], kernel[:, :, a, b])
              for a in range(3) for b in range(3))
    return out + state["final_layer.bias"][:, None, None]


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-10), (torch.float32, 1e-5)), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_forward_pass_is_the_reference(name, dtype, tolerance):
    net, args = network(name, dtype), inputs(name, dtype)
    theirs = reference(net.state_dict(), CASES[name][0], *args)
    ours = net(*args)
    assert ours.shape == args[0].shape and ours.dtype == dtype and 0.1 < theirs.std() < 10
    assert (ours - theirs).abs().max() <= tolerance * theirs.std()


@pytest.mark.parametrize("name", ("as public", "lambda, time mlp", "not square"))
def test_in_bfloat16_a_network_is_as_exact_as_the_reference(name):
    """Mean absolute error against float64 with the same rounded weights and inputs, at most twice the reference's."""
    net, (x, t, lam, context) = network(name, torch.bfloat16), inputs(name, torch.bfloat16)
    state = net.state_dict()
    exact = reference({key: w.double() for key, w in state.items()}, CASES[name][0], x.double(), t, lam,
                      context.double())
    ours, theirs = net(x, t, lam, context), reference(state, CASES[name][0], x, t, lam, context)
    assert ours.dtype == torch.bfloat16
    assert 0 < (ours.double() - exact).abs().mean() <= 2 * (theirs.double() - exact).abs().mean()


def test_a_lambda_of_0_is_a_very_small_one():
    """Where the proximal operator is the identity: no NaN of its logarithm."""
    torch.manual_seed(0)
    net, x = UViT(**SMALL, lam=True).init_weights(), torch.randn(2, SMALL["in_chans"], 8, 8)
    context = torch.randn(2, SMALL["num_clip_token"], SMALL["clip_dim"])
    outs = [net(x, torch.tensor([.2, .7]), torch.full((2,), lam), context) for lam in (0.0, 1e-12)]
    assert outs[0].isfinite().all() and torch.equal(*outs)


def test_the_latest_skip_is_taken_first():
    net, seen = network("patches of 4, deeper"), {}
    for key in ("in_blocks", "out_blocks"):
        for i, block in enumerate(getattr(net, key)):
            block.register_forward_hook(lambda _, args, out, at=(key, i): seen.update({at: (args, out)}))
    out = net(*inputs("patches of 4, deeper"))
    for i in range(3):
        assert seen["out_blocks", i][0][1] is seen["in_blocks", 2 - i][1]
    other = reference(net.state_dict(), net.config, *inputs("patches of 4, deeper"), latest_first=False)
    assert (out - other).abs().max() > 0.05 * out.std()                  # the order is seen in the output too


# ======================================================================================================= public files

def public_shapes(depth):
    """Names and shapes of the published MS-COCO files, as listed from them."""
    shapes = {"pos_embed": (1, 334, 512), "patch_embed.proj.weight": (512, 4, 2, 2), "patch_embed.proj.bias": (512,),
              "context_embed.weight": (512, 768), "context_embed.bias": (512,), "norm.weight": (512,),
              "norm.bias": (512,), "decoder_pred.weight": (16, 512), "decoder_pred.bias": (16,),
              "final_layer.weight": (4, 4, 3, 3), "final_layer.bias": (4,)}
    sides = [f"{side}_blocks.{i}" for side in ("in", "out") for i in range(depth // 2)]
    for block in sides + ["mid_block"]:
        shapes |= {f"{block}.norm1.weight": (512,), f"{block}.norm1.bias": (512,),
                   f"{block}.attn.qkv.weight": (1536, 512), f"{block}.attn.proj.weight": (512, 512),
                   f"{block}.attn.proj.bias": (512,), f"{block}.norm2.weight": (512,), f"{block}.norm2.bias": (512,),
                   f"{block}.mlp.fc1.weight": (2048, 512), f"{block}.mlp.fc1.bias": (2048,),
                   f"{block}.mlp.fc2.weight": (512, 2048), f"{block}.mlp.fc2.bias": (512,)}
        if block.startswith("out"):
            shapes |= {f"{block}.skip_linear.weight": (512, 1024), f"{block}.skip_linear.bias": (512,)}
    return shapes


def meta(config):
    with torch.device("meta"):
        return UViT(**config)


def shapes_of(net):
    return {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}


@pytest.mark.parametrize("name, depth", (("small", 12), ("small-deep", 16)))
def test_names_and_shapes_are_the_public_files(name, depth):
    assert shapes_of(meta(UVITS[name])) == public_shapes(depth)
    ours = shapes_of(meta(UVITS[name] | dict(lam=True, mlp_time_embed=True)))        # the public ones, and these
    mlp = {"0.weight": (2048, 512), "0.bias": (2048,), "2.weight": (512, 2048), "2.bias": (512,)}
    assert ours == public_shapes(depth) | {"lambda_pos": (1, 1, 512)} | {
        f"{stem}_embed.{key}": shape for stem in ("time", "lambda") for key, shape in mlp.items()}


def test_parameter_counts():
    counts = {name: sum(p.numel() for p in meta(config).parameters()) for name, config in UVITS.items()}
    assert counts == {"tiny": 1_653_508, "small": 44_692_644, "small-deep": 58_345_636, "uvit": 515_311_568}
    source = inspect.getsource(models)
    assert all(f"{count:,}" in source for count in counts.values())      # the comment says so


def test_a_public_file_is_read_and_can_start_a_network_with_lambda(tmp_path):
    net, file = network("as public"), tmp_path / "mscoco_uvit_small.pth"
    torch.save(net.state_dict(), file)
    again = UViT.from_public(file, SMALL)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again(*inputs("as public")), net(*inputs("as public")))
    assert all(p.dtype == torch.bfloat16 for p in UViT.from_public(file, SMALL, torch.bfloat16).parameters())
    start = UViT(**SMALL, lam=True).init_weights()
    left = start.load_state_dict(again.state_dict(), strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) == {
        "lambda_pos", "lambda_embed.0.weight", "lambda_embed.0.bias", "lambda_embed.2.weight", "lambda_embed.2.bias"}
    assert start(*inputs("lambda")).isfinite().all()
    with pytest.raises(ValueError, match=r"small\.pth: the public files have no lambda"):
        UViT.from_public(file, SMALL | dict(lam=True))
    with pytest.raises(FileNotFoundError, match="deep.pth is missing"):
        UViT.from_public(tmp_path / "deep.pth", SMALL)


@pytest.mark.parametrize("change, reason", (
    (lambda state: state.pop("norm.bias"), r"norm\.bias is missing there and \(24,\) in the network, 1 such"),
    (lambda state: state.update(extra=torch.ones(2)), r"extra is \(2,\) there and missing in the network"),
    (lambda state: state.update({"norm.bias": torch.ones(23)}), r"norm\.bias is \(23,\) there and \(24,\)"),
    (lambda state: state.update(step=3), "no plain table of tensors")))
def test_a_public_file_is_read_strictly(change, reason, tmp_path):
    state = dict(network("as public").state_dict())
    change(state)
    torch.save(state, tmp_path / "uvit.pth")
    with pytest.raises(ValueError, match=r"uvit\.pth.*" + reason):
        UViT.from_public(tmp_path / "uvit.pth", SMALL)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("write", (torch.save, lambda state, file: file.write_bytes(pickle.dumps(state)),
                                   lambda state, file: file.write_bytes(b""),
                                   lambda state, file: file.write_bytes(b"PK\3\4" + b"\0" * 40)))
def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(write, tmp_path):
    write(network("as public").state_dict() | {"trap": Trap(tmp_path / "sprung")}, tmp_path / "uvit.pth")
    with pytest.raises(ValueError, match=r"uvit\.pth is damaged, or holds more than tensors") as caught:
        UViT.from_public(tmp_path / "uvit.pth", SMALL)
    assert not (tmp_path / "sprung").exists() and "weights_only" not in str(caught.value)


# ======================================================================================================== our own files

@pytest.mark.parametrize("name", ("as public", "lambda, time mlp"))
def test_a_network_reads_what_it_writes(name, tmp_path):
    net = network(name)
    net.save_pretrained(tmp_path)
    assert shapes_of(net) == {key: tuple(w.shape) for key, w in
                              load_file(tmp_path / "diffusion_pytorch_model.safetensors").items()}
    again = UViT.from_pretrained(tmp_path)
    assert again.config == net.config == {"_class_name": "UViT", "lam": False, "mlp_time_embed": False,
                                          "predict": "noise", "mlp_ratio": 4} | CASES[name][0]
    assert torch.equal(again(*inputs(name)), net(*inputs(name)))


def test_a_network_without_lambda_does_not_read_one_with_it(tmp_path):
    network("lambda").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"lam": true', '"lam": false'))
    with pytest.raises(ValueError, match="unexpected tensor lambda_"):
        UViT.from_pretrained(tmp_path)


def test_a_lora_trains_the_attention_and_is_kept(tmp_path):
    nets = [network("lambda") for _ in range(2)]
    params = models.add_lora(nets[0], 2, 4, UViT.lora_targets)
    assert list(models.lora_layers(nets[0])) == [
        f"{block}.attn.{layer}" for block in ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1")
        for layer in ("qkv", "proj")]
    with torch.no_grad():
        for p in params:
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    models.save_lora(nets[0], tmp_path / "lora.safetensors")
    models.add_lora(nets[1], 2, 4, UViT.lora_targets)
    models.load_lora(nets[1], tmp_path / "lora.safetensors")
    plain, trained, again = (net(*inputs("lambda")) for net in (network("lambda"), *nets))
    assert torch.allclose(trained, again, atol=1e-6) and not torch.allclose(trained, plain, atol=1e-2)


def test_a_pipeline_with_clip_and_t5_is_made_saved_and_loaded(tmp_path, monkeypatch):
    """T5 has the text positions that CLIP's 16 tokens leave, of 25: 9; the features are transformers'."""
    small, prompts, theirs = tmp_path / "small", ["a red circle", "two blue squares, a heart! " * 9], []
    for suffix, length, (net, tokenizer) in (("", 16, pipelines.clip(small / "tokenizer", 1, 16, 12)),
                                             ("_2", 9, pipelines.t5(small / "tokenizer_2", 2, 24))):
        net.save_pretrained(small / f"text_encoder{suffix}")
        ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=length).input_ids
        with torch.no_grad():
            theirs.append(net(torch.tensor(ids)).last_hidden_state)
    want = torch.cat([F.pad(theirs[0], (0, 8)), theirs[1]], dim=1)       # (2, 25, 24)
    config = UVITS["tiny"] | dict(img_size=8, embed_dim=24, depth=2, num_heads=3, clip_dim=24, num_clip_token=25)
    monkeypatch.setitem(UVITS, "uvit", config)
    pipe = models.fresh_uvit("uvit", small, True, torch.float32, "cpu", 0)
    models.save_uvit(pipe, tmp_path / "model", torch.float32)
    again = models.load(str(tmp_path / "model"))
    for made in (pipe, again, models.load(str(tmp_path / "model"), text_length=9)):
        assert [tokenizer.length for tokenizer in made.tokenizers] == [16, 9]
        torch.testing.assert_close(made.encode_text(prompts)[0], want, rtol=1e-4, atol=1e-5)
    stale = [tmp_path / "over" / name for name in ("text_encoder_2/model.safetensors.index.json",
                                                   "text_encoder_2/old.safetensors", "tokenizer_2/vocab.json")]
    for file in stale:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"weight_map": {"shared.weight": "old.safetensors"}}')
    models.save_uvit(pipe, tmp_path / "over", torch.float32)             # over another run's
    assert torch.equal(models.load(str(tmp_path / "over")).encode(prompts)[0], pipe.encode(prompts)[0])
    assert not any(file.exists() for file in stale)
    args = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1]), torch.tensor([0.1, 1]), want
    assert torch.equal(again.net(*args), pipe.net(*args))
    models.save_uvit(again, tmp_path / "model", torch.float32)           # onto itself
    assert torch.equal(models.load(str(tmp_path / "model")).encode(prompts)[0], again.encode(prompts)[0])
    with pytest.raises(ValueError, match="--text-length 10: .* 25 tokens .* makes 16, 9 are left for T5"):
        models.load(str(tmp_path / "model"), text_length=10)
    monkeypatch.setitem(UVITS, "uvit", config | dict(num_clip_token=16))
    with pytest.raises(ValueError, match="16 tokens .* makes 16, 0 are left for T5"):
        models.fresh_uvit("uvit", small, True, torch.float32, "cpu", 0)


def test_random_weights_are_saved_without_encoders(tmp_path):
    pipe = models.load("tiny-prox", init="random")
    models.save_uvit(pipe, tmp_path, torch.float32)
    assert {path.name for path in tmp_path.iterdir()} == {"transformer", "model_index.json"}
    again = UViT.from_pretrained(tmp_path / "transformer").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in pipe.net.state_dict().items())


def test_a_large_file_is_linked_and_a_small_one_copied(tmp_path, monkeypatch):
    """Also one that is itself a name for another, as in the hub's cache; copied, too, where there are no links."""
    (tmp_path / "out").mkdir()
    blob, large, small, target = (tmp_path / name for name in ("blob", "large", "small", "out/target"))
    blob.write_text("many weights")
    large.symlink_to("blob")
    small.write_text("{}")
    target.write_text("of the last run")
    monkeypatch.setattr(models.os.path, "getsize", lambda path: 10 ** 9 if Path(path) == large else 2)
    for source in (large, large, blob):                                  # then onto itself
        models.link_or_copy(source, target)
        assert target.samefile(blob) and not target.is_symlink() and target.read_text() == "many weights"
    models.link_or_copy(small, target)
    assert target.read_text() == "{}" and not target.samefile(small) and blob.read_text() == "many weights"

    def refuse(*_):
        raise OSError("another disk")
    monkeypatch.setattr(models.os, "link", refuse)
    models.link_or_copy(large, target)
    assert target.read_text() == "many weights" and not target.samefile(blob)


# ============================================================================================================ behaviour

@pytest.mark.parametrize("name, change, reason", (
    ("lambda", dict(lam=None), "conditioned on lambda: give lam"),
    ("as public", dict(lam=torch.ones(3)), "not conditioned on lambda: give lam=None"),
    ("as public", dict(context=torch.ones(3, 4, 10)), r"the text is \(4, 10\) .* for \(5, 10\)"),
    ("lambda", dict(context=torch.ones(3, 6, 10)), r"the text is \(6, 10\) .* for \(5, 10\)"),
    ("lambda", dict(context=torch.ones(3, 5, 9)), r"the text is \(5, 9\) .* for \(5, 10\)"),
    ("as public", dict(x=torch.ones(3, 3, 8, 9)), "8 x 9 is no multiple of 2")))
def test_a_network_refuses_what_does_not_fit(name, change, reason):
    args = dict(zip(("x", "t", "lam", "context"), inputs(name)))
    with pytest.raises(ValueError, match=reason):
        network(name)(**args | change)


@pytest.mark.parametrize("change, reason", (
    (dict(depth=5), "depth=5.* multiples of 2"), (dict(num_heads=5), "embed_dim=24.*num_heads=10"),
    (dict(img_size=9), "img_size=9.*patch_size=2"), (dict(conv=False), "conv=False is not implemented"),
    (dict(qkv_bias=True), "qkv_bias=True is not implemented"), (dict(widht=3), "widht=3 is not implemented")))
def test_a_config_that_is_not_implemented_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        UViT(**SMALL | change)
    UViT(**SMALL, conv=True, skip=True, qkv_bias=False)                   # what the public configs say


def test_positions_at_the_configs_size_are_the_table_itself():
    net = network("lambda", torch.float64)
    assert net.positions(4, 4) is net.pos_embed
    table = net.pos_embed[:, 6:].transpose(1, 2).unflatten(2, (4, 4))    # which interpolating would not change
    assert torch.allclose(F.interpolate(table, size=(4, 4), mode="bicubic", align_corners=False), table, atol=1e-12)
    larger = net.positions(8, 6)
    assert larger.shape == (1, 6 + 48, 24) and torch.equal(larger[:, :6], net.pos_embed[:, :6])
    net.pos_embed.data[:, 6:] = 2.5
    assert torch.allclose(net.positions(8, 6)[:, 6:], torch.tensor(2.5, dtype=torch.float64))


def test_the_table_is_trained_through_the_interpolation():
    net = network("larger")
    net.pos_embed.requires_grad_(True)
    net(*inputs("larger")).square().mean().backward()
    assert net.pos_embed.grad.abs().amin(dim=2).min() > 0                # every token's position


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_checkpointing_computes_twice_and_changes_no_gradient(dtype):
    net, calls = network("lambda", dtype).requires_grad_(True), []
    for block in (net.in_blocks[0], net.mid_block, net.out_blocks[1]):
        block.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        net.zero_grad()
        net(*inputs("lambda", dtype)).square().mean().backward()
        return {key: p.grad.clone() for key, p in net.named_parameters()}
    plain = gradients()
    assert len(calls) == 3
    net.checkpointing = True
    again = gradients()
    assert len(calls) == 9
    assert all(grad.any() and torch.equal(grad, again[key]) for key, grad in plain.items())


def test_a_fresh_network_is_the_authors_and_hears_every_condition():
    torch.manual_seed(0)
    net = UViT(**UVITS["tiny"])
    torch.manual_seed(1)
    net.init_weights()
    for key, p in net.named_parameters():
        if "norm" in key:
            assert torch.equal(p, torch.full_like(p, key.endswith("weight"))), key
        elif p.ndim == 4 or key in ("patch_embed.proj.bias", "final_layer.bias"):
            assert 0 < p.abs().max() <= p[0].numel() ** -0.5 if p.ndim == 4 else p.any(), key
        elif key.endswith("bias"):
            assert not p.any(), key
        else:
            assert abs(p.std() - 0.02) < 0.002 * (1 + 30 / math.sqrt(p.numel())), key
    torch.manual_seed(1)
    other = UViT(**UVITS["tiny"])
    torch.manual_seed(1)
    assert all(map(torch.equal, net.state_dict().values(), other.init_weights().state_dict().values()))
    x, text, one = torch.randn(2, 3, 28, 28), torch.randn(2, 16, 128), torch.ones(2)
    with torch.no_grad():
        out = net(x, one * .5, one * .1, text)
        moved = {"t": net(x, one * .6, one * .1, text), "lam": net(x, one * .5, one * .3, text),
                 "context": net(x, one * .5, one * .1, text.flip(0)), "x": net(x.flip(0), one * .5, one * .1, text)}
    change = {key: ((y - out).std() / out.std()).item() for key, y in moved.items()}
    assert out.isfinite().all() and change["x"] > 0.1 and min(change.values()) > 1e-4, change
    assert 0.1 < change["lam"] / change["t"] < 10, change
