"""How a model and its work are spread over processes; every piece of it does nothing in a process that is alone."""
