"""Judges behind a server: what is asked, how an answer is read, and servers that are slow, odd, busy or gone."""
import base64
import http.server
import io
import itertools
import json
import math
import threading
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image

import data
import rewards


class Server(http.server.ThreadingHTTPServer):
    """A chat server on this machine: answer(body, image or None, n from 0) -> (status, text, a choice, or bytes)."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.count, self.bodies = f"http://127.0.0.1:{self.server_port}/v1", itertools.count(), []
        self.keys = []
        self.answer = lambda body, image, n: (200, "Final Score: 4")
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()

    def handle_error(self, *_):                                        # a client that has hung up
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        n, body = next(self.server.count), json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if "image_url" in part]
        image = Image.open(io.BytesIO(base64.b64decode(urls[0].partition(",")[2]))) if urls else None
        status, answer = self.server.answer(body, image, n)
        if not isinstance(answer, bytes):
            choice = answer if isinstance(answer, dict) else {"message": {"content": answer}, "finish_reason": "stop"}
            answer = json.dumps({"choices": [choice]}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server()
    for key, value in {"no_proxy": "*", "JUDGE_SERVER": server.url, "JUDGE_MODEL": "vlm", "JUDGE_BACKOFF": ".01",
                       "JUDGE_RETRIES": "2", "JUDGE_TIMEOUT": "10"}.items():
        monkeypatch.setenv(key, value)
    yield server
    server.shutdown()
    server.server_close()


def grey(*levels, size=8):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, size, size) / 255


def ask(name, images, prompts=None, metas=None):
    score = rewards.load(name)
    values = score(images, prompts or ["a cat"] * len(images), metas or [{}] * len(images))
    return [None if math.isnan(v) else round(v, 4) for v in values.tolist()], score.rewards[name.partition(":")[0]]


def text_of(body):
    return next(part["text"] for part in body["messages"][0]["content"] if "text" in part)


# ------------------------------------------------------------------------------------------------ what comes of answers

def choice(text, end="stop"):
    return {"message": {"content": text}, "finish_reason": end}


@pytest.mark.parametrize("name, text, value", (
    ("unifiedreward", "It fits well.\nFinal Score: 4", .8), ("unifiedreward", "Final Score: 3.5", .7),
    ("unifiedreward", "**Final Score:** 2", .4), ("unifiedreward", "Not Final Score: 1, but\nFinal Score: 5/5", 1.),
    ("unifiedreward", "Final Score: 10", None), ("unifiedreward", "Final Score: 0", None),
    ("unifiedreward", "Final Score: five", None), ("unifiedreward", "4", None), ("unifiedreward", "", None),
    ("unifiedreward-2", "Alignment Score (1-5): 2.6947\nCoherence Score (1-5): 3\nStyle Score (1-5): 4", .64631),
    ("unifiedreward-2", "Alignment Score (1-5): 2\nCoherence Score (1-5): 3", None),
    ("unifiedreward-2", "Alignment Score (1-5): 2\nCoherence Score (1-5): 3\nStyle Score (1-5): 7", None),
    ("unifiedreward", "**Final Score**: 4", .8), ("unifiedreward", "final score (1-5): [3]", .6),
    ("unifiedreward-2", "**Alignment Score (1-5)**: 2\n_Coherence Score_: 3\nStyle Score:** 4**", .6),
    ("vlm", "The cat is there. Score: 1", .2), ("vlm", "I cannot see it.", None), ("vlm", "### Score:\n4", .8),
    ("vlm", "Score: (1-5) 4", None), ("vlm", "Score: [1 - 5]: 3", None), ("vlm", "Score: 12", None)))
def test_numbers(server, name, text, value):
    server.answer = lambda body, image, n: (200, text)
    (got,), reward = ask(name, grey(9))
    assert got == (value if value is None else pytest.approx(value, abs=1e-4))
    assert len(server.bodies) == (1 if value is not None else rewards.TRIES) and reward.unparsed == (value is None)


def test_the_share_that_is_not_read_is_logged(server):
    """The light image's answer has no number in it: NaN, left out of the mean, and one of twelve in the row."""
    server.answer = lambda body, image, n: (200, "What is it?" if image.getpixel((0, 0))[0] > 200 else "Score: 4")
    for overlap in (True, False):
        run = types.SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, constant=True, lap=id,
                                    cfg=types.SimpleNamespace(reward="vlm:0.5", reward_mix="reward", overlap=overlap))
        scoring = data.Scoring(run, rewards.load("vlm:0.5"))
        for levels in ((9, 20, 255, 30), range(10, 90, 10)):           # two chunks, of 4 images and of 8
            scoring.add(grey(*levels), ["a cat"] * len(levels), [{}] * len(levels))
        reward = scoring.result()
        assert len(scoring.images) == 12 and reward.isnan().nonzero().flatten().tolist() == [2]
        assert scoring.terms()["vlm"] == {"mean": pytest.approx(.8), "std": pytest.approx(0), "weight": .5,
                                          "unparsed": pytest.approx(1 / 12)}


