"""The same prompt three times on a real vLLM, and where its KV came from each time."""

from vllm import LLM, SamplingParams

from kvmem.demo import model  # SmolLM2-135M; any checkpoint will do


def main() -> None:
    """Prints `tokens` of three receipts: computed, from the host tier, and computed on request."""
    llm = LLM(
        str(model.ensure()),
        block_size=32,
        max_model_len=2048,
        enforce_eager=True,  # a model this small is served sooner than it is compiled
        kv_transfer_config={
            "kv_connector": "KvmemConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"host_gb": 0.5},
        },
    )
    prompt = "You are one of a team of agents that share these instructions. " * 40

    def ask(**wishes: bool) -> dict[str, int]:
        llm.reset_prefix_cache()  # vLLM forgets it, as it would under load; kvmem does not
        params = SamplingParams(
            max_tokens=8, temperature=0, extra_args={"kv_transfer_params": {"kvmem": wishes}}
        )
        (answer,) = llm.generate([prompt], params, use_tqdm=False)
        return answer.kv_transfer_params["kvmem"]["tokens"]

    print("first:  ", ask())
    print("again:  ", ask())
    print("no load:", ask(load=False))


if __name__ == "__main__":
    main()
