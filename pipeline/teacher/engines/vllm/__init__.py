"""Teachers in vLLM, in this process; see `vllm_engine`."""
