"""The HTTP edge: routes, schemas and streaming over an `EngineClient`; text stays here, the engine sees token ids."""
