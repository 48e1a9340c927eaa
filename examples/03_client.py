"""An unmodified OpenAI client of `kvmem serve`: wishes go out, a receipt comes back."""

from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none
instructions = "You are one of a team of agents that share these instructions. " * 40
answer = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[
        {"role": "system", "content": instructions},
        {"role": "user", "content": "Who are you?"},
    ],
    max_tokens=8,
    extra_body={"kv_transfer_params": {"kvmem": {"load": True, "store": True}}},
)
receipt = (answer.model_extra or {})["kv_transfer_params"]["kvmem"]
print(receipt["tokens"], receipt["blocks_stored"], receipt["miss"])
