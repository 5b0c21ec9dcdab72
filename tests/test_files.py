"""Files from elsewhere, and tokenizer.json against transformers."""
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from tokenizers.processors import TemplateProcessing

import models
from models import CLIPTokenizer, MMDiT, T5Tokenizer


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
    command = str(caught.value).split("\n")[1].strip()
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
