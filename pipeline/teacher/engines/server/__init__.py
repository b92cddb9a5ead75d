"""Teachers behind an HTTP API: `vllm serve`, SGLang, and, for answers, llama.cpp's server and hosted APIs.

server_config ─▶ server_opening ─▶ server_kinds: which server is it?  preflight: is it usable?  ─▶ server_engine
server_engine: documents as requests ─▶ http_client: retries ─▶ a dialect: request and answer of one kind of server
               ─▶ top_lists: K tokens with log-probabilities, checked ─▶ targets of a row
"""
