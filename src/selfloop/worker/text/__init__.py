"""Text in a worker: tokens, chat templates, grammars."""
