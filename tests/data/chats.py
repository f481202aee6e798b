"""A byte-level tokenizer, chat templates in the shapes that published models have, and a family that has both."""

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

# Own words for shapes that are found in the field, small.
CHATML = """
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
CHATML_MARKED = """
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\n' }}
{%- else -%}{{ message.content + '<|im_end|>\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
LLAMA3 = """
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
"""
# The system prompt moves to the last question, as in Mistral's own: earlier turns look different afterwards.
MISTRAL = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{% set system, rest = messages[0].content, messages[1:] %}
{%- else -%}{% set system, rest = '', messages %}{%- endif -%}
{%- for message in rest -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{%- if message.role == 'user' -%}
{%- if system and (loop.last or loop.index0 == rest | length - 2) -%}
{{ '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}
{%- else -%}{{ '[INST] ' + message.content + '[/INST]' }}{%- endif -%}
{%- else -%}{{ ' ' + message.content + eos_token }}{%- endif -%}
{%- endfor -%}
"""
GEMMA = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for message in messages -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
# Thoughts stay in the turns after the last question, and the last turn shows them even when there are none.
QWEN3 = """
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{% set last.user = loop.index0 %}{%- endif -%}
{%- endfor -%}
{%- if tools -%}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set thoughts = message.reasoning_content if message.reasoning_content is string else '' -%}
{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > last.user and (loop.last or thoughts) -%}
{{ '<think>\n' + thoughts + '\n</think>\n\n' }}
{%- endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- else -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
# The prompt opens a thought that a finished turn does not show.
R1 = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.tool_calls -%}{{ '<|Assistant|><tool>' + message.tool_calls[0].function.arguments + eos_token }}
{%- elif message.role == 'assistant' -%}{{ '<|Assistant|>' + message.content + eos_token }}
{%- else -%}{{ '<|User|>' + message.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\n' }}{%- endif -%}
"""

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
    "<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>", "<tool>",
]  # fmt: skip


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token for each byte, and the special ones."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(BPE(letters, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.add_tokens([AddedToken(token, special=True) for token in SPECIAL], special_tokens=True)
    made.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    if template is not None:
        made.chat_template = template
    return made


@dataclass
class Spoken:
    """What data asks of a family of language models."""

    template: str | None = CHATML
    context: int = 4096

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizer(self.template)


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def talk(turns: int, seed: int = 0) -> list[dict[str, Any]]:
    """A conversation of so many questions and answers."""
    said = []
    for turn in range(turns):
        said += [
            says("user", f"question {seed}.{turn}?"),
            says("assistant", f"answer {seed}.{turn}: {'é' * (seed % 7)}!"),
        ]
    return said
