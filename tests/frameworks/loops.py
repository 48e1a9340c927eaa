"""A loop of tools in each framework, as its users write it. Runs in the framework's environment.

    .venv-frameworks/bin/python -m tests.frameworks.loops NAME URL

prints as JSON what the framework's own tools were called with, and what was announced. `URL` is
the gateway's, or a tap's before it (tap.py).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any, Literal, get_type_hints

from kvmem.agents.announcing import Hint

SYSTEM = "You look around in an old house, room by room, and tell vividly what is there. " * 12
ASK = "What is there?"
ROOMS = 40  # more than any loop here has turns
CALLS: list[str] = []


Thing = Literal["the old door", "a window", "the stairs", "some books", "a clock", "the fireplace"]


def look(q: Thing) -> str:
    """Looks at something in the house.

    Args:
        q: at what
    """
    CALLS.append(q)
    return f"Room {len(CALLS)}: {q!r} is here, with a door in the north."


# crewai can't read a type's name.
look.__annotations__ = get_type_hints(look)


class Heard:
    """An announcer that keeps what it hears."""

    def __init__(self) -> None:
        self.hints: list[Hint] = []

    def announce(self, hint: Hint) -> None:
        self.hints.append(hint)


def langchain(url: str, heard: Heard) -> None:
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI
    from langgraph.checkpoint.memory import InMemorySaver

    from kvmem.agents.adapters.langchain import KvmemMiddleware

    kvmem = KvmemMiddleware(heard)
    agent = create_agent(
        ChatOpenAI(model="smol", base_url=f"{url}/v1", api_key="none", max_retries=0),
        [look], system_prompt=f"LangChain. {SYSTEM}", middleware=[kvmem],
        checkpointer=InMemorySaver(),
    )  # fmt: skip
    config: Any = {"configurable": {"thread_id": "langchain"}, "recursion_limit": 200}
    agent.invoke({"messages": [{"role": "user", "content": ASK}]}, config)
    kvmem.end("langchain")


def openai_agents(url: str, heard: Heard) -> None:
    from agents import OpenAIChatCompletionsModel, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    _openai_agents(OpenAIChatCompletionsModel("smol", client), "openai-agents", heard)


def _openai_agents(model: Any, name: str, heard: Heard) -> None:
    from agents import Agent, Runner, function_tool

    from kvmem.agents.adapters.openai_agents import KvmemSession

    session = KvmemSession(name, announcer=heard)
    agent = Agent(
        name="looker", instructions=f"{name}. {SYSTEM}", model=model,
        tools=[function_tool(look)], reset_tool_choice=False,
    )  # fmt: skip
    run = Runner.run(
        agent, ASK, session=session, hooks=session.hooks, run_config=session.run_config(),
        max_turns=ROOMS,
    )  # fmt: skip
    asyncio.run(run)
    session.end()
    session.close()


def pydantic_ai(url: str, heard: Heard) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    from kvmem.agents.adapters.pydantic_ai import Kvmem

    kvmem = Kvmem(heard)
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    agent = Agent(
        OpenAIChatModel("smol", provider=provider), instructions=f"pydantic-ai. {SYSTEM}",
        tools=[look], capabilities=[kvmem],
    )  # fmt: skip
    agent.run_sync(ASK, conversation_id="pydantic-ai")
    kvmem.end("pydantic-ai")


def agent_framework(url: str, heard: Heard) -> None:
    from agent_framework import Agent
    from agent_framework_openai import OpenAIChatCompletionClient

    from kvmem.agents.adapters.agent_framework import middleware

    async def loop() -> None:
        client = OpenAIChatCompletionClient(model="smol", base_url=f"{url}/v1", api_key="none")
        client.function_invocation_configuration["max_iterations"] = ROOMS
        kvmem = middleware(heard)
        agent = Agent(
            client=client, instructions=f"agent-framework. {SYSTEM}", tools=[look],
            middleware=[*kvmem],
        )  # fmt: skip
        session = agent.create_session(session_id="agent-framework")
        await agent.run(ASK, session=session)
        kvmem[0].end(session)

    asyncio.run(loop())


def google_adk(url: str, heard: Heard) -> None:
    from google.adk.agents import LlmAgent
    from google.adk.models.lite_llm import LiteLlm
    from google.adk.runners import InMemoryRunner
    from google.genai import types

    async def loop() -> None:
        model = LiteLlm(model="openai/smol", api_base=f"{url}/v1", api_key="none",
                        extra_headers={"X-Session-ID": "adk"})  # fmt: skip
        agent = LlmAgent(name="looker", model=model, instruction=f"adk. {SYSTEM}", tools=[look])
        runner = InMemoryRunner(agent, app_name="house")
        session = await runner.session_service.create_session(app_name="house", user_id="me")
        message = types.Content(role="user", parts=[types.Part(text=ASK)])
        async for _ in runner.run_async(user_id="me", session_id=session.id, new_message=message):
            continue

    asyncio.run(loop())


def crewai(url: str, heard: Heard) -> None:
    from crewai import LLM, Agent
    from crewai.tools import tool

    llm = LLM(model="openai/smol", base_url=f"{url}/v1", api_key="none",
              default_headers={"X-Session-ID": "crewai"})  # fmt: skip
    agent = Agent(role="looker", goal="look around", backstory=f"crewai. {SYSTEM}", llm=llm,
                  tools=[tool("look")(look)], max_iter=ROOMS, verbose=False)  # fmt: skip
    agent.kickoff(ASK)


LOOPS: dict[str, Callable[[str, Heard], None]] = {
    one.__name__: one
    for one in (
        langchain, openai_agents, pydantic_ai, agent_framework, google_adk, crewai,
    )
}  # fmt: skip


def main() -> None:
    name, url = sys.argv[1:]
    heard = Heard()
    LOOPS[name](url, heard)
    hints = [[hint.what, hint.session_id, hint.tool, hint.n_tokens] for hint in heard.hints]
    print(json.dumps({"calls": CALLS, "hints": hints}))


if __name__ == "__main__":
    main()
