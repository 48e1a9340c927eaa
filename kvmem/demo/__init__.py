"""The demo: a real small model, a team of agents on a real vLLM, one table and one picture."""