def test_an_answer_that_was_cut_off_is_not_read():
    with pytest.raises(ValueError, match="cut off"):
        rewards.answer_text(choice("Final Score: 4", "length"))


def levels(**probabilities):
    top = [{"token": token, "logprob": math.log(p)} for token, p in probabilities.items()]
    return {"message": {"content": ""}, "logprobs": {"content": [{"top_logprobs": top}]}, "finish_reason": "length"}


@pytest.mark.parametrize("top, level", (
    ({"excellent": .5, "good": .25, "fair": .25}, 4.25), ({"good": .2, "bad": .1, "the": .7}, 3.), ({"poor": 1e-9}, 2.),
    ({" Good": .3, "\u2581good": .2, "\u0120fair": .5}, 3.5), ({"exc": .5, "go": .4, "b": .05, "bad": .05}, 1.),
    ({"the": .9}, None), ({}, None)))
def test_levels(top, level):
    if level is None:
        with pytest.raises(ValueError):
            rewards.read_levels(levels(**top))
    else:                                                              # over the words found, "exc" beside "bad"
        want = (5 * .5 + .05) / .55 if "exc" in top else level
        assert rewards.read_levels(levels(**top)) == pytest.approx(want)


def test_deqa_asks_for_the_log_probs_of_one_token(server):
    server.answer = lambda body, image, n: (200, levels(good=.5, poor=.5))
    assert ask("deqa", grey(9))[0] == [.6]
    body = server.bodies[0]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert body["messages"][1] == {"role": "assistant", "content": "The quality of the image is"}
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert [part["type"] for part in body["messages"][0]["content"]] == ["text", "image_url"]
    server.answer = lambda body, image, n: (200, "good")               # a server that gives no log-probs
    with pytest.raises(RuntimeError, match="the server sends no log-probs"):
        ask("deqa", grey(9))


@pytest.mark.parametrize("h, w", ((5, 8), (8, 5), (6, 6)))
def test_deqa_sees_the_whole_image_on_a_square(server, h, w):
    """In the middle of CLIP's mean colour, as its authors' expand2square; other judges see it as it is."""
    seen = []
    server.answer = lambda body, image, n: seen.append(np.array(image)) or (200, levels(good=.5, poor=.5))
    image, side = torch.rand(1, 3, h, w), max(h, w)
    ask("deqa", image)
    want = np.full((side, side, 3), (122, 116, 104), dtype=np.uint8)
    top, left = (side - h) // 2, (side - w) // 2
    want[top:top + h, left:left + w] = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(seen[0], want)


def points(score, analysis='["a", "b"]'):
    return f"<description>A cat.<analysis>{analysis}</analysis><score>{score}</score></description>"


META = {"testpoints": ["Style", "Attribute - Color"], "descriptions": ["an ink painting", "a red cat"]}


