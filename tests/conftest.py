import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder of its own, one thread (as other processes of a test have), and the signals as they were."""
    monkeypatch.chdir(tmp_path)
    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """The directory of a very small model in SD3's layout, 12 px, with random weights none of which is zero."""
    import data
    import json
    import models
    out = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vocab = models.train_tokenizer(data.WORLD_WORDS, out / "tokenizer", 16)
    net = models.MMDiT(sample_size=12, patch_size=4, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=16,
                       num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
                       pooled_projection_dim=32, pos_embed_max_size=4, qk_norm="rms_norm").init_weights()
    text = models.CLIPText(hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
                           num_attention_heads=2, max_position_embeddings=16, vocab_size=vocab,
                           eos_token_id=vocab - 1).init_weights()
    for p in net.parameters():
        if not p.any():                                                # the modulation and the output start at zero
            torch.nn.init.normal_(p, std=.1)
    for name, module in (("transformer", net), ("text_encoder", text)):
        models.save_pretrained(module, out / name)
    (out / "model_index.json").write_text(json.dumps(
        {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
         "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
         "tokenizer": ["transformers", "CLIPTokenizer"]}))
    return out


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory):
    """A file of reward functions, smooth and broken ones."""
    file = tmp_path_factory.mktemp("reward") / "rewards_of_the_tests.py"
    file.write_text("""import os, signal, time
import torch

calls = 0


def red(images, prompts, meta):
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def blue(images, prompts, meta):
    return -red(images, prompts, meta)


def slow(images, prompts, meta):
    time.sleep(.03)
    return red(images, prompts, meta)


def some_nan(images, prompts, meta):                          # one image in sixteen
    reward = red(images, prompts, meta)
    reward[::16] = float("nan")
    return reward


def some_inf(images, prompts, meta):
    reward = red(images, prompts, meta)
    reward[::16] = float("inf")
    return reward


def many_nan(images, prompts, meta):                          # one in eight: more than a tenth
    reward = red(images, prompts, meta)
    reward[::8] = float("nan")
    return reward


def all_nan(images, prompts, meta):
    return red(images, prompts, meta) * float("nan")


def raises(images, prompts, meta):
    raise KeyError("no such judge")


def raises_on_one_rank(images, prompts, meta):
    if os.environ["RANK"] == "1":
        raise RuntimeError("the judge of one rank is gone")
    return red(images, prompts, meta)


def exits(images, prompts, meta):
    raise SystemExit(0)


def paints(images, prompts, meta):
    return images.mul_(255).mean((1, 2, 3))


def too_short(images, prompts, meta):
    return red(images, prompts, meta)[1:]


def one_number(images, prompts, meta):
    return red(images, prompts, meta).mean()


def interrupts(images, prompts, meta):                        # Ctrl-C in the third rollout
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return red(images, prompts, meta)
""")
    return file
