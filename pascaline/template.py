"""Chat templates: our own, and the sandbox in which a folder's own runs."""

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pascaline.errors import BadInput

# A thought is shown only after the last user message, as DeepSeek-R1's own template does: earlier ones cost tokens.
TEMPLATE = """\
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {{- message['content'] -}}
    {%- elif message['role'] == 'user' -%}
        {{- '<|user|>' + message['content'] -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
        {%- if loop.index0 > ns.last_user -%}
            {{- '<think>' + (message['reasoning_content'] or '') + '</think>' -}}
        {%- endif -%}
        {{- message['content'] + eos_token -}}
    {%- elif message['role'] == 'system' -%}
        {{- raise_exception('a system message can only come first') -}}
    {%- else -%}
        {{- raise_exception('unknown role: ' + message['role'] + ' (system, user and assistant are known)') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|><think>' -}}
    {%- if thinking is defined and not thinking -%}{{- '</think>' -}}{%- endif -%}
{%- endif -%}
"""


def compiled(source: str) -> jinja2.Template:
    """A template with the names that transformers gives to one. BadInput if it is not valid Jinja."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise BadInput(f"the chat template is not valid Jinja: {error}") from error


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML; models were trained on plain JSON."""
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), indent=indent, **options)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words in some templates; transparent here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