@pytest.mark.parametrize("text, want", (
    (points("[0,1]"), [0, 1]), (points(" [1, 1] "), [1, 1]), ("<score>[0,0]</score>" + points("[1, 0]"), [1, 0]),
    (points("[1]"), None), (points("[1, 2]"), None), (points("[1, 0, 1]"), None), (points("[1, 'yes']"), None),
    (points("1, 0", '["a"]'), None), (points("[0, 1]", "[it is, so]"), None), (points("(" * 300), None),
    ("<score>[0, 1]</score>", None), (points("7", "3"), None), ("", None),
    (points("{0, 1}"), None), (points("[0, 1]", "'xy'"), None)))
def test_points(text, want):
    if want is None:
        with pytest.raises((ValueError, LookupError, TypeError)):
            rewards.read_points(choice(text), META)
    else:
        assert rewards.read_points(choice(text), META) == want


def test_unigenbench(server, tmp_path, capsys):
    file = tmp_path / "test_prompts_zh.csv"
    rows = ['{"考点": ["风格", "属性-数量"], "考点对应描述": ["水墨画风格", "两只熊猫"]}',
            '{"考点": ["风格", "语法-否定" "属性-颜色"], "考点对应描述": ["a", "b", "c"]}']
    file.write_text("index,prompt_zh,sub_dims_zh\n" + "".join(
        f'{i},两只熊猫{i},"{row.replace(chr(34), chr(34) * 2)}"\n' for i, row in enumerate(rows)), encoding="utf-8")
    metas = data.prompts(file, "test")
    assert "row 1: a comma is missing" in capsys.readouterr().err
    assert [len(meta["testpoints"]) for meta in metas] == [2, 3]
    server.answer = lambda body, image, n: (
        200, points("[1, 0]") if "两只熊猫0" in text_of(body) else points("[1, 1, 0]", "['a', 'b', 'c']"))
    values, reward = ask("unigenbench", grey(9, 200), [meta["prompt"] for meta in metas], metas)
    assert values == [.5, pytest.approx(2 / 3, abs=1e-4)] and reward.answers == [[1, 0], [1, 1, 0]]
    texts = sorted(map(text_of, server.bodies))
    assert "2. Attribute - Quantity" in texts[0] and "两只熊猫" in texts[0] and "have 2 entries" in texts[0]
    assert "data:image/jpeg" in str(server.bodies[0])
    summary = rewards.unigenbench_summary([{**meta, "points": p} for meta, p in zip(metas, reward.answers)]
                                          + [{**metas[0], "points": None}])
    assert summary == {"Style": 1., "Attribute": 0., "Grammar": 1., "overall": pytest.approx(2 / 3), "points": {
        "Style": 1., "Attribute - Quantity": 0., "Attribute - Color": 0., "Grammar - Negation": 1.}}
    for meta, message in (({}, "needs a meta with 'testpoints'"), ({**META, "testpoints": ["Style"]}, "needs a meta"),
                          ({**META, "testpoints": ["Style", "Smell"]}, "no test point 'Smell'")):
        with pytest.raises(ValueError, match=message):
            ask("unigenbench", grey(9), ["a cat"], [meta])
    assert len(rewards.POINTS) == len(rewards.ENGLISH) == 27
    assert len({name.partition(" - ")[0] for name in rewards.POINTS}) == 10


