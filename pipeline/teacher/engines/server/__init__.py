"""Teachers behind an HTTP API: `vllm serve`, SGLang, llama.cpp's server, and hosted ones in OpenAI's form.

    server_opening   server_kinds: which server is it?  preflight: can it be a teacher?
    server_engine    documents or prompts ─▶ a dialect: what one kind of server is asked ─▶ http_client: retries
                     ─▶ top_lists: K tokens with log-probabilities, checked ─▶ targets of a row

Options are in `server_config`.
"""
