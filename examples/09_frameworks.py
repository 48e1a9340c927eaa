"""Three frameworks, one cache: each asks through the gateway with the same instructions.

make frameworks && .venv-frameworks/bin/python examples/09_frameworks.py
"""

import asyncio
import os

from agents import Agent as OpenAIAgent
from agents import OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from kvmem.agents.adapters.langchain import KvmemMiddleware
from kvmem.agents.adapters.openai_agents import KvmemSession
from kvmem.agents.adapters.pydantic_ai import Kvmem

url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8900/v1")  # of `kvmem gateway`
model = OpenAI(base_url=url, api_key="none").models.list().data[0].id
rules = "You are one of a team of agents that share these instructions. " * 40
set_tracing_disabled(True)

chat = ChatOpenAI(model=model, base_url=url, api_key="none", max_tokens=24)
agent = create_agent(chat, system_prompt=rules, middleware=[KvmemMiddleware(session_id="lang")])
told = agent.invoke({"messages": [{"role": "user", "content": "Where do we go?"}]})
usage = told["messages"][-1].usage_metadata
print("langchain:", usage["input_token_details"].get("cache_read", 0), "of", usage["input_tokens"])

session = KvmemSession("openai")
answers = OpenAIChatCompletionsModel(model, AsyncOpenAI(base_url=url, api_key="none"))
second = OpenAIAgent(name="second", instructions=rules, model=answers)
run = Runner.run(second, "When do we go?", session=session, run_config=session.run_config())
used = asyncio.run(run).context_wrapper.usage
print("openai-agents:", used.input_tokens_details.cached_tokens, "of", used.input_tokens)

provider = OpenAIProvider(base_url=url, api_key="none")
third = PydanticAgent(OpenAIChatModel(model, provider=provider), instructions=rules,
                      capabilities=[Kvmem()])  # fmt: skip
spent = third.run_sync("Who goes?", model_settings={"max_tokens": 24}).usage
print("pydantic-ai:", spent.cache_read_tokens, "of", spent.input_tokens)