def test_unigenbench_by_the_authors_question(server, tmp_path, monkeypatch):
    """A template of theirs is filled as their build_system_prompt does, by str.format."""
    file, point = tmp_path / "theirs.json", "Attribute - Quantity"
    theirs = {"question": "For {prompt}: {testpoint}. {explanation} and {test_explanation}!", "headers": ["A", "B"],
              "points": {"Style": "a look", point: "three or more"}}
    file.write_text(json.dumps(theirs))
    own = rewards.load("unigenbench").rewards["unigenbench"].sha256
    monkeypatch.setenv("UNIGENBENCH_TEMPLATE", str(file))
    meta = {"testpoints": ["Style", point], "descriptions": ["ink", "two {prompt} pandas"]}
    server.answer = lambda body, image, n: (200, points("[1, 0]"))
    values, reward = ask("unigenbench", grey(9), ["a {b}"], [meta])
    assert values == [.5] and reward.sha256 != own
    assert text_of(server.bodies[0]) == theirs["question"].format(
        prompt="a {b}", testpoint=["Style", point],
        explanation=f"A:\u300c\nStyle: a look\n{point}: three or more\n\u300d",
        test_explanation=f"B:\u300c\nStyle: ink\n{point}: two {{prompt}} pandas\n\u300d")
    with pytest.raises(ValueError, match="does not know the test point 'Text Generation'"):
        reward.check("a", {"testpoints": ["Text Generation"], "descriptions": ["x"]})
    for content in ("{", "[]", json.dumps({**theirs, "headers": ["A"]}), json.dumps({**theirs, "more": 1}),
                    json.dumps({key: theirs[key] for key in ("question", "points")})):
        file.write_text(content)
        with pytest.raises(ValueError, match="the template .*theirs.json"):
            rewards.load("unigenbench")


def test_unigenbench_of_a_model(server, random_model, tmp_path, capsys):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps({"prompt": prompt, **META}) + "\n" for prompt in ("a cat", "a dog")))
    server.answer = lambda body, image, n: (200, points("[1, 0]") if "a cat" in text_of(body) else "I cannot see it.")
    rewards.main(["bench", "--model", str(random_model), "--benchmark", str(file), "--per-prompt", "2", "--out",
                  str(out), "--eval-steps", "1", "--reward", "unigenbench"])
    result = json.loads((out / "result.json").read_text())
    assert result["scores"]["all"] == {"images": 4, "unigenbench": .5, "failed": 2}
    assert (result["unigenbench"]["Style"], result["unigenbench"]["Attribute"]) == (1., 0.)
    want = {"engine": "vlm", "sha256": rewards.load("unigenbench").rewards["unigenbench"].sha256}
    assert result["protocol"]["rewards"]["unigenbench"] == want
    assert "Style                          1.0000" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [row["answers"]["unigenbench"] for row in rows] == [[1, 0], [1, 0], None, None]
    server.bodies.clear()
    rewards.main(["bench", "--model", str(random_model), "--benchmark", str(file), "--per-prompt", "2", "--out",
                  str(out), "--eval-steps", "1", "--reward", "unigenbench"])
    assert not server.bodies                                           # what was asked for once is there
    server.answer = lambda body, image, n: (200, "I cannot see it.")
    rewards.main(["bench", "--model", str(random_model), "--benchmark", str(file), "--out", str(tmp_path / "none"),
                  "--eval-steps", "1", "--reward", "unigenbench"])
    text = (tmp_path / "none" / "result.json").read_text()             # JSON has no NaN
    assert "NaN" not in text and json.loads(text)["unigenbench"] == {"overall": None, "points": {}}
    assert ["overall", "-"] in map(str.split, capsys.readouterr().out.splitlines())


def test_a_row_of_unigenbench_that_cannot_be_repaired(tmp_path):
    file = tmp_path / "test_prompts_en.csv"
    for row in ('{""Testpoints"": [', '{""Testpoints"": [""Style""], ""Testpoint Description"": []}', '[]', ''):
        file.write_text(f'index,prompt_en,sub_dims_en\n7,"a cat","{row}"\n')
        with pytest.raises(ValueError, match="row 7: sub_dims_en holds no test points"):
            data.prompts(file, "test")


