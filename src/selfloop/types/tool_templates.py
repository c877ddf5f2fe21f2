"""Chat templates with tools, for models whose own template has none.

A model of which we know the format is served with tools all the same. Its folder, and so what clients download, stays
as it is: the template here writes the conversation only where a request sends tools.
"""

import hashlib

_SMOLLM2 = "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"

# The turns of the model's own template, also for results; tools and calls as JSON between the tags of Hermes models.
_WITH_TOOLS = """\
{%- set first = messages[0] if messages[0].role == 'system' else none %}
{{- '<|im_start|>system\\n' }}
{{- first.content if first else 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' }}
{{- '\\n\\n# Tools\\n\\nYou may call these functions; each line between <tools> and </tools> is one:\\n<tools>' }}
{%- for tool in tools %}
    {{- '\\n' + (tool | tojson) }}
{%- endfor %}
{{- '\\n</tools>\\n\\nTo call one, write its name and arguments as JSON between <tool_call> and </tool_call>:\\n' }}
{{- '<tool_call>\\n{"name": <function name>, "arguments": <object of arguments>}\\n</tool_call><|im_end|>\\n' }}
{%- for message in messages %}
    {%- if not (loop.first and first) %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

_BY_OWN = {_SMOLLM2: _WITH_TOOLS}


def template_with_tools(own: str) -> str:
    """The template that writes a conversation with tools: the model's ``own``, unless we have one in its place.

    Only the very text of a template that we know is replaced; a model that was given another one keeps that.
    """
    return _BY_OWN.get(hashlib.sha256(own.encode()).hexdigest(), own)
