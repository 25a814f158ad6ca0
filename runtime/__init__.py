"""Models, tokenizer, templates, sampling, pages, scheduler, engine and `LLM`."""
