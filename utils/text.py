"""Texts that a user or a data set wrote, on their way to a terminal, a table or a figure."""


def printable(text: object) -> str:
    """Return the text on one line, without control and direction marks, which could rearrange what is around it."""
    kept = (character if character.isprintable() or character in "\u200c\u200d" else " " for character in str(text))
    return " ".join("".join(kept).split())  # the two kept join and part letters in Persian, Hindi and emoji