def test_a_template(server, tmp_path, monkeypatch):
    file = tmp_path / "mine.json"
    monkeypatch.setenv("VLM_TEMPLATE", str(file))
    mine = {"question": "How {what} is '{prompt}'?", "patterns": ["a=(\\d+)", "b=(\\d+)"], "weights": [3, 1],
            "high": 10}
    file.write_text(json.dumps(mine))
    server.answer = lambda body, image, n: (200, "a=4 b=8")
    assert ask("vlm", grey(9), ["a cat"], [{"what": "red"}])[0] == [2.]                    # (3 * 4 + 8) / 10
    assert text_of(server.bodies[0]) == "How red is 'a cat'?"
    with pytest.raises(ValueError, match="puts {what} into its question"):
        ask("vlm", grey(9))
    for change, message in (({"patterns": ["a"]}, "wrong patterns"), ({"patterns": ["("]}, "cannot use the template"),
                            ({"scale": 3}, "has scale"), ({"low": 10}, "low or high"), ({"weights": [1]}, "1 weights"),
                            ({"low": "1"}, "has low='1'"), ({"max_tokens": "9"}, "has max_tokens='9'"),
                            ({"question": 5}, "has question=5"), ({"size": [5]}, r"has size=\[5\]"),
                            ({"patterns": "a=b"}, "has patterns='a=b'"), ({"low": -9, "high": 0}, "low or high"),
                            ({"weights": ["3", 1]}, "cannot use the template"),
                            ({"patterns": [5]}, "cannot use the template")):
        file.write_text(json.dumps({**mine, **change}))
        with pytest.raises(ValueError, match=message):
            rewards.load("vlm")


# ---------------------------------------------------------------------------------------------------------- the server

def test_what_is_sent(server):
    assert ask("unifiedreward:2", torch.rand(1, 3, 20, 20))[0] == [1.6]
    body = server.bodies[0]
    assert (body["model"], body["temperature"], len(body["messages"])) == ("vlm", 0, 1)
    assert "Text Caption: [a cat]" in text_of(body)
    seen = []
    server.answer = lambda body, image, n: seen.append(np.array(image)) or (200, "Score: 3")
    image = torch.rand(1, 3, 5, 7)
    ask("vlm", image)
    assert np.array_equal(seen[0], (image[0].permute(1, 2, 0) * 255).round().byte().numpy())           # lossless


def test_each_image_has_its_own_answer_and_they_are_asked_at_once(server):
    gate = threading.Barrier(8)

    def answer(body, image, n):
        gate.wait(60)                                                  # fails unless eight are here together
        time.sleep(.02 * (n % 3))
        return 200, f"Final Score: {image.getpixel((0, 0))[0] % 5 + 1}"
    server.answer = answer
    values, _ = ask("unifiedreward", grey(*range(16)), [f"prompt {i}" for i in range(16)])
    assert values == pytest.approx([(i % 5 + 1) / 5 for i in range(16)], abs=1e-4)


def test_not_more_at_once_than_asked_for(server, monkeypatch):
    monkeypatch.setenv("UNIFIEDREWARD_WORKERS", "3")
    now, most, lock, gate = [0], [0], threading.Lock(), threading.Barrier(3)

    def answer(body, image, n):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        gate.wait(60)
        with lock:
            now[0] -= 1
        return 200, "Final Score: 3"
    server.answer = answer
    ask("unifiedreward", grey(*range(12)))
    assert most[0] == 3


@pytest.mark.parametrize("bad", ((429, b""), (500, b"oh"), (200, b"<html>"), (200, b'{"choices": []}'), (200, b"[]")))
def test_busy_or_broken_then_well(server, bad):
    server.answer = lambda body, image, n: bad if n < 2 else (200, "Final Score: 5")
    values, reward = ask("unifiedreward", grey(9))
    assert values == [1.] and len(server.bodies) == 3 and reward.unparsed == reward.unanswered == 0


def test_a_timeout_of_0_is_refused(server, monkeypatch):
    monkeypatch.setenv("JUDGE_TIMEOUT", "0")
    with pytest.raises(ValueError, match="JUDGE_TIMEOUT=0: a number"):
        ask("unifiedreward", grey(9))


