"""BLIP-2's prompts as a chat template: pictures first, then BOS, then the words (`Blip2Processor.__call__`)."""

# A line that is `<image>` and nothing else is a picture: in users' words it is marked, and so another string.
BLIP2_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('BLIP-2 knows no other role than user and assistant: put it in the query') }}{% endif %}"
    "{% set lines = message['content'].split('\n') %}"
    "{{ lines | select('equalto', '<image>') | join('') }}"
    "{% if loop.first %}{{ bos_token }}{% else %} {% endif %}"
    "{{ lines | reject('equalto', '<image>') | join('\n') }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


__all__ = ["BLIP2_TEMPLATE"]
