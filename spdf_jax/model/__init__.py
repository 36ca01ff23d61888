"""The model: a GPT as a pure function of its parameters, what it costs, how it continues a text."""
