"""OpenAI-compatible chat endpoints: one client, the journal of its answers, and collecting from a teacher. No torch."""
