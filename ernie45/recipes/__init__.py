"""One readable story per thing a person does; `ernie45.cli` is the table of them."""
