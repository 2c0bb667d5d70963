"""A stand-in for an OpenAI-compatible server: completions of a model in this process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import torch


class Completions:
    """Answers like vLLM's ``/v1/completions``: log-probabilities of a prompt, or greedy tokens."""

    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    def answer(self, request: dict) -> dict:
        prompts = request["prompt"]
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        kind = self._echo if request.get("echo") else self._generate
        choices = [{"index": i} | kind(ids, request) for i, ids in enumerate(prompts)]
        return {"object": "text_completion", "model": request["model"], "choices": choices}

    @torch.no_grad()
    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def _echo(self, ids: list[int], request: dict) -> dict:
        logprobs = self._logprobs(ids)
        ids = [*ids, int(logprobs[-1].argmax())]  # max_tokens=1
        own = [None, *(float(logprobs[i, token]) for i, token in enumerate(ids[1:]))]
        best = [None, *({"best": float(row.max())} for row in logprobs)]
        return {"text": "", "logprobs": {"token_logprobs": own, "top_logprobs": best}}

    def _generate(self, ids: list[int], request: dict) -> dict:
        made: list[int] = []
        for _ in range(request["max_tokens"]):
            made.append(int(self._logprobs([*ids, *made])[-1].argmax()))
            text = self.tokenizer.decode(made, skip_special_tokens=True)
            for stop in request["stop"]:
                if stop in text:
                    return {"text": text.split(stop)[0]}
            if made[-1] == self.tokenizer.eos_token_id:
                break
        return {"text": self.tokenizer.decode(made, skip_special_tokens=True)}


@contextlib.contextmanager
def serving(completions: Completions) -> Iterator[str]:
    """Serve on a free port of this machine from a thread; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(completions.answer(request)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/completions"
        finally:
            server.shutdown()
            thread.join()
