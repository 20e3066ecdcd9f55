"""Words to ids and back: tokenizer, chat templates, and the parser of replies. No torch here: serving and training share these files."""
