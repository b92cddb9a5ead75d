"""Chat templates in the manner of published ones, each written anew in a few lines, on the tiny tokenizer.

They differ where published ones differ: a beginning-of-text token, a default system message, today's date, where tools
are announced and how calls are written, trimmed content, content in parts, and what becomes of thoughts.

    chat = FORMATS["qwen3"]
    chat.tokenizer()                        # knows its special tokens and has its template
    chat.says("Four.")                      # what the loss is on: "Four.<|im_end|>"
    chat.calls("add", {"left": 2})
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from tiny import CHAT_TEMPLATE, tiny_tokenizer

# Llama 3.1: date and tools in the system message, trimmed content, one call as JSON with `parameters`.
_LLAMA3 = """\
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif -%}
{%- if messages and messages[0].role == 'system' %}{% set system = messages[0].content | trim %}
{%- set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif -%}
{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}
{%- if tools is not none %}{{ 'Tools:\n' }}{% for tool in tools %}{{ tool | tojson(indent=4) + '\n' }}{% endfor %}
{%- endif %}{{ system + '<|eot_id|>' }}
{%- for message in rest %}
{%- if message.tool_calls %}{% set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{ '}<|eot_id|>' }}
{%- else %}{% set role = 'ipython' if message.role == 'tool' else message.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

_HERMES_TOOLS = """\
{%- macro announce(tools) %}{{ '\n\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}
{%- endfor %}{{ '\n</tools>' }}{% endmacro -%}
{%- macro write(call) %}{{ '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
{%- if call.arguments is string and raw_strings %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}
{{- '}\n</tool_call>' }}{% endmacro -%}
"""

# Qwen 2.5: ChatML with a default system message, tools in it, tool results in a user turn.
_QWEN25 = (
    "{% set raw_strings = false %}"
    + _HERMES_TOOLS
    + """\
{%- set given = messages and messages[0].role == 'system' -%}
{{ '<|im_start|>system\n' + (messages[0].content if given else 'You help.') }}
{%- if tools %}{{ announce(tools) }}{% endif %}{{ '<|im_end|>\n' }}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + message.content }}
{{- '\n</tool_response><|im_end|>\n' }}
{%- elif message.role != 'system' %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}
{%- for each in message.tool_calls or [] %}{{ '\n' if not loop.first or message.content }}{{ write(each.function) }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)

# Qwen 3: thoughts only since the last question, an empty thought in the last answer, `enable_thinking`.
_QWEN3 = (
    "{% set raw_strings = true %}"
    + _HERMES_TOOLS
    + """\
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- if tools or system %}{{ '<|im_start|>system\n' + system }}
{%- if tools %}{{ announce(tools) }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}
{%- set found = namespace(question=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set found.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content if message.content is string else '' %}{% set thought = '' %}
{%- if message.reasoning_content is string %}{% set thought = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > found.question and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}
{{- content }}
{%- for each in message.tool_calls or [] %}{{ '\n' if not loop.first or content }}{{ write(each.function) }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + message.content }}
{{- '\n</tool_response><|im_end|>\n' }}
{%- elif message.role != 'system' %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
)

# Gemma 3: the system message in front of the first question, roles user and model, content in parts, trimmed.
_GEMMA3 = """\
{{- bos_token }}
{%- macro text(content) %}{% if content is string %}{{ content | trim }}{% else %}
{%- for part in content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}
{%- endmacro %}
{%- set first = '' %}{% set rest = messages %}
{%- if messages and messages[0].role == 'system' %}{% set first = text(messages[0].content) + '\n\n' %}
{%- set rest = messages[1:] %}{% endif %}
{%- for message in rest %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{{- first if loop.first }}{{ text(message.content) }}{{ '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Mistral 7B v0.3: tools and system message stand at the last question, wherever that is.
_MISTRAL = """\
{%- set system = '' %}{% set rest = messages %}
{%- if messages and messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}
{%- set rest = messages[1:] %}{% endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list -%}
{{ bos_token }}
{%- for message in rest %}
{%- if message.role == 'user' %}
{%- if message == users[-1] %}{% if tools %}{{ '[AVAILABLE_TOOLS]' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}
{%- endif %}{{ '[INST] ' + system + message.content + '[/INST]' }}
{%- else %}{{ '[INST] ' + message.content + '[/INST]' }}{% endif %}
{%- elif message.tool_calls %}{{ '[TOOL_CALLS] [' }}
{%- for each in message.tool_calls %}{{ each.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}
{{- ']' + eos_token }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content | trim + eos_token }}
{%- else %}{{ '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}{% endif %}
{%- endfor %}"""

# Phi-4: no newline between turns.
_PHI4 = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

# DeepSeek-R1: thoughts are always dropped, the generation prompt opens them, arguments must be strings.
_DEEPSEEK_R1 = """\
{{- bos_token }}{% for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<|User|>' + message.content }}
{%- elif message.role == 'tool' %}{{ '<|tool_output|>' + message.content }}
{%- elif message.tool_calls %}{{ '<|Assistant|>' }}{% for each in message.tool_calls %}
{{- '<|tool_call|>' + each.function.name + '\n```json\n' + each.function.arguments + '\n```' }}{% endfor %}
{{- eos_token }}
{%- elif message.role == 'assistant' %}{{ '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""


@cache
def _base() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(500)


@dataclass(frozen=True)
class Format:
    """One template; `{}` in `answer` is the text, in `call` the name and the arguments as JSON."""

    template: str
    special_tokens: tuple[str, ...]
    answer: str
    call: str = ""  # empty: the format has no tools

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = copy.deepcopy(_base())
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.special_tokens)})
        tokenizer.chat_template = self.template
        return tokenizer

    def says(self, text: str) -> str:
        return self.answer.format(text)

    def calls(self, name: str, arguments: dict[str, Any]) -> str:
        return self.call.replace("NAME", name).replace("ARGUMENTS", json.dumps(arguments))


_IM = ("<|im_start|>", "<|im_end|>")
_HERMES_CALL = '<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call><|im_end|>'

FORMATS = {
    "chatml": Format(CHAT_TEMPLATE, _IM, "{}<|im_end|>"),
    "llama3": Format(
        _LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "{}<|eot_id|>",
        '{"name": "NAME", "parameters": ARGUMENTS}<|eot_id|>',
    ),
    "qwen2.5": Format(_QWEN25, _IM, "{}<|im_end|>", _HERMES_CALL),
    "qwen3": Format(_QWEN3, (*_IM, "<think>", "</think>"), "{}<|im_end|>", _HERMES_CALL),
    "gemma3": Format(_GEMMA3, ("<start_of_turn>", "<end_of_turn>"), "{}<end_of_turn>"),
    "mistral": Format(
        _MISTRAL,
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
        " {}<|eos|>",
        '[TOOL_CALLS] [{"name": "NAME", "arguments": ARGUMENTS}]<|eos|>',
    ),
    "phi4": Format(_PHI4, (*_IM, "<|im_sep|>"), "{}<|im_end|>"),
    "deepseek-r1": Format(
        _DEEPSEEK_R1,
        ("<|User|>", "<|Assistant|>", "<think>", "</think>", "<|tool_call|>", "<|tool_output|>"),
        "{}<|eos|>",
        "<|tool_call|>NAME\n```json\nARGUMENTS\n```<|eos|>",
    ),
}
