"""Completions from a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, TRT-LLM, hosted ones.

No torch here: a server is asked by processes that have no need of it.
"""

from __future__ import annotations

from renio_megatron.evaluation.server.answers import Drawn
from renio_megatron.evaluation.server.client import CompletionServer, ServerError
from renio_megatron.evaluation.server.requests import ServerRequest, ServerSampling

__all__ = ["CompletionServer", "Drawn", "ServerError", "ServerRequest", "ServerSampling"]