def test_too_slow_then_well(server, monkeypatch):
    monkeypatch.setenv("JUDGE_TIMEOUT", "1")
    monkeypatch.setenv("JUDGE_RETRIES", "9")
    hang = threading.Event()
    server.answer = lambda body, image, n: (hang.wait(60) if n == 0 else None, (200, "Final Score: 5"))[1]
    assert ask("unifiedreward", grey(9))[0] == [1.] and len(server.bodies) >= 2
    hang.set()


def test_garbage_is_asked_for_again_then_nan(server, capsys):
    server.answer = lambda body, image, n: (200, "Final Score: 5" if image.getpixel((0, 0))[0] else "?!")
    values, reward = ask("unifiedreward", grey(1, 0, 2, 3))
    assert values == [1., None, 1., 1.] and reward.unparsed == .25     # never a zero
    assert sorted(body["temperature"] for body in server.bodies) == [0, 0, 0, 0, .5, .5]
    assert "of 4 images 1 have no answer that can be read, such as '?!', and 0" in capsys.readouterr().err
    server.answer = lambda body, image, n: (200, "Final Score: 5" if body["temperature"] else "?!")    # then well
    assert ask("unifiedreward", grey(0))[0] == [1.]


def test_one_image_that_breaks_the_server_is_nan(server, capsys):
    server.answer = lambda body, image, n: (200, "Final Score: 5") if image.getpixel((0, 0))[0] else (
        time.sleep(.05) or (500, b""))
    values, reward = ask("unifiedreward", grey(0, 1, 2, 3, 4, 5))
    assert values == [None, 1., 1., 1., 1., 1.] and reward.unparsed == 0 and reward.unanswered == pytest.approx(1 / 6)
    assert "and 1 none at all: NaN" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ("1", "8"))
@pytest.mark.parametrize("status", (200, 400))
def test_images_that_break_the_server_while_nobody_else_is_answered_are_nan(server, monkeypatch, workers, status):
    """Alone, first, last, all of them: a question without an image is answered, or refused, so the server is there."""
    monkeypatch.setenv("JUDGE_WORKERS", workers)
    server.answer = lambda body, image, n: (status, b"") if image is None and status == 400 else (
        (500, b"") if image and image.getpixel((0, 0))[0] == 0 else (200, "Final Score: 5"))
    for levels in ((0,), (0, 1), (1, 0), (0, 0, 0)):
        values, reward = ask("unifiedreward", grey(*levels))
        assert values == [1. if level else None for level in levels] and reward.unparsed == 0
        assert reward.unanswered == pytest.approx(levels.count(0) / len(levels))
    probes = [body for body in server.bodies if body["messages"] == [{"role": "user", "content": "ok"}]]
    assert len(probes) >= 2 and all(body["max_tokens"] == 1 for body in probes)


def test_an_image_that_the_server_refuses_is_nan(server, monkeypatch, capsys):
    """A hosted judge's filter, a question that is too long: first, last or alone; not so a wrong key or model."""
    monkeypatch.setenv("JUDGE_WORKERS", "2")
    refusal = 400, b"the image was filtered"
    server.answer = lambda body, image, n: refusal if image and image.getpixel((0, 0))[0] == 0 else (200, "Score: 5")
    for levels in ((0, 1, 2), (1, 2, 0), (0,)):
        values, reward = ask("vlm", grey(*levels))
        assert values == [1. if level else None for level in levels] and reward.unparsed == 0
        assert reward.unanswered == pytest.approx(1 / len(levels))
        assert "1 none at all: NaN. " in (said := capsys.readouterr().err) and "the image was filtered" in said
    for text_too in (True, False):                                     # whatever is asked, or every image
        server.answer = lambda body, image, n: refusal if image or text_too else (200, "ok")
        with pytest.raises(ValueError, match="refused: HTTP 400"):
            ask("vlm", grey(1, 2))
    server.answer = lambda body, image, n: (404, b"no such model") if image else (200, "ok")
    with pytest.raises(ValueError, match="refused: HTTP 404"):
        ask("vlm", grey(1, 2))


