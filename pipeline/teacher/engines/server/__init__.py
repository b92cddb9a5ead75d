"""Teachers behind an HTTP API: `vllm serve` and SGLang.

    server_opening   server_kinds: which server is it?  preflight: can it be a teacher?
    server_engine    documents, prompts ─▶ a dialect: requests and answers of one kind of server ─▶ http_client: retries
                     ─▶ top_lists: K tokens with log-probabilities, checked ─▶ targets of a row

Options are in `server_config`.
"""
