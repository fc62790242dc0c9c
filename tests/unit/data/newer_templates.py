"""Chat templates of later families, with tools, thinking and moving parts, written down from their published formats.

Each with the control tokens its tokenizer has and the tokens its model stops at. Only what decides where turns
begin and end is kept; wordings of built-in system prompts and of tool instructions are shortened.
"""

# ruff: noqa: E501 - templates are kept in their own line breaks

from __future__ import annotations

from tests.unit.data.style import Style

_TAKE_SYSTEM = """{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"""

_ALTERNATE = """{%- set ns = namespace(asked=false) -%}{%- for m in turns -%}
{%- if m.role in ['user', 'assistant'] and not m.tool_calls -%}
{%- if (m.role == 'user') == ns.asked -%}{{ raise_exception('user and assistant must take turns') }}{%- endif -%}
{%- set ns.asked = m.role == 'user' -%}{%- endif -%}{%- endfor -%}"""


def _llama(day: str) -> str:
    """Llama 3.1 and later: a system turn always, with a date; tools in the first user turn."""
    return (
        "{{- bos_token }}"
        + _TAKE_SYSTEM
        + """{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + """
        + day
        + """ + '\\n\\n' + system | trim + '<|eot_id|>' }}
{%- if tools %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with a JSON function call.\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
{{- turns[0].content | trim + '<|eot_id|>' }}{%- set turns = turns[1:] %}
{%- endif %}
{%- for m in turns %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
    )


# v2: spaces around the question, tools before the last of them.
MISTRAL_V2 = (
    _TAKE_SYSTEM
    + _ALTERNATE
    + """{{- bos_token }}
{%- for m in turns %}
{%- if m.role == 'user' %}
{{- ' [INST] ' + (system + '\\n\\n' if loop.first and system else '') + m.content + ' [/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}"""
)

# v3 with tekken: no spaces at all; system prompt and tools before the last question; call ids of nine characters.
MISTRAL_TEKKEN = (
    _TAKE_SYSTEM
    + _ALTERNATE
    + """{%- set asked = turns | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in turns %}
{%- if m.role == 'user' %}
{%- if tools and m == asked[-1] %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST]' + (system + '\\n\\n' if loop.last and system else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS][' }}
{%- for call in m.tool_calls %}
{%- if call.id | default('') | length != 9 %}{{- raise_exception('call ids have nine characters') }}{%- endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']' + eos_token) }}
{%- endfor %}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS]{"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{- m.content + eos_token }}{%- endif %}
{%- endfor %}"""
)

# v7: a system turn of its own; without one, a default that names today.
MISTRAL_V7 = (
    _TAKE_SYSTEM
    + _ALTERNATE
    + """{{- bos_token }}
{%- if not system %}{%- set system = 'You are Mistral Small 3. The current date is ' + strftime_now('%Y-%m-%d') + '.' %}{%- endif %}
{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for m in turns %}
{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}
{%- for call in m.tool_calls %}{{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' + call.function.arguments | tojson }}{%- endfor %}
{{- eos_token }}
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]' + m.tool_call_id + '[TOOL_CONTENT]' + m.content + '[/TOOL_RESULTS]' }}
{%- else %}{{- m.content + eos_token }}{%- endif %}
{%- endfor %}"""
)

# The system prompt stands in front of the first question.
GEMMA_3 = (
    "{{ bos_token }}"
    + _TAKE_SYSTEM
    + _ALTERNATE
    + """{%- for m in turns -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (system + '\\n\\n' if loop.first and system else '') }}
{{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
)

# Other brackets; a call is closed by nothing, as the tool's answer follows in the same turn; thoughts are stripped.
GEMMA_4 = (
    """{%- macro bare(text) -%}{%- for part in text.split('<channel|>') -%}{{ part.split('<|channel>')[0] }}{%- endfor -%}{%- endmacro -%}
{{ bos_token }}"""
    + _TAKE_SYSTEM
    + """{%- if system or tools -%}
{{ '<|turn>system\\n' + system | trim }}
{%- for tool in tools or [] -%}{{ '<|tool>declaration:' + tool.function.name + '{}<tool|>' }}{%- endfor -%}
{{ '<turn|>\\n' }}
{%- endif -%}
{%- for m in turns -%}
{%- if m.role == 'tool' -%}{{ '<|tool_response>response:weather{value:' + m.content + '}<tool_response|>' }}
{%- else -%}
{%- if not (m.role == 'assistant' and loop.previtem and loop.previtem.role == 'tool') -%}
{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}{%- endif -%}
{%- if m.reasoning_content and loop.last -%}{{ '<|channel>thought\\n' + m.reasoning_content + '\\n<channel|>' }}{%- endif -%}
{%- for call in m.tool_calls or [] -%}{{ '<|tool_call>call:' + call.function.name + '{' }}
{%- for key, value in call.function.arguments | dictsort -%}{{ key + ':<|"|>' + value + '<|"|>' }}{%- endfor -%}{{ '}<tool_call|>' }}{%- endfor -%}
{{ (bare(m.content) if m.role == 'assistant' else m.content or '') | trim if m.content else '' }}
{%- if not m.tool_calls -%}{{ '<turn|>\\n' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}{{ '<|turn>model\\n' }}{%- endif -%}"""
)

PHI_4 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

PHI_4_MINI = """{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}\
{% if m.role == 'system' and tools %}{{ '<|tool|>' + tools | tojson + '<|/tool|>' }}{% endif %}{{ '<|end|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""


_XML_CALL = """{%- for call in m.tool_calls or [] %}
{{- '\\n' if m.content or not loop.first else '' }}
{{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for key, value in call.function.arguments | items %}{{- '<parameter=' + key + '>\\n' + value + '\\n</parameter>\\n' }}{%- endfor %}
{{- '</function>\\n</tool_call>' }}
{%- endfor %}"""

_JSON_CALL = """{%- for call in m.tool_calls or [] %}
{{- '\\n' if m.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}"""


def _qwen(call: str, *, thinks: bool, prompt: str = "", empty_block: bool = False) -> str:
    """Qwen after 3: instruct models (`thinks=False`), thinking models, and 3.5 with its block around no thought."""
    earlier = (
        "{%- set last = namespace(ask=-1) %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.ask = loop.index0 %}{%- endif %}{%- endfor %}"
    )
    block = "'<think>\\n' + thought | trim + '\\n</think>\\n\\n'"
    shown = f"{{{{- {block} if loop.index0 + messages | length - turns | length > last.ask and ({'true' if empty_block else 'thought'}) else '' }}}}"
    split = """{%- set thought, content = m.reasoning_content or '', m.content or '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}"""
    plain = "{%- set content = m.content or '' %}"
    return (
        (earlier if thinks else "")
        + _TAKE_SYSTEM
        + """{%- if system or tools %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}{{- '\\n\\n# Tools\\n\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}{{- '\\n</tools>' }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in turns %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
"""
        + (split if thinks else plain)
        + "{{- '<|im_start|>assistant\\n' }}"
        + (shown if thinks else "")
        + "{{- content }}"
        + call
        + """{{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n"""
        + prompt
        + """' }}{%- endif %}"""
    )


# The end of a turn is the next one's beginning; an empty block where there was no thought, or is none any more.
GLM_4_5 = """[gMASK]<sop>{%- set last = namespace(ask=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.ask = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}{{ '<|system|>\\n# Tools\\n' }}{%- for tool in tools -%}{{ tool | tojson }}{%- endfor -%}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|assistant|>\\n<think>' + (m.reasoning_content | trim if m.reasoning_content and loop.index0 > last.ask else '') + '</think>' }}
{{- '\\n' + m.content | trim if m.content and m.content | trim else '' }}
{%- for call in m.tool_calls or [] -%}
{{ '\\n<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments | items -%}{{ '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' + value + '</arg_value>' }}{%- endfor -%}
{{ '\\n</tool_call>' }}
{%- endfor -%}
{%- elif m.role == 'tool' -%}{{ '<|observation|>\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- else -%}{{ '<|' + m.role + '|>\\n' + m.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""

# An opening and a closing tag without a thought is the mode that doesn't think.
DEEPSEEK_V3_1 = (
    "{{ bos_token }}"
    + _TAKE_SYSTEM
    + """{{ system }}
{%- for m in turns -%}
{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' -%}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- else -%}
{%- if loop.previtem.role == 'user' -%}{{ '<｜Assistant｜></think>' }}{%- endif -%}
{{ m.content.split('</think>')[-1] if m.content else '' }}
{%- if m.tool_calls -%}{{ '<｜tool▁calls▁begin｜>' }}
{%- for call in m.tool_calls -%}{{ '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments | tojson + '<｜tool▁call▁end｜>' }}{%- endfor -%}
{{ '<｜tool▁calls▁end｜>' }}{%- endif -%}
{{ '<｜end▁of▁sentence｜>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and turns[-1].role == 'user' -%}{{ '<｜Assistant｜></think>' }}{%- endif -%}"""
)

LFM_2 = (
    "{{- bos_token }}"
    + _TAKE_SYSTEM
    + """{%- if tools %}{%- set system = system + ('\\n' if system else '') + 'List of tools: <|tool_list_start|>' + tools | tojson + '<|tool_list_end|>' %}{%- endif %}
{%- if system %}{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{%- endif %}
{%- for m in turns %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'tool' %}{{- '<|tool_response_start|>' + m.content + '<|tool_response_end|>' }}
{%- elif m.tool_calls %}
{{- '<|tool_call_start|>[' }}
{%- for call in m.tool_calls %}{{- call.function.name + '(' }}{%- for key, value in call.function.arguments | items %}{{- key + '=' + value | tojson }}{%- endfor %}{{- ')' }}{%- endfor %}
{{- ']<|tool_call_end|>' + (m.content or '') }}
{%- else %}{{- m.content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
)

# Nano 2: only the last answer follows an opened block, and it stands behind a line of its own.
NEMOTRON_NANO_2 = (
    _TAKE_SYSTEM
    + """{{- '<SPECIAL_10>System\\n' + system.replace('/think', '') | trim + '\\n\\n' }}
{%- for m in turns %}
{%- if m.role == 'user' %}{{- '<SPECIAL_11>User\\n' + m.content | trim + '\\n' }}
{%- elif m.role == 'tool' %}{{- '<SPECIAL_11>User\\n<TOOL_RESPONSE>[' + m.content + ']</TOOL_RESPONSE>\\n\\n' }}
{%- else %}
{{- '<SPECIAL_11>Assistant\\n' }}
{%- if m.tool_calls %}{{- '<TOOLCALL>[' }}{%- for call in m.tool_calls %}{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}{%- endfor %}{{- ']</TOOLCALL>' }}
{%- elif loop.last and '</think>' not in m.content %}{{- '<think>\\n\\n' + m.content | trim }}
{%- elif loop.last %}{{- m.content | trim }}
{%- else %}{{- m.content.split('</think>')[-1] | trim }}{%- endif %}
{{- '\\n<SPECIAL_12>\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<SPECIAL_11>Assistant\\n<think>\\n\\n' }}{%- endif %}"""
)

# Nemotron 3: an empty block where there was no thought, while generation begins in an open one.
NEMOTRON_3 = (
    """{%- set last = namespace(ask=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.ask = loop.index0 -%}{%- endif -%}{%- endfor -%}
{{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else '') + '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response>\\n<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if m.reasoning_content and loop.index0 > last.ask %}{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{%- else %}{{- '<think></think>' }}{%- endif %}
{{- (m.content or '') | trim }}"""
    + _XML_CALL
    + """{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
)

GRANITE_3 = (
    _TAKE_SYSTEM
    + """{{- '<|start_of_role|>system<|end_of_role|>' + (system or "Knowledge Cutoff Date: April 2024.\\nToday's Date: " + strftime_now('%B %d, %Y') + '.') + '<|end_of_text|>\\n' }}
{%- for m in turns %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""
)

GRANITE_4 = (
    _TAKE_SYSTEM
    + """{%- if system or tools %}{{- '<|start_of_role|>system<|end_of_role|>' + system + (tools | tojson if tools else '') + '<|end_of_text|>\\n' }}{%- endif %}
{%- for m in turns %}
{%- if m.role == 'tool' %}{{- '<|start_of_role|>user<|end_of_role|>\\n<tool_response>\\n' + m.content + '\\n</tool_response><|end_of_text|>\\n' }}
{%- else %}
{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + (m.content or '') }}"""
    + _JSON_CALL
    + """{{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""
)

# Role tags that are words, not control tokens (Tulu's layout).
OLMO_2 = """{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}\
{% if m.role == 'assistant' %}{{ eos_token + ('' if loop.last else '\\n') }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

SMOLLM_3 = (
    _TAKE_SYSTEM
    + """{{- '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' + strftime_now('%d %B %Y') + '\\nReasoning Mode: /think\\n\\n' + system + '\\n\\n<|im_end|>\\n' }}
{%- for m in turns %}
{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
)

# The assistant's header belongs to the question.
YI = """{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}{% for m in messages %}\
{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n<|im_start|>assistant\\n' }}\
{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"""

INTERN_LM = """{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

KIMI_K2 = """{%- if messages[0].role != 'system' -%}<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ '<|im_assistant|>assistant<|im_middle|>' + (m.content or '') }}
{%- if m.tool_calls -%}{{ '<|tool_calls_section_begin|>' }}
{%- for call in m.tool_calls -%}{{ '<|tool_call_begin|>functions.' + call.function.name + ':' + loop.index0 | string + '<|tool_call_argument_begin|>' + call.function.arguments | tojson + '<|tool_call_end|>' }}{%- endfor -%}
{{ '<|tool_calls_section_end|>' }}{%- endif -%}
{%- elif m.role == 'user' -%}{{ '<|im_user|>user<|im_middle|>' + m.content }}
{%- else -%}{{ '<|im_system|>' + m.role + '<|im_middle|>' + m.content }}{%- endif -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}"""

SEED_OSS = """{%- for m in messages %}
{{- bos_token + m.role + '\\n' }}
{%- if m.reasoning_content %}{{- '<seed:think>' + m.reasoning_content | trim + '</seed:think>' }}{%- endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}{{- '<seed:tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for key, value in call.function.arguments | items %}{{- '<parameter=' + key + '>' + value + '</parameter>\\n' }}{%- endfor %}{{- '</function>\\n</seed:tool_call>' }}{%- endfor %}
{{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- bos_token + 'assistant\\n' }}{%- endif %}"""

# Command R7B: words between tokens of their own, and the turn's end behind them.
COMMAND_R7B = """{{ bos_token }}{% for m in messages %}\
{% if m.role == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}\
{% else %}{{ '<|START_OF_TURN_TOKEN|><|' + m.role | upper + '_TOKEN|>' + m.content | trim + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' }}{% endif %}"""

FALCON_3 = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}\
{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '' if loop.last else '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"""

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN = ("<|im_end|>", "<|endoftext|>")
_QWEN_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_LLAMA = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
_LLAMA_STOPS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
_TEKKEN = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
           "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[CALL_ID]", "[ARGS]", "[TOOL_CONTENT]")  # fmt: skip
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_GEMMA_4 = ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
            "<|channel>", "<channel|>", '<|"|>')  # fmt: skip
_PHI = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|/tool|>")
_GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
             "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")  # fmt: skip
_GRANITE = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")

_JSON_TOOL_CALL = '<tool_call>{"name":"weather","arguments":{"city":"Bern"}}</tool_call>'
_XML_TOOL_CALL = "<tool_call><function=weather><parameter=city>Bern</parameter></function></tool_call>"
_LLAMA_CALL = '{"name":"weather","parameters":{"city":"Bern"}}'

NEWER = [
    Style("llama3.1", _llama("'26 Jul 2024'"), _LLAMA, _LLAMA_STOPS, bos="<|begin_of_text|>", eos="<|eot_id|>", call=_LLAMA_CALL),
    Style("llama3.2", _llama("strftime_now('%d %b %Y')"), _LLAMA, _LLAMA_STOPS, bos="<|begin_of_text|>", eos="<|eot_id|>", call=_LLAMA_CALL),
    Style("mistral-v2", MISTRAL_V2, ("<s>", "</s>"), ("</s>",), bos="<s>", eos="</s>"),
    Style("mistral-tekken", MISTRAL_TEKKEN, _TEKKEN, ("</s>",), bos="<s>", eos="</s>", moves=True,
          call='[TOOL_CALLS][{"name":"weather","arguments":{"city":"Bern"},"id":"call12345"}]'),
    Style("mistral-v7", MISTRAL_V7, _TEKKEN, ("</s>",), bos="<s>", eos="</s>", call='[TOOL_CALLS]weather[CALL_ID]call12345[ARGS]{"city":"Bern"}'),
    Style("gemma3", GEMMA_3, _GEMMA, ("<end_of_turn>", "<eos>"), bos="<bos>", eos="<eos>"),
    Style("gemma4", GEMMA_4, _GEMMA_4, ("<turn|>", "<eos>", "<|tool_response>"), bos="<bos>", eos="<eos>",
          call='<|tool_call>call:weather{city:<|"|>Bern<|"|>}<tool_call|>', call_end="<|tool_response>", thought="<|channel>thoughthm<channel|>"),
    Style("phi4", PHI_4, (*_CHATML, "<|im_sep|>"), ("<|im_end|>", "<|endoftext|>"), eos="<|endoftext|>"),
    Style("phi4-mini", PHI_4_MINI, _PHI, ("<|end|>", "<|endoftext|>"), eos="<|endoftext|>"),
    Style("qwen3-instruct", _qwen(_JSON_CALL, thinks=False), _CHATML, _QWEN, plain_added=_QWEN_TAGS, call=_JSON_TOOL_CALL),
    Style("qwen3-thinking", _qwen(_JSON_CALL, thinks=True, prompt="<think>\\n"), _CHATML, _QWEN, plain_added=_QWEN_TAGS,
          call=_JSON_TOOL_CALL, thought="hm</think>"),
    Style("qwen3.5", _qwen(_XML_CALL, thinks=True, prompt="<think>\\n", empty_block=True), _CHATML, _QWEN, plain_added=_QWEN_TAGS,
          rewrites=True, call="</think>" + _XML_TOOL_CALL, thought="hm</think>"),
    Style("qwen3-coder", _qwen(_XML_CALL, thinks=False), _CHATML, _QWEN, plain_added=_QWEN_TAGS, call=_XML_TOOL_CALL),
    Style("glm4.5", GLM_4_5, _GLM, ("<|endoftext|>", "<|user|>", "<|observation|>"), eos="<|endoftext|>", end="<|user|>",
          plain_added=("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
          call="<think></think><tool_call>weather<arg_key>city</arg_key><arg_value>Bern</arg_value></tool_call>", call_end="<|observation|>",
          thought="<think>hm</think>"),
    Style("deepseek-v3.1", DEEPSEEK_V3_1, _DEEPSEEK, ("<｜end▁of▁sentence｜>",), bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>",
          plain_added=("<think>", "</think>"),
          call='<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city":"Bern"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'),
    Style("lfm2", LFM_2, ("<|startoftext|>", *_CHATML, "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
          "<|tool_response_start|>", "<|tool_response_end|>"), ("<|im_end|>",), bos="<|startoftext|>",
          call='<|tool_call_start|>[weather(city="Bern")]<|tool_call_end|>'),
    Style("nemotron-nano-2", NEMOTRON_NANO_2, ("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"), ("<SPECIAL_12>",), eos="<SPECIAL_12>",
          rewrites=True),
    Style("nemotron-3", NEMOTRON_3, _CHATML, ("<|im_end|>",), plain_added=("<think>", "</think>"), call=_XML_TOOL_CALL, thought="hm</think>"),
    Style("granite3", GRANITE_3, _GRANITE, ("<|end_of_text|>",), eos="<|end_of_text|>"),
    Style("granite4", GRANITE_4, _GRANITE, ("<|end_of_text|>",), eos="<|end_of_text|>", call=_JSON_TOOL_CALL),
    Style("olmo2", OLMO_2, ("<|endoftext|>",), ("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>"),
    Style("smollm3", SMOLLM_3, _CHATML, ("<|im_end|>",)),
    Style("yi", YI, _CHATML, ("<|im_end|>",)),
    Style("internlm2.5", INTERN_LM, ("<s>", "</s>", "<|im_start|>", "<|im_end|>"), ("<|im_end|>", "</s>"), bos="<s>", eos="</s>"),
    Style("kimi-k2", KIMI_K2, ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
          "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>"),
          ("<|im_end|>", "[EOS]"), bos="[BOS]",
          call='<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city":"Bern"}<|tool_call_end|><|tool_calls_section_end|>'),
    Style("seed-oss", SEED_OSS, ("<seed:bos>", "<seed:eos>", "<seed:pad>"), ("<seed:eos>",), bos="<seed:bos>", eos="<seed:eos>",
          plain_added=("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>"),
          call="<seed:tool_call><function=weather><parameter=city>Bern</parameter></function></seed:tool_call>", thought="<seed:think>hm</seed:think>"),
    Style("command-r7b", COMMAND_R7B, ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
          "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"), ("<|END_OF_TURN_TOKEN|>",), bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>",
          tail="<|END_RESPONSE|>"),
    Style("falcon3", FALCON_3, ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"), ("<|endoftext|>",), eos="<|endoftext|>"),
]  # fmt: skip
