"""The shipped tiny model: its size, its layout, how it is made, and how well it paints and listens."""
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import torch

import data
import dgpo
import models
import proxt2i
import rewards

TINY = Path(__file__).resolve().parent / "tiny"
ALONE = types.SimpleNamespace(rank=0, world=1, sum=lambda x: x)


def test_fits_and_is_read_by_the_public_library():
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) < 8 * 2 ** 20
    shipped = [file for folder in TINY.parent.glob("tiny*") for file in folder.rglob("*") if file.is_file()]
    assert 10e6 < sum(file.stat().st_size for file in shipped) < 24e6
    pipe = models.load("tiny")
    context, pooled = pipe.encode_text(["a photo of a red circle"])
    theirs = CLIPTextModelWithProjection.from_pretrained(TINY / "text_encoder")
    ids = pipe.tokenizers[0](["a photo of a red circle"])
    net = SD3Transformer2DModel.from_pretrained(TINY / "transformer", torch_dtype=torch.float32)
    x, t = data.noise((1, *pipe.latent_shape()), 0), torch.tensor([.7])
    with torch.no_grad():
        assert torch.allclose(theirs.float()(ids).text_embeds, pooled, atol=1e-5)
        ours, other = pipe.net(x, t, context, pooled), net(x, context, pooled, t * 1000).sample
    assert (ours - other).abs().max() < 1e-5 * ours.std()


def test_every_word_of_the_world_is_one_token():
    ids = models.load("tiny").tokenizers[0](data.WORLD_WORDS)
    assert ((ids != ids[0, -1]).sum(1) == 2).all()                     # the start and the word; the rest is padding


def test_the_shipped_model_knows_what_pretraining_asks(tmp_path):
    """A step's loss of the shipped weights, .07 (untrained 1.6; with v's sign turned 6.3)."""
    (tmp_path / "shipped.py").write_text("""import models

for cls, part in ((models.MMDiT, "transformer"), (models.CLIPText, "text_encoder")):
    state = cls.from_pretrained(models.TINY_DIR / part).state_dict()
    cls.init_weights = lambda net, state=state: net.load_state_dict(state) and net
models.main()
""")
    line = ["shipped.py", "pretrain", "--out", "out", "--state", "out.pt", "--images", "64", "--batch", "64"]
    done = subprocess.run([sys.executable, *line], cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(TINY.parents[1])})
    losses = re.findall(r"loss[= ](\d*\.\d+)", done.stderr + done.stdout)
    assert done.returncode == 0 and losses and .02 < float(losses[-1]) < .2, (losses, done.stderr[-500:])


def test_pretraining_goes_on_from_its_own_state_alone(tmp_path):
    """Two steps in two parts are two steps in one, bit for bit; with another seed the state is refused in a line."""
    def pretrain(out, state, *flags, **more):
        line = ["pretrain", "--out", out, "--state", state, "--images", 16, "--batch", 8, "--save-every", 1, *flags]
        return subprocess.run([sys.executable, *more.get("how", [models.__file__]), *map(str, line)], cwd=tmp_path,
                              text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(TINY.parents[1])})
    (tmp_path / "killed.py").write_text("""import os
import models

replace = os.replace
def once(new, file):                                                   # the first state is the last thing it does
    replace(new, file)
    os._exit(9)
os.replace = once
models.main()
""")
    assert pretrain("one", "one.pt").returncode == 0
    assert pretrain("two", "two.pt", how=["killed.py"]).returncode == 9
    assert torch.load(tmp_path / "two.pt")["step"] == 1 and pretrain("two", "two.pt").returncode == 0
    one, two = ({file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
                for folder in (tmp_path / "one", tmp_path / "two"))
    assert one == two and len(one) == 9
    done = pretrain("three", "two.pt", "--seed", "1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--state two.pt is of a run with" in done.stderr
    pipe = models.load(str(tmp_path / "two"))
    assert pipe.net.config == models.load("tiny").net.config


def test_a_good_painter_with_middling_obedience():
    """Guidance 3, 10 steps, 192 test prompts: strict .3 to .65, far better at objects and colours than at relations."""
    rows = data.draw_prompts(data.world_prompts("test"), 192, "test")
    judges = {"shapes-strict": rewards.load("shapes-strict")}
    row = data.evaluate(dgpo.sample, models.load("tiny"), rows, judges, dgpo.Config(), ALONE, 3.0)
    tags = row["tags"]
    assert .3 < row["eval"] < .65
    assert min(tags["single_object"], tags["colors"]) > .3 + max(tags["position"], tags["color_attr"])


def test_the_proximal_model_is_ahead_at_few_steps():
    """192 test prompts, guidance 1, the same budget for both: the claim of ProxT2I before RL."""
    rows = data.draw_prompts(data.world_prompts("test"), 192, "test")
    strict = {"shapes-strict": rewards.load("shapes-strict")}
    pipes = {method: models.load(f"tiny-{method}") for method in ("prox", "score")}
    counts = [sum(p.numel() for p in pipe.net.parameters()) for pipe in pipes.values()]
    assert counts[1] < counts[0] < 1.1 * counts[1]                     # prox has an MLP for lambda

    def score(sampler, n):
        method = proxt2i.SAMPLERS[sampler]
        cfg = proxt2i.Config(method=method, sampler=sampler, eval_steps=n)
        return data.evaluate(proxt2i.sample, pipes[method], rows, strict, cfg, ALONE, 1.0)["eval"]
    assert score("hybrid", 4) > .05 + max(score(sampler, 4) for sampler in ("sde", "sde-mean", "ode"))
    assert score("hybrid", 8) > .03 + max(score(sampler, 8) for sampler in ("sde", "sde-mean", "ode", "dpm"))
