"""A Hugging Face model behind OpenAI's protocol, on a free port of this machine: transformers draws, greedily."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch


class Served:
    """The server, as a context manager. `fails` says of which requests, counted from 1, it refuses."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        stops = set(ids) if isinstance(ids := model.generation_config.eos_token_id, list) else {ids}
        stops.add(tokenizer.eos_token_id)
        lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.fails: Callable[[int], bool] = lambda number: False
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, status: int, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.answer(200, {"data": [{"id": "model"}]})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock, torch.no_grad():
                    served.requests.append(asked)
                    if served.fails(len(served.requests)):
                        self.answer(422, {"error": {"message": "not today"}})
                        return
                    ids = served.ids_of(tokenizer, asked["messages"])
                    drawn = model.generate(
                        ids, max_new_tokens=asked["max_tokens"], do_sample=False, eos_token_id=list(stops)
                    )[0, ids.shape[1] :]
                ended = int(drawn[-1]) in stops
                text = tokenizer.decode(drawn[:-1] if ended else drawn)
                choice = {"message": {"content": text}, "finish_reason": "stop" if ended else "length"}
                self.answer(200, {"choices": [choice], "usage": {"completion_tokens": len(drawn)}})

            def log_message(self, *arguments: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def ids_of(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
        """The prompt's tokens [1, length]: by the chat template, where there is one."""
        if not tokenizer.chat_template:
            return tokenizer(messages[-1]["content"], return_tensors="pt").input_ids
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
