"""Load generator: measures any OpenAI-compatible server from the client's side."""
