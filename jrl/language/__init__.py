"""Text as a Markov decision process: the state is the text so far, the action the next token.

Nothing is imported here; each module is its own door.
"""
