"""Chat templates of the kinds that models bring, as short as they can be."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<turn>' + role + '\\n' + m['content'] | trim + '</turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"
)
VICUNA = (
    "A chat. {% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\\n' + m['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
LAST_THINKS = (  # as Qwen3: an empty block of thoughts in the last answer alone
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DROPS_THOUGHTS = (  # as DeepSeek-R1: what stands before </think> goes
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[U]' + m['content'] }}"
    "{% else %}{{ '[A]' + m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[A]' }}{% endif %}"
)
ASKS_FOR_THOUGHTS = DROPS_THOUGHTS.replace("'[A]' }}", "'[A]<think>\\n' }}")
WHOLE = {"chatml": CHATML, "llama2": LLAMA2, "gemma": GEMMA, "vicuna": VICUNA}
"""Those that only append as turns are added."""


def turns(*contents: str) -> tuple[dict[str, str], ...]:
    """Questions and answers in turn."""
    roles = ("user", "assistant") * len(contents)
    return tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))