def test_the_key_is_never_printed(server, monkeypatch):
    server.answer = lambda body, image, n: (200, "Score: 5")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret123\r\n")           # a file's last line
    assert ask("vlm", grey(1))[0] == [1.] and server.keys == ["Bearer sk-secret123"]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sec\nret123")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
        ask("vlm", grey(1))
    assert "ret123" not in str(error.value)


def test_a_server_that_dies_stops_the_run(server, monkeypatch):
    """Four workers: each may give one question up for each of the three answers, and fails at one more."""
    monkeypatch.setenv("JUDGE_WORKERS", "4")
    server.answer = lambda body, image, n: (200, "Final Score: 5") if n < 3 else (503, b"")
    with pytest.raises(ValueError, match="failed 3 times, the last by HTTP 503.*without an image: start the server"):
        ask("unifiedreward", grey(*range(200)))
    assert len(server.bodies) <= 3 + 4 * 4 * 3 + 3                     # three tries each, and a question without image


def test_a_server_that_is_gone_and_one_that_refuses(server, monkeypatch):
    server.answer = lambda body, image, n: (401, b"no key")
    with pytest.raises(ValueError, match="refused: HTTP 401 .*no key"):
        ask("unifiedreward", grey(*range(4)))
    monkeypatch.setenv("JUDGE_SERVER", "http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="127.0.0.1:9/v1 failed 3 times"):
        ask("unifiedreward", grey(1))


def test_images_that_are_not_finite_are_not_asked_about(server):
    images = grey(1, 2, 3).clone()
    images[1, 0, 0, 0] = math.inf
    values, reward = ask("unifiedreward", images)
    assert values == [.8, None, .8] and len(server.bodies) == 2 and reward.unparsed == 0


def test_settings(server, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_SERVER", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("UNIFIEDREWARD_2_SERVER", server.url)           # for this judge alone
    server.answer = lambda body, image, n: (200, "Alignment Score: 5\nCoherence Score: 5\nStyle Score: 5")
    assert ask("unifiedreward-2", grey(9))[0] == [1.]
    for key, value in (("TIMEOUT", "soon"), ("WORKERS", "0"), ("RETRIES", "-1")):
        with monkeypatch.context() as m:
            m.setenv(f"JUDGE_{key}", value)
            with pytest.raises(ValueError, match=f"JUDGE_{key}={value}"):
                rewards.load("deqa")
    for key, value in (("SERVER", None), ("SERVER", "localhost:8000"), ("MODEL", None)):
        with monkeypatch.context() as m:
            m.delenv(f"JUDGE_{key}") if value is None else m.setenv(f"JUDGE_{key}", value)
            with pytest.raises(ValueError, match="set JUDGE_SERVER=.* and JUDGE_MODEL=.*DEQA_SERVER") as error:
                rewards.load("deqa")
            assert "\n" not in str(error.value)


def test_the_protocol_names_the_judge_and_what_it_is_asked(server, random_model, tmp_path, monkeypatch, capsys):
    """Another template, another model or another judge is another protocol, and its figures want another folder."""
    server.answer = lambda body, image, n: (200, "Score: 4")
    line = ["bench", "--model", str(random_model), "--benchmark", "shapes", "--draw", "2", "--eval-steps", "1",
            "--reward", "vlm", "--out", str(tmp_path / "out")]
    rewards.main(line)
    first = json.loads((tmp_path / "out" / "protocol.json").read_text())["rewards"]["vlm"]
    assert first["engine"] == rewards.judge_setting("vlm", "MODEL") and len(first["sha256"]) == 64
    assert len({rewards.load(name).rewards[name].sha256 for name in (*rewards.NUMBER, "deqa", "unigenbench")}) == 5
    template = tmp_path / "template.json"
    template.write_text('{"question": "Is it good? {prompt}"}')
    for key, value in (("VLM_TEMPLATE", str(template)), ("VLM_MODEL", "another")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setenv(key, value)
            rewards.main(line)
        assert "holds figures with rewards=" in capsys.readouterr().err
    rewards.main(line)                                                 # the same again
