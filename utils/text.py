"""Make text from users and data sets safe for a terminal, a table or a figure."""


def one_line(text: object) -> str:
    """Return the text on one line, without control characters and marks that change its direction."""
    joiners = "\u200c\u200d"  # Persian, Hindi and emoji need them
    kept = (character if character.isprintable() or character in joiners else " " for character in str(text))
    return " ".join("".join(kept).split())
